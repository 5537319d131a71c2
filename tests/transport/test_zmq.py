"""What only ZeroMQ's transports can get wrong: strangers, peers that vanish, sockets behind sockets."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import sys
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest
import zmq
import zmq.asyncio

from nomad.errors import AddressError, ConnectionBroken, TransportError
from nomad.transport import zmq as transport
from nomad.transport import zmqsockets
from nomad.transport.base import Connection
from nomad.transport.messages import FRAME, HELLO, RESET, VERSION, WELCOME
from nomad.transport.registry import connect, listen
from tests.contract.transport import dropped, listening, plain, soon, take, take_all

PORTS = ["aiozmq", "pyzmq"] if zmqsockets.aiozmq is not None else ["pyzmq"]


@pytest.fixture(params=PORTS, autouse=True)
def port(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "pyzmq":
        monkeypatch.setattr(zmqsockets, "aiozmq", None)


@pytest.fixture
async def listener() -> AsyncIterator[tuple[str, asyncio.Queue[Connection]]]:
    async with listening(transport.ZmqTcpTransport(), "zmq+tcp://127.0.0.1:0") as (listener, accepted):
        yield listener.bound, accepted


@pytest.fixture
async def stranger(listener: tuple[str, asyncio.Queue[Connection]]) -> AsyncIterator[zmq.asyncio.Socket]:
    """A socket that speaks ZeroMQ, and whatever the test makes it say."""
    with closing(zmq.asyncio.Context.instance().socket(zmq.DEALER)) as sock:
        sock.linger = 0
        sock.connect(listener[0].removeprefix("zmq+"))
        yield sock


async def goes_on(address: str, accepted: asyncio.Queue[Connection]) -> None:
    """The listener still accepts connections that work."""
    connection = await connect(address)
    far = await soon(accepted.get())
    connection.write([(b"fine",)])
    assert plain(await take(far, 1)) == [(b"fine",)]
    await dropped(connection)


async def test_garbage_on_the_wire(listener: tuple[str, asyncio.Queue[Connection]]) -> None:
    port = int(listener[0].rpartition(":")[2])
    for garbage in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" + bytes(100), b"\x00" * 1000):
        with closing(socket.create_connection(("127.0.0.1", port))) as sock:
            sock.sendall(garbage)
    await goes_on(*listener)


async def test_a_stranger_is_not_heard(
    listener: tuple[str, asyncio.Queue[Connection]], stranger: zmq.asyncio.Socket
) -> None:
    for message in ([b""], [b"", b""], [FRAME, b"x"], [b"?" * 100], [HELLO], [HELLO, b"version 99"]):
        await stranger.send_multipart(message)
    assert await soon(stranger.recv_multipart()) == [RESET]
    assert await soon(stranger.recv_multipart()) == [RESET]
    assert listener[1].empty()
    await goes_on(*listener)


async def test_a_peer_that_breaks_the_rules(
    listener: tuple[str, asyncio.Queue[Connection]], stranger: zmq.asyncio.Socket
) -> None:
    await stranger.send_multipart([HELLO, VERSION])
    assert await soon(stranger.recv_multipart()) == [WELCOME]
    far = await soon(listener[1].get())
    await stranger.send_multipart([HELLO, VERSION])
    assert await soon(stranger.recv_multipart()) == [RESET]
    with pytest.raises(ConnectionBroken, match="doesn't speak this protocol"):
        await soon(far.recv())
    await goes_on(*listener)


async def test_a_peer_that_leaves_without_a_word(
    listener: tuple[str, asyncio.Queue[Connection]], stranger: zmq.asyncio.Socket
) -> None:
    await stranger.send_multipart([HELLO, VERSION])
    await stranger.send_multipart([FRAME, b"last"])
    far = await soon(listener[1].get())
    await soon(stranger.recv_multipart())
    stranger.close(linger=1000)
    assert plain(await take_all(far)) == [(b"last",)]


async def test_many_peers_that_leave_at_once(listener: tuple[str, asyncio.Queue[Connection]]) -> None:
    """Their descriptors are used again by those who come next."""
    address, accepted = listener
    for _ in range(30):
        with closing(zmq.Context.instance().socket(zmq.DEALER)) as sock:
            sock.linger = 1000
            sock.connect(address.removeprefix("zmq+"))
            sock.send_multipart([HELLO, VERSION])
            sock.send_multipart([FRAME, b"last"])
        await asyncio.sleep(0)
    for _ in range(30):
        assert plain(await take_all(await soon(accepted.get()))) == [(b"last",)]
    await goes_on(*listener)


PEER = """
import asyncio, sys
from nomad.transport.registry import connect, listen

