"""What operators cost, found out by running them here and now: `nomad profile`. Called by the command line only.

Runs one operator after the other in this process, each on what the one before gave, and times every call as a pod does.
Nothing is sent anywhere; results are only encoded, to know how large they are as messages.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nomad.callables import setup_of
from nomad.delivery.codec import Codec
from nomad.errors import PayloadError, PipelineError, message_of
from nomad.measure.calibrate import calibrate_now
from nomad.pipeline import Kind, Operator, Pipeline


@dataclass(frozen=True, slots=True)
class OperatorProfile:
    """One operator, as it was seen. None is unknown."""

    name: str
    calls: int
    seconds: float | None
    """Mean time of a call on this machine, without the first; for a source that is a generator, of each value."""
    deviation: float | None
    """Mean absolute difference from that."""
    work: float | None
    """Reference-seconds: `seconds` times the speed of this machine.

    None for a source that is a generator: what it takes for a value may be waiting.
    """
    output_bytes: float | None
    """Mean encoded bytes of a result; None when there was none."""
    selectivity: float | None
    """Results per call; None for a source."""

    def entry(self) -> dict[str, float]:
        """As `submit` takes it."""
        known = {"cloud_execution_time": self.work, "output_msg_size": self.output_bytes}
        return {key: value for key, value in known.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Profile:
    """A pipeline, as it was seen."""

    speed: float
    """Of a core of this machine; a reference core's is 1.0."""
    operators: tuple[OperatorProfile, ...]


def profile(pipeline: Pipeline, inputs: Sequence[Any], messages: int) -> Profile:
    """Run the operators on `inputs`, again and again until there were `messages`; without any, the source makes them.

    Raises `PipelineError` that names an operator which raised, or whose result can't be sent.
    """
    speed = calibrate_now()
    codec = Codec(mode=pipeline.codec)
    found = []
    values: list[Any] = []
    with asyncio.Runner() as runner:
        for number, operator in enumerate(pipeline.operators):
            if (setup := setup_of(operator.function)) is not None and not (number == 0 and inputs):
                _timed(operator, setup)
            times: list[float] = []
            if number == 0 and inputs:
                results = list(itertools.islice(itertools.cycle(inputs), messages))
            elif number == 0:
                times, results = _source(operator, messages, runner)
            else:
                times, results = _calls(operator, values, runner)
            values = [value for value in results if value is not None]
            last = number == len(pipeline.operators) - 1
            sizes = [] if last else [_size(operator, codec, value) for value in values]
            found.append(_profile(operator, times, sizes, len(values), speed))
    return Profile(speed, tuple(found))


def _profile(operator: Operator, times: list[float], sizes: list[int], results: int, speed: float) -> OperatorProfile:
    kind = operator.spec.kind
    pulled = kind in (Kind.SOURCE_GENERATOR, Kind.ASYNC_SOURCE_GENERATOR)
    source = pulled or kind in (Kind.PERIODIC, Kind.ASYNC_PERIODIC)
    steady = times[1:] if len(times) > 1 else times  # the first call loads what the function needs
    seconds = statistics.fmean(steady) if steady else None
    return OperatorProfile(
        name=operator.spec.name,
        calls=len(times),
        seconds=seconds,
        deviation=statistics.fmean(abs(t - seconds) for t in steady) if seconds is not None else None,
        work=seconds * speed if seconds is not None and not pulled else None,
        output_bytes=statistics.fmean(sizes) if sizes else None,
        selectivity=None if source or not times else results / len(times),
    )


def _source(operator: Operator, messages: int, runner: asyncio.Runner) -> tuple[list[float], list[Any]]:
    if operator.spec.kind in (Kind.SOURCE_GENERATOR, Kind.ASYNC_SOURCE_GENERATOR):
        made = operator.function()
        steps = _drive(made, runner) if operator.spec.kind is Kind.ASYNC_SOURCE_GENERATOR else made
        times, results = [], []
        for _ in range(messages):
            seconds, value = _timed(operator, functools.partial(next, steps, _END))
            if value is _END:
                break
            times.append(seconds)
            results.append(value)
        _close(made, runner)
        return times, results
    return _repeat(operator, [()] * messages, runner)


def _calls(operator: Operator, values: list[Any], runner: asyncio.Runner) -> tuple[list[float], list[Any]]:
    return _repeat(operator, [(value,) for value in values], runner)


def _repeat(
    operator: Operator, arguments: Sequence[tuple[Any, ...]], runner: asyncio.Runner
) -> tuple[list[float], list[Any]]:
    times, results = [], []
    for args in arguments:
        seconds, values = _timed(operator, functools.partial(_call, operator, args, runner))
        times.append(seconds)
        results += values
    return times, results


def _call(operator: Operator, args: tuple[Any, ...], runner: asyncio.Runner) -> list[Any]:
    result = operator.function(*args)
    match operator.spec.kind:
        case Kind.ASYNC | Kind.ASYNC_PERIODIC:
            return [runner.run(_result(result))]
        case Kind.GENERATOR:
            return list(result)
        case Kind.ASYNC_GENERATOR:
            return list(_drive(result, runner))
        case _:
            return [result]


async def _result(awaitable: Any) -> Any:
    return await awaitable


def _drive(generator: Any, runner: asyncio.Runner) -> Iterator[Any]:
    """The values of an asynchronous generator, one by one."""
    while (value := runner.run(_step(generator))) is not _END:
        yield value


async def _step(generator: Any) -> Any:
    return await anext(generator, _END)


def _close(generator: Any, runner: asyncio.Runner) -> None:
    if inspect.isasyncgen(generator):
        runner.run(generator.aclose())
    elif inspect.isgenerator(generator):
        generator.close()


def _timed(operator: Operator, call: Callable[[], Any]) -> tuple[float, Any]:
    before = time.perf_counter()
    try:
        value = call()
    except Exception as exc:
        raise PipelineError(f"operator {operator.spec.name!r} raised {type(exc).__name__}: {message_of(exc)}") from exc
    return time.perf_counter() - before, value


def _size(operator: Operator, codec: Codec, value: Any) -> int:
    try:
        body, buffers = codec.encode([value])
    except PayloadError as exc:
        raise PipelineError(f"operator {operator.spec.name!r} returned what can't be sent: {exc}") from exc
    return len(body) + sum(map(len, buffers))


_END = object()
