"""Who may probe whom now, and with how many bytes. Pure: time is passed in.

Called by `survey`. Two limits hold always, whatever is asked for:

- `PROBES_PER_SECOND` per node, those counted that it answers;
- `SHARE` of a link's bandwidth, on average since its first probe. While nothing is known of the bandwidth it is taken
  for `ASSUMED_BANDWIDTH`, so that a slow link isn't filled by finding out that it is slow.

A probe is due where nothing has measured a link for a while: links that carry messages measure themselves.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

PROBES_PER_SECOND = 20
SHARE = 0.01

ASSUMED_BANDWIDTH = 125_000.0
"""Bytes per second (1 Mbit/s)."""

PROBE_BYTES = 64
"""What a probe of the round trip costs, in all, each way."""

FIRST_TRANSFER = 4 * 1024
LEAST_TRANSFER, MOST_TRANSFER = 2 * 1024, 1 << 20
"""Bytes of a probe of the bandwidth: the first where nothing is known of it, and the bounds."""

MOST_LINKS = 20_000
"""So many links may be remembered: on large clusters those are forgotten that owe nothing."""

TRANSFER_SECONDS = 0.02
"""How long a link should be busy with it: the noise of a millisecond is 5 % then."""


@dataclass(slots=True)
class _Link:
    debt: float = 0.0
    """Bytes that were sent over it beyond `SHARE` of what it could carry until `at`."""
    at: float = 0.0
    transfer: int = FIRST_TRANSFER
    """Bytes of the next probe of the bandwidth, while nothing is known of it."""

    def owes(self, bandwidth: float | None, now: float) -> float:
        """Seconds until it owes nothing, if it carries so many bytes per second."""
        return self.at + self.debt / (SHARE * (bandwidth or ASSUMED_BANDWIDTH)) - now

    def matters(self, now: float) -> bool:
        """Whether there is anything to remember of it."""
        return self.transfer != FIRST_TRANSFER or self.owes(None, now) > 0


@dataclass(slots=True)
class Budget:
    """What all probes of a cluster may cost."""

    _nodes: dict[str, deque[float]] = field(default_factory=dict)
    """When each node made or answered its last probes."""
    _links: dict[tuple[str, str], _Link] = field(default_factory=dict)

    def take(self, source: str, target: str, nbytes: int, bandwidth: float | None, now: float, probes: int = 1) -> bool:
        """Whether `source` may send `nbytes` to `target` now, in so many probes; if so, they count.

        `bandwidth` is the link's, as far as it is known. The answer, which goes the other way, is small.
        """
        if self.wait(source, target, bandwidth, now, probes) > 0:
            return False
        for id in (source, target):
            self._nodes.setdefault(id, deque(maxlen=PROBES_PER_SECOND)).extend([now] * probes)
        if len(self._links) >= MOST_LINKS:
            self._links = {way: link for way, link in self._links.items() if link.matters(now)}
        link = self._links.setdefault((source, target), _Link())
        link.debt, link.at = float(nbytes), now
        return True

    def wait(self, source: str, target: str, bandwidth: float | None, now: float, probes: int = 1) -> float:
        """Seconds until `take` agrees; 0 if it does now."""
        link = self._links.get((source, target))
        seconds = link.owes(bandwidth, now) if link is not None else 0.0
        for id in (source, target):
            times = self._nodes.get(id, ())
            over = len(times) + probes - PROBES_PER_SECOND
            if over > 0:
                seconds = max(seconds, times[over - 1] + 1.0 - now)
        return max(0.0, seconds)

    def transfer_bytes(self, source: str, target: str, bandwidth: float | None) -> int:
        """Bytes of the next probe of the bandwidth: enough to keep the link busy for `TRANSFER_SECONDS`."""
        if bandwidth is None:
            return self._links.setdefault((source, target), _Link()).transfer
        return int(min(MOST_TRANSFER, max(LEAST_TRANSFER, bandwidth * TRANSFER_SECONDS)))

    def too_quick(self, source: str, target: str) -> None:
        """A transfer was over too soon to tell anything: the next one is larger."""
        link = self._links.setdefault((source, target), _Link())
        link.transfer = min(MOST_TRANSFER, 4 * link.transfer)

    def forget(self, node: str) -> None:
        """It has left the cluster."""
        self._nodes.pop(node, None)
        for pair in [pair for pair in self._links if node in pair]:
            del self._links[pair]
