"""Where namespaces can be made, and what tests of them share."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator

import pytest

from nomad import topology
from nomad.bench.netns import switch, tun
from nomad.bench.netns.inside import socket_in
from nomad.bench.netns.namespaces import Namespaces
from nomad.errors import UsageError
from nomad.settings import Seat
from nomad.topology import Topology

SocketAt = Callable[..., socket.socket]
"""A seat, and if wanted the kind of socket -> a socket there."""


@pytest.fixture(scope="session")
def host() -> None:
    """Skips, and says why, where namespaces or TUN devices can't be made."""
    try:
        tun.check()
        namespaces = Namespaces.make(["probe"])
        try:
            os.close(switch.device(f"probe{os.getpid()}", namespaces["probe"], "10.77.0.1", 16, 1500))
        finally:
            namespaces.close()
    except UsageError as exc:
        pytest.skip(str(exc))


@pytest.fixture
def two() -> Topology:
    return topology.from_names(["a", "b"])


@pytest.fixture
def socket_at() -> Iterator[SocketAt]:
    """Sockets in the namespace of a seat that don't wait for ever, and are closed at the end of the test."""
    with contextlib.ExitStack() as stack:

        def make(seat: Seat, kind: int = socket.SOCK_DGRAM) -> socket.socket:
            sock = stack.enter_context(socket_in(seat, kind))
            sock.settimeout(5.0)
            return sock

        yield make
