"""What a sender learns of its link, against a simulated one: latency, bandwidth, queue, late acknowledgements."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nomad.delivery.samples import LinkReport, LinkSamples


class Link:
    """A link that sends one byte after the other, and a receiver that acknowledges `hold` seconds later."""

    def __init__(self, latency: float, bandwidth: float | None, hold: float = 0.02) -> None:
        self.samples = LinkSamples()
        self.latency, self.bandwidth, self.hold = latency, bandwidth, hold
        self.now = 0.0
        self._free = 0.0
        self._sent = 0
        self._order = itertools.count()
        self._coming: list[tuple[float, int, int | None, float]] = []

    def advance(self, until: float) -> None:
        while self._coming and self._coming[0][0] <= until:
            self.now, _, echo, held = heapq.heappop(self._coming)
            if echo is None:
                self.samples.answered(self.now)
            else:
                self.samples.acknowledged(echo, held, self.now)
        self.now = until

    def send(self, nbytes: int) -> None:
        if self.samples.ask(nbytes, self.now):
            self._carry(10, None, 0.0)
        self._sent += 1
        self.samples.sent((self._sent, nbytes, self.now))
        self._carry(nbytes, self._sent, self.hold)

    def _carry(self, nbytes: int, echo: int | None, held: float) -> None:
        self._free = max(self._free, self.now) + (nbytes / self.bandwidth if self.bandwidth else 0.0)
        arrives = self._free + self.latency
        heapq.heappush(self._coming, (arrives + held + self.latency, next(self._order), echo, held))

    def run(self, nbytes: int, rate: float, seconds: float) -> LinkReport:
        """Messages of `nbytes`; what is reported of the last half second."""
        reports = self.reports(nbytes, rate, seconds)
        *_, last = reports
        return last

    def reports(self, nbytes: int, rate: float, seconds: float) -> Iterator[LinkReport]:
        end, due, report_at = self.now + seconds, self.now, self.now + 0.5
        while self.now < end:
            if due < report_at:
                self.advance(due)
                self.send(nbytes)
                due += 1 / rate
            else:
                self.advance(report_at)
                yield self.samples.report(self.now)
                report_at += 0.5


@given(st.floats(0.0005, 0.3), st.floats(0.0, 0.1))
def test_small_messages_time_the_way(latency: float, hold: float) -> None:
    link = Link(latency, None, hold)
    report = link.run(1024, 50, 3)
    assert report.round_trip == pytest.approx(2 * latency, abs=1e-6)
    assert report.bandwidth is None, "nothing filled it"
    assert report.reached == pytest.approx(50 * 1024, rel=0.2)


@given(st.floats(0.001, 0.1), st.floats(2e6, 2e7))
def test_large_messages_tell_the_bandwidth_and_do_not_inflate_the_round_trip(latency: float, bandwidth: float) -> None:
    report = Link(latency, bandwidth).run(200_000, 5, 4)
    assert report.round_trip == pytest.approx(2 * latency, rel=0.05, abs=1e-3)
    assert report.bandwidth == pytest.approx(bandwidth, rel=0.05)


def test_without_being_filled_a_link_tells_a_lower_bound_only() -> None:
    report = Link(0.02, 1e6).run(1000, 100, 3)
    assert report.bandwidth is None
    assert report.reached == pytest.approx(100_000, rel=0.2)
    assert report.round_trip == pytest.approx(0.041, abs=0.001), "and the millisecond that the bytes take"


def test_a_saturated_link_tells_its_bandwidth_and_no_round_trip_that_waited() -> None:
    link = Link(0.01, 1e6)
    list(link.reports(50_000, 10, 3))  # half full: both are known
    for report in link.reports(50_000, 30, 3):  # half more than it carries
        assert report.round_trip is None or report.round_trip < 0.04
        assert report.bandwidth == pytest.approx(1e6, rel=0.1)


def test_a_link_that_is_saturated_from_the_start_tells_its_bandwidth() -> None:
    assert Link(0.01, 1e6).run(50_000, 30, 3).bandwidth == pytest.approx(1e6, rel=0.05)


@pytest.mark.parametrize("nbytes", [1024, 100_000])
def test_a_step_of_the_latency_shows_within_a_second_and_is_not_taken_for_less_bandwidth(nbytes: int) -> None:
    link = Link(0.005, 1e7)
    list(link.reports(nbytes, 20, 3))
    link.latency = 0.1
    reports = list(link.reports(nbytes, 20, 3))
    assert [r.round_trip for r in reports[2:]] == pytest.approx([0.2] * len(reports[2:]), rel=0.02)
    assert all(r.bandwidth is None or r.bandwidth == pytest.approx(1e7, rel=0.1) for r in reports[1:])


def test_a_step_of_the_bandwidth_shows_and_is_not_taken_for_latency() -> None:
    link = Link(0.02, 1e7)
    list(link.reports(100_000, 5, 3))
    link.bandwidth = 1e6
    reports = list(link.reports(100_000, 5, 4))
    assert reports[-1].bandwidth == pytest.approx(1e6, rel=0.05)
    assert reports[-1].round_trip == pytest.approx(0.04, rel=0.05)
    link.bandwidth = 1e7
    reports = list(link.reports(100_000, 5, 4))
    assert reports[-1].bandwidth == pytest.approx(1e7, rel=0.05)


def test_when_nothing_is_settled_pings_time_the_way() -> None:
    """The last operator hangs, so that nothing is acknowledged; messages go out as long as there is credit."""
    link = Link(0.03, None, hold=60.0)
    assert link.run(1024, 20, 3).round_trip == pytest.approx(0.06, abs=1e-6)


def test_another_connection_starts_anew() -> None:
    link = Link(0.01, 1e7)
    link.run(100_000, 5, 3)
    link.samples.opened(2)
    assert link.samples.report(link.now) == LinkReport(2, None, None, None)


def test_what_went_out_over_the_connection_before_is_not_acknowledged_on_this_one() -> None:
    samples = LinkSamples()
    samples.sent((1, 100, 1.0))
    samples.opened(2)
    samples.acknowledged(1, 0.0, 2.0)
    assert samples.newest is None


def test_an_acknowledgement_of_what_is_not_remembered_times_nothing() -> None:
    samples = LinkSamples()
    samples.acknowledged(5, 0.0, 1.0)
    samples.answered(1.0)
    for number in range(5000):
        samples.sent((number + 1, 100, 1.0))
    samples.acknowledged(10, 0.0, 2.0)
    assert samples.newest is None
    samples.acknowledged(5000, 0.25, 2.0)
    assert samples.newest == pytest.approx(0.75)
