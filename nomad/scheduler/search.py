"""One instance, searched with growing effort until the answer is proven or the effort is spent.

Narrow beam, local refinement, wider beam, freeing parts of the placement, widest beam. Effort is counted in states and
rounds, so that the same problem always gets the same answer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from nomad.scheduler import beam, refine
from nomad.scheduler.beam import SLACK
from nomad.scheduler.instance import Instance
from nomad.scheduler.pack import pack
from nomad.scheduler.refine import Rated

PACKED = 64
"""Operators that depth first is for."""
PART = 6
"""Operators placed anew together; twice as many where rooms are tight."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is tried."""

    widths: tuple[int, ...] = (32, 160, 640)
    contended_widths: tuple[int, ...] = (64, 320)
    """Where operators slow one another down; there each width is tried from four sides."""
    rounds: int = 6
    """Neighbourhoods tried between two widths."""
    freed: int = PART
    """Operators placed anew together."""
    freed_width: int = 64


@dataclass(frozen=True, slots=True)
class Answer:
    """The best placement found."""

    best: Rated | None
    """None if there is none, or none was found."""
    proven: bool
    """It is the optimum, to rounding; or it is certain that there is none."""


def solve(instance: Instance, effort: Effort, start: Rated | None = None) -> Answer:
    """Place the operators of an instance. `start`: a valid placement to do better than, if there is one."""
    if not instance.bound < float("inf"):
        return Answer(None, True)
    best = start
    first = refine.rate(instance, refine.cheapest(instance))
    if not first.excess and first.better(best):
        best = first
    widths = effort.contended_widths if instance.contended else effort.widths
    for number, width in enumerate(widths):
        if best is not None and best.latency <= instance.bound * SLACK:
            return Answer(best, True)
        found = beam.search(instance, width, best.latency if best else float("inf"))
        if len(found.latency):
            top = Rated(found.chosen[0], float(found.latency[0]))
            if top.latency <= (best.latency * SLACK if best else float("inf")):
                best = top
        if found.exact:
            return Answer(best, True)
        if instance.contended:
            best = _from_all_sides(instance, width, best)
        if best is None:
            best = _anywhere(instance, width, first)
            effort = replace(effort, freed=2 * PART, freed_width=200)  # it wasn't chosen for its latency
        if not effort.rounds and best is not None and best is not start:
            return Answer(refine.descend(instance, best), False)
        if best is not None:
            if best is not start:
                best = refine.descend(instance, best)
            if number + 1 < len(widths):
                best = _rework(instance, best, effort)
    if best is not None:
        best = _rework(instance, best, effort)
        return Answer(best, best.latency <= instance.bound * SLACK)
    return Answer(None, False)


def _from_all_sides(instance: Instance, width: int, best: Rated | None) -> Rated | None:
    """Where operators slow one another down bounds say less: look from the sinks too, and by other measures."""
    mirror = instance.mirrored()
    for side, spread in ((instance, 0.0), (mirror, 0.05), (mirror, 1.0)):
        found = beam.search(side, width, best.latency if best else float("inf"), spread)
        if len(found.latency):
            chosen = found.chosen[0] if side is instance else found.chosen[0][::-1].copy()
            top = refine.descend(instance, refine.rate(instance, chosen))
            if top.better(best):
                best = top
    return best


def _anywhere(instance: Instance, width: int, broken: Rated) -> Rated | None:
    """A placement at all: with caution for what is still to come, or from one that breaks capacities."""
    for caution in (1.0, 5.0):
        found = beam.search(instance, width, caution=caution)
        if len(found.latency):
            return Rated(found.chosen[0], float(found.latency[0]))
    for start in (None if instance.size > PACKED else pack(instance), broken.chosen):
        if start is not None:
            best = refine.descend(instance, refine.rate(instance, start))
            if not best.excess and best.latency < float("inf"):
                return best
    return None


def _rework(instance: Instance, best: Rated, effort: Effort) -> Rated:
    """Free parts of the placement in turn, from the start again after each gain."""
    left = effort.rounds
    improved = True
    while improved:
        improved = False
        if best.latency <= instance.bound * SLACK:
            return best
        for freed in refine.neighbourhoods(instance, best, effort.freed):
            if not left:
                return best
            left -= 1
            found = refine.replace(instance, best, freed, effort.freed_width)
            if found is not None:
                best, improved = refine.descend(instance, found), True
                break
    return best
