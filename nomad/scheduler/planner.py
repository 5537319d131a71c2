"""From a problem in its JSON form to an answer in its JSON form: what users, the command line and REST call.

`plan` answers one problem. A `Planner` keeps the routes, so that it can be told of a change and plan again at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from nomad.errors import PlacementError
from nomad.scheduler import build, candidates, reasons, refine, verdict
from nomad.scheduler.arrays import Ints
from nomad.scheduler.instance import Instance, Seats
from nomad.scheduler.problem import LinkForm, NodeForm, checked, read
from nomad.scheduler.routes import Routes
from nomad.scheduler.search import Answer, Effort

ALL_PAIRS = 160
"""Up to this many nodes, all are considered."""
FEW, MANY, MANY_MORE = 64, 128, 400
"""Of larger clusters so many: for few operators, for many, and when with those there is no placement."""
LIGHT = Effort(widths=(16, 48), contended_widths=(16,), rounds=0)
"""For pipelines with very many operators."""
SHORT = Effort(widths=(32, 96), contended_widths=(32,), rounds=2)
"""For who asks twice a second whether there is something better."""


def plan(problem: Any) -> dict[str, Any]:
    """Where each operator should be. Raises `PlacementError` if the problem isn't valid."""
    return Planner(problem).plan()


class Planner:
    """A problem that may change a little, and the answers to it."""

    def __init__(self, problem: Any):
        self._problem = read(problem)
        self._pipelines = self._problem.all_pipelines
        self._direct = self._problem.routing == "direct"
        self._contended = self._problem.contention == "co-located"
        self._cluster = build.Cluster.of(self._problem)
        self._operators = sum(len(pipeline.operators) for pipeline in self._pipelines)
        self._last: Ints | None = None
        everything = np.arange(len(self._cluster.nodes))
        if len(everything) <= ALL_PAIRS:
            self._consider(everything)
        else:
            self._look_at(FEW if self._operators <= 24 else MANY)

    def _look_at(self, count: int) -> None:
        """Of a large cluster, consider `count` nodes only."""
        everything = np.arange(len(self._cluster.nodes))
        work = build.work_of(self._pipelines, self._cluster, everything, contended=self._contended)
        self._consider(candidates.choose(self._cluster, work, count, direct=self._direct))

    def _consider(self, among: Ints) -> None:
        self._among = among
        self._last = None
        self._routes = Routes.make(self._cluster.links, len(self._cluster.nodes), among, direct=self._direct)
        self._number_works()

    def _number_works(self) -> None:
        cluster, among, contended = self._cluster, self._among, self._contended
        self._works = [build.work_of([p], cluster, among, contended=contended) for p in self._pipelines]

    def change_node(self, id: str, **values: Any) -> None:
        """Some fields of a node are different now. Raises `PlacementError`."""
        position = self._cluster.position.get(id)
        if position is None:
            raise PlacementError(f"there is no node {id!r}")
        form = checked(NodeForm, self._cluster.nodes[position].model_dump() | values)
        nodes = list(self._cluster.nodes)
        nodes[position] = form
        speed, room = self._cluster.speed.copy(), self._cluster.room.copy()
        speed[position], room[:, position] = form.speed, build.free(form)
        labels = list(self._cluster.labels)
        labels[position] = frozenset(form.labels)
        self._cluster = replace(self._cluster, nodes=tuple(nodes), speed=speed, room=room, labels=tuple(labels))
        if "labels" in values or "speed" in values:
            self._number_works()

    def change_link(self, source: str, target: str, **values: Any) -> None:
        """Some fields of a link are different now. Raises `PlacementError` if there is no such link."""
        links = self._cluster.links
        ends = [self._cluster.position.get(end, -1) for end in (source, target)]
        found = np.flatnonzero((links.source == ends[0]) & (links.target == ends[1]))
        if not len(found):
            raise PlacementError(f"there is no link {source!r} -> {target!r}")
        at = int(found[0])
        was = {
            "latency": float(links.latency[at]),
            "bandwidth": None if np.isinf(links.bandwidth[at]) else float(links.bandwidth[at]),
            "used": 0.0 if np.isinf(links.free[at]) else float(links.bandwidth[at] - links.free[at]),
        }
        form = checked(LinkForm, {"from": source, "to": target, **was, **values})
        latency, bandwidth, free = links.latency.copy(), links.bandwidth.copy(), links.free.copy()
        latency[at] = form.latency
        bandwidth[at] = np.inf if form.bandwidth is None else form.bandwidth
        free[at] = bandwidth[at] - form.used
        links = replace(links, latency=latency, bandwidth=bandwidth, free=free)
        self._cluster = replace(self._cluster, links=links)
        self._routes = self._routes.changed(links, at)

    def plan(self) -> dict[str, Any]:
        """The best placement found, why each operator is where it is; or which constraint can't be met."""
        case, answer = self._place()
        if answer.best is None:
            reason, proven = verdict.explain(case, self._cluster, self._pipelines, proven=answer.proven)
            return {"feasible": False, "placement": {}, "latency": None, "reasons": reason, "proven": proven}
        return reasons.describe(case, answer, joint_form=self._problem.pipelines is not None)

    def placement(self) -> dict[str, str] | None:
        """The best placement that a short search finds of one pipeline, operator to node, without a word about it."""
        case, answer = self._place(SHORT)
        if answer.best is None:
            return None
        return {
            operator: case.seats.ids[node]
            for (_, operator), node in zip(case.works[0].ids, answer.best.chosen.tolist(), strict=True)
        }

    def describe(self, placement: Mapping[str, str]) -> dict[str, Any] | None:
        """What `plan` would say of a given placement of one pipeline; None if it breaks a limit, or isn't possible."""
        position = {id: number for number, id in enumerate(self._case().seats.ids)}
        if not all(node in position for node in placement.values()):
            nodes = [self._cluster.position[node] for node in placement.values() if node in self._cluster.position]
            self._consider(np.union1d(self._among, np.array(nodes, dtype=np.int64)))
            position = {id: number for number, id in enumerate(self._case().seats.ids)}
        case = self._case()
        names = [operator for _, operator in case.works[0].ids]
        if not all(placement[name] in position for name in names):
            return None
        chosen = np.array([position[placement[name]] for name in names], dtype=np.int64)
        instance = Instance(case.seats, case.works[0], contended=self._contended, link_room=case.link_room)
        rated = refine.rate(instance, chosen)
        if rated.excess or not np.isfinite(rated.latency):
            return None
        return reasons.describe(case, Answer(rated, False), joint_form=False)

    def _place(self, effort: Effort | None = None) -> tuple[verdict.Case, Answer]:
        case = self._case(effort)
        answer = case.place(self._last)
        some = len(self._among) < len(self._cluster.nodes)
        if answer.best is None and some and len(self._among) < MANY_MORE:
            self._look_at(MANY_MORE)
            case = self._case(effort)
            answer = case.place()
        if some:
            answer = replace(answer, proven=False)
        self._last = answer.best.chosen if answer.best is not None else None
        return case, answer

    def _case(self, effort: Effort | None = None) -> verdict.Case:
        cluster = self._cluster
        seats = Seats(
            tuple(cluster.nodes[node].id for node in self._among.tolist()),
            cluster.speed[self._among],
            cluster.room[:, self._among],
            self._routes,
        )
        effort = effort or (Effort() if self._operators <= 24 else LIGHT)
        return verdict.Case(seats, self._works, self._contended, build.link_room(cluster.links), effort)