async def main():
    connection = await connect(sys.argv[1])
    connection.write([(b"hello",)])
    await connection.recv()

asyncio.run(main())
"""


async def test_a_peer_that_is_killed(listener: tuple[str, asyncio.Queue[Connection]]) -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", PEER, listener[0])
    far = await soon(listener[1].get())
    assert plain(await take(far, 1)) == [(b"hello",)]
    process.send_signal(signal.SIGKILL)
    assert await take_all(far) == []
    await process.wait()


async def test_what_is_no_zeromq_is_not_waited_for() -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(ConnectionBroken):
        await connect(f"zmq+tcp://127.0.0.1:{port}", timeout=5)
    server.close()
    await server.wait_closed()


async def test_what_does_not_answer() -> None:
    with closing(socket.socket()) as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(ConnectionBroken, match=r"didn't answer within 0.1 s"):
            await connect(f"zmq+tcp://127.0.0.1:{silent.getsockname()[1]}", timeout=0.1)


async def test_a_host_that_does_not_exist() -> None:
    with pytest.raises(ConnectionBroken, match="can't be reached"):
        await connect("zmq+tcp://no-such-host.invalid:1", timeout=5)


async def unused(connection: Connection) -> None:
    """A handler of connections that nobody makes."""


async def test_a_socket_is_for_its_owner_and_goes_with_its_listener(tmp_path: Path) -> None:
    path = tmp_path / "s"
    listener = await listen(f"zmq+ipc:{path}", unused)
    assert listener.bound == listener.reachable == f"zmq+ipc:{path}"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    await listener.close()
    assert not path.exists()


async def test_an_empty_path_picks_a_private_folder() -> None:
    listener = await listen("zmq+ipc:", unused)
    path = Path(listener.bound.removeprefix("zmq+ipc:"))
    await dropped(await connect(listener.reachable))
    await listener.close()
    assert not path.parent.exists()


async def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("precious")
    with pytest.raises(TransportError, match="taken"):
        await listen(f"zmq+ipc:{path}", unused)
    assert path.read_text() == "precious"


async def test_a_socket_that_a_dead_process_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with closing(socket.socket(socket.AF_UNIX)) as dead:
        dead.bind(os.fspath(path))
        dead.listen()
    listener = await listen(f"zmq+ipc:{path}", unused)
    await dropped(await connect(listener.reachable))
    await listener.close()


async def test_places_that_cannot_be_bound(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match="can't listen"):
        await listen("zmq+tcp://192.0.2.1:0", unused)
    with pytest.raises(TransportError, match="can't listen"):
        await listen(f"zmq+ipc:{tmp_path}/no/s", unused)
    with pytest.raises(AddressError):
        await listen("zmq+tcp://:0", unused, advertise="a:b")


async def test_advertise_is_what_peers_dial() -> None:
    listener = await listen("zmq+tcp://0.0.0.0:0", unused, advertise="localhost")
    port = listener.bound.rpartition(":")[2]
    assert listener.bound == f"zmq+tcp://0.0.0.0:{port}"
    assert listener.reachable == f"zmq+tcp://localhost:{port}"
    await dropped(await connect(listener.reachable))
    await listener.close()


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
async def test_ipv6() -> None:
    async with listening(transport.ZmqTcpTransport(), "zmq+tcp://[::1]:0") as (listener, accepted):
        assert listener.reachable.startswith("zmq+tcp://[::1]:")
        await goes_on(listener.reachable, accepted)
