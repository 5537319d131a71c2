"""Data links on real connections: dials, listens, shakes hands, pumps frames. The only file of delivery that awaits.

`OutLink` owns a `Sender` and dials until it is closed; `InPort` listens for all links of an operator and
hands each connection to its `InLink`, which owns a `Receiver`. Their owner (`nomad.actor`) is told through a
callback when there is something to do, and calls `flush` after it did something. Everything of one operator's links
happens in one event loop. Nothing here runs per message: the unit is the batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from nomad.clock import Clock
from nomad.control import Shape
from nomad.delivery import handshake
from nomad.delivery.receiver import Receiver
from nomad.delivery.sender import Sender
from nomad.errors import ConnectionBroken, DeliveryError, Fenced, HandshakeError, ProtocolError, TransportError
from nomad.transport import registry
from nomad.transport.base import Connection, Frame, Listener
from nomad.transport.shaping import ShapedConnection

HANDSHAKE_TIMEOUT = 10.0
"""Seconds for all messages of a handshake."""

BACKOFF_FIRST, BACKOFF_MOST = 0.02, 2.0
"""Seconds between attempts to dial: doubled from the first to the most, with jitter."""

FLUSH_BYTES = 256 * 1024
"""Bytes handed to a connection in one write: enough to share a system call, little enough to stay fair."""


async def shake_dialer(
    conn: Connection, key: bytes, identity: str, hello: dict[str, Any], timeout: float = HANDSHAKE_TIMEOUT
) -> dict[str, Any]:
    """Prove `identity` on a new connection; the listener's welcome.

    Raises `HandshakeError`, `Fenced` or `TransportError`.
    """
    dialer = handshake.Dialer(key, identity, hello)
    async with _deadline(timeout):
        conn.write([dialer.start()])
        confirm, welcome = dialer.receive(await _one(conn))
        conn.write([confirm])
    return welcome


async def shake_listener(
    conn: Connection,
    key_for: Callable[[str], bytes | None],
    welcome: Callable[[str, dict[str, Any]], dict[str, Any]],
    timeout: float = HANDSHAKE_TIMEOUT,
) -> tuple[str, dict[str, Any], list[Frame]]:
    """Greet a dialer: its proven identity, its hello, and frames that came right behind the handshake.

    `key_for` gives the key of an identity or None; `welcome` what to answer, and may raise `Fenced`.
    Raises `HandshakeError`, `Fenced` or `TransportError` after it told the dialer.
    """
    listener = handshake.Listener()
    async with _deadline(timeout):
        try:
            identity, hello = listener.identify(await _one(conn))
            key = key_for(identity)
            if key is None:
                raise HandshakeError("the listener doesn't know this identity or key")
            conn.write([listener.welcome(key, welcome(identity, hello))])
            confirm, *rest = await conn.recv()
            listener.confirm(confirm)
        except (HandshakeError, Fenced) as exc:
            conn.write([handshake.refusal(str(exc), fenced=isinstance(exc, Fenced))])
            await conn.close()
            raise
    return identity, hello, rest


def _nothing() -> None:
    """What is called when nobody wants to know."""


class OutLink:
    """The sending end of a link: dials its peer, and again whenever the connection is lost, until closed."""

    def __init__(self, sender: Sender, key: bytes, clock: Clock, changed: Callable[[], None] = _nothing):
        self.sender = sender
        self.changed = changed
        """Called when something was acknowledged, and after the connection has come back."""
        self.reconnects = 0
        self.fenced = 0
        """Receivers refused for an old epoch, and refusals that this side was given for being old."""
        self.last_error: str | None = None
        self._key = key
        self._clock = clock
        self._address: str | None = None
        self._shape = Shape()
        self._conn: Connection | None = None
        """What is written to: the connection, or an emulated link around it."""
        self._raw: Connection | None = None
        """What is read from, until it has ended."""
        self._end: asyncio.Future[Exception]
        """Why the present connection ended."""
        self._moved = asyncio.Event()
        """Set when the peer is elsewhere, or another instance: what is under way with the old one ends."""
        self._clogged = asyncio.Event()

    def set_peer(self, address: str | None, epoch: int, shape: Shape) -> None:
        """Where the receiver is, the least epoch that may be heard, and how an emulated link treats the data.

        A changed address or a newer epoch ends the present connection; the same ones don't.
        """
        moved = address != self._address or epoch > self.sender.peer_epoch
        self.sender.expect(epoch)
        self._address, self._shape = address, shape
        if moved:
            self.cut()
            self._moved.set()
        elif self._conn is not None:
            self._conn = _shaped(self._conn, shape, self._clock)

    async def run(self) -> None:
        """Connect and pump until cancelled."""
        backoff = BACKOFF_FIRST
        while True:
            self._moved.clear()
            if self._address is None:
                await self._moved.wait()
                continue
            before = self.reconnects
            try:
                await _first(self._connection(self._address), self._moved.wait())
            except (TransportError, DeliveryError) as exc:
                self.last_error = f"{type(exc).__name__}: {exc}"
                self.fenced += isinstance(exc, Fenced)
            backoff = BACKOFF_FIRST if self.reconnects > before else min(BACKOFF_MOST, backoff * 2)
            await _first(self._clock.sleep(backoff * random.uniform(0.5, 1.0)), self._moved.wait())

    def flush(self) -> None:
        """Hand the connection what it may have now."""
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
        self._clogged.set()

    @property
    def connected(self) -> bool:
        """Whether a connection stands and the peer is known."""
        return self._conn is not None

    def cut(self) -> None:
        """Break the present connection, as a fault would."""
        if self._conn is not None:
            self._conn.abort()

    async def _connection(self, address: str) -> None:
        """One connection from dial to end; counted in `reconnects` when it had been agreed."""
        raw = await registry.connect(address)
        conn = _shaped(raw, self._shape, self._clock)
        agreed = False
        self._end = asyncio.get_running_loop().create_future()
        try:
            self.sender.connected()
            welcome = await shake_dialer(conn, self._key, self.sender.link, self.sender.hello())
            self.sender.welcomed(welcome, self._clock.now())
            agreed, self.last_error = True, None
            self._conn = conn
            self.changed()
            self.flush()
            self._raw = raw
            raw.notify(self._arrived)
            self._arrived()
            await _first(self._ended(), self._unclog(), self._watch())
        finally:
            self._raw = None
            conn, self._conn = self._conn or conn, None
            self.sender.disconnected()
            self.reconnects += agreed
            conn.abort()

    def _arrived(self) -> None:
        """The connection has frames, or has ended."""
        if self._raw is None or self._end.done():
            return
        try:
            frames = self._raw.poll()
            now = self._clock.now()
            freed = False
            for frame in frames:
                freed |= self.sender.receive(frame, now)
        except (TransportError, DeliveryError) as exc:
            self._end.set_result(exc)
            return
        self.flush()
        if freed:
            self.changed()

    async def _ended(self) -> None:
        raise await self._end

    async def _unclog(self) -> None:
        while self._conn is not None:
            await self._clogged.wait()
            self._clogged.clear()
            await self._conn.drain()
            self.flush()
            self.changed()

    async def _watch(self) -> None:
        """Ask a silent peer whether it is there; give up on one that doesn't answer."""
        while (when := self.sender.deadline()) is not None:
            await self._clock.sleep(max(0.0, when - self._clock.now()))
            if not self.sender.tick(self._clock.now()):
                raise ConnectionBroken(f"link {self.sender.link}: the peer has been silent for too long")
            self.flush()


