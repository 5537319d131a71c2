"""What an actor counts and samples; heart-beats read it from another thread.

Cheap: called per chunk, not per message.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from nomad.control import PodStats
from nomad.errors import describe

SAMPLES = 8192
"""Latencies that are kept, one for each chunk."""

RECENT = 512
"""Of which so many make the percentiles."""

STRETCH_LEAST = 0.001
"""Seconds of emulated slowness that are saved up before a sleep: timers aren't finer."""


class Meter:
    """Counters of one process of one operator. `speed` is that of the emulated node, 1.0 or more is full speed."""

    def __init__(self, speed: float = 1.0):
        self.stats = PodStats()
        self.paused = False
        self.last: Any = None
        """The newest output, None before the first."""
        self.last_error: dict[str, str] | None = None
        """The newest failure of a message."""
        self.tap: Callable[[list[Any]], None] | None = None
        """Gets every list of outputs while somebody looks on; must not block."""
        self.set_speed(speed)
        self.disorder = 0
        """Calls for a message at or before the position of the one before it in its lane."""
        self._samples: deque[tuple[float, float]] = deque(maxlen=SAMPLES)
        """When a chunk was done, and the latency of its first message."""
        self._debt = 0.0
        self.busy = 0.0
        """Seconds that the function has run, stretched as on the emulated node."""
        self._busy_since = (time.monotonic(), 0.0)

    def set_speed(self, speed: float) -> None:
        """The emulated node became faster or slower."""
        self.slowdown = max(1.0, 1.0 / speed)

    def called(self, calls: int, seconds: float) -> None:
        """`calls` messages were worked off in `seconds`."""
        self.stats.processed += calls
        self.busy += seconds * self.slowdown

    def emitted(self, values: list[Any]) -> None:
        """These values were returned."""
        if not values:
            return
        self.stats.emitted += len(values)
        self.last = values[-1]
        if self.tap is not None:
            self.tap(values)

    def one(self, seconds: float, birth: int, value: Any) -> None:
        """`called`, `emitted` and `worked` for one message, of which came `value`."""
        stats = self.stats
        stats.processed += 1
        self.busy += seconds * self.slowdown
        if value is not None:
            stats.emitted += 1
            self.last = value
            if self.tap is not None:
                self.tap([value])
        if birth:
            now = time.time_ns()
            self._samples.append((now / 1e9, (now - birth) / 1e9 if now > birth else 0.0))

    def failed(self, error: BaseException, *, retried: bool) -> None:
        """A call raised."""
        self.stats.failed += 1
        self.stats.retried += retried
        self.last_error = describe(error)

    def set_aside(self, count: int) -> None:
        """So many messages are set aside now."""
        self.stats.set_aside = count

    def worked(self, birth: int) -> None:
        """A chunk is done whose first message was born at `birth` (nanoseconds since the epoch)."""
        if birth:
            now = time.time_ns()
            self._samples.append((now / 1e9, (now - birth) / 1e9 if now > birth else 0.0))

    def stretch(self, seconds: float) -> float:
        """Seconds to sleep now, so that `seconds` of work have taken as long as on the emulated node."""
        self._debt += seconds * (self.slowdown - 1.0)
        if self._debt < STRETCH_LEAST:
            return 0.0
        debt, self._debt = self._debt, 0.0
        return debt

    def latencies(self) -> tuple[float | None, float | None]:
        """Median and 99th percentile of the recent latencies, in seconds."""
        samples = sorted([latency for _, latency in list(self._samples)[-RECENT:]])
        if not samples:
            return None, None
        return samples[len(samples) // 2], samples[min(len(samples) - 1, int(len(samples) * 0.99))]

    def samples(self, after: float) -> list[tuple[float, float]]:
        """When chunks were done, in seconds since the epoch, later than `after`, and the latencies of their firsts."""
        return [sample for sample in list(self._samples) if sample[0] > after]

    def busy_share(self) -> float | None:
        """Share of the time since the last call of this method that the function ran."""
        now = time.monotonic()
        since, before = self._busy_since
        self._busy_since = (now, self.busy)
        return min(1.0, (self.busy - before) / (now - since)) if now > since else None
