"""Emulated links: a connection whose writes arrive as late as over a long, narrow or lossy one.

Wrapped around a connection by whoever emulates a network between nodes that are all here. Each end
shapes what it sends, so the two directions may differ. Frames stay whole and in order. With the
default shape nothing is held and every call goes straight through. Reading is never touched.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random

from nomad.clock import Clock, SystemClock
from nomad.control import Shape
from nomad.errors import ConnectionClosed, TransportError
from nomad.transport import base
from nomad.transport.base import HIGH_WATER, Connection, Frame, Listener, OnConnection, Transport, Writer
from nomad.transport.framing import PREFIX, check
from nomad.transport.waiting import Waiter

LEAST_RETRANSMISSION = 0.2
"""Seconds: the least retransmission time-out of TCP."""
FLIGHT_BYTES = 16 << 20
"""The most that may be on the way at once, what bandwidth and latency multiply to notwithstanding."""


@dataclass(slots=True)
class _Held:
    frame: Frame
    size: int
    """Bytes on the wire."""
    start: float
    sent: float
    """The link is busy with it from `start` to `sent`."""
    release: float
    """When it arrives."""


class ShapedConnection:
    """`Connection` that delays what is written to another one."""

    def __init__(
        self,
        inner: Connection,
        shape: Shape | None = None,
        *,
        clock: Clock | None = None,
        random: Random | None = None,
    ) -> None:
        self._inner = inner
        self._clock = clock or SystemClock()
        self._random = random or Random()
        self._shape = _checked(shape or Shape())
        self._clear = self._shape == Shape()
        self._held: deque[_Held] = deque()
        self._held_bytes = 0
        self._line_free = 0.0  # when the link is done with all that was written
        self._last_release = 0.0
        self._pump: asyncio.Task[None] | None = None  # alive only while something is held
        self._asleep = False
        self._drainer = Waiter()
        self._closed = False

    @property
    def shape(self) -> Shape:
        return self._shape

    def set_shape(self, shape: Shape) -> None:
        """Change the link. What is on its way already arrives as it would have; what still waits to be sent doesn't."""
        self._shape = _checked(shape)
        self._clear = self._shape == Shape()
        now = self._clock.now()
        waiting = []
        while self._held and self._held[-1].sent > now:
            waiting.append(self._held.pop())
        self._line_free = now
        self._last_release = self._held[-1].release if self._held else now
        for held in reversed(waiting):
            left = 1.0 if held.start >= now else (held.sent - now) / (held.sent - held.start)
            self._held.append(self._scheduled(held.frame, held.size, now, left))
        if self._asleep:
            self._wake_pump()
        self._drainer.wake()

    # Connection

    @property
    def local(self) -> str:
        return self._inner.local

    @property
    def peer(self) -> str:
        return self._inner.peer

    @property
    def closed(self) -> bool:
        return self._closed or self._inner.closed

    @property
    def writable(self) -> bool:
        return self._held_bytes < self._limit() and self._inner.writable

    def write(self, frames: Iterable[Frame]) -> None:
        self._raise_if_closed()
        if self._clear and not self._held:
            self._inner.write(frames)
            return
        self._inner.write(())  # raises if the connection is broken
        now = self._clock.now()
        for buffers in [check(frame) for frame in frames]:
            size = sum(map(len, buffers)) + PREFIX.size + 8 * (len(buffers) - 1)
            self._held.append(self._scheduled(buffers, size, now))
            self._held_bytes += size
        if self._held and (self._pump is None or self._pump.done()):
            self._pump = asyncio.get_running_loop().create_task(self._run(None), name=f"shaped link to {self.peer}")

    async def drain(self) -> None:
        while True:
            self._raise_if_closed()
            self._inner.write(())
            if self._held_bytes >= self._limit():
                await self._drainer.wait()
            elif not self._inner.writable:
                await self._inner.drain()
            else:
                return

    async def recv(self) -> list[Frame]:
        self._raise_if_closed()
        return await self._inner.recv()

    def poll(self) -> list[Frame]:
        self._raise_if_closed()
        return self._inner.poll()

    def direct(self) -> Writer | None:
        return None

    def limit(self, max_bytes: int) -> None:
        self._inner.limit(max_bytes)

    def notify(self, callback: Callable[[], None], one: Callable[[bytes], bool] | None = None) -> None:
        self._inner.notify(callback, one)

    async def close(self) -> None:
        self._closed = True
        self._drainer.wake()
        if self._pump is not None:
            try:
                _, late = await asyncio.wait([self._pump], timeout=base.CLOSE_SECONDS)
            except asyncio.CancelledError:
                self.abort()
                raise
            if late:
                self.abort()
                await asyncio.wait([self._pump])
        await self._inner.close()

    def abort(self) -> None:
        self._closed = True
        self._drop()
        if self._pump is not None:
            self._pump.cancel()
        self._inner.abort()

    # Inside

    def _raise_if_closed(self) -> None:
        if self._closed:
            raise ConnectionClosed(f"the connection to {self.peer} was closed on this side")

    def _limit(self) -> int:
        """Bytes that may be held: what a link carries at once, and a backlog before it."""
        shape = self._shape
        if shape.bandwidth is None:
            flight = float(FLIGHT_BYTES) if shape.latency else 0.0
        else:
            flight = min(FLIGHT_BYTES, shape.bandwidth * shape.latency)
        return HIGH_WATER + int(flight)

    def _scheduled(self, frame: Frame, size: int, now: float, left: float = 1.0) -> _Held:
        """`frame` with its times; `left` is the share of it that the link has yet to send."""
        shape = self._shape
        start = max(now, self._line_free)
        sent = start if shape.bandwidth is None else start + left * size / shape.bandwidth
        delay = max(0.0, shape.latency + self._random.uniform(-shape.jitter, shape.jitter))
        if shape.loss and self._random.random() < shape.loss:
            delay += max(LEAST_RETRANSMISSION, 2 * shape.latency)
        self._line_free = sent
        self._last_release = max(self._last_release, sent + delay)
        return _Held(frame, size, start, sent, self._last_release)

    def _wake_pump(self) -> None:
        """Let a pump that sleeps too long look at its times again; a sleep can only be cancelled."""
        previous = self._pump
        assert previous is not None
        previous.cancel()
        self._asleep = False
        self._pump = asyncio.get_running_loop().create_task(self._run(previous), name=previous.get_name())

    async def _run(self, previous: asyncio.Task[None] | None) -> None:
        """Hand frames on when their time has come, until none is held."""
        if previous is not None:
            await asyncio.wait([previous])
        try:
            while self._held:
                now = self._clock.now()
                if self._held[0].release > now:
                    self._asleep = True
                    await self._clock.sleep(self._held[0].release - now)
                    self._asleep = False
                    continue
                if not self._inner.writable:
                    await self._inner.drain()
                    continue
                due = []
                while self._held and self._held[0].release <= now:
                    held = self._held.popleft()
                    self._held_bytes -= held.size
                    due.append(held.frame)
                self._inner.write(due)
                self._drainer.wake()
        except TransportError:
            self._drop()  # nobody is there to take it; the next call on the connection says so

    def _drop(self) -> None:
        self._held.clear()
        self._held_bytes = 0
        self._drainer.wake()


