"""What an earlier master knew, taken up by the next one: what it asked for, moves it had under way, where its pods are.

Called by `assembly`, in this order, before the loop looks for the first time. The store says what was asked for, the
runtime which pods there are; where they differ, the pods are right.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from nomad.clock import Clock
from nomad.errors import StateError
from nomad.master.events import EventLog
from nomad.master.moves import MoveLog, resumed, story
from nomad.master.observe import Observer
from nomad.master.state import (
    Desired,
    History,
    Observed,
    Requested,
    RequestedMove,
    RequestedOperator,
    RequestedPipeline,
    operator_id,
)
from nomad.master.store import Store, StoredPipeline
from nomad.master.views import MoveState, PlacementView
from nomad.runtime.base import ObservedPod, PodPhase

log = logging.getLogger(__name__)

ADOPT_EACH = 0.05
"""Seconds that a restarted master waits for each pod of its predecessor: thousands can't all report at once."""


def restore(
    desired: Desired, observer: Observer, moves: MoveLog, stored: list[StoredPipeline], clock: Clock
) -> Requested:
    """What an earlier master knew. Its pods are asked for as if by this one, and given time to report.

    A move whose switch was stored goes on from there: the old instance is nobody's any more, and ended as such.
    """
    pipelines, now = {}, clock.now()
    grace = ADOPT_EACH * sum(op.pod is not None for pipeline in stored for op in pipeline.operators)
    for pipeline in stored:
        id, wanted = pipeline.wanted.spec.id, pipeline.wanted
        desired.pipelines[id] = wanted
        first = RequestedOperator(epoch=wanted.epoch_floor, highest=wanted.epoch_floor)
        operators = {op.name: first for op in wanted.spec.operators}
        for op in pipeline.operators:
            operators[op.name] = RequestedOperator(
                epoch=op.epoch,
                highest=max(op.epoch, op.highest),
                node=wanted.node_of(op.name),
                pod=op.pod,
                last_pod=op.last_pod,
                asked_at=now,
                adopted=op.pod is not None,
                grace=grace,
                restarts=op.restarts,
            )
            observer.restore(operator_id(id, op.name), History(op.totals, op.failure))
        moves.restore(pipeline.moves)
        move = None
        for view in pipeline.moves:
            order = resumed(view)
            present = operators[view.operator]
            # An epoch may also be above the new instance's because the old one was restarted where it was.
            moved = view.state is MoveState.STOPPING or wanted.node_of(view.operator) != view.source
            if not view.state.final and (present.epoch == view.epoch or (0 < view.epoch < present.epoch and moved)):
                move = RequestedMove(order, view.source, MoveState.SWITCHING, now, switch_at=now, switched=True)
            elif view.state is not MoveState.PLANNED:
                continue
            elif view.source == view.target:
                order = replace(order, relieves=present.pod or present.last_pod)
            wanted.orders.append(order)
        pipelines[id] = RequestedPipeline(
            operators,
            move,
            outcome=pipeline.outcome,
            reason=pipeline.reason,
            stored=pipeline.outcome is not None,
            # Nobody wrote it down. Where each has had a pod, and a master didn't end them all, it was at work.
            was_running=all(op.last_pod for op in operators.values()) and any(op.pod for op in operators.values()),
        )
    return Requested(pipelines)


async def give_up_moves(desired: Desired, moves: MoveLog, events: EventLog, cause: int, clock: Clock) -> None:
    """Moves that an earlier master left before the switch: the old instance went on, the new one is nobody's."""
    for id, wanted in desired.pipelines.items():
        known = {order.id for order in wanted.orders}
        for view in [view for view in moves.list(id) if not view.state.final and view.id not in known]:
            error = "the master was restarted before the switch"
            ended = replace(view, state=MoveState.ROLLED_BACK, finished=clock.wall(), error=error)
            moves.restore([ended])
            try:
                await moves.save(view.id)
            except StateError as exc:
                log.warning("that move %s was rolled back can't be written down: %s", view.id, exc)
            text, data = story(ended), {"move": view.id, "source": view.source, "target": view.target}
            events.add("move.rolled_back", text, pipeline=id, operator=view.operator, cause=cause, data=data)


def miss(requested: Requested, observed: Observed, observer: Observer) -> None:
    """Pods that were asked for and that the runtime knows nothing of never ran."""
    for pipeline in requested.pipelines.values():
        for op in pipeline.operators.values():
            if op.pod is not None and op.pod not in observed.pods:
                observer.runtime(ObservedPod(op.pod, PodPhase.EXITED, "", op.epoch))


async def where_found(requested: Requested, desired: Desired, observed: Observed, store: Store) -> Requested:
    """Pods are where the runtime has them. An earlier master that had chosen another node may not have come so far as
    to start the operator there: where its pod works, it stays.
    """
    pipelines = dict(requested.pipelines)
    for id, have in requested.pipelines.items():
        wanted, placement, operators = desired.pipelines[id], {}, dict(have.operators)
        for name, op in have.operators.items():
            state = observed.pods.get(op.pod or "")
            node = state.runtime.node if state is not None and state.runtime is not None else ""
            if state is None or node in ("", op.node):
                continue
            operators[name] = replace(op, node=node)
            if observed.usable(node) and not state.ended:
                placement[name] = PlacementView(node, "its pod was found there")
        if placement:
            wanted.placement = {**wanted.placement, **placement}
            try:
                await store.set_placement(id, wanted.placement)
            except StateError as exc:
                log.warning("where the operators of %s are can't be written down: %s", id, exc)
        pipelines[id] = replace(have, operators=operators)
    return replace(requested, pipelines=pipelines)
