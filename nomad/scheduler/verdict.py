"""Which constraint can't be met, when there is no placement: found by doing without each in turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nomad.scheduler import joint
from nomad.scheduler.arrays import Floats, Ints
from nomad.scheduler.build import Cluster
from nomad.scheduler.instance import Seats, Work
from nomad.scheduler.problem import OperatorForm, PipelineForm
from nomad.scheduler.search import Answer, Effort

WITHOUT = Effort(widths=(32, 256), rounds=0)


@dataclass(frozen=True)
class Case:
    """All that a search needs."""

    seats: Seats
    works: Sequence[Work]
    contended: bool
    link_room: Floats | None
    effort: Effort

    def place(self, start: Ints | None = None) -> Answer:
        """Search."""
        return joint.place(
            self.seats,
            self.works,
            contended=self.contended,
            link_room=self.link_room,
            effort=self.effort,
            start=start,
        )


def explain(
    case: Case, cluster: Cluster, pipelines: Sequence[PipelineForm], *, proven: bool
) -> tuple[dict[str, Any], bool]:
    """{"constraint", "operator", "nearest", "text"}.

    constraint: "requires", "pin", "memory", "cpu", "bandwidth" or "route"; operator: whose, if it is one's.
    And whether it is certain that there is no placement; else none was found, `proven` says by what was searched.
    """
    for constraint, operator, nearest, text in _alone(case, cluster, pipelines):
        return _answer(constraint, operator, nearest, text, True)
    for constraint, easier in _with_one(case):
        answer = easier.place()
        if answer.best is None and answer.proven:
            return _answer(constraint, None, [], _together(constraint, case), True)
    for constraint, easier in _without_one(case):
        if easier.place().best is not None:
            return _answer(constraint, None, [], _together(constraint, case), proven)
    return _answer("capacity", None, [], "no single constraint is the reason: several can't be met together", proven)


def _answer(
    constraint: str, operator: str | None, nearest: list[dict[str, str]], text: str, proven: bool
) -> tuple[dict[str, Any], bool]:
    if not proven:
        text += "; that there is no placement at all was not proven"
    return {"constraint": constraint, "operator": operator, "nearest": nearest, "text": text}, proven


Finding = tuple[str, str | None, list[dict[str, str]], str]


def _alone(case: Case, cluster: Cluster, pipelines: Sequence[PipelineForm]) -> Iterator[Finding]:
    """What an operator, or an edge, can't get even with the cluster for itself."""
    for work, pipeline in zip(case.works, pipelines, strict=True):
        forms = {operator.id: operator for operator in pipeline.operators}
        names = [operator for _, operator in work.ids]
        for op, name in enumerate(names):
            form = forms[name]
            allowed = work.allowed[op]
            if not allowed.any():
                yield _nowhere(cluster, form, float(work.needs[1, op]))
                continue
            if case.contended:
                continue
            for resource, what, unit in ((0, "memory", "MiB of memory"), (1, "cpu", "reference-seconds per second")):
                short = work.needs[resource, op] - case.seats.room[resource]
                if (short[allowed] > 0).all():
                    near = sorted(np.flatnonzero(allowed).tolist(), key=lambda node: (short[node], node))[:3]
                    lacks = [{"node": case.seats.ids[n], "lacks": f"{_plain(short[n])} {unit}"} for n in near]
                    where = f"its node {form.pin!r} hasn't" if form.pin else "no node that it may be on has"
                    need = f"operator {name!r} needs {_plain(work.needs[resource, op])} {unit}"
                    yield what, name, lacks, f"{need}, and {where} that much left"
            if (work.needs[:, op, None] > case.seats.room)[:, allowed].any(axis=0).all():
                yield "memory", name, [], f"no node that operator {name!r} may be on has both the memory and the cpu"
        yield from _pinned_together(case, work, names)
        for source, target in work.edges:
            latency = case.seats.routes.latency
            if not np.isfinite(latency[np.ix_(work.allowed[source], work.allowed[target])]).any():
                ends = f"from any node where {names[source]!r} may be to one where {names[target]!r} may be"
                yield "route", names[target], [], f"there is no way {ends}"


def _plain(amount: float) -> str:
    """Four digits, or all that stand before the point: 102400, not 1.024e+05."""
    return f"{amount:.0f}" if amount >= 1000 else f"{amount:.4g}"


