"""Moves as users see them: orders are taken here, and what became of each is kept, in memory and in the store.

`order` is the one way in, for users (REST) and for `replan` alike: it checks, stores, and leaves the rest to the loop,
which carries out one order after the other (`reconcile`) and notes each state here. What is written is kept in order;
the switch itself is written by the enactor, together with what it changes.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from nomad.clock import Clock
from nomad.errors import ConflictError, InvalidRequestError, NotFoundError
from nomad.master.events import EventLog
from nomad.master.problem import missing
from nomad.master.reconcile.actions import Moving
from nomad.master.state import ORDERS_KEPT, DesiredPipeline, Goal, MoveOrder, Observed, Requested, Tally
from nomad.master.store import Store
from nomad.master.views import MovePhase, MoveState, MoveView, PlacementView

log = logging.getLogger(__name__)

URGENT = ("drain", "replace")
"""Causes that can't wait: these moves go ahead of all others that haven't been begun."""


class MoveLog:
    """The moves of all pipelines, bounded per pipeline."""

    def __init__(self, store: Store, events: EventLog, clock: Clock, keep: int) -> None:
        self._store = store
        self._events = events
        self._clock = clock
        self._keep = keep
        self._ordering: set[tuple[str, str]] = set()
        """Pipelines and operators whose orders are being written down."""
        self._views: dict[str, dict[str, MoveView]] = {}
        self.ordered: Callable[[MoveView, int], None] = lambda view, event: None
        """Called with each new move, and the event that it was noted as."""
        self.ended: Callable[[MoveView], None] = lambda view: None
        """Called with each move that has come to its end."""

    def restore(self, views: Iterable[MoveView]) -> None:
        """What the store has."""
        for view in views:
            self._put(view)

    def list(self, pipeline: str) -> list[MoveView]:
        """Oldest first."""
        return list(self._views.get(pipeline, {}).values())

    def get(self, pipeline: str, move: str) -> MoveView:
        """Raises `NotFoundError`."""
        found = self._views.get(pipeline, {}).get(move)
        if found is None:
            raise NotFoundError(f"pipeline {pipeline!r} has no move {move!r}", status=404)
        return found

    def forget(self, pipeline: str) -> None:
        """The pipeline was removed."""
        self._views.pop(pipeline, None)

    async def order(
        self,
        wanted: DesiredPipeline,
        operator: str,
        node: str,
        *,
        cause: str,
        reason: str,
        predicted: Mapping[str, float] | None = None,
        placement: PlacementView | None = None,
        relieves: str = "",
        follows: int | None = None,
    ) -> MoveView:
        """Have an operator moved once its turn comes; `check` comes first.

        `cause` is as `MoveView` has it, `reason` a sentence; `predicted`, `placement` and `relieves` are `MoveOrder`'s.
        What can't wait goes ahead of what can. `follows`: the event that led to this one. Raises `StateError` and
        `ConflictError`, with nothing ordered.
        """
        predicted = dict(predicted or {})
        now = self._clock.wall()
        id = f"m{int(now * 1000):x}-{secrets.token_hex(3)}"
        order = MoveOrder(id, operator, node, cause, reason, predicted, now, placement, relieves)
        view = _planned(wanted.spec.id, order, wanted.node_of(operator))
        if (view.pipeline, operator) in self._ordering or any(other.operator == operator for other in wanted.orders):
            raise under_way(operator, view.pipeline)
        _check_wanted(wanted)
        self._ordering.add((view.pipeline, operator))
        try:
            if cause == "user":
                await self._store.order_move(view, self._keep)
            else:
                await self._store.save_moves([view], self._keep)
            _check_wanted(wanted)  # else there would be a move left of a pipeline that isn't there any more
            self._put(view)
            wanted.orders.append(order)
            wanted.orders.sort(key=lambda other: other.cause not in URGENT)
        finally:
            self._ordering.discard((view.pipeline, operator))
        data: dict[str, Any] = {"move": id, "source": view.source, "target": node, "cause": cause, **predicted}
        if placement is not None:
            data |= {"terms": placement.cost, "runner_up": placement.runner_up, "why_not": placement.why_not}
        way = f"to be replaced on {node}" if node == view.source else f"to move from {view.source} to {node}"
        text = f"{operator} is {way}: {reason}"
        event = self._events.add(
            "move.ordered", text, pipeline=view.pipeline, operator=operator, cause=follows, data=data
        )
        self.ordered(view, event)
        return view

    def note(self, action: Moving, tally: Tally | None) -> MoveView:
        """A move has come to another state."""
        views = self._views.setdefault(action.pipeline, {})
        view = views.get(action.order.id) or _planned(action.pipeline, action.order, action.source)
        phases = list(view.phases)
        if action.left is not None:
            phases.append(MovePhase(str(action.left), action.seconds))
        now = self._clock.wall()
        state = action.state
        view = replace(
            view,
            state=state,
            source=action.source,
            phases=phases,
            epoch=action.epoch,
            error=action.error,
            started=now if state is MoveState.STARTING else view.started,
        )
        if state.final:
            view = replace(view, finished=now)
            if tally is not None and state is MoveState.DONE:
                view = replace(view, pause=tally.pause, lost=tally.lost, doubled=tally.doubled)
        self._put(view)
        if state.final:
            self.ended(view)
        return view

    async def save(self, move: str) -> None:
        """Write down how a move stands. Raises `StateError`."""
        found = [view for views in self._views.values() if (view := views.get(move)) is not None]
        if found:
            await self._store.save_moves(found, self._keep)

    def _put(self, view: MoveView) -> None:
        views = self._views.setdefault(view.pipeline, {})
        views[view.id] = view
        while len(views) > self._keep:
            del views[next(iter(views))]


def check(
    wanted: DesiredPipeline,
    operator: str,
    node: str,
    requested: Requested,
    observed: Observed,
    used_memory_mb: Mapping[str, float],
    used_devices: Mapping[str, Mapping[str, int]],
) -> None:
    """Whether an operator can be moved there now. Raises `NotFoundError`, `InvalidRequestError`, `ConflictError`."""
    id = wanted.spec.id
    specs = {op.name: op for op in wanted.spec.operators}
    _check_operator(wanted, operator)
    if node not in observed.nodes:
        raise InvalidRequestError(f"the node {node!r} is unknown; known nodes: {', '.join(observed.nodes)}", status=422)
    if not observed.nodes[node].ready:
        raise InvalidRequestError(f"the node {node!r} is lost", status=422)
    if not observed.open(node):
        raise InvalidRequestError(f"the node {node!r} takes no new operators", status=422)
    if operator in wanted.bound:
        own = wanted.bound[operator]
        ends = {wanted.spec.operators[0].name: "start", wanted.spec.operators[-1].name: "end"}
        why = f"it is the pipeline's {ends[operator]}" if operator in ends else "unpin it first"
        raise InvalidRequestError(f"operator {operator!r} is pinned to {own}: {why}", status=422)
    _check_time(wanted, operator, requested, observed)
    if wanted.node_of(operator) == node:
        raise InvalidRequestError(
            f"operator {operator!r} is on {node} already; for a new instance of it there: "
            f"nomad move {id} {operator} --replace",
            status=422,
        )
    target, spec = observed.nodes[node], specs[operator]
    if lacking := missing(spec, target, used_devices.get(node, {})):
        raise InvalidRequestError(
            f"operator {operator!r} requires {', '.join(lacking)}, which {node} doesn't have", status=422
        )
    free = target.memory_mb - used_memory_mb.get(node, 0.0)
    if spec.memory_mb > free:
        raise InvalidRequestError(
            f"operator {operator!r} needs {spec.memory_mb:g} MiB, and {node} has {max(0.0, free):g} MiB free",
            status=422,
        )


def check_replacing(wanted: DesiredPipeline, operator: str, requested: Requested, observed: Observed) -> str:
    """Whether another instance of an operator can take its place now; the pod that is to go.

    Raises `NotFoundError`, `InvalidRequestError`, `ConflictError`.
    """
    _check_operator(wanted, operator)
    pod = _check_time(wanted, operator, requested, observed)
    if not observed.open(wanted.node_of(operator)):
        raise InvalidRequestError(f"the node {wanted.node_of(operator)!r} takes no new operators", status=422)
    return pod


def _check_wanted(wanted: DesiredPipeline) -> None:
    if wanted.goal is Goal.REMOVE:
        raise ConflictError(f"pipeline {wanted.spec.id!r} is being removed", status=409)


def _check_operator(wanted: DesiredPipeline, operator: str) -> None:
    names = [op.name for op in wanted.spec.operators]
    if operator not in names:
        raise NotFoundError(
            f"pipeline {wanted.spec.id!r} has no operator {operator!r}; it has {', '.join(names)}", status=404
        )


def _check_time(wanted: DesiredPipeline, operator: str, requested: Requested, observed: Observed) -> str:
    """Whether the pipeline is at work and there is room for an order; the operator's pod. Raises `ConflictError`."""
    id = wanted.spec.id
    have = requested.pipelines.get(id)
    if have is None or any(op.pod is None or not _is_ready(observed, op.pod) for op in have.operators.values()):
        raise ConflictError(
            f"pipeline {id!r} isn't running: its operators are moved while all of them work", status=409
        )
    if any(order.operator == operator for order in wanted.orders):
        raise under_way(operator, id)
    if len(wanted.orders) >= ORDERS_KEPT:
        raise ConflictError(f"{ORDERS_KEPT} moves of pipeline {id!r} wait already", status=409)
    return have.operators[operator].pod or ""


