"""The agents of a cluster of real machines: one process per node (`nomad.measure.node`), which dials the master.

What a survey probes with (`survey.Prober`), and who knows where a node's agent is; the control port hands agents that
dial in to its `door` (`nomad.master.pods.Guests`). An agent is there while it is connected and was heard lately; nodes
without one keep what is declared of them. Made by the master's assembly. Decides nothing but who can be dialled.

    agent -> master   hello: address, python      report: speed, cores_free, memory_free_mb (None: unknown)
    master -> agent   request "probe": node, address, nbytes -> {"round_trip", "transfer"}
                      request "round_trips": ways: [[node, address], ...] -> [seconds, None where it isn't reached]
                      pace: seconds: between two reports, `REPORT_SECONDS` on each new connection
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from nomad.clock import Clock
from nomad.errors import ConflictError, ConnectionBroken, NomadError
from nomad.measure.agent import IDLE_SECONDS, TIMEOUT, Probe
from nomad.measure.book import Book
from nomad.measure.survey import one_by_one

KIND = "agent"
"""Agents call themselves `agent:<node>`; they all have the key of this name."""

REPORT_SECONDS = 5.0
"""Between two reports of an agent that hasn't been told another pace."""

PACES: tuple[float, ...] = tuple(REPORT_SECONDS * 2**step for step in range(4))

REPORTS = 60.0
"""Per second, of all agents together. From 300 agents on they are told a slower pace."""

ROOM = 0.6
"""Share of that below which they are told a quicker one again: a few that come and go change nothing."""

SILENT = 3.0
"""An agent that hasn't said anything for so many times its pace isn't there."""

FAILURES = 3
"""So many dials in a row must have failed, from two nodes where there are as many, and none have come through, until a
node counts as one that can't be dialled.
"""


class Asked(Protocol):
    """The channel to an agent, as far as it is asked for something."""

    async def ask(self, method: str, args: dict[str, Any], timeout: float) -> Any:
        """Raises `NomadError`."""
        ...

    def tell(self, message: dict[str, Any]) -> bool: ...


def pace(agents: int, before: float) -> float:
    """Seconds between two reports of each of so many agents, one of `PACES`, `before` being what it was."""
    return next((each for each in PACES if agents <= each * REPORTS * (ROOM if each < before else 1.0)), PACES[-1])


@dataclass(slots=True)
class _Agent:
    channel: Asked
    address: str
    python: str
    """The version that it installs packages for; "" where it hasn't said that."""
    heard_at: float
    told: float = REPORT_SECONDS
    """Its pace."""
    every: float = REPORT_SECONDS
    """The same; the one before, if that was slower, until it has reported once more."""
    reached: bool = False
    """Another one has dialled it."""
    failures: int = 0
    failed_from: set[str] = field(default_factory=set)

    def there(self, now: float) -> bool:
        """Whether it was heard lately."""
        return now - self.heard_at < SILENT * self.every

    def tell(self, seconds: float) -> None:
        """At what pace to report."""
        self.told, self.every = seconds, max(self.every, seconds)
        self.channel.tell({"type": "pace", "seconds": seconds})


