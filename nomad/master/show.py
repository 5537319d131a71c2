"""Builds the views from the state: pure, and only for readers. Nothing decides by what is made here."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import fields

from nomad.control import PodStats
from nomad.master import estimates
from nomad.master.observe import added
from nomad.master.state import (
    Desired,
    DesiredPipeline,
    Goal,
    History,
    Observed,
    PodState,
    Requested,
    RequestedMove,
    RequestedOperator,
    RequestedPipeline,
    link_id,
    operator_id,
)
from nomad.master.views import (
    LinkView,
    NodeView,
    OperatorState,
    OperatorView,
    Phase,
    PipelineView,
    StatsView,
)
from nomad.measure.book import Book
from nomad.measure.survey import MOST_PAIRS_NODES
from nomad.pipeline import OperatorSpec

UNASKED = RequestedOperator()
"""Of an operator that nothing was asked for."""

_GAUGES = {f.name for f in fields(StatsView)} - {"links", "rate"}


def pipeline(
    id: str, desired: Desired, requested: Requested, observed: Observed, book: Book, now: float
) -> PipelineView:
    """A pipeline and its operators."""
    wanted = desired.pipelines[id]
    have = requested.pipelines.get(id) or RequestedPipeline({})
    phase = phase_of(desired, wanted, have, observed)
    operators = [
        _operator(wanted, op.name, have.operators.get(op.name, UNASKED), have.move, observed, book, phase, now)
        for op in wanted.spec.operators
    ]
    return PipelineView(
        id=id,
        phase=phase,
        reason=have.reason or "; ".join(f"operator {op.name}: {op.reason}" for op in operators if op.reason),
        created=wanted.created,
        start=wanted.spec.start,
        end=wanted.spec.end,
        codec=wanted.spec.codec,
        operators=operators,
        edges=list(wanted.spec.edges),
        profile=[dict(entry) for entry in wanted.spec.profile],
        warnings=list(wanted.warnings),
        moves=wanted.moves,
    )


def nodes(desired: Desired, requested: Requested, observed: Observed, book: Book, now: float) -> Iterator[NodeView]:
    """All nodes, in the runtime's order. What is placed is looked up at once, each one when it is asked for."""
    placed: dict[str, list[str]] = {}
    used: dict[str, float] = {}
    for where, operator, op in claims(desired, requested):
        if operator not in placed.setdefault(where, []):
            placed[where].append(operator)
        used[where] = used.get(where, 0.0) + op.memory_mb
    for node in list(observed.nodes.values()):
        yield NodeView(
            id=node.id,
            speed=desired.speeds.get(node.id, node.speed),
            cores=node.cores,
            memory_mb=node.memory_mb,
            memory_used_mb=used.get(node.id, 0.0),
            arch=node.arch,
            labels=sorted(node.labels),
            python=node.python,
            operators=placed.get(node.id, []),
            ready=node.ready,
            devices=dict(node.devices),
            schedulable=node.schedulable,
            reachable=node.reachable,
            estimates=estimates.node(book, node.id, now),
        )


def memory_used(desired: Desired, requested: Requested) -> dict[str, float]:
    """Node -> MiB that the operators placed there ask for."""
    used: dict[str, float] = {}
    for node, _, op in claims(desired, requested):
        used[node] = used.get(node, 0.0) + op.memory_mb
    return used


def devices_used(desired: Desired, requested: Requested) -> dict[str, dict[str, int]]:
    """Node -> device -> how many the operators placed there have."""
    used: dict[str, dict[str, int]] = {}
    for node, _, op in claims(desired, requested):
        there = used.setdefault(node, {})
        for name, count in op.devices.items():
            there[name] = there.get(name, 0) + count
    return used


