"""How the two ends of a link come together where the sender can't dial the receiver.

A node behind NAT can only dial out. If the sender's can be dialled, the receiver dials the sender (`Arrivals` waits
there); if neither can, both dial a relay, which passes on what flows between the two (`nomad.delivery.relay`). To both
the receiver says with the same handshake which link it is for; from then on it is as if the sender had dialled:
the link's own handshake, epochs, standing by and replay know nothing of all this.

Through a relay a link is encrypted from end to end if the relay's address says `tls://`: the way to the relay itself
is plain TCP, over which go the proof that the link's ends are its ends, and the TLS between them.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from nomad.clock import Clock
from nomad.delivery.driver import shake_dialer
from nomad.errors import DeliveryError, HandshakeError, TransportError
from nomad.tasks import Tasks
from nomad.transport import registry
from nomad.transport.address import scheme_of
from nomad.transport.base import Connection, Frame
from nomad.transport.stream import StreamConnection

CALL = "call:"
"""Before a link's name: the identity of a receiver that dials its sender."""
MEET = "meet:"
"""Before a link's name: the identity of either end towards a relay."""
GO = b"go"
"""What a relay tells a sender when the receiver is there. The receiver is told nothing: it waits for the sender."""
IN, OUT = "in", "out"
"""Which end of a link speaks to a relay."""

BACKOFF_FIRST, BACKOFF_MOST = 0.02, 2.0
"""Seconds between attempts to dial: doubled from the first to the most, with jitter."""
MOST_ARRIVED = 4
"""Receivers of one link that wait for their sender to look for them."""


class Elsewhere(Protocol):
    """A place where a receiver is found other than by dialling it."""

    async def connect(self) -> Connection:
        """A connection with the receiver. Raises `TransportError` or `DeliveryError`."""
        ...


Place = str | Elsewhere
"""Where a receiver is: an address to dial, or another way to it. Equal ones lead to the same receiver."""


async def reach(place: Place) -> Connection:
    """A connection with the receiver at `place`. Raises `TransportError` or `DeliveryError`."""
    return await (registry.connect(place) if isinstance(place, str) else place.connect())


# Towards a relay


@dataclass(frozen=True, slots=True)
class Relayed:
    """A link's two ends at a relay, from either side."""

    address: str
    key: bytes = field(repr=False)
    """Of this link, for the relay: who holds it may meet there as one of its ends."""
    link: str
    sender: int
    """Its epoch."""
    receiver: int
    """Its epoch."""

    async def connect(self) -> Connection:
        """As the sender: once the receiver is there."""
        conn = await self._enter(OUT)
        try:
            words = await conn.recv()
            if [bytes(word[0]) for word in words] != [GO]:
                raise HandshakeError(f"the relay at {self.address} doesn't speak this protocol")
            return await self._secure(conn, server=False)
        except BaseException:
            conn.abort()
            raise

    async def wait(self) -> Connection:
        """As the receiver: the sender comes when it wants to."""
        conn = await self._enter(IN)
        try:
            return await self._secure(conn, server=True)
        except BaseException:
            conn.abort()
            raise

    async def _enter(self, side: str) -> Connection:
        conn = await registry.connect(self._plain)
        try:
            hello = {"side": side, "sender": self.sender, "receiver": self.receiver}
            await shake_dialer(conn, self.key, MEET + self.link, hello)
        except BaseException:
            conn.abort()
            raise
        return conn

    async def _secure(self, conn: Connection, *, server: bool) -> Connection:
        if self._plain == self.address:
            return conn
        from nomad.transport.tls import secured

        assert isinstance(conn, StreamConnection)
        return await secured(conn, server=server)

    @property
    def _plain(self) -> str:
        """The relay's own address."""
        return f"tcp{self.address.removeprefix('tls')}" if scheme_of(self.address) == "tls" else self.address


# A sender that is dialled by its receivers