class InLink:
    """The receiving end of a link. Connections are brought by `InPort`; the newest of the newest epoch is the one."""

    def __init__(self, receiver: Receiver, key: bytes, clock: Clock, changed: Callable[[], None] = _nothing):
        self.receiver = receiver
        self.changed = changed
        """Called when a batch has arrived."""
        self.key = key
        self.fenced = 0
        self.reconnects = 0
        self._clock = clock
        self._shape = Shape()
        self._raw: Connection | None = None
        self._conn: Connection | None = None
        """What is written to: the connection, or an emulated link around it."""
        self._end: asyncio.Future[Exception]
        """Why the present connection ended."""
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0

    def set_peer(self, epoch: int, shape: Shape) -> None:
        """The least epoch of the sender that may be heard, and how an emulated link treats acknowledgements."""
        stale = epoch > self.receiver.peer_epoch
        self.receiver.expect(epoch)
        self._shape = shape
        if self._conn is not None:
            if stale:
                self._conn.abort()
            else:
                self._conn = _shaped(self._conn, shape, self._clock)

    def welcome(self, hello: dict[str, Any]) -> dict[str, Any]:
        """What to answer a dialer, who hasn't proven itself yet."""
        try:
            return self.receiver.welcome(hello)
        except Fenced:
            self.fenced += 1
            raise
        except ProtocolError as exc:
            raise HandshakeError(str(exc)) from exc

    def _admit(self, epoch: int) -> None:
        try:
            self.receiver.admit(epoch)
        except Fenced:
            self.fenced += 1
            raise

    async def serve(self, raw: Connection, epoch: int, first: list[Frame]) -> None:
        """Read a proven connection until it ends. Raises why it did: `TransportError`, `ProtocolError` or `Fenced`."""
        self._admit(epoch)  # a newer sender may have been announced since the welcome
        if self._raw is not None:
            if not self._end.done():
                self._end.set_result(ConnectionBroken(f"link {self.receiver.link}: replaced by a newer connection"))
            self.cut()
            self._lost()
        self.receiver.opened(epoch)
        self._raw, self._conn = raw, _shaped(raw, self._shape, self._clock)
        self._end = end = asyncio.get_running_loop().create_future()
        try:
            raw.notify(self._arrived)
            self._arrived(first)
            raise await end
        finally:
            if self._raw is raw:
                self._conn.abort()
                self._lost()
                self.reconnects += 1

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

    @property
    def connected(self) -> bool:
        """Whether a connection stands."""
        return self._conn is not None

    def cut(self) -> None:
        """Break the present connection, as a fault would."""
        if self._conn is not None:
            self._conn.abort()

    def _arrived(self, first: Sequence[Frame] = ()) -> None:
        """The connection has frames, or has ended. `first` are some that had been read from it before."""
        if self._raw is None or self._end.done():
            return
        news = False
        try:
            now = self._clock.now()
            for frame in [*first, *self._raw.poll()]:
                news |= self.receiver.receive(frame, now)
        except (TransportError, DeliveryError) as exc:
            self._end.set_result(exc)
        if news:
            self.changed()  # first the work, then what the sender may wait for
        self.flush()

    def _on_timer(self) -> None:
        self._timer = None
        self.flush()

    def _lost(self) -> None:
        self._raw = self._conn = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.receiver.disconnected()


