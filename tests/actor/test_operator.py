from __future__ import annotations

import asyncio
import dataclasses
import functools
import random
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nomad import pipeline
from nomad.actor import operator as module
from nomad.actor.mode import PROOF
from nomad.actor.operator import OperatorFailed
from nomad.delivery import frames
from nomad.errors import PayloadError
from nomad.setaside import SetAside
from tests.actor.chain import Chain, until


def numbers(count: int) -> Callable[[], Iterator[int]]:
    def source() -> Iterator[int]:
        yield from range(count)

    return source


def endless() -> Iterator[int]:
    number = 0
    while True:
        yield number
        number += 1


# What a function may be


def plain(x: int) -> int | None:
    return x * x if x % 3 else None


async def asynchronous(x: int) -> int | None:
    await asyncio.sleep(0)
    return plain(x)


def generator(x: int) -> Iterator[int | None]:
    for k in range(x % 4):
        yield None if k == 1 else x * 10 + k


async def asynchronous_generator(x: int) -> AsyncIterator[int | None]:
    for value in generator(x):
        await asyncio.sleep(0)
        yield value


class Callable_:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: int) -> int | None:
        self.calls += 1
        return plain(x)

    def method(self, x: int) -> int | None:
        return plain(x)


def with_option(option: int, x: int) -> int | None:
    return plain(x)


SQUARES = [x * x for x in range(100) if x % 3]
MANY = [v for x in range(100) for v in generator(x) if v is not None]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (plain, SQUARES),
        (lambda x: plain(x), SQUARES),
        (functools.partial(with_option, 1), SQUARES),
        (Callable_(), SQUARES),
        (Callable_().method, SQUARES),
        (asynchronous, SQUARES),
        (generator, MANY),
        (asynchronous_generator, MANY),
    ],
    ids=["function", "lambda", "partial", "object", "method", "async", "generator", "async generator"],
)
@pytest.mark.parametrize("place", ["middle", "end"])
async def test_every_kind_of_function(function: Any, expected: list[int], place: str, tmp_path: Path) -> None:
    """In the middle its results go on; at the end they go nowhere, but can be looked at."""
    got: list[int] = []
    operators = [numbers(100), pipeline.operator(function, name="f")]
    async with Chain([*operators, got.append] if place == "middle" else operators, tmp_path) as chain:
        if place == "end":
            chain[1].instance.meter.tap = got.extend
        await chain.finished()
        stats = chain[1].stats
        assert (stats.received, stats.processed, stats.emitted) == (100, 100, len(expected))
        assert chain[1].instance.meter.last == expected[-1]
    assert got == expected


async def test_arrays_and_objects_travel() -> None:
    got: list[Any] = []
    image = np.arange(300_000, dtype="u1").reshape(300, -1)

    def frames() -> Iterator[Any]:
        for n in range(5):
            yield {"n": n, "image": image + n}

    def shrink(message: dict[str, Any]) -> dict[str, Any]:
        assert not message["image"].flags.writeable
        return {**message, "image": message["image"][::2]}

    async with Chain([frames, shrink, got.append]) as chain:
        await chain.finished()
    assert [m["n"] for m in got] == list(range(5))
    assert all(np.array_equal(m["image"], (image + m["n"])[::2]) for m in got)


async def test_a_quick_function_moves_into_the_data_loop() -> None:
    where: list[str] = []

    def function(x: int) -> int:
        where.append(threading.current_thread().name)
        return x

    got: list[int] = []
    async with Chain([numbers(20 * PROOF), function, got.append]) as chain:
        await chain.finished()
        assert chain[1].stats.mode == "inline"
    assert where[0] == "function function"
    assert where[-1] == threading.current_thread().name
    assert got == list(range(20 * PROOF))


async def test_a_blocking_function_holds_up_nobody() -> None:
    """The loop goes on: heart-beats can be made, links live, and neighbours work."""
    blocked, release = threading.Event(), threading.Event()
    got: list[int] = []

    def function(x: int) -> int:
        if x == 3:
            blocked.set()
            release.wait()
        return x

    async with Chain([numbers(10), function, got.append]) as chain:
        await asyncio.to_thread(blocked.wait)
        await until(lambda: got == [0, 1, 2])
        await until(lambda: chain[1].stats.received == 10)
        chain[1].instance.cut()
        await until(lambda: chain[0].stats.reconnects == 1 and chain[0].stats.links[0]["connected"])
        assert chain[1].stats.mode == "thread"
        release.set()
        await chain.finished()
    assert got == list(range(10))


