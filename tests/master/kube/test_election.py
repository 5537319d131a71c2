"""Which master leads: single rules. Histories of masters are in `test_election_histories`."""

from __future__ import annotations

from dataclasses import replace

from nomad.master.kube.election import (
    MARGIN,
    SILENCE,
    SPACING,
    Election,
    Lease,
    MasterPod,
    Step,
    holder_name,
    is_dead,
    pod_of,
)

SECONDS, RENEW = 13.0, 10.0


def lease(holder: str, version: str = "1", *, seconds: float = SECONDS, acquired: float = 0.0) -> Lease:
    return Lease(holder, seconds, acquired, version)


def election() -> Election:
    return Election("me", SECONDS, RENEW)


# Single rules


def test_nothing_is_done_before_it_was_looked_for() -> None:
    assert election().next(100.0) == (Step.WAIT, None)


def test_a_lease_that_isnt_there_or_is_free_is_taken_at_once() -> None:
    for found in (None, lease("")):
        mine = election()
        mine.saw(found, 100.0)
        assert mine.next(100.0) == (Step.TAKE, None)


def test_another_ones_is_taken_when_it_hasnt_changed_for_as_long_as_it_lasts() -> None:
    mine = election()
    mine.saw(lease("other", seconds=20.0), 100.0)
    assert mine.next(100.0) == (Step.WAIT, 120.0)
    mine.saw(lease("other", "2", seconds=20.0), 110.0)
    assert mine.next(129.9) == (Step.WAIT, 130.0)
    assert mine.next(130.0) == (Step.TAKE, None)


def test_what_a_dead_one_holds_is_taken_at_once() -> None:
    mine = election()
    mine.saw(lease("other"), 100.0)
    mine.proven_dead("other")
    assert mine.next(100.0) == (Step.TAKE, None)
    mine.failed(100.0)
    step, at = mine.next(100.0)
    assert step is Step.WAIT
    assert at is not None
    assert mine.next(at) == (Step.TAKE, None)
    mine.saw(lease("third", "2"), 101.0)
    assert mine.next(101.0) == (Step.WAIT, 114.0)


def test_one_that_is_deleted_is_taken_when_its_holder_must_have_noticed() -> None:
    mine = election()
    mine.saw(lease("other"), 100.0)
    mine.saw(None, 105.0)
    assert mine.next(105.0) == (Step.WAIT, 118.0)


def test_a_leader_renews_in_time_or_stops() -> None:
    mine = election()
    mine.saw(None, 100.0)
    mine.wrote(lease("me"), 100.0)
    assert mine.leads(100.0)
    assert mine.next(100.0) == (Step.WAIT, 110.0)
    assert mine.next(110.0) == (Step.RENEW, None)
    mine.wrote(lease("me", "2"), 110.0)
    mine.saw(lease("me", "2"), 110.1)
    assert mine.next(120.0) == (Step.RENEW, None)
    mine.failed(121.8)
    assert mine.next(121.9) == (Step.WAIT, 110.0 + SECONDS - MARGIN)
    assert not mine.leads(122.0)
    assert mine.next(122.0) == (Step.STOP, None)
    mine.wrote(lease("me", "3"), 122.0)
    assert mine.next(122.0) == (Step.STOP, None), "once is for good"


def test_a_leader_whose_lease_another_one_has_stops() -> None:
    mine = election()
    mine.saw(None, 100.0)
    mine.wrote(lease("me"), 100.0)
    mine.saw(lease("other", "2"), 101.0)
    assert not mine.leads(101.0)
    assert mine.next(101.0) == (Step.STOP, None)


def test_its_own_write_that_nobody_answered_is_repeated() -> None:
    mine = election()
    mine.saw(None, 100.0)
    mine.failed(100.0)
    mine.saw(lease("me"), 100.2)
    assert mine.next(101.0) == (Step.TAKE, None)


def test_what_proves_that_a_holder_is_dead() -> None:
    held = lease(holder_name("pod-a", "1f"), acquired=100.7)
    assert pod_of(held.holder) == "pod-a"
    assert pod_of(holder_name("", "1f")) == ""
    assert is_dead(held, None)
    assert is_dead(held, MasterPod(over=True))
    assert not is_dead(held, MasterPod(over=False, started=90.0)), "the container that it runs in"
    assert not is_dead(held, MasterPod(over=False, started=100.0, finished=99.0)), "the one before has ended"
    assert is_dead(held, MasterPod(over=False, finished=105.0))
    assert is_dead(held, MasterPod(over=False, started=101.0, finished=100.0))
    assert not is_dead(held, MasterPod(over=False))


