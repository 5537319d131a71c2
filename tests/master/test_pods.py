"""Where processes dial in: those that are a pod, those that wait to be one, and guests."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from nomad import control
from nomad.control import PodStats
from nomad.delivery.driver import shake_dialer
from nomad.errors import DeliveryError, TransportError
from nomad.master import pods
from nomad.master.observe import Observer
from nomad.master.pace import Pace
from nomad.master.pods import Channel, PodPort
from nomad.master.state import Observed, PodState
from nomad.measure.book import Book
from nomad.settings import Heartbeats, History
from nomad.transport import registry
from nomad.transport.base import Connection
from tests.clock import VirtualClock


def key_of(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


@dataclass
class Here:
    """A port, what it observes, and processes that dial in."""

    pods: dict[str, str] = field(default_factory=dict)
    """Process -> pod, as the runtime says."""
    observed: Observed = field(default_factory=Observed)
    heard: list[str] = field(default_factory=list)
    heartbeats: Heartbeats = field(default_factory=Heartbeats)
    address: str = ""
    dialed: list[Connection] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pace = Pace(self.heartbeats, VirtualClock())
        observer = Observer(self.observed, Book(), VirtualClock(), lambda: None, self.pace)
        self.port = PodPort(
            observer, key_of, self.pods.get, self.heartbeats, History(), self.pace, heard=self.heard.append
        )

    async def dial(self, name: str, *, assigned: bool = False, key: bytes | None = None) -> Connection:
        conn = await registry.connect(self.address)
        self.dialed.append(conn)
        await shake_dialer(conn, key or key_of(name), name, {"assigned": assigned})
        return conn

    def state(self, pod: str) -> PodState:
        return self.observed.pods.get(pod, PodState())


@pytest.fixture
async def here() -> AsyncIterator[Here]:
    made = Here()
    made.address = await made.port.listen("inproc:")
    yield made
    for conn in made.dialed:
        conn.abort()
    await made.port.close()


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0)


def say(conn: Connection, **message: Any) -> None:
    conn.write([(control.pack(message),)])


async def hears(conn: Connection) -> dict[str, Any]:
    async with asyncio.timeout(30):
        return control.unpack(bytes((await conn.recv())[0][0]))


async def test_a_process_that_waits_becomes_a_pod_on_the_channel_that_it_has(here: Here) -> None:
    here.pods["warm-1"] = here.pods["warm-2"] = ""
    conn, _ = await here.dial("warm-1"), await here.dial("warm-2")
    await until(lambda: len(here.port.waiting) == 2)
    assert not here.observed.pods
    here.pods["warm-1"] = "p.f-e1"
    here.port.seat("p.f-e1")
    assert list(here.port.waiting) == ["warm-2"]
    state = here.state("p.f-e1")
    assert state.connection is not None
    assert not state.assigned
    assert here.port.stop("p.f-e1", drain=False, grace=1.0)
    assert (await hears(conn))["type"] == "stop"

    say(conn, type="leaving")
    await until(lambda: state.leaving)
    conn.abort()
    await until(lambda: state.connection is None)
    await here.dial("warm-1", assigned=True)
    await until(lambda: state.connection is not None)
    assert state.assigned


async def test_a_pod_that_isnt_connected_yet_is_seated_when_it_dials(here: Here) -> None:
    here.pods["warm-1"] = "p.f-e1"
    here.port.seat("p.f-e1")
    assert not here.observed.pods
    await here.dial("warm-1")
    await until(lambda: here.state("p.f-e1").connection is not None)


async def test_who_isnt_wanted_is_turned_away(here: Here) -> None:
    with pytest.raises((DeliveryError, TransportError)):
        await here.dial("unknown")
    with pytest.raises((DeliveryError, TransportError)):
        await here.dial("agent:edge")
    here.pods["warm-1"] = ""
    with pytest.raises((DeliveryError, TransportError)):
        await here.dial("warm-1", key=key_of("warm-2"))
    conn = await here.dial("warm-1", assigned=True)  # somebody's pod once, and nobody knows whose
    with pytest.raises(TransportError):
        await conn.recv()
    waits = await here.dial("warm-1")
    say(waits, type="ready", address=None, pid=1)
    with pytest.raises(TransportError):
        await waits.recv()
    await until(lambda: not here.port.waiting)
    assert not here.observed.pods


class Agents:
    """What guests are looked after by."""

    def __init__(self) -> None:
        self.there: dict[str, Channel] = {}
        self.told: list[tuple[str, Any]] = []

    def connected(self, name: str, hello: dict[str, Any], channel: Channel) -> None:
        assert name not in self.there
        self.there[name] = channel

    def said(self, name: str, message: dict[str, Any]) -> None:
        if message["type"] != "word":
            raise ValueError(message["type"])
        self.told.append((name, message["value"]))

    def disconnected(self, name: str, channel: Channel) -> None:
        assert self.there.pop(name) is channel


async def test_guests_are_handed_on(here: Here) -> None:
    agents = Agents()
    here.port.receive("agent", agents)
    first = await here.dial("agent:edge", key=key_of("agent"))
    say(first, type="word", value=1)
    await until(lambda: agents.told == [("edge", 1)])
    assert here.heard[-1] == "agent:edge"
    second = await here.dial("agent:edge", key=key_of("agent"))
    await until(lambda: agents.there.get("edge") and first.closed)
    asked = asyncio.create_task(agents.there["edge"].ask("probe", {"of": "fog"}, 5.0))
    request = await hears(second)
    assert (request["method"], request["args"]) == ("probe", {"of": "fog"})
    say(second, type="reply", id=request["id"], ok=True, value=0.5)
    assert await asked == 0.5
    say(second, type="nonsense")
    await until(lambda: not agents.there)
    assert not here.observed.pods


def test_heart_beats_are_known_by_how_they_begin() -> None:
    for error in (None, {"type": "E", "message": "m", "traceback": "t"}):
        for stats in (PodStats(), PodStats(received=3, links=[{"link": "p:a>b"}], at=1.5)):
            assert control.pack(control.heartbeat(stats, error)).startswith(control.HEARTBEAT_HEAD)


async def test_heart_beats_of_many_pods_wait_for_one_another_and_nothing_else_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pods, "GATHER", 3600.0)
    here = Here(heartbeats=replace(Heartbeats(), most=1.0))
    here.address = await here.port.listen("inproc:")

    def beat(conn: Connection, received: int) -> None:
        conn.write([(control.pack(control.heartbeat(PodStats(received=received), None)),)])

    def received(name: str) -> int:
        return here.state(f"p.{name}-e1").stats.received

    async def waiting(count: int) -> None:
        await until(lambda: len(here.port._beats) == count)

    try:
        conns = {}
        for name in ("a", "b"):
            here.pods[name] = f"p.{name}-e1"
            conns[name] = await here.dial(name, assigned=True)
        await until(lambda: here.pace.seconds > control.HEARTBEAT and here.port.connections["direct"] == 2)
        beat(conns["a"], 1)
        beat(conns["b"], 2)
        await waiting(2)
        assert (received("a"), received("b")) == (0, 0)
        here.port._take_beats()
        assert (received("a"), received("b")) == (1, 2)
        beat(conns["a"], 3)
        await waiting(1)
        say(conns["b"], type="leaving")
        await until(lambda: here.state("p.b-e1").leaving)
        assert received("a") == 3, "what came before is heard before"
        beat(conns["a"], 4)
        conns["b"].write([(control.HEARTBEAT_HEAD + b"nonsense",)])
        beat(conns["b"], 5)
        await waiting(3)
        conns["a"].abort()
        await until(lambda: here.state("p.a-e1").connection is None)
        assert received("a") == 4, "also the last words"
        await until(lambda: here.state("p.b-e1").connection is None)
        monkeypatch.setattr(pods, "GATHERED_BYTES", 0)
        again = await here.dial("a", assigned=True)
        beat(again, 6)
        await until(lambda: received("a") == 6)
    finally:
        for conn in here.dialed:
            conn.abort()
        await here.port.close()


async def test_pods_are_told_how_often_to_send_heart_beats() -> None:
    """All of them when it changes, and later each that comes."""
    here = Here(heartbeats=replace(Heartbeats(), most=4.0))
    here.address = await here.port.listen("inproc:")

    async def comes(name: str) -> Connection:
        here.pods[name] = f"p.{name}-e1"
        conn = await here.dial(name, assigned=True)
        await until(lambda: here.port.name_of(f"p.{name}-e1") == name and here.state(f"p.{name}-e1").connection)
        return conn

    async def told(conn: Connection) -> float:
        message = await hears(conn)
        assert message["type"] == "pace"
        return control.pace_from(message)

    try:
        here.pods["warm"] = ""
        warm = await here.dial("warm")
        first, second = await comes("a"), await comes("b")
        third = await comes("c")
        assert [await told(conn) for conn in (first, second, third)] == [1.0, 1.0, 1.0], "the third is one too many"
        fourth = await comes("d")
        assert await told(fourth) == 1.0
        fourth.abort()
        await until(lambda: here.state("p.d-e1").connection is None)
        third.abort()
        await until(lambda: here.state("p.c-e1").connection is None)
        assert here.pace.seconds == 1.0, "one that is back at once shouldn't change it"
        second.abort()
        assert await told(first) == 0.5, "and nothing else was said meanwhile"
        here.pods["warm"] = "p.e-e1"
        here.port.seat("p.e-e1")
        assert here.port.stop("p.e-e1", drain=False, grace=1.0)
        assert (await hears(warm))["type"] == "stop", "a pod that comes has this pace anyway"
    finally:
        for conn in here.dialed:
            conn.abort()
        await here.port.close()
