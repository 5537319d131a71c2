"""What finds out that a master hangs: virtual time, and a connection of which a test holds the other end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from nomad import control, reach
from nomad.clock import Clock
from nomad.errors import TransportError
from nomad.master.kube.election import SILENCE
from nomad.reach import PATIENCE_LEAST, PATIENCE_MOST, Silence, patience
from nomad.settings import Heartbeats, Kubernetes, Reconcile
from nomad.tasks import Tasks
from nomad.transport import registry
from nomad.transport.base import Connection
from nomad.transport.framing import encode
from nomad.transport.registry import transport_for
from nomad.transport.tcp import arriving
from tests.clock import VirtualClock
from tests.contract.transport import pair, until


@asynccontextmanager
async def listening(clock: Clock) -> AsyncIterator[tuple[Silence, Connection]]:
    silence, tasks = Silence(clock), Tasks()
    async with pair(transport_for("inproc:"), "inproc:") as (near, _):
        tasks.start(silence.watch(), name="watch")
        silence.begin(near)
        yield silence, near
        await tasks.close()


def word(within: float) -> dict[str, object]:
    return {"type": "word", "within": within}


async def test_who_says_no_word_may_be_silent_for_ever() -> None:
    """As masters did before there were words."""
    clock = VirtualClock()
    async with listening(clock) as (silence, conn):
        await clock.advance(100)
        silence.heard()
        await clock.advance(3600)
        assert not conn.closed


async def test_silence_after_a_word_ends_the_connection() -> None:
    clock = VirtualClock()
    async with listening(clock) as (silence, conn):
        await clock.advance(100)
        silence.heard()
        silence.word(word(10.0))
        for _ in range(10):
            await clock.advance(9.5)
            silence.heard()  # whatever it is
        await clock.advance(10.0)
        assert not conn.closed
        await clock.advance(1.1)
        assert conn.closed
        await clock.advance(100)


async def test_a_new_connection_is_another_matter() -> None:
    """By then an older master may lead."""
    clock = VirtualClock()
    async with listening(clock) as (silence, conn):
        silence.word(word(10.0))
        silence.end()
        await clock.advance(60)
        assert not conn.closed, "nobody listens"
        silence.begin(conn)
        await clock.advance(60)
        assert not conn.closed
        silence.heard()
        silence.word(word(10.0))
        await clock.advance(12)
        assert conn.closed


async def test_who_is_listened_to_again_has_said_its_word() -> None:
    """As long as nobody listened, it could say nothing."""
    clock = VirtualClock()
    async with listening(clock) as (silence, conn):
        silence.word(word(10.0))
        silence.end()
        await clock.advance(60)
        silence.resume(conn)
        await clock.advance(10)
        assert not conn.closed
        await clock.advance(1.1)
        assert conn.closed


async def test_a_large_frame_that_takes_long_is_no_silence() -> None:
    """It comes over a slow link, and words wait behind it."""
    clock, tasks, amid, conns = VirtualClock(), Tasks(), [], []

    async def serve(conn: Connection) -> None:
        conns.append(conn)
        with suppress(TransportError):
            await conn.recv()

    listener = await registry.listen("tcp://127.0.0.1:0", serve)
    host, _, port = listener.bound.removeprefix("tcp://").rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port))
    silence = Silence(clock, lambda: amid.append(clock.now()))
    tasks.start(silence.watch(), name="watch")
    data = b"".join(encode([(bytes(1 << 20),)]))
    try:
        await until(lambda: bool(conns))
        silence.begin(conns[0])
        silence.word(word(10.0))
        for part in range(10):
            before = arriving(conns[0])
            writer.write(data[part << 10 : (part + 1) << 10])
            await until(lambda before=before: arriving(conns[0]) > before)
            await clock.advance(8.0)
        assert not conns[0].closed
        assert len(amid) == 10
        await clock.advance(4.0)
        assert conns[0].closed
    finally:
        writer.transport.abort()
        await tasks.close()
        await listener.close()


class Halting(VirtualClock):
    """Of a process that is stopped in its sleep."""

    def halt(self, seconds: float) -> None:
        self._now += seconds


async def test_a_process_that_was_held_up_itself_blames_nobody() -> None:
    clock = Halting()
    async with listening(clock) as (silence, conn):
        silence.word(word(10.0))
        for _ in range(5):
            clock.halt(60)
            await clock.advance(0)
            assert not conn.closed
            silence.heard()


@pytest.mark.parametrize("within", [0, -1, 1e9, float("nan"), "long", None])
async def test_nonsense_is_refused(within: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        Silence(VirtualClock()).word({"type": "word", "within": within})
    with pytest.raises(KeyError):
        Silence(VirtualClock()).word({"type": "word"})


def test_the_first_attempts_are_short_and_the_later_ones_patient() -> None:
    assert [patience(alone) for alone in (0.0, 3.0, 5.0, 100.0)] == [PATIENCE_LEAST, 3.0, 5.0, PATIENCE_MOST]


def test_pods_are_with_the_next_master_before_it_gives_them_up() -> None:
    """The worst case of the times that have to fit together, for who is told nothing of the takeover."""
    beats, grace = Heartbeats(), Reconcile().adopt_grace
    assert control.WITHIN_LEAST <= beats.silence <= control.WITHIN_MOST
    first, last = beats.silence - beats.word, beats.silence + reach.LOOK_SECONDS
    assert first >= SILENCE, "who dials again finds the next one"
    # Where the two masters weren't connected, it comes later.
    for taken, away in ((SILENCE, 1.0), (Kubernetes().lease_seconds, 1.0)):
        for noticed in (first, last):
            at, alone = noticed, 0.0
            while at < taken + away:  # the attempt meets the one that hangs
                took = patience(alone)
                at, alone = at + took + 2.0, alone + took + 2.0
            assert at < taken + grace - 1.0
