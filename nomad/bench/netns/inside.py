"""Sockets of this process inside the namespace of a node: for measuring what its pods will see.

Called by benchmarks and tests. A socket stays in the namespace in which it was made, so only its making happens there.
"""

from __future__ import annotations

import ctypes
import os
import socket

from nomad.settings import Seat

_CLONE_NEWNET = 0x40000000


def socket_in(seat: Seat, kind: int = socket.SOCK_DGRAM, port: int = 0) -> socket.socket:
    """A socket bound to the address of `seat`, which must be one of `namespaces`. Raises `OSError`."""
    path = next(part.removeprefix("--net=") for part in seat.prefix if part.startswith("--net="))
    own, there = os.open("/proc/thread-self/ns/net", os.O_RDONLY), os.open(path, os.O_RDONLY)
    try:
        _enter(there)
        try:
            sock = socket.socket(socket.AF_INET, kind)
        finally:
            _enter(own)
    finally:
        os.close(own)
        os.close(there)
    try:
        sock.bind((seat.host, port))
    except BaseException:
        sock.close()
        raise
    return sock


def _enter(namespace: int) -> None:
    """Move this thread; `os.setns` is there from Python 3.12 on."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
