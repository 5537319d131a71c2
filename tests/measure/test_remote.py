"""Who is there, and who can be dialled, as the master knows it of agents elsewhere."""

from __future__ import annotations

from typing import Any

import pytest

from nomad.errors import ConflictError, ConnectionBroken, RequestError
from nomad.measure.agent import IDLE_SECONDS
from nomad.measure.book import Book
from nomad.measure.remote import PACES, REPORT_SECONDS, REPORTS, SILENT, RemoteAgents, pace
from tests.clock import VirtualClock


class Channel:
    """Answers probes; those of addresses in `away` fail."""

    def __init__(self, away: set[str]) -> None:
        self.away = away
        self.answer: Any = {"round_trip": 0.01, "transfer": None}
        self.answers: Any = None
        self.old = False
        """Of a release before."""
        self.told: list[float] = []
        """Paces."""

    def tell(self, message: dict[str, Any]) -> bool:
        assert message["type"] == "pace"
        self.told.append(message["seconds"])
        return True

    async def ask(self, method: str, args: dict[str, Any], timeout: float) -> Any:
        if method == "round_trips":
            if self.old:
                raise ConflictError(f"an agent doesn't know the request {method!r}", status=409)
            return self.answers or [None if address in self.away else 0.01 for _, address in args["ways"]]
        assert method == "probe"
        if args["address"] in self.away:
            raise RequestError("it isn't reached", status=503)
        return self.answer


class World:
    def __init__(self, *nodes: str) -> None:
        self.clock, self.book = VirtualClock(), Book()
        self.known = {f"host-{node}": node for node in nodes}
        self.agents = RemoteAgents(self.book, self.clock, self.known.get)
        self.away: set[str] = set()
        self.channels = {node: Channel(self.away) for node in nodes}

    def come(self, *nodes: str) -> None:
        for node in nodes:
            self.agents.door.connected(f"host-{node}", {"address": node}, self.channels[node])

    async def probe(self, *ways: str) -> None:
        for way in ways:
            try:
                await self.agents.probe(*way.split(">"), 0)
            except RequestError:
                continue


async def test_an_agent_is_there_while_it_is_heard() -> None:
    world = World("a", "b")
    world.come("a", "b")
    await world.clock.advance(SILENT * REPORT_SECONDS - 1)
    world.agents.door.said("host-a", {"type": "report", "speed": 0.5, "cores_free": -1, "memory_free_mb": "much"})
    await world.clock.advance(2)
    assert world.agents.nodes() == ["a"]
    assert (world.agents.address("a"), world.agents.address("b")) == ("a", "")
    found = world.book.node("a")
    assert found.speed is not None
    assert found.speed.value == 0.5
    assert found.cores_free is None
    assert found.memory_free_mb is None
    world.agents.door.disconnected("host-a", world.channels["a"])
    assert world.agents.nodes() == []
    with pytest.raises(ConnectionBroken, match="agent of a isn't there"):
        await world.agents.probe("b", "a", 0)


@pytest.mark.parametrize("before", PACES)
def test_however_many_agents_there_are_few_reports_come_in(before: float) -> None:
    for agents in range(1, 3000, 50):
        seconds = pace(agents, before)
        assert seconds in PACES
        assert agents / seconds <= REPORTS or seconds == PACES[-1]
        assert pace(agents, seconds) == seconds, "it doesn't swing"
        assert pace(agents + 1, seconds) >= seconds, "one more makes nothing quicker"


async def test_many_agents_report_less_often_and_are_waited_for_longer() -> None:
    nodes = [f"n{number}" for number in range(400)]
    world = World(*nodes)
    world.come(*nodes[:300])
    assert not any(world.channels[node].told for node in nodes)
    world.come(*nodes[300:])
    slower = PACES[1]
    assert all(world.channels[node].told == [slower] for node in nodes)
    await world.clock.advance(SILENT * slower - 1)
    assert len(world.agents.nodes()) == 400
    for node in nodes[100:]:
        world.agents.door.disconnected(f"host-{node}", world.channels[node])
    assert all(world.channels[node].told == [slower, REPORT_SECONDS] for node in nodes[:100])
    assert len(world.agents.nodes()) == 100, "those that are told a quicker pace may be at rest for the slower one"
    world.agents.door.said("host-n0", {"type": "report", "speed": 1.0})
    await world.clock.advance(SILENT * REPORT_SECONDS - 1)
    assert world.agents.nodes() == ["n0"]
    await world.clock.advance(2)
    assert world.agents.nodes() == []


