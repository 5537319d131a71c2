"""Detectors of change: what they find, how soon, and what level they say to count on."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from nomad.scheduler import detect
from nomad.scheduler.detect import FLOORS, MOVING, Track, Tracks


def fed(values: list[float], floor: float = 0.0005, every: float = 1.0) -> Track:
    track = Track(floor)
    for number, value in enumerate(values):
        track.feed(value, number * every)
    return track


@pytest.mark.parametrize("seed", range(10))
def test_noise_is_no_change_and_its_mean_is_learnt(seed: int) -> None:
    rng = random.Random(seed)
    track = fed([0.02 * (1 + 0.3 * rng.uniform(-1, 1)) for _ in range(3600)])
    assert track.changed_at == -math.inf
    level = track.level(3600.0)
    assert level.state == "calm"
    assert level.value == pytest.approx(0.02, abs=4 * level.error)
    assert level.error < 0.001


@pytest.mark.parametrize("factor", [0.1, 3, 20])
def test_a_step_is_found_with_its_second_sample(factor: float) -> None:
    rng = random.Random(1)
    before = [0.02 * (1 + 0.1 * rng.uniform(-1, 1)) for _ in range(60)]
    after = [0.02 * factor * (1 + 0.1 * rng.uniform(-1, 1)) for _ in range(2)]
    track = fed(before + after)
    assert track.changed_at == 61.0
    level = track.level(61.0)
    assert level.state == "moving"
    assert level.value == pytest.approx(0.02 * factor, rel=0.1)
    assert track.was == pytest.approx(0.02, rel=0.1)


def test_one_outlier_is_no_step() -> None:
    track = fed([0.02] * 30 + [5.0] + [0.02] * 30)
    assert track.changed_at == -math.inf


def test_what_has_moved_becomes_calm_where_it_is() -> None:
    track = fed([0.02] * 30 + [0.06] * 30)
    assert track.level(30.0 + MOVING / 2).state == "moving"
    level = track.level(30.0 + 2 * MOVING)
    assert (level.state, level.value) == ("calm", pytest.approx(0.06))


@pytest.mark.parametrize("period", [6, 10, 30])
def test_what_swings_is_counted_on_at_its_mean(period: float) -> None:
    values = [0.05 + 0.02 * math.sin(2 * math.pi * at / period) for at in range(300)]
    level = fed([0.05] * 60 + values).level(360.0)
    assert level.state == ("restless" if period > 6 else "calm")  # what is quicker looks like noise
    assert level.value == pytest.approx(0.05, abs=0.005)


def test_what_was_restless_can_step_and_become_calm() -> None:
    swings = [0.05 + 0.02 * (1 if at % 10 < 5 else -1) for at in range(120)]
    away = fed(swings + [0.3] * 3)
    assert away.level(123.0).value == pytest.approx(0.3)
    calm = fed(swings + [0.05] * 600)
    assert (calm.level(720.0).state, calm.level(720.0).value) == ("calm", pytest.approx(0.05))


def names(tracks: Tracks) -> list[tuple[str, tuple[str, ...]]]:
    """Of all that something is known of."""
    assert all(tracks.level(*name, 1.0) for name in tracks._tracks)
    return list(tracks._tracks)


def test_tracks_know_their_kinds_and_forget() -> None:
    tracks = Tracks()
    samples = [("latency", ("a", "b"), 0.01, 1.0), ("work", ("p", "x"), 0.1, 1.0), ("busy", ("p", "x"), 0.5, 1.0)]
    tracks.feed(samples)
    assert names(tracks) == [("latency", ("a", "b")), ("work", ("p", "x"))]
    assert "busy" not in FLOORS
    tracks.feed([("latency", ("a", "b"), value, at) for at, value in enumerate([0.01] * 10 + [0.1] * 2)])
    assert [(kind, key) for kind, key, _ in tracks.changed(5.0)] == [("latency", ("a", "b"))]
    assert tracks.changed(20.0) == []
    tracks.forget("p")
    assert names(tracks) == [("latency", ("a", "b"))]


def test_a_pipeline_may_be_called_as_a_node_or_another_ones_operator() -> None:
    tracks = Tracks()
    kept = [("latency", ("a", "p")), ("speed", ("p",)), ("work", ("q", "p"))]
    tracks.feed([(kind, key, 0.01, 1.0) for kind, key in [*kept, ("work", ("p", "x"))]])
    tracks.forget("p")
    assert names(tracks) == kept


def test_where_none_can_go_not_every_new_one_is_a_reason_to_look_through_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "MOST_OF_NODES", 100)
    looks = 0

    class Counted(dict[tuple[str, tuple[str, ...]], Track]):
        def items(self) -> Any:
            nonlocal looks
            looks += 1
            return super().items()

    tracks = Tracks()
    tracks._tracks = Counted()
    for number in range(1000):
        tracks.feed([("latency", ("a", f"n{number}"), 1.0, 1.0)])
    assert tracks.level("latency", ("a", "n0"), 1.0) is not None
    assert 1 <= looks <= 12, "a fifth more each time"


def test_of_links_that_are_measured_by_chance_only_the_latest_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "MOST_OF_NODES", 100)
    tracks = Tracks()
    for number in range(1000):
        tracks.feed(
            [("work", ("p", f"o{number}"), 1.0, float(number)), ("latency", ("a", f"n{number}"), 1.0, float(number))]
        )
        tracks.feed([("latency", ("a", "used"), 1.0, float(number))])
    assert tracks.level("latency", ("a", "used"), 1000.0) is not None
    assert tracks.level("latency", ("a", "n999"), 1000.0) is not None
    assert tracks.level("latency", ("a", "n0"), 1000.0) is None
    assert tracks.level("work", ("p", "o0"), 1000.0) is not None, "what pipelines do is kept as long as they are there"
    assert sum(kind == "latency" for kind, _ in names(tracks)) <= 100
