"""How often pods are to send heart-beats, by how many they are, and after what time one is overdue.

Pure; one `Pace` per master. `pods` counts its channels and tells the pods; `observe`, `loop` and the runtime ask what
is overdue. A heart-beat costs the master about 0.1 ms: at two a second of each, 5,000 pods would take all of a core.
"""

from __future__ import annotations

from nomad.clock import Clock
from nomad.control import HEARTBEAT
from nomad.settings import Heartbeats

STEPS: tuple[float, ...] = tuple(HEARTBEAT * 2**step for step in range(6))
"""Seconds between two heart-beats of a pod: 0.5 to 16."""

ROOM = 0.6
"""Share of the most heart-beats per second below which pods are told to send more: after that there are still fewer
than the most, so that a pod that comes and goes changes nothing.
"""

MISSED = 2.5
"""Heart-beats are overdue after so many of the seconds between two."""


def pace(pods: int, before: float, most: float) -> float:
    """Seconds between two heart-beats of each of `pods`, one of `STEPS`, `before` being what it was.

    `most`: heart-beats per second of them all, which only the longest step may exceed.
    """
    return next((step for step in STEPS if pods <= step * most * (ROOM if step < before else 1.0)), STEPS[-1])


class Pace:
    """The pace of all pods of a master."""

    def __init__(self, settings: Heartbeats, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self.seconds = STEPS[0]
        """Between two heart-beats of a pod."""
        self._earlier = (0.0, 0.0)
        """What was missed before the last change, and until when that holds."""

    def count(self, pods: int) -> bool:
        """So many pods are connected now; whether all have to be told another pace."""
        seconds = pace(pods, self.seconds, self._settings.most)
        if seconds == self.seconds:
            return False
        missed = self.missed
        self._earlier = missed, self._clock.now() + missed
        self.seconds = seconds
        return True

    @property
    def missed(self) -> float:
        """Seconds without a heart-beat in which there would have been some.

        Pods that are told a quicker pace still get as long as before until all of them have had that time.
        """
        earlier, until = self._earlier
        return max(MISSED * self.seconds, earlier if self._clock.now() < until else 0.0)

    @property
    def overdue(self) -> float:
        """Seconds without a heart-beat after which a pod is silent."""
        return max(self._settings.overdue, self.missed)
