from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from nomad.actor.execute import Handoff, Worker, start_calls, start_source
from nomad.pipeline import Kind
from tests.actor.chain import until

MANY = 1000
CLOSE = 5.0


@pytest.fixture
def worker() -> Iterator[Callable[[bool], Worker]]:
    made: list[Worker] = []

    def make(runs_loop: bool) -> Worker:
        made.append(Worker("function", runs_loop=runs_loop))
        return made[-1]

    yield make
    for one in made:
        assert one.close(CLOSE)


def handoff(limit: int = MANY) -> Handoff:
    return Handoff(asyncio.get_running_loop(), limit)


async def drain(out: Handoff, most: int | None = None) -> list[Any]:
    taken = []
    while not (out.finished and not out.items):
        await out.wait()
        taken += out.take(most)
    return taken


def double(x: int) -> int:
    return 2 * x


async def double_async(x: int) -> int:
    await asyncio.sleep(0)
    return 2 * x


def twice(x: int) -> Iterator[int]:
    yield x
    yield -x


async def twice_async(x: int) -> AsyncIterator[int]:
    yield x
    await asyncio.sleep(0)
    yield -x


CALLS: list[tuple[Kind, Callable[..., Any], list[Any]]] = [
    (Kind.FUNCTION, double, [2, 4, 6]),
    (Kind.ASYNC, double_async, [2, 4, 6]),
    (Kind.GENERATOR, twice, [(0, 0, 1), (0, 1, -1), (1, 0, 2), (1, 1, -2), (2, 0, 3), (2, 1, -3)]),
    (Kind.ASYNC_GENERATOR, twice_async, [(0, 0, 1), (0, 1, -1), (1, 0, 2), (1, 1, -2), (2, 0, 3), (2, 1, -3)]),
]
ASYNCHRONOUS = (Kind.ASYNC, Kind.ASYNC_GENERATOR, Kind.ASYNC_PERIODIC, Kind.ASYNC_SOURCE_GENERATOR)


@pytest.mark.parametrize(("kind", "function", "expected"), CALLS, ids=lambda v: str(v) if isinstance(v, Kind) else "")
@pytest.mark.parametrize("limit", [1, 2, MANY])
async def test_results_arrive_in_order(worker: Any, kind: Kind, function: Any, expected: list[Any], limit: int) -> None:
    out = handoff(limit)
    start_calls(worker(kind in ASYNCHRONOUS), kind, function, [1, 2, 3], out)
    assert await drain(out) == expected
    assert out.error is None
    assert out.calls == (3 if "generator" in kind else 0)
    assert out.seconds > 0


@pytest.mark.parametrize(("kind", "function", "expected"), CALLS, ids=lambda v: str(v) if isinstance(v, Kind) else "")
async def test_it_ends_at_the_first_error(worker: Any, kind: Kind, function: Any, expected: list[Any]) -> None:
    calls = []

    def check(x: int) -> Any:
        calls.append(x)
        if x == 2:
            raise LookupError("two")
        return function(x)

    async def check_async(x: int) -> Any:
        return await check(x)

    def generate(x: int) -> Any:
        yield from check(x)

    async def generate_async(x: int) -> Any:
        async for y in check(x):
            yield y

    raising = {Kind.FUNCTION: check, Kind.ASYNC: check_async, Kind.GENERATOR: generate}.get(kind, generate_async)
    out = handoff()
    start_calls(worker(kind in ASYNCHRONOUS), kind, raising, [1, 2, 3], out)
    got = await drain(out)
    assert got == expected[: len(expected) // 3]
    assert isinstance(out.error, LookupError)
    assert calls == [1, 2]
    assert out.calls == (2 if "generator" in kind else 0)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), StopIteration()], ids=repr)
async def test_no_error_ends_the_thread(worker: Any, error: BaseException) -> None:
    def fail(x: int) -> None:
        raise error

    one = worker(False)
    for _ in range(2):
        out = handoff()
        start_calls(one, Kind.FUNCTION, fail, [1], out)
        assert await drain(out) == []
        assert out.error is error


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, asyncio.CancelledError], ids=repr)
async def test_no_error_ends_the_loop_of_an_asynchronous_one(worker: Any, error: type[BaseException]) -> None:
    async def fail(x: int) -> None:
        raise error

    one = worker(True)
    for _ in range(2):
        out = handoff()
        start_calls(one, Kind.ASYNC, fail, [1], out)
        assert await drain(out) == []
        assert isinstance(out.error, error)


@pytest.mark.parametrize("kind", [Kind.SOURCE_GENERATOR, Kind.ASYNC_SOURCE_GENERATOR])
@pytest.mark.parametrize("limit", [1, 3])
async def test_a_generator_is_no_further_ahead_than_the_limit(worker: Any, kind: Kind, limit: int) -> None:
    made = []

    def source() -> Iterator[int]:
        for n in range(20):
            made.append(n)
            yield n

    async def source_async() -> AsyncIterator[int]:
        for n in source():
            yield n

    out = handoff(limit)
    start_source(worker(kind in ASYNCHRONOUS), kind, source if kind is Kind.SOURCE_GENERATOR else source_async, out)
    taken = 0
    while not (out.finished and not out.items):
        await until(lambda: out.finished or len(out.items) == limit)
        assert len(made) <= taken + limit
        taken += len(out.take(1))
        assert len(out.items) <= limit
    assert taken == 20


