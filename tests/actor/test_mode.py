from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nomad.actor.mode import MOST_PROOF, PROOF, QUICK, SLOW, Mode

BETWEEN = (QUICK + SLOW) / 2


def observe(mode: Mode, calls: int, each: float) -> None:
    mode.observe(calls, calls * each)


def test_a_quick_function_runs_inline_once_it_has_proven_itself() -> None:
    mode = Mode(allowed=True)
    assert not mode.inline
    for _ in range(PROOF - 1):
        observe(mode, 1, QUICK / 2)
        assert not mode.inline
    observe(mode, 1, QUICK / 2)
    assert mode.inline


def test_calls_made_together_count_each() -> None:
    mode = Mode(allowed=True)
    observe(mode, PROOF, QUICK / 2)
    assert mode.inline


@pytest.mark.parametrize("each", [BETWEEN, SLOW])
def test_one_call_that_is_not_quick_begins_the_proof_anew(each: float) -> None:
    mode = Mode(allowed=True)
    observe(mode, PROOF - 1, QUICK / 2)
    observe(mode, 1, each)
    observe(mode, PROOF - 1, QUICK / 2)
    assert not mode.inline


def test_a_slow_call_sends_it_back_to_the_thread_for_twice_as_long() -> None:
    mode = Mode(allowed=True)
    observe(mode, PROOF, QUICK / 2)
    observe(mode, 1, SLOW)
    assert not mode.inline
    observe(mode, 2 * PROOF - 1, QUICK / 2)
    assert not mode.inline
    observe(mode, 1, QUICK / 2)
    assert mode.inline


def test_a_call_that_is_neither_quick_nor_slow_stays_where_it_is() -> None:
    mode = Mode(allowed=True)
    observe(mode, PROOF, QUICK / 2)
    observe(mode, 1, BETWEEN)
    assert mode.inline


def test_what_must_not_run_inline_never_does() -> None:
    mode = Mode(allowed=False)
    observe(mode, 100 * PROOF, QUICK / 2)
    assert not mode.inline
    assert mode.service_time == pytest.approx(QUICK / 2)


def test_the_proof_has_an_end() -> None:
    mode = Mode(allowed=True)
    for _ in range(100):
        observe(mode, MOST_PROOF, QUICK / 2)
        assert mode.inline
        observe(mode, 1, SLOW)


@given(st.lists(st.tuples(st.integers(1, 1000), st.floats(1e-7, 10)), min_size=1))
def test_the_service_time_is_between_the_extremes(observed: list[tuple[int, float]]) -> None:
    mode = Mode(allowed=True)
    assert mode.service_time is None
    for calls, each in observed:
        observe(mode, calls, each)
    times = [each for _, each in observed]
    assert mode.service_time is not None
    assert min(times) * 0.999 <= mode.service_time <= max(times) * 1.001
