"""The timeline: ramps and oscillations as steps, the world at a moment, and phases."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nomad.bench import scenario, timeline
from nomad.bench.scenario import Scenario
from nomad.bench.timeline import LinkStep, MoveStep, NodeStep, RateStep, SpeedStep, WorkStep
from nomad.control import Shape
from nomad.errors import ScenarioError

DURATION = 100.0


def with_events(*events: str, latency: str = "20ms", settle: str = "5s") -> Scenario:
    lines = "".join(f"  - {{{event}}}\n" for event in events)
    return scenario.parse(
        "topology:\n  nodes: {a: {}, b: {}}\n"
        f"  links: [{{from: a, to: b, latency: {latency}, bandwidth: 8Mbit}}]\n"
        "pipeline: {start: a, end: b, rate: 10, operators: [{name: x, work: 1ms}]}\n"
        f"duration: {DURATION:g}\nsettle: {settle}\n" + (f"events:\n{lines}" if events else "")
    )


def shapes(found: list[Any], source: str = "a") -> list[tuple[float, Shape]]:
    return [(step.at, step.shape) for step in found if isinstance(step, LinkStep) and step.source == source]


def test_what_an_event_does_not_say_stays_and_both_directions_change() -> None:
    steps = timeline.steps(
        with_events("at: 10, link: a->b, latency: 50ms", "at: 20, link: b -> a, loss: 0.1, both: no")
    )
    assert shapes(steps) == [(10.0, Shape(0.05, 0.0, 1e6, 0.0))]
    assert shapes(steps, "b") == [(10.0, Shape(0.05, 0.0, 1e6, 0.0)), (20.0, Shape(0.05, 0.0, 1e6, 0.1))]


def test_each_kind_of_event() -> None:
    steps = timeline.steps(
        with_events(
            "at: 1, node: a, speed: 0.5",
            "at: 2, node: b, lost: true",
            "at: 3, node: b, lost: false",
            "at: 4, rate: 99",
            "at: 5, operator: x, work: 7ms",
            "at: 6, move: x, to: [b, a], every: 2s, times: 3",
        )
    )
    assert steps == [
        SpeedStep(1, 0, "a", 0.5),
        NodeStep(2, 1, "b", True),
        NodeStep(3, 2, "b", False),
        RateStep(4, 3, 99),
        WorkStep(5, 4, "x", 0.007),
        MoveStep(6, 5, "x", "b"),
        MoveStep(8, 5, "x", "a"),
        MoveStep(10, 5, "x", "b"),
    ]


@pytest.mark.no_cover
@given(at=st.floats(0, 50), over=st.floats(0.1, 40), start=st.floats(0.001, 0.2), end=st.floats(0.001, 0.2))
def test_a_ramp_is_even_and_ends_where_it_should(at: float, over: float, start: float, end: float) -> None:
    found = shapes(
        timeline.steps(with_events(f"at: {at!r}, link: a->b, latency: {end!r}, over: {over!r}", latency=repr(start)))
    )
    times, latencies = [step[0] for step in found], [step[1].latency for step in found]
    assert times == sorted(times)
    assert times[-1] == pytest.approx(at + over)
    assert latencies[-1] == pytest.approx(end)
    assert latencies in (sorted(latencies), sorted(latencies, reverse=True))
    for moment, latency in zip(times, latencies, strict=True):
        assert latency == pytest.approx(start + (end - start) * (moment - at) / over)
    gaps = [b - a for a, b in zip([at, *times], times, strict=False)]
    assert max(gaps) <= timeline.STEP + 1e-9


@pytest.mark.no_cover
@given(
    at=st.floats(0, 30),
    period=st.floats(1, 20),
    swing=st.floats(0.001, 0.1),
    until=st.one_of(st.none(), st.floats(40, 90)),
)
def test_an_oscillation_stays_around_its_mean(at: float, period: float, swing: float, until: float | None) -> None:
    mean = swing + 0.005
    ending = f", until: {until!r}" if until else ""
    found = shapes(
        timeline.steps(
            with_events(f"at: {at!r}, link: a->b, swing: {swing!r}, period: {period!r}{ending}", latency=repr(mean))
        )
    )
    latencies = [shape.latency for _, shape in found]
    assert min(latencies) >= mean - swing - 1e-9
    assert max(latencies) <= mean + swing + 1e-9
    if until is None or until >= at + period:
        assert max(latencies) - min(latencies) > 1.9 * swing
    for moment, shape in found[:-1]:
        assert abs(shape.latency - mean - swing * math.sin(2 * math.pi * (moment - at) / period)) < 1e-9
    if until:
        assert found[-1] == (until, Shape(mean, 0.0, 1e6, 0.0))


def test_an_event_ends_the_ramp_that_its_link_is_in_and_goes_on_from_there() -> None:
    steps = timeline.steps(
        with_events("at: 10, link: a->b, latency: 120ms, over: 10s", "at: 15, link: a->b, bandwidth: 16Mbit")
    )
    *ramp, (last_at, last) = shapes(steps)
    assert all(at < 15 for at, _ in ramp)
    assert (last_at, last.bandwidth) == (15.0, 2e6)
    assert last.latency == ramp[-1][1].latency == pytest.approx(0.065)


def test_a_ramp_of_the_bandwidth() -> None:
    steps = timeline.steps(with_events("at: 10, link: a->b, bandwidth: 16Mbit, over: 2s"))
    assert [shape.bandwidth for _, shape in shapes(steps)] == [1.25e6, 1.5e6, 1.75e6, 2e6]
    with pytest.raises(ScenarioError, match="no even way between a bandwidth and none"):
        timeline.steps(with_events("at: 10, link: a->b, bandwidth: unlimited, over: 2s"))


@pytest.mark.parametrize("event", ["swing: 21ms, period: 10s", "jitter: 21ms", "latency: 5ms, jitter: 6ms"])
def test_links_that_are_not_possible(event: str) -> None:
    with pytest.raises(ScenarioError, match="isn't possible"):
        timeline.steps(with_events(f"at: 10, link: a->b, {event}"))


def test_a_shorter_run_ends_the_timeline() -> None:
    found = with_events("at: 10, link: a->b, swing: 5ms, period: 10s", "at: 90, rate: 5")
    steps = timeline.steps(found, 30.0)
    assert max(step.at for step in steps) < 30
    assert timeline.phases(found, 30.0)[-1].end == 30


def test_the_world_at_a_moment() -> None:
    found = with_events(
        "at: 10, link: a->b, latency: 50ms", "at: 20, node: b, lost: true", "at: 30, rate: 20",
        "at: 40, operator: x, work: 3ms", "at: 50, node: b, lost: false", "at: 60, node: a, speed: 2",
    )  # fmt: skip
    steps = timeline.steps(found)
    first, middle, last = (timeline.conditions(found, steps, at) for at in (-1.0, 45.0, math.inf))
    assert (first.links["a", "b"].latency, first.lost, first.rate, first.work) == (0.02, set(), 10, {"x": 0.001})
    assert (middle.links["b", "a"].latency, middle.lost, middle.rate, middle.work) == (0.05, {"b"}, 20, {"x": 0.003})
    assert (last.lost, last.speeds) == (set(), {"a": 2, "b": 1.0})


def test_phases() -> None:
    found = with_events(
        "at: 20, link: a->b, latency: 50ms", "at: 20, rate: 5", "at: 40, link: a->b, latency: 10ms, over: 10s",
        "at: 70, operator: x, work: 3ms", "at: 73, rate: 9",
    )  # fmt: skip
    assert [(phase.name, phase.start, phase.end) for phase in timeline.phases(found)] == [
        ("before", 5, 20),
        ("after a <-> b 50 ms, 5 messages/s", 25, 40),
        ("during a <-> b 10 ms", 40, 50),
        ("after a <-> b 10 ms", 55, 70),
        ("after 9 messages/s", 78, 100),
    ]
    assert [(phase.name, phase.start, phase.end) for phase in timeline.phases(with_events())] == [("all", 5, 100)]


@pytest.mark.no_cover
@given(times=st.lists(st.floats(0, 99), max_size=6), settle=st.floats(0, 20))
def test_phases_are_in_order_and_never_overlap(times: list[float], settle: float) -> None:
    found = timeline.phases(with_events(*(f"at: {at!r}, rate: 5" for at in times), settle=repr(settle)))
    edges = [edge for phase in found for edge in (phase.start, phase.end)]
    assert edges == sorted(edges)
    assert all(0 <= edge <= DURATION for edge in edges)
    assert not any(phase.start < at < phase.end for phase in found for at in times)


@pytest.mark.parametrize(
    ("event", "words"),
    [
        ("link: a->b, latency: 5ms, bandwidth: 8Mbit, jitter: 1ms", "a <-> b 5 ms jitter 1 ms 8 Mbit/s"),
        ("link: a->b, loss: 0.01", "a <-> b loss 1 %"),
        ("link: a->b, bandwidth: unlimited, both: false", "a -> b unlimited"),
        ("link: a->b, swing: 5ms, period: 1s", "a <-> b ±5 ms"),
        ("node: b, lost: true", "b lost"),
        ("node: b, lost: false", "b back"),
        ("node: b, speed: 0.5", "b speed 0.5"),
        ("operator: x, work: 3ms", "x takes 3 ms"),
        ("move: x, to: [a]", "1 move of x"),
        ("move: x, to: [a, b], times: 3", "3 moves of x"),
    ],
)  # fmt: skip
def test_events_in_words(event: str, words: str) -> None:
    assert timeline.describe(with_events(f"at: 1, {event}").form.events[0]) == words
