"""What a link's sender learns of its link from what flows over it anyway. Pure; owned and called by `sender`.

Told of each batch that goes out and of each acknowledgement, it gives, once per heart-beat, the least round
trip, the bandwidth if the link was filled, and what got through. It keeps raw samples only; smoothing is the
book's (`nomad.measure.estimate`). How each number comes about, and when there is none, is in docs/measure.md.

An acknowledgement names the newest batch received and how long ago that was. So `now - held` is when that batch had
arrived, but for the way back; less the round trip it is when the link had taken its last byte.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass

SMALL = 8 * 1024
"""Bytes up to which a batch can time the round trip, where the bandwidth isn't known."""

LARGE = 32 * 1024
"""Bytes from which on a transfer can tell the bandwidth."""

LEAST_SECONDS = 0.002
"""Transfers that are quicker tell nothing: the two processes' turns take about as long."""

SLACK = 0.1
"""What may be left of rigour: the share of a round trip that waiting may make up, and the share of a transfer during
which its last batch may not have been handed over yet."""

ASK_SECONDS = 0.25
"""When nothing that told a round trip went out for so long, a PING goes ahead of the next batch."""

RECENT_SECONDS = 2.0
"""Round trips of so long ago still count for telling apart the length of a transfer and the way."""

MOST_SENDS = 1024
"""Batches under way that are remembered."""


@dataclass(frozen=True, slots=True)
class LinkReport:
    """A link since the last report; None: nothing was seen that tells."""

    peer_epoch: int
    """Of the receiver: another one may be expected already, whose link this isn't."""
    round_trip: float | None
    """Seconds, the least."""
    bandwidth: float | None
    """Bytes per second of transfers that filled the link, the median."""
    reached: float | None
    """Bytes per second that were acknowledged."""


@dataclass(slots=True)
class _Send:
    end: int
    """Messages numbered up to its last."""
    at: float
    nbytes: int
    bytes_end: int
    """Cumulative bytes up to its end."""
    wait: float
    """Seconds that it had to wait for what was before it."""