async def test_a_function_that_hangs_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nomad.actor.instance.CLOSE_SECONDS", 0.01)
    hangs, release = threading.Event(), threading.Event()

    def function(x: int) -> None:
        hangs.set()
        release.wait()

    async with Chain([numbers(10), function]) as chain:
        await asyncio.to_thread(hangs.wait)
        chain[1].running.cancel()
        assert not await chain[1].instance.close()
        release.set()


async def test_counters_are_read_from_another_thread_at_any_moment() -> None:
    """As heart-beats do."""
    got: list[int] = []
    reads, go, done = threading.Event(), threading.Event(), threading.Event()

    def source() -> Iterator[int]:
        go.wait()
        yield from range(5000)

    switch = sys.getswitchinterval()
    async with Chain([source, lambda x: x, got.append]) as chain:

        def read() -> None:
            while not done.is_set():
                assert chain[2].stats.received >= 0
                assert chain[1].stats.queue_messages >= 0
                reads.set()

        reading = asyncio.create_task(asyncio.to_thread(read))
        try:
            await asyncio.to_thread(reads.wait)
            sys.setswitchinterval(1e-4)
            go.set()
            await chain.finished()
        finally:
            done.set()
            go.set()
            sys.setswitchinterval(switch)
        await reading
    assert got == list(range(5000))


# Back-pressure


async def test_a_slow_sink_bounds_everything_before_it() -> None:
    """No actor holds more than its window; what the source makes is bounded by all windows together."""
    made = 0
    release = threading.Semaphore(0)
    got: list[int] = []

    def source() -> Iterator[bytes]:
        nonlocal made
        for n in range(3000):
            made += 1
            yield n.to_bytes(4, "big") * 25

    def sink(x: bytes) -> None:
        release.acquire()
        got.append(int.from_bytes(x[:4], "big"))

    window = 2000 + 8 * frames.BATCH_OVERHEAD
    async with Chain([source, lambda x: x, sink], window_messages=32, window_bytes=window) as chain:
        await until(lambda: chain[0].stats.paused and chain[2].stats.queue_messages > 0)
        before = made
        assert made <= 200
        for number in range(2):
            assert chain[number].stats.unacked_bytes <= window + 102 + frames.BATCH_OVERHEAD
            assert chain[number].stats.unacked_messages <= 32
        assert chain[1].stats.queue_bytes <= window
        release.release(3000)
        await chain.finished()
        assert before < made == 3000
    assert got == list(range(3000))


async def test_a_generator_waits_for_room_between_its_results() -> None:
    made = 0
    release = threading.Event()
    got: list[Any] = []

    def expand(x: int) -> Iterator[int]:
        nonlocal made
        for k in range(20_000):
            made += 1
            yield k

    def sink(x: int) -> None:
        release.wait()
        got.append(x)

    async with Chain([numbers(1), expand, sink], window_messages=16) as chain:
        await until(lambda: chain[1].stats.paused)
        await until(lambda: made == module.BATCH_MESSAGES + 16)  # what waits in the thread, and what is sent
        release.set()
        await chain.finished()
    assert got == list(range(20_000))


async def test_one_input_may_give_more_than_a_window_of_outputs(tmp_path: Path) -> None:
    def expand(x: int) -> Iterator[tuple[int, int]]:
        for k in range(100):
            yield x, k

    got: list[tuple[int, int]] = []
    async with Chain([numbers(3), expand, got.append], tmp_path, window_messages=16) as chain:
        await chain.finished()
    assert got == [(x, k) for x in range(3) for k in range(100)]


async def test_a_message_may_be_larger_than_the_window() -> None:
    def source() -> Iterator[bytes]:
        for n in (1, 5000, 2, 7000, 8000):
            yield b"x" * n

    got: list[int] = []
    async with Chain([source, len, got.append], window_bytes=500) as chain:
        await chain.finished()
    assert got == [1, 5000, 2, 7000, 8000]


