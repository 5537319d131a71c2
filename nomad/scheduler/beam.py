"""Search level by level: operators in topological order, each state an assignment of those so far.

A state is dropped when its bound (its finishes + the cost to go) isn't better than the best placement known, when
another one with the same future is nowhere worse, or when what is left can't fit any more. If no more than `width`
states ever remain, nothing was missed: the answer is the optimum (or the proof that there is none). Else the most
promising are kept, and the answer is a good one. The work is bounded by width x operators x nodes, never by a clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nomad.scheduler.arrays import Bools, Floats, Ints
from nomad.scheduler.instance import Instance

LOOKED_AT = 8
"""How many of the operators to come are tried against the rooms that a state leaves."""
SLACK = 1 + 1e-12
"""Bounds that differ by rounding only are equal."""


def _mixed(values: Any) -> NDArray[np.uint64]:
    """Whole numbers to well-spread ones."""
    out: NDArray[np.uint64] = (values.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    out ^= out >> np.uint64(29)
    return out * np.uint64(0xBF58476D1CE4E5B9)


def _whole(amount: float, all_amounts: Floats) -> np.uint64:
    """An amount in units that are fine enough to tell sums of amounts apart."""
    return np.uint64(round(float(amount) * 2.0**40 / float(all_amounts.max())))


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

    __slots__ = ("bounds", "chosen", "finish", "flow", "mark", "total", "used")

    def __init__(self, instance: Instance, reserved: Floats):
        self.chosen: Ints = np.zeros((1, instance.size), dtype=np.int64)
        self.finish: Floats = np.zeros((1, instance.size))
        self.used: Floats = reserved[:, None, :].copy()
        self.flow: Floats = np.zeros((1, len(instance.scarce) + 1))
        self.bounds: Floats = instance.bounds[None, :].copy()
        self.total: Floats = np.zeros(1)
        self.mark: NDArray[np.uint64] = np.zeros(1, dtype=np.uint64)  # same capacities taken, same mark

    def take(self, rows: Ints) -> None:
        """Keep these."""
        self.chosen, self.finish = self.chosen[rows], self.finish[rows]
        self.used = self.used[:, rows]
        self.flow, self.bounds = self.flow[rows], self.bounds[rows]
        self.total, self.mark = self.total[rows], self.mark[rows]


def search(instance: Instance, width: int, known: float = np.inf, spread: float = 0.05, caution: float = 0.0) -> Found:
    """The best placements found with `width` states a level, none worse than `known`.

    When states must be let go, `spread` is how much the mean finish counts beside the bound, and `caution` how much it
    counts that few nodes have room for what is left.
    """
    order = range(instance.size)
    fixed = instance.allowed.sum(axis=1) == 1
    reserved = np.zeros((len(instance.needs), instance.places))
    for op in np.flatnonzero(fixed).tolist():  # room that is certain to be taken
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
        score = bound.ravel()[picked] + spread / (op + 1) * (
            states.total[picked // instance.places] + estimate.ravel()[picked]
        )
        if len(picked) > 2 * width:
            exact = False
            keep = np.argpartition(score, 2 * width)[: 2 * width]
            keep.sort()
            picked, score = picked[keep], score[keep]
        picked = picked[np.argsort(score, kind="stable")]
        _advance(instance, states, op, picked, finish, estimate, bound, earlier, bool(fixed[op]))
        alive, tightness = _look_ahead(instance, states, op, fixed, limit)
        if not alive.all():
            states.take(np.flatnonzero(alive))
            tightness = tightness[alive]
        rank = states.bounds.sum(axis=1) + spread / (op + 1) * states.total
        rank *= 1 + caution * tightness
        states.take(np.argsort(rank, kind="stable"))
        rows = np.arange(len(rank))
        if not instance.contended:
            rows = np.flatnonzero(_undominated(instance, states, op))
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


def _expand(instance: Instance, states: _States, op: int, fixed: bool) -> tuple[Floats, Floats, Floats, list[Floats]]:
    """[state, node]: finish of `op` there, finish + cost to go, bound of the whole; and the finishes before."""
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
                start,
                states.finish[:, before, None] + instance.transfer[before, op][states.chosen[:, before]],
                out=start,
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
    home = np.flatnonzero(work.group[:op] == work.group[op])
    count = np.zeros((rows, instance.places))
    for other in home.tolist():
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
        if not instance.outputs[other]:
            np.maximum(worst, finishes[other], out=worst)
        for after in instance.outputs[other]:
            if after > op:  # what those that are placed cost it is in its finish already
                np.maximum(worst, finishes[other] + instance.onward_by[other, after][here][:, None], out=worst)
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
            if needs[op]:
                states.used[number, every, node] += needs[op]
                states.mark += _whole(needs[op], needs) * _mixed(node + number * instance.places)
    if len(instance.scarce):
        for before in instance.inputs[op]:
            load = instance.work.flow[before]
            if load:
                way = instance.ways[states.chosen[:, before], node]
                np.add.at(states.flow, (every[:, None], way), load)
                taken = _mixed(way + 2 * instance.places) * (way < len(instance.scarce))
                states.mark += _whole(load, instance.work.flow) * taken.sum(axis=1, dtype=np.uint64)


def _look_ahead(instance: Instance, states: _States, op: int, fixed: Bools, limit: float) -> tuple[Bools, Floats]:
    """Which states can still become a placement within `limit`, as far as can be said at a glance, and how tight it is.

    Raises the bounds of the states by what the rooms left say: each operator to come has to go where it fits.
    """
    rows = len(states.chosen)
    alive = np.ones(rows, dtype=bool)
    tightness = np.zeros(rows)
    if len(instance.scarce) and len(instance.inputs[op]) > 1:
        alive &= (states.flow[:, :-1] <= np.maximum(instance.flow_room[:-1], 0.0)).all(axis=1)
    if not len(instance.needs) or not rows:
        return alive, tightness
    left = [later for later in range(op + 1, instance.size) if not fixed[later]]
    if not left:
        return alive, tightness
    free = instance.room[:, None, :] - states.used
    for number, needs in enumerate(instance.needs):
        rest = needs[left]
        size = float(rest.max())
        if size > 0:  # enough nodes for the largest
            alive &= (free[number] >= size).any(axis=1)
        size = float(rest[rest > 0].min(initial=np.inf))
        if size < np.inf:  # what is too little for the smallest is lost
            usable = np.where(free[number] >= size, free[number], 0.0).sum(axis=1)
            alive &= usable * (1 + 1e-9) >= rest.sum()
        size = float(np.median(rest))
        if size > 0:  # and for the larger half
            held = np.floor(np.maximum(free[number], 0.0) * (1 / size) + 1e-9).sum(axis=1)
            alive &= held >= int((rest >= size).sum())
    if len(left) > LOOKED_AT:  # those that come next, and the largest
        share = (instance.needs / np.maximum(instance.needs.sum(axis=1), 1e-300)[:, None]).sum(axis=0)
        left.sort(key=lambda later: (not any(before <= op for before in instance.inputs[later]), -share[later], later))
        left = left[:LOOKED_AT]
    fits: dict[tuple[float, ...], Any] = {}
    for later in left:
        key = tuple(instance.needs[:, later].tolist())
        if key not in fits:
            fit = free[0] >= instance.needs[0, later]
            for number in range(1, len(free)):
                fit &= free[number] >= instance.needs[number, later]
            fits[key] = fit
        estimate: Floats = instance.through[later]
        reached = [before for before in instance.inputs[later] if before <= op]
        if reached:
            start: Floats = instance.arrival[later]
            for before in reached:
                start = np.maximum(
                    start, states.finish[:, before, None] + instance.transfer[before, later][states.chosen[:, before]]
                )
            estimate = start + (instance.cost[later] + instance.onward[later])
        at_least = np.where(fits[key], estimate, np.inf)
        least = at_least.min(axis=1)
        group = instance.work.group[later]
        np.maximum(states.bounds[:, group], least, out=states.bounds[:, group])
        tightness += 1.0 / np.maximum(np.isfinite(at_least).sum(axis=1), 1)
    alive &= states.bounds.sum(axis=1) <= min(limit, np.finfo(float).max)
    return alive, tightness


def _undominated(instance: Instance, states: _States, op: int) -> Bools:
    """Of states with the same future, those that aren't worse in everything than the first of them."""
    if len(states.chosen) < 2:
        return np.ones(len(states.chosen), dtype=bool)
    open_ = [other for other in range(op + 1) if any(after > op for after in instance.outputs[other])]
    key = states.mark if op + 1 < instance.size else np.zeros_like(states.mark)
    for other in open_:
        key = _mixed(key ^ states.chosen[:, other].astype(np.uint64))
    order = np.argsort(key, kind="stable")  # within a key, the better score first
    ordered = key[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    first = order[np.repeat(starts, np.diff(np.append(starts, len(order))))]
    values = np.column_stack((states.finish[:, open_], states.bounds, states.total))
    worse = (values[order] >= values[first]).all(axis=1) & (first != order)
    alive = np.ones(len(key), dtype=bool)
    alive[order[worse]] = False
    return alive
