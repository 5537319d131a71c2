"""From an address to a transport, also to one of another package."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nomad.errors import AddressError
from nomad.transport import registry
from nomad.transport.base import Connection
from nomad.transport.inproc import InprocTransport
from tests.contract.transport import pair, plain, take

FOREIGN = """
from nomad.transport.inproc import InprocTransport

class Pigeon(InprocTransport):
    scheme = "pigeon"

pigeon = Pigeon()
"""
ENTRY_POINTS = """
[nomad.transports]
pigeon = pigeon_post:Pigeon
dove = pigeon_post:pigeon
lost = pigeon_post:Missing
nowhere = no_such_module:Transport
tcp = pigeon_post:Pigeon
"""


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package with transports, installed for one test."""
    (tmp_path / "pigeon_post.py").write_text(FOREIGN)
    info = tmp_path / "pigeon_post-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pigeon-post\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "_loaded", {})
    yield
    sys.modules.pop("pigeon_post", None)


@pytest.mark.parametrize(("address", "scheme"), [("inproc:x", "inproc"), ("tcp://h:1", "tcp"), ("unix:/x", "unix")])
def test_own_transports(address: str, scheme: str) -> None:
    transport = registry.transport_for(address)
    assert transport.scheme == scheme
    assert registry.transport_for(address) is transport
    assert type(transport).__module__.startswith("nomad.transport.")


def test_a_transport_of_another_package() -> None:
    for scheme in ("pigeon", "dove"):  # a class, and an instance
        transport = registry.transport_for(f"{scheme}:x")
        assert isinstance(transport, InprocTransport)
        assert transport.scheme == "pigeon"


async def test_it_is_used_by_connect_and_listen() -> None:
    async with pair(registry.transport_for("pigeon:"), "pigeon:") as (dialer, acceptor):
        dialer.write([(b"coo",)])
        assert plain(await take(acceptor, 1)) == [(b"coo",)]


async def test_connect_and_listen_of_the_registry() -> None:
    async def echo(connection: Connection) -> None:
        connection.write(await connection.recv())
        await connection.close()

    listener = await registry.listen("tcp://:0", echo, advertise="localhost")
    assert listener.bound.startswith("tcp://127.0.0.1:")
    assert listener.reachable.startswith("tcp://localhost:")
    connection = await registry.connect(listener.reachable, timeout=5)
    connection.write([(b"hello",)])
    assert plain(await take(connection, 1)) == [(b"hello",)]
    await connection.close()
    await listener.close()


def test_an_unknown_scheme_names_those_that_there_are() -> None:
    with pytest.raises(AddressError) as raised:
        registry.transport_for("quic://host:1")
    message = str(raised.value)
    assert "'quic'" in message
    assert "inproc" in message
    assert "pigeon" in message
    assert "nomad.transports" in message


@pytest.mark.parametrize(("address", "reason"), [("lost:x", "Missing"), ("nowhere:x", "no_such_module")])
def test_a_transport_that_cannot_be_loaded(address: str, reason: str) -> None:
    with pytest.raises(AddressError, match=rf"can't be loaded: .*{reason}"):
        registry.transport_for(address)


def test_schemes() -> None:
    assert {"inproc", "tcp", "unix", "zmq+tcp", "zmq+ipc", "pigeon"} <= set(registry.schemes())