async def test_generators_one_behind_another_have_an_end(tmp_path: Path) -> None:
    """Each adds a step to the position; a dozen is fine, the error comes long after."""

    def one(x: int) -> Iterator[int]:
        yield x

    got: list[int] = []
    twelve = [pipeline.operator(one, name=f"g{n}") for n in range(12)]
    async with Chain([numbers(2), *twelve, got.append], tmp_path) as chain:
        await chain.finished()
    assert got == [0, 1]
    many = [pipeline.operator(one, name=f"g{n}") for n in range(97)]
    async with Chain([numbers(1), *many, got.append]) as chain:
        with pytest.raises(OperatorFailed, match="too many generators"):
            await chain.finished()


# Errors


class Trouble:
    """Raises for some inputs, as often as it is told to."""

    def __init__(self, bad: dict[int, int], error: Callable[[str], BaseException] = ValueError) -> None:
        self.bad = bad
        self.error = error
        self.calls: list[int] = []

    def __call__(self, x: int) -> int:
        self.calls.append(x)
        if self.bad.get(x, 0) > 0:
            self.bad[x] -= 1
            raise self.error(f"bad {x}")
        return x


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_FIRST", 0.001)


FOREVER = 10**9


async def test_a_message_whose_function_raises_is_set_aside_and_the_others_go_on(tmp_path: Path) -> None:
    trouble = Trouble({2: FOREVER, 150: FOREVER})  # the second when the function runs inline
    got: list[int] = []
    async with Chain([numbers(200), trouble, got.append], tmp_path) as chain:
        await chain.finished()
        assert got == [x for x in range(200) if x not in (2, 150)]
        stats = chain[1].stats
        assert (stats.processed, stats.failed, stats.set_aside) == (200, 2, 2)
        first, second = chain[1].instance.set_aside()
        assert first["error"]["type"] == "ValueError"
        assert first["error"]["message"] == "bad 2"
        assert "in __call__" in first["error"]["traceback"]
        assert [chain[1].instance.codec.decode_one(r["value"]) for r in (first, second)] == [2, 150]
        assert chain[1].instance.meter.last_error == second["error"]
        assert chain[1].instance.set_aside(after=first["id"]) == [second]
        assert chain[1].instance.set_aside(after=second["id"]) == []


async def test_a_message_too_large_to_be_told_of_is_listed_without_its_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nomad.actor.instance.MOST_SHOWN", 1000)
    monkeypatch.setattr("nomad.actor.instance.PART", 500)

    def fail(text: str) -> None:
        raise ValueError(text[:1])

    def texts() -> Iterator[str]:
        yield "a" * 500
        yield "b" * 2000

    async with Chain([texts, fail, print], tmp_path) as chain:
        await chain.finished()
        instance = chain[1].instance
        (first,) = instance.set_aside()
        (second,) = instance.set_aside(after=first["id"])
        shown = [instance.codec.decode_one(r["value"]) for r in (first, second)]
        size = len(instance.codec.encode_one("b" * 2000))
        assert shown == ["a" * 500, f"(a message of {size} bytes, too large to be shown)"]
        assert second["error"]["message"] == "b"


@pytest.mark.parametrize(
    "error", [KeyError, SystemExit, KeyboardInterrupt, StopIteration, GeneratorExit, asyncio.CancelledError]
)
@pytest.mark.parametrize("at", [3, 190], ids=["thread", "inline"])
async def test_whatever_a_function_raises_is_an_error_of_its_message(error: Any, at: int, tmp_path: Path) -> None:
    got: list[int] = []
    for place in ("middle", "end"):
        got.clear()
        folder = tmp_path / place
        folder.mkdir()
        trouble = Trouble({at: FOREVER}, error)

        def last(x: int, trouble: Trouble = trouble) -> None:
            got.append(trouble(x))

        operators = [numbers(200), trouble, got.append] if place == "middle" else [numbers(200), last]
        async with Chain(operators, folder) as chain:
            await chain.finished()
            (record,) = chain[1].instance.set_aside()
            assert record["error"]["type"] == error.__name__
        assert got == [x for x in range(200) if x != at]


