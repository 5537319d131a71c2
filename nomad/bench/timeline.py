"""What happens when in a run: a scenario's events as single steps, and the phases between them. Pure.

Times are seconds since the run's beginning, which is when the first message has arrived at the end of the pipeline.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from nomad.bench.scenario import Event, LinkEvent, MoveEvent, NodeEvent, RateEvent, Scenario, WorkEvent
from nomad.control import Shape
from nomad.errors import ScenarioError

STEP = 0.5
"""Seconds between two steps of a ramp; of an oscillation too, unless its period is short."""
STEPS_PER_PERIOD = 20

DEFAULT_RATE = 1.0
"""Messages per second of a program's source when the scenario doesn't say."""

Ends = tuple[str, str]


@dataclass(frozen=True, slots=True)
class LinkStep:
    """A directed link is like this from now on."""

    at: float
    event: int
    """Which of the scenario's events it is part of."""
    source: str
    target: str
    shape: Shape


@dataclass(frozen=True, slots=True)
class SpeedStep:
    """A node is so fast from now on."""

    at: float
    event: int
    node: str
    speed: float


@dataclass(frozen=True, slots=True)
class NodeStep:
    """A node is lost, or back."""

    at: float
    event: int
    node: str
    lost: bool


@dataclass(frozen=True, slots=True)
class RateStep:
    """The synthetic source is so fast from now on, in messages per second."""

    at: float
    event: int
    rate: float


@dataclass(frozen=True, slots=True)
class WorkStep:
    """A synthetic operator takes so many reference-seconds per message from now on."""

    at: float
    event: int
    operator: str
    work: float


@dataclass(frozen=True, slots=True)
class MoveStep:
    """An operator is to be moved; no sooner than `at`, and not before the move before it is over."""

    at: float
    event: int
    operator: str
    node: str


