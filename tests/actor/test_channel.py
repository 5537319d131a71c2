"""How a pod stays with its master, whatever becomes of the way there and of the master."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from nomad import control, pipeline
from nomad.actor.channel import Channel
from nomad.clock import SystemClock
from nomad.delivery.handshake import Listener
from nomad.errors import TransportError
from nomad.gateway import Gateway
from nomad.handout import key_of
from nomad.measure.agent import Agent
from nomad.tasks import Tasks
from nomad.transport import registry
from nomad.transport.base import HIGH_WATER, Connection, Frame
from nomad.transport.inproc import InprocConnection
from nomad.transport.registry import transport_for
from nomad.transport.trunk import Trunk
from tests.actor.pods import POD_KEY, Master, endless, master, ready
from tests.clock import VirtualClock
from tests.contract.transport import pair


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Master]:
    async with master(tmp_path) as made:
        yield made


async def test_a_pod_comes_by_way_of_its_nodes_agent_while_that_is_there(here: Master) -> None:
    agents, tasks = bytes(32), Tasks()
    gateway = Gateway(agents)

    async def read(conn: Connection, trunk: Trunk) -> None:
        with contextlib.suppress(TransportError):
            while True:
                for frame in await conn.recv():
                    trunk.received(frame)

    async with pair(transport_for("inproc:"), "inproc:") as (near, far):
        trunk = Trunk(near)
        tasks.start(read(near, trunk), name="the agent's end")
        accepted = Trunk(far, lambda conn: tasks.start(here.serve(conn), name="a pod") and None)
        tasks.start(read(far, accepted), name="the master's end")
        gateway.opened(trunk)
        agent = Agent("edge", agents, SystemClock(), visits=(gateway,))
        address = await agent.listen("tcp://127.0.0.1:0")

        pod = await ready(here, pipeline.build([endless, str]), 0)
        pod.tell({"type": "via", "address": "tcp://127.0.0.1:1", "key": b""})
        assert await pod.ask("samples") is not None
        assert pod.connections == 1, "an agent that isn't there costs no connection"
        pod.tell({"type": "via", "address": address, "key": key_of(agents, pod.name)})
        await pod.says("ready", 2)
        assert pod.connections == 2
        assert pod.conn is not None
        assert "#" in pod.conn.peer, "it came over the trunk"
        assert await pod.ask("samples") is not None

        await agent.close()
        await pod.says("ready", 3)
        assert "#" not in pod.conn.peer
        assert await pod.ask("samples") is not None
        trunk.lost("the end")
        await tasks.close()


async def test_a_master_that_hangs_up_is_not_dialled_on_and_on(here: Master) -> None:
    pod = await ready(here, pipeline.build([endless, print]), 0)
    began = time.monotonic()
    for number in range(2, 7):
        assert pod.conn is not None
        pod.conn.abort()
        await pod.says("ready", times=number)
    assert time.monotonic() - began > 0.05 * (1 + 2 + 4 + 8 + 16), "each attempt waits twice as long as the one before"


async def test_a_pod_whose_master_falls_silent_dials_again(here: Master) -> None:
    pod = await ready(here, pipeline.build([endless, print]), 0)
    pod.tell({"type": "word", "within": 1.0})
    await pod.says("ready", times=2)
    assert pod.connections == 2
    assert pod.process.poll() is None


async def test_without_a_master_it_stops_by_itself(here: Master) -> None:
    lonely = here.start("p.lonely-e1", control=f"unix:{here.folder}/nobody", master_timeout=0.1)
    here.key = bytes(32)  # and a master that can't prove itself is none
    fooled = here.start("p.fooled-e1", master_timeout=0.1)
    for pod in (lonely, fooled):
        await pod.until(lambda p=pod: p.process.poll() is not None)
        assert pod.process.returncode == 5
        assert "no master for 0.1 s, stopping" in here.log(pod.name)
    assert fooled.connections == 0


# A master that hangs, in virtual time


class Side:
    """A pod that has nothing to say."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.ending = False
        self.at_met: Callable[[], None] = lambda: None

    def hello(self) -> dict[str, Any]:
        return {}

    def met(self) -> None:
        self.told.append("met")
        self.at_met()

    def heard(self, message: dict[str, Any]) -> None:
        self.told.append(message["type"])

    async def do(self, method: str, args: dict[str, Any]) -> Any:
        return None

    def abandoned(self, seconds: float) -> None:
        raise AssertionError("it isn't away for so long")


