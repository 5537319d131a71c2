"""What only stream transports can get wrong: arrival in pieces, garbage, half frames, sockets as files."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import struct
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest

from nomad.errors import AddressError, ConnectionBroken, TransportError
from nomad.transport import base, tcp
from nomad.transport.base import MAX_FRAME_BYTES, Connection, Frame, Listener
from nomad.transport.framing import encode
from nomad.transport.registry import connect, listen, transport_for
from nomad.transport.stream import StreamConnection
from nomad.transport.tcp import break_unanswered
from tests.contract.transport import (
    cancelled,
    dropped,
    listening,
    pair,
    plain,
    some_bytes,
    soon,
    take,
    take_all,
    until,
)


class Raw:
    """A blocking-free raw socket at one end, Nomad at the other."""

    def __init__(self, sock: socket.socket, far: Connection) -> None:
        self.sock = sock
        self.far = far

    async def send(self, data: bytes) -> None:
        await soon(asyncio.get_running_loop().sock_sendall(self.sock, data))

    async def read_to_end(self) -> bytes:
        """All that comes until the far end closes, by a reset or not."""
        found = b""
        try:
            while data := await soon(asyncio.get_running_loop().sock_recv(self.sock, 1 << 20)):
                found += data
        except ConnectionResetError:
            pass
        return found


@pytest.fixture(params=["tcp", "unix"])
async def raw(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Raw]:
    address = {"tcp": "tcp://127.0.0.1:0", "unix": f"unix:{tmp_path}/s"}[request.param]
    async with listening(tcp.TcpTransport() if request.param == "tcp" else tcp.UnixTransport(), address) as (
        listener,
        accepted,
    ):
        if request.param == "tcp":
            sock = socket.create_connection(("127.0.0.1", int(listener.bound.rpartition(":")[2])))
        else:
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(listener.bound.removeprefix("unix:"))
        with closing(sock):
            sock.setblocking(False)
            yield Raw(sock, await soon(accepted.get()))


def stream(frames: list[Frame]) -> bytes:
    return b"".join(encode(frames))


async def test_byte_by_byte(raw: Raw) -> None:
    frames: list[Frame] = [(b"a",), (b"head", b"", b"part"), (b"",)]
    for byte in stream(frames):
        await raw.send(bytes([byte]))
        await asyncio.sleep(0)
    assert plain(await take(raw.far, 3)) == frames


async def test_a_large_frame_in_pieces(raw: Raw) -> None:
    frames: list[Frame] = [(b"head", some_bytes(200_000), some_bytes(70_000)), (b"next",)]
    data = stream(frames)
    taking = asyncio.ensure_future(take(raw.far, 2))
    for start in range(0, len(data), 7_001):
        await raw.send(data[start : start + 7_001])
        await asyncio.sleep(0)
    assert plain(await taking) == frames


async def test_the_end_in_the_middle_of_a_frame(raw: Raw) -> None:
    await raw.send(stream([(b"whole",), (b"half", some_bytes(100_000))])[:-1])
    raw.sock.shutdown(socket.SHUT_WR)
    assert plain(await take(raw.far, 1)) == [(b"whole",)]
    with pytest.raises(ConnectionBroken, match="in the middle of a frame"):
        await soon(raw.far.recv())


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(200)),
        struct.pack("<II", MAX_FRAME_BYTES + 1, 0),
        struct.pack("<IIQ", 5, 1, 2**63),
        b"\xff" * 100,
    ],
)
async def test_garbage_breaks_the_connection(raw: Raw, garbage: bytes) -> None:
    await raw.send(stream([(b"fine",)]) + garbage)
    assert plain(await take(raw.far, 1)) == [(b"fine",)]
    with pytest.raises(ConnectionBroken, match="doesn't speak this protocol"):
        await soon(raw.far.recv())
    assert await raw.read_to_end() == b""


async def test_what_is_announced_over_the_limit_breaks_the_connection_before_it_comes(raw: Raw) -> None:
    raw.far.limit(64)
    await raw.send(stream([(b"fine",)]) + struct.pack("<IIQ", 4, 1, 61))
    assert plain(await take(raw.far, 1)) == [(b"fine",)]
    with pytest.raises(ConnectionBroken, match="65 bytes; the limit is 64"):
        await soon(raw.far.recv())


async def test_a_limit_counts_for_a_frame_that_has_begun(raw: Raw) -> None:
    await raw.send(stream([(b"fine",), (b"large", some_bytes(100_000))])[:-1])
    assert plain(await take(raw.far, 1)) == [(b"fine",)]
    raw.far.limit(100_005)
    raw.far.limit(100_004)
    with pytest.raises(ConnectionBroken, match="100005 bytes; the limit is 100004"):
        await soon(raw.far.recv())


async def test_a_peer_that_never_closes_does_not_hold_up_close(raw: Raw, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "CLOSE_SECONDS", 0.05)
    raw.far.write([(b"last words",)])
    await soon(raw.far.close())
    assert await raw.read_to_end() == stream([(b"last words",)])


async def test_a_flood_of_empty_frames_is_bounded(raw: Raw) -> None:
    """They weigh nothing on the wire, and something in memory."""
    loop = asyncio.get_running_loop()
    flood = stream([(b"",)] * 50_000)
    sending = asyncio.ensure_future(loop.sock_sendall(raw.sock, flood * 200))
    _, going_on = await asyncio.wait([sending], timeout=0.3)
    assert going_on, "80 MB were taken while nobody reads"
    assert await cancelled(sending)
    held = await soon(raw.far.recv())
    assert len(held) < 100_000


async def test_what_is_written_is_what_the_format_says(raw: Raw) -> None:
    raw.far.write([(b"head", b"ab", b""), (b"x",)])
    expected = struct.pack("<IIQQ", 4, 2, 2, 0) + b"head" + b"ab" + struct.pack("<II", 1, 0) + b"x"
    found = b""
    while len(found) < len(expected):
        found += await soon(asyncio.get_running_loop().sock_recv(raw.sock, 100))
    assert found == expected


# Listening


async def unused(connection: Connection) -> None:
    """A handler of connections that nobody makes."""


async def closed(listener: Listener) -> str:
    await listener.close()
    return listener.bound


async def test_a_unix_socket_is_for_its_owner_and_goes_with_its_listener(tmp_path: Path) -> None:
    path = tmp_path / "s"
    listener = await listen(f"unix:{path}", unused)
    assert listener.bound == listener.reachable == f"unix:{path}"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    await listener.close()
    assert not path.exists()


async def test_an_empty_path_picks_a_private_folder() -> None:
    listener = await listen("unix:", unused)
    path = Path(listener.bound.removeprefix("unix:"))
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    await dropped(await connect(listener.reachable))
    await listener.close()
    assert not path.parent.exists()


async def test_a_temporary_folder_with_a_long_name_is_avoided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    assert not (await closed(await listen("unix:", unused))).startswith(f"unix:{long}")


async def test_a_socket_that_a_dead_process_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with closing(socket.socket(socket.AF_UNIX)) as dead:
        dead.bind(str(path))
        dead.listen()
    listener = await listen(f"unix:{path}", unused)
    await dropped(await connect(listener.reachable))
    await listener.close()


async def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("precious")
    with pytest.raises(TransportError, match="taken"):
        await listen(f"unix:{path}", unused)
    assert path.read_text() == "precious"


async def test_a_socket_that_somebody_else_put_in_its_place_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    first = await listen(f"unix:{path}", unused)
    path.rename(tmp_path / "moved")
    second = await listen(f"unix:{path}", unused)
    await first.close()
    await dropped(await connect(second.reachable))
    await second.close()


async def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match="No such file or directory"):
        await listen(f"unix:{tmp_path}/no/s", unused)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may do everything")
async def test_a_folder_that_is_not_writable(tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o500)
    with pytest.raises(TransportError, match="Permission denied"):
        await listen(f"unix:{tmp_path}/s", unused)


async def test_peers_that_reset_at_once(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is known of them any more when they are accepted."""
    async with listening(tcp.TcpTransport(), "tcp://127.0.0.1:0") as (listener, accepted):
        for _ in range(20):
            with closing(socket.create_connection(("127.0.0.1", int(listener.bound.rpartition(":")[2])))) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        for _ in range(20):
            assert await take_all(await soon(accepted.get())) == []
        await dropped(await connect(listener.reachable))
    assert not caplog.records


