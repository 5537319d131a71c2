"""What to do now: a pure function of what is wanted, what was asked for and what is seen.

`step` compares, and returns the actions and the `Requested` that holds once they are under way. It is
level-triggered and idempotent: it doesn't matter what happened or how often it is called, and calling it
with what it returned asks for nothing more. `loop` is its only caller. No await, no clock, no I/O here.

Here is what becomes of whole pipelines; `podsteps` is about one operator's pod, `movesteps` about a move, by the table
in `migration`. `peers` says what pods are to know of each other, `actions` are what is decided.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from nomad.master.reconcile.actions import Action, Finish, Forget, Kill, Running
from nomad.master.reconcile.movesteps import MoveSteps
from nomad.master.reconcile.podsteps import Look, heard_at
from nomad.master.state import Desired, Goal, Observed, Outcome, Requested, RequestedPipeline, pipeline_of
from nomad.settings import Reconcile


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do, and what is then asked for."""

    actions: tuple[Action, ...]
    requested: Requested
    wake_at: float | None
    """When to look again though nothing happens; None: not at all."""
    listen_at: float | None
    """When heart-beats are overdue unless some come before; `listen_at` says then whether they have."""


def step(
    desired: Desired, requested: Requested, observed: Observed, now: float, settings: Reconcile, *, overdue: float
) -> Decision:
    """Compare and decide. `overdue`: seconds without a heart-beat after which an operator counts as silent."""
    look = Look(desired, requested, observed, now, settings, overdue, _upgrading(desired, requested, now, settings))
    pipelines = {id: _Pipeline(look, wanted).decide() for id, wanted in desired.pipelines.items()}
    strays = _strays(look, {pod for pipeline in pipelines.values() for pod in pipeline.pods})
    return Decision(tuple(look.actions), Requested(pipelines, strays), look.wake_at, look.listen_at)


def listen_at(requested: Requested, observed: Observed, *, overdue: float) -> float | None:
    """`Decision.listen_at` by now: the round that asks for it needn't be made as long as all are heard."""
    first: float | None = None
    for pipeline in requested.pipelines.values():
        for op in pipeline.operators.values():
            state = observed.pods.get(op.pod or "")
            nobodys = op.away or op.kill_by is not None
            if state is None or not op.ready or op.silent or nobodys:
                continue
            if first is None or heard_at(state) < first:
                first = heard_at(state)
    return None if first is None else first + overdue


def _upgrading(desired: Desired, requested: Requested, now: float, settings: Reconcile) -> set[str]:
    """Pipelines of which an operator is replaced because it is out of date, or is about to be."""
    found = {id for id, wanted in desired.pipelines.items() if any(o.cause == "upgrade" for o in wanted.orders)}
    for id, have in requested.pipelines.items():
        if any(op.relieves and now < op.relieved_at + settings.retry for op in have.operators.values()):
            found.add(id)
    return found


def _strays(look: Look, present: set[str]) -> dict[str, float]:
    """Pods of forgotten pipelines and of older epochs, found by a master that was away."""
    strays, unread = {}, look.desired.unread - look.desired.pipelines.keys()
    for pod, state in look.observed.pods.items():
        if pod in present or state.ended or pipeline_of(pod) in unread:
            continue
        kill_by = look.requested.strays.get(pod)
        if kill_by is None or look.now >= kill_by:
            look.actions.append(Kill(pod, look.settings.stop_grace, "nobody wants it"))
            kill_by = look.now + look.settings.stop_grace + look.settings.retry
        look.wake(kill_by)
        strays[pod] = kill_by
    return strays


class _Pipeline(MoveSteps):
    """One pipeline, at one look."""

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
