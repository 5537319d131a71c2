"""How fast a core is."""

from __future__ import annotations

import asyncio

import pytest

from nomad.clock import SystemClock
from nomad.measure import calibrate
from tests.clock import VirtualClock


def test_a_core_that_takes_twice_as_long_is_half_as_fast() -> None:
    reference = {name: [seconds] * 3 for name, (_, seconds) in calibrate.PIECES.items()}
    assert calibrate.speed_of(reference) == pytest.approx(1.0)
    assert calibrate.speed_of({k: [2 * t for t in v] for k, v in reference.items()}) == pytest.approx(0.5)


def test_one_slow_round_does_no_harm() -> None:
    assert calibrate.speed_of({"floats": [0.88e-3, 0.88e-3, 1.0]}) == pytest.approx(1.0)


async def test_this_machine_has_a_speed() -> None:
    assert 0.01 < await calibrate.calibrate(SystemClock(), rounds=3) < 100
    assert 0.01 < calibrate.calibrate_now(rounds=3) < 100


async def test_the_loop_has_its_turn_between_the_pieces() -> None:
    clock = VirtualClock()
    task = asyncio.create_task(calibrate.calibrate(clock, rounds=2))
    await clock.advance(calibrate.PAUSE * 2 * len(calibrate.pieces()) + 0.001)
    assert await task > 0
