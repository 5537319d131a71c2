"""One node's end of active measurements: times probes to other nodes, and answers theirs. Knows no policy.

Whether and when to probe is `survey`'s business, within the limits of `probes`; the book isn't known here. Agents
prove to each other with a key that they belong to the same cluster, as operators do on data links. On emulated
clusters an agent's connections are slowed down as data links are, and it measures what they measure.

A probe is a frame of kind 1 and a number of eight bytes, answered at once by the same with kind 2. A transfer is a
frame of kind 3 with the number and a payload as its part, answered the same way once it has arrived as a whole. The
probe goes ahead of the transfer: what that takes longer is the time for its bytes.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from nomad.clock import Clock
from nomad.control import Shape
from nomad.delivery.driver import shake_dialer, shake_listener, shaped
from nomad.errors import ConnectionBroken, DeliveryError, NomadError, TransportError
from nomad.transport import registry
from nomad.transport.base import Connection, Frame, Listener

log = logging.getLogger(__name__)

PROBE, ANSWER, TRANSFER = 1, 2, 3
_HEAD = struct.Struct("<BQ")

TIMEOUT = 10.0
"""Seconds until a probe has failed: no link that is of any use takes as long."""

NEXT_SECONDS = 0.1
"""Of several round trips each is begun when the one before it is over, or has taken so long."""

IDLE_SECONDS = 15.0
"""A connection that hasn't been used for so long is closed."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What came of one."""

    round_trip: float
    """Seconds."""
    transfer: float | None
    """Seconds that the link was busy with the payload; None without one."""


class Visits(Protocol):
    """Others that dial an agent, and call themselves by a name of their own kind."""

    prefix: str
    """What their names begin with."""

    def key_for(self, name: str) -> bytes: ...

    async def visited(self, name: str, conn: Connection, frames: list[Frame]) -> None:
        """One has proved to be `name`, and said `frames` already. The connection ends when this returns.

        Raises `TransportError`, or `ValueError` for what isn't understood.
        """
        ...


@dataclass(slots=True)
class _Peer:
    raw: Connection
    conn: Connection
    """What is written to: an emulated link around `raw`, or `raw`."""
    used_at: float
    waiting: dict[int, asyncio.Future[float]] = field(default_factory=dict)