def story(view: MoveView) -> str:
    """How a move stands, in a sentence."""
    name, there = view.operator, view.source == view.target
    way = f"{name} is replaced on {view.source}" if there else f"{name} moves from {view.source} to {view.target}"
    match view.state:
        case MoveState.DONE:
            total = sum(phase.seconds for phase in view.phases)
            pause = "unknown" if view.pause is None else f"{view.pause * 1e3:.1f} ms"
            counts = [
                f"{'?' if n is None else n} {what}" for n, what in ((view.lost, "lost"), (view.doubled, "doubled"))
            ]
            done = "was replaced on" if there else f"has moved from {view.source} to"
            return f"{name} {done} {view.target} in {total:.1f} s (pause {pause}, {', '.join(counts)})"
        case MoveState.ROLLED_BACK if there:
            return f"{name} on {view.source} stays the instance that it was: replacing it was rolled back, {view.error}"
        case MoveState.ROLLED_BACK:
            return f"{name} stays on {view.source}: its move to {view.target} was rolled back, {view.error}"
        case MoveState.FAILED:
            return f"{name} isn't {'replaced on' if there else 'moved to'} {view.target}: {view.error}"
        case MoveState.STARTING:
            return f"{way} ({view.reason}): a new instance is started there"
        case _:
            return f"{way}: {view.state.replace('_', ' ')}"


