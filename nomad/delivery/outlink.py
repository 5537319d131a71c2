"""The sending end of a data link on real connections: dials, shakes hands, pumps frames.

`OutLink` owns a `Sender` and dials until it is closed. Its owner (`nomad.actor`) is told through a callback when there
is something to do, and calls `flush` after it did something. While the receiver moves, the link keeps a second
connection, to the receiver's next instance, over which nothing goes but the handshake and what keeps it alive, until
`set_peer` names that instance.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nomad.clock import Clock
from nomad.control import Shape
from nomad.delivery import frames
from nomad.delivery.driver import first_of, nothing, shake_dialer, shaped
from nomad.delivery.meeting import Place, reach
from nomad.delivery.sender import GIVE_UP, SILENCE, Sender, Tail, read_welcome
from nomad.errors import ConnectionBroken, DeliveryError, Fenced, ProtocolError, TransportError
from nomad.tasks import Tasks
from nomad.transport.base import Connection, Writer

BACKOFF_FIRST, BACKOFF_MOST = 0.02, 2.0
"""Seconds between attempts to dial: doubled from the first to the most, with jitter."""

TAIL_SECONDS = 2.0
"""For so long a receiver that was left for its next instance goes on getting what is new, if it isn't ended before.

The next one needs less to catch up, or the move takes a pause.
"""

FLUSH_BYTES = 256 * 1024
"""Bytes handed to a connection in one write: enough to share a system call, little enough to stay fair."""


@dataclass(eq=False, slots=True)
class _Line:
    """A connection with a receiver that hands were shaken with."""

    place: Place
    epoch: int
    welcome: dict[str, Any]
    raw: Connection
    """What is read from."""
    conn: Connection
    """What is written to: the connection, or an emulated link around it."""
    heard_at: float
    """While it stands by."""
    end: asyncio.Future[Exception] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """Why it ended."""
    parting: bool = False
    """Not used any more, but what was written is still to arrive."""


@dataclass(frozen=True, slots=True)
class _Standby:
    """Where the receiver's next instance is."""

    place: Place
    epoch: int
    shape: Shape = field(compare=False)