def links(desired: Desired, observed: Observed, book: Book, now: float) -> Iterator[LinkView]:
    """How links are emulated, and what is measured: every ordered pair of nodes, on large clusters those that are used
    or were measured. There are a million of a thousand nodes. Which ones they are is looked up at once, each one when
    it is asked for.
    """
    measured = round_trips(desired, observed)
    found = ways(measured, observed, book)
    for source, target in sorted(found) if len(observed.nodes) > MOST_PAIRS_NODES else found:
        shape = desired.shape(source, target)
        yield LinkView(
            source=source,
            target=target,
            latency=shape.latency,
            jitter=shape.jitter,
            bandwidth=shape.bandwidth,
            loss=shape.loss,
            rtt=measured.get((source, target)),
            estimates=estimates.link(book, source, target, now),
        )


def ways(measured: Collection[tuple[str, str]], observed: Observed, book: Book) -> Collection[tuple[str, str]]:
    """The links that are shown, in any order."""
    there = observed.nodes
    if len(there) > MOST_PAIRS_NODES:
        return {way for way in {*measured, *book.ways()} if way[0] in there and way[1] in there}
    return [(a, b) for a in there for b in there if a != b]


def totals(history: History | None, state: PodState | None, other: PodState | None = None) -> PodStats:
    """An operator's counters over its processes, with the gauges of the present one; `other`: of a move."""
    total = history.totals if history is not None else None
    for seen in (other, state):
        if seen is not None and seen.heartbeat_at is not None:
            total = seen.stats if total is None else added(total, seen.stats)
    return total if total is not None else PodStats()


def stats(history: History | None, state: PodState | None, other: PodState | None = None) -> StatsView:
    """The same, as a view."""
    total = totals(history, state, other)
    return StatsView(
        **{name: getattr(total, name) for name in _GAUGES},
        rate=state.rate if state is not None else None,
        links=list(state.links) if state is not None else [],
    )


def phase_of(desired: Desired, wanted: DesiredPipeline, have: RequestedPipeline, observed: Observed) -> Phase:
    """Where a pipeline stands."""
    if have.outcome is not None:
        return Phase(have.outcome)
    if wanted.goal is not Goal.RUN or desired.closing:
        return Phase.STOPPING
    states = [None if op.away else observed.pods.get(op.pod or "") for op in have.operators.values()]
    if states and all(state is not None and state.ready_at is not None for state in states):
        return Phase.RUNNING
    if have.was_running:
        return Phase.DEGRADED
    return Phase.STARTING if any(op.last_pod for op in have.operators.values()) else Phase.PENDING


def _operator(
    wanted: DesiredPipeline,
    name: str,
    op: RequestedOperator,
    move: RequestedMove | None,
    observed: Observed,
    book: Book,
    phase: Phase,
    now: float,
) -> OperatorView:
    id = operator_id(wanted.spec.id, name)
    state = observed.pods.get(op.pod) if op.pod else None
    history = observed.history.get(id)
    shown, reason = state_of(op, state, history, phase, now)
    if (op.pod is None or op.away) and phase in (Phase.DEGRADED, Phase.STARTING, Phase.PENDING):
        reason = _waiting(wanted, name, id, observed) or reason
    mine = move if move is not None and move.order.operator == name else None
    other = observed.pods.get(mine.second.pod) if mine is not None and mine.second.pod else None
    spec = next(spec for spec in wanted.spec.operators if spec.name == name)
    return OperatorView(
        id=id,
        name=name,
        kind=spec.kind,
        node=node_of(wanted, name, op),
        state=shown,
        pod=op.last_pod,
        pid=None if state is None else state.pid or (state.runtime.pid if state.runtime else None),
        epoch=op.epoch,
        restarts=op.restarts,
        heartbeat_age=None if state is None or state.heartbeat_at is None else max(0.0, now - state.heartbeat_at),
        stats=stats(history, state, other),
        last_failure=history.failure if history is not None else None,
        placement=wanted.placement[name],
        reason=reason,
        moving_to=mine.order.node if mine is not None and not mine.switched and not mine.state.final else None,
        pin=wanted.bound.get(name),
        image=spec.image,
        requirements=list(spec.requirements),
        environment=dict(spec.environment),
        secrets=dict(spec.secrets),
        devices=dict(spec.devices),
        estimates=estimates.operator(book, wanted.spec.id, name, now),
    )