class RemoteAgents:
    """Those that are connected now, by Nomad's name of their node."""

    def __init__(self, book: Book, clock: Clock, node_of: Callable[[str], str | None] = lambda name: name) -> None:
        """`node_of`: what Nomad calls a node that the cluster calls so; None for one that it doesn't have."""
        self._book = book
        self._clock = clock
        self._node_of = node_of
        self._connected: dict[str, _Agent] = {}
        """By what the cluster calls their nodes."""
        self._agents: dict[str, _Agent] = {}
        """By what Nomad calls those; a node may be known later than its agent is there."""
        self._pace = REPORT_SECONDS
        self._used: dict[tuple[str, str], float] = {}
        """When connections were used last that may still stand, the longest ago first."""

    # -- what the door lets in

    @property
    def door(self) -> Door:
        """Where the control port takes agents to."""
        return Door(self)

    def came(self, name: str, hello: dict[str, Any], channel: Any) -> None:
        if isinstance(address := hello.get("address"), str):
            agent = _Agent(channel, address, str(hello.get("python", "")), self._clock.now())
            self._connected[name] = agent
            self._place(name)
            self._keep_pace([agent])

    def said(self, name: str, message: dict[str, Any]) -> None:
        node = self._place(name)
        if node is None:
            return
        agent = self._agents[node]
        agent.heard_at, agent.every = self._clock.now(), agent.told
        if message["type"] == "report":
            found = {kind: _amount(message.get(kind)) for kind in ("speed", "cores_free", "memory_free_mb")}
            self._book.node_sample(node, agent.heard_at, **found)

    def left(self, channel: Any) -> None:
        for agents in (self._connected, self._agents):
            for key in [key for key, agent in agents.items() if agent.channel is channel]:
                del agents[key]
        self._keep_pace([])

    def _keep_pace(self, new: Iterable[_Agent]) -> None:
        """Tell those whose pace is another one now that the number of agents has changed."""
        before, self._pace = self._pace, pace(len(self._connected), self._pace)
        for agent in new if self._pace == before else self._connected.values():
            if agent.told != self._pace:
                agent.tell(self._pace)

    def _place(self, name: str) -> str | None:
        """The node of an agent that is connected, as Nomad calls it now."""
        agent = self._connected.get(name)
        if agent is None:
            return None
        node = self._node_of(name)
        if node is None or self._agents.get(node) is not agent:
            for before in [before for before, other in self._agents.items() if other is agent]:
                del self._agents[before]
            if node is not None:
                self._agents[node] = agent
        return node

    # -- for the survey

    def nodes(self) -> Sequence[str]:
        """The nodes whose agents are there, in the order in which they came."""
        now = self._clock.now()
        return [node for node, agent in self._agents.items() if agent.there(now)]

    def connected(self, source: str, target: str) -> bool:
        """As far as is known here: agents close connections that aren't used."""
        return self._clock.now() - self._used.get((source, target), float("-inf")) < IDLE_SECONDS

    async def probe(self, source: str, target: str, nbytes: int) -> Probe:
        """Let the agent of `source` probe the one of `target`. Raises `NomadError`."""
        asked, other = self._agents.get(source), self._agents.get(target)
        if asked is None or other is None:
            raise ConnectionBroken(f"the agent of {target if asked is not None else source} isn't there")
        self._used.pop((source, target), None)
        request = {"node": target, "address": other.address, "nbytes": nbytes}
        try:
            found = await asked.channel.ask("probe", request, 2 * TIMEOUT)
        except NomadError:
            if self._agents.get(source) is asked:  # else it is the one that asks that is gone
                self._missed(source, other)
            raise
        found = found if isinstance(found, dict) else {}
        round_trip, transfer = (_amount(found.get(kind)) for kind in ("round_trip", "transfer"))
        if round_trip is None:
            raise ConnectionBroken(f"the agent of {source} gave an answer that isn't valid")
        self._reached(source, target, other)
        return Probe(round_trip, transfer)

    async def round_trips(self, source: str, targets: Sequence[str]) -> Sequence[float | None]:
        """Let the agent of `source` probe those of `targets`: one request and one answer for all of them.

        Raises `NomadError`.
        """
        asked = self._agents.get(source)
        if asked is None:
            raise ConnectionBroken(f"the agent of {source} isn't there")
        others = {target: other for target in targets if (other := self._agents.get(target)) is not None}
        for target in others:
            self._used.pop((source, target), None)
        request = {"ways": [(target, other.address) for target, other in others.items()]}
        try:
            said = await asked.channel.ask("round_trips", request, 3 * TIMEOUT)
        except ConflictError:  # one of a release before, which knows only "probe": agents are replaced after the master
            return await one_by_one(self, source, targets)
        if not isinstance(said, list) or len(said) != len(others):
            raise ConnectionBroken(f"the agent of {source} gave an answer that isn't valid")
        found = dict(zip(others, map(_amount, said), strict=True))
        for target, other in others.items():
            if found[target] is None:
                self._missed(source, other)
            else:
                self._reached(source, target, other)
        return [found.get(target) for target in targets]

    def _missed(self, source: str, other: _Agent) -> None:
        other.failures += 1
        other.failed_from.add(source)

    def _reached(self, source: str, target: str, other: _Agent) -> None:
        other.reached = True
        self._note_use(source, target)

    def _note_use(self, source: str, target: str) -> None:
        now = self._clock.now()
        self._used[source, target] = now
        while now - self._used[oldest := next(iter(self._used))] >= IDLE_SECONDS:
            del self._used[oldest]

    # -- for the master

    def address(self, node: str) -> str:
        """Where the agent of a node is dialled; "" while it isn't there."""
        agent = self._agents.get(node)
        return agent.address if agent is not None and agent.there(self._clock.now()) else ""

    def pythons(self) -> frozenset[str]:
        """The versions of Python that agents install packages for, of those that are there."""
        return frozenset(python for node in self.nodes() if (python := self._agents[node].python))

    def unreachable(self) -> frozenset[str]:
        """Nodes whose agents are there, and that others have tried to dial in vain, where dialling works at all."""
        there = self.nodes()
        if not any(self._agents[node].reached for node in there):
            return frozenset()
        needed = min(2, len(there) - 1)
        return frozenset(
            node
            for node in there
            for agent in (self._agents[node],)
            if not agent.reached and agent.failures >= FAILURES and len(agent.failed_from) >= needed
        )


class Door:
    """`RemoteAgents` in the words of the control port."""

    def __init__(self, agents: RemoteAgents) -> None:
        self._agents = agents

    def connected(self, name: str, hello: dict[str, Any], channel: Any) -> None:
        self._agents.came(name, hello, channel)

    def said(self, name: str, message: dict[str, Any]) -> None:
        self._agents.said(name, message)

    def disconnected(self, name: str, channel: Any) -> None:
        self._agents.left(channel)


def _amount(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and value >= 0 else None
