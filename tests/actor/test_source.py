from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from nomad import pipeline
from nomad.actor.operator import OperatorFailed
from nomad.actor.progress import SOURCE_BITS
from nomad.actor.source import AHEAD_BYTES, Source, SourceFailed
from tests.actor.chain import Chain, until
from tests.clock import VirtualClock


def endless() -> Iterator[int]:
    number = 0
    while True:
        yield number
        number += 1


def source_of(chain: Chain) -> Source:
    actor = chain[0].instance.actor
    assert isinstance(actor, Source)
    return actor


# Generators


async def test_a_generator_ends_when_all_is_settled() -> None:
    def source() -> Iterator[int | None]:
        for n in range(1000):
            yield n if n % 10 else None

    got: list[int] = []
    release = threading.Event()

    def sink(x: int) -> None:
        release.wait()
        got.append(x)

    async with Chain([source, sink], window_messages=2000) as chain:
        await until(lambda: chain[0].stats.emitted == 900)
        assert not chain[0].running.done(), "nothing of it has arrived where it has an effect"
        release.set()
        await chain.finished()
        assert got == [n for n in range(1000) if n % 10]
        assert chain[0].stats.processed == 900


async def test_an_asynchronous_generator() -> None:
    async def source() -> AsyncIterator[int]:
        for n in range(200):
            await asyncio.sleep(0)
            yield n

    got: list[int] = []
    async with Chain([source, got.append], window_messages=16) as chain:
        await chain.finished()
    assert got == list(range(200))


async def test_a_generator_that_gives_nothing_ends_at_once() -> None:
    def source() -> Iterator[int]:
        yield from ()

    async with Chain([source, str]) as chain:
        await chain.finished()


async def test_each_value_goes_out_as_soon_as_it_is_there() -> None:
    """However long the generator takes for the next."""
    ready = threading.Semaphore(0)

    def source() -> Iterator[int]:
        for n in range(5):
            ready.acquire()
            yield n

    got: list[int] = []
    async with Chain([source, got.append]) as chain:
        for n in range(5):
            ready.release()
            await until(lambda count=n: len(got) == count + 1)
        await chain.finished()


async def test_a_generator_is_not_called_before_its_successor_is_there() -> None:
    called = threading.Event()

    def source() -> Iterator[int]:
        called.set()
        yield 1

    got: list[int] = []
    chain = Chain([source, got.append])
    async with chain:
        await chain.kill(1)
        await chain.restart(0)
        called.clear()
        await until(lambda: chain[0].instance._outs["p:source>append"].last_error)
        assert not called.is_set()
        await chain.restart(1)
        await chain.finished()
    assert got[-1] == 1


async def test_how_far_a_generator_is_ahead_is_bounded_in_bytes() -> None:
    made = 0
    release = threading.Event()

    def source() -> Iterator[bytes]:
        nonlocal made
        for _ in range(500):
            made += 1
            yield bytes(100_000)

    def sink(x: bytes) -> None:
        release.wait()

    async with Chain([source, sink], window_messages=10_000, window_bytes=3_000_000) as chain:
        await until(lambda: chain[0].stats.paused)
        ahead = AHEAD_BYTES // 100_000
        await until(lambda: chain[0].stats.queue_messages >= ahead - 1)
        assert made <= 31 + ahead + 1
        release.set()
        await chain.finished()


async def test_a_generator_that_raises_gives_what_it_gave_and_then_fails() -> None:
    got: list[int] = []
    release = threading.Event()

    def source() -> Iterator[int]:
        yield from range(10)
        raise ConnectionError("the camera is gone")

    def sink(x: int) -> None:
        release.wait()
        got.append(x)

    async with Chain([source, sink]) as chain:
        await until(lambda: chain[0].stats.failed == 1)
        assert not chain[0].running.done()
        release.set()
        with pytest.raises(SourceFailed, match="the camera is gone") as caught:
            await chain.finished()
        assert isinstance(caught.value.__cause__, ConnectionError)
    assert got == list(range(10))


async def test_on_error_fail_fails_the_pipeline() -> None:
    @pipeline.source(on_error="fail")
    def source() -> Iterator[int]:
        yield 1
        raise ConnectionError("the camera is gone")

    async with Chain([source, str]) as chain:
        with pytest.raises(OperatorFailed, match="the camera is gone") as caught:
            await chain.finished()
        assert not isinstance(caught.value, SourceFailed)


async def test_what_can_not_be_sent_is_counted_and_left_out() -> None:
    def source() -> Iterator[Any]:
        for n in range(100):
            yield n if n % 7 else threading.Lock()

    got: list[int] = []
    async with Chain([source, got.append]) as chain:
        await chain.finished()
        assert (chain[0].stats.failed, chain[0].stats.emitted) == (15, 85)
        error = chain[0].instance.meter.last_error
        assert error is not None
        assert "can't carry _thread.lock" in error["message"]
    assert got == [n for n in range(100) if n % 7]


async def test_what_can_not_be_sent_fails_the_pipeline_where_it_shall() -> None:
    @pipeline.source(on_error="fail")
    def source() -> Iterator[Any]:
        yield threading.Lock()

    async with Chain([source, str]) as chain:
        with pytest.raises(OperatorFailed, match="can't carry"):
            await chain.finished()


async def test_messages_are_counted_from_the_epoch() -> None:
    got: list[int] = []
    async with Chain([endless, got.append]) as chain:
        await until(lambda: len(got) > 3)
        receiver = chain[1].instance._ins["p:endless>append"].receiver
        assert receiver.received[0].origin >> SOURCE_BITS == 1
        await chain.restart(0)
        await until(lambda: receiver.received[0].origin >> SOURCE_BITS == 2)
        assert receiver.duplicates == 0
    first, second = got.index(0), len(got) - 1 - got[::-1].index(0)
    assert first < second, "a new source begins anew"
    assert got[second:] == list(range(len(got) - second))


