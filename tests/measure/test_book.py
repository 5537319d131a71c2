"""The book: from counters of heart-beats, probes and declarations to estimates."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nomad.control import PodStats
from nomad.measure.book import Book, LinkEstimates, NodeEstimates, OperatorEstimates
from nomad.measure.estimate import Estimate
from nomad.measure.vivaldi import Coordinates


def beat(book: Book, now: float, pod: str = "p.f-e1", node: str = "fog", **stats: Any) -> None:
    book.heartbeat("p", "f", pod, node, PodStats(**stats), now)


def value(estimate: Estimate | None) -> float:
    assert estimate is not None
    return estimate.value


def run(
    book: Book, beats: int, *, service: float = 0.002, rate: int = 50, pod: str = "p.f-e1", start: float = 0.0
) -> None:
    """Half a second between beats; `rate` messages in each."""
    for number in range(beats):
        done = rate * number
        beat(
            book,
            start + 0.5 * number,
            pod,
            received=done,
            processed=done,
            emitted=2 * done,
            sent_bytes=2 * done * 1000,
            busy_seconds=done * service,
        )


@pytest.mark.parametrize("told", [True, False])
def test_heart_beats_that_come_late_and_all_at_once_are_no_burst(told: bool) -> None:
    """As after a silence of the network: a pod says when it counted."""
    book = Book()
    for number in range(40):
        now = 0.5 * number if number < 20 else 20.0 + 0.001 * number
        at = 1000.0 + 0.5 * number if told else None
        done = 5 * number
        beat(book, now, received=done, processed=done, emitted=done, busy_seconds=0.01 * done, at=at)
    found = book.operator("p", "f")
    assert (value(found.departure) == pytest.approx(10)) == told
    assert (value(found.arrival) == pytest.approx(10)) == told
    assert (value(found.busy) == pytest.approx(0.1)) == told


@pytest.mark.parametrize("at", [math.nan, math.inf, -1.0, 0.0, 5e-324])
def test_a_clock_that_goes_nowhere_isnt_counted_on(at: float) -> None:
    book = Book()
    for number in range(4):
        beat(book, 0.5 * number, received=5 * number, processed=5 * number, at=at * number)
    assert value(book.operator("p", "f").departure) == pytest.approx(10)


def test_heart_beats_may_be_rare() -> None:
    """16 s apart; and what speaks isn't forgotten when there is another process, as in a move."""
    book = Book()
    for number in range(8):
        done, now = 400 * number, 16.0 * number
        beat(book, now, received=done, processed=done, emitted=done, busy_seconds=0.01 * done)
        beat(book, now + 15.0, pod=f"p.f-e{number + 2}")
    found = book.operator("p", "f")
    assert value(found.departure) == 25
    assert value(found.service) == pytest.approx(0.01)
    assert value(found.busy) == pytest.approx(0.25)
    assert found.service is not None
    assert found.service.samples == 7
    assert found.settled


def test_what_was_never_heard_of_is_unknown() -> None:
    book = Book()
    assert book.operator("p", "f") == OperatorEstimates()
    assert book.link("a", "b") == LinkEstimates()
    assert book.node("a") == NodeEstimates()
    assert book.newest == 0
    assert book.since(0) == []
    assert not book.operator("p", "f").settled


def test_counters_become_estimates() -> None:
    book = Book()
    book.node_sample("fog", 0.0, speed=0.5)
    run(book, 12)
    found = book.operator("p", "f")
    assert value(found.service) == pytest.approx(0.002)
    assert value(found.work) == pytest.approx(0.001), "half as fast as the reference core: half the work in the time"
    assert value(found.output_bytes) == pytest.approx(1000)
    assert value(found.selectivity) == pytest.approx(2)
    assert value(found.arrival) == pytest.approx(100)
    assert value(found.departure) == pytest.approx(100)
    assert value(found.busy) == pytest.approx(0.2)
    assert value(found.queue) == 0
    assert found.settled


def test_without_a_measured_speed_there_is_service_time_and_no_work() -> None:
    book = Book()
    run(book, 12)
    assert book.operator("p", "f").work is None
    assert value(book.operator("p", "f").service) == pytest.approx(0.002)


def test_the_first_beat_of_a_process_counts_for_nothing() -> None:
    book = Book()
    beat(book, 0.0, received=3, processed=3, busy_seconds=60.0)
    beat(book, 0.5, received=13, processed=13, busy_seconds=60.1)
    assert value(book.operator("p", "f").service) == pytest.approx(0.01)


