"""A message isn't through an emulated slow node before its work has taken as long as it would there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from nomad.actor.execute import Handoff, Worker, start_calls
from nomad.pipeline import Kind
from tests.actor.chain import PATIENCE, Chain

WORK, SLOWDOWN = 0.005, 4.0


def function(x: int) -> int:
    time.sleep(WORK)
    return x


async def asynchronous(x: int) -> int:
    await asyncio.sleep(WORK)
    return x


def generator(x: int) -> Iterator[int]:
    time.sleep(WORK)
    yield x


async def asynchronous_generator(x: int) -> AsyncIterator[int]:
    await asyncio.sleep(WORK)
    yield x


@pytest.mark.parametrize(
    ("kind", "called"),
    [
        (Kind.FUNCTION, function),
        (Kind.ASYNC, asynchronous),
        (Kind.GENERATOR, generator),
        (Kind.ASYNC_GENERATOR, asynchronous_generator),
    ],
)
async def test_each_value_is_handed_over_when_the_slow_node_would_be_done_with_it(kind: Kind, called: Any) -> None:
    worker = Worker("function", runs_loop=kind in (Kind.ASYNC, Kind.ASYNC_GENERATOR))
    out = Handoff(asyncio.get_running_loop(), 10)
    out.slowdown = SLOWDOWN
    started = time.perf_counter()
    start_calls(worker, kind, called, [1, 2, 3], out)
    count = 0
    while not (out.finished and not out.items):
        await asyncio.wait_for(out.wait(), PATIENCE)
        for _ in out.take():
            count += 1
            assert time.perf_counter() - started >= count * WORK * SLOWDOWN * 0.99
    total = time.perf_counter() - started
    assert count == 3
    assert 3 * WORK * 0.99 <= out.seconds <= total - 3 * WORK * (SLOWDOWN - 1.0) * 0.99
    assert worker.close(PATIENCE)


async def test_a_pause_ends_when_it_is_stopped() -> None:
    worker = Worker("function", runs_loop=False)
    out = Handoff(asyncio.get_running_loop(), 10)
    out.slowdown = 1e6
    start_calls(worker, Kind.FUNCTION, function, [1], out)
    await asyncio.sleep(2 * WORK)
    out.stop()
    assert await asyncio.to_thread(worker.close, PATIENCE)


async def test_the_way_through_a_slow_node_takes_as_long_as_its_work() -> None:
    took: list[float] = []

    def source() -> Iterator[float]:
        for _ in range(5):
            time.sleep(3 * WORK * SLOWDOWN)  # no queue: what is measured is the work alone
            yield time.time()

    def work(x: float) -> float:
        time.sleep(WORK)
        return x

    def sink(x: float) -> None:
        took.append(time.time() - x)

    async with Chain([source, work, sink], speed=1 / SLOWDOWN) as chain:
        await chain.finished()
    assert len(took) == 5
    assert min(took) >= WORK * SLOWDOWN * 0.99
