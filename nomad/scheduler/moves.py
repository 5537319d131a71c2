"""What a placement is worth as it is, what moving one operator would make of it, and the way to a better one.

Unlike a plan, which keeps all limits, this looks at placements that may break some: a pipeline that runs isn't ended
for an operator that can't keep up. What is above a limit of cpu or bandwidth becomes a queue, and costs what a
message would wait in it (`Worth.queueing`). Memory is a limit that no move may break. `drift` calls this; it decides
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nomad.scheduler import build, candidates
from nomad.scheduler.arrays import Floats, Ints
from nomad.scheduler.instance import TOLERANCE, Instance, Seats
from nomad.scheduler.planner import ALL_PAIRS, FEW, Planner
from nomad.scheduler.problem import ProblemForm, read
from nomad.scheduler.routes import Routes

MOST_ABOVE = 10.0
"""How far above a limit counts: from elevenfold on, worse is no worse."""
MOST_STEPS = 6
"""Moves of one operator in a row that are looked ahead."""
EQUAL = 1e-9
"""Relative: less isn't a gain."""


@dataclass(frozen=True, slots=True)
class Worth:
    """Seconds per message."""

    latency: float
    """By the model of docs/placement.md; infinite where the placement isn't possible."""
    queueing: float
    """Mean wait over the horizon in queues that grow, because limits are exceeded."""

    @property
    def total(self) -> float:
        return self.latency + self.queueing


@dataclass(frozen=True, slots=True)
class Step:
    """A move of one operator, and what the placement is worth after it."""

    operator: str
    node: str
    worth: Worth


