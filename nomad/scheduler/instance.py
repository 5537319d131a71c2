"""A placement problem as arrays: what each choice costs, what it takes, and the bounds that follow from that alone.

`planner` and `joint` make instances, `beam` and `refine` search them. Nodes and operators are positions; operators are
in topological order. An instance is immutable but for `restricted`, which gives a smaller one.

Costs are seconds. `infinite` stands for "not allowed": no label, no way, too large by itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from nomad.scheduler.arrays import Bools, Floats, Ints
from nomad.scheduler.routes import Routes

TOLERANCE = 1e-9
"""Relative: how much more than its capacity may be used, so that what adds up exactly isn't refused for rounding."""


@dataclass(frozen=True, slots=True)
class Seats:
    """The nodes, and what is left of them."""

    ids: tuple[str, ...]
    speed: Floats
    room: Floats
    """[resource, node]: what may be used, in MiB (0) and reference-seconds per second (1), tolerance included."""
    routes: Routes


@dataclass(frozen=True, slots=True)
class Work:
    """The operators, in topological order, of one pipeline or several."""

    ids: tuple[tuple[str, str], ...]
    """Pipeline and operator."""
    work: Floats
    output_bytes: Floats
    needs: Floats
    """[resource, operator]."""
    flow: Floats
    """Bytes per second that each sends to each of its successors."""
    allowed: Bools
    """[operator, node], by label and pin."""
    edges: tuple[tuple[int, int], ...]
    group: Ints
    """The pipeline of each, as a number: the sum over the pipelines of the latest finish is minimised."""