class Agent:
    """`listen` first, `close` last. `shape` says how the way to a node is emulated now."""

    def __init__(
        self,
        node: str,
        key: bytes,
        clock: Clock,
        shape: Callable[[str], Shape] = lambda node: Shape(),
        visits: Sequence[Visits] = (),
    ):
        """`visits` have those dial in, too, that are no agents."""
        self.node = node
        self._visits = visits
        self._key = key
        self._clock = clock
        self._shape = shape
        self._listener: Listener | None = None
        self._peers: dict[str, _Peer] = {}
        self._readers: dict[str, asyncio.Task[None]] = {}
        self._numbers = itertools.count(1)

    async def listen(self, address: str, advertise: str | None = None) -> str:
        """Where other agents reach this one. Raises `TransportError`."""
        self._listener = await registry.listen(address, self._serve, advertise=advertise)
        return self._listener.reachable

    def connected(self, node: str) -> bool:
        """Whether the next probe of `node` needs no handshake."""
        return node in self._peers

    async def probe(self, node: str, address: str, nbytes: int = 0) -> Probe:
        """Time the way to `node` and back, and a payload of `nbytes`. Raises `NomadError` when it isn't reached."""
        try:
            async with asyncio.timeout(TIMEOUT):
                peer = self._peers.get(node) or await self._connect(node, address)
                return await self._probe(node, peer, nbytes)
        except TimeoutError as exc:
            self._drop(node)
            raise ConnectionBroken(f"the agent of {node} at {address} hasn't answered for {TIMEOUT:g} s") from exc

    async def round_trips(self, ways: Sequence[tuple[str, str]]) -> list[float | None]:
        """Time the ways to several nodes, each with its address, and back; None for those that aren't reached.

        All are connected to before the first is timed, and hardly two are timed together: what this process does
        for one, handshakes most of all, would count as a part of another's round trip. Takes up to twice `TIMEOUT`.
        """
        await asyncio.gather(*(self._meet(node, address) for node, address in ways))
        async with asyncio.TaskGroup() as group:
            timed = []
            for node, address in ways:
                timed.append(group.create_task(self._round_trip(node, address)))
                await asyncio.wait(timed[-1:], timeout=NEXT_SECONDS)
        return [task.result() for task in timed]

    async def close(self) -> None:
        """End all connections."""
        for node in list(self._peers):
            self._drop(node)
        if self._readers:
            await asyncio.wait(self._readers.values())
        if self._listener is not None:
            await self._listener.close()

    def close_idle(self) -> None:
        """End the connections that haven't been used for a while."""
        now = self._clock.now()
        for node, peer in list(self._peers.items()):
            if now - peer.used_at > IDLE_SECONDS and not peer.waiting:
                self._drop(node)

    # -- asking

    async def _meet(self, node: str, address: str) -> None:
        """Connect to it, if that can be done."""
        try:
            async with asyncio.timeout(TIMEOUT):
                peer = self._peers.get(node) or await self._connect(node, address)
                peer.used_at = self._clock.now()
        except (NomadError, TimeoutError) as exc:
            log.debug("%s isn't reached: %r", node, exc)

    async def _round_trip(self, node: str, address: str) -> float | None:
        """Of one that was met."""
        try:
            return (await self.probe(node, address)).round_trip if node in self._peers else None
        except NomadError as exc:
            log.debug("%s doesn't answer: %s", node, exc)
            return None

    async def _connect(self, node: str, address: str) -> _Peer:
        raw = await registry.connect(address)
        conn = shaped(raw, self._shape(node), self._clock)
        try:
            await shake_dialer(conn, self._key, self.node, {})
        except BaseException:
            conn.abort()
            raise
        self._drop(node)
        self._peers[node] = peer = _Peer(raw, conn, self._clock.now())
        reader = asyncio.create_task(self._read(node, peer), name=f"agent {self.node} hears {node}")
        self._readers[node] = reader
        reader.add_done_callback(lambda task: self._readers.pop(node) if self._readers.get(node) is task else None)
        return peer

    async def _probe(self, node: str, peer: _Peer, nbytes: int) -> Probe:
        peer.conn = shaped(peer.conn, self._shape(node), self._clock)
        sent_at = peer.used_at = self._clock.now()
        first, second = next(self._numbers), next(self._numbers)
        loop = asyncio.get_running_loop()
        answers = [loop.create_future() for _ in range(2 if nbytes else 1)]
        peer.waiting |= dict(zip((first, second), answers, strict=False))
        frames: list[Frame] = [(_HEAD.pack(PROBE, first),)]
        if nbytes:
            frames.append((_HEAD.pack(TRANSFER, second), bytes(nbytes)))
        try:
            peer.conn.write(frames)
            times = [await answer for answer in answers]
        finally:
            for number in (first, second):
                peer.waiting.pop(number, None)
        return Probe(times[0] - sent_at, times[1] - times[0] if nbytes else None)

    async def _read(self, node: str, peer: _Peer) -> None:
        try:
            while True:
                for frame in await peer.raw.recv():
                    kind, number = _HEAD.unpack(frame[0])
                    answer = peer.waiting.get(number)
                    if kind == ANSWER and answer is not None and not answer.done():
                        answer.set_result(self._clock.now())
        except (TransportError, struct.error) as exc:
            for answer in peer.waiting.values():
                if not answer.done():
                    answer.set_exception(ConnectionBroken(f"the connection to the agent of {node} ended: {exc}"))
        finally:
            peer.raw.abort()
            peer.conn.abort()
            if self._peers.get(node) is peer:
                del self._peers[node]

    def _drop(self, node: str) -> None:
        if (peer := self._peers.pop(node, None)) is not None:
            peer.conn.abort()

    # -- answering

    def _key_for(self, name: str) -> bytes | None:
        visits = self._visits_of(name)
        return self._key if visits is None else visits.key_for(name)

    def _visits_of(self, name: str) -> Visits | None:
        return next((visits for visits in self._visits if name.startswith(visits.prefix)), None)

    async def _serve(self, raw: Connection) -> None:
        conn: Connection = raw
        try:
            node, _, frames = await shake_listener(raw, self._key_for, lambda node, hello: {})
            if (visits := self._visits_of(node)) is not None:
                await visits.visited(node, raw, frames)
                return
            while True:
                conn = shaped(conn, self._shape(node), self._clock)
                conn.write([(_HEAD.pack(ANSWER, _HEAD.unpack(frame[0])[1]),) for frame in frames])
                frames = await raw.recv()
        except (DeliveryError, struct.error, ValueError):
            return  # whoever it was, it is no agent of this cluster
        finally:
            if conn is not raw:
                conn.abort()
