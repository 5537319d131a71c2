"""What a scrape reads, straight from the state: a view says more, and takes ten times as long to make.

Pure, and only for `metrics`. All are iterators that may be left for a while, in which the state changes: what they give
then is of different moments, each row of one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from nomad.control import PodStats
from nomad.master import show
from nomad.master.state import (
    Desired,
    DesiredPipeline,
    Observed,
    Requested,
    RequestedPipeline,
    operator_id,
)
from nomad.master.views import OperatorState, Phase
from nomad.measure.book import Book, LinkEstimates, NodeEstimates, OperatorEstimates


class OperatorRow(NamedTuple):
    """As `views.OperatorView` has them."""

    name: str
    node: str
    running: bool
    restarts: int
    heartbeat_age: float | None
    stats: PodStats
    estimates: OperatorEstimates


class PipelineRow(NamedTuple):
    """As `views.PipelineView` has them."""

    id: str
    phase: Phase
    operators: list[OperatorRow]


class NodeRow(NamedTuple):
    """As `views.NodeView` has them."""

    id: str
    operators: int
    memory_used_mb: float
    memory_mb: float
    estimates: NodeEstimates


class LinkRow(NamedTuple):
    """As `views.LinkView` has them."""

    source: str
    target: str
    rtt: float | None
    estimates: LinkEstimates


def pipelines(
    desired: Desired, requested: Requested, observed: Observed, book: Book, now: float
) -> Iterator[PipelineRow]:
    """All pipelines with their operators."""
    for id, wanted in list(desired.pipelines.items()):
        have = requested.pipelines.get(id) or RequestedPipeline({})
        phase = show.phase_of(desired, wanted, have, observed)
        names = [op.name for op in wanted.spec.operators]
        yield PipelineRow(id, phase, [_operator(wanted, name, have, observed, book, phase, now) for name in names])


def nodes(desired: Desired, requested: Requested, observed: Observed, book: Book) -> Iterator[NodeRow]:
    """All nodes."""
    placed: dict[str, set[str]] = {}
    used: dict[str, float] = {}
    for where, operator, op in show.claims(desired, requested):
        placed.setdefault(where, set()).add(operator)
        used[where] = used.get(where, 0.0) + op.memory_mb
    for node in list(observed.nodes.values()):
        yield NodeRow(node.id, len(placed.get(node.id, ())), used.get(node.id, 0.0), node.memory_mb, book.node(node.id))


def links(desired: Desired, observed: Observed, book: Book) -> Iterator[LinkRow]:
    """The links that are shown."""
    measured = show.round_trips(desired, observed)
    for source, target in show.ways(measured, observed, book):
        yield LinkRow(source, target, measured.get((source, target)), book.link(source, target))


def _operator(
    wanted: DesiredPipeline,
    name: str,
    have: RequestedPipeline,
    observed: Observed,
    book: Book,
    phase: Phase,
    now: float,
) -> OperatorRow:
    pipeline, op = wanted.spec.id, have.operators.get(name, show.UNASKED)
    state = observed.pods.get(op.pod) if op.pod else None
    history = observed.history.get(operator_id(pipeline, name))
    second = have.move.second.pod if have.move is not None and have.move.order.operator == name else None
    beat = state.heartbeat_at if state is not None else None
    return OperatorRow(
        name=name,
        node=show.node_of(wanted, name, op),
        running=show.state_of(op, state, history, phase, now)[0] is OperatorState.RUNNING,
        restarts=op.restarts,
        heartbeat_age=None if beat is None else max(0.0, now - beat),
        stats=show.totals(history, state, observed.pods.get(second) if second else None),
        estimates=book.operator(pipeline, name),
    )
