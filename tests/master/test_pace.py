"""How often pods are asked for heart-beats, and what is overdue."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nomad.control import QUICKEST, SLOWEST
from nomad.master.pace import ROOM, STEPS, Pace, pace
from nomad.settings import Heartbeats
from tests.clock import VirtualClock

MOST = 800.0


@pytest.mark.parametrize(("pods", "seconds"), [(0, 0.5), (400, 0.5), (401, 1), (1000, 2), (5000, 8), (100_000, 16)])
def test_the_more_pods_the_slower_is_each(pods: int, seconds: float) -> None:
    assert pace(pods, STEPS[0], MOST) == seconds


def test_pods_may_be_told_all_steps() -> None:
    assert all(QUICKEST <= step <= SLOWEST for step in STEPS)


@given(st.lists(st.integers(0, 20_000), min_size=1))
def test_there_are_never_more_heart_beats_than_wanted(counts: list[int]) -> None:
    seconds = STEPS[0]
    for pods in counts:
        before, seconds = seconds, pace(pods, seconds, MOST)
        assert seconds == STEPS[-1] or pods / seconds <= MOST
        if seconds > before:
            assert pods / before > MOST, "no slower than it must be"
        elif seconds > STEPS[0]:
            assert pods / (seconds / 2) > ROOM * MOST, "no slower than for a while"


@given(st.integers(0, 10_000), st.sampled_from(STEPS), st.lists(st.floats(0.0, 1.0)))
def test_pods_that_come_and_go_change_nothing(pods: int, before: float, shares: list[float]) -> None:
    """A fifth more or less than at the last change: at most one more change."""
    seconds = pace(pods, before, MOST)
    changes = 0
    for share in shares:
        now = pace(int(pods * (0.8 + 0.4 * share)), seconds, MOST)
        changes += now != seconds
        seconds = now
    assert changes <= 1


def test_thousands_that_connect_one_after_another_are_told_a_few_times() -> None:
    settings, clock = Heartbeats(), VirtualClock()
    kept = Pace(settings, clock)
    assert sum(kept.count(pods) for pods in range(5001)) == 5
    assert kept.seconds == 16
    assert not kept.count(5000)
    assert sum(kept.count(pods) for pods in range(5000, -1, -1)) == 5
    assert kept.seconds == 0.5


async def test_what_is_overdue_follows_the_pace() -> None:
    clock = VirtualClock()
    kept = Pace(replace(Heartbeats(), most=10.0, overdue=5.0), clock)
    assert kept.overdue == 5.0
    kept.count(20)
    assert (kept.seconds, kept.overdue) == (2.0, 5.0)
    kept.count(80)
    assert (kept.seconds, kept.overdue) == (8.0, 20.0), "who was told to slow down isn't late for it"
    kept.count(40)
    assert kept.seconds == 8.0
    kept.count(20)
    assert (kept.seconds, kept.overdue) == (4.0, 20.0), "who has waited for 8 s isn't late either"
    await clock.advance(15.0)
    kept.count(0)
    assert (kept.seconds, kept.overdue) == (0.5, 20.0)
    await clock.advance(19.9)
    assert kept.overdue == 20.0
    await clock.advance(0.1)
    assert kept.overdue == 5.0
