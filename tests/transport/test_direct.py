"""Writing to a stream from another thread, where its loop's own writing is half done or has ended."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from nomad.transport.base import Frame
from nomad.transport.framing import Splitter
from nomad.transport.registry import transport_for
from tests.contract.loops import LOOPS

LARGE = b"a" * 8000


@asynccontextmanager
async def clogged() -> AsyncIterator[tuple[Any, socket.socket, list[Frame]]]:
    """A connection whose loop still has something to write although the kernel has room again, its other end, and the
    frames written."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        connection: Any = await transport_for("tcp:").connect(f"tcp://127.0.0.1:{server.getsockname()[1]}")
        peer, _ = server.accept()
    with peer:
        sent: list[Frame] = []
        while not connection._transport.get_write_buffer_size():
            sent.append((b"%d" % len(sent) + LARGE,))
            connection.write(sent[-1:])
            if "uvloop" in type(connection._transport).__module__:
                await asyncio.sleep(0)
        yield connection, peer, sent
        connection.abort()
        await connection.close()


async def read(peer: socket.socket, before: bytes) -> list[Frame]:
    """All frames until the other end is gone."""
    data, loop = before, asyncio.get_running_loop()
    peer.setblocking(False)
    try:
        while part := await loop.sock_recv(peer, 1 << 20):
            data += part
    except ConnectionError:
        pass
    splitter, frames = Splitter(), list[Frame]()
    while data:
        buffer = splitter.get_buffer()
        count = min(len(buffer), len(data))
        buffer[:count], data = data[:count], data[count:]
        splitter.buffer_updated(count, frames)
    return [tuple(map(bytes, frame)) for frame in frames]


@pytest.mark.parametrize("loop", LOOPS)
def test_nothing_follows_what_an_abort_cut_off(loop: str) -> None:
    """What the loop's transport had not written is gone then: the next frame would be taken for its rest."""

    async def check() -> None:
        async with clogged() as (connection, peer, sent):
            writer = connection.direct()
            before = b"".join(peer.recv(1 << 20) for _ in range(2))  # so that the kernel takes more
            connection.abort()
            writer.write([(b"Z" * 2 * len(LARGE),)])
            got = await read(peer, before)
            assert got == sent[: len(got)]

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(check())


@pytest.mark.parametrize("loop", LOOPS)
def test_closing_sends_what_waits(loop: str) -> None:
    async def check() -> None:
        async with clogged() as (connection, peer, sent):
            connection.direct().write([(b"the last",)])
            reading = asyncio.create_task(read(peer, b""))
            reading.add_done_callback(lambda _: peer.close())
            await connection.close()
            assert await reading == [*sent, (b"the last",)]

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(check())