class LinkSamples:
    """One sender's. `opened` on each connection, since it may lead elsewhere than the one before."""

    def __init__(self) -> None:
        self.newest: float | None = None
        """The newest round trip, whatever it waited for."""
        self._least: float | None = None
        self._bandwidths: list[float] = []
        self._reported_at: float | None = None
        self._reported_bytes = 0
        self._news: list[tuple[int, int, float]] = []
        """What `sent` was told and hasn't been worked out yet: that can wait until something comes back."""
        self.sent = self._news.append
        """Called when a batch goes out, with the number after that of its last message, its bytes, and the time."""
        self._sends: deque[_Send] = deque(maxlen=MOST_SENDS)
        self.opened(0)

    def opened(self, peer_epoch: int) -> None:
        """A new connection, to the receiver of this epoch: what is known of the old one's way holds no more."""
        self.peer_epoch = peer_epoch
        self._news.clear()
        self._sends.clear()
        self._bytes = 0
        """Sent on this connection."""
        self._arrived = 0
        """Of these, known to have arrived."""
        self._large_end = 0
        """`_bytes` at the end of the last batch that isn't small."""
        self._raw: deque[tuple[float, float]] = deque(maxlen=64)
        """Time and seconds of round trips with all that they waited for."""
        self._arrived_at: float | None = None
        self._free = 0.0
        """When the link has taken all that was sent, as far as the bandwidth is known."""
        self._rates: deque[float] = deque(maxlen=5)
        self._rate: float | None = None
        """Their median: bytes per second."""
        self._recent: deque[tuple[float, float]] = deque(maxlen=64)
        """Time and seconds of round trips that waited for nothing."""
        self._told_at = 0.0
        """When what told the last round trip went out."""
        self.ask_at = ASK_SECONDS
        """Before this time `ask` says no, and needn't be called."""
        self._asked_at: float | None = None
        self._asked_wait = 0.0
        self._least, self._bandwidths = None, []
        self._reported_at = None

    # -- what happens

    def ask(self, nbytes: int, now: float) -> bool:
        """Whether a PING should go out now, ahead of a batch of `nbytes`; if so, it is taken to have gone.

        A small batch times the way by itself, unless acknowledgements stay away since nothing is settled.
        """
        if now < self.ask_at:
            return False
        self._catch_up()
        unheard = bool(self._sends) and self._sends[0].at < now - ASK_SECONDS
        if not (nbytes > SMALL or unheard):
            return False
        self._asked_at, self._asked_wait = now, self._wait(now)
        self.ask_at = math.inf
        return True

    def answered(self, now: float) -> None:
        """A PONG came."""
        if self._asked_at is None:
            return
        self.newest = max(0.0, now - self._asked_at)
        self._raw.append((now, self.newest))
        self._asked_at, self.ask_at = None, self._told_at + ASK_SECONDS
        self._timed(self.newest, self._asked_wait, now)

    def acknowledged(self, echo: int, held: float, now: float) -> None:
        """An acknowledgement: `held` seconds ago the receiver had all messages numbered below `echo`."""
        self._catch_up()
        first = last = None
        while self._sends and self._sends[0].end <= echo:
            last = self._sends.popleft()
            first = first or last
        if first is None or last is None:
            return
        arrived_at, nbytes = now - max(0.0, held), last.bytes_end - self._arrived
        before, self._arrived, self._arrived_at = self._arrived_at, last.bytes_end, arrived_at
        if last.end != echo:  # too many batches are under way to remember each
            self._arrived_at = None
            return
        transfer = 0.0
        if self._rate is not None:
            self._free = min(self._free, now + (self._bytes - self._arrived) / self._rate)
            transfer = last.nbytes / self._rate
        self.newest = max(0.0, arrived_at - last.at)
        self._raw.append((now, self.newest))
        if last.nbytes <= SMALL:
            self._timed(max(0.0, self.newest - transfer), last.wait, now)
        self._filled(nbytes, first.at, last.at, before, arrived_at, now)

    # -- what it tells

    def report(self, now: float) -> LinkReport:
        """What was seen since the last report. May be called from another thread than the rest."""
        least, self._least = self._least, None
        bandwidths, self._bandwidths = self._bandwidths, []
        since, before, arrived = self._reported_at, self._reported_bytes, self._arrived
        self._reported_at, self._reported_bytes = now, arrived
        reached = (arrived - before) / (now - since) if since is not None and now > since else None
        return LinkReport(
            peer_epoch=self.peer_epoch,
            round_trip=least,
            bandwidth=statistics.median(bandwidths) if bandwidths else None,
            reached=reached or None,
        )

    # -- inside

    def _catch_up(self) -> None:
        """Work out what `sent` was told."""
        for end, nbytes, at in self._news:
            wait = self._wait(at)
            self._bytes += nbytes
            if nbytes > SMALL:
                self._large_end = self._bytes
            if self._rate is not None:
                self._free = at + wait + nbytes / self._rate
            self._sends.append(_Send(end, at, nbytes, self._bytes, wait))
        self._news.clear()

    def _wait(self, now: float) -> float:
        """Seconds until the link is done with what was sent; where that can't be known, for ever or not at all."""
        if self._rate is None:
            return math.inf if self._arrived < self._large_end else 0.0
        return max(0.0, min(self._free - now, (self._bytes - self._arrived) / self._rate))

    def _timed(self, seconds: float, wait: float, now: float) -> None:
        """Something small went there and back, and waited for `wait` of these seconds."""
        if wait > max(SLACK * seconds, LEAST_SECONDS / 4):
            return
        self._told_at = now - seconds
        if self._asked_at is None:
            self.ask_at = self._told_at + ASK_SECONDS
        self._recent.append((now, seconds))
        if self._least is None or seconds < self._least:
            self._least = seconds

    def _filled(
        self, nbytes: int, first_at: float, last_at: float, before: float | None, arrived_at: float, now: float
    ) -> None:
        """`nbytes`, handed over from `first_at` to `last_at`, have arrived: did they fill the link meanwhile?"""
        for kept in (self._recent, self._raw):
            while kept and kept[0][0] < now - RECENT_SECONDS:
                kept.popleft()
        if nbytes < LARGE:
            return
        # On a link that is never idle each round trip has waiting in it. The least one does all the same: a PING waits
        # as long as the batch behind it, and of what follows at once upon something only differences count.
        known = [seconds for _, seconds in self._recent] or [min(seconds for _, seconds in self._raw)]
        round_trip = statistics.median(known)
        end = arrived_at - round_trip
        start = first_at if before is None else max(first_at, before - round_trip)
        seconds = end - start
        spread = max(known) - min(known)
        if seconds < max(LEAST_SECONDS, 2 * spread) or last_at > start + SLACK * seconds:
            return
        self._rates.append(nbytes / seconds)
        self._rate = statistics.median(self._rates)
        self._bandwidths.append(nbytes / seconds)