class ShapedTransport:
    """`Transport` whose connections are shaped, at both ends, each in the direction that it sends."""

    def __init__(
        self,
        inner: Transport,
        shape: Shape | None = None,
        *,
        clock: Clock | None = None,
        random: Random | None = None,
    ) -> None:
        self.scheme = inner.scheme
        self.capabilities = inner.capabilities
        self._inner = inner
        self._shape = shape
        self._clock = clock
        self._random = random or Random()

    async def connect(self, address: str, *, timeout: float = 10.0) -> Connection:
        return self._shaped(await self._inner.connect(address, timeout=timeout))

    async def listen(self, address: str, on_connection: OnConnection, *, advertise: str | None = None) -> Listener:
        async def on_shaped(connection: Connection) -> None:
            shaped = self._shaped(connection)
            try:
                await on_connection(shaped)
            finally:
                shaped.abort()
                await shaped.close()

        return await self._inner.listen(address, on_shaped, advertise=advertise)

    def _shaped(self, connection: Connection) -> ShapedConnection:
        return ShapedConnection(connection, self._shape, clock=self._clock, random=self._random)


def _checked(shape: Shape) -> Shape:
    if shape.latency < 0 or shape.jitter < 0 or not 0 <= shape.loss < 1:
        raise ValueError(f"a link can't have {shape}: latency and jitter are at least 0, loss is in [0, 1)")
    if shape.bandwidth is not None and shape.bandwidth <= 0:
        raise ValueError(f"a link can't have {shape}: its bandwidth is above 0, or None for unlimited")
    return shape
