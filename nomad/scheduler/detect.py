"""Detectors of change: one `Track` for each measured quantity, fed with its raw samples. Pure; time is passed in.

`drift` reads three things off a track: whether it changed lately, what level to count on, and how sure that is. The
level depends on what the quantity does:

    calm       the mean since its last change, over at most `WINDOW` samples; its error shrinks with their number
    moving     within `MOVING` seconds of a change: the mean of the last `RECENT` samples, all of them after the change
    restless   it swung up and down within `RESTLESS` seconds: the mean over about that time, with its spread as error

What is moving, and isn't further from that long mean than `NEWS` times its spread, counts as if restless.

A change is found by CUSUM, both ways: how far samples are from the level, in deviations and less `ALLOWANCE`, is added
up, never below 0; above `THRESHOLD` it is a change.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

WINDOW = 60
"""Samples, half a minute of heart-beats or more: long enough that noise of 30 % leaves an error of a few per cent."""
ALLOWANCE = 1.0
"""Deviations. Changes of less than one aren't looked for; at 1, noise adds up to the threshold once in years."""
THRESHOLD = 7.5
"""Deviations: two samples beyond `CLIP` in a row reach it, one alone doesn't, however far it is off."""
RECENT = 3
"""Samples: on a ramp the mean of so many is one sample behind, and has little more than half the noise of one."""
SWING = 4.0
"""Deviations from which on a movement counts as one half of restlessness, though not as a change."""
CLIP = 5.0
"""Deviations that one sample counts at most."""
LEARNING = 4
"""Differences of samples before changes are looked for: of fewer the deviation isn't known."""
SMOOTHED = 30
"""Differences that the deviation is the mean of, about."""
MOVING = 10.0
"""Seconds. A ramp brings the next change within that time, and a step has settled."""
RESTLESS = 60.0
"""Seconds: what goes up and comes down within a minute isn't worth following, since a move pays over minutes."""
CALM = 1.25
"""What was restless is calm again when its spread is at most this many times its noise. Noise alone has 0.8."""
NEWS = 3.0
"""Spreads, mean absolute deviations: a wave, of whatever form, stays within 2 of them."""
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

MOST_OF_NODES = 30_000
"""Tracks of nodes and links that are kept. Where there are more, on clusters of hundreds of nodes, those are forgotten
of which nothing came within `RESTLESS` seconds: such links are measured now and then, by chance.
"""

OF_NODES = ("latency", "bandwidth", "speed")
"""Kinds whose keys are nodes; those of all others are a pipeline and an operator."""


@dataclass(frozen=True, slots=True)
class Level:
    """What to count on."""

    value: float
    error: float
    """By how much it may be off: a standard deviation."""
    state: str
    """"calm", "moving" or "restless"."""