def node_of(wanted: DesiredPipeline, name: str, op: RequestedOperator) -> str:
    """Where an operator is, or is to be."""
    return op.node if op.pod and op.node else wanted.node_of(name)


def _waiting(wanted: DesiredPipeline, name: str, id: str, observed: Observed) -> str:
    """Why an operator without a pod can't have one now."""
    node = wanted.node_of(name)
    if observed.open(node):
        return ""
    why = f"its node {node} {'takes no new operators' if observed.usable(node) else 'is lost'}"
    if name in wanted.bound:
        return f"{why}, and it is bound to it"
    return why + (f"; {more}" if (more := observed.homeless.get(id)) else "")


def state_of(
    op: RequestedOperator, state: PodState | None, history: History | None, phase: Phase, now: float
) -> tuple[OperatorState, str]:
    """Where an operator stands, and why."""
    failure = history.failure if history is not None else None
    if phase.final or phase is Phase.STOPPING:
        if op.pod is not None:
            return OperatorState.STOPPING, ""
        if phase is Phase.FAILED and failure is not None:
            return OperatorState.FAILED, ""
        return (OperatorState.FINISHED if phase is Phase.COMPLETED else OperatorState.STOPPED), ""
    if op.pod is None:
        if not op.last_pod:
            return OperatorState.PENDING, ""
        why = str(failure) if failure else "its pod ended"
        return OperatorState.RESTARTING, f"{why}; restarted in {max(0.0, op.retry_at - now):.1f} s"
    if op.away:
        return OperatorState.UNRESPONSIVE, ""
    if state is None or state.ready_at is None:
        return OperatorState.STARTING, ""
    if state.finished:
        return OperatorState.FINISHED, ""
    if op.silent:
        return OperatorState.UNRESPONSIVE, "its process lives, but its heart-beats are overdue"
    if state.leaving:
        return OperatorState.RUNNING, "its pod is to end"
    return OperatorState.RUNNING, ""


def round_trips(desired: Desired, observed: Observed) -> dict[tuple[str, str], float]:
    """Link -> the least round trip that operators measure there now."""
    ends = {
        link_id(id, source, target): (wanted.node_of(source), wanted.node_of(target))
        for id, wanted in desired.pipelines.items()
        for source, target in wanted.spec.edges
    }
    least: dict[tuple[str, str], float] = {}
    for state in observed.pods.values():
        for link in state.links:
            pair = ends.get(link.link)
            if pair is not None and link.rtt is not None and link.direction == "out":
                least[pair] = min(link.rtt, least.get(pair, link.rtt))
    return least


def claims(desired: Desired, requested: Requested) -> Iterator[tuple[str, str, OperatorSpec]]:
    """Node, id and specification of all operators that run, or are to run again; of one that moves, on both nodes."""
    for id, wanted in desired.pipelines.items():
        have = requested.pipelines.get(id) or RequestedPipeline({})
        over = wanted.goal is not Goal.RUN or have.outcome is not None
        for op in wanted.spec.operators:
            asked = have.operators.get(op.name, UNASKED)
            nodes = [] if over and asked.pod is None else [wanted.node_of(op.name)]
            nodes += [] if over else [order.node for order in wanted.orders if order.operator == op.name]
            nodes = list(dict.fromkeys(nodes))
            if have.move is not None and have.move.order.operator == op.name and have.move.second.pod is not None:
                second = have.move.second.node
                if second not in nodes or have.move.source == have.move.order.node:  # there are two of it, there
                    nodes.append(second)
            for node in nodes:
                yield node, operator_id(id, op.name), op
