"""What a move cost, from what pods say: pure."""

from __future__ import annotations

import pytest

from nomad.master.tally import doubled, lost, pause


def every(gap: float, begin: float, end: float) -> list[tuple[float, float]]:
    return [(begin + n * gap, 0.02) for n in range(int(round((end - begin) / gap)) + 1)]


def test_the_pause_is_what_a_gap_exceeds_the_usual_one_by() -> None:
    steady = every(0.01, 95.0, 101.0)
    assert pause(steady, 100.0) == pytest.approx(0.0, abs=1e-9)
    gap = every(0.01, 95.0, 100.02) + every(0.01, 100.07, 101.0)
    assert pause(gap, 100.0) == pytest.approx(0.04)


def test_gaps_before_the_switch_are_not_its_fault() -> None:
    before = every(0.01, 95.0, 98.0) + every(0.01, 99.0, 101.0)
    assert pause(before, 100.0) == pytest.approx(0.0, abs=1e-9)


def test_a_gap_that_began_before_the_switch_counts_if_it_ends_after_it() -> None:
    assert pause(every(0.01, 95.0, 99.99) + every(0.01, 100.2, 101.0), 100.0) == pytest.approx(0.2)


def test_a_pause_that_nobody_saw_is_unknown() -> None:
    assert pause([], 100.0) is None
    assert pause([(99.0, 0.1)], 100.0) is None
    assert pause(every(0.01, 95.0, 99.9), 100.0) is None
    assert pause([(99.0, 0.1), (100.5, 0.1)], 100.0) == 0.0  # nothing says that this isn't usual


def test_several_arrivals_at_once_are_no_gap() -> None:
    twice = sorted(every(0.01, 95.0, 101.0) * 2)
    assert pause(twice, 100.0) == pytest.approx(0.01, abs=1e-9) or pause(twice, 100.0) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    ("settled", "first", "count"), [(10, 10, 0), (10, 7, 0), (10, 13, 3), (None, 3, None), (3, None, None)]
)
def test_lost(settled: int | None, first: int | None, count: int | None) -> None:
    assert lost(settled, first) == count


@pytest.mark.parametrize(
    ("before", "after", "count"), [(2, 2, 0), (2, 5, 3), (5, 2, None), (None, 2, None), (2, None, None)]
)
def test_doubled(before: int | None, after: int | None, count: int | None) -> None:
    assert doubled(before, after) == count