def test_a_restarted_process_goes_on_where_the_one_before_was() -> None:
    book = Book()
    run(book, 12)
    run(book, 12, pod="p.f-e2", start=10.0, service=0.004)
    found = book.operator("p", "f")
    assert value(found.service) == pytest.approx(0.004)
    assert found.service is not None
    assert found.service.samples == 22


def test_while_an_operator_moves_only_the_instance_that_works_counts() -> None:
    book = Book()
    run(book, 12)
    before = book.operator("p", "f")
    for number in range(5):  # the next one waits, while the present one goes on
        beat(book, 6.0 + 0.5 * number, "p.f-e2")
        done = 50 * (12 + number)
        beat(book, 6.0 + 0.5 * number, received=done, processed=done, busy_seconds=done * 0.002)
    after = book.operator("p", "f")
    assert value(after.departure) == pytest.approx(value(before.departure), rel=0.01)
    assert value(after.busy) == pytest.approx(0.2, rel=0.01)


def test_rates_are_counted_over_enough_messages() -> None:
    """One message a second, seen twice a second: neither 0 nor 2 per second."""
    book = Book()
    for number in range(40):
        done = number // 2
        beat(book, 0.5 * number, received=done, processed=done)
    departure = book.operator("p", "f").departure
    assert departure is not None
    assert departure.value == pytest.approx(1.0, abs=0.2)
    assert departure.deviation < 0.3


def test_a_sink_sends_nothing_and_a_source_receives_nothing() -> None:
    book = Book()
    for number in range(12):
        beat(book, 0.5 * number, processed=10 * number, emitted=10 * number, sent_bytes=500 * number)
    found = book.operator("p", "f")
    assert found.arrival is None
    assert found.selectivity is None
    assert found.work is None
    assert found.busy is None
    assert value(found.departure) == pytest.approx(20)
    assert value(found.output_bytes) == pytest.approx(50)
    assert found.settled


def test_a_profile_is_the_prior() -> None:
    book = Book()
    book.node_sample("fog", 0.0, speed=1.0)
    book.declare_operator("p", "f", 0.0, work=0.1, output_bytes=50.0)
    found = book.operator("p", "f")
    assert value(found.work) == 0.1
    assert found.work is not None
    assert not found.work.measured
    run(book, 30)
    assert value(book.operator("p", "f").work) == pytest.approx(0.002, rel=0.05)
    book.declare_operator("p", "f", 20.0, work=0.1)
    assert value(book.operator("p", "f").work) == pytest.approx(0.002, rel=0.05), "what was measured stays"


def test_a_round_trip_is_a_latency_both_ways() -> None:
    book = Book()
    book.link_sample("b", "a", 1.0, round_trip=0.02)
    assert value(book.link("a", "b").latency) == value(book.link("b", "a").latency) == 0.01
    assert book.link("a", "b").bandwidth is None
    book.link_sample("b", "a", 1.0, bandwidth=1e6, reached=5e5)
    assert value(book.link("b", "a").bandwidth) == 1e6
    assert book.link("b", "a").reached == 5e5
    assert book.link("a", "b").bandwidth is None, "the other direction has a bandwidth of its own"


def test_a_declaration_holds_until_the_first_measurement() -> None:
    book = Book()
    book.declare_link("a", "b", 0.0, latency=0.02, bandwidth=1e6)
    book.declare_node("a", 0.0, speed=4.0)
    link, speed = book.link("a", "b"), book.node("a").speed
    assert link.latency is not None
    assert not link.latency.measured
    assert link.latency.value == 0.02
    assert speed is not None
    assert not speed.measured
    book.link_sample("a", "b", 1.0, round_trip=0.2, bandwidth=9e6)
    book.node_sample("a", 1.0, speed=0.7)
    assert value(book.link("a", "b").latency) == 0.1
    assert value(book.link("a", "b").bandwidth) == 9e6
    assert value(book.node("a").speed) == 0.7
    book.declare_link("a", "b", 2.0, latency=0.02, bandwidth=1e6)
    assert value(book.link("a", "b").latency) == 0.1


def test_two_directions_that_are_declared_differently_share_the_mean() -> None:
    book = Book()
    book.declare_link("a", "b", 0.0, latency=0.02)
    book.declare_link("b", "a", 0.0, latency=0.04)
    assert value(book.link("a", "b").latency) == pytest.approx(0.03)


def test_a_latency_that_steps_is_followed_with_the_second_sample() -> None:
    book = Book()
    for number in range(20):
        book.link_sample("a", "b", 0.5 * number, round_trip=0.010 + 0.0001 * (number % 3))
    for number in range(20, 22):
        book.link_sample("a", "b", 0.5 * number, round_trip=0.2)
    assert value(book.link("a", "b").latency) == pytest.approx(0.1, rel=0.01)