# Standbys


def standby() -> Election:
    """One that the lease lists, since 100."""
    mine = election()
    mine.saw(replace(lease("other"), standbys=frozenset({"me", "third"})), 100.0)
    return mine


def leading_for(*standbys: str) -> Election:
    """One whose lease lists those, since 110."""
    mine = election()
    mine.saw(None, 100.0)
    mine.wrote(lease("me"), 100.0)
    for name in standbys:
        mine.answered(name, 109.0, 109.5)
    mine.wrote(replace(lease("me", "2"), standbys=mine.writes(110.0)), 110.0)
    return mine


def test_a_listed_standby_takes_it_when_it_has_heard_nothing_for_a_while() -> None:
    mine = standby()
    assert mine.next(100.0) == (Step.WAIT, 100.0 + SILENCE)
    mine.heard("other", 103.0)
    assert mine.next(110.9) == (Step.WAIT, 103.0 + SILENCE)
    assert mine.next(111.0) == (Step.TAKE, None)


def test_calls_put_off_only_what_the_lease_has_promised() -> None:
    mine = standby()
    mine.heard("third", 103.0)
    assert mine.next(100.0 + SILENCE) == (Step.TAKE, None), "the holder wasn't heard"
    mine.heard("other", 107.0)
    assert mine.next(113.0) == (Step.TAKE, None), "it has run out, whoever calls"
    mine = election()
    mine.saw(lease("other"), 100.0)
    mine.heard("other", 101.0)
    assert mine.next(112.9) == (Step.WAIT, 113.0), "not listed"


def test_an_answer_that_comes_too_late_revives_nobody() -> None:
    """Whoever gives it may have begun to take the lease."""
    mine = leading_for("a")
    mine.answered("a", 117.5, 110.0 + SILENCE - MARGIN)
    assert mine.next(117.6) == (Step.STOP, None)


def test_who_comes_is_listed_and_who_doesnt_answer_is_struck_off() -> None:
    mine = election()
    mine.saw(None, 100.0)
    mine.wrote(lease("me"), 100.0)
    assert mine.answered("a", 100.5, 100.6)
    assert not mine.answered("a", 101.5, 101.6)
    assert mine.next(101.6) == (Step.WAIT, 100.0 + SPACING)
    assert mine.next(102.0) == (Step.RENEW, None)
    assert mine.writes(102.0) == {"a"}
    mine.wrote(replace(lease("me", "2"), standbys=frozenset({"a"})), 102.0)
    assert mine.until == 102.0 + SILENCE - MARGIN
    mine.answered("a", 107.5, 107.6)
    assert mine.until == 102.0 + SECONDS - MARGIN
    assert mine.next(108.0) == (Step.WAIT, 112.0)
    mine.left("a")
    assert mine.next(110.0) == (Step.RENEW, None)
    assert mine.writes(110.0) == frozenset()
    mine.wrote(lease("me", "3"), 110.0)
    assert mine.until == 110.0 + SECONDS - MARGIN, "it is owed nothing any more"
    assert mine.next(110.0) == (Step.WAIT, 120.0), "and once is enough"


def test_a_leader_that_misses_a_standby_and_cant_write_stops_before_that_begins() -> None:
    mine = leading_for("a", "b")
    mine.answered("a", 115.0, 115.1)
    mine.answered("b", 111.0, 111.1)
    mine.left("b")
    assert mine.next(113.0) == (Step.RENEW, None)
    mine.writes(113.0)
    mine.failed(117.0)
    assert mine.next(117.9)[0] is Step.RENEW
    assert mine.next(111.0 + SILENCE - MARGIN) == (Step.STOP, None)


def test_a_write_that_nobody_answered_may_have_listed_them() -> None:
    mine = leading_for()
    mine.answered("a", 112.0, 112.1)
    mine.writes(112.5)
    mine.failed(113.0)
    assert mine.until == 112.5 + SILENCE - MARGIN
    mine.answered("a", 114.0, 114.1)
    assert mine.until == 114.0 + SILENCE - MARGIN
