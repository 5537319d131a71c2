"""A connection over a message queue that has none: opening, closing and flow control by small messages.

Used by `nomad.transport.zmq`; knows nothing of sockets. ZeroMQ delivers messages in order, but its
queues are counted in messages, a ROUTER throws away what doesn't fit, and neither end sees the other
close. So each connection says these things itself:

    HELLO  version       dialer: open            WELCOME  listener: it is open
    FRAME  buffers...    one frame               TAKEN    u64: cost of all frames that recv has given out
    BYE                  nothing more comes, and nothing more is read; answered with BYE
    RESET                gone, at once

A sender has at most `WINDOW` of cost, and one frame, on the way; the rest waits at its end.
"""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from nomad.transport import base
from nomad.transport.base import HIGH_WATER, MAX_FRAME_BYTES, MAX_PARTS, Buffer, Frame
from nomad.transport.endpoint import Endpoint
from nomad.transport.framing import FRAME_OVERHEAD, check, cost_of
from nomad.transport.waiting import Once

WINDOW = 4 << 20
"""Cost (bytes, and `FRAME_OVERHEAD` per frame) that may be on the way, or waiting for `recv`."""
VERSION = b"1"

HELLO, WELCOME, FRAME, TAKEN, BYE, RESET = b"H", b"W", b"F", b"T", b"B", b"R"
_COUNT = struct.Struct("<Q")


class MessageConnection(Endpoint):
    """`nomad.transport.base.Connection` over `send`, which takes one message, and `message`, called for each."""

    def __init__(
        self, local: str, peer: str, send: Callable[[Sequence[Buffer]], None], release: Callable[[bool], None]
    ) -> None:
        """`release(gracefully)` is called once, when no message shall be carried any more."""
        super().__init__(local, peer)
        self._send = send
        self._release = release
        self._released = False
        self._waiting_cost = 0  # received and not taken by recv
        self._taken = 0  # cost of all that recv has given out
        self._told = 0  # what the peer knows of that
        self._queue: deque[tuple[int, Sequence[Buffer]]] = deque()
        self._queue_cost = 0
        self._sent = 0  # cost of all frames sent
        self._sent_taken = 0  # cost of those that the peer's recv has given out
        self._said_bye = False
        self.gone = Once()
        """Set by the owner when what it released is closed."""

    # Connection

    @property
    def writable(self) -> bool:
        return self._queue_cost < HIGH_WATER

    def write(self, frames: Iterable[Frame]) -> None:
        if self.closed:
            raise self._error()
        for buffers in [check(frame) for frame in frames]:
            cost = FRAME_OVERHEAD + sum(map(len, buffers))
            self._queue.append((cost, buffers))
            self._queue_cost += cost
        self._flush()

    def poll(self) -> list[Frame]:
        if self._closed or (not self._received and self._broken is not None):
            raise self._error()
        if not self._received:
            return []
        frames = self._take()
        left = cost_of(self._received) if self._received else 0
        self._taken += self._waiting_cost - left
        self._waiting_cost = left
        if not frames:
            self._received, self._waiting_cost = [], 0
            self._violated(f"it sent a frame over the limit of {self._most} bytes")
            raise self._error()
        if self._taken - self._told >= WINDOW // 4 and self._broken is None:
            self._told = self._taken
            self._send([TAKEN, _COUNT.pack(self._taken)])
        if self._broken is not None:
            self._reader.wake()
        return frames

    async def close(self) -> None:
        if not self.closed:
            self._end()
            self._flush()
        self._end()
        try:
            async with asyncio.timeout(base.CLOSE_SECONDS):
                await self.gone.wait()
        except TimeoutError:
            pass
        finally:
            self.abort()
        await self.gone.wait()

    def abort(self) -> None:
        self._end()
        if not self._released:
            self._send([RESET])
            self._let_go(gracefully=False)

    # What the owner tells

    def message(self, kind: bytes, parts: Sequence[Buffer]) -> None:
        """Take a message of the peer's; buffers must be immutable and owned by nobody else."""
        if self._released:
            return
        if kind == FRAME:
            self._frame(parts)
        elif kind == TAKEN and len(parts) == 1 and len(parts[0]) == _COUNT.size:
            (taken,) = _COUNT.unpack(parts[0])
            if self._sent_taken <= taken <= self._sent:
                self._sent_taken = taken
                self._flush()
            else:
                self._violated("it has taken what was never sent")
        elif kind == BYE:
            if not self._said_bye:
                self._send([BYE])
            self._lose(f"{self._peer} closed the connection", gracefully=True)
        elif kind == RESET:
            self._lose(f"{self._peer} is gone: it dropped the connection")
        else:
            self._violated("it sent a message of an unknown kind")

    def lost(self, reason: str) -> None:
        """The peer can't be reached any more."""
        self._lose(f"{self._peer} is gone: {reason}")

    # Inside

    def _frame(self, parts: Sequence[Buffer]) -> None:
        size = sum(map(len, parts))
        if not parts or size > MAX_FRAME_BYTES or len(parts) - 1 > MAX_PARTS:
            self._violated(f"it sent a frame of {size} bytes in {len(parts)} buffers")
        elif self._waiting_cost >= WINDOW:
            self._violated("it sent more than was asked for")
        elif not self._closed:
            self._received.append(tuple(parts))
            self._waiting_cost += FRAME_OVERHEAD + size
            self._reader.wake()

    def _flush(self) -> None:
        """Send what the peer has room for; when we are closing and that is all, say so."""
        while self._queue and self._sent - self._sent_taken < WINDOW:
            cost, buffers = self._queue.popleft()
            self._queue_cost -= cost
            self._sent += cost
            self._send([FRAME, *buffers])
        if self.writable:
            self._drainer.wake()
        if self._closed and not self._queue and not self._said_bye and not self._released:
            self._said_bye = True
            self._send([BYE])

    def _violated(self, what: str) -> None:
        if not self._released:
            self._send([RESET])
        self._lose(f"{self._peer} doesn't speak this protocol: {what}")

    def _lose(self, reason: str, gracefully: bool = False) -> None:
        """The peer ended it."""
        self._break(reason)
        self._let_go(gracefully)

    def _let_go(self, gracefully: bool) -> None:
        self._queue.clear()
        self._queue_cost = 0
        if not self._released:
            self._released = True
            self._release(gracefully)
