"""What to do now: a pure function of what is wanted, what was asked for and what is seen.

`step` compares, and returns the actions and the `Requested` that holds once they are under way. It is
level-triggered and idempotent: it doesn't matter what happened or how often it is called, and calling it
with what it returned asks for nothing more. `loop` is its only caller. No await, no clock, no I/O here.

An operator's pod, as this file sees it:

    nothing ─Start─▶ asked ─(connects)─Assign─▶ assigned ─(ready)─TellPeers*─▶ at work
       ▲                │ not ready in time: Kill            │ wanted no more: AskStop, then Kill
       └──pause, longer each time──(ended)──────────────────┘
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from nomad.control import Role
from nomad.master import migration, peers
from nomad.master.actions import (
    Action,
    AskStop,
    Assign,
    Carry,
    Ended,
    Finish,
    Forget,
    Hearing,
    Kill,
    Measure,
    Moving,
    Ready,
    Rehome,
    Relieve,
    Running,
    Start,
    Switch,
    TellPeers,
)
from nomad.master.migration import Facts
from nomad.master.state import (
    Desired,
    DesiredPipeline,
    Goal,
    Observed,
    Outcome,
    PodState,
    Requested,
    RequestedMove,
    RequestedOperator,
    RequestedPipeline,
    Told,
    link_id,
    pipeline_of,
    pod_id,
)
from nomad.master.views import MoveState
from nomad.runtime.base import reason_of
from nomad.settings import Reconcile


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do, what is then asked for, and when to look again though nothing happens (None: not at all)."""

    actions: tuple[Action, ...]
    requested: Requested
    wake_at: float | None


def step(
    desired: Desired, requested: Requested, observed: Observed, now: float, settings: Reconcile, *, overdue: float
) -> Decision:
    """Compare and decide. `overdue`: seconds without a heart-beat after which an operator counts as silent."""
    return _Step(desired, requested, observed, now, settings, overdue).decide()


class _Step:
    """One call of `step`: its inputs, and what has been decided so far."""

    def __init__(
        self,
        desired: Desired,
        requested: Requested,
        observed: Observed,
        now: float,
        settings: Reconcile,
        overdue: float,
    ) -> None:
        self.desired = desired
        self.requested = requested
        self.observed = observed
        self.now = now
        self.settings = settings
        self.overdue = overdue
        self.actions: list[Action] = []
        self.wake_at: float | None = None
        self.upgrading = {id for id, wanted in desired.pipelines.items() if _upgrades(wanted)}
        """Pipelines of which an operator is replaced because it is out of date, or is about to be."""
        for id, have in requested.pipelines.items():
            if any(op.relieves and now < op.relieved_at + settings.retry for op in have.operators.values()):
                self.upgrading.add(id)

    def decide(self) -> Decision:
        pipelines = {id: _Pipeline(self, wanted).decide() for id, wanted in self.desired.pipelines.items()}
        strays = self._strays({pod for pipeline in pipelines.values() for pod in pipeline.pods})
        return Decision(tuple(self.actions), Requested(pipelines, strays), self.wake_at)

    def _strays(self, present: set[str]) -> dict[str, float]:
        """Pods of forgotten pipelines and of older epochs, found by a master that was away."""
        strays, unread = {}, self.desired.unread - self.desired.pipelines.keys()
        for pod, state in self.observed.pods.items():
            if pod in present or state.ended or pipeline_of(pod) in unread:
                continue
            kill_by = self.requested.strays.get(pod)
            if kill_by is None or self.now >= kill_by:
                self.actions.append(Kill(pod, self.settings.stop_grace, "nobody wants it"))
                kill_by = self.now + self.settings.stop_grace + self.settings.retry
            self.wake(kill_by)
            strays[pod] = kill_by
        return strays

    def wake(self, at: float | None) -> None:
        if at is not None and (self.wake_at is None or at < self.wake_at):
            self.wake_at = at