class Instance:
    """See the module."""

    def __init__(self, seats: Seats, work: Work, *, contended: bool, link_room: Floats | None = None):
        """`link_room`: bytes per second that may be used of each link, and infinite after the last; None: unlimited."""
        self.seats = seats
        self.work = work
        self.contended = contended
        self.link_room = link_room
        self.size = len(work.ids)
        self.places = len(seats.ids)
        self.groups = int(work.group.max()) + 1
        self.inputs: list[list[int]] = [[] for _ in range(self.size)]
        self.outputs: list[list[int]] = [[] for _ in range(self.size)]
        for source, target in work.edges:
            self.inputs[target].append(source)
            self.outputs[source].append(target)
        self.processing = work.work[:, None] / seats.speed
        self._limit()
        self._price()
        self._bound()

    # -- what is limited at all

    def _limit(self) -> None:
        work, seats = self.work, self.seats
        limited = (work.needs.sum(axis=1)[:, None] > seats.room).any(axis=1) if not self.contended else [False] * 2
        self.resources = np.flatnonzero(limited)
        self.needs = work.needs[self.resources]
        self.room = seats.room[self.resources]
        self.allowed = work.allowed.copy()
        for needs, room in zip(self.needs, self.room, strict=True):
            self.allowed &= needs[:, None] <= room
        self.scarce = np.empty(0, dtype=np.int64)
        if self.link_room is not None and not self.contended and self.size > 1:
            total = sum(float(work.flow[source]) for source, _ in work.edges)
            self.scarce = np.flatnonzero(total > self.link_room[:-1])
        if len(self.scarce):
            assert self.link_room is not None
            number = np.full(len(self.link_room), len(self.scarce))
            number[self.scarce] = np.arange(len(self.scarce))
            paths = np.sort(number[seats.routes.paths], axis=2)
            most = max(1, int((paths < len(self.scarce)).sum(axis=2).max()))
            self.ways = np.ascontiguousarray(paths[:, :, :most])
            """[from, to, hop]: the scarce links of each way; beyond them a number that is no link."""
            self.flow_room = np.append(self.link_room[self.scarce], np.inf)
            self.narrowest = self.flow_room[self.ways].min(axis=2)

    # -- what each choice costs

    def _price(self) -> None:
        work, routes = self.work, self.seats.routes
        with np.errstate(divide="ignore"):
            slowness = 1.0 / routes.bandwidth
        slowness[~np.isfinite(slowness)] = 0.0  # where there is no way, the latency is infinite
        by_bytes: dict[float, Floats] = {}
        for source in {source for source, _ in work.edges}:
            size = float(work.output_bytes[source])
            if size not in by_bytes:
                by_bytes[size] = routes.latency + size * slowness
        self.transfer: dict[tuple[int, int], Floats] = {}
        """Edge -> [from, to]: seconds; infinite where this edge alone is too much for the way or the node."""
        for source, target in work.edges:
            cost = by_bytes[float(work.output_bytes[source])]
            bad = None
            if len(self.scarce):
                bad = work.flow[source] > self.narrowest
            for needs, room in zip(self.needs, self.room, strict=True):
                full = needs[source] + needs[target] > room
                if full.any():
                    bad = np.zeros(cost.shape, dtype=bool) if bad is None else bad.copy()
                    np.fill_diagonal(bad, bad.diagonal() | full)
            self.transfer[source, target] = cost if bad is None or not bad.any() else np.where(bad, np.inf, cost)
        self._prune()
        self.cost = np.where(self.allowed, self.processing, np.inf)
        """[operator, node]: seconds of processing there, alone."""

    def _prune(self) -> None:
        """Strike out nodes from which no node that a neighbour may be on can be reached."""
        blocked = {edge: ~np.isfinite(cost) for edge, cost in self.transfer.items()}
        blocked = {edge: bad for edge, bad in blocked.items() if bad.any()}
        changed = bool(blocked)
        while changed:
            changed = False
            for (source, target), bad in blocked.items():
                onward = self.allowed[source] & ~bad[:, self.allowed[target]].all(axis=1)
                if (onward != self.allowed[source]).any():
                    self.allowed[source], changed = onward, True
                arriving = self.allowed[target] & ~bad[self.allowed[source]].all(axis=0)
                if (arriving != self.allowed[target]).any():
                    self.allowed[target], changed = arriving, True

    # -- what can't be beaten

    def _bound(self) -> None:
        """Cost to go, as if each branch could choose its nodes for itself and no capacity were shared."""
        self.onward = np.zeros((self.size, self.places))
        """[operator, node]: at least this much from its finish there to the latest finish after it."""
        self.onward_by: dict[tuple[int, int], Floats] = {}
        """The same by way of one successor."""
        for op in range(self.size - 1, -1, -1):
            for after in self.outputs[op]:
                way = self._with_contention(op, after) + (self.cost[after] + self.onward[after])
                self.onward_by[op, after] = least = way.min(axis=1)
                np.maximum(self.onward[op], least, out=self.onward[op])
        self.arrival = np.zeros((self.size, self.places))
        """[operator, node]: at least this much before its processing can begin there."""
        for op in range(self.size):
            for before in self.inputs[op]:
                way = self._with_contention(before, op) + (self.arrival[before] + self.cost[before])[:, None]
                np.maximum(self.arrival[op], way.min(axis=0), out=self.arrival[op])
        through = self.arrival + self.cost + self.onward
        self.through = through
        best = through.min(axis=1)
        self.bounds = np.zeros(self.groups)
        np.maximum.at(self.bounds, self.work.group, best)
        self.bound = float(self.bounds.sum())

    def _with_contention(self, source: int, target: int) -> Floats:
        """Transfer, and what two neighbours on one node cost each other at least."""
        cost = self.transfer[source, target]
        if self.contended and self.work.group[source] == self.work.group[target]:
            cost = cost.copy()
            cost[np.diag_indices(self.places)] += self.processing[source] + self.processing[target]
        return cost

    def restricted(self, allowed: Bools) -> Instance:
        """The same, with fewer nodes allowed."""
        new = object.__new__(Instance)
        new.__dict__.update(self.__dict__)
        new.work = replace(self.work, allowed=self.work.allowed & allowed)
        new.allowed = self.allowed & allowed
        new._prune()
        new.cost = np.where(new.allowed, new.processing, np.inf)
        new._bound()
        return new

    def mirrored(self) -> Instance:
        """The same seen from the sinks: its placements, operators reversed, cost the same. Without link capacities."""
        last = self.size - 1
        work = self.work
        new = object.__new__(Instance)
        new.__dict__.update(self.__dict__)
        new.work = replace(
            work,
            ids=work.ids[::-1],
            work=work.work[::-1],
            needs=work.needs[:, ::-1],
            allowed=work.allowed[::-1],
            edges=tuple((last - target, last - source) for source, target in work.edges),
            group=work.group[::-1],
        )
        new.inputs = [[last - op for op in after] for after in self.outputs[::-1]]
        new.outputs = [[last - op for op in before] for before in self.inputs[::-1]]
        new.needs, new.allowed = self.needs[:, ::-1], self.allowed[::-1]
        new.processing, new.cost = self.processing[::-1], self.cost[::-1]
        new.transfer = {(last - b, last - a): np.ascontiguousarray(cost.T) for (a, b), cost in self.transfer.items()}
        new._bound()
        return new

    # -- what a placement costs

    def finishes(self, chosen: Ints) -> Floats:
        """[placement, operator] -> [placement, operator]: when each finishes."""
        finish = np.zeros(chosen.shape)
        slow = self.contention(chosen) if self.contended else None
        for op in range(self.size):
            here = chosen[:, op]
            own = self.cost[op][here]
            if slow is not None:
                own = own * slow[:, op]
            start: Floats | None = None
            for before in self.inputs[op]:
                arrives = finish[:, before] + self.transfer[before, op][chosen[:, before], here]
                start = arrives if start is None else np.maximum(start, arrives)
            finish[:, op] = own if start is None else start + own
        return finish

    def contention(self, chosen: Ints) -> Floats:
        """[placement, operator]: how many operators of its pipeline are on its node, itself included."""
        groups = self.groups
        cell = (np.arange(len(chosen))[:, None] * groups + self.work.group) * self.places + chosen
        count = np.bincount(cell.ravel(), minlength=len(chosen) * groups * self.places)
        return np.asarray(count[cell], dtype=np.float64)

    def latencies(self, finish: Floats) -> Floats:
        """[placement, operator] -> [placement]: what is minimised."""
        if self.groups == 1:
            return np.asarray(finish.max(axis=1))
        worst = np.zeros((len(finish), self.groups))
        for group in range(self.groups):
            worst[:, group] = finish[:, self.work.group == group].max(axis=1)
        return np.asarray(worst.sum(axis=1))

    def used(self, chosen: Ints) -> Floats:
        """[placement, operator] -> [resource, placement, node]."""
        rows = len(chosen)
        cell = (np.arange(rows)[:, None] * self.places + chosen).ravel()
        out = np.empty((len(self.needs), rows, self.places))
        for number, needs in enumerate(self.needs):
            weights = np.broadcast_to(needs, chosen.shape).ravel()
            out[number] = np.bincount(cell, weights, minlength=rows * self.places).reshape(rows, self.places)
        return out

    def flows(self, chosen: Ints) -> Floats:
        """[placement, operator] -> [placement, scarce link], and one column more that means nothing."""
        rows, columns = len(chosen), len(self.scarce) + 1
        base = np.arange(rows)[:, None] * columns
        cells = [np.empty(0, dtype=np.int64)]
        loads = [np.empty(0)]
        for source, target in self.work.edges:
            if self.work.flow[source]:
                here = (base + self.ways[chosen[:, source], chosen[:, target]]).ravel()
                cells.append(here)
                loads.append(np.full(len(here), self.work.flow[source]))
        out = np.bincount(np.concatenate(cells), np.concatenate(loads), minlength=rows * columns)
        return np.asarray(out, dtype=np.float64).reshape(rows, columns)

    def excess(self, chosen: Ints) -> Floats:
        """[placement, operator] -> [placement]: the share of the needs that is beyond capacity; 0 is valid."""
        total = np.zeros(len(chosen))
        if len(self.needs):
            over = np.maximum(self.used(chosen) - np.maximum(self.room, 0.0)[:, None, :], 0.0).sum(axis=2)
            total += (over / np.maximum(self.needs.sum(axis=1), 1e-300)[:, None]).sum(axis=0)
        if len(self.scarce):
            flow = self.flows(chosen)[:, :-1]
            scale = max(1e-300, sum(float(self.work.flow[source]) for source, _ in self.work.edges))
            total += np.maximum(flow - np.maximum(self.flow_room[:-1], 0.0), 0.0).sum(axis=1) / scale
        return total
