"""Networks of the test's own, and sockets inside their namespaces."""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Iterator

import pytest

from nomad import topology
from nomad.bench.netns import tun
from nomad.errors import UsageError
from nomad.settings import Seat
from nomad.topology import Topology

CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(scope="session")
def host() -> None:
    """Skips, and says why, where namespaces can't be made."""
    try:
        tun.check()
    except UsageError as exc:
        pytest.skip(str(exc))


@pytest.fixture
def two() -> Topology:
    return topology.from_names(["a", "b"])


def socket_in(seat: Seat, kind: int = socket.SOCK_DGRAM) -> socket.socket:
    """A socket in the namespace of a seat, bound to its address: it stays there, this thread doesn't."""
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
    sock.bind((seat.host, 0))
    sock.settimeout(5.0)
    return sock


@pytest.fixture
def sockets() -> Iterator[list[socket.socket]]:
    """Closed at the end of the test."""
    found: list[socket.socket] = []
    yield found
    for sock in found:
        sock.close()


def _enter(namespace: int) -> None:
    if _libc.setns(namespace, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
