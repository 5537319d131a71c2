"""Why each operator is where it is: the terms of its cost, the next best node, and why that one lost."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from nomad.scheduler.arrays import Floats, Ints
from nomad.scheduler.instance import Instance
from nomad.scheduler.joint import merged
from nomad.scheduler.search import Answer
from nomad.scheduler.verdict import Case
from nomad.units import milliseconds

ALTERNATIVES = 5000
"""Moves of one operator that are looked at; of more, the most promising."""


def describe(case: Case, answer: Answer, *, joint_form: bool) -> dict[str, Any]:
    """The answer in its JSON form. `joint_form`: the problem had `pipelines`, so say also what became of each."""
    assert answer.best is not None
    work = merged(case.works)
    instance = Instance(case.seats, work, contended=case.contended, link_room=case.link_room)
    chosen = answer.best.chosen
    times = Counter(operator for _, operator in work.ids)
    unique = max(times.values()) == 1
    names = [operator if unique else f"{pipeline}.{operator}" for pipeline, operator in work.ids]
    nodes = [case.seats.ids[node] for node in chosen.tolist()]
    finish = instance.finishes(chosen[None, :])[0]
    latency = float(instance.latencies(finish[None, :])[0])
    terms = [_terms(instance, chosen, finish, op) for op in range(instance.size)]
    second = _alternatives(instance, chosen, latency)
    reasons: dict[str, Any] = {}
    for op, name in enumerate(names):
        before = terms[op].pop("waits_for")
        runner_up, text = _lost(instance, chosen, op, second.get(op, []), latency)
        reasons[name] = {
            "node": nodes[op],
            "terms": terms[op],
            "finish": float(finish[op]),
            "waits_for": None if before is None else names[before],
            "runner_up": runner_up,
            "text": text,
        }
    placement = dict(zip(names, nodes, strict=True))
    out: dict[str, Any] = {"feasible": True, "placement": placement, "latency": latency, "reasons": reasons}
    out["proven"] = answer.proven
    if joint_form:
        out["pipelines"] = {
            ids[0]: {
                "placement": {work.ids[op][1]: nodes[op] for op in np.flatnonzero(work.group == group).tolist()},
                "latency": float(finish[work.group == group].max()),
            }
            for group, ids in sorted({int(g): ids for g, ids in zip(work.group, work.ids, strict=True)}.items())
        }
    return out


def _terms(instance: Instance, chosen: Ints, finish: Floats, op: int) -> dict[str, Any]:
    """Seconds: what it waits for, its transfer, its processing, and what others on its node add to that."""
    node = int(chosen[op])
    inputs = [
        (float(finish[before] + instance.transfer[before, op][chosen[before], node]), -before)
        for before in instance.inputs[op]
    ]
    arrival, last = max(inputs, default=(0.0, 1))
    before = None if last == 1 else -last
    processing = float(instance.processing[op][node])
    crowd = float(instance.contention(chosen[None, :])[0][op]) if instance.contended else 1.0
    return {
        "input": 0.0 if before is None else float(finish[before]),
        "transfer": 0.0 if before is None else arrival - float(finish[before]),
        "processing": processing,
        "queueing": processing * (crowd - 1),
        "waits_for": before,
    }


Alternative = tuple[float, float, int, float]
"""Latency of the whole, finish of the operator, node, excess of capacity; of moving one operator there."""


def _alternatives(instance: Instance, chosen: Ints, latency: float) -> dict[int, list[Alternative]]:
    op, node = np.nonzero(instance.allowed & (np.arange(instance.places) != chosen[:, None]))
    if not len(op):
        return {}
    most = min(ALTERNATIVES, 4_000_000 // (len(instance.scarce) + instance.places))
    if len(op) > most:
        each = max(4, most // instance.size)
        through = np.where(instance.allowed, instance.through, np.inf)
        rank = through.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
        near = rank[op, node] < each
        op, node = op[near], node[near]
    rows = np.repeat(chosen[None, :], len(op), axis=0)
    rows[np.arange(len(op)), op] = node
    finish = instance.finishes(rows)
    latencies, excess = instance.latencies(finish), instance.excess(rows)
    out: dict[int, list[Alternative]] = {}
    own = finish[np.arange(len(op)), op]
    for number in np.lexsort((node, own, latencies, op)).tolist():
        if np.isfinite(latencies[number]):
            entry = (float(latencies[number]), float(own[number]), int(node[number]), float(excess[number]))
            out.setdefault(int(op[number]), []).append(entry)
    return out


def _lost(
    instance: Instance, chosen: Ints, op: int, others: list[Alternative], latency: float
) -> tuple[dict[str, Any] | None, str]:
    """The runner-up, and the reason as a sentence."""
    ids = instance.seats.ids
    here = ids[int(chosen[op])]
    if not others:
        only = "the only node that it may be on"
        return None, f"{here} is {only}" if instance.allowed[
            op
        ].sum() <= 1 else f"no other node can be reached than {here}"
    open_ = [other for other in others if not other[3]]
    first = open_[0] if open_ else others[0]
    full = next((other for other in others if other[3] and other[0] < latency * (1 - 1e-9)), None)
    there = ids[first[2]]
    if first[3]:
        why = f"moved alone to {there} it would break {_broken(instance, chosen, op, first[2])}"
    elif first[0] > latency * (1 + 1e-9):
        why = f"on {there} the latency would be {milliseconds(first[0])}, {milliseconds(first[0] - latency)} more"
    elif first[0] < latency * (1 - 1e-9):  # of a placement that isn't the best: it runs already, or is somebody's wish
        why = f"on {there} the latency would be {milliseconds(first[0])}, {milliseconds(latency - first[0])} less"
    else:
        why = f"on {there} the latency would be no less ({milliseconds(first[0])}); ties go by finish, then by name"
    text = f"{milliseconds(latency)} with it on {here}; {why}"
    if full is not None and full is not first:
        there_full = ids[full[2]]
        text += f"; {there_full} would be {milliseconds(latency - full[0])} faster, but that breaks " + _broken(
            instance, chosen, op, full[2]
        )
    return {"node": there, "latency": first[0], "finish": first[1], "why": why}, text


def _broken(instance: Instance, chosen: Ints, op: int, node: int) -> str:
    moved = chosen.copy()
    moved[op] = node
    names = ("memory", "cpu")
    used = instance.used(moved[None, :])
    for number, resource in enumerate(instance.resources.tolist()):
        over = used[number, 0, node] - max(float(instance.room[number, node]), 0.0)
        if over > 0:
            unit = f"{over:.3g} MiB" if resource == 0 else f"{over:.3g} reference-seconds per second"
            return f"its {names[resource]} by {unit}"
    return "the bandwidth of a link on the way"