@pytest.mark.parametrize("times", [1, 3, FOREVER])
async def test_retry(times: int, soon: None) -> None:
    trouble = Trouble({5: times})
    got: list[int] = []
    operator = pipeline.operator(trouble, name="t", on_error="retry", retries=3)
    async with Chain([numbers(10), operator, got.append]) as chain:
        await chain.finished()
        stats = chain[1].stats
        if times < FOREVER:
            assert got == list(range(10))
            assert (stats.set_aside, stats.failed, stats.retried) == (0, times, times)
        else:
            assert got == [x for x in range(10) if x != 5]
            assert (stats.set_aside, stats.failed, stats.retried) == (1, 4, 3)
            assert chain[1].instance.set_aside()[0]["attempts"] == 4
        assert trouble.calls.count(5) == 1 + min(times, 3)


async def test_fail_ends_the_operator_with_the_error() -> None:
    got: list[int] = []
    operator = pipeline.operator(Trouble({5: 1}), name="t", on_error="fail")
    async with Chain([numbers(10), operator, got.append]) as chain:
        with pytest.raises(OperatorFailed, match="bad 5") as caught:
            await chain.finished()
        assert isinstance(caught.value.__cause__, ValueError)
        await until(lambda: got == [0, 1, 2, 3, 4])


@pytest.mark.parametrize("place", ["thread", "inline"])
async def test_what_can_not_be_sent_is_set_aside_where_it_was_returned(place: str) -> None:
    got: list[Any] = []
    bad = 5 if place == "thread" else 190

    def function(x: int) -> Any:
        return threading.Lock() if x == bad else x

    async with Chain([numbers(200), function, got.append]) as chain:
        await chain.finished()
        assert got == [x for x in range(200) if x != bad]
        assert chain[1].stats.emitted == 199
        (record,) = chain[1].instance.set_aside()
        assert record["error"]["type"] == PayloadError.__name__
        assert "can't carry _thread.lock" in record["error"]["message"]
        assert chain[1].instance.codec.decode_one(record["value"]) == bad


async def test_an_input_that_can_not_be_read_fails_the_pipeline() -> None:
    strange = dataclasses.make_dataclass("Strange", ["x"])
    strange.__module__ = "elsewhere"

    def source() -> Iterator[Any]:
        yield strange(1)

    async with Chain([source, print]) as chain:
        with pytest.raises(OperatorFailed, match="can't read its input: .*elsewhere.Strange"):
            await chain.finished()


async def test_a_full_store_fails_the_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nomad.setaside.MOST_MESSAGES", 3)
    trouble = Trouble(dict.fromkeys(range(10), FOREVER))
    async with Chain([numbers(10), trouble, print]) as chain:
        with pytest.raises(OperatorFailed, match="which is the most that is kept"):
            await chain.finished()


def faltering(times: dict[int, int]) -> Callable[[int], Iterator[int]]:
    """Yields 3, raises at the third for some inputs."""

    def function(x: int) -> Iterator[int]:
        for k in range(3):
            if k == 2 and times.get(x, 0) > 0:
                times[x] -= 1
                raise ValueError(f"{x} broke off")
            yield 10 * x + k

    return function


async def test_a_generator_that_is_retried_gives_nothing_twice(soon: None) -> None:
    got: list[int] = []
    operator = pipeline.operator(faltering({2: 2}), name="f", on_error="retry")
    async with Chain([numbers(4), operator, got.append]) as chain:
        await chain.finished()
        assert chain[1].stats.emitted == 12
        assert chain[2].stats.duplicates == 0
    assert got == [10 * x + k for x in range(4) for k in range(3)]


async def test_a_generator_that_is_run_again_gives_only_what_is_missing(tmp_path: Path) -> None:
    got: list[int] = []
    async with Chain([numbers(4), faltering({2: 1}), got.append], tmp_path) as chain:
        await chain.finished()
        assert got == [0, 1, 2, 10, 11, 12, 20, 21, 30, 31, 32]
        assert await chain[1].instance.rerun(None) == {"ran": 1, "failed": 0}
        await until(lambda: got[-1] == 22)
    assert sorted(got) == [10 * x + k for x in range(4) for k in range(3)]


# Messages run again


