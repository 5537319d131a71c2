"""An estimate, and how a sample changes it. Pure: the one file of Nomad in which measurements are smoothed.

Called by `book` with samples that stand for a stretch of time already (the mean of all calls, or the least round trip,
since the heart-beat before). Knows nothing of what is estimated, and no clock: time is passed in.

The rules, in full:

- The first sample is the value; its half is the deviation (as RFC 6298 does it for round trips).
- A later one moves the value by a share of its error: 1/2, 1/3, then always `GAIN`; and the deviation, the
  smoothed absolute error, by `GAIN` of what it differs.
- A sample that is off by more than `SURPRISE` deviations counts as if it were off by just that: one outlier does no
  harm. If the next one is off to the same side, by half as much at the least, it was no outlier but a step: the value
  becomes the mean of these two. So a step is followed with its second sample, whatever its size.
- A prior (what somebody declared or profiled) has no samples, and counts as one when the first comes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

GAIN = 0.25
"""Weight of a new sample: at two a second, one of two seconds ago counts a third; at one in 8 s, of half a minute."""

FEW = 3
"""Of fewer samples the mean is taken, which weighs the newest by more than `GAIN`."""

SURPRISE = 3.0
"""Deviations from which on a sample is an outlier, or the first after a step."""

SETTLED_SAMPLES = 6
SETTLED_DEVIATION = 0.25
"""An estimate is settled from so many samples on, when the deviation is at most this share of the value."""


@dataclass(slots=True)
class Estimate:
    """What is believed of a quantity, in its own unit. Nobody changes one; frozen, making it would take five times as
    long, and thousands are made per second.
    """

    value: float
    deviation: float
    """Smoothed absolute difference between samples and value; of a prior half the value."""
    updated: float
    """When the last sample was taken, or the prior stated: the time that `smooth` was given."""
    samples: int
    """Measured; 0: a prior."""
    surprise: float = field(default=0.0, repr=False, compare=False)
    """The last sample less the value, if that sample was an outlier; else 0."""

    @property
    def measured(self) -> bool:
        """Whether it rests on measurements and not only on what somebody said."""
        return self.samples > 0

    @property
    def settled(self) -> bool:
        """Whether it can be relied on: enough samples, and close together."""
        return self.samples >= SETTLED_SAMPLES and self.deviation <= SETTLED_DEVIATION * abs(self.value)

    def age(self, now: float) -> float:
        """Seconds since the last sample."""
        return max(0.0, now - self.updated)


def prior(value: float, now: float) -> Estimate:
    """What is believed before anything was measured."""
    return Estimate(value, abs(value) / 2, now, 0)


def smooth(known: Estimate | None, sample: float, now: float) -> Estimate:
    """`known` after one more sample, which must be a finite number."""
    if known is None:
        return Estimate(sample, abs(sample) / 2, now, 1)
    samples, deviation, surprise = known.samples, known.deviation, known.surprise
    error = sample - known.value
    bound = SURPRISE * deviation
    if surprise and (error > 0) == (surprise > 0) and abs(error) >= bound / 2:
        before = known.value + surprise
        return Estimate(before + (sample - before) / 2, abs(sample - before) / 2, now, samples + 1)
    if not samples:
        return Estimate(known.value + error / 2, deviation + GAIN * (abs(error) - deviation), now, 1)
    outlier = not -bound <= error <= bound
    if outlier:
        error = bound if error > 0 else -bound
    weight = GAIN if samples >= FEW else 1 / (samples + 1)
    value = known.value + weight * error
    deviation += GAIN * (abs(error) - deviation)
    return Estimate(value, deviation, now, samples + 1, sample - value if outlier else 0.0)