async def test_an_agent_may_be_there_before_its_node_is_known_and_be_called_otherwise_later() -> None:
    world = World("a")
    world.known.clear()
    world.come("a")
    assert world.agents.nodes() == []
    world.known["host-a"] = "edge"
    world.agents.door.said("host-a", {"type": "report"})
    assert world.agents.nodes() == ["edge"]
    world.known["host-a"] = "fog"
    world.agents.door.said("host-a", {"type": "report"})
    assert world.agents.nodes() == ["fog"]
    world.agents.door.said("host-b", {"type": "report"})
    world.agents.door.connected("host-b", {}, object())
    assert world.agents.nodes() == ["fog"]


async def test_a_new_connection_takes_the_place_of_the_old_one() -> None:
    world = World("a")
    world.come("a")
    old, new = world.channels["a"], Channel(set())
    world.agents.door.connected("host-a", {"address": "elsewhere"}, new)
    world.agents.door.disconnected("host-a", old)
    assert world.agents.address("a") == "elsewhere"


async def test_a_node_that_others_try_in_vain_cannot_be_dialled() -> None:
    world = World("a", "b", "c")
    world.come("a", "b", "c")
    world.away.add("c")
    await world.probe("a>c", "a>c", "b>c")
    assert world.agents.unreachable() == frozenset(), "nobody has reached anybody yet"
    await world.probe("a>b")
    assert world.agents.unreachable() == {"c"}
    world.away.clear()
    await world.probe("a>c")
    assert world.agents.unreachable() == frozenset()
    world.away.add("c")
    await world.probe(*["a>c", "b>c"] * 3)
    assert world.agents.unreachable() == frozenset(), "a network that is down is no NAT"


async def test_one_that_cannot_dial_does_not_make_others_unreachable() -> None:
    world = World("a", "b", "c")
    world.come("a", "b", "c")
    await world.probe("a>b")
    world.away.add("c")
    await world.probe(*["a>c"] * 5)
    assert world.agents.unreachable() == frozenset()
    await world.probe("b>c")
    assert world.agents.unreachable() == {"c"}


async def test_an_answer_that_is_none() -> None:
    world = World("a", "b")
    world.come("a", "b")
    world.channels["a"].answer = {"round_trip": "soon"}
    with pytest.raises(ConnectionBroken, match="isn't valid"):
        await world.agents.probe("a", "b", 0)
    world.channels["a"].answer = {"round_trip": 0.1, "transfer": 0.2}
    assert not world.agents.connected("a", "b")
    assert (await world.agents.probe("a", "b", 10)).transfer == 0.2
    assert world.agents.connected("a", "b")


async def test_what_is_known_of_connections_goes_when_they_do() -> None:
    world = World("a", "b", "c")
    world.come("a", "b", "c")
    await world.probe("a>b", "b>c")
    await world.clock.advance(IDLE_SECONDS - 1)
    await world.probe("a>b")
    await world.clock.advance(2)
    assert (world.agents.connected("a", "b"), world.agents.connected("b", "c")) == (True, False)
    await world.probe("c>a")
    assert set(world.agents._used) == {("a", "b"), ("c", "a")}, "a thousand nodes are a million pairs"


async def test_several_are_probed_by_one_request() -> None:
    world = World("a", "b", "c", "d")
    world.come("a", "b", "c")
    world.away.add("c")
    assert await world.agents.round_trips("a", ["d", "c", "b"]) == [None, None, 0.01]
    assert world.agents.connected("a", "b")
    assert not world.agents.connected("a", "c")
    for source in ("a", "b", "a"):
        await world.agents.round_trips(source, ["c"])
    assert world.agents.unreachable() == {"c"}
    for answers in ([0.01, 0.02], {"round_trip": 1}, "no"):
        world.channels["a"].answers = answers
        with pytest.raises(ConnectionBroken, match="isn't valid"):
            await world.agents.round_trips("a", ["b"])
    with pytest.raises(ConnectionBroken, match="isn't there"):
        await world.agents.round_trips("d", ["b"])


async def test_an_agent_of_a_release_before_is_asked_one_by_one() -> None:
    world = World("a", "b", "c")
    world.come("a", "b", "c")
    world.away.add("c")
    world.channels["a"].old = True
    assert await world.agents.round_trips("a", ["d", "c", "b"]) == [None, None, 0.01]
    assert world.agents.connected("a", "b")
