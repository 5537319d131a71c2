"""One direction of a link between two nodes: how long each packet is held, and which are dropped.

The same `Shape` as in `nomad.transport.shaping`, applied to packets instead of messages: a packet waits until
the link is free, is on it for size / bandwidth, and arrives latency +- jitter later. Order is kept. Where the
transport's shaping sends a lost message again, here the packet is gone, as is what finds the queue full: TCP's own
machinery sees to it. Used by `switch`. Pure: time is passed in.
"""

from __future__ import annotations

from collections import deque
from random import Random

from nomad.control import Shape

QUEUE_SECONDS = 0.25
"""A queue before the link of this length, as routers at the edge commonly have, ..."""
QUEUE_BYTES = 256 << 10
"""... or of this many bytes, whichever is more: a slow link still takes the first flight of several connections."""
HELD_BYTES = 64 << 20
"""The most that is on the way at once, for links without a bandwidth."""


class Line:
    """Holds packets and gives them back when they have arrived."""

    __slots__ = (
        "_bandwidth",
        "_held",
        "_held_bytes",
        "_jitter",
        "_last_release",
        "_latency",
        "_line_free",
        "_loss",
        "_queue_seconds",
        "_random",
        "bytes",
        "dropped",
        "lost",
        "packets",
    )

    def __init__(self, shape: Shape, random: Random) -> None:
        self._random = random
        self._held: deque[tuple[float, float, float, bytes]] = deque()  # release, start, sent, packet
        self._held_bytes = 0
        self._line_free = 0.0
        self._last_release = 0.0
        self.packets = 0
        self.bytes = 0
        self.lost = 0
        """Packets dropped by chance, as the shape says."""
        self.dropped = 0
        """Packets that found the queue full."""
        self._apply(shape)

    @property
    def due(self) -> float:
        """When the next packet arrives; infinity when none is held."""
        return self._held[0][0] if self._held else float("inf")

    def send(self, packet: bytes, now: float) -> None:
        """Take a packet in, or drop it."""
        size = len(packet)
        self.packets += 1
        self.bytes += size
        if self._loss and self._random.random() < self._loss:
            self.lost += 1
        elif self._line_free - now > self._queue_seconds or self._held_bytes > HELD_BYTES:
            self.dropped += 1
        else:
            self._held_bytes += size
            self._hold(packet, now, 1.0)

    def take(self, now: float) -> list[bytes]:
        """The packets that have arrived by now, in the order in which they were sent."""
        held = self._held
        arrived = []
        while held and held[0][0] <= now:
            packet = held.popleft()[3]
            self._held_bytes -= len(packet)
            arrived.append(packet)
        return arrived

    def set_shape(self, shape: Shape, now: float) -> None:
        """Change the link. What is on its way already arrives as it would have; what still waits to be sent doesn't."""
        self._apply(shape)
        waiting = []
        while self._held and self._held[-1][2] > now:
            waiting.append(self._held.pop())
        self._line_free = now
        self._last_release = self._held[-1][0] if self._held else now
        for _, start, sent, packet in reversed(waiting):
            self._hold(packet, now, 1.0 if start >= now else (sent - now) / (sent - start))

    def _apply(self, shape: Shape) -> None:
        self._latency, self._jitter, self._loss = shape.latency, shape.jitter, shape.loss
        self._bandwidth = shape.bandwidth
        self._queue_seconds = QUEUE_SECONDS
        if shape.bandwidth is not None:
            self._queue_seconds = max(QUEUE_SECONDS, QUEUE_BYTES / shape.bandwidth)

    def _hold(self, packet: bytes, now: float, left: float) -> None:
        """Schedule a packet of which the share `left` is yet to be sent."""
        start = sent = self._line_free if self._line_free > now else now
        if self._bandwidth is not None:
            sent += left * len(packet) / self._bandwidth
        self._line_free = sent
        release = sent + self._latency
        if self._jitter:
            release += self._random.uniform(-self._jitter, self._jitter)
        if release < self._last_release:
            release = self._last_release
        self._last_release = release
        self._held.append((release, start, sent, packet))
