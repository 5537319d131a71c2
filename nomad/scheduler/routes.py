"""The way that messages take from node to node: its latency, its bandwidth, and the links it is made of.

`direct`: the link from here to there, or none. `shortest`: the path of least latency; among those the one of
larger bottleneck, then of fewer hops, then the first by name. Ties are decided hop by hop, as Dijkstra's algorithm
does. All pairs among `among` (positions of nodes) are computed; the paths may lead over all the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from nomad.scheduler.arrays import Floats, Ints


@dataclass(frozen=True, slots=True)
class Links:
    """The links of a cluster, by source and then target (positions of nodes). Links from a node to itself aren't in."""

    source: Ints
    target: Ints
    latency: Floats
    bandwidth: Floats
    """Infinite where unlimited."""
    free: Floats
    """Bytes per second that are left; below 0 where more is taken than there is."""


class Routes:
    """Latency, bandwidth and path of each pair. Immutable; `changed` gives the routes after a change of one link."""

    def __init__(
        self, links: Links, size: int, among: Ints, latency: Floats, bandwidth: Floats, last: Ints, direct: bool
    ):
        self.links = links
        self.size = size
        """Nodes of the whole cluster."""
        self.among = among
        self.latency = latency
        """[from, to]; infinite where there is no way, 0 inside a node."""
        self.bandwidth = bandwidth
        """[from, to], of the narrowest link."""
        self._last = last  # [from among, to any node]: the position of the last link of the way, or -1
        self.direct = direct

    @classmethod
    def make(cls, links: Links, size: int, among: Ints, *, direct: bool) -> Routes:
        """The routes between the nodes `among` of a cluster of `size` nodes."""
        if direct:
            last = np.full((len(among), size), -1)
            rows = np.full(size, -1)
            rows[among] = np.arange(len(among))
            inside = np.flatnonzero(rows[links.source] >= 0)
            last[rows[links.source[inside]], links.target[inside]] = inside
            latency, bandwidth = _direct(links, among, last)
        else:
            kept, inner = _without_leaves(links, size, among)
            nodes = np.unique(np.concatenate((among, links.source[inner], links.target[inner])))
            number = np.full(size, -1)
            number[nodes] = np.arange(len(nodes))
            rows = number[among]
            latency, bandwidth, near = _shortest(kept(number), len(nodes), rows)
            latency, bandwidth = latency[:, rows], bandwidth[:, rows]
            last = np.full((len(among), size), -1)
            last[:, nodes] = np.where(near >= 0, inner[near], -1) if len(inner) else -1
        return cls(links, size, among, latency, bandwidth, last, direct)

    def changed(self, links: Links, position: int) -> Routes:
        """The routes when the link at `position`, and no other, is as it is in `links`."""
        if self.direct:
            return Routes(links, self.size, self.among, *_direct(links, self.among, self._last), self._last, True)
        source, target = int(links.source[position]), int(links.target[position])
        if len(self.among) != self.size:
            return Routes.make(links, self.size, self.among, direct=False)
        reached = self.latency[:, source] + links.latency[position]
        stale = (self._last == position).any(axis=1) | (np.isfinite(reached) & (reached <= self.latency[:, target]))
        rows = np.flatnonzero(stale)
        if not len(rows):
            return Routes(links, self.size, self.among, self.latency, self.bandwidth, self._last, False)
        latency, bandwidth, last = self.latency.copy(), self.bandwidth.copy(), self._last.copy()
        latency[rows], bandwidth[rows], last[rows] = _shortest(links, self.size, rows)
        return Routes(links, self.size, self.among, latency, bandwidth, last, False)

    @cached_property
    def paths(self) -> Ints:
        """[from, to, hop]: the links of each way, from the last to the first; beyond them, the number of links."""
        beyond = len(self.links.source)
        at = np.broadcast_to(self.among, (len(self.among), len(self.among))).copy()
        rows = np.arange(len(self.among))[:, None]
        hops: list[Ints] = []
        while True:
            link = self._last[rows, at]
            gone = link >= 0
            if not gone.any():
                break
            hops.append(np.where(gone, link, beyond))
            at = np.where(gone, self.links.source[link], at)
            if self.direct:
                break
        return np.stack(hops, axis=2) if hops else np.full((len(self.among), len(self.among), 1), beyond)

    def path(self, source: int, target: int) -> list[int]:
        """The links of one way, first to last; `source` and `target` are positions in `among`."""
        links = self.paths[source, target]
        return [int(link) for link in links[::-1] if link < len(self.links.source)]