def resumed(view: MoveView) -> MoveOrder:
    """The order that a move was, for a master that finds it in the store."""
    known = {
        "latency_before": view.predicted_latency_before,
        "latency_after": view.predicted_latency_after,
        "gain": view.predicted_gain,
    }
    predicted = {name: value for name, value in known.items() if value is not None}
    return MoveOrder(view.id, view.operator, view.target, view.cause, view.reason, predicted, view.asked)


def _planned(pipeline: str, order: MoveOrder, source: str) -> MoveView:
    before, after = order.predicted.get("latency_before"), order.predicted.get("latency_after")
    gain = order.predicted.get("gain")
    if gain is None and before is not None and after is not None:
        gain = before - after
    return MoveView(
        id=order.id,
        pipeline=pipeline,
        operator=order.operator,
        source=source,
        target=order.node,
        cause=order.cause,
        reason=order.reason,
        state=MoveState.PLANNED,
        asked=order.asked_at,
        predicted_latency_before=before,
        predicted_latency_after=after,
        predicted_gain=gain,
    )


def under_way(operator: str, pipeline: str) -> ConflictError:
    """What is to be said when an operator that moves, or is about to, can't be dealt with now."""
    return ConflictError(f"a move of operator {operator!r} is under way already: nomad moves {pipeline}", status=409)


def _is_ready(observed: Observed, pod: str) -> bool:
    return pod in observed.pods and observed.pods[pod].ready_at is not None
