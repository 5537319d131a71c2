"""The way of pods' control channels by their node's agent: what the agent does.

    pod ──tls──▶ agent ══ one trunk for all pods of the node ══▶ master

A master of thousands of pods would need 50 KB for each one's TLS. So, from some number on, it tells its pods to come by
their nodes' agents (`nomad.master.gathered`; the pods' end is `nomad.actor.route`). To the agent a pod proves itself
with the key that it also asks for packages with (`nomad.handout.key_of`), then to the master as ever, through the
agent, which passes on frames and knows nothing of what they say. While the agent has no master, a pod waits there for
a while, as it would in vain elsewhere. The word by which the master shows that it is at work (`nomad.control`) comes
once for all, and goes on to each pod: so a pod misses it, too, when it is the agent that hangs.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from nomad.control import MOST_SAID, VIA
from nomad.delivery.driver import first_of
from nomad.delivery.handshake import DIALER_SAYS
from nomad.errors import ConnectionBroken, TransportError
from nomad.handout import key_of
from nomad.transport.base import Connection, Frame
from nomad.transport.trunk import HEAD_BYTES, Trunk

PATIENCE = 8.0
"""Seconds that a pod waits at an agent for the master; below the time that a handshake may take."""

EACH = 2
"""Ways that a pod may have at once, the present one and the next: all pods of the node share those over one trunk."""


class Gateway:
    """As `nomad.measure.agent.Visits`. `opened` and `closed` say when there is a way to the master."""

    prefix = VIA

    def __init__(self, key: bytes) -> None:
        """`key`: the agents' own."""
        self._key = key
        self._trunk: Trunk | None = None
        self._there = asyncio.Event()
        self._ways: dict[str, list[Connection]] = {}
        """By what the pod calls itself: its connections with this agent, the oldest first."""
        self._talking: set[Connection] = set()
        """With pods that have proved themselves to the master, as far as they can."""

    def opened(self, trunk: Trunk) -> None:
        self._trunk = trunk
        self._there.set()

    def closed(self, reason: str) -> None:
        """All who are on the way to the master have to dial again."""
        if self._trunk is not None:
            self._trunk.lost(reason)
        self._trunk = None
        self._there.clear()

    def pass_on(self, word: Frame) -> None:
        """To all pods, beside what they are told; not amid their handshakes with the master."""
        for conn in self._talking:
            with suppress(TransportError):  # `visited` sees the same
                if conn.writable:
                    conn.write([word])

    def key_for(self, name: str) -> bytes:
        return key_of(self._key, name.removeprefix(VIA))

    async def visited(self, name: str, conn: Connection, frames: list[Frame]) -> None:
        """Pass on what comes, both ways, until one of the ends is gone, or the pod has newer ones.

        Raises `TransportError`.
        """
        conn.limit(MOST_SAID - HEAD_BYTES)  # else a frame would break the trunk, the way of all pods
        ways = self._ways.setdefault(name, [])
        if len(ways) >= EACH:
            ways.pop(0).abort()
        ways.append(conn)
        try:
            await self._visited(ways, conn, frames)
        finally:
            if conn in ways:
                ways.remove(conn)
            if not ways and self._ways.get(name) is ways:
                del self._ways[name]

    async def _visited(self, ways: list[Connection], conn: Connection, frames: list[Frame]) -> None:
        try:
            async with asyncio.timeout(PATIENCE):
                await self._there.wait()
        except TimeoutError:
            return
        if conn not in ways:
            return
        assert self._trunk is not None
        onward = self._trunk.open()
        try:
            await first_of(self._say(frames, conn, onward), _hear(onward, conn))
        except ConnectionBroken:
            pass
        finally:
            self._talking.discard(conn)
            if conn not in ways:
                onward.abort()
            await onward.close()
            await conn.close()

    async def _say(self, frames: list[Frame], conn: Connection, onward: Connection) -> None:
        """Pass on what a pod says: `frames`, and what comes after them."""
        said = 0
        while True:
            await _pass(frames, onward)
            said += len(frames)
            if said >= DIALER_SAYS:
                self._talking.add(conn)
            frames = await conn.recv()


async def _hear(onward: Connection, conn: Connection) -> None:
    while True:
        await _pass(await onward.recv(), conn)


async def _pass(frames: list[Frame], target: Connection) -> None:
    try:
        target.write(frames)
        await target.drain()
    except TransportError as exc:
        raise ConnectionBroken(f"{target.peer} is gone") from exc