async def test_messages_are_run_again(tmp_path: Path) -> None:
    trouble = Trouble({2: 1, 5: 2, 7: 1})
    got: list[int] = []
    async with Chain([numbers(10), trouble, got.append], tmp_path) as chain:
        await chain.finished()
        instance = chain[1].instance
        by_value = {instance.codec.decode_one(r["value"]): r["id"] for r in instance.set_aside()}
        assert list(by_value) == [2, 5, 7]
        assert await instance.rerun([by_value[7], 12345]) == {"ran": 1, "failed": 0}
        assert await instance.rerun(None) == {"ran": 2, "failed": 1}
        (left,) = instance.set_aside()
        assert (left["id"], left["attempts"]) == (by_value[5], 2)
        assert await instance.rerun(None) == {"ran": 1, "failed": 0}
        assert instance.set_aside() == []
        await until(lambda: len(got) == 10)
        assert got[7:] == [7, 2, 5]
        assert chain[1].stats.set_aside == 0


async def test_messages_are_dropped(tmp_path: Path) -> None:
    got: list[int] = []
    async with Chain([numbers(10), Trouble({2: 1, 5: 1}), got.append], tmp_path) as chain:
        await chain.finished()
        instance = chain[1].instance
        first, second = (r["id"] for r in instance.set_aside())
        assert instance.drop([first, 999]) == {"dropped": 1}
        assert [r["id"] for r in instance.set_aside()] == [second]
        assert chain[1].stats.set_aside == 1
        assert instance.drop(None) == {"dropped": 1}
        assert await instance.rerun(None) == {"ran": 0, "failed": 0}


async def test_the_source_has_nothing_to_run_again() -> None:
    async with Chain([numbers(1), print]) as chain:
        assert await chain[0].instance.rerun(None) == {"ran": 0, "failed": 0}
        assert chain[0].instance.drop(None) == {"dropped": 0}


async def test_the_last_operator_runs_again_too(tmp_path: Path) -> None:
    got: list[int] = []
    trouble = Trouble({2: 1})
    async with Chain([numbers(5), lambda x: got.append(trouble(x))], tmp_path) as chain:
        await chain.finished()
        assert await chain[1].instance.rerun(None) == {"ran": 1, "failed": 0}
        assert got == [0, 1, 3, 4, 2]
        assert chain[1].instance.set_aside() == []


async def test_a_rerun_that_can_not_be_sent_sends_nothing(tmp_path: Path) -> None:
    calls = 0

    def function(x: int) -> Iterator[Any]:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise ValueError
        yield "good"
        yield object() if calls == 2 else "better"

    got: list[Any] = []
    async with Chain([numbers(1), function, got.append], tmp_path) as chain:
        await chain.finished()
        assert await chain[1].instance.rerun(None) == {"ran": 1, "failed": 1}
        assert chain[1].instance.set_aside()[0]["error"]["type"] == "PayloadError"
        assert await chain[1].instance.rerun(None) == {"ran": 1, "failed": 0}
        await until(lambda: len(got) == 2)
    assert got == ["good", "better"]


async def test_messages_are_run_again_while_others_flow(tmp_path: Path) -> None:
    trouble = Trouble({2: 1})
    got: list[int] = []
    async with Chain([endless, trouble, got.append], tmp_path) as chain:
        await until(lambda: chain[1].stats.set_aside == 1)
        assert await chain[1].instance.rerun(None) == {"ran": 1, "failed": 0}
        await until(lambda: 2 in got)
        chain[0].instance.actor.drain()  # type: ignore[union-attr]
        await chain.finished()
    assert sorted(got) == list(range(len(got)))
    assert [x for x in got if x != 2] == [x for x in range(len(got)) if x != 2]


async def test_what_came_of_a_rerun_is_not_lost_with_the_operator(tmp_path: Path) -> None:
    """The next operator isn't there when it is sent; then the operator is killed, and a third one forwards it."""
    got: list[int] = []
    trouble = Trouble({2: 1})
    async with Chain([numbers(5), trouble, lambda x: x + 100, got.append], tmp_path) as chain:
        await chain.finished()
        await chain.kill(2)
        assert await chain[1].instance.rerun(None) == {"ran": 1, "failed": 0}
        await chain.restart(1)
        assert chain[1].instance.set_aside() == []
        await chain.restart(2, 3)
        await until(lambda: 102 in got)
        await until(lambda: stored(chain, 1).reruns() == [])
        await chain.restart(1, 2, 3)
        await until(lambda: chain[2].stats.links[0]["connected"])
    assert got == [100, 101, 103, 104, 102]


