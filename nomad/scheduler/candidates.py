"""Of a large cluster, the nodes that are worth looking at.

The cost to go and the cost so far of every operator on every node, over the links themselves and without capacities,
in time proportional to operators x links. Over `shortest` routes a message pays each link's bandwidth here, not the
narrowest only: good enough to choose nodes by, and never used for more.
"""

from __future__ import annotations

import numpy as np

from nomad.scheduler.arrays import Floats, Ints
from nomad.scheduler.build import Cluster
from nomad.scheduler.instance import Work
from nomad.scheduler.routes import Links

HOPS = 12
"""How many links a message is followed over."""


def choose(cluster: Cluster, work: Work, count: int, *, direct: bool) -> Ints:
    """About `count` nodes, and those that operators are pinned to. Positions, in order."""
    links = cluster.links
    size = len(cluster.nodes)
    fits = (work.needs[:, :, None] <= cluster.room[:, None, :]).all(axis=0)
    cost = np.where(work.allowed & fits, work.work[:, None] / cluster.speed, np.inf)
    hops = 1 if direct else HOPS
    forth = _Relaxation(links.target, size)
    back = _Relaxation(links.source, size)
    onward, arrival = np.zeros_like(cost), np.zeros_like(cost)
    for source, target in sorted(work.edges, key=lambda edge: -edge[0]):
        way = _way(links, work.output_bytes[source])
        reach = back.spread(cost[target] + onward[target], links.target, way, hops)
        np.maximum(onward[source], reach, out=onward[source])
    for source, target in sorted(work.edges, key=lambda edge: edge[1]):
        way = _way(links, work.output_bytes[source])
        reach = forth.spread(cost[source] + arrival[source], links.source, way, hops)
        np.maximum(arrival[target], reach, out=arrival[target])
    through = arrival + cost + onward
    depth = min(count, size)
    best = np.argpartition(through, depth - 1, axis=1)[:, :depth]
    chosen: set[int] = set(np.flatnonzero(work.allowed[work.allowed.sum(axis=1) == 1].any(axis=0)).tolist())
    for op in np.flatnonzero(~np.isfinite(through).any(axis=1)).tolist():  # none will do: those that come nearest
        near = np.where(work.allowed[op], cluster.room, -np.inf).argsort(axis=1)[:, -3:]
        chosen.update(near[work.allowed[op][near]].tolist())
    ranked = []
    for op in range(len(cost)):
        row = best[op][np.isfinite(through[op][best[op]])]
        ranked.append(row[np.lexsort((row, through[op][row]))].tolist())
    for rank in range(depth):
        for row in ranked:
            if rank < len(row) and len(chosen) < count:
                chosen.add(row[rank])
    return np.array(sorted(chosen) or [0], dtype=np.int64)


def _way(links: Links, size: float) -> Floats:
    cost: Floats = links.latency + size / links.bandwidth
    return cost


class _Relaxation:
    """Least values over links, gathered at one of their ends."""

    def __init__(self, end: Ints, size: int):
        self.order = np.argsort(end, kind="stable")
        ordered = end[self.order]
        self.starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])) if len(end) else end
        self.nodes = ordered[self.starts]

    def spread(self, values: Floats, other_end: Ints, way: Floats, hops: int) -> Floats:
        """For each node, the least of `values` + way over at most `hops` links."""
        values = values.copy()
        if not len(self.order):
            return values
        other, way = other_end[self.order], way[self.order]
        for _ in range(hops):
            least = np.minimum.reduceat(values[other] + way, self.starts)
            if not (least < values[self.nodes]).any():
                break
            values[self.nodes] = np.minimum(values[self.nodes], least)
        return values
