"""Calls between a master that leads and one that waits, over a connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from nomad import control
from nomad.delivery.driver import shake_dialer, shake_listener
from nomad.errors import RequestError, TransportError
from nomad.master.kube.election import SILENCE, Election, Lease, Step
from nomad.master.kube.standby import EVERY, PATIENCE, Door, attend
from nomad.master.pods import Channel
from nomad.tasks import alongside
from nomad.transport import registry
from nomad.transport.base import Connection
from tests.clock import VirtualClock

LEASE = Lease("leader", 13.0, 0.0, "1")


class World:
    """A leader's door, and a standby whose connections a test may take away."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.leader, self.standby = Election("leader", 13.0, 10.0), Election("standby", 13.0, 10.0)
        now = self.clock.now()
        self.leader.saw(None, now)
        self.leader.wrote(LEASE, now)
        self.standby.saw(replace(LEASE, standbys=frozenset({"standby"})), now)
        self.changes = 0
        self.door = Door(self.leader, self.clock, self._changed)
        self.address = ""
        self.refused = False
        self.conns: list[Connection] = []
        self.channels: list[Channel] = []

    def _changed(self) -> None:
        self.changes += 1

    async def serve(self, conn: Connection) -> None:
        """As the control port does."""
        try:
            name, hello, frames = await shake_listener(conn, lambda name: b"k" * 32, lambda name, hello: {})
            channel = Channel(1, name, conn)
            self.channels.append(channel)
            self.door.connected(name, hello, channel)
            try:
                while True:
                    for frame in frames:
                        channel.replied(control.unpack(bytes(frame[0])))
                    frames = await conn.recv()
            finally:
                channel.end()
                self.door.disconnected(name, channel)
        except TransportError:
            pass

    @asynccontextmanager
    async def reach(self, name: str) -> AsyncIterator[Connection]:
        if self.refused:
            raise TransportError("nobody there")
        conn = await registry.connect(self.address)
        self.conns.append(conn)
        try:
            await shake_dialer(conn, b"k" * 32, name, {})
            yield conn
        finally:
            conn.abort()

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                await asyncio.sleep(0)

    @property
    def listed(self) -> frozenset[str]:
        return self.leader.writes(self.clock.now())


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World()
    listener = await registry.listen("inproc:", made.serve)
    made.address = listener.reachable
    async with alongside(attend(made.standby, made.reach, made.clock)):
        yield made
        await made.door.close()
    await listener.close()


def waits_until(election: Election, now: float) -> float:
    step, at = election.next(now)
    assert step is Step.WAIT
    assert at is not None
    return at


async def test_calls_put_off_the_standby_as_long_as_they_come(world: World) -> None:
    await world.until(lambda: world.changes == 1)
    assert world.listed == {"standby"}
    began = world.clock.now()
    for call in range(1, 5):
        await world.clock.advance(EVERY)
        await world.until(lambda at=began + call * EVERY: waits_until(world.standby, at) == at + SILENCE)
    assert world.changes == 1


async def test_one_whose_connection_ends_is_struck_off_and_dials_again(world: World) -> None:
    await world.until(lambda: world.changes == 1)
    world.refused = True
    world.conns[-1].abort()
    await world.until(lambda: world.changes == 2)
    assert not world.listed
    await world.clock.advance(1.0)
    world.refused = False
    await world.clock.advance(2.0)
    await world.until(lambda: world.changes == 3)
    assert world.listed == {"standby"}


async def test_one_that_doesnt_answer_in_time_is_struck_off_and_hung_up_on() -> None:
    world = World()
    ended = asyncio.Event()

    class Deaf:
        async def ask(self, method: str, args: dict[str, Any], timeout: float) -> Any:
            assert (method, args, timeout) == ("lead", {"holder": "leader"}, PATIENCE)
            if world.changes:
                raise RequestError("no answer", status=503)

        def end(self) -> None:
            ended.set()

    world.door.connected("standby", {}, Deaf())
    await world.until(lambda: world.changes == 1)
    assert world.listed == {"standby"}
    await world.clock.advance(EVERY)
    await world.until(ended.is_set)
    assert not world.listed
    await world.door.close()


async def test_a_standby_says_nothing_by_itself(world: World) -> None:
    with pytest.raises(ValueError, match="answers"):
        world.door.said("standby", {"type": "ready"})


async def test_what_isnt_a_call_ends_the_connection(world: World) -> None:
    await world.until(lambda: world.changes == 1)
    world.channels[-1].tell({"type": "stop"})
    await world.until(lambda: world.changes == 2)
    await world.clock.advance(1.0)
    await world.until(lambda: world.changes == 3)
    assert len(world.conns) == 2