class Outlook:
    """A problem with one pipeline, and where its operators are now."""

    def __init__(self, problem: Any, present: Mapping[str, str], *, horizon: float, excused: bool = False) -> None:
        """`horizon`: seconds that are looked ahead. `excused`: limits that are exceeded now count only as far as a
        move makes it worse, since nothing seen confirms that queues grow. Raises `PlacementError`."""
        self._form: ProblemForm = read(problem)
        pipeline = self._form.all_pipelines[0]
        cluster = build.Cluster.of(self._form)
        everything = np.arange(len(cluster.nodes))
        contended = self._form.contention == "co-located"
        among = everything
        if len(everything) > ALL_PAIRS:
            work = build.work_of([pipeline], cluster, everything, contended=True)
            chosen = candidates.choose(cluster, work, FEW, direct=self._form.routing == "direct")
            among = np.union1d(chosen, [cluster.position[node] for node in present.values()])
        routes = Routes.make(cluster.links, len(cluster.nodes), among, direct=self._form.routing == "direct")
        work = build.work_of([pipeline], cluster, among, contended=True)
        boundless = np.full((2, len(among)), np.inf)
        seats = Seats(tuple(cluster.nodes[node].id for node in among.tolist()), cluster.speed[among], boundless, routes)
        self._instance = Instance(seats, work, contended=contended)
        self._names = [operator for _, operator in work.ids]
        self._places = {id: number for number, id in enumerate(seats.ids)}
        self._memory_room = cluster.room[0, among]
        self._cpu_room = np.zeros(0) if contended else np.maximum(cluster.room[1, among], 0.0)
        link_room = np.zeros(1) if contended else build.link_room(cluster.links)
        limited = np.flatnonzero(np.isfinite(link_room[:-1]))
        self._link_room = link_room[limited]
        self._column = np.full(len(link_room), len(limited))
        """Of each link its place in `_link_room`; those without a limit, of which there may be thousands, share one."""
        self._column[limited] = np.arange(len(limited))
        serial = {operator.id for operator in pipeline.operators if operator.serial}
        self._serial = np.array([name in serial for name in self._names])
        self._horizon = horizon
        self._present = self._row(present)
        self._memory_now = self._memory(self._present[None, :])[0]
        self._excess = 0.0
        self.now = self._worth(self._present)
        if excused:
            self._excess = self.now.queueing
            self.now = Worth(self.now.latency, 0.0)

    def worth(self, placement: Mapping[str, str]) -> Worth:
        """What a placement would be worth."""
        return self._worth(self._row(placement))

    def singles(self) -> list[Step]:
        """The moves of one operator that are possible now, the best first; ties by name."""
        return self._singles(self._present)

    def ways(self) -> list[list[Step]]:
        """Sequences of single moves to better placements: by the best move each time, and to the best plan there is."""
        return [way for way in (self._downhill(), self._to_the_plan()) if way]

    # -- inside

    def _row(self, placement: Mapping[str, str]) -> Ints:
        return np.array([self._places[placement[name]] for name in self._names], dtype=np.int64)

    def _worth(self, row: Ints) -> Worth:
        latency, queueing = self._rate(row[None, :])
        return Worth(float(latency[0]), float(queueing[0]))

    def _rate(self, rows: Ints) -> tuple[Floats, Floats]:
        """[placement, operator] -> latency and queueing of each placement."""
        instance = self._instance
        latency = instance.latencies(instance.finishes(rows))
        if instance.contended:
            return latency, np.zeros(len(rows))
        above = self._operators_above(rows) + self._nodes_above(rows) + self._links_above(rows)
        return latency, np.maximum(above * self._horizon / 2 - self._excess, 0.0)

    def _operators_above(self, rows: Ints) -> Floats:
        """A core that takes 1 + x seconds for what comes in a second lets each next message wait x longer."""
        use = self._instance.work.needs[1] / self._instance.seats.speed[rows]
        return np.asarray(_above(np.where(self._serial, use, 0.0)).sum(axis=1))

    def _nodes_above(self, rows: Ints) -> Floats:
        used = self._sums(rows, self._instance.work.needs[1])
        use = np.where(used > 0, used / np.maximum(self._cpu_room, 1e-12), 0.0)
        return np.asarray(_above(use).sum(axis=1))

    def _links_above(self, rows: Ints) -> Floats:
        work, ways = self._instance.work, self._instance.seats.routes.paths
        limits = len(self._link_room)
        if not limits:
            return np.zeros(len(rows))
        flows = np.zeros((len(rows), limits + 1))
        every = np.arange(len(rows))
        for source, target in work.edges:
            for hop in range(ways.shape[2]):
                flows[every, self._column[ways[rows[:, source], rows[:, target], hop]]] += work.flow[source]
        flows = flows[:, :limits]
        use = np.where(flows > 0, flows / np.maximum(self._link_room, 1e-12), 0.0)
        return np.asarray(_above(use).sum(axis=1))

    def _memory(self, rows: Ints) -> Floats:
        return self._sums(rows, self._instance.work.needs[0])

    def _sums(self, rows: Ints, each: Floats) -> Floats:
        """[placement, operator] -> [placement, node]: what the operators there take together."""
        places = self._instance.places
        cell = (np.arange(len(rows))[:, None] * places + rows).ravel()
        weights = np.broadcast_to(each, rows.shape).ravel()
        sums = np.bincount(cell, weights, minlength=len(rows) * places).reshape(len(rows), places)
        return np.asarray(sums, dtype=np.float64)

    def _room_for(self, rows: Ints) -> np.ndarray:
        """Which placements break no limit of memory that isn't broken now."""
        used = self._memory(rows)
        return np.asarray(((used <= self._memory_room) | (used <= self._memory_now)).all(axis=1))

    def _singles(self, row: Ints) -> list[Step]:
        instance = self._instance
        op, node = np.nonzero(instance.allowed & (np.arange(instance.places) != row[:, None]))
        if not len(op):
            return []
        rows = np.repeat(row[None, :], len(op), axis=0)
        rows[np.arange(len(op)), op] = node
        latency, queueing = self._rate(rows)
        total = latency + queueing
        keep = np.isfinite(total) & self._room_for(rows)
        names, ids = self._names, instance.seats.ids
        found = [
            Step(names[int(op[i])], ids[int(node[i])], Worth(float(latency[i]), float(queueing[i])))
            for i in np.flatnonzero(keep).tolist()
        ]
        return sorted(found, key=lambda step: (step.worth.total, step.operator, step.node))

    def _after(self, row: Ints, step: Step) -> Ints:
        row = row.copy()
        row[self._names.index(step.operator)] = self._places[step.node]
        return row

    def _downhill(self) -> list[Step]:
        row, total = self._present, self.now.total
        way: list[Step] = []
        while len(way) < MOST_STEPS:
            steps = self._singles(row)
            if not steps or not steps[0].worth.total < total * (1 - EQUAL):
                break
            way.append(steps[0])
            row, total = self._after(row, steps[0]), steps[0].worth.total
        return way

    def _to_the_plan(self) -> list[Step]:
        """To the best plan, each time by the move of the operators that must move which leaves the least latency."""
        found = Planner(self._form).placement()
        if found is None or not all(node in self._places for node in found.values()):
            return []
        left = {name for name in self._names if self._places[found[name]] != self._present[self._names.index(name)]}
        row = self._present
        way: list[Step] = []
        while left:
            steps = [s for s in self._singles(row) if s.operator in left and s.node == found[s.operator]]
            if not steps or len(way) == MOST_STEPS:
                return []
            way.append(steps[0])
            row = self._after(row, steps[0])
            left.discard(steps[0].operator)
        return way


def _above(use: Floats) -> Floats:
    """How far each share is above 1."""
    return np.clip(use - 1 - TOLERANCE, 0.0, MOST_ABOVE)
