"""The one file that smooths: bounds, seeding, convergence."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nomad.measure.estimate import SETTLED_SAMPLES, Estimate, prior, smooth

VALUES = st.floats(min_value=0, max_value=1e12, allow_subnormal=False)


def follow(samples: list[float], known: Estimate | None = None) -> Estimate:
    for second, sample in enumerate(samples):
        known = smooth(known, sample, float(second))
    assert known is not None
    return known


@given(st.lists(VALUES, min_size=1, max_size=50))
def test_it_stays_among_its_samples(samples: list[float]) -> None:
    known = follow(samples)
    slack = 1e-9 * max(samples)
    assert min(samples) - slack <= known.value <= max(samples) + slack
    assert math.isfinite(known.value)
    assert math.isfinite(known.deviation)
    assert 0 <= known.deviation <= max(max(samples) - min(samples), samples[0] / 2) + slack
    assert known.samples == len(samples)
    assert known.updated == len(samples) - 1


@given(VALUES)
def test_the_first_sample_seeds_it(value: float) -> None:
    known = smooth(None, value, 7.0)
    assert (known.value, known.deviation, known.updated, known.samples) == (value, value / 2, 7.0, 1)
    assert known.measured


@given(st.floats(0.001, 1000), st.floats(1.5, 1000), st.integers(8, 60))
def test_a_step_is_followed_with_its_second_sample(before: float, factor: float, quiet: int) -> None:
    known = follow([before] * quiet)
    for after in (before * factor, before / factor):
        stepped = follow([after] * 2, known)
        assert stepped.value == pytest.approx(after, rel=0.01)


def test_a_step_in_noise_is_followed_within_three_samples() -> None:
    known = follow([5.0, 5.4, 4.8, 5.1, 4.7, 5.3, 5.0, 4.9, 5.2])
    assert follow([99.0, 101.0, 98.0], known).value == pytest.approx(100, rel=0.1)


def test_one_outlier_does_no_harm() -> None:
    known = follow([5.0, 5.4, 4.8, 5.1, 4.7, 5.3, 5.0, 4.9, 5.2])
    assert follow([500.0], known).value == pytest.approx(known.value, abs=known.deviation)
    assert follow([500.0, 5.0, 0.1, 5.0], known).value == pytest.approx(5.0, abs=2 * known.deviation)


@given(st.floats(0.001, 1000), st.floats(0.001, 1000))
def test_a_prior_counts_as_one_sample(said: float, sample: float) -> None:
    known = prior(said, 0.0)
    assert not known.measured
    assert not known.settled
    first = smooth(known, sample, 1.0)
    assert first.value == pytest.approx((said + sample) / 2)
    assert first.samples == 1
    assert first.measured
    many = follow([sample] * 40, known)
    assert many.value == pytest.approx(sample, rel=0.01, abs=0.01 * abs(said - sample))


def test_it_is_settled_when_there_are_enough_samples_close_together() -> None:
    assert not follow([5.0] * (SETTLED_SAMPLES - 1)).settled
    assert follow([5.0] * SETTLED_SAMPLES).settled
    assert not follow([5.0, 1.0, 9.0, 2.0, 8.0, 5.0, 1.0, 9.0]).settled


def test_age() -> None:
    assert smooth(None, 1.0, 10.0).age(12.5) == 2.5
    assert smooth(None, 1.0, 10.0).age(9.0) == 0.0
