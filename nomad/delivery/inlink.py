"""The receiving ends of an operator's data links on real connections: listens, greets, hands on what arrives.

`InPort` listens for all links of an operator, or dials the senders of those that nobody could dial
(`nomad.delivery.meeting`), and hands each connection to its `InLink`, which owns a `Receiver`. Their
owner (`nomad.actor`) is told through a callback when there is something to do, and calls `flush` after it did
something.

A connection waits beside the one in use until its sender's first frame, with which it takes the link over. So the next
instance of a sender may be connected long before it is needed, and two are never heard at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from nomad.clock import Clock, SystemClock
from nomad.control import Shape
from nomad.delivery import frames
from nomad.delivery.driver import first_of, nothing, shake_listener, shaped
from nomad.delivery.meeting import CALL, Arrivals, Call, Calls, Relayed
from nomad.delivery.receiver import Receiver
from nomad.delivery.sender import GIVE_UP
from nomad.errors import ConnectionBroken, DeliveryError, Fenced, HandshakeError, ProtocolError, TransportError
from nomad.transport import registry
from nomad.transport.base import MAX_FRAME_BYTES, Connection, Frame, Listener

MOST_WAITING = 4
"""Connections of one link that wait beside the one in use; of more, the oldest of the oldest sender is closed."""


@dataclass(eq=False, slots=True)
class _Line:
    """A connection from a sender that has proven itself."""

    epoch: int
    raw: Connection
    """What is read from."""
    conn: Connection
    """What is written to: the connection, or an emulated link around it."""
    heard_at: float
    end: asyncio.Future[Exception] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """Why it ended."""

    def finish(self, why: Exception) -> None:
        """Nothing more is heard of it."""
        if not self.end.done():
            self.end.set_result(why)
        self.conn.abort()


class InLink:
    """The receiving end of a link. Connections are brought by `InPort`."""

    def __init__(self, receiver: Receiver, key: bytes, clock: Clock, changed: Callable[[], None] = nothing):
        self.receiver = receiver
        self.changed = changed
        """Called when a batch has arrived, or another connection has taken over."""
        self.one: Callable[[bytes], bool] | None = None
        """Called with a frame that came alone over the connection in use: whether it was received and worked off."""
        self.met: Callable[[], None] = nothing
        """Called when a sender, or its next instance, came or went."""
        self.key = key
        self.fenced = 0
        self.reconnects = 0
        self._clock = clock
        self._shape = Shape()
        self._standby: tuple[int, Shape] = 0, Shape()
        """Epoch of the sender's next instance, and how an emulated link treats acknowledgements to that."""
        self._waiting: list[_Line] = []
        """Proven and not used yet, oldest first."""
        self._line: _Line | None = None
        """The connection in use. The three below are of it, for the sake of what is called for each batch."""
        self._raw: Connection | None = None
        self._conn: Connection | None = None
        self._end: asyncio.Future[Exception]
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0

    def set_peer(self, epoch: int, shape: Shape) -> None:
        """The least epoch of the sender that may be heard, and how an emulated link treats acknowledgements."""
        self.receiver.expect(epoch)
        self._shape = shape
        self._look_again()

    def set_standby(self, epoch: int, shape: Shape) -> None:
        """The epoch of the sender's next instance, 0: none; and how an emulated link treats what goes to that."""
        self._standby = epoch, shape
        self._look_again()

    @property
    def peers(self) -> tuple[int, int]:
        """Epochs of the sender that is heard, and of a newer instance that waits; 0 is none."""
        heard = self._line.epoch if self._line is not None else 0
        waiting = max((line.epoch for line in self._waiting), default=0)
        return heard, waiting if waiting > heard else 0

    @property
    def connected(self) -> bool:
        """Whether a connection is in use."""
        return self._conn is not None

    @property
    def waiting(self) -> bool:
        """Whether none is in use, and a sender has proven itself that has nothing to send yet."""
        return self._conn is None and bool(self._waiting)

    def welcome(self, hello: dict[str, Any]) -> dict[str, Any]:
        """What to answer a dialer, who hasn't proven itself yet."""
        try:
            return self.receiver.welcome(hello)
        except Fenced:
            self.fenced += 1
            raise
        except ProtocolError as exc:
            raise HandshakeError(str(exc)) from exc

    async def serve(self, raw: Connection, epoch: int, first: list[Frame], *, dialled: bool = False) -> None:
        """Read a proven connection until it ends. Raises why it did: `TransportError`, `ProtocolError` or `Fenced`.

        `dialled` from this side: the sender can't make another one when this has broken without a sign. So it ends
        when the sender, who asks at least every `SILENCE` seconds, isn't heard any more.
        """
        self._admit(epoch)  # a newer sender may have been announced since the welcome
        line = _Line(epoch, raw, shaped(raw, self._shape_for(epoch), self._clock), self._clock.now())
        self._waiting.append(line)
        if len(self._waiting) > MOST_WAITING:
            oldest = min(self._waiting, key=lambda waiting: waiting.epoch)
            oldest.finish(ConnectionBroken(f"link {self.receiver.link}: too many connections wait"))
        try:
            self.met()
            raw.notify(lambda: self._heard(line))
            self._heard(line, first)
            self._invite()
            if dialled:
                await first_of(_ended(line), self._miss(line))
            raise await line.end
        finally:
            line.conn.abort()
            if self._line is line:
                self._lost()
                self.reconnects += 1
                self._invite()
            elif line in self._waiting:
                self._waiting.remove(line)
            self.met()

    def flush(self) -> None:
        """Send what is due, and see to it that what is due later will be sent."""
        conn = self._conn
        if conn is None:
            return
        due = self.receiver.deadline()
        if due is None and not self.receiver.asked:
            return
        now = self._clock.now()
        if frames := self.receiver.take(now):
            try:
                conn.write(frames)
            except TransportError:
                return  # the reader of this connection sees the same and acts on it
            due = self.receiver.deadline()
        if due is None or (self._timer is not None and self._timer_at <= due):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = due
        self._timer = asyncio.get_running_loop().call_later(max(0.0, due - now), self._on_timer)

    def cut(self) -> None:
        """Break all connections, as a fault would."""
        for line in self._lines():
            line.conn.abort()

    async def _miss(self, line: _Line) -> None:
        while (left := self._heard_at(line) + GIVE_UP - self._clock.now()) > 0:
            await self._clock.sleep(left)
        raise ConnectionBroken(f"link {self.receiver.link}: the sender has been silent for {GIVE_UP:g} s")

    def _heard_at(self, line: _Line) -> float:
        return max(line.heard_at, self.receiver.arrived_at) if line is self._line else line.heard_at

    # -- connections that wait

    def _heard(self, line: _Line, first: Sequence[Frame] = ()) -> None:
        """A connection that waits has frames, or has ended. `first` are some that had been read from it before."""
        if line.end.done() or line is self._line:
            return
        line.heard_at = self._clock.now()
        try:
            arrived = [*first, *line.raw.poll()]
            for number, frame in enumerate(arrived):
                word = frames.unpack(frame)
                if isinstance(word, frames.Resume):
                    self._take_over(line)
                    self._arrived(arrived[number:])
                    self.changed()
                    return
                if isinstance(word, frames.Ping):
                    line.conn.write([frames.Pong().pack()])
                elif not isinstance(word, frames.Pong):
                    raise ProtocolError(f"link {self.receiver.link}: {type(word).__name__} before the first frame")
        except (TransportError, DeliveryError) as exc:
            line.finish(exc)

    def _take_over(self, line: _Line) -> None:
        """Hear this one from now on, and none that came before it. Raises `Fenced`."""
        self._admit(line.epoch)
        older = self._waiting[: self._waiting.index(line)]
        before = [o for o in self._waiting if o.epoch < line.epoch or (o.epoch == line.epoch and o in older)]
        self._waiting = [o for o in self._waiting if o is not line and o not in before]
        if self._line is not None:
            before.append(self._line)
            self._lost()
        for other in before:
            other.finish(ConnectionBroken(f"link {self.receiver.link}: replaced by a newer connection"))
        self.receiver.opened(line.epoch)
        self._line, self._raw, self._conn, self._end = line, line.raw, line.conn, line.end
        line.raw.notify(self._arrived, self.one)
        self.met()

    def _invite(self) -> None:
        """If nobody is heard, tell the newest that waits: it needn't spare anybody."""
        if self._line is None and self._waiting:
            newest = max(reversed(self._waiting), key=lambda line: line.epoch)
            try:
                newest.conn.write([frames.Ping().pack()])
            except TransportError:
                return  # the reader of this connection sees the same and acts on it

    def _admit(self, epoch: int) -> None:
        try:
            self.receiver.admit(epoch)
        except Fenced:
            self.fenced += 1
            raise

    # -- the connection in use

    def _arrived(self, first: Sequence[Frame] = ()) -> None:
        """The connection has frames, or has ended. `first` are some that had been read from it before."""
        line = self._line
        if line is None or self._raw is None or self._end.done():
            return
        news = False
        try:
            now = line.heard_at = self._clock.now()
            for frame in [*first, *self._raw.poll()]:
                news |= self.receiver.receive(frame, now)
        except (TransportError, DeliveryError) as exc:
            self._end.set_result(exc)
            self._raw.notify(nothing)
        if news:
            self.changed()  # first the work, then what the sender may wait for
        self.flush()

    def _on_timer(self) -> None:
        self._timer = None
        self.flush()

    def _lost(self) -> None:
        self._line = self._raw = self._conn = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.receiver.disconnected()

    # -- all of them

    def _lines(self) -> list[_Line]:
        return self._waiting if self._line is None else [*self._waiting, self._line]

    def _look_again(self) -> None:
        """End what is out of date, and shape the others."""
        for line in self._lines():
            if line.epoch < self.receiver.peer_epoch:
                line.conn.abort()
            else:
                line.conn = shaped(line.conn, self._shape_for(line.epoch), self._clock)
        if self._line is not None:
            self._conn = self._line.conn

    def _shape_for(self, epoch: int) -> Shape:
        standby, shape = self._standby
        return shape if standby and epoch >= standby else self._shape