class InPort:
    """Where an operator listens for all its incoming links."""

    def __init__(self, links: dict[str, InLink]):
        self._links = links
        self._listener: Listener | None = None

    async def listen(self, address: str) -> str:
        """Bind `address`; the address that peers should dial. Raises `TransportError`."""
        self._listener = await registry.listen(address, self._accept)
        return self._listener.reachable

    async def close(self) -> None:
        """Stop listening and drop all connections."""
        if self._listener is not None:
            await self._listener.close()

    async def _accept(self, conn: Connection) -> None:
        try:
            identity, hello, rest = await shake_listener(conn, self._key_for, self._welcome)
            await self._links[identity].serve(conn, int(hello["epoch"]), rest)
        except (TransportError, DeliveryError):
            return  # the dialer was told where that was possible, and dials again

    def _key_for(self, identity: str) -> bytes | None:
        link = self._links.get(identity)
        return link.key if link is not None else None

    def _welcome(self, identity: str, hello: dict[str, Any]) -> dict[str, Any]:
        return self._links[identity].welcome(hello)


def _shaped(conn: Connection, shape: Shape, clock: Clock) -> Connection:
    """What to write to: `conn` itself until an emulated link is asked for, which then stays around it."""
    if isinstance(conn, ShapedConnection):
        conn.set_shape(shape)
        return conn
    return conn if shape == Shape() else ShapedConnection(conn, shape, clock=clock)


async def _one(conn: Connection) -> Frame:
    frames = await conn.recv()
    if len(frames) != 1:
        raise HandshakeError("the peer talks before the handshake is over")
    return frames[0]


async def _first(*jobs: Awaitable[object]) -> None:
    """Run jobs until the first ends or fails; cancel the others and wait for them; raise the first failure."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


@contextlib.asynccontextmanager
async def _deadline(seconds: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as exc:
        raise HandshakeError(f"no handshake within {seconds} s") from exc
