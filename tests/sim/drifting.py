"""A pipeline on virtual time whose links, operators and nodes change: what is measured of it goes through the book, the
detectors and the rules of drift as in a master, and the moves that are decided are carried out after a while.

Queues are fluid: what comes in and isn't worked off stays. Link and service times are seen with noise from a seed.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nomad.control import PodStats
from nomad.master.judge import Judge, Scene
from nomad.master.problem import Knowledge, build
from nomad.measure.book import Book
from nomad.pipeline import Kind, OperatorSpec, PipelineSpec
from nomad.runtime.base import NodeInfo
from nomad.scheduler import drift, plan
from nomad.scheduler.moves import Outlook
from nomad.settings import Windows

STEP = 0.5
MOVE_SECONDS = 1.5

Latency = Callable[[str, str, float], float]
"""From, to, time -> seconds one way."""
Work = Callable[[str, float], float]
"""Operator, time -> reference-seconds per message."""


def chain(works: Mapping[str, float], *, memory: Mapping[str, float] | None = None) -> PipelineSpec:
    """A pipeline of a periodic source and functions, from `edge` to `end` of the scene; see `World`."""
    names = list(works)
    operators = tuple(
        OperatorSpec(name, Kind.FUNCTION if number else Kind.PERIODIC, memory_mb=(memory or {}).get(name, 64.0))
        for number, name in enumerate(names)
    )
    return PipelineSpec("p", operators, tuple(itertools.pairwise(names)), start="", end="")


def node(id: str, speed: float, cores: float = 4.0, memory: float = 4096.0) -> NodeInfo:
    return NodeInfo(id, speed, cores, memory, "x86_64", frozenset(), "3.11")


@dataclass
class World:
    """What is true, and what became of it."""

    spec: PipelineSpec
    nodes: list[NodeInfo]
    latency: Latency
    work: Work
    rate: float = 200.0
    output_bytes: Mapping[str, float] = field(default_factory=dict)
    bandwidth: float = 1e9
    noise: float = 0.0
    seed: int = 0
    settings: drift.Settings = drift.DEFAULT
    pins: Mapping[str, str] = field(default_factory=dict)
    pace: float = 1.0
    """Seconds between two heart-beats of an operator."""

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.book = Book()
        self.judge = Judge(self.book, Windows(), self.settings, pace=lambda: self.pace)
        self.now = 1000.0
        for info in self.nodes:
            self.book.declare_node(info.id, self.now, speed=info.speed)
        for a, b in itertools.permutations([info.id for info in self.nodes], 2):
            self.book.declare_link(a, b, self.now, latency=self.latency(a, b, 0.0), bandwidth=self.bandwidth)
        self.placement = self.best(0.0)
        self.moves: list[tuple[float, str, str, str]] = []
        """Time, operator, node, reason."""
        self.texts: list[str] = []
        self.queues = dict.fromkeys(self.placement, 0.0)
        self._parts = dict.fromkeys(self.placement, 0.0)
        self._moving: tuple[float, str, str] | None = None
        self._stats = {name: PodStats() for name in self.placement}
        self._epochs = dict.fromkeys(self.placement, 1)
        self.fullest = 0.0

    # -- the truth

    def truth(self, at: float) -> dict[str, Any]:
        """The problem as it really is at this time, seconds since the beginning."""
        book = Book()
        for info in self.nodes:
            book.declare_node(info.id, 0.0, speed=info.speed)
        for a, b in itertools.permutations([info.id for info in self.nodes], 2):
            book.declare_link(a, b, 0.0, latency=self.latency(a, b, at), bandwidth=self.bandwidth)
        for op in self.spec.operators:
            size = self.output_bytes.get(op.name, 1024.0)
            book.declare_operator("p", op.name, 0.0, work=self.work(op.name, at), output_bytes=size)
        wanted = ("departure", ("p", self.spec.operators[0].name))
        knowledge = Knowledge(book, lambda signal: self.rate if signal == wanted else None)
        return build(self.spec, knowledge, self.nodes, pins=self.pins)

    def best(self, at: float) -> dict[str, str]:
        """The best static placement for the conditions at this time."""
        return dict(plan(self.truth(at))["placement"])

    def worth(self, at: float, placement: Mapping[str, str] | None = None) -> float:
        """What a placement is really worth at this time."""
        outlook = Outlook(self.truth(at), placement or self.placement, horizon=self.settings.horizon)
        return outlook.now.total

    def pays(self, at: float) -> bool:
        """Whether the rules, told the truth, would move something."""
        situation = drift.Situation(self.truth(at), self.placement)
        return drift.decide(situation, drift.History(), at, self.settings).order is not None

    # -- time

    def run(self, until: float) -> None:
        """Go on until so many seconds after the beginning."""
        while self.now - 1000.0 < until:
            self.now += STEP
            self._flow()
            for number, op in enumerate(self.spec.operators):
                if (self.now - number * STEP) % self.pace == 0:
                    self._beat(op.name)
            if self.now % self.pace == 0:
                self._links()
            self._carry_out()
            self._look()

    @property
    def at(self) -> float:
        return self.now - 1000.0

    def _flow(self) -> None:
        arriving = self.rate * STEP
        for number, op in enumerate(self.spec.operators):
            stats = self._stats[op.name]
            speed = next(info.speed for info in self.nodes if info.id == self.placement[op.name])
            service = self.work(op.name, self.at) * self._noisy() / speed
            self.queues[op.name] += arriving
            done = self.queues[op.name] if service <= 0 else min(self.queues[op.name], STEP / service)
            self.queues[op.name] -= done
            whole = int(self._parts[op.name] + done)  # whole messages are counted
            self._parts[op.name] += done - whole
            if number:
                stats.received += whole + round(self.queues[op.name]) - stats.queue_messages
            stats.processed += whole
            stats.emitted += whole
            stats.busy_seconds += whole * service
            stats.sent_bytes += round(whole * self.output_bytes.get(op.name, 1024.0))
            stats.queue_messages = round(self.queues[op.name])
            stats.queue_bytes = round(self.queues[op.name] * 1024)
            self.fullest = max(self.fullest, stats.queue_messages / 65_536, stats.queue_bytes / (16 << 20))
            arriving = done

    def _noisy(self) -> float:
        return 1 + self.noise * self.random.uniform(-1, 1)

    def _beat(self, name: str) -> None:
        stats = self._stats[name]
        copy = PodStats(**{key: getattr(stats, key) for key in stats.__dataclass_fields__})
        self.book.heartbeat("p", name, f"p.{name}-e{self._epochs[name]}", self.placement[name], copy, self.now)

    def _links(self) -> None:
        for a, b in itertools.combinations(sorted(info.id for info in self.nodes), 2):
            there, back = self.latency(a, b, self.at), self.latency(b, a, self.at)
            self.book.link_sample(a, b, self.now, round_trip=(there + back) * self._noisy())

    def _carry_out(self) -> None:
        if self._moving is not None and self.now >= self._moving[0]:
            _, operator, target = self._moving
            self._moving = None
            self.placement[operator] = target
            self._epochs[operator] += 1
            self._stats[operator] = PodStats(queue_messages=self._stats[operator].queue_messages)
            self.judge.case("p").history.finished(self.now)

    def _look(self) -> None:
        self.judge.listen()
        if self._moving is not None:
            return
        scene = Scene(self.spec, dict(self.placement), self.pins, tuple(self.nodes))
        if self.judge.cause(scene, self.now) is None:
            return
        decision = self.judge.decide(scene, self.judge.situation(scene, self.now), self.now)
        self.judge.looked(scene, self.now)
        self.texts.append(f"{self.at:g}: {decision.text}")
        if decision.order is not None:
            order = decision.order
            self.judge.case("p").history.ordered(order, self.now)
            self.moves.append((self.at, order.operator, order.node, order.reason))
            self._moving = (self.now + MOVE_SECONDS, order.operator, order.node)