class OutLink:
    """The sending end of a link: dials its peer, and again whenever the connection is lost, until closed."""

    def __init__(self, sender: Sender, key: bytes, clock: Clock, changed: Callable[[], None] = nothing):
        self.sender = sender
        self.changed = changed
        """Called when something was acknowledged, and after the connection has come back."""
        self.met: Callable[[], None] = nothing
        """Called when the peer, or its next instance, was greeted or lost."""
        self.threaded = False
        """Another thread wants to send, too."""
        self.reconnects = 0
        self.fenced = 0
        """Receivers refused for an old epoch, and refusals that this side was given for being old."""
        self.lock = threading.RLock()
        """Held by who sends, and by who changes what sending needs: a source's thread may send by itself."""
        self.last_error: str | None = None
        self._key = key
        self._clock = clock
        self._place: Place | None = None
        self._shape = Shape()
        self._line: _Line | None = None
        """The connection in use. The three below are of it, for the sake of what is called for each batch."""
        self._conn: Connection | None = None
        self._raw: Connection | None = None
        self._end: asyncio.Future[Exception]
        self.ready: Connection | None = None
        """What one message may be written to (`Sender.send_one`): the connection in use, if nobody else gets it."""
        self.direct: Writer | None = None
        """The same for another thread than the loop's, which has to hold `lock`."""
        self._moved = asyncio.Event()
        """Set when the peer is elsewhere, or another instance: what is under way with the old one ends."""
        self._clogged = asyncio.Event()
        self._wanted: _Standby | None = None
        """The next instance of the peer, to be greeted before it is needed."""
        self._standby: _Line | None = None
        self._standby_moved = asyncio.Event()
        self._greetings = 0
        """How often hands were shaken with a next instance."""
        self._tail: tuple[Tail, _Line] | None = None
        """The receiver that was left last, while it still gets what is new."""
        self._partings = Tasks()

    def set_peer(self, place: Place | None, epoch: int, shape: Shape) -> None:
        """Where the receiver is, the least epoch that may be heard, and how an emulated link treats the data.

        A changed place or a newer epoch ends the present connection; the same ones don't. If that is the instance
        that was greeted beforehand, its connection is the link's at once.
        """
        with self.lock:
            self._set_peer(place, epoch, shape)

    def _set_peer(self, place: Place | None, epoch: int, shape: Shape) -> None:
        moved = place != self._place or epoch > self.sender.peer_epoch
        self.sender.expect(epoch)
        self._place, self._shape = place, shape
        if not moved:
            if self._line is not None:
                self._conn = self._line.conn = shaped(self._line.conn, shape, self._clock)
                self._find_ways()
            return
        self._moved.set()
        old, new = self._line, self._standby
        if new is None or new.place != place or new.epoch < self.sender.peer_epoch or new.end.done():
            self.cut()
            return
        if old is not None:
            old.parting = True
            self._tail = self.sender.tail(), old
            self._partings.start(self._part(*self._tail), name=f"link {self.sender.link}, the connection before")
        self._leave()
        self.set_standby(None, 0, shape)
        new.conn = shaped(new.conn, shape, self._clock)
        self.sender.connected()
        self._use(new)

    def set_standby(self, place: Place | None, epoch: int, shape: Shape) -> None:
        """Where the receiver's next instance is, its epoch, and how an emulated link to it treats the data.

        None: there is none.
        """
        known = place == self._place and epoch <= self.sender.peer_epoch
        before, self._wanted = self._wanted, None if place is None or known else _Standby(place, epoch, shape)
        if self._wanted != before:
            self._standby = None
            self._standby_moved.set()
            self.met()
        elif self._standby is not None:
            self._standby.conn = shaped(self._standby.conn, shape, self._clock)

    @property
    def peers(self) -> tuple[int, int]:
        """Epochs of the receiver that was greeted and is sent to, and of its next instance if greeted; 0 is none."""
        line, standby = self._line, self._standby
        return line.epoch if line is not None else 0, standby.epoch if standby is not None else 0

    @property
    def connected(self) -> bool:
        """Whether a connection stands and the peer is known."""
        return self._conn is not None

    async def run(self) -> None:
        """Connect and pump until cancelled."""
        try:
            await first_of(self._keep(), self._keep_standby())
        finally:
            await self._partings.close()

    def flush(self) -> None:
        """Hand the connection what it may have now."""
        with self.lock:
            conn = self._conn
            if conn is None:
                return
            while conn.writable:
                frames = self.sender.take(self._clock.now(), FLUSH_BYTES)
                if not frames:
                    return
                try:
                    conn.write(frames)
                except TransportError:
                    return  # the reader of this connection sees the same and acts on it
                if self._tail is not None:
                    self._send_tail(*self._tail)
            self._clogged.set()

    def cut(self) -> None:
        """Break the present connection, as a fault would."""
        if self._conn is not None:
            self._conn.abort()

    # -- the connection in use

    def _find_ways(self) -> None:
        self.ready = self._conn if self._tail is None else None
        self.direct = self.ready.direct() if self.ready is not None and self.threaded else None

    async def _keep(self) -> None:
        """Have a connection that messages go over, whenever that is possible."""
        backoff = BACKOFF_FIRST
        while True:
            self._moved.clear()
            if self._line is None and self._place is None:
                await self._moved.wait()
                continue
            before = self.reconnects
            try:
                await first_of(self._connection(), self._moved.wait())
            except (TransportError, DeliveryError) as exc:
                self._failed(exc)
            backoff = BACKOFF_FIRST if self.reconnects > before else min(BACKOFF_MOST, backoff * 2)
            await first_of(self._pause(backoff), self._moved.wait())

    async def _connection(self) -> None:
        """One connection to its end, from where it is: dialed now, or greeted beforehand."""
        line = self._line
        if line is None:
            line = await self._dial()
        try:
            await first_of(_ended(line), self._unclog(line), self._watch())
        finally:
            if self._line is line:
                self._leave()
            if not line.parting:
                line.conn.abort()

    async def _dial(self) -> _Line:
        assert self._place is not None
        raw = await reach(self._place)
        line = None
        try:
            self._check_here()
            self.sender.connected()
            line = await self._greet(raw, self._place, self._shape)
            self._check_here()
            self._use(line)
        except BaseException:
            if self._line is None or self._line is line:
                self._leave()
            raw.abort()
            raise
        return line

    def _check_here(self) -> None:
        if self._moved.is_set():  # and another connection may be in use already
            raise ConnectionBroken(f"link {self.sender.link}: the peer has moved")

    async def _greet(self, raw: Connection, place: Place, shape: Shape) -> _Line:
        """Shake hands. Raises `TransportError` or `DeliveryError`, and leaves nothing behind then."""
        conn = shaped(raw, shape, self._clock)
        try:
            body = await shake_dialer(conn, self._key, self.sender.link, self.sender.hello())
            epoch = read_welcome(self.sender.link, body).epoch
        except BaseException:
            conn.abort()
            raise
        return _Line(place, epoch, body, raw, conn, self._clock.now())

    def _use(self, line: _Line) -> None:
        """From now on messages go over this connection. Raises `Fenced`."""
        with self.lock:
            self.sender.welcomed(line.welcome, self._clock.now())
            self.last_error = None
            self._line, self._conn, self._raw, self._end = line, line.conn, line.raw, line.end
            self._find_ways()
        line.raw.notify(self._arrived)
        self.changed()
        self.flush()
        self.met()
        self._arrived()

    def _leave(self) -> None:
        """The connection in use isn't any more."""
        with self.lock:
            self.reconnects += self._line is not None
            self._line = self._conn = self._raw = None
            self._find_ways()
            self.sender.disconnected()
        self.met()

    def _arrived(self) -> None:
        """The connection has frames, or has ended."""
        if self._raw is None or self._end.done():
            return
        try:
            frames = self._raw.poll()
            now = self._clock.now()
            freed = False
            with self.lock:
                for frame in frames:
                    freed |= self.sender.receive(frame, now)
        except (TransportError, DeliveryError) as exc:
            self._end.set_result(exc)
            return
        self.flush()
        if freed:
            self.changed()

    async def _unclog(self, line: _Line) -> None:
        while self._line is line:
            await self._clogged.wait()
            self._clogged.clear()
            await line.conn.drain()
            self.flush()
            self.changed()

    async def _watch(self) -> None:
        """Ask a silent peer whether it is there; give up on one that doesn't answer."""
        while (when := self.sender.deadline()) is not None:
            await self._clock.sleep(max(0.0, when - self._clock.now()))
            with self.lock:
                alive = self.sender.tick(self._clock.now())
            if not alive:
                raise ConnectionBroken(f"link {self.sender.link}: the peer has been silent for too long")
            self.flush()

    # -- the connection that stands by

    async def _keep_standby(self) -> None:
        """Have a connection to the peer's next instance, while there is one to come."""
        backoff = BACKOFF_FIRST
        while True:
            self._standby_moved.clear()
            wanted = self._wanted
            if wanted is None:
                await self._standby_moved.wait()
                continue
            before = self._greetings
            try:
                await first_of(self._stand_by(wanted), self._standby_moved.wait())
            except (TransportError, DeliveryError) as exc:
                self._failed(exc)
            backoff = BACKOFF_FIRST if self._greetings > before else min(BACKOFF_MOST, backoff * 2)
            await first_of(self._pause(backoff), self._standby_moved.wait())

    async def _stand_by(self, wanted: _Standby) -> None:
        """Greet the next instance, and keep the connection until it is used or not wanted any more."""
        raw = await reach(wanted.place)
        line = await self._greet(raw, wanted.place, wanted.shape)
        try:
            if line.epoch < wanted.epoch:
                raise Fenced(f"link {self.sender.link}: the next receiver is of epoch {line.epoch}, not {wanted.epoch}")
            if self._wanted != wanted:
                return
            line.conn = shaped(line.conn, self._wanted.shape, self._clock)
            self._standby = line
            self._greetings += 1
            raw.notify(lambda: self._heard(line))
            self.met()
            await first_of(_ended(line), self._ask(line))
        finally:
            if self._standby is line:
                self._standby = None
                self.met()
            if self._line is not line:
                line.conn.abort()

    def _heard(self, line: _Line) -> None:
        """The connection that stands by has frames, or has ended."""
        if line.end.done():
            return
        try:
            for frame in line.raw.poll():
                word = frames.unpack(frame)
                if isinstance(word, frames.Ping):
                    line.conn.write([frames.Pong().pack()])
                elif not isinstance(word, frames.Pong):
                    raise ProtocolError(f"link {self.sender.link}: {type(word).__name__} before the first frame")
            line.heard_at = self._clock.now()
        except (TransportError, DeliveryError) as exc:
            line.end.set_result(exc)

    async def _ask(self, line: _Line) -> None:
        """Nothing else goes over it, so ask all the time."""
        while self._clock.now() < line.heard_at + GIVE_UP:
            with self.lock:
                if self._line is line:  # it is in use by now
                    return
                line.conn.write([frames.Ping().pack()])
            await self._clock.sleep(SILENCE)
        raise ConnectionBroken(f"link {self.sender.link}: the peer's next instance has been silent for too long")

    # -- the connection before

    def _send_tail(self, tail: Tail, line: _Line) -> None:
        try:
            if line.conn.writable:
                line.conn.write(tail.take())
        except TransportError:
            self._tail = None
            self._find_ways()

    async def _part(self, tail: Tail, line: _Line) -> None:
        """Leave a connection: not heard any more, and closed when the time is up and all has arrived."""
        line.raw.notify(lambda: _ignore(line))
        try:
            await first_of(asyncio.wait([line.end]), self._clock.sleep(TAIL_SECONDS))
            with self.lock:
                if self._tail == (tail, line):
                    self._tail = None
                    self._find_ways()
            await line.conn.close()
        finally:
            line.conn.abort()

    # -- both

    def _failed(self, exc: Exception) -> None:
        self.last_error = f"{type(exc).__name__}: {exc}"
        self.fenced += isinstance(exc, Fenced)

    async def _pause(self, seconds: float) -> None:
        await self._clock.sleep(seconds * random.uniform(0.5, 1.0))


def _ignore(line: _Line) -> None:
    """Take what arrives, and look whether the connection has ended."""
    try:
        line.raw.poll()
    except TransportError as exc:
        if not line.end.done():
            line.end.set_result(exc)


async def _ended(line: _Line) -> None:
    await asyncio.wait([line.end])  # other than awaiting the future itself, this may be cancelled without ending it
    raise line.end.result()
