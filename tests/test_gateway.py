"""Pods that reach their master by way of an agent: a real control port, a real agent, and both going away."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from nomad import control, gateway, handout
from nomad.actor.route import Route
from nomad.delivery.driver import shake_dialer
from nomad.delivery.handshake import Dialer
from nomad.errors import DeliveryError, TransportError
from nomad.gateway import Gateway
from nomad.master.gathered import AGAIN_SECONDS, AT_ONCE, Way
from nomad.master.observe import Observer
from nomad.master.pace import Pace
from nomad.master.pods import Channel, PodPort
from nomad.master.state import Observed
from nomad.measure.agent import Agent
from nomad.measure.book import Book
from nomad.settings import Heartbeats, History
from nomad.tasks import Tasks
from nomad.transport import registry
from nomad.transport.base import Connection
from nomad.transport.trunk import Trunk, carries
from tests.clock import VirtualClock

AGENTS = hashlib.sha256(b"agent").digest()


def key_of(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


class Doorman:
    """Lets agents in, and does nothing with them."""

    def __init__(self) -> None:
        self.there: list[str] = []

    def connected(self, name: str, hello: dict[str, Any], channel: Channel) -> None:
        self.there.append(name)

    def said(self, name: str, message: dict[str, Any]) -> None:
        raise AssertionError(message)

    def disconnected(self, name: str, channel: Channel) -> None:
        self.there.remove(name)


class Here:
    """A control port and an agent, whose connection to it a test makes and ends."""

    def __init__(self) -> None:
        self.observed = Observed()
        settings, clock = Heartbeats(gather_from=2), VirtualClock()
        pace = Pace(settings, clock)
        observer = Observer(self.observed, Book(), clock, lambda: None, pace)
        self.port = PodPort(observer, key_of, lambda name: f"p.{name}-e1", settings, History(), pace)
        self.guests = Doorman()
        self.port.receive("agent", self.guests, carry=True)
        self.port.receive("relay", Doorman())
        self.gateway = Gateway(AGENTS)
        self.agent = Agent("edge", AGENTS, VirtualClock(), visits=(self.gateway,))
        self.control = self.address = ""
        self.tasks = Tasks()
        self.dialed: list[Connection] = []

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[Connection]:
        """The agent has a connection to the master."""
        conn = await registry.connect(self.control)
        await shake_dialer(conn, AGENTS, "agent:edge", {})
        trunk = Trunk(conn)

        async def read() -> None:
            try:
                while True:
                    for frame in await conn.recv():
                        assert carries(frame)
                        trunk.received(frame)
            except TransportError as exc:
                self.gateway.closed(str(exc))

        self.gateway.opened(trunk)
        reader = self.tasks.start(read(), name="an agent's reader")
        yield conn
        conn.abort()
        await reader

    async def dial(self, name: str, key: bytes | None = None) -> Connection:
        """A pod, by way of the agent."""
        route = Route("tcp://127.0.0.1:1", name)
        route.turn(self.address, handout.key_of(AGENTS, name))
        conn, _ = await route.dial()
        self.dialed.append(conn)
        await shake_dialer(conn, key or key_of(name), name, {"assigned": True})
        return conn

    async def dial_directly(self, name: str) -> Connection:
        conn = await registry.connect(self.control)
        self.dialed.append(conn)
        await shake_dialer(conn, key_of(name), name, {"assigned": True})
        await until(lambda: self.there(name))
        return conn

    @property
    def carried(self) -> int:
        """Connections that the master has by way of agents."""
        return sum(len(trunk._connections) for trunk in self.port._gathered._trunks.values())

    def there(self, name: str) -> bool:
        state = self.observed.pods.get(f"p.{name}-e1")
        return state is not None and state.connection is not None


@pytest.fixture
async def here() -> AsyncIterator[Here]:
    made = Here()
    made.control = await made.port.listen("tcp://127.0.0.1:0")
    made.address = await made.agent.listen("tcp://127.0.0.1:0")
    yield made
    for conn in made.dialed:
        conn.abort()
        await conn.close()
    await made.agent.close()
    await made.port.close()
    await made.tasks.close()


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


async def hears(conn: Connection) -> dict[str, Any]:
    async with asyncio.timeout(30):
        return control.unpack(bytes((await conn.recv())[0][0]))


async def test_pods_come_by_way_of_the_agent_and_are_told(here: Here) -> None:
    async with here.connected():
        one, other = await here.dial("one"), await here.dial("other")
        await until(lambda: here.there("one") and here.there("other"))
        assert here.port.connections == {"direct": 0, "agent": 2}
        assert here.port.stop("p.one-e1", drain=True, grace=1.0)
        assert (await hears(one))["type"] == "stop"
        asked = asyncio.ensure_future(here.port.ask("p.other-e1", "samples"))
        request = await hears(other)
        reply = {"type": "reply", "id": request["id"], "ok": True, "value": bytes(3_000_000)}
        other.write([(control.pack(reply),)])
        assert await asked == bytes(3_000_000)
        one.abort()
        await until(lambda: not here.there("one"))
        assert here.there("other")


async def test_without_an_agent_pods_are_gone_and_come_directly(here: Here) -> None:
    async with here.connected():
        conn = await here.dial("one")
        await until(lambda: here.there("one"))
    with pytest.raises(TransportError):
        await conn.recv()
    await until(lambda: not here.there("one") and not here.guests.there)
    await here.dial_directly("one")


async def test_a_pod_waits_at_the_agent_for_the_master(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    dialing = asyncio.ensure_future(here.dial("one"))
    await until(lambda: here.dialed)
    async with here.connected():
        await dialing
        await until(lambda: here.there("one"))
    monkeypatch.setattr(gateway, "PATIENCE", 0.01)
    with pytest.raises((TransportError, DeliveryError)):
        await here.dial("one")


async def test_a_pod_has_two_ways_at_most_whatever_it_does(here: Here) -> None:
    async def knock(name: str) -> Connection:
        """Come to the master, and go no further."""
        route = Route("tcp://127.0.0.1:1", name)
        route.turn(here.address, handout.key_of(AGENTS, name))
        conn, _ = await route.dial()
        here.dialed.append(conn)
        conn.write([Dialer(key_of(name), name, {"assigned": True}).start()])
        await conn.recv()
        return conn

    async with here.connected():
        await here.dial("other")
        one = await here.dial("one")
        first, *_ = [await knock("one") for _ in range(5)]
        for replaced in (one, first):
            with pytest.raises(TransportError):
                await asyncio.wait_for(replaced.recv(), 30)
        await until(lambda: here.carried == 3)
        assert here.there("other")
        await here.dial("one")
        await until(lambda: here.there("one") and here.carried == 3)


async def test_the_largest_frame_of_a_pod_breaks_its_own_way_alone(here: Here) -> None:
    async with here.connected():
        one = await here.dial("one")
        await here.dial("other")
        await until(lambda: here.there("one") and here.there("other"))
        one.write([(bytes(control.MOST_SAID),)])
        await until(lambda: not here.there("one"))
        assert here.there("other")
        assert here.port.connections == {"direct": 0, "agent": 1}


async def test_neither_the_agent_nor_the_master_takes_anybody(here: Here) -> None:
    async with here.connected():
        route = Route("tcp://127.0.0.1:1", "one")
        route.turn(here.address, handout.key_of(AGENTS, "two"))
        with pytest.raises((TransportError, DeliveryError)):
            await route.dial()
        with pytest.raises((TransportError, DeliveryError)):
            await here.dial("one", key=key_of("two"))
        assert not here.there("one")


async def test_the_masters_word_goes_on_to_pods_whose_handshakes_are_over(here: Here) -> None:
    word = (control.pack({"type": "word", "within": 10.0}),)
    async with here.connected():
        one = await here.dial("one")
        route = Route("tcp://127.0.0.1:1", "two")
        route.turn(here.address, handout.key_of(AGENTS, "two"))
        two, _ = await route.dial()
        here.dialed.append(two)
        dialer = Dialer(key_of("two"), "two", {"assigned": True})
        two.write([dialer.start()])
        (welcome,) = await two.recv()
        await until(lambda: here.there("one"))
        here.gateway.pass_on(word)
        assert (await hears(one))["type"] == "word"
        confirm, _ = dialer.receive(welcome)
        assert not two.poll()
        two.write([confirm])
        await until(lambda: here.there("two"))
        here.gateway.pass_on(word)
        assert [(await hears(conn))["within"] for conn in (one, two)] == [10.0, 10.0]
        one.abort()
        await until(lambda: not here.there("one"))
        here.gateway.pass_on(word)
        assert (await hears(two))["type"] == "word"


@pytest.mark.parametrize("name", ["one", "relay:it"])
async def test_only_agents_carry(here: Here, name: str) -> None:
    conn = await registry.connect(here.control)
    here.dialed.append(conn)
    await shake_dialer(conn, key_of(name.partition(":")[0]), name, {"assigned": True})
    Trunk(conn).open()
    with pytest.raises(TransportError):
        await conn.recv()


async def test_pods_are_told_to_come_so_where_they_are_many(here: Here) -> None:
    way = Way(here.address, b"key")
    one = await here.dial_directly("one")
    here.port.steer(lambda pod, name: way, 0.0)
    two = await here.dial_directly("two")
    here.port.steer(lambda pod, name: way if name == "one" else None, 0.0)
    assert await hears(one) == {"type": "via", "address": here.address, "key": b"key"}
    here.port.steer(lambda pod, name: way, 1.0)
    assert (await hears(two))["type"] == "via"
    here.port.steer(lambda pod, name: way, AGAIN_SECONDS / 2)
    here.port.stop("p.one-e1", drain=False, grace=1.0)
    assert (await hears(one))["type"] == "stop", "it isn't told again so soon"
    async with here.connected():
        await here.dial("two")
        with pytest.raises(TransportError):
            await two.recv()
        here.port.steer(lambda pod, name: way, 2 * AGAIN_SECONDS)
        assert (await hears(one))["type"] == "via"


async def test_not_all_at_once(here: Here) -> None:
    told = []

    class Told:
        pod, direct = "p.f-e1", True

        def __init__(self, name: str) -> None:
            self.name = name

        def tell(self, message: dict[str, Any]) -> bool:
            told.append(self.name)
            return True

    crowd = [Told(f"pod-{number}") for number in range(AT_ONCE + 1)]
    gathered = here.port._gathered
    for _ in range(2):
        gathered.steer(crowd, lambda pod, name: Way("tcp://127.0.0.1:1", b""), 1.0)
    assert told == [one.name for one in crowd]
    told.clear()
    for at in range(0, 14_400, 2):
        gathered.steer(crowd[:1], lambda pod, name: Way("tcp://127.0.0.1:1", b""), float(at))
    assert 8 <= len(told) <= 14, "one that comes directly all the same is told less and less often"