class Track:
    """One quantity."""

    __slots__ = (
        "_differences",
        "_down",
        "_floor",
        "_found_at",
        "_last_swing",
        "_long",
        "_long_at",
        "_recent",
        "_restless",
        "_samples",
        "_seen",
        "_spread",
        "_swung_at",
        "_up",
        "changed_at",
        "deviation",
        "direction",
        "mean",
        "was",
    )

    def __init__(self, floor: float) -> None:
        """`floor`: the least deviation, in the quantity's unit."""
        self._floor = floor
        self.mean = 0.0
        """Since the last change."""
        self.was = 0.0
        """The mean before the last change."""
        self.deviation = 0.0
        """Of the noise: what neighbouring samples differ by, also on a ramp."""
        self.changed_at = -math.inf
        """When the last change was found that wasn't restlessness."""
        self.direction = 0
        """Of the last change: 1 up, -1 down, 0 there was none."""
        self._found_at = self._swung_at = -math.inf
        self._restless = False
        self._up = self._down = 0.0
        self._last_swing = (0, -math.inf, 0.0)  # direction, time and value
        self._samples = 0  # since the last change, at most WINDOW
        self._differences = 0  # at most SMOOTHED
        self._recent: list[float] = []  # a deque takes five times the memory, and there are many tracks
        self._long = self._spread = 0.0  # mean and mean absolute deviation over about RESTLESS seconds, come what may
        self._long_at: float | None = None
        self._seen = 0

    @property
    def value(self) -> float:
        """The newest sample."""
        return self._recent[-1]

    @property
    def fed_at(self) -> float:
        """When that was taken."""
        return self._long_at if self._long_at is not None else -math.inf

    def feed(self, value: float, now: float) -> None:
        """Take in a sample."""
        mean, recent = self.mean, self._recent
        scale = max(self.deviation, self._floor, RELATIVE_FLOOR * abs(mean))
        most = CLIP * scale
        off = value - mean
        clipped = off if -most <= off <= most else math.copysign(most, off)
        known = self._differences >= LEARNING
        if self._samples < WINDOW:
            self._samples += 1
        self.mean = mean + (clipped if known else off) / self._samples
        if recent:
            # 0.886 of their mean difference is one standard deviation
            differs = min(0.886 * abs(value - recent[-1]), most)
            if self._differences < SMOOTHED:
                self._differences += 1
            self.deviation += (differs - self.deviation) / self._differences
        if len(recent) == RECENT:
            del recent[0]
        recent.append(value)
        self._feed_long(value, now)
        if self._restless and now >= self._swung_at + RESTLESS and self._spread <= CALM * scale:
            self._restless = False
        if not known:
            return
        before = max(self._up, self._down)
        off = clipped / scale
        up, down = self._up + off - ALLOWANCE, self._down - off - ALLOWANCE
        self._up = up if up > 0.0 else 0.0
        self._down = down if down > 0.0 else 0.0
        most, direction = (up, 1) if up >= down else (down, -1)
        if before < SWING <= most:
            self._swing(direction, now)
        if most >= THRESHOLD:
            self._change(direction, now)

    def level(self, now: float) -> Level:
        """What to count on now."""
        if not self._restless and now >= self._found_at + MOVING:
            return Level(self.mean, self.deviation / math.sqrt(self._samples), "calm")
        if self._is_news:
            return Level(statistics.fmean(self._recent), self.deviation / math.sqrt(len(self._recent)), "moving")
        return Level(self._long, self._spread, "restless" if self._restless else "moving")

    @property
    def _is_news(self) -> bool:
        """Whether it is where it hasn't been for the last minute, coming and going."""
        return abs(statistics.fmean(self._recent) - self._long) > NEWS * self._spread

    def _swing(self, direction: int, now: float) -> None:
        """What might become a change. Two of them, up and down, are restlessness."""
        last, at, value = self._last_swing
        wide = min(direction * (self.value - self._long), -direction * (value - self._long))
        if last == -direction and now < at + RESTLESS and wide > self.deviation:
            self._restless, self._swung_at = True, now
            self._spread = max(self._spread, wide)
        self._last_swing = direction, now, self.value

    def _change(self, direction: int, now: float) -> None:
        self.direction, self._found_at, self.was = direction, now, self.mean
        self._up = self._down = 0.0
        del self._recent[:-2]  # two are enough for a change, so the last two are after it
        self.mean, self._samples = statistics.fmean(self._recent), len(self._recent)
        if not self._restless or self._is_news:
            self.changed_at = now

    def _feed_long(self, value: float, now: float) -> None:
        self._seen += 1
        if self._long_at is None:
            self._long = value
        else:
            weight = max(1 / self._seen, 1 - math.exp(-max(0.0, now - self._long_at) / RESTLESS))
            self._spread += weight * (abs(value - self._long) - self._spread)
            self._long += weight * (value - self._long)
        self._long_at = now


class Tracks:
    """All quantities that are tracked, by kind and by what they are of."""

    def __init__(self) -> None:
        self._tracks: dict[tuple[str, tuple[str, ...]], Track] = {}
        self._lately: dict[tuple[str, tuple[str, ...]], Track] = {}
        """Those that have changed since the time that was asked for last."""
        self._of_nodes, self._room = 0, MOST_OF_NODES

    def feed(self, samples: Iterable[tuple[str, tuple[str, ...], float, float]]) -> set[tuple[str, tuple[str, ...]]]:
        """Take in (kind, key, value, time); what has changed by that."""
        changed = set()
        for kind, key, value, time in samples:
            floor = FLOORS.get(kind)
            if floor is None:
                continue
            track = self._tracks.get((kind, key))
            if track is None:
                if kind in OF_NODES:
                    self._make_room(time)
                track = self._tracks[kind, key] = Track(floor)
            before = track.changed_at
            track.feed(value, time)
            if track.changed_at != before:
                self._lately[kind, key] = track
                changed.add((kind, key))
        return changed

    def level(self, kind: str, key: tuple[str, ...], now: float) -> Level | None:
        """What to count on now; None for what was never measured."""
        track = self._tracks.get((kind, key))
        return track.level(now) if track is not None else None

    def changed(self, since: float) -> list[tuple[str, tuple[str, ...], Track]]:
        """What changed after this time; of what was before one that was asked for earlier, nothing is known."""
        for name in [name for name, track in self._lately.items() if track.changed_at <= since]:
            del self._lately[name]
        return [(*name, track) for name, track in self._lately.items()]

    def forget(self, pipeline: str) -> None:
        """It was removed."""
        for tracks in (self._tracks, self._lately):
            for kind, key in [name for name in tracks if name[0] not in OF_NODES and name[1][0] == pipeline]:
                del tracks[kind, key]

    def _make_room(self, now: float) -> None:
        """For another one of nodes."""
        self._of_nodes += 1
        if self._of_nodes > self._room:
            for tracks in (self._tracks, self._lately):
                for name in [n for n, t in tracks.items() if n[0] in OF_NODES and t.fed_at < now - RESTLESS]:
                    del tracks[name]
            self._of_nodes = 1 + sum(name[0] in OF_NODES for name in self._tracks)
            self._room = max(MOST_OF_NODES, self._of_nodes * 5 // 4)  # else the next one would go through all again