def test_raw_samples_are_there_for_every_reader() -> None:
    book = Book()
    book.link_sample("b", "a", 1.0, round_trip=0.02)
    seen = book.newest
    book.link_sample("a", "b", 2.0, round_trip=0.04, bandwidth=1e6)
    kinds = [(s.kind, s.key, s.value, s.time) for s in book.since(seen)]
    assert kinds == [("latency", ("a", "b"), 0.02, 2.0), ("bandwidth", ("a", "b"), 1e6, 2.0)]
    assert len(book.since(0)) == 3
    assert [s.number for s in book.since(0)] == [1, 2, 3]
    assert book.since(book.newest) == []


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["round_trip", "bandwidth", "reached"]),
            st.floats(allow_nan=True, allow_infinity=True),
        ),
        max_size=20,
    )
)
def test_what_is_no_number_is_never_taken(samples: list[tuple[str, float]]) -> None:
    book = Book()
    for number, (kind, sample) in enumerate(samples):
        book.link_sample("a", "b", float(number), **{kind: sample})
    link = book.link("a", "b")
    for estimate in (link.latency, link.bandwidth):
        assert estimate is None or (math.isfinite(estimate.value) and estimate.value >= 0)
    assert link.reached is None or math.isfinite(link.reached)


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 1000), st.floats(0, 5), st.floats(0.1, 2)), max_size=30))
def test_whatever_a_pod_says_estimates_are_finite(beats: list[tuple[int, int, float, float]]) -> None:
    book = Book()
    book.node_sample("fog", 0.0, speed=1.0)
    now = 0.0
    for received, processed, busy, seconds in beats:
        now += seconds
        beat(book, now, received=received, processed=processed, emitted=processed, busy_seconds=busy)
    found = book.operator("p", "f")
    for name in found.__dataclass_fields__:
        estimate = getattr(found, name)
        if estimate is not None:
            assert math.isfinite(estimate.value)
            assert estimate.value >= 0
            assert estimate.deviation >= 0
            assert estimate.updated <= now
    assert found.busy is None or found.busy.value <= 1


def test_coordinates_fill_the_gaps_and_say_their_error() -> None:
    book = Book()
    book.use_coordinates(Coordinates(Random(1)))
    for number in range(60):
        now = float(number)
        book.link_sample("a", "b", now, round_trip=0.02)
        book.link_sample("b", "c", now, round_trip=0.02)
    gap = book.link("a", "c")
    assert gap.derived
    assert gap.latency is not None
    assert gap.latency.deviation > 0
    assert not book.link("a", "b").derived
    book.link_sample("b", "c", 500.0, round_trip=0.02)
    assert book.link("a", "b").derived, "what was measured minutes before is less sure"


def test_what_is_gone_is_forgotten() -> None:
    book = Book()
    book.use_coordinates(Coordinates(Random(1)))
    run(book, 5)
    book.link_sample("a", "b", 1.0, round_trip=0.02, bandwidth=1.0, reached=1.0)
    book.node_sample("a", 1.0, speed=1.0)
    book.forget("p", "f")
    book.forget_node("a")
    assert book.operator("p", "f") == OperatorEstimates()
    assert book.link("a", "b") == LinkEstimates()
    assert book.node("a") == NodeEstimates()


def test_a_bandwidth_counts_once_several_samples_agree() -> None:
    book = Book()
    book.declare_link("a", "b", 0.0, bandwidth=1e7)
    for k in range(3):
        for target in ("b", "c"):
            book.link_sample("a", target, float(k), bandwidth=1e6)
    assert value(book.link("a", "b").bandwidth) == value(book.link("a", "c").bandwidth) == 1e6, "as measured"
    assert value(book.link("a", "b").counted) == 1e7, "as declared"
    assert book.link("a", "c").counted is None
    for target in ("b", "c"):
        book.link_sample("a", target, 3.0, bandwidth=1e6)
        assert value(book.link("a", target).counted) == 1e6
        for k in range(2):
            book.link_sample("a", target, 4.0 + k, bandwidth=1e5 * (k + 1))
        assert book.link("a", target).counted == book.link("a", target).bandwidth, "it is followed, though it jumps"
    book.forget_node("a")
    assert book.link("a", "b").counted is None


def test_a_bandwidth_that_varies_counts_after_many_samples() -> None:
    book = Book()
    for k in range(20):
        assert book.link("a", "b").counted is None
        book.link_sample("a", "b", float(k), bandwidth=1e6 if k % 2 else 1e7)
    assert book.link("a", "b").counted is not None