def stored(chain: Chain, number: int) -> SetAside:
    return chain[number].instance._set_aside


async def test_a_message_set_aside_is_not_run_again_by_a_new_instance(tmp_path: Path) -> None:
    """Its input wasn't acknowledged yet when the operator was killed, and comes again."""
    trouble = Trouble({1: FOREVER})
    release = threading.Event()
    got: list[int] = []

    def sink(x: int) -> None:
        release.wait()
        got.append(x)

    async with Chain([numbers(5), trouble, sink], tmp_path) as chain:
        await until(lambda: len(trouble.calls) == 5)
        await until(lambda: chain[1].stats.set_aside == 1)
        await chain.restart(1)
        await until(lambda: len(trouble.calls) >= 9)
        release.set()
        await chain.finished()
        assert chain[1].stats.set_aside == 1
    assert trouble.calls.count(1) == 1
    assert got == [0, 2, 3, 4]


async def test_a_message_that_was_run_again_is_not_given_twice_by_a_new_instance(tmp_path: Path) -> None:
    """It was set aside, run again successfully, and then its input comes again."""
    trouble = Trouble({4: 1})
    release = threading.Event()
    got: list[int] = []

    def sink(x: int) -> None:
        release.wait()
        got.append(x)

    async with Chain([numbers(5), trouble, sink], tmp_path) as chain:
        await until(lambda: chain[1].stats.set_aside == 1)
        assert await chain[1].instance.rerun(None) == {"ran": 1, "failed": 0}
        await chain.restart(1)
        release.set()
        await chain.finished()
        await until(lambda: len(got) == 5)
        await until(lambda: stored(chain, 1).reruns() == [])
    assert got == [0, 1, 2, 3, 4]


# Kills and cuts


def repeated_at_most(got: list[Any], expected: list[Any], kills: int) -> None:
    """`got` is `expected`, but for the one message whose call each kill of the last operator may have interrupted."""
    found = []
    repeats = 0
    for value in got:
        if found and found[-1] == value:
            repeats += 1
        else:
            found.append(value)
    assert found == expected
    assert repeats <= kills


def halves(x: int) -> Iterator[tuple[int, int]]:
    for k in range(x % 3):
        yield x, k


async def halves_async(x: int) -> AsyncIterator[tuple[int, int]]:
    for k in range(x % 3):
        await asyncio.sleep(0)
        yield x, k


@pytest.mark.no_cover
@pytest.mark.parametrize("middle", [plain, asynchronous, halves, halves_async], ids=lambda f: f.__name__)
@pytest.mark.parametrize("times", [1, pytest.param(4, marks=pytest.mark.slow)])
async def test_faults_of_all_kinds_at_any_time(middle: Any, times: int, tmp_path: Path, rng: random.Random) -> None:
    window = rng.choice([4, 30, 1000])
    count = (150 if window == 4 else 600) * times
    pause = threading.Event()
    got: list[Any] = []
    kills = 0

    def source() -> Iterator[int]:
        for n in range(count):
            if n % 50 == 49:
                pause.wait(0.01)
            yield n

    def sink(x: Any) -> None:
        got.append(x)

    if middle in (plain, asynchronous):
        expected: list[Any] = [v for x in range(count) if (v := plain(x)) is not None]
    else:
        expected = [v for x in range(count) for v in halves(x)]
    chain = Chain([source, middle, lambda x: x, sink], tmp_path, window_messages=window)
    async with chain:
        ended = chain[0].running
        while not ended.done():
            await asyncio.sleep(rng.random() * 0.02)
            if rng.random() < 0.6:
                rng.choice(chain.members).instance.cut()
            else:
                numbers = rng.sample([1, 2, 3], rng.choice([1, 1, 2, 3]))
                kills += 3 in numbers
                await chain.restart(*numbers)
        await chain.finished()
        assert chain[0].stats.unacked_messages == 0
    repeated_at_most(got, expected, kills)
