"""Detectors of change: one `Track` for each measured quantity, fed with its raw samples. Pure; time is passed in.

`drift` reads three things off a track: whether it changed lately, what level to count on, and how sure that is. The
level depends on what the quantity does:

    calm       the mean since its last change, over at most `WINDOW` samples; its error shrinks with their number
    moving     within `MOVING` seconds of a change: the newest estimate of `nomad.measure`, which follows steps at once
    restless   it changed up and down within `RESTLESS` seconds: the mean over that time, and its spread as the error

A change is found by CUSUM, both ways: how far samples are from the level, in deviations and less `ALLOWANCE`, is added
up, never below 0; above `THRESHOLD` it is a change.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

WINDOW = 60
"""Samples, a minute of heart-beats: long enough that noise of 30 % leaves an error of a few per cent."""
ALLOWANCE = 1.0
"""Deviations. Changes of less than one aren't looked for; at 1, noise adds up to the threshold once in years."""
THRESHOLD = 7.5
"""Deviations: two samples beyond `CLIP` in a row reach it, one alone doesn't, however far it is off."""
CLIP = 5.0
"""Deviations that one sample counts at most."""
LEARNING = 5
"""Samples before changes are looked for: of fewer the deviation isn't known."""
MOVING = 10.0
"""Seconds. A ramp brings the next change within that time, and a step has settled."""
RESTLESS = 60.0
"""Seconds: what goes up and comes down within a minute isn't worth following, since a move pays over minutes."""
RELATIVE_FLOOR = 0.1
"""Least deviation, of the level: smaller changes would move nothing, as a move must gain more than they can."""

FLOORS = {
    "latency": 0.0005,
    "bandwidth": 1e4,
    "work": 2e-5,
    "departure": 0.5,
    "speed": 0.02,
    "queue": 16.0,
    "output_bytes": 64.0,
    "selectivity": 0.02,
}
"""The kinds that are tracked, and the least deviation of each in its own unit."""


@dataclass(frozen=True, slots=True)
class Level:
    """What to count on."""

    value: float | None
    """None: the estimate as it is."""
    error: float
    """By how much the value may be off; 0 where it is None, and the estimate's own deviation says so."""
    state: str
    """"calm", "moving" or "restless"."""


class Track:
    """One quantity."""

    __slots__ = ("_down", "_floor", "_seen", "_slow", "_slow_at", "_spread", "_up", "changed_at", "deviation")
    __slots__ += ("direction", "mean", "restless_until", "samples", "value")

    def __init__(self, floor: float) -> None:
        """`floor`: the least deviation, in the quantity's unit."""
        self._floor = floor
        self.samples = 0
        """Since the last change, at most `WINDOW`."""
        self.value = 0.0
        """The newest sample."""
        self.mean = 0.0
        self.deviation = 0.0
        self.changed_at = -math.inf
        self.direction = 0
        """Of the last change: 1 up, -1 down, 0 there was none."""
        self.restless_until = -math.inf
        self._up = self._down = 0.0
        self._slow = self._spread = 0.0
        self._slow_at: float | None = None
        self._seen = 0

    def feed(self, value: float, now: float) -> bool:
        """Take in a sample; whether it shows a change."""
        before, self.value = self.value, value
        self._feed_slow(value, now)
        self.samples = min(self.samples + 1, WINDOW)
        restless = now < self.restless_until
        scale = max(self.deviation, self._floor, RELATIVE_FLOOR * abs(self.mean), self._spread if restless else 0.0)
        off = value - (self._slow if restless else self.mean)
        if self.samples == 1:
            self.mean = value
        else:
            weight = max(1 / WINDOW, 1 / self.samples)
            self.mean += weight * (value - self.mean)
            # 1.25 mean absolute deviations are one standard deviation, more or less
            self.deviation += max(1 / 16, 1 / self.samples) * (1.25 * min(abs(off), CLIP * scale) - self.deviation)
        if self.samples < LEARNING and self.direction == 0:
            return False
        off = min(CLIP, max(-CLIP, off / scale))
        self._up = max(0.0, self._up + off - ALLOWANCE)
        self._down = max(0.0, self._down - off - ALLOWANCE)
        if max(self._up, self._down) < THRESHOLD:
            return False
        self._change(1 if self._up > self._down else -1, before, now)
        return True

    def level(self, now: float) -> Level:
        """What to count on now."""
        if now < self.restless_until:
            return Level(self._slow, self._spread, "restless")
        if now < self.changed_at + MOVING or self.samples < LEARNING:
            return Level(None, 0.0, "moving")
        return Level(self.mean, self.deviation / math.sqrt(self.samples), "calm")

    def _change(self, direction: int, before: float, now: float) -> None:
        if self.direction == -direction and now < self.changed_at + RESTLESS:
            self.restless_until = now + RESTLESS
            self._spread = max(self._spread, abs(self.value - self.mean) / 2)
        self.direction, self.changed_at = direction, now
        self._up = self._down = 0.0
        self.mean, self.samples = (before + self.value) / 2, 2

    def _feed_slow(self, value: float, now: float) -> None:
        """The mean and the mean absolute deviation over about `RESTLESS` seconds, whatever changes there were."""
        self._seen += 1
        if self._slow_at is None:
            self._slow = value
        else:
            weight = max(1 / self._seen, 1 - math.exp(-max(0.0, now - self._slow_at) / RESTLESS))
            self._spread += weight * (abs(value - self._slow) - self._spread)
            self._slow += weight * (value - self._slow)
        self._slow_at = now


class Tracks:
    """All quantities that are tracked, by kind and by what they are of."""

    def __init__(self) -> None:
        self._tracks: dict[tuple[str, tuple[str, ...]], Track] = {}

    def feed(self, samples: Iterable[tuple[str, tuple[str, ...], float, float]]) -> list[tuple[str, tuple[str, ...]]]:
        """Take in (kind, key, value, time); what changed."""
        changed = []
        for kind, key, value, time in samples:
            floor = FLOORS.get(kind)
            if floor is None:
                continue
            track = self._tracks.get((kind, key))
            if track is None:
                track = self._tracks[kind, key] = Track(floor)
            if track.feed(value, time):
                changed.append((kind, key))
        return changed

    def level(self, kind: str, key: tuple[str, ...], now: float) -> Level | None:
        """What to count on; None where nothing was measured."""
        track = self._tracks.get((kind, key))
        return track.level(now) if track is not None else None

    def changed(self, since: float) -> list[tuple[str, tuple[str, ...]]]:
        """What changed after this time."""
        return [name for name, track in self._tracks.items() if track.changed_at > since]

    def forget(self, key_of: str) -> None:
        """A pipeline was removed, or a node has left."""
        self._tracks = {name: track for name, track in self._tracks.items() if key_of not in name[1]}
