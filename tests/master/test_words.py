"""The words by which pods and agents know that their master is at work: who hears them, and how often."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from nomad import control
from nomad.master import words
from nomad.master.pods import Channel
from nomad.master.words import MISSED, say_words, timing
from nomad.settings import Heartbeats
from nomad.tasks import Tasks
from nomad.transport.base import Connection
from tests.clock import VirtualClock, settle
from tests.master.test_pods import Here, key_of, until


class Anybody:
    def connected(self, name: str, hello: dict[str, Any], channel: Channel) -> None: ...

    def said(self, name: str, message: dict[str, Any]) -> None: ...

    def disconnected(self, name: str, channel: Channel) -> None: ...


class Hearing:
    """What was said to one process, read only when asked."""

    def __init__(self, conn: Connection) -> None:
        self.conn = conn

    def words(self) -> list[float]:
        """How long silence may be, by each word since the last look."""
        messages = [control.unpack(bytes(frame[0])) for frame in self.conn.poll()]
        return [control.within_from(message) for message in messages if message["type"] == "word"]


class World:
    """A port on which words are said, in virtual time."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.here = Here()
        self.settings = replace(Heartbeats(), words=2.5)
        self.tasks = Tasks()

    async def comes(self, name: str, pod: str | None = None) -> Hearing:
        """A process that calls itself so; `pod`: which one it is, "" while it is none yet, None for a guest."""
        if pod is not None:
            self.here.pods[name] = pod
        before = self._there()
        conn = await self.here.dial(name, key=key_of(name.partition(":")[0]), assigned=bool(pod))
        await until(lambda: self._there() > before)
        return Hearing(conn)

    def _there(self) -> int:
        port = self.here.port
        return len(port._visiting) + len(port._channels) + len(port._waiting)

    async def passes(self, seconds: float) -> None:
        await self.clock.advance(seconds)
        await settle()


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World()
    made.here.address = await made.here.port.listen("inproc:")
    made.here.port.receive("agent", Anybody(), carry=True)
    made.here.port.receive("master", Anybody())
    made.tasks.start(say_words(made.here.port, made.settings, made.clock), name="say words")
    yield made
    await made.tasks.close()
    for conn in made.here.dialed:
        conn.abort()
    await made.here.port.close()


async def test_pods_those_that_wait_and_agents_hear_words(world: World) -> None:
    settings = world.settings
    pod, warm = await world.comes("a", "p.a-e1"), await world.comes("warm", "")
    agent, standby = await world.comes("agent:edge"), await world.comes("master:other")
    await world.passes(settings.word + words.PAUSE)
    for hearing in (pod, warm, agent):
        assert hearing.words() == [settings.silence]
    await world.passes(10 * settings.word)
    for hearing in (pod, warm, agent):
        assert len(hearing.words()) == 10
    assert standby.words() == [], "it is called, and refuses anything else"


async def test_of_many_each_is_told_less_often_and_nobody_misses_a_word(world: World) -> None:
    """However many come at once: a word comes sooner than the one before had said."""
    settings, clock = world.settings, world.clock
    first = await world.comes("a0", "p.a0-e1")
    heard: list[tuple[float, float]] = []

    async def listen(seconds: float) -> None:
        end = clock.now() + seconds
        while clock.now() < end:
            await world.passes(0.25)
            heard.extend((clock.now(), within) for within in first.words())

    await listen(10)
    for number in range(1, 20):
        await world.comes(f"a{number}", f"p.a{number}-e1")
    await listen(100)
    assert heard[-1][1] == MISSED * 8.0
    assert heard[-1][0] - heard[-2][0] == pytest.approx(8.0, abs=0.5)
    for conn in world.here.dialed[1:]:
        conn.abort()
    await until(lambda: len(world.here.port.direct()) == 1)
    await listen(60)
    assert heard[-1][1] == settings.silence
    assert heard[-1][0] - heard[-2][0] == pytest.approx(settings.word, abs=0.5)
    for (at, within), (later, _) in zip(heard, heard[1:], strict=False):
        assert later - at < within / 2


@pytest.mark.parametrize(
    ("connections", "every", "within"), [(0, 2, 10), (600, 2, 10), (1000, 3.3, 10), (6000, 20, 50)]
)
def test_a_thousand_cost_less_than_a_hundredth_of_a_core(connections: int, every: float, within: float) -> None:
    assert timing(connections, Heartbeats()) == (pytest.approx(every, abs=0.05), within)
    assert connections / timing(connections, Heartbeats())[0] * 25e-6 < 0.01


async def test_many_are_told_one_group_after_another(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "AT_ONCE", 2)
    crowd = [await world.comes(f"w{number}", "") for number in range(6)]
    await world.passes(world.settings.word + words.PAUSE / 2)
    assert sum(len(hearing.words()) for hearing in crowd) == 2
    await world.passes(2 * words.PAUSE)
    assert sum(len(hearing.words()) for hearing in crowd) == 4


async def test_who_is_gone_or_doesnt_listen_costs_nothing(world: World) -> None:
    gone, other = await world.comes("a", "p.a-e1"), await world.comes("b", "p.b-e1")
    channel = world.here.port._channels["p.b-e1"]
    gone.conn.abort()
    await world.passes(3 * world.settings.word)
    assert len(other.words()) >= 2
    while channel.conn.writable:
        channel.tell({"type": "assign", "code": bytes(1 << 20)})
    await world.passes(10 * world.settings.word)
    assert not other.words()
    await world.passes(2 * world.settings.word)
    assert len(other.words()) == 2