async def test_a_source_that_has_counted_to_the_end_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it would give a message the position of one of its successor."""
    monkeypatch.setattr("nomad.actor.source.SOURCE_BITS", 10)
    got: list[int] = []
    async with Chain([endless, got.append]) as chain:
        with pytest.raises(SourceFailed, match="all messages that one instance can count"):
            await chain.finished()
        await chain.restart(0)
        await until(lambda: got.count(5) == 2)


# Periodic


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_a_periodic_source_is_called_at_its_interval(kind: str) -> None:
    clock = VirtualClock()
    calls = 0

    def count() -> int | None:
        nonlocal calls
        calls += 1
        return None if calls == 3 else calls

    async def count_async() -> int | None:
        return count()

    got: list[int] = []
    source = pipeline.source(count if kind == "sync" else count_async, interval=10.0, name="s")
    async with Chain([source, got.append], clock=clock):
        for n in range(1, 6):
            await until(lambda: clock.sleeping == 2)  # the source, and the link that watches over its peer
            assert calls == n
            await clock.advance(9.8)
            assert calls == n
            await clock.advance(0.2)
            await until(lambda expected=n + 1: calls == expected)
        await until(lambda: got == [1, 2, 4, 5, 6])


async def test_missed_ticks_are_skipped_not_made_up_for() -> None:
    clock = VirtualClock()
    calls = 0
    slow = threading.Event()

    def count() -> int:
        nonlocal calls
        calls += 1
        if calls == 2:
            slow.wait()
        return calls

    async with Chain([pipeline.source(count, interval=10.0, name="s"), str], clock=clock) as chain:
        await until(lambda: clock.sleeping == 2)
        await clock.advance(10.0)
        await until(lambda: calls == 2)
        await clock.advance(100.0)
        slow.set()
        await until(lambda: calls == 3)  # at once, since it is late
        await until(lambda: chain[0].stats.links[0]["connected"] and clock.sleeping == 2)
        await clock.advance(9.0)
        assert calls == 3
        await clock.advance(1.0)
        await until(lambda: calls == 4)


async def test_a_periodic_source_that_raises_goes_on() -> None:
    calls = 0

    @pipeline.source(interval=0.001)
    def source() -> int:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise TimeoutError("no answer")
        return calls

    got: list[int] = []
    async with Chain([source, got.append]) as chain:
        await until(lambda: len(got) >= 4)
        stats = chain[0].stats
        assert stats.failed == 1
        error = chain[0].instance.meter.last_error
        assert error is not None
        assert error["message"] == "no answer"
    assert got[:4] == [1, 3, 4, 5]


async def test_a_periodic_source_fails_where_it_shall() -> None:
    @pipeline.source(interval=0.001, on_error="fail")
    def source() -> int:
        raise TimeoutError("no answer")

    async with Chain([source, str]) as chain:
        with pytest.raises(OperatorFailed, match="no answer"):
            await chain.finished()


async def test_a_periodic_source_waits_for_room() -> None:
    calls = 0
    release = threading.Event()

    @pipeline.source(interval=0.0001)
    def source() -> int:
        nonlocal calls
        calls += 1
        return calls

    def sink(x: int) -> None:
        release.wait()

    async with Chain([source, sink], window_messages=5) as chain:
        await until(lambda: chain[0].stats.paused)
        assert calls == 5
        release.set()
        await until(lambda: calls > 10)


# Draining


@pytest.mark.parametrize("kind", ["generator", "async generator", "periodic"])
async def test_drain_lets_what_was_made_arrive(kind: str) -> None:
    made: list[int] = []

    def generator() -> Iterator[int]:
        for n in endless():
            made.append(n)
            yield n

    async def asynchronous() -> AsyncIterator[int]:
        for n in generator():
            yield n
            await asyncio.sleep(0)

    numbers = generator()
    periodic = pipeline.source(lambda: next(numbers), interval=0.0005, name="s")
    source: Any = {"generator": generator, "async generator": asynchronous}.get(kind, periodic)
    got: list[int] = []
    async with Chain([source, lambda x: x, got.append]) as chain:
        await until(lambda: len(got) > 20)
        source_of(chain).drain()
        await chain.finished()
        assert got == list(range(len(got)))
        # A generator that is stopped may have made one value that it couldn't hand over any more.
        assert len(made) - len(got) <= 1


async def test_a_drained_periodic_source_is_not_called_again() -> None:
    clock = VirtualClock()
    calls = 0

    def count() -> int:
        nonlocal calls
        calls += 1
        return calls

    async with Chain([pipeline.source(count, interval=10.0, name="s"), str], clock=clock) as chain:
        await until(lambda: chain[0].stats.emitted == 1)
        source_of(chain).drain()
        async with asyncio.timeout(30):
            while not chain[0].running.done():
                await clock.advance(0.02)  # acknowledgements wait for it
        assert calls == 1


async def test_objects_that_a_source_gives_are_its_own(tmp_path: Any) -> None:
    """A dataclass of the user's module goes all the way."""
    got: list[Reading] = []

    def source() -> Iterator[Reading]:
        for n in range(3):
            yield Reading(n, str(n))

    async with Chain([source, lambda r: dataclasses.replace(r, name=r.name + "!"), got.append], tmp_path) as chain:
        await chain.finished()
    assert got == [Reading(n, f"{n}!") for n in range(3)]


@dataclasses.dataclass(frozen=True)
class Reading:
    number: int
    name: str
