"""What to do about one operator's pod: it is started, told its peers, listened to, relieved, stopped.

A part of `reconcile`. An operator's pod, as this file sees it:

    nothing ─Start─▶ asked ─(connects)─Assign─▶ assigned ─(ready)─TellPeers*─▶ at work
       ▲                │ not ready in time: Kill            │ wanted no more: AskStop, then Kill
       └──pause, longer each time──(ended)──────────────────┘

Each method takes what was asked for of an operator and gives what is asked for from now on. No await, no clock, no I/O.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from nomad.control import Role
from nomad.master.reconcile import peers
from nomad.master.reconcile.actions import (
    Action,
    AskStop,
    Assign,
    Ended,
    Hearing,
    Kill,
    Ready,
    Rehome,
    Relieve,
    Start,
    TellPeers,
)
from nomad.master.state import (
    Desired,
    DesiredPipeline,
    Observed,
    PodState,
    Requested,
    RequestedOperator,
    RequestedPipeline,
    Told,
    link_id,
    pod_id,
)
from nomad.runtime.base import reason_of
from nomad.settings import Reconcile


@dataclass(slots=True)
class Look:
    """One look at everything: what holds, and what has been decided so far."""

    desired: Desired
    requested: Requested
    observed: Observed
    now: float
    settings: Reconcile
    overdue: float
    """Seconds without a heart-beat after which an operator counts as silent."""
    upgrading: set[str]
    """Pipelines of which an operator is replaced because it is out of date, or is about to be."""
    actions: list[Action] = field(default_factory=list)
    wake_at: float | None = None
    listen_at: float | None = None

    def wake(self, at: float | None) -> None:
        """Look again then, at the latest."""
        if at is not None and (self.wake_at is None or at < self.wake_at):
            self.wake_at = at

    def listen(self, at: float) -> None:
        """Heart-beats are overdue then, if none come before."""
        if self.listen_at is None or at < self.listen_at:
            self.listen_at = at


def heard_at(state: PodState) -> float:
    """When a pod was heard last, so far as silence counts."""
    return max(state.heartbeat_at or 0.0, state.ready_at or 0.0)


class PodSteps:
    """The pods of one pipeline, at one look."""

    def __init__(self, look: Look, wanted: DesiredPipeline) -> None:
        self.id = wanted.spec.id
        self.wanted = wanted
        self.desired = look.desired
        self.observed = look.observed
        self.now = look.now
        self.settings = look.settings
        self.overdue = look.overdue
        self.act = look.actions.append
        self.wake = look.wake
        self.listen = look.listen
        self.upgrading = look.upgrading
        have = look.requested.pipelines.get(self.id)
        if have is None:
            first = RequestedOperator(epoch=wanted.epoch_floor, highest=wanted.epoch_floor)
            have = RequestedPipeline({op.name: first for op in wanted.spec.operators})
        self.have = have
        self.operators = dict(have.operators)
        self.move = have.move
        self.ended_moves = have.ended_moves & {order.id for order in wanted.orders}

    # One operator's pod

    def _ended(self, name: str, op: RequestedOperator, *, kept: bool) -> RequestedOperator:
        state = self._state(op)
        if op.pod is None or not self._gone(op):
            return op
        if kept and self._away(name, op):
            # Perhaps only the way to it is lost, and it goes on. As long as it has no other place it is left alone.
            return replace(self._rehome(name, op, op.node, "it is lost"), away=True)
        backoff = self.settings.backoff
        healthy = state.ready_at is not None and self.now - state.ready_at >= backoff.healthy
        failures, start_failures = 1 if healthy else op.failures + 1, op.start_failures
        retry_at, reason = self.now + backoff.delay(failures), ""
        if not self.observed.usable(op.node):
            # Pods on a lost node are nobody's: they are ended if they are seen again, and fenced by their epoch.
            failures, retry_at, reason = op.failures, self.now, f"its node {op.node} is lost"
        elif state.ready_at is None and (state.start_error is not None or op.kill_by is not None):
            start_failures += 1
        elif state.leaving and kept and state.error is None:
            reason = "it was asked to end by somebody else, and no other had taken its place yet"
        mishap = kept or state.fatal or state.start_error is not None
        self.act(Ended(self.id, name, op.pod, retry_at if kept else None, not mishap, reason))
        return replace(op, pod=None, failures=failures, start_failures=start_failures, retry_at=retry_at, told=None)

    def _start(self, name: str, op: RequestedOperator) -> RequestedOperator:
        node = self.wanted.node_of(name)
        elsewhere = bool(op.last_pod) and node != op.node
        usable, open = self.observed.usable(node), self.observed.open(node)
        tired = op.start_failures >= self.settings.start_attempts and not elsewhere
        # Another node that has just been asked for comes too late once a pod is started on this one again.
        retry_at = max(op.retry_at, op.rehome_at) if tired else op.retry_at
        early = self.now < retry_at and not elsewhere
        if not open or (tired and early):
            closed = "it takes no new operators" if usable else "it is lost"
            op = self._rehome(name, op, node, "no pod could be started there" if open else closed)
        if not open:
            return op
        if early:
            self.wake(retry_at)
            return op
        new = self._next(name, op, node, again=bool(op.last_pod))
        self.act(Start(self.id, name, new.last_pod, new.epoch, node))
        if elsewhere:
            return new
        return replace(
            new,
            start_failures=op.start_failures,
            rehomes=op.rehomes,
            rehome_at=op.rehome_at,
            rehome_nodes=op.rehome_nodes,
        )

    def _next(self, name: str, op: RequestedOperator, node: str, *, again: bool) -> RequestedOperator:
        """The operator's next pod, to be asked for."""
        epoch = max(op.epoch, op.highest) + 1
        pod = pod_id(self.id, name, epoch)
        return RequestedOperator(
            epoch=epoch,
            highest=epoch,
            node=node,
            pod=pod,
            last_pod=pod,
            asked_at=self.now,
            restarts=op.restarts + again,
            failures=op.failures,
        )

    def _rehome(self, name: str, op: RequestedOperator, node: str, reason: str) -> RequestedOperator:
        """Have another node chosen; an operator that is bound to its node waits for it."""
        if name in self.wanted.bound:
            return op
        changes = self.observed.node_changes
        if self.now >= op.rehome_at or changes != op.rehome_nodes:
            self.act(Rehome(self.id, name, node, reason, op.rehomes > 0))
            rehomes = op.rehomes + 1 if changes == op.rehome_nodes else 1
            rehome_at = self.now + self.settings.relieve_backoff.delay(rehomes)
            op = replace(op, rehomes=rehomes, rehome_at=rehome_at, rehome_nodes=changes)
        self.wake(op.rehome_at)
        return op

    def _keep(self, name: str, op: RequestedOperator) -> RequestedOperator:
        """See to it that a pod that is wanted becomes ready, and knows its peers."""
        state, pod = self._state(op), op.pod
        if pod is None or self._gone(op):
            return op
        if op.away:
            # It has time to report again.
            op = replace(op, away=False, adopted=True, asked_at=self.now, grace=0.0, rehomes=0, rehome_at=0.0)
        if op.kill_by is not None:
            return self._kill(op, "it hasn't ended")
        if state.ready_at is None:
            reported = not op.adopted or state.connection is not None
            patience = self.settings.start_timeout if reported else max(op.grace, self.settings.adopt_grace)
            if self.now >= op.asked_at + patience:
                return self._kill(op, f"it hasn't been ready within {patience:g} s")
            self.wake(op.asked_at + patience)
        else:
            if not op.ready:
                self.act(Ready(self.id, name, pod, op.adopted))
                op = replace(op, ready=True, start_failures=0, rehomes=0, rehome_at=0.0)
            op = self._listen_to(name, op, pod, state)
            if self._superseded(name, op):
                return self._kill(op, "its peers have heard a newer instance, which is gone")
        return self._tell(name, op)

    def _relieve(self, name: str, op: RequestedOperator) -> RequestedOperator:
        """Have another pod take the place of one that is to end, or is out of date, while it still works."""
        state, wanted, settings = self._state(op), self.wanted, self.settings
        if op.pod is None or not op.ready or op.kill_by is not None or self._gone(op) or state.finished:
            return op
        outdated = state.runtime is not None and state.runtime.outdated
        if not (state.leaving or outdated) or any(order.operator == name for order in wanted.orders):
            return op
        if self.move is not None and self.move.order.operator == name:
            return op
        cause, reason = "replace", "its pod is to end"
        if not self.observed.open(op.node):
            cause, reason = "drain", f"its pod is to end, and {op.node} takes no new ones"
            if not state.leaving or name in wanted.bound:
                return op  # it stays as long as it can, or waits for its node when it has ended
        elif not state.leaving:
            cause, reason = "upgrade", "its pod is out of date"
            busy = self.id in self.upgrading or len(self.upgrading) >= settings.upgrades_at_once
            if busy or wanted.orders or not all(self._ready(other) for other in self.operators.values()):
                # Another one's turn; what ends it is seen. Only one that is about to begin may come to nothing, be it
                # of this pipeline.
                self.wake(self.now + settings.retry if busy and not wanted.orders else None)
                return op
        backoff = settings.upgrade_backoff if cause == "upgrade" else settings.relieve_backoff
        pause = backoff.delay(op.relieves)
        if op.relieves and self.now < op.relieved_at + pause:
            self.wake(op.relieved_at + pause)
            return op
        if cause == "upgrade":
            self.upgrading.add(self.id)
        self.act(Relieve(self.id, name, op.pod, op.node, cause, reason, op.relieves > 0))
        return replace(op, relieves=op.relieves + 1, relieved_at=self.now)

    def _listen_to(self, name: str, op: RequestedOperator, pod: str, state: PodState) -> RequestedOperator:
        """Note when heart-beats go missing or come back. A silent pod is never ended for it: it may just be busy."""
        until = heard_at(state) + self.overdue
        silent = self.now >= until
        if not silent:
            self.listen(until)
        if silent == op.silent:
            return op
        self.act(Hearing(self.id, name, pod, silent))
        return replace(op, silent=silent)

    def _superseded(self, name: str, op: RequestedOperator) -> bool:
        """An instance that was to take over was heard and is gone; its peers won't hear the one before again."""
        if op.highest <= op.epoch or (self.move is not None and self.move.order.operator == name):
            return False
        return any(self._end_of(peer, link, "in")[0] > op.epoch for peer, link in self._behind(name))

    def _tell(self, name: str, op: RequestedOperator, *, second: bool = False) -> RequestedOperator:
        """Say over the present connection what wasn't said over it yet. A pod that isn't ready is told nothing new."""
        state, pod = self._state(op), op.pod
        if pod is None or state.connection is None or (state.ready_at is None and state.assigned):
            return op
        links, unknown = peers.links(self.wanted, name, op.node, self.operators, self.move, self.desired, self.observed)
        speed, role = self._speed(op.node), peers.role(self.wanted, name, self.move, self.observed, second=second)
        taking_over = second and self.move is not None and not self.move.switched
        called = self.move.called if taking_over and self.move is not None and role == Role.ACTIVE else ()
        told = Told(state.connection, links, speed, role)
        if op.told is not None and op.told.connection == state.connection:
            if state.ready_at is None:
                return op
            before = op.told
            news = tuple(link for link in links if link not in before.links and link.link not in unknown)
            if news or (speed, role) != (before.speed, before.role):
                self.act(TellPeers(self.id, name, pod, news, speed, role, called))
        elif not state.assigned:
            self.act(Assign(self.id, name, pod, links, speed, role, op.epoch, op.node))
        else:
            known = tuple(link for link in links if link.link not in unknown)
            self.act(TellPeers(self.id, name, pod, known, speed, role, called))
        return op if told == op.told else replace(op, told=told)

    def _stop(self, name: str, op: RequestedOperator, *, drain: bool) -> RequestedOperator:
        """See to it that a pod that isn't wanted ends; with `drain`, after it has settled what it has sent."""
        state, pod, settings = self._state(op), op.pod, self.settings
        if pod is None:
            return op
        if op.kill_by is not None or (op.stop_by is not None and self.now >= op.stop_by):
            return self._kill(op, "it hasn't ended in time")
        if op.stop_by is None:
            grace = settings.drain_grace if drain else settings.stop_grace
            if state.connection is not None:
                self.act(AskStop(self.id, name, pod, drain, grace))
            elif not state.fatal:  # else it is ending by itself
                return self._kill(op, "it isn't needed any more")
            # The pod keeps its grace by itself; only what is stuck is ended from outside.
            op = replace(op, stop_by=self.now + grace + settings.retry)
        self.wake(op.stop_by)
        return self._tell(name, op) if drain else op

    def _kill(self, op: RequestedOperator, reason: str) -> RequestedOperator:
        """Ask the runtime, and again when the pod is still there after that."""
        assert op.pod is not None
        if op.kill_by is None or self.now >= op.kill_by:
            self.act(Kill(op.pod, self.settings.stop_grace, reason))
            op = replace(op, kill_by=self.now + self.settings.stop_grace + self.settings.retry)
        self.wake(op.kill_by)
        return op

    # What is seen

    def _before(self, name: str) -> list[tuple[str, str]]:
        """The operators that send to this one, with the links."""
        return [(a, link_id(self.id, a, b)) for a, b in self.wanted.spec.edges if b == name]

    def _behind(self, name: str) -> list[tuple[str, str]]:
        """The operators that this one sends to, with the links."""
        return [(b, link_id(self.id, a, b)) for a, b in self.wanted.spec.edges if a == name]

    def _end_of(self, name: str, link: str, direction: str) -> tuple[int, int]:
        """Epochs of the instance that the operator's end of a link is connected to, and of the one beside it."""
        end = self._state(self.operators[name]).ends.get((link, direction))
        return (0, 0) if end is None else (end.epoch, end.standby)

    def _gone(self, op: RequestedOperator) -> bool:
        """Its pod has ended, or its node is lost with it."""
        return self._state(op).ended or not self.observed.usable(op.node)

    def _away(self, name: str, op: RequestedOperator) -> bool:
        """Its node is lost, and it may still run there: nobody has seen it end, and it has no other place."""
        lost = not self._state(op).ended and not self.observed.usable(op.node)
        return lost and self.wanted.node_of(name) == op.node

    def _how(self, op: RequestedOperator) -> str:
        """How a pod that is gone ended, in words."""
        state = self._state(op)
        if not state.ended:
            return "is on a lost node"
        if state.start_error is not None:
            return f"couldn't be started: {state.start_error}"
        if state.error is not None:
            return f"failed: {state.error['type']}: {state.error['message']}"
        return reason_of(state.exit_code)

    def _state(self, op: RequestedOperator) -> PodState:
        return peers.state_of(self.observed, op)

    def _is(self, op: RequestedOperator, role: Role) -> bool:
        """Whether a pod was told to be this, and says that it is."""
        return op.told is not None and op.told.role == role and self._state(op).role == role

    def _ready(self, op: RequestedOperator) -> bool:
        return op.pod is not None and self._state(op).ready_at is not None

    def _speed(self, node: str) -> float:
        if node in self.desired.speeds:
            return self.desired.speeds[node]
        return self.observed.nodes[node].speed if node in self.observed.nodes else 1.0
