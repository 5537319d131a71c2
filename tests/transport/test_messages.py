"""Opening, closing and flow control by messages: the peer's side is played by the test."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Sequence

import pytest

from nomad.errors import ConnectionBroken, ConnectionClosed
from nomad.transport import base
from nomad.transport.base import HIGH_WATER, Buffer
from nomad.transport.framing import FRAME_OVERHEAD
from nomad.transport.messages import BYE, FRAME, RESET, TAKEN, WINDOW, MessageConnection
from tests.contract.transport import assert_broken, assert_closed, cancelled, plain, soon


class Port:
    """What a connection sends, and how it was released."""

    def __init__(self) -> None:
        self.sent: list[list[Buffer]] = []
        self.released: list[bool] = []
        self.connection = MessageConnection("near", "far", self._send, self._release)

    def _send(self, parts: Sequence[Buffer]) -> None:
        assert not self.released, "a message was sent after the release"
        self.sent.append(list(parts))

    def _release(self, gracefully: bool) -> None:
        self.released.append(gracefully)
        self.connection.gone.set()

    def kinds(self) -> bytes:
        return b"".join(bytes(parts[0]) for parts in self.sent)


@pytest.fixture
def port() -> Port:
    return Port()


def taken(cost: int) -> bytes:
    return struct.pack("<Q", cost)


async def test_a_window_is_sent_and_the_rest_waits(port: Port) -> None:
    frame = (bytes(WINDOW // 4 - FRAME_OVERHEAD),)
    port.connection.write([frame] * 6)
    assert port.kinds() == FRAME * 4
    assert not port.connection.writable
    draining = asyncio.ensure_future(port.connection.drain())
    await asyncio.sleep(0)
    assert not draining.done()
    port.connection.message(TAKEN, [taken(WINDOW // 4)])
    assert port.kinds() == FRAME * 5
    port.connection.message(TAKEN, [taken(WINDOW)])
    assert port.kinds() == FRAME * 6
    await soon(draining)


async def test_a_frame_over_the_window_is_sent_alone(port: Port) -> None:
    frame = (bytes(2 * WINDOW),)
    port.connection.write([frame, frame])
    assert port.kinds() == FRAME
    port.connection.message(TAKEN, [taken(2 * WINDOW + FRAME_OVERHEAD)])
    assert port.kinds() == FRAME * 2


async def test_what_recv_gives_out_is_told(port: Port) -> None:
    part = bytes(WINDOW // 5 - FRAME_OVERHEAD)
    for _ in range(2):
        port.connection.message(FRAME, [part])
    assert port.sent == []
    assert plain(await soon(port.connection.recv())) == [(part,)] * 2
    assert port.sent == [[TAKEN, taken(2 * (WINDOW // 5))]]
    port.connection.message(FRAME, [b"small"])
    await soon(port.connection.recv())
    assert len(port.sent) == 1, "every little bit was told"


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        (b"?", []),
        (b"", [b"x"]),
        (FRAME, []),
        (FRAME, [b""] * 70_000),
        (TAKEN, [taken(1)]),
        (TAKEN, [b"short"]),
        (TAKEN, []),
    ],
)
async def test_a_peer_that_breaks_the_rules_is_dropped(port: Port, kind: bytes, parts: list[Buffer]) -> None:
    port.connection.message(FRAME, [b"before"])
    port.connection.message(kind, parts)
    assert port.kinds() == RESET
    assert port.released == [False]
    assert plain(await soon(port.connection.recv())) == [(b"before",)]
    with pytest.raises(ConnectionBroken, match="doesn't speak this protocol"):
        await soon(port.connection.recv())


async def test_a_peer_that_ignores_the_window_is_dropped(port: Port) -> None:
    part = bytes(WINDOW // 2)
    for _ in range(3):
        port.connection.message(FRAME, [part])
    assert port.kinds() == RESET
    assert len(await soon(port.connection.recv())) == 2


async def test_close_waits_for_what_was_written_and_for_the_peer(port: Port) -> None:
    frame = (bytes(WINDOW),)
    port.connection.write([frame, frame])
    closing = asyncio.ensure_future(port.connection.close())
    await asyncio.sleep(0)
    assert port.kinds() == FRAME
    port.connection.message(FRAME, [b"nobody reads this"])
    port.connection.message(TAKEN, [taken(WINDOW + FRAME_OVERHEAD)])
    assert port.kinds() == FRAME * 2 + BYE
    assert not closing.done()
    port.connection.message(BYE, [])
    await soon(closing)
    assert port.released == [True]
    assert port.kinds() == FRAME * 2 + BYE
    await assert_closed(port.connection)


async def test_a_peer_that_closes_is_answered(port: Port) -> None:
    port.connection.write([(bytes(WINDOW),), (b"never sent",)])
    port.connection.message(FRAME, [b"last"])
    port.connection.message(BYE, [])
    assert port.kinds() == FRAME + BYE
    assert port.released == [True]
    assert plain(await soon(port.connection.recv())) == [(b"last",)]
    await assert_broken(port.connection)


async def test_both_close_at_once(port: Port) -> None:
    closing = asyncio.ensure_future(port.connection.close())
    await asyncio.sleep(0)
    port.connection.message(BYE, [])
    await soon(closing)
    assert port.kinds() == BYE


async def test_a_peer_that_does_not_answer_is_dropped(port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "CLOSE_SECONDS", 0.01)
    await soon(port.connection.close())
    assert port.kinds() == BYE + RESET
    assert port.released == [False]


async def test_a_cancelled_close_aborts(port: Port) -> None:
    closing = asyncio.ensure_future(port.connection.close())
    await asyncio.sleep(0)
    assert await cancelled(closing)
    assert port.released == [False]


async def test_abort_says_so_and_hears_no_more(port: Port) -> None:
    port.connection.write([(bytes(HIGH_WATER),)] * 9)
    port.connection.abort()
    port.connection.abort()
    for kind in (FRAME, BYE, RESET, b"?"):
        port.connection.message(kind, [b"x"])
    port.connection.lost("too late")
    assert port.kinds().endswith(FRAME + RESET)
    assert port.released == [False]
    with pytest.raises(ConnectionClosed):
        await soon(port.connection.recv())


@pytest.mark.parametrize("end", ["reset", "lost"])
async def test_a_peer_that_vanishes(port: Port, end: str) -> None:
    port.connection.message(FRAME, [b"last"])
    if end == "reset":
        port.connection.message(RESET, [])
    else:
        port.connection.lost("the wire was cut")
    assert port.sent == []
    assert port.released == [False]
    assert plain(await soon(port.connection.recv())) == [(b"last",)]
    await assert_broken(port.connection)
