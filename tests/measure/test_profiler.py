"""Profiles of operators of every kind, run in this process."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from nomad.errors import PipelineError
from nomad.measure.profiler import OperatorProfile, profile
from nomad.pipeline import build


def count() -> Iterator[int]:
    yield from range(1, 6)


async def count_async() -> AsyncIterator[int]:
    for number in range(1, 4):
        yield number


def one() -> int:
    return 7


async def one_async() -> int:
    return 7


def work(x: int) -> int:
    end = time.perf_counter() + 0.003
    while time.perf_counter() < end:
        pass
    return x


def only_odd(x: int) -> int | None:
    return x if x % 2 else None


def twice(x: int) -> Iterator[bytes]:
    yield bytes(1000)
    yield bytes(3000)


async def twice_async(x: Any) -> AsyncIterator[Any]:
    yield x
    yield x


async def last(x: Any) -> None:
    return None


def run(
    *operators: Callable[..., Any], inputs: list[Any] | None = None, messages: int = 10
) -> dict[str, OperatorProfile]:
    return {found.name: found for found in profile(build(operators), inputs or [], messages).operators}


def test_each_operator_is_timed_and_its_results_are_measured() -> None:
    found = run(one, work, twice, last)
    assert {name: op.calls for name, op in found.items()} == {"one": 10, "work": 10, "twice": 10, "last": 20}
    assert found["work"].seconds is not None
    assert 0.003 <= found["work"].seconds < 0.1
    assert found["work"].work is not None
    assert found["twice"].output_bytes == pytest.approx(2000, rel=0.05)
    assert found["twice"].selectivity == 2
    assert found["last"].output_bytes is None
    assert set(found["work"].entry()) == {"cloud_execution_time", "output_msg_size"}
    assert set(found["last"].entry()) == {"cloud_execution_time"}


def test_work_is_time_by_the_speed_of_the_machine() -> None:
    found = profile(build([one, work, last]), [], 5)
    assert found.speed > 0
    work_of = found.operators[1]
    assert work_of.seconds is not None
    assert work_of.work == pytest.approx(work_of.seconds * found.speed)


def test_samples_take_the_place_of_the_source() -> None:
    found = run(count, only_odd, last, inputs=[1, 2], messages=6)
    assert found["count"].calls == 0
    assert found["count"].entry() == {"output_msg_size": 2.0}
    assert found["only_odd"].selectivity == 0.5
    assert found["last"].calls == 3


def test_a_generator_that_is_a_source_has_no_work_of_its_own() -> None:
    found = run(count, work, last)
    assert found["count"].calls == 5
    assert found["count"].work is None
    assert found["count"].entry() == {"output_msg_size": 2.0}


def test_asynchronous_operators() -> None:
    found = run(count_async, twice_async, last)
    assert {name: op.calls for name, op in found.items()} == {"count_async": 3, "twice_async": 3, "last": 6}
    assert run(one_async, last)["one_async"].calls == 10
    assert run(count_async, last, messages=2)["last"].calls == 2, "and is closed then"


def test_an_operator_that_raises_is_named() -> None:
    with pytest.raises(PipelineError, match="'divide' raised ZeroDivisionError"):
        run(one, lambda x: x, divide)


def divide(x: int) -> float:
    return x / 0


def test_objects_are_set_up_before_they_are_timed() -> None:
    class Model:
        def __init__(self, ready: bool):
            self.ready, self.weights = ready, 0

        def setup(self) -> None:
            if not self.ready:
                raise FileNotFoundError("no weights")
            self.weights += 1

        def __call__(self, x: int) -> int:
            return x * self.weights

    model = Model(True)
    profile(build([one, model, print]), (), 3)
    assert model.weights == 1
    with pytest.raises(PipelineError, match="operator 'Model' raised FileNotFoundError: no weights"):
        profile(build([one, Model(False), print]), (), 3)


def test_a_result_that_can_not_be_sent_is_named() -> None:
    with pytest.raises(PipelineError, match="'unsendable' returned what can't be sent"):
        run(unsendable, last)


def unsendable() -> Any:
    return object()