class _Arrived:
    """A receiver's connection, lent to its link: a `Connection` that says when the link is done with it."""

    def __init__(self, conn: Connection) -> None:
        self._conn = conn
        self.over = asyncio.Event()
        # What is called for each batch goes straight through.
        self.write, self.poll, self.recv, self.drain = conn.write, conn.poll, conn.recv, conn.drain
        self.notify, self.limit, self.direct = conn.notify, conn.limit, conn.direct
        self._waiting = asyncio.create_task(self._wait(), name=f"a receiver at {conn.peer}")

    def taken(self) -> None:
        """From now on the link reads it."""
        self._waiting.cancel()

    async def _wait(self) -> None:
        """It may only wait, or end."""
        try:
            await self._conn.recv()
        except TransportError:
            pass
        self.over.set()

    @property
    def writable(self) -> bool:
        return self._conn.writable

    @property
    def closed(self) -> bool:
        return self._conn.closed

    @property
    def local(self) -> str:
        return self._conn.local

    @property
    def peer(self) -> str:
        return self._conn.peer

    def abort(self) -> None:
        self._conn.abort()
        self.over.set()

    async def close(self) -> None:
        await self._conn.close()
        self.over.set()


class Arrivals:
    """Receivers that have dialled this process, until the links that are to send to them take them."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[str, int], _Arrived] = {}
        """By link and the receiver's epoch."""
        self._taken: dict[tuple[str, int], _Arrived] = {}
        self._news = asyncio.Event()

    async def serve(self, link: str, epoch: int, conn: Connection, rest: list[Frame]) -> None:
        """Keep a proven receiver's connection for as long as it lasts. It takes the place of an earlier one."""
        if rest:
            raise HandshakeError(f"link {link}: a receiver talks before its sender does")
        key, arrived = (link, epoch), _Arrived(conn)
        for known in (self._waiting, self._taken):
            if before := known.get(key):
                before.abort()
        waiting = [other for other in self._waiting if other[0] == link and other != key]
        if len(waiting) >= MOST_ARRIVED:
            self._waiting[min(waiting)].abort()
        self._waiting[key] = arrived
        self._news.set()
        try:
            await arrived.over.wait()
        finally:
            arrived.taken()
            for known in (self._waiting, self._taken):
                if known.get(key) is arrived:
                    del known[key]

    async def take(self, link: str, epoch: int) -> Connection:
        """The connection of the receiver of this epoch, once there is one."""
        key = link, epoch
        while (arrived := self._waiting.pop(key, None)) is None or arrived.over.is_set():
            self._news.clear()
            await self._news.wait()
        self._taken[key] = arrived
        arrived.taken()
        return arrived


@dataclass(frozen=True, slots=True)
class Arriving:
    """The receiver of this epoch dials this process."""

    arrivals: Arrivals = field(repr=False, compare=False)
    link: str
    epoch: int

    async def connect(self) -> Connection:
        return await self.arrivals.take(self.link, self.epoch)


# A receiver that dials


@dataclass(frozen=True, slots=True)
class Call:
    """A sender that a receiver has to go to."""

    address: str
    key: bytes = field(repr=False)
    """The link's own."""
    link: str
    receiver: int
    """This side's epoch."""

    async def wait(self) -> Connection:
        """A connection over which the sender begins to speak when it wants to."""
        conn = await registry.connect(self.address)
        try:
            await shake_dialer(conn, self.key, CALL + self.link, {"receiver": self.receiver})
        except BaseException:
            conn.abort()
            raise
        return conn


class Calls:
    """The connections that an operator's incoming links have to make themselves; made again whenever they end."""

    def __init__(self, serve: Callable[[str, Connection], Awaitable[bool]], clock: Clock) -> None:
        """`serve` talks with the sender over a link's new connection until that ends: whether it came so far."""
        self._serve = serve
        self._clock = clock
        self._tasks = Tasks()
        self._made: dict[Call | Relayed, asyncio.Task[Any]] = {}
        self.last_error: str | None = None

    def set(self, link: str, wanted: Iterable[Call | Relayed]) -> None:
        """Where the senders of a link are: connections to others end."""
        places = set(wanted)
        for place in [place for place in self._made if place.link == link and place not in places]:
            self._made.pop(place).cancel()
        for place in places - self._made.keys():
            self._made[place] = self._tasks.start(self._keep(place), name=f"link {link}, to its sender")

    async def close(self) -> None:
        await self._tasks.close()

    async def _keep(self, place: Call | Relayed) -> None:
        backoff = BACKOFF_FIRST
        while True:
            greeted = False
            try:
                conn = await place.wait()
                try:
                    greeted = await self._serve(place.link, conn)
                finally:
                    conn.abort()
            except (TransportError, DeliveryError) as exc:
                self.last_error = f"{type(exc).__name__}: {exc}"
            backoff = BACKOFF_FIRST if greeted else min(BACKOFF_MOST, backoff * 2)
            await self._clock.sleep(backoff * random.uniform(0.5, 1.0))