class Hanging:
    """A master, or an agent on the way to it, that answers who dials and says what it is told to."""

    def __init__(self, listening: str, key: bytes = POD_KEY) -> None:
        self.listening = listening
        self.key = key
        self.conns: list[Connection] = []
        self.answers = True
        self.silent = asyncio.Event()

    async def serve(self, conn: Connection) -> None:
        if self.answers:
            frames = await greeted(conn, self.key, [])
            if self.key is not POD_KEY:
                await greeted(conn, POD_KEY, frames)
            self.conns.append(conn)
        await self.silent.wait()

    def say(self, **message: Any) -> None:
        self.conns[-1].write([(control.pack(message),)])


async def greeted(conn: Connection, key: bytes, frames: list[Frame]) -> list[Frame]:
    """A handshake's other end, which has got `frames` already; those that came behind it."""
    listener = Listener()
    listener.identify((frames or await conn.recv())[0])
    conn.write([listener.welcome(key, {})])
    confirm, *rest = await conn.recv()
    listener.confirm(confirm)
    return rest


@contextlib.asynccontextmanager
async def listening(address: str, key: bytes = POD_KEY) -> AsyncIterator[Hanging]:
    made = Hanging("", key)
    listener = await registry.listen(address, made.serve)
    made.listening = listener.reachable
    yield made
    await listener.close()


@contextlib.asynccontextmanager
async def kept(address: str, clock: VirtualClock) -> AsyncIterator[Side]:
    """A channel that somebody keeps."""
    side, tasks = Side(), Tasks()
    channel = Channel(address, "p.one-e1", POD_KEY, 3600.0, side, clock)
    tasks.start(channel.keep(), name="keep")
    yield side
    await tasks.close()
    await channel.close()


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


async def test_a_master_that_hangs_is_dialled_anew_once_it_has_said_a_word() -> None:
    clock = VirtualClock()
    async with listening("inproc:") as master, kept(master.listening, clock) as side:
        await until(lambda: side.told == ["met"])
        await clock.advance(600)
        assert len(master.conns) == 1, "one of a version without words is left alone"
        for _ in range(30):
            master.say(type="word", within=10.0)
            await clock.advance(2)
        assert len(master.conns) == 1
        await clock.advance(8)
        master.say(type="something")
        await clock.advance(9)
        assert len(master.conns) == 1, "whatever is said counts"
        assert side.told == ["met", "something"]
        await clock.advance(2.5)
        await until(lambda: len(master.conns) == 2)
        assert side.told == ["met", "something", "met"], "who is there is told how things stand"
        await clock.advance(600)
        assert len(master.conns) == 2, "no word was heard on this one"
        master.say(type="word", within="long")
        await clock.advance(2.5)
        await until(lambda: len(master.conns) == 3)


async def test_a_pod_whose_agent_hangs_comes_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nomad.actor.route.DIAL_SECONDS", 0.2)
    clock = VirtualClock()
    async with (
        listening("inproc:") as master,
        listening("inproc:", bytes(32)) as agent,
        kept(master.listening, clock) as side,
    ):
        await until(lambda: master.conns)
        master.say(type="via", address=agent.listening, key=bytes(32))
        await until(lambda: agent.conns and side.told == ["met", "met"])
        agent.say(type="word", within=10.0)
        await until(lambda: side.told)
        await clock.advance(10)
        assert (len(agent.conns), len(master.conns)) == (1, 1)
        agent.answers = False
        await clock.advance(2)
        await until(lambda: len(master.conns) == 2)
        assert side.told == ["met", "met", "met"]