def _nowhere(cluster: Cluster, form: OperatorForm, load: float) -> Finding:
    """An operator that may be on no node: for its labels, or because it takes one message at a time and no core of
    those that it may be on keeps up."""
    needed = set(form.requires)
    nodes = cluster.nodes
    if form.pin is not None:
        able = [cluster.position[form.pin]]
    else:
        able = [number for number in range(len(nodes)) if needed <= cluster.labels[number]]
    if able:
        near = sorted(able, key=lambda number: (-nodes[number].speed, number))[:3]
        lacks = [{"node": nodes[n].id, "lacks": f"{load - nodes[n].speed:.4g} of speed"} for n in near]
        where = f"its node {form.pin!r} isn't" if form.pin is not None else "no node that it may be on is"
        text = f"operator {form.id!r} has {load:.4g} reference-seconds of work per second, one message at a time, and "
        return "cpu", form.id, lacks, f"{text}{where} that fast"
    near = sorted(range(len(nodes)), key=lambda number: (len(needed - cluster.labels[number]), number))[:3]
    lacks = [{"node": nodes[n].id, "lacks": "label " + ", ".join(sorted(needed - cluster.labels[n]))} for n in near]
    text = f"no node has all the labels that operator {form.id!r} requires: {', '.join(sorted(needed))}"
    return "requires", form.id, lacks, text


def _pinned_together(case: Case, work: Work, names: list[str]) -> Iterator[Finding]:
    if case.contended:
        return
    fixed = np.flatnonzero(work.allowed.sum(axis=1) == 1)
    at = work.allowed[fixed].argmax(axis=1) if len(fixed) else fixed
    for node in sorted(set(at.tolist())):
        here = fixed[at == node]
        for resource, what in ((0, "memory"), (1, "cpu")):
            need, room = work.needs[resource, here].sum(), case.seats.room[resource, node]
            if need > room:
                lacks = [{"node": case.seats.ids[node], "lacks": f"{need - room:.4g} of {what}"}]
                who = ", ".join(names[op] for op in here.tolist())
                yield (
                    what,
                    names[int(here[-1])],
                    lacks,
                    (f"{who} can be nowhere but on {case.seats.ids[node]}, which hasn't the {what} for all of them"),
                )


def _with_one(case: Case) -> Iterator[tuple[str, Case]]:
    """The case with the way there is between nodes and no capacity, then with one kind of capacity in turn."""
    case = replace(case, effort=WITHOUT)
    room = case.seats.room
    boundless = replace(case, seats=replace(case.seats, room=np.full_like(room, np.inf)), link_room=None)
    yield "route", boundless
    if not case.contended:
        for resource, name in ((0, "memory"), (1, "cpu")):
            one = np.full_like(room, np.inf)
            one[resource] = room[resource]
            yield name, replace(boundless, seats=replace(case.seats, room=one))
        yield "bandwidth", replace(boundless, link_room=case.link_room)


def _without_one(case: Case) -> Iterator[tuple[str, Case]]:
    """The case without each constraint in turn."""
    case = replace(case, effort=WITHOUT)
    seats = case.seats
    if not case.contended:
        yield "bandwidth", replace(case, link_room=None)
        for resource, name in ((0, "memory"), (1, "cpu")):
            room = seats.room.copy()
            room[resource] = np.inf
            yield name, replace(case, seats=replace(seats, room=room))
    labels = [
        replace(work, allowed=np.where(work.allowed.sum(axis=1, keepdims=True) == 1, work.allowed, True))
        for work in case.works
    ]
    yield "requires", replace(case, works=labels)
    yield "pin", replace(case, works=[replace(work, allowed=np.ones_like(work.allowed)) for work in case.works])


def _together(constraint: str, case: Case) -> str:
    need = sum(work.needs.sum(axis=1) for work in case.works)
    left = np.maximum(case.seats.room, 0.0).sum(axis=1)
    if constraint == "memory":
        return (
            "the nodes haven't the memory for all operators together "
            f"({need[0]:.4g} MiB are needed, {left[0]:.4g} are left)"
        )
    if constraint == "cpu":
        return (
            "the nodes haven't the processing power for all operators together "
            f"({need[1]:.4g} reference-seconds per second are needed, {left[1]:.4g} are left)"
        )
    return {
        "bandwidth": "the links haven't the bandwidth for what flows between the operators",
        "route": "the operators' nodes can't all reach one another over the links there are",
        "requires": "the nodes with the labels that operators require don't suffice for all of them",
        "pin": "where operators are pinned, the others find no place",
    }[constraint]