def _without_leaves(links: Links, size: int, among: Ints) -> tuple[Callable[[Ints], Links], Ints]:
    """The positions of the links that ways between `among` can lead over, and these links for other node numbers.

    A node with one neighbour only is never on the way to another one; without such nodes, others become such nodes.
    """
    inner = np.arange(len(links.source))
    wanted = np.zeros(size, dtype=bool)
    wanted[among] = True
    while len(among) < size:
        source, target = links.source[inner], links.target[inner]
        pairs = np.unique(np.minimum(source, target) * size + np.maximum(source, target))
        neighbours = np.bincount(pairs // size, minlength=size) + np.bincount(pairs % size, minlength=size)
        stays = wanted | (neighbours > 1)
        some = stays[source] & stays[target]
        if some.all():
            break
        inner = inner[some]

    def renumbered(number: Ints) -> Links:
        return Links(
            number[links.source[inner]],
            number[links.target[inner]],
            links.latency[inner],
            links.bandwidth[inner],
            links.free[inner],
        )

    return renumbered, inner


def _direct(links: Links, among: Ints, last: Ints) -> tuple[Floats, Floats]:
    here = last[:, among]
    latency = np.where(here >= 0, links.latency[here] if len(links.latency) else 0.0, np.inf)
    bandwidth = np.where(here >= 0, links.bandwidth[here] if len(links.latency) else 0.0, 0.0)
    np.fill_diagonal(latency, 0.0)
    np.fill_diagonal(bandwidth, np.inf)
    return latency, bandwidth


def _shortest(links: Links, size: int, rows: Ints) -> tuple[Floats, Floats, Ints]:
    """Latency, bottleneck and last link from each node of `rows` to every node."""
    from scipy.sparse import csr_array  # only here: a master plans over direct links, and does without
    from scipy.sparse.csgraph import dijkstra

    graph = csr_array((links.latency, (links.source, links.target)), shape=(size, size))
    latency = np.atleast_2d(dijkstra(graph, indices=rows))
    last = np.full((len(rows), size), -1)
    bandwidth = np.zeros((len(rows), size))
    bandwidth[np.arange(len(rows)), rows] = np.inf
    if not len(links.source):
        return latency, bandwidth, last
    reached = latency[:, links.source] + links.latency
    tight = (reached == latency[:, links.target]) & np.isfinite(reached) & (links.target != rows[:, None])
    row, link = np.nonzero(tight)
    at, pred = row * size + links.target[link], row * size + links.source[link]
    bottleneck = bandwidth.ravel()
    if np.bincount(at, minlength=1).max(initial=0) > 1:
        row, link, at, pred = _untied(row, link, at, pred, links, bottleneck, latency.size, rows, size)
    last[row, links.target[link]] = link
    narrow = links.bandwidth[link]
    while True:  # a round reaches one hop further
        before = bottleneck[at]
        bottleneck[at] = np.minimum(bottleneck[pred], narrow)
        if np.array_equal(before, bottleneck[at]):
            return latency, bandwidth, last


def _untied(
    row: Ints, link: Ints, at: Ints, pred: Ints, links: Links, start: Floats, cells: int, rows: Ints, size: int
) -> tuple[Ints, Ints, Ints, Ints]:
    """Of the links that lie on paths of least latency, one for each node reached."""
    wide = start.copy()
    narrow = links.bandwidth[link]
    while True:
        before = wide.copy()
        np.maximum.at(wide, at, np.minimum(wide[pred], narrow))
        if np.array_equal(before, wide):
            break
    best = np.minimum(wide[pred], narrow) == wide[at]
    row, link, at, pred = row[best], link[best], at[best], pred[best]
    hops = np.full(cells, np.inf)
    hops[np.arange(len(rows)) * size + rows] = 0
    while True:
        before = hops.copy()
        np.minimum.at(hops, at, hops[pred] + 1)
        if np.array_equal(before, hops):
            break
    few = hops[pred] + 1 == hops[at]
    row, link, at, pred = row[few], link[few], at[few], pred[few]
    _, first = np.unique(at, return_index=True)  # links are sorted by name of their source
    return row[first], link[first], at[first], pred[first]
