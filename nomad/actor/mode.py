"""Decides where a function runs, inline in the data loop or in a thread of its own, and how many calls at a time. Pure.

Handing a message to a thread and back costs two thread wake-ups, which is more than all the rest of a hop. A function
that has proven to be quick runs in the data loop; one that takes long, just once, goes back to the thread, and must
prove itself for twice as long the next time. Heart-beats don't depend on it: they have a loop of their own.
"""

from __future__ import annotations

from nomad.actor.outbox import BATCH_MESSAGES

QUICK = 0.0002
"""Seconds per call up to which a function counts as quick: a few hops' worth of network work, which would wait."""

SLOW = 0.005
"""Seconds per call from which a function has no place in the data loop."""

PROOF = 32
"""Quick calls in a row before a function runs inline."""

MOST_PROOF = 1 << 16

INLINE_SPAN = 0.002
"""Seconds of inline calls after which the loop gets its turn."""

THREAD_SPAN = 0.01
"""Seconds of calls that are handed to the thread at a time."""


class Mode:
    """`inline` says where the next calls go; `observe` learns from how long the last ones took."""

    def __init__(self, *, allowed: bool):
        self.inline = False
        self.service_time: float | None = None
        """Smoothed seconds per call."""
        self.chunk = 1
        """Messages whose calls take about as long as may go by before others get their turn; 1 until that is known."""
        self._allowed = allowed
        self._wanted = PROOF
        self._quick = 0

    def observe(self, calls: int, seconds: float) -> None:
        """`calls` calls took `seconds` together."""
        each = seconds / calls
        if self.service_time is None:
            self.service_time = each
        else:
            weight = min(0.5, 0.05 * calls)
            self.service_time += weight * (each - self.service_time)
        span = INLINE_SPAN if self.inline else THREAD_SPAN
        quick = self.service_time * BATCH_MESSAGES <= span
        self.chunk = BATCH_MESSAGES if quick else int(span / self.service_time) or 1
        if not self._allowed:
            return
        if each >= SLOW:
            if self.inline or self._quick:
                self._wanted = min(MOST_PROOF, self._wanted * 2)
            self.inline, self._quick = False, 0
        elif each <= QUICK:
            self._quick += calls
            self.inline = self.inline or self._quick >= self._wanted
        elif not self.inline:
            self._quick = 0
