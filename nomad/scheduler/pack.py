"""A placement at all, where rooms are tight: depth first, the operator with the fewest nodes left next.

The latency is of no account here; `search` comes here when nothing else found a placement, and refines what it gets.
"""

from __future__ import annotations

import numpy as np

from nomad.scheduler.arrays import Bools, Floats, Ints
from nomad.scheduler.instance import Instance

STEPS = 2500
"""Nodes that are tried, over all operators."""


def pack(instance: Instance) -> Ints | None:
    """A placement that keeps to the nodes' rooms and to ways that are there (not to what links can carry)."""
    ways = {edge: np.isfinite(cost) for edge, cost in instance.transfer.items()}
    share = (instance.needs / np.maximum(instance.needs.sum(axis=1), 1e-300)[:, None]).sum(axis=0)
    chosen: Ints = np.full(instance.size, -1)
    steps = STEPS

    def descend(free: Floats, allowed: Bools, left: frozenset[int]) -> bool:
        nonlocal steps
        if not left:
            return True
        fits = {op: allowed[op] & (free >= instance.needs[:, op, None]).all(axis=0) for op in left}
        for number, needs in enumerate(instance.needs):
            rest = [float(needs[op]) for op in left if needs[op]]
            if rest:
                usable = free[number][free[number] >= min(rest)].sum()
                if usable * (1 + 1e-9) < sum(rest):
                    return False
        op = min(left, key=lambda op: (int(fits[op].sum()), -share[op], op))
        nodes = np.flatnonzero(fits[op])
        over = np.maximum(free[:, nodes] - instance.needs[:, op, None], 0.0)
        waste = (over / np.maximum(instance.needs.sum(axis=1), 1e-300)[:, None]).sum(axis=0)
        for node in nodes[np.lexsort((instance.through[op][nodes], waste))].tolist():
            if not steps:
                return False
            steps -= 1
            chosen[op] = node
            less = free.copy()
            less[:, node] -= instance.needs[:, op]
            narrower = allowed.copy()
            for after in instance.outputs[op]:
                narrower[after] &= ways[op, after][node]
            for before in instance.inputs[op]:
                narrower[before] &= ways[before, op][:, node]
            if descend(less, narrower, left - {op}):
                return True
        return False

    found = descend(instance.room.copy(), instance.allowed, frozenset(range(instance.size)))
    return chosen if found else None
