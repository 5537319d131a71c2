"""Several pipelines on shared capacity: one after the other, then each anew, then two at a time.

What is minimised is the sum of their latencies. Who finds no room goes first in the next attempt. Work is bounded by
counts of attempts and pairs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from nomad.scheduler import refine, search
from nomad.scheduler.arrays import Floats, Ints
from nomad.scheduler.beam import SLACK
from nomad.scheduler.instance import Instance, Seats, Work
from nomad.scheduler.refine import Rated
from nomad.scheduler.search import Answer, Effort

ATTEMPTS = 6
GROUPS = 36
RESTARTS = 1
ALONE = Effort(widths=(32,), rounds=0)
TOGETHER = Effort(widths=(96,), rounds=0)
LAST = Effort(widths=(48, 512), rounds=0)


def place(
    seats: Seats,
    works: Sequence[Work],
    *,
    contended: bool,
    link_room: Floats | None,
    effort: Effort,
    start: Ints | None = None,
) -> Answer:
    """The operators of all `works`, one pipeline after the other, in one array."""
    if len(works) == 1 or contended:
        parts = []
        for work in works:
            instance = Instance(seats, work, contended=contended, link_room=link_room)
            known = None
            if start is not None and len(works) == 1:
                rated = refine.rate(instance, start)
                known = rated if not rated.excess and np.isfinite(rated.latency) else None
            parts.append(search.solve(instance, effort, known))
        if any(part.best is None for part in parts):
            return Answer(None, any(part.best is None and part.proven for part in parts))
        best = [part.best for part in parts if part.best is not None]
        together = Rated(np.concatenate([part.chosen for part in best]), sum(part.latency for part in best))
        return Answer(together, all(part.proven for part in parts))
    return _Shared(seats, works, link_room).place()


def merged(works: Sequence[Work]) -> Work:
    """Several pipelines as one."""
    starts = np.cumsum([0] + [len(work.ids) for work in works]).tolist()
    return Work(
        tuple(name for work in works for name in work.ids),
        np.concatenate([work.work for work in works]),
        np.concatenate([work.output_bytes for work in works]),
        np.concatenate([work.needs for work in works], axis=1),
        np.concatenate([work.flow for work in works]),
        np.concatenate([work.allowed for work in works]),
        tuple((a + at, b + at) for work, at in zip(works, starts, strict=False) for a, b in work.edges),
        np.concatenate([np.full(len(work.ids), number) for number, work in enumerate(works)]),
    )


class _Shared:
    """The pipelines, where each is now, and what they leave of the cluster."""

    def __init__(self, seats: Seats, works: Sequence[Work], link_room: Floats | None):
        self.seats = seats
        self.works = works
        self.link_room = link_room
        self.alone = [Instance(seats, work, contended=False, link_room=link_room) for work in works]
        self.at: list[Ints | None] = [None] * len(works)
        self.latency = [np.inf] * len(works)

    def place(self) -> Answer:
        if any(not np.isfinite(instance.bound) for instance in self.alone):
            return Answer(None, True)
        demand = [float((work.needs.sum(axis=1) / self._scale()).sum()) for work in self.works]
        order = sorted(range(len(self.works)), key=lambda number: (-demand[number], number))
        for _ in range(ATTEMPTS):
            failed = self._one_by_one(order)
            if failed is None:
                break
            order.remove(failed)
            order.insert(0, failed)
        else:
            found = search.solve(
                Instance(self.seats, merged(self.works), contended=False, link_room=self.link_room), LAST
            )
            if found.best is None:
                return found
            self._settle(range(len(self.works)), found.best.chosen)
        self._improve()
        self._squeak(order)
        chosen = np.concatenate([at for at in self.at if at is not None])
        bound = sum(instance.bound for instance in self.alone)
        return Answer(Rated(chosen, float(sum(self.latency))), sum(self.latency) <= bound * SLACK)

    def _scale(self) -> Floats:
        total = sum(work.needs.sum(axis=1) for work in self.works)
        scale: Floats = np.maximum(np.asarray(total), 1e-12)
        return scale

    def _one_by_one(self, order: Sequence[int]) -> int | None:
        """Place in this order; the first that finds no room."""
        self.at = [None] * len(self.works)
        for number in order:
            if not self._again([number], ALONE):
                return number
        return None

    def _lost(self) -> list[float]:
        """How much more each takes than it would alone."""
        return [latency - one.bound for latency, one in zip(self.latency, self.alone, strict=True)]

    def _squeak(self, order: list[int]) -> None:
        """Begin again with those first that lost most, a few times; keep the best."""
        for _ in range(RESTARTS):
            kept, latency = list(self.at), list(self.latency)
            lost = self._lost()
            loser = max(order, key=lambda number: (lost[number], -number))
            if lost[loser] <= 1e-9 * self.latency[loser]:
                return
            rank = {number: place for place, number in enumerate(order)}
            order = sorted(order, key=lambda n: (rank[n] - len(order) * lost[n] / lost[loser], n))
            failed = self._one_by_one(order)
            if failed is None:
                self._improve()
            if failed is not None or sum(self.latency) >= sum(latency) * (1 - 1e-9):
                self.at, self.latency = kept, latency

    def _improve(self) -> None:
        """Each anew; then those that lost most together with one who is in their way, or two."""
        self._each()
        left = GROUPS
        tried: set[tuple[int, ...]] = set()
        while left:
            chosen = next((some for some in self._groups() if some not in tried), None)
            if chosen is None:
                return
            tried.add(chosen)
            left -= 1
            if self._again(list(chosen), TOGETHER):
                tried = {some for some in tried if not set(some) & set(chosen)}
                self._each()

    def _groups(self) -> Iterator[tuple[int, ...]]:
        lost = self._lost()
        worst = [n for n in sorted(range(len(lost)), key=lambda n: (-lost[n], n)) if lost[n] > 1e-9 * self.latency[n]]
        rivals = {number: self._rivals(number) for number in worst}
        for number in worst:
            for other in rivals[number]:
                yield (min(number, other), max(number, other))
        for number in worst[:4]:
            for two in itertools.combinations(rivals[number][:5], 2):
                first, second, third = sorted((number, *two))
                yield first, second, third

    def _each(self) -> None:
        """Each anew beside the others, until none gains."""
        gained = True
        rounds = 3
        while gained and rounds:
            gained, rounds = False, rounds - 1
            for number, one in enumerate(self.alone):
                if self.latency[number] > one.bound * SLACK:
                    gained |= self._again([number], ALONE)

    def _rivals(self, number: int) -> list[int]:
        """Who is where this pipeline would like to be, the most in its way first."""
        one = self.alone[number]
        liked = np.zeros(one.places)
        ideal = one.through.min(axis=1)
        for op in range(one.size):
            near = one.through[op] <= ideal[op] + (self.latency[number] - one.bound)
            liked += near & one.allowed[op]
        crowd = []
        for other, at in enumerate(self.at):
            if other != number and at is not None:
                crowd.append((-float(liked[at].sum() / len(at)), other))
        return [other for weight, other in sorted(crowd) if weight < 0]

    def _again(self, numbers: list[int], effort: Effort) -> bool:
        """Place these pipelines anew beside all others; whether that gained."""
        room, link_room = self._left(set(numbers))
        work = merged([self.works[number] for number in numbers])
        instance = Instance(replace(self.seats, room=room), work, contended=False, link_room=link_room)
        known = None
        before = [self.at[number] for number in numbers]
        now = [at for at in before if at is not None]
        if len(now) == len(before):
            known = Rated(np.concatenate(now), float(sum(self.latency[number] for number in numbers)))
            if known.latency <= instance.bound * SLACK:
                return False
        best = search.solve(instance, effort, known).best
        if best is None or (known is not None and not best.latency < known.latency * (1 - 1e-9)):
            return False
        self._settle(numbers, best.chosen)
        return True

    def _settle(self, numbers: Sequence[int], chosen: Ints) -> None:
        """These pipelines are placed so, one after the other."""
        start = 0
        for number in numbers:
            size = len(self.works[number].ids)
            at = chosen[start : start + size]
            self.at[number] = at
            self.latency[number] = float(self.alone[number].finishes(at[None, :])[0].max())
            start += size

    def _left(self, without: set[int]) -> tuple[Floats, Floats | None]:
        """What all but some leave of the nodes and the links."""
        room = self.seats.room.copy()
        link_room = None if self.link_room is None else self.link_room.copy()
        for number, at in enumerate(self.at):
            if at is None or number in without:
                continue
            work = self.works[number]
            for resource in range(len(room)):
                np.subtract.at(room[resource], at, work.needs[resource])
            if link_room is not None:
                for source, target in work.edges:
                    np.subtract.at(link_room, self.seats.routes.paths[at[source], at[target]], work.flow[source])
        return room, link_room
