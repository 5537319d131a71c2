"""Search level by level: operators in topological order, each state an assignment of those so far.

A state is dropped when its bound (its finishes + the cost to go) isn't better than the best placement known, when
another one with the same future is nowhere worse, or when what is left can't fit any more. If no more than `width`
states ever remain, nothing was missed: the answer is the optimum (or the proof that there is none). Else the most
promising are kept, and the answer is a good one. The work is bounded by width x operators x nodes, never by a clock.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nomad.scheduler.arrays import Bools, Floats, Ints
from nomad.scheduler.instance import Instance

SLACK = 1 + 1e-12
"""Bounds that differ by rounding only are equal."""
_MIX = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class Found:
    """What a search gave."""

    chosen: Ints
    """[placement, operator], the best first; empty if none was found."""
    latency: Floats
    exact: bool
    """Nothing was missed: the first is the optimum, or there is none (that is better than what was known)."""
    depth: int = 0
    """How many operators could be placed."""


class _States:
    """Partial assignments, side by side."""

    __slots__ = ("bounds", "chosen", "counts", "finish", "flow", "total", "used")

    def __init__(self, instance: Instance, reserved: Floats):
        self.chosen: Ints = np.zeros((1, instance.size), dtype=np.int64)
        self.finish: Floats = np.zeros((1, instance.size))
        self.used: Floats = reserved[:, None, :].copy()
        self.flow: Floats = np.zeros((1, len(instance.scarce) + 1))
        self.bounds: Floats = instance.bounds[None, :].copy()
        self.total: Floats = np.zeros(1)

    def take(self, rows: Ints) -> None:
        """Keep these."""
        self.chosen, self.finish = self.chosen[rows], self.finish[rows]
        self.used = self.used[:, rows]
        self.flow, self.bounds, self.total = self.flow[rows], self.bounds[rows], self.total[rows]


def search(instance: Instance, width: int, known: float = np.inf, spread: float = 0.05) -> Found:
    """The best placements found with `width` states a level, none worse than `known`.

    `spread`: how much the mean finish counts beside the bound when states must be let go.
    """
    order = range(instance.size)
    fixed = instance.allowed.sum(axis=1) == 1
    reserved = np.zeros((len(instance.needs), instance.places))
    for op in np.flatnonzero(fixed):  # room that is certain to be taken
        reserved[:, instance.allowed[op].argmax()] += instance.needs[:, op]
    if (reserved > np.maximum(instance.room, 0.0)).any() or not np.isfinite(instance.bound):
        return Found(np.empty((0, instance.size), dtype=np.int64), np.empty(0), True)
    states = _States(instance, reserved)
    exact = True
    limit = known * SLACK
    for op in order:
        finish, estimate, bound, earlier = _expand(instance, states, op, bool(fixed[op]))
        picked = np.flatnonzero(bound.ravel() <= limit)
        picked = picked[np.isfinite(bound.ravel()[picked])]
        score = bound.ravel()[picked] + spread / (op + 1) * (states.total[picked // instance.places] + estimate.ravel()[picked])
        if len(picked) > 4 * width:
            exact = False
            keep = np.argpartition(score, 4 * width)[: 4 * width]
            keep.sort()
            picked, score = picked[keep], score[keep]
        ranked = np.argsort(score, kind="stable")
        picked = picked[ranked]
        _advance(instance, states, op, picked, finish, estimate, bound, earlier, bool(fixed[op]))
        alive = _valid(instance, states, op, fixed)
        if not instance.contended:
            alive &= _undominated(instance, states, op)
        rows = np.flatnonzero(alive)
        if len(rows) > width:
            exact = False
            rows = rows[:width]
        states.take(rows)
        if not len(rows):
            return Found(np.empty((0, instance.size), dtype=np.int64), np.empty(0), exact, op)
    latency = instance.latencies(states.finish)
    keys = [states.chosen[:, op] for op in reversed(order)]
    best = np.lexsort((*keys, states.finish.sum(axis=1), latency))
    return Found(states.chosen[best], latency[best], exact, instance.size)


def _expand(
    instance: Instance, states: _States, op: int, fixed: bool
) -> tuple[Floats, Floats, Floats, list[Floats]]:
    """[state, node]: finish of `op` there, finish + cost to go, bound of the whole; and the finishes of those before."""
    rows = len(states.chosen)
    earlier: list[Floats] = []
    group = int(instance.work.group[op])
    if instance.contended:
        finish, earlier, worst = _contended(instance, states, op)
        estimate = finish + instance.onward[op]
        worst = np.maximum(worst, estimate)
    else:
        start = np.zeros((rows, instance.places))
        for before in instance.inputs[op]:
            np.maximum(
                start, states.finish[:, before, None] + instance.transfer[before, op][states.chosen[:, before]], out=start
            )
        finish = start + instance.cost[op]
        for number, needs in enumerate(instance.needs):
            if needs[op] and not fixed:
                finish[states.used[number] + needs[op] > instance.room[number]] = np.inf
        if len(instance.scarce):
            left = instance.flow_room - states.flow
            row = np.arange(rows)[:, None, None]
            for before in instance.inputs[op]:
                load = instance.work.flow[before]
                if load:
                    room = left[row, instance.ways[states.chosen[:, before]]].min(axis=2)
                    finish[load > room] = np.inf
        estimate = finish + instance.onward[op]
        worst = estimate
    now = states.bounds[:, group, None]
    bound = np.maximum(now, worst)
    if instance.groups > 1:
        bound = bound + (states.bounds.sum(axis=1)[:, None] - now)
    return finish, estimate, bound, earlier


def _contended(instance: Instance, states: _States, op: int) -> tuple[Floats, list[Floats], Floats]:
    """As `_expand`, where one more operator on a node slows down those that are there already."""
    work, rows = instance.work, len(states.chosen)
    row = np.arange(rows)
    home = np.flatnonzero(work.home[:op] == work.home[op])
    count = np.zeros((rows, instance.places))
    for other in home:
        count[row, states.chosen[:, other]] += 1
    finishes: list[Floats] = []
    worst = np.zeros((rows, instance.places))
    same = set(home.tolist())
    for other in range(op):
        here = states.chosen[:, other]
        if other not in same:
            finishes.append(np.broadcast_to(states.finish[:, other, None], (rows, instance.places)))
            continue
        slow = count[row, here][:, None] + (here[:, None] == np.arange(instance.places))
        own = instance.cost[other][here][:, None] * slow
        start: Floats | float = 0.0
        for before in instance.inputs[other]:
            way = instance.transfer[before, other][states.chosen[:, before], here]
            start = np.maximum(start, finishes[before] + way[:, None])
        finishes.append(start + own)
        if not instance.outputs[other] or any(after >= op for after in instance.outputs[other]):
            np.maximum(worst, finishes[other] + instance.onward[other][here][:, None], out=worst)
    arrival: Floats | float = 0.0
    for before in instance.inputs[op]:
        arrival = np.maximum(arrival, finishes[before] + instance.transfer[before, op][states.chosen[:, before]])
    return arrival + instance.cost[op] * (count + 1), finishes, worst


def _advance(
    instance: Instance,
    states: _States,
    op: int,
    picked: Ints,
    finish: Floats,
    estimate: Floats,
    bound: Floats,
    earlier: list[Floats],
    fixed: bool,
) -> None:
    row, node = np.divmod(picked, instance.places)
    states.take(row)
    every = np.arange(len(row))
    states.chosen[:, op] = node
    for other, values in enumerate(earlier):
        states.finish[:, other] = values[row, node]
    states.finish[:, op] = finish.ravel()[picked]
    group = int(instance.work.group[op])
    rest = states.bounds.sum(axis=1) - states.bounds[:, group] if instance.groups > 1 else 0.0
    states.bounds[:, group] = np.maximum(states.bounds[:, group], bound.ravel()[picked] - rest)
    states.total += estimate.ravel()[picked]
    if not fixed:
        for number, needs in enumerate(instance.needs):
            states.used[number, every, node] += needs[op]
    if len(instance.scarce):
        for before in instance.inputs[op]:
            load = instance.work.flow[before]
            if load:
                way = instance.ways[states.chosen[:, before], node]
                np.add.at(states.flow, (every[:, None], way), load)


def _valid(instance: Instance, states: _States, op: int, fixed: Bools) -> Bools:
    """Whether the links hold, and whether what is left can still fit as far as can be said at a glance."""
    alive = np.ones(len(states.chosen), dtype=bool)
    if len(instance.scarce) and len(instance.inputs[op]) > 1:
        alive &= (states.flow[:, :-1] <= np.maximum(instance.flow_room[:-1], 0.0)).all(axis=1)
    left = np.flatnonzero(~fixed[op + 1 :]) + op + 1
    for number, needs in enumerate(instance.needs):
        rest = np.sort(needs[left])[::-1]
        if not len(rest) or not rest[0]:
            continue
        free = instance.room[number] - states.used[number]
        sizes, first = np.unique(-rest, return_index=True)
        for size, at in list(zip(-sizes, first, strict=True))[:4]:
            if size > 0:
                as_large = int((rest >= size).sum())
                alive &= np.floor(np.maximum(free, 0.0) / size + 1e-9).sum(axis=1) >= as_large
    return alive


def _undominated(instance: Instance, states: _States, op: int) -> Bools:
    """Of states with the same future, those that aren't worse in everything than the first of them."""
    if len(states.chosen) < 2:
        return np.ones(len(states.chosen), dtype=bool)
    open_ = [other for other in range(op + 1) if any(after > op for after in instance.outputs[other])]
    key = np.zeros(len(states.chosen), dtype=np.uint64)
    columns = [states.chosen[:, other] for other in open_]
    if op + 1 < instance.size:
        for number, needs in enumerate(instance.needs):
            scale = 2.0**30 / max(float(needs.sum()), 1e-300)
            columns.extend(np.rint(states.used[number] * scale).astype(np.int64).T)
        if len(instance.scarce):
            scale = 2.0**30 / max(float(instance.work.flow.sum()), 1e-300)
            columns.extend(np.rint(states.flow[:, :-1] * scale).astype(np.int64).T)
    for column in columns:
        key = (key ^ column.astype(np.uint64)) * _MIX
        key ^= key >> np.uint64(29)
    order = np.argsort(key, kind="stable")  # within a key, the better score first
    ordered = key[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    first = order[np.repeat(starts, np.diff(np.append(starts, len(order))))]
    values = np.column_stack((states.finish[:, open_], states.bounds, states.total))
    worse = (values[order] >= values[first]).all(axis=1) & (first != order)
    alive = np.ones(len(key), dtype=bool)
    alive[order[worse]] = False
    return alive