Step = LinkStep | SpeedStep | NodeStep | RateStep | WorkStep | MoveStep


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of a run over which figures are taken."""

    name: str
    start: float
    end: float


@dataclass(slots=True)
class Conditions:
    """How the world is at one moment."""

    links: dict[Ends, Shape]
    speeds: dict[str, float]
    rate: float
    work: dict[str, float]
    lost: set[str] = field(default_factory=set)


def steps(scenario: Scenario, duration: float | None = None) -> list[Step]:
    """All steps before `duration` (the scenario's own if not given), in order of time; moves too, see `MoveStep`.

    An event that changes a link ends the ramp or oscillation that it was in. Raises `ScenarioError` for a link that
    would become impossible.
    """
    end = scenario.form.duration if duration is None else duration
    links: dict[Ends, list[LinkStep]] = {}
    others: list[Step] = []
    for number, event in sorted(enumerate(scenario.form.events), key=lambda item: item[1].at):
        if isinstance(event, LinkEvent):
            source, target = event.ends
            for ends in [(source, target), (target, source)] if event.both else [(source, target)]:
                earlier = [step for step in links.get(ends, []) if step.at < event.at]
                shape = earlier[-1].shape if earlier else _declared(scenario, ends)
                links[ends] = earlier + list(_link_steps(number, event, ends, shape, end))
        else:
            others += _other_steps(number, event)
    merged: list[Step] = [*(step for found in links.values() for step in found), *others]
    return sorted((step for step in merged if step.at < end), key=lambda step: step.at)


def conditions(scenario: Scenario, taken: Iterable[Step], at: float = math.inf) -> Conditions:
    """The world as it is just after the steps up to `at`."""
    form = scenario.form
    now = Conditions(
        links={(link.source, link.target): link.shape for link in scenario.topology.links},
        speeds={node.id: node.speed for node in scenario.topology.nodes},
        rate=form.pipeline.rate or DEFAULT_RATE,
        work={op.name: op.work for op in form.pipeline.operators},
    )
    for step in taken:
        if step.at > at:
            continue
        match step:
            case LinkStep():
                now.links[step.source, step.target] = step.shape
            case SpeedStep():
                now.speeds[step.node] = step.speed
            case NodeStep():
                (now.lost.add if step.lost else now.lost.discard)(step.node)
            case RateStep():
                now.rate = step.rate
            case WorkStep():
                now.work[step.operator] = step.work
            case MoveStep():
                pass
    return now


def phases(scenario: Scenario, duration: float | None = None) -> list[Phase]:
    """Before the first event, during each that takes a while, and after each; `settle` seconds are left out.

    Events at the same moment are one. What leaves no time is left out.
    """
    form = scenario.form
    end = form.duration if duration is None else duration
    moments = sorted({event.at for event in form.events if event.at < end})
    found = [Phase("before" if moments else "all", form.settle, moments[0] if moments else end)]
    for moment, following in itertools.pairwise([*moments, end]):
        events = [event for event in form.events if event.at == moment]
        label = ", ".join(describe(event) for event in events)
        over = min(following, max(_end(event, end) for event in events))
        if over > moment:
            found.append(Phase(f"during {label}", moment, over))
        found.append(Phase(f"after {label}", over + form.settle, following))
    return [phase for phase in found if phase.end > phase.start]


def describe(event: Event) -> str:
    """An event in a few words, for tables and plots."""
    match event:
        case LinkEvent():
            changes = _changes(event.latency, event.jitter, event.bandwidth, event.loss)
            if event.swing is not None:
                changes.append(f"±{event.swing * 1e3:g} ms")
            arrow = " <-> " if event.both else " -> "
            return f"{arrow.join(event.ends)} {' '.join(changes)}"
        case NodeEvent(speed=None):
            return f"{event.node} {'lost' if event.lost else 'back'}"
        case NodeEvent():
            return f"{event.node} speed {event.speed:g}"
        case RateEvent():
            return f"{event.rate:g} messages/s"
        case WorkEvent():
            return f"{event.operator} takes {event.work * 1e3:g} ms"
        case MoveEvent():
            return f"{event.times} move{'s' if event.times > 1 else ''} of {event.move}"


def _changes(latency: float | None, jitter: float | None, bandwidth: float | None, loss: float | None) -> list[str]:
    changes = []
    if latency is not None:
        changes.append(f"{latency * 1e3:g} ms")
    if jitter is not None:
        changes.append(f"jitter {jitter * 1e3:g} ms")
    if bandwidth is not None:
        changes.append("unlimited" if math.isinf(bandwidth) else f"{bandwidth * 8e-6:g} Mbit/s")
    if loss is not None:
        changes.append(f"loss {loss * 100:g} %")
    return changes


def _declared(scenario: Scenario, ends: Ends) -> Shape:
    return next(
        (link.shape for link in scenario.topology.links if (link.source, link.target) == ends),
        Shape(),
    )


def _link_steps(number: int, event: LinkEvent, ends: Ends, before: Shape, end: float) -> Iterator[LinkStep]:
    target = replace(
        before,
        latency=before.latency if event.latency is None else event.latency,
        jitter=before.jitter if event.jitter is None else event.jitter,
        bandwidth=before.bandwidth
        if event.bandwidth is None
        else None
        if math.isinf(event.bandwidth)
        else event.bandwidth,
        loss=before.loss if event.loss is None else event.loss,
    )
    if event.over is not None and (target.bandwidth is None) != (before.bandwidth is None):
        raise ScenarioError(
            f"{describe(event)} at {event.at:g} s: there is no even way between a bandwidth and none; leave out `over`"
        )
    if event.swing is not None and event.period is not None:
        last = min(end, event.until or end)
        for at in _moments(event.at, last, min(STEP, event.period / STEPS_PER_PERIOD)):
            latency = target.latency + event.swing * math.sin(2 * math.pi * (at - event.at) / event.period)
            yield _checked(LinkStep(at, number, *ends, replace(target, latency=latency)), event)
        if event.until is not None:
            yield _checked(LinkStep(event.until, number, *ends, target), event)
        return
    over = event.over or 0.0
    for at in _moments(event.at + STEP, event.at + over, STEP):
        yield _checked(LinkStep(at, number, *ends, _between(before, target, (at - event.at) / over)), event)
    yield _checked(LinkStep(event.at + over, number, *ends, target), event)


def _moments(start: float, end: float, step: float) -> Iterator[float]:
    """From `start` to before `end`; counted and not added up, so that they don't drift."""
    for count in range(max(0, math.ceil((end - start) / step - 1e-9))):
        yield start + count * step


def _between(before: Shape, target: Shape, share: float) -> Shape:
    bandwidth = target.bandwidth
    if before.bandwidth is not None and target.bandwidth is not None:
        bandwidth = before.bandwidth + share * (target.bandwidth - before.bandwidth)
    return replace(
        target,
        latency=before.latency + share * (target.latency - before.latency),
        jitter=before.jitter + share * (target.jitter - before.jitter),
        bandwidth=bandwidth,
    )


def _checked(step: LinkStep, event: LinkEvent) -> LinkStep:
    shape = step.shape
    if shape.latency < 0 or shape.jitter > shape.latency:
        raise ScenarioError(
            f"{describe(event)} at {step.at:g} s: a latency of {shape.latency * 1e3:g} ms with a jitter of "
            f"{shape.jitter * 1e3:g} ms isn't possible; a swing or jitter is at most the latency"
        )
    return step


def _other_steps(number: int, event: Event) -> list[Step]:
    match event:
        case NodeEvent(lost=bool(lost)):
            return [NodeStep(event.at, number, event.node, lost)]
        case NodeEvent(speed=float(speed)):
            return [SpeedStep(event.at, number, event.node, speed)]
        case RateEvent():
            return [RateStep(event.at, number, event.rate)]
        case WorkEvent():
            return [WorkStep(event.at, number, event.operator, event.work)]
        case MoveEvent():
            return [
                MoveStep(event.at + count * event.every, number, event.move, event.to[count % len(event.to)])
                for count in range(event.times)
            ]
        case _:
            raise TypeError(f"no steps for {event!r}")


def _end(event: Event, end: float) -> float:
    """When it is over."""
    match event:
        case LinkEvent(over=float(over)):
            return min(end, event.at + over)
        case LinkEvent(swing=float()):
            return min(end, event.until or end)
        case MoveEvent(every=0.0):
            return end
        case MoveEvent():
            return min(end, event.at + event.every * event.times)
        case _:
            return event.at


def links_at(found: Mapping[Ends, Shape], nodes: Sequence[str]) -> dict[Ends, Shape]:
    """Every ordered pair of nodes; what isn't declared isn't slowed down."""
    return {(a, b): found.get((a, b), Shape()) for a in nodes for b in nodes if a != b}