async def test_the_limit_may_be_raised_while_it_waits(worker: Any) -> None:
    made = []

    def source() -> Iterator[int]:
        for n in range(100):
            made.append(n)
            yield n

    out = handoff(1)
    start_source(worker(False), Kind.SOURCE_GENERATOR, source, out)
    await until(lambda: len(out.items) == 1)
    out.limit = 10
    out.take(1)
    await until(lambda: len(out.items) == 10)
    assert len(made) == 11
    assert len(await drain(out)) == 99


@pytest.mark.parametrize("kind", [Kind.SOURCE_GENERATOR, Kind.ASYNC_SOURCE_GENERATOR])
@pytest.mark.parametrize("waiting", [True, False])
async def test_stop_unwinds_a_generator(worker: Any, kind: Kind, waiting: bool) -> None:
    """Whether it waits for room, or is at work; `except Exception` of its own doesn't swallow it."""
    closed = threading.Event()

    def source() -> Iterator[int]:
        try:
            while True:
                try:
                    yield 1
                except Exception:  # noqa: BLE001 - as users do
                    pass
        finally:
            closed.set()

    async def source_async() -> AsyncIterator[int]:
        try:
            while True:
                yield 1
                await asyncio.sleep(0)
        finally:
            closed.set()

    out = handoff(1 if waiting else 10**9)
    one = worker(kind in ASYNCHRONOUS)
    start_source(one, kind, source if kind is Kind.SOURCE_GENERATOR else source_async, out)
    await out.wait()
    out.stop()
    await until(lambda: out.finished)
    assert out.error is None
    assert one.close(CLOSE)
    assert closed.wait(CLOSE)


async def test_a_periodic_source_is_called_once(worker: Any) -> None:
    async def value() -> str:
        return "async"

    for kind, function, expected in ((Kind.PERIODIC, lambda: "sync", "sync"), (Kind.ASYNC_PERIODIC, value, "async")):
        out = handoff(2)
        start_source(worker(kind in ASYNCHRONOUS), kind, function, out)
        assert await drain(out) == [expected]


async def test_one_wake_up_serves_many_values(worker: Any) -> None:
    woken = 0

    def ready() -> None:
        nonlocal woken
        woken += 1

    out = Handoff(asyncio.get_running_loop(), MANY, ready)
    release, made = threading.Event(), threading.Event()

    def source() -> Iterator[int]:
        yield from range(100)
        made.set()
        release.wait()

    start_source(worker(False), Kind.SOURCE_GENERATOR, source, out)
    await asyncio.to_thread(made.wait)
    await until(lambda: woken)
    assert woken == 1
    assert out.take() == list(range(100))
    release.set()
    await until(lambda: out.finished)
    await until(lambda: woken == 2)


@pytest.mark.parametrize("limit", [2, MANY])
async def test_the_birth_is_that_of_the_oldest_value_taken(worker: Any, limit: int) -> None:
    """Also where some always wait, because they are taken one by one."""
    out = handoff(limit)
    release = threading.Semaphore(0)
    born: list[int] = []

    def source() -> Iterator[int]:
        for number in range(20):
            release.acquire()
            born.append(time.time_ns())
            yield number

    start_source(worker(False), Kind.SOURCE_GENERATOR, source, out)
    release.release(2)
    await until(lambda: len(out.items) == 2)
    for number in range(18):
        assert out.take(1) == [number]
        assert out.birth >= born[number if limit == 2 else max(0, number - 2)]
        assert out.birth <= born[number + 1]
        release.release()
        await until(lambda: len(out.items) == 2)
    out.stop()
    release.release(20)


async def test_a_call_that_hangs_is_left_behind() -> None:
    """And what it gives later is nobody's any more, even when the loop has ended."""
    hangs, release = threading.Event(), threading.Event()
    one = Worker("hangs", runs_loop=False)
    loop = asyncio.new_event_loop()
    out = await asyncio.to_thread(lambda: Handoff(loop, MANY))

    def hang(x: int) -> int:
        hangs.set()
        release.wait()
        return x

    start_calls(one, Kind.FUNCTION, hang, [1], out)
    await asyncio.to_thread(hangs.wait)
    assert not one.close(0.01)
    loop.close()
    release.set()
    assert one.close(CLOSE)
    assert out.finished


async def test_an_asynchronous_function_that_blocks_is_left_behind() -> None:
    hangs, release = threading.Event(), threading.Event()
    one = Worker("blocks", runs_loop=True)

    async def block(x: int) -> None:
        hangs.set()
        release.wait()  # by mistake, as users do

    out = handoff()
    start_calls(one, Kind.ASYNC, block, [1], out)
    await asyncio.to_thread(hangs.wait)
    assert not one.close(0.01)
    release.set()
    await until(lambda: out.finished)
    assert one.close(CLOSE)


async def test_close_cancels_what_waits() -> None:
    cancelled = threading.Event()
    one = Worker("waits", runs_loop=True)
    started = threading.Event()

    async def wait(x: int) -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    out = handoff()
    start_calls(one, Kind.ASYNC, wait, [1], out)
    await asyncio.to_thread(started.wait)
    assert one.close(CLOSE)
    assert cancelled.is_set()
