from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nomad import units


@pytest.mark.parametrize(
    ("text", "mb"),
    [(64, 64), ("64", 64), ("256Mi", 256), ("2Gi", 2048), ("2GiB", 2048), ("1 gib", 1024), ("1MB", 1e6 / 2**20)],
)
def test_memory(text: object, mb: float) -> None:
    assert units.memory_mb(text) == pytest.approx(mb)


@pytest.mark.parametrize(
    ("text", "seconds"), [(0.02, 0.02), ("20ms", 0.02), ("1.5s", 1.5), ("2m", 120), ("5e-3", 0.005)]
)
def test_seconds(text: object, seconds: float) -> None:
    assert units.seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("text", "rate"),
    [(1000, 1000), ("100Mbit", 12.5e6), ("1Gbit/s", 125e6), ("8kbps", 1000), ("12MB/s", 12e6), ("1MiB/s", 2**20)],
)
def test_bytes_per_second(text: object, rate: float) -> None:
    assert units.bytes_per_second(text) == pytest.approx(rate)


@pytest.mark.parametrize("parse", [units.memory_mb, units.seconds, units.bytes_per_second])
@pytest.mark.parametrize(
    "bad", ["", "abc", "1.2.3", "3 lightyears", None, True, [], float("nan"), float("inf"), "1e999"]
)
def test_anything_else_is_refused_with_an_example(parse, bad: object) -> None:
    with pytest.raises(ValueError, match="must be a number of .* or like"):
        parse(bad)


@given(st.text())
def test_any_text_is_a_finite_number_or_a_value_error(text: str) -> None:
    try:
        value = units.seconds(text)
    except ValueError:
        return
    assert math.isfinite(value)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0 ms"),
        (0.00005, "0.05 ms"),
        (1.38912, "1389 ms"),
        (9.9999, "10 s"),
        (32.8571, "32.86 s"),
        (12345.6, "12346 s"),
    ],
)
def test_seconds_are_shown_without_exponents(seconds: float, shown: str) -> None:
    assert units.milliseconds(seconds) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (0.01234, "0.0123"),
        (12.34, "12.3"),
        (999.4, "999"),
        (999.6, "1000"),
        (2588.3, "2588"),
        (3e6, "3000000"),
    ],
)
def test_numbers_are_shown_without_exponents(value: float, shown: str) -> None:
    assert units.number(value) == shown


def test_fewer_digits() -> None:
    assert [units.number(value, 2) for value in (0.853, 3.46, 128.4)] == ["0.85", "3.5", "128"]
