"""From a placement to a better one: moves, swaps, and freeing a few operators to place them anew together.

Placements that break capacities are led towards ones that don't: less excess goes before less latency.
Everything is deterministic; work is bounded by rounds.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from nomad.scheduler import beam
from nomad.scheduler.arrays import Bools, Floats, Ints
from nomad.scheduler.instance import Instance

MOST_TOGETHER = 2000
"""Moves of two neighbours at once that are tried."""


@dataclass(frozen=True, slots=True)
class Rated:
    """A placement, and what it is worth."""

    chosen: Ints
    latency: float
    excess: float = 0.0

    def better(self, other: Rated | None) -> bool:
        """By more than rounding."""
        if other is None:
            return True
        if self.excess != other.excess:
            return self.excess < other.excess
        return self.latency < other.latency * (1 - 1e-12)


def rate(instance: Instance, chosen: Ints) -> Rated:
    """One placement."""
    rows = chosen[None, :]
    return Rated(chosen, float(instance.latencies(instance.finishes(rows))[0]), float(instance.excess(rows)[0]))


def cheapest(instance: Instance) -> Ints:
    """Each operator where it is best after its predecessors, as if no capacity were shared."""
    chosen = np.zeros(instance.size, dtype=np.int64)
    finish = np.zeros(instance.size)
    for op in range(instance.size):
        start = np.zeros(instance.places)
        for before in instance.inputs[op]:
            np.maximum(start, finish[before] + instance.transfer[before, op][chosen[before]], out=start)
        done = start + instance.cost[op]
        chosen[op] = int((done + instance.onward[op]).argmin())
        finish[op] = done[chosen[op]]
    return chosen


def descend(instance: Instance, start: Rated, rounds: int = 40) -> Rated:
    """Moves of one operator, swaps of two, neighbours that move together: the best of all, until none helps."""
    best = start
    op, node = np.nonzero(instance.allowed)
    free = np.flatnonzero(instance.allowed.sum(axis=1) > 1)
    pairs = np.array(list(itertools.combinations(free.tolist(), 2)), dtype=np.int64).reshape(-1, 2)
    together = _together(instance)
    for _ in range(rounds):
        moves = node != best.chosen[op]
        swaps = pairs[best.chosen[pairs[:, 0]] != best.chosen[pairs[:, 1]]]
        found = _best(instance, best, op[moves], node[moves], swaps, together)
        if found is None:
            return best
        best = found
    return best


def _together(instance: Instance) -> Ints:
    """[move, (operator, operator, node)]: both ends of an edge to one node."""
    moves = [
        (source, target, node)
        for source, target in instance.work.edges
        for node in np.flatnonzero(instance.allowed[source] & instance.allowed[target]).tolist()
    ]
    return np.array(moves[:MOST_TOGETHER], dtype=np.int64).reshape(-1, 3)


def _best(instance: Instance, now: Rated, op: Ints, node: Ints, swaps: Ints, together: Ints) -> Rated | None:
    rows = np.repeat(now.chosen[None, :], len(op) + len(swaps) + len(together), axis=0)
    every = np.arange(len(op))
    rows[every, op] = node
    tail = np.arange(len(op), len(op) + len(swaps))
    if len(swaps):
        rows[tail, swaps[:, 0]] = now.chosen[swaps[:, 1]]
        rows[tail, swaps[:, 1]] = now.chosen[swaps[:, 0]]
    last = np.arange(len(op) + len(swaps), len(rows))
    rows[last, together[:, 0]] = together[:, 2]
    rows[last, together[:, 1]] = together[:, 2]
    if not len(rows):
        return None
    finish = instance.finishes(rows)
    latency, excess = instance.latencies(finish), instance.excess(rows)
    total = finish.sum(axis=1)
    for row in np.lexsort((total, latency, excess))[:1]:
        if not np.isfinite(latency[row]):
            return None
        found = Rated(rows[row], float(latency[row]), float(excess[row]))
        if found.better(now):
            return found
        if found.excess == now.excess and found.latency <= now.latency * (1 + 1e-12):
            before = float(instance.finishes(now.chosen[None, :]).sum())
            if total[row] < before * (1 - 1e-9):
                return found
    return None


def critical(instance: Instance, chosen: Ints, group: int | None = None) -> list[int]:
    """The operators that the latest finish waits for, from source to sink."""
    finish = instance.finishes(chosen[None, :])[0]
    own = np.flatnonzero(instance.work.group == group) if group is not None else np.arange(instance.size)
    op = int(own[finish[own].argmax()])
    path = [op]
    while instance.inputs[op]:
        op = max(
            instance.inputs[op],
            key=lambda before: (finish[before] + instance.transfer[before, op][chosen[before], chosen[op]], -before),
        )
        path.append(op)
    return path[::-1]


def replace(instance: Instance, now: Rated, freed: list[int], width: int) -> Rated | None:
    """The best placement when only the operators `freed` may move; None if it isn't better."""
    allowed: Bools = np.zeros(instance.allowed.shape, dtype=bool)
    allowed[np.arange(instance.size), now.chosen] = True
    allowed[freed] = True
    smaller = instance.restricted(allowed)
    limit = np.inf if now.excess else now.latency * (1 - 1e-9)
    if smaller.bound > limit:
        return None
    found = beam.search(smaller, width, limit)
    return Rated(found.chosen[0], float(found.latency[0])) if len(found.latency) else None


def neighbourhoods(instance: Instance, now: Rated, size: int) -> Iterator[list[int]]:
    """Sets of operators worth placing anew together: around the critical path, and who is in its way."""
    spine = critical(instance, now.chosen)
    free = set(np.flatnonzero(instance.allowed.sum(axis=1) > 1).tolist())
    seen: set[tuple[int, ...]] = set()
    for length in range(min(size, len(spine)), 0, -1):
        for start in range(len(spine) - length + 1):
            window = [op for op in spine[start : start + length] if op in free]
            for filler in (_beside(instance, window), _in_the_way(instance, now.chosen, window)):
                chosen = list(window)
                for op in filler:
                    if len(chosen) >= size:
                        break
                    if op in free and op not in chosen:
                        chosen.append(op)
                key = tuple(sorted(chosen))
                if key and key not in seen:
                    seen.add(key)
                    yield list(key)


def _beside(instance: Instance, window: list[int]) -> Iterator[int]:
    """Neighbours in the graph, the nearest first."""
    near = list(window)
    for op in near:
        for other in sorted(instance.inputs[op] + instance.outputs[op]):
            if other not in near:
                near.append(other)
                yield other


def _in_the_way(instance: Instance, chosen: Ints, window: list[int]) -> Iterator[int]:
    """Who is on the nodes that the window's operators would like best."""
    wanted: list[Floats] = [instance.through[op] for op in window]
    for rank in range(4):
        for op, through in zip(window, wanted, strict=True):
            if rank >= len(through):
                continue
            node = int(np.argsort(through, kind="stable")[rank])
            for other in np.flatnonzero(chosen == node).tolist():
                if other != op:
                    yield other