async def test_advertise_is_what_peers_dial() -> None:
    listener = await listen("tcp://0.0.0.0:0", unused, advertise="localhost")
    port = listener.bound.rpartition(":")[2]
    assert listener.bound == f"tcp://0.0.0.0:{port}"
    assert listener.reachable == f"tcp://localhost:{port}"
    await dropped(await connect(listener.reachable))
    await listener.close()


async def test_a_bad_name_is_refused_before_anything_is_bound() -> None:
    with pytest.raises(AddressError):
        await listen("tcp://:0", unused, advertise="a:b")


async def test_a_host_that_is_not_ours() -> None:
    with pytest.raises(TransportError, match="can't listen at tcp://192.0.2.1:0"):
        await listen("tcp://192.0.2.1:0", unused)


async def test_a_peer_that_does_not_answer() -> None:
    waiting: list[Connection] = []

    async def fill(address: str) -> None:
        while True:  # the kernel takes one or two before it stops answering
            waiting.append(await connect(address, timeout=0.1))

    with closing(socket.socket()) as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        with pytest.raises(ConnectionBroken, match=r"didn't answer within 0.1 s"):
            await fill(f"tcp://127.0.0.1:{full.getsockname()[1]}")
        for connection in waiting:
            await dropped(connection)


async def test_a_handler_that_fails_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(connection: Connection) -> None:
        raise LookupError("out of luck")

    listener = await listen("tcp://:0", fail)
    connection = await connect(listener.reachable)
    assert await take_all(connection) == []
    await until(lambda: bool(caplog.records))
    assert "out of luck" in caplog.text
    await connection.close()
    await listener.close()


async def test_a_handler_may_close_its_listener() -> None:
    finished = asyncio.Event()

    async def handle(connection: Connection) -> None:
        await listener.close()
        finished.set()

    listener = await listen("tcp://:0", handle)
    connection = await connect(listener.reachable)
    await soon(finished.wait())
    await take_all(connection)
    await connection.close()
    await listener.close()


async def test_a_peer_that_vanishes_while_something_is_sent_is_noticed() -> None:
    """By the kernel, which keep-alive doesn't ask while something waits for its acknowledgement."""
    async with listening(transport_for("tcp://127.0.0.1:0"), "tcp://127.0.0.1:0") as (listener, _):
        connection = await connect(listener.reachable)
        break_unanswered(connection, 6.0)
        assert isinstance(connection, StreamConnection)
        sock = connection._transport.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 6000
        await dropped(connection)
        break_unanswered(connection, 6.0)


async def test_other_connections_have_nothing_like_that() -> None:
    async with pair(transport_for("inproc:"), "inproc:") as (near, _):
        break_unanswered(near, 6.0)