class _Pipeline:
    """What a step decides about one pipeline."""

    def __init__(self, step: _Step, wanted: DesiredPipeline) -> None:
        self.id = wanted.spec.id
        self.wanted = wanted
        self.desired = step.desired
        self.observed = step.observed
        self.now = step.now
        self.settings = step.settings
        self.overdue = step.overdue
        self.act = step.actions.append
        self.wake = step.wake
        self.upgrading = step.upgrading
        have = step.requested.pipelines.get(self.id)
        if have is None:
            first = RequestedOperator(epoch=wanted.epoch_floor, highest=wanted.epoch_floor)
            have = RequestedPipeline({op.name: first for op in wanted.spec.operators})
        self.have = have
        self.operators = dict(have.operators)
        self.move = have.move
        self.ended_moves = have.ended_moves & {order.id for order in wanted.orders}

    def decide(self) -> RequestedPipeline:
        wanted, have = self.wanted, self.have
        if have.outcome is None and wanted.goal is not Goal.REMOVE:
            have = self._outcome(have)
        elif have.outcome is not None and not have.stored:
            have = replace(have, stored=self.id in self.observed.over)
        run = have.outcome is None and wanted.goal is Goal.RUN and not self.desired.closing
        # A master that doesn't know that it is over would start the source anew, if it found its pod ended.
        held = have.outcome is not None and not have.stored and wanted.goal is Goal.RUN and have.drain_until is None
        if not run and not held and have.drain_until is None:
            have = replace(have, drain_until=self.now + self.settings.drain_grace + self.settings.stop_grace)
        draining = not run and self._draining(have)
        # While the source drains, the others are kept at work as ever: what it sent must find its way.
        kept = {name for name in self.operators if run or (draining and name not in wanted.sources)}
        self._lead_moves(run)
        if self._second_ended():
            self._lead_moves(run)
        names = () if held else tuple(self.operators)
        for name in names:
            if self.move is None or not self.move.holds or self.move.order.operator != name:
                self.operators[name] = op = self._ended(name, self.operators[name], kept=name in kept)
                if name in kept and op.pod is None:
                    self.operators[name] = self._start(name, op)
        for name in names:
            op = self.operators[name]
            self.operators[name] = self._keep(name, op) if name in kept else self._stop(name, op, drain=draining)
        if run:
            for name in self.operators:
                self.operators[name] = self._relieve(name, self.operators[name])
        self._keep_second()
        if run and not have.was_running and all(self._ready(op) for op in self.operators.values()):
            self.act(Running(self.id))
            have = replace(have, was_running=True)
        have = replace(have, operators=self.operators, move=self.move, ended_moves=self.ended_moves)
        if have.pods:
            return have
        if wanted.goal is Goal.STOP and have.outcome is None:
            have = replace(have, outcome=Outcome.STOPPED)
            self.act(Finish(self.id, Outcome.STOPPED, ""))
        if wanted.goal is Goal.REMOVE and not have.forgetting:
            have = replace(have, forgetting=True)
            self.act(Forget(self.id))
        return have

    def _outcome(self, have: RequestedPipeline) -> RequestedPipeline:
        """Whether it is over by itself: an error that can't be mended, or a source that has no more to send."""
        found: tuple[Outcome, str] | None = None
        states = {name: self._state(op) for name, op in have.operators.items()}
        for name, state in states.items():
            if state.fatal:
                error = f"{state.error['type']}: {state.error['message']}" if state.error else "it failed"
                found = Outcome.FAILED, f"operator {name}: {error}"
                break
        else:
            if all(states[source].finished for source in self.wanted.sources):
                found = Outcome.COMPLETED, ""
        if found is None:
            return have
        self.act(Finish(self.id, *found))
        return replace(have, outcome=found[0], reason=found[1])

    def _draining(self, have: RequestedPipeline) -> bool:
        """Whether a source is still given time to settle what it has sent."""
        if have.outcome is not None or self.wanted.goal is Goal.REMOVE or have.drain_until is None:
            return False
        sources = [have.operators[source] for source in self.wanted.sources]
        if self.now >= have.drain_until or all(op.pod is None or self._state(op).ended for op in sources):
            return False
        self.wake(have.drain_until)
        return True

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
                # Another one's turn; what ends it is seen. Only one that is about to begin may come to nothing.
                self.wake(self.now + settings.retry if self.upgrading - {self.id} else None)
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
        last = max(state.heartbeat_at or 0.0, state.ready_at or 0.0)
        silent = self.now >= last + self.overdue
        if not silent:
            self.wake(last + self.overdue)
        if silent != op.silent:
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
        return replace(op, told=told)

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

    # Moves

    def _lead_moves(self, run: bool) -> None:
        """Take up the next order, and lead the move under way as far as it goes now."""
        if self.move is not None and self.move.state.final and self.move.second.pod is None:
            self.move = None
        if self.move is None and not self.desired.closing:  # the next master finds what has only been ordered
            order = next((order for order in self.wanted.orders if order.id not in self.ended_moves), None)
            if order is not None:
                source = self.wanted.node_of(order.operator)
                self.move = RequestedMove(order, source, MoveState.PLANNED, self.now)
                self._note_move(self.move, None, 0.0)
        while self.move is not None and self._lead(self.move, run):
            pass
        if self.move is None and self._orders_left:
            self._lead_moves(run)

    @property
    def _orders_left(self) -> bool:
        return not self.desired.closing and any(o.id not in self.ended_moves for o in self.wanted.orders)

    def _lead(self, move: RequestedMove, run: bool) -> bool:
        """One state further, if the facts lead there."""
        if move.state is MoveState.PLANNED and self.desired.closing:
            return False  # the next master finds it
        facts = self._facts(move, run)
        present = self.operators[move.order.operator]
        if facts.handed and move.state is MoveState.HANDING_OVER and not move.handed:
            self.move = move = replace(move, handed=True, called=self._state(present).called)
        if move.state is MoveState.CARRYING and not move.carrying and self._is(present, Role.RETIRED):
            self.move = move = replace(move, carrying=True)
            self.act(Carry(self.id, move.order.operator, present.last_pod, move.second.last_pod))
        if facts.stored and not move.switched:
            self.move = move = self._swap(move)
            facts = self._facts(move, run)
        limit = migration.deadline(move.state, self.settings.moving)
        late = limit is not None and self.now >= move.since + limit
        state, error = migration.advance(move.state, facts, late=late)
        if state is move.state:
            if limit is not None and not late:
                self.wake(move.since + limit)
            return False
        self.move = self._enter(move, state, error)
        return self.move is not None

    def _enter(self, move: RequestedMove, state: MoveState, error: str) -> RequestedMove | None:
        """What is to be done once, when a move comes to a state."""
        name, before = move.order.operator, move
        move = replace(move, state=state, since=self.now)
        present = self.operators[name]
        if state is MoveState.STARTING:
            second = self._next(name, present, move.order.node, again=False)
            move = replace(move, source=present.node, second=second)
            self.operators[name] = replace(present, highest=second.epoch)
        self._note_move(move, before.state, self.now - before.since, error)
        if state is MoveState.STARTING:
            self.act(Start(self.id, name, move.second.last_pod, move.second.epoch, move.order.node))
        elif state is MoveState.HANDING_OVER:
            move = replace(move, switch_at=self.now)
            self._measure(move, present, move.second, switching=True)
        elif state is MoveState.SWITCHING:
            assert move.second.pod is not None
            self.act(Switch(self.id, name, move.second.pod, move.order))
        elif state is MoveState.STOPPING:
            self._measure(move, move.second, present, switching=False)
        if state.final:
            self.ended_moves |= {move.order.id}
        return None if state.final and move.second.pod is None else move

    def _swap(self, move: RequestedMove) -> RequestedMove:
        """The switch is stored: the new instance is the present one."""
        name = move.order.operator
        old, new = self.operators[name], move.second
        self.operators[name] = replace(new, restarts=old.restarts, highest=max(old.highest, new.epoch))
        return replace(move, second=old, switched=True)

    def _facts(self, move: RequestedMove, run: bool) -> Facts:
        name = move.order.operator
        present, second = self.operators[name], move.second
        old, new = (second, present) if move.switched else (present, second)
        seen = self._state(new)
        before, behind = self._before(name), self._behind(name)
        epoch = new.epoch if new.pod is not None else -1
        out = {link: seen.ends.get((link, "out")) for _, link in behind}
        hears = {link: end.epoch for (link, direction), end in seen.ends.items() if direction == "in"}
        greeted = {link: end.epoch if end is not None else 0 for link, end in out.items()}
        old_gone = old.pod is None or self._gone(old)
        source, goal = name in self.wanted.sources, peers.at_rest(self.wanted, name)
        relieves = move.order.relieves
        tally = self.observed.tallies.get(move.order.id)
        return Facts(
            wanted=run,
            at_work=run and all(self._ready(op) for op in self.operators.values()),
            there=not move.switched and not relieves and self.wanted.node_of(name) == move.order.node,
            target_ready=self.observed.usable(move.order.node),
            away=bool(relieves) and not move.switched and (present.pod != relieves or old_gone),
            target_closed=not self.observed.open(move.order.node),
            apart=not self.observed.folders_follow and not source,
            carried=seen.carried,
            carry_error=seen.carry_error,
            old_gone=old_gone,
            new_ready=self._ready(new) and not self._gone(new),
            new_gone=new.pod is not None and self._gone(new),
            new_error=self._how(new),
            connected=all(self._end_of(peer, link, "out")[1] == epoch for peer, link in before)
            and all(greeted[link] == self.operators[peer].epoch for peer, link in behind),
            handed=move.handed or old_gone or self._is(old, goal),
            active=source or seen.role == Role.ACTIVE,  # the next source begins after the switch
            overheard=any(self._end_of(peer, link, "in")[0] == epoch for peer, link in behind),
            stored=move.switched or (move.state is MoveState.SWITCHING and seen.switched),
            store_error=seen.switch_error,
            turned=all(self._end_of(peer, link, "out")[0] == epoch for peer, link in before),
            followed=all(self._end_of(peer, link, "in")[0] == epoch for peer, link in behind)
            and (bool(behind) or all(hears.get(link) == self.operators[peer].epoch for peer, link in before)),
            counted=tally is not None and tally.measured,
        )

    def _second_ended(self) -> bool:
        """Whether the other pod of a move has ended, and that isn't the move's own to settle."""
        move = self.move
        if move is None or move.second.pod is None or move.holds or not self._gone(move.second):
            return False
        second = move.second
        expected = not move.switched or second.stop_by is not None
        self.act(Ended(self.id, move.order.operator, second.pod or "", None, expected))
        self.move = replace(move, second=replace(second, pod=None, told=None))
        return True

    def _keep_second(self) -> None:
        """See to the other pod of a move: to be ready beside the present one, or to end."""
        move = self.move
        if move is None or move.second.pod is None:
            return
        name, second = move.order.operator, move.second
        if move.state.final or (move.state is MoveState.STOPPING and self._counted(move)):
            second = self._stop(name, second, drain=False)
        elif not self._gone(second):
            second = self._tell(name, second, second=True)
        self.move = replace(move, second=second)

    def _counted(self, move: RequestedMove) -> bool:
        """The old instance has said its numbers, or has had the time for it."""
        tally = self.observed.tallies.get(move.order.id)
        if tally is not None and tally.counted:
            return True
        self.wake(move.since + self.settings.moving.count)
        return self.now >= move.since + self.settings.moving.count

    def _measure(self, move: RequestedMove, old: RequestedOperator, new: RequestedOperator, *, switching: bool) -> None:
        sink = self.operators[self.wanted.spec.operators[-1].name]
        link = next((link for _, link in self._before(move.order.operator)), "")
        old_pod, new_pod, sink_pod = (op.pod or "" for op in (old, new, sink))
        since = move.switch_at
        self.act(Measure(self.id, move.order.id, link, old_pod, new_pod, sink_pod, switching, since))

    def _note_move(self, move: RequestedMove, left: MoveState | None, seconds: float, error: str = "") -> None:
        epoch = self.operators[move.order.operator].epoch if move.switched else move.second.epoch
        self.act(Moving(self.id, move.order, move.source, left, seconds, move.state, epoch, error))

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


def _upgrades(wanted: DesiredPipeline) -> bool:
    """Whether an operator of the pipeline is replaced because it is out of date."""
    return any(order.cause == "upgrade" for order in wanted.orders)