class InPort:
    """Where an operator's connections with its neighbours come from, but for those that its outgoing links dial."""

    def __init__(self, links: dict[str, InLink], advertise: str | None = None, clock: Clock | None = None):
        """`advertise`: the host under which peers reach it, where that isn't the one it is bound to."""
        self._links = links
        self._advertise = advertise
        self._listener: Listener | None = None
        self._senders: dict[str, bytes] = {}
        self._calls = Calls(self._serve, clock or SystemClock())
        self.arrivals = Arrivals()
        """Receivers that dial this operator, for its outgoing links."""

    def sends(self, link: str, key: bytes) -> None:
        """Receivers of this outgoing link are let in."""
        self._senders[link] = key

    async def listen(self, address: str) -> str:
        """Bind `address`; the address that peers should dial. Raises `TransportError`."""
        self._listener = await registry.listen(address, self._accept, advertise=self._advertise)
        return self._listener.reachable

    def call(self, link: str, senders: Iterable[Call | Relayed]) -> None:
        """Keep connections with the senders of an incoming link that can't dial this operator, and end others."""
        self._calls.set(link, senders)

    async def close(self) -> None:
        """Stop listening and drop all connections."""
        await self._calls.close()
        if self._listener is not None:
            await self._listener.close()

    async def _accept(self, conn: Connection) -> None:
        try:
            identity, hello, rest = await shake_listener(conn, self._key_for, self._welcome, most=MAX_FRAME_BYTES)
            if identity in self._links:
                await self._links[identity].serve(conn, int(hello["epoch"]), rest)
            else:
                await self.arrivals.serve(identity.removeprefix(CALL), _epoch(hello), conn, rest)
        except (TransportError, DeliveryError):
            return  # the dialer was told where that was possible, and dials again

    async def _serve(self, link: str, conn: Connection) -> bool:
        """Talk with the sender of `link` over a connection that this side dialled. False if it came to nothing."""

        def key_for(identity: str) -> bytes | None:
            return self._links[link].key if identity == link else None

        try:
            identity, hello, rest = await shake_listener(
                conn, key_for, self._welcome, patient=True, most=MAX_FRAME_BYTES
            )
        except (TransportError, DeliveryError):
            return False
        try:
            await self._links[link].serve(conn, int(hello["epoch"]), rest, dialled=True)
        except (TransportError, DeliveryError):
            pass  # as it may end
        return True

    def _key_for(self, identity: str) -> bytes | None:
        link = self._links.get(identity)
        if link is not None:
            return link.key
        return self._senders.get(identity.removeprefix(CALL)) if identity.startswith(CALL) else None

    def _welcome(self, identity: str, hello: dict[str, Any]) -> dict[str, Any]:
        if identity not in self._links:
            _epoch(hello)
            return {}
        return self._links[identity].welcome(hello)


def _epoch(hello: dict[str, Any]) -> int:
    """The epoch of a receiver that dials its sender."""
    epoch = hello.get("receiver")
    if not isinstance(epoch, int):
        raise HandshakeError("a receiver that doesn't say which one it is")
    return epoch


async def _ended(line: _Line) -> None:
    await asyncio.wait([line.end])  # other than awaiting the future itself, this may be cancelled without ending it
    raise line.end.result()