async def test_a_master_that_hangs_once_another_way_has_led_nowhere_is_dialled_anew() -> None:
    clock = VirtualClock()
    async with listening("inproc:") as master, kept(master.listening, clock):
        await until(lambda: master.conns)
        master.say(type="word", within=10.0)
        master.say(type="via", address="inproc:nobody", key=bytes(32))
        await clock.advance(9)
        assert len(master.conns) == 1
        await clock.advance(3)
        await until(lambda: len(master.conns) == 2)


async def test_a_way_that_is_full_is_not_writable() -> None:
    side, tasks = Side(), Tasks()
    async with listening("inproc:") as master:
        channel = Channel(master.listening, "p.one-e1", POD_KEY, 3600.0, side, VirtualClock())
        assert not channel.writable, "there is nobody"
        tasks.start(channel.keep(), name="keep")
        await until(lambda: master.conns)
        assert channel.writable
        channel.say({"type": "outputs", "items": [bytes(HIGH_WATER)]})
        assert not channel.writable
        await master.conns[0].recv()
        assert channel.writable
        master.conns[0].abort()
        await until(lambda: not channel.writable)
        await tasks.close()


async def test_nonsense_said_before_a_turn_ends_both_connections() -> None:
    clock = VirtualClock()
    async with (
        listening("inproc:") as master,
        listening("inproc:", bytes(32)) as agent,
        kept(master.listening, clock) as side,
    ):
        await until(lambda: master.conns)
        side.at_met = lambda: master.say(type="word", within="long")
        master.say(type="via", address=agent.listening, key=bytes(32))
        await until(lambda: agent.conns and agent.conns[0].closed and master.conns[0].closed)
        side.at_met = lambda: None
        await clock.advance(0.1)
        await until(lambda: len(agent.conns) == 2)
        assert not agent.conns[1].closed


async def test_a_pod_that_is_about_to_end_keeps_the_connection_that_it_has_turned_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its last words go there."""
    clock, side, tasks, closing = VirtualClock(), Side(), Tasks(), asyncio.Event()

    async def clogged(self: Connection) -> None:
        closing.set()
        await asyncio.Event().wait()

    async with listening("inproc:") as master, listening("inproc:", bytes(32)) as agent:
        channel = Channel(master.listening, "p.one-e1", POD_KEY, 3600.0, side, clock)
        tasks.start(channel.keep(), name="keep")
        await until(lambda: master.conns)
        with monkeypatch.context() as patched:
            patched.setattr(InprocConnection, "close", clogged)
            master.say(type="via", address=agent.listening, key=bytes(32))
            await closing.wait()
            side.ending = True
            await tasks.close()
        channel.say({"type": "last"})
        await channel.close()
        async with asyncio.timeout(30):
            frames = await agent.conns[0].recv()
        assert [control.unpack(bytes(frame[0]))["type"] for frame in frames] == ["last"]
        assert master.conns[0].closed


async def test_what_fails_as_a_master_is_met_is_what_is_raised() -> None:
    clock, side = VirtualClock(), Side()

    def unready() -> None:
        raise RuntimeError("unready")

    side.at_met = unready
    async with listening("inproc:") as master:
        channel = Channel(master.listening, "p.one-e1", POD_KEY, 3600.0, side, clock)
        with pytest.raises(RuntimeError, match="unready"):
            await channel.keep()
        assert not channel.connected


async def test_an_agent_that_leads_nowhere_takes_no_time_from_the_master(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the pod tries another way, nothing is heard over the one that it has: that is no silence."""
    monkeypatch.setattr("nomad.actor.route.DIAL_SECONDS", 0.2)
    clock = VirtualClock()
    async with listening("inproc:") as master, listening("inproc:") as agent, kept(master.listening, clock) as side:
        agent.answers = False
        await until(lambda: master.conns)
        master.say(type="word", within=10.0)
        await clock.advance(1)
        master.say(type="via", address=agent.listening, key=bytes(32))
        await clock.advance(60)
        master.say(type="something")
        await until(lambda: side.told == ["met", "something"])
        assert len(master.conns) == 1
        master.say(type="word", within=10.0)
        await clock.advance(12)
        await until(lambda: len(master.conns) == 2)
