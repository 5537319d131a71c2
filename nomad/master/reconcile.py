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

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from nomad.control import LinkPeer
from nomad.master.state import (
    Desired,
    DesiredPipeline,
    Goal,
    Observed,
    Outcome,
    PodState,
    Requested,
    RequestedOperator,
    RequestedPipeline,
    Told,
    link_id,
    pod_id,
)
from nomad.settings import Reconcile

PERMANENT = {
    3: "its code couldn't be verified or loaded",
    4: 'a message failed, and its on_error is "fail"',
}
"""Exit codes of a pod after which it isn't started again: it would end the same way."""


@dataclass(frozen=True, slots=True)
class Start:
    """Ask the runtime for a pod."""

    pipeline: str
    operator: str
    pod: str
    epoch: int
    node: str


@dataclass(frozen=True, slots=True)
class Assign:
    """Tell a new pod what it is."""

    pipeline: str
    operator: str
    pod: str
    links: tuple[LinkPeer, ...]
    speed: float


@dataclass(frozen=True, slots=True)
class TellPeers:
    """Tell a pod what changed about its links."""

    pipeline: str
    operator: str
    pod: str
    links: tuple[LinkPeer, ...]
    speed: float


@dataclass(frozen=True, slots=True)
class AskStop:
    """Ask a pod, over its control channel, to end."""

    pipeline: str
    operator: str
    pod: str
    drain: bool
    grace: float


@dataclass(frozen=True, slots=True)
class Kill:
    """Ask the runtime to end a pod."""

    pod: str
    grace: float
    reason: str


@dataclass(frozen=True, slots=True)
class Ended:
    """A pod has ended; the next one follows at `retry_at`, or none does."""

    pipeline: str
    operator: str
    pod: str
    retry_at: float | None
    expected: bool
    """It was to end."""


@dataclass(frozen=True, slots=True)
class Ready:
    """A pod is at work."""

    pipeline: str
    operator: str
    pod: str
    adopted: bool


@dataclass(frozen=True, slots=True)
class Hearing:
    """An operator's heart-beats went missing, or came back."""

    pipeline: str
    operator: str
    pod: str
    silent: bool


@dataclass(frozen=True, slots=True)
class Running:
    """All operators of a pipeline are ready for the first time."""

    pipeline: str


@dataclass(frozen=True, slots=True)
class Finish:
    """A pipeline is over."""

    pipeline: str
    outcome: Outcome
    reason: str


@dataclass(frozen=True, slots=True)
class Forget:
    """Delete a pipeline of which nothing runs."""

    pipeline: str


Action: TypeAlias = Start | Assign | TellPeers | AskStop | Kill | Ended | Ready | Hearing | Running | Finish | Forget


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

    def decide(self) -> Decision:
        pipelines = {id: self._pipeline(id, wanted) for id, wanted in self.desired.pipelines.items()}
        present = {op.pod for pipeline in pipelines.values() for op in pipeline.operators.values()}
        strays = self._strays(present)
        return Decision(tuple(self.actions), Requested(pipelines, strays), self.wake_at)

    def _pipeline(self, id: str, wanted: DesiredPipeline) -> RequestedPipeline:
        have = self.requested.pipelines.get(id)
        if have is None:
            first = RequestedOperator(epoch=wanted.epoch_floor)
            have = RequestedPipeline({op.name: first for op in wanted.spec.operators})
        if have.outcome is None and wanted.goal is not Goal.REMOVE:
            have = self._outcome(id, wanted, have)
        run = have.outcome is None and wanted.goal is Goal.RUN and not self.desired.closing
        if not run and have.drain_until is None:
            have = replace(have, drain_until=self.now + self.settings.drain_grace + self.settings.stop_grace)
        draining = not run and self._draining(wanted, have)
        # While the source drains, the others are kept at work as ever: what it sent must find its way.
        kept = {name for name in have.operators if run or (draining and name not in wanted.sources)}
        operators = {name: self._ended(id, name, op, kept=name in kept) for name, op in have.operators.items()}
        operators = {n: self._start(id, wanted, n, op) if n in kept else op for n, op in operators.items()}
        for name in operators:
            operators[name] = (
                self._keep(id, wanted, name, operators)
                if name in kept
                else self._stop(id, wanted, name, operators, drain=draining)
            )
        if run and not have.was_running and all(self._ready(op) for op in operators.values()):
            self.actions.append(Running(id))
            have = replace(have, was_running=True)
        have = replace(have, operators=operators)
        if any(op.pod for op in operators.values()):
            return have
        if wanted.goal is Goal.STOP and have.outcome is None:
            have = replace(have, outcome=Outcome.STOPPED)
            self.actions.append(Finish(id, Outcome.STOPPED, ""))
        if wanted.goal is Goal.REMOVE and not have.forgetting:
            have = replace(have, forgetting=True)
            self.actions.append(Forget(id))
        return have

    def _outcome(self, id: str, wanted: DesiredPipeline, have: RequestedPipeline) -> RequestedPipeline:
        """Whether it is over by itself: an error that can't be mended, or a source that has no more to send."""
        found: tuple[Outcome, str] | None = None
        states = {name: self._state(op) for name, op in have.operators.items()}
        for name, state in states.items():
            permanent = PERMANENT.get(state.exit_code or 0)
            if state.fatal or permanent:
                error = f"{state.error['type']}: {state.error['message']}" if state.error else permanent
                found = Outcome.FAILED, f"operator {name}: {error}"
                break
        else:
            if all(states[source].finished for source in wanted.sources):
                found = Outcome.COMPLETED, ""
        if found is None:
            return have
        self.actions.append(Finish(id, *found))
        return replace(have, outcome=found[0], reason=found[1])

    def _draining(self, wanted: DesiredPipeline, have: RequestedPipeline) -> bool:
        """Whether a source is still given time to settle what it has sent."""
        if have.outcome is not None or wanted.goal is Goal.REMOVE or have.drain_until is None:
            return False
        sources = [have.operators[source] for source in wanted.sources]
        if self.now >= have.drain_until or all(op.pod is None or self._state(op).ended for op in sources):
            return False
        self._wake(have.drain_until)
        return True

    def _ended(self, id: str, name: str, op: RequestedOperator, *, kept: bool) -> RequestedOperator:
        state = self._state(op)
        if op.pod is None or not state.ended:
            return op
        backoff = self.settings.backoff
        healthy = state.ready_at is not None and self.now - state.ready_at >= backoff.healthy
        failures = 1 if healthy else op.failures + 1
        retry_at = self.now + backoff.delay(failures)
        mishap = kept or state.fatal or state.start_error is not None or state.exit_code in PERMANENT
        self.actions.append(Ended(id, name, op.pod, retry_at if kept else None, not mishap))
        return replace(op, pod=None, failures=failures, retry_at=retry_at, told=None)

    def _start(self, id: str, wanted: DesiredPipeline, name: str, op: RequestedOperator) -> RequestedOperator:
        if op.pod is not None:
            return op
        if self.now < op.retry_at:
            self._wake(op.retry_at)
            return op
        pod = pod_id(id, name, op.epoch + 1)
        self.actions.append(Start(id, name, pod, op.epoch + 1, wanted.node_of(name)))
        return RequestedOperator(
            epoch=op.epoch + 1,
            pod=pod,
            last_pod=pod,
            asked_at=self.now,
            restarts=op.restarts + bool(op.last_pod),
            failures=op.failures,
        )

    def _keep(
        self, id: str, wanted: DesiredPipeline, name: str, operators: Mapping[str, RequestedOperator]
    ) -> RequestedOperator:
        """See to it that a pod that is wanted becomes ready, and knows its peers."""
        op = operators[name]
        state, pod = self._state(op), op.pod
        if pod is None:
            return op
        if op.kill_by is not None:
            return self._kill(op, "it hasn't ended")
        if state.ready_at is None:
            patience = self.settings.adopt_grace if op.adopted else self.settings.start_timeout
            if self.now >= op.asked_at + patience:
                return self._kill(op, f"it hasn't been ready within {patience:g} s")
            self._wake(op.asked_at + patience)
        else:
            if not op.ready:
                self.actions.append(Ready(id, name, pod, op.adopted))
                op = replace(op, ready=True)
            op = self._listen_to(id, name, op, pod, state)
        return self._tell(id, wanted, name, op, pod, state, operators)

    def _listen_to(self, id: str, name: str, op: RequestedOperator, pod: str, state: PodState) -> RequestedOperator:
        """Note when heart-beats go missing or come back. A silent pod is never ended for it: it may just be busy."""
        last = max(state.heartbeat_at or 0.0, state.ready_at or 0.0)
        silent = self.now >= last + self.overdue
        if not silent:
            self._wake(last + self.overdue)
        if silent != op.silent:
            self.actions.append(Hearing(id, name, pod, silent))
        return replace(op, silent=silent)

    def _tell(
        self,
        id: str,
        wanted: DesiredPipeline,
        name: str,
        op: RequestedOperator,
        pod: str,
        state: PodState,
        operators: Mapping[str, RequestedOperator],
    ) -> RequestedOperator:
        """Say over the present connection what wasn't said over it yet. A pod that isn't ready is told nothing new."""
        if state.connection is None or (state.ready_at is None and state.assigned):
            return op
        links, unknown = self._links(id, wanted, name, operators)
        speed = self._speed(wanted.node_of(name))
        told = Told(state.connection, links, speed)
        if op.told is not None and op.told.connection == state.connection:
            if state.ready_at is None:
                return op
            before = op.told
            news = tuple(link for link in links if link not in before.links and link.link not in unknown)
            if news or speed != before.speed:
                self.actions.append(TellPeers(id, name, pod, news, speed))
        elif not state.assigned:
            self.actions.append(Assign(id, name, pod, links, speed))
        else:
            known = tuple(link for link in links if link.link not in unknown)
            self.actions.append(TellPeers(id, name, pod, known, speed))
        return replace(op, told=told)

    def _links(
        self, id: str, wanted: DesiredPipeline, name: str, operators: Mapping[str, RequestedOperator]
    ) -> tuple[tuple[LinkPeer, ...], set[str]]:
        """An operator's links as it should know them, and those whose receiver's address can't be told yet.

        The sender dials the receiver. A peer that an earlier master started and that hasn't reported yet most likely
        works on: nothing is said of its address, so that its link isn't cut.
        """
        links: list[LinkPeer] = []
        unknown: set[str] = set()
        for source, target in wanted.spec.edges:
            if name not in (source, target):
                continue
            out = name == source
            peer = target if out else source
            asked = operators[peer]
            state = self._state(asked)
            link = link_id(id, source, target)
            if out and asked.adopted and state.ready_at is None:
                unknown.add(link)
            links.append(
                LinkPeer(
                    link=link,
                    direction="out" if out else "in",
                    peer_operator=peer,
                    address=state.address if out else None,
                    peer_epoch=asked.epoch,
                    shape=self.desired.shape(wanted.node_of(name), wanted.node_of(peer)),
                )
            )
        return tuple(links), unknown

    def _stop(
        self,
        id: str,
        wanted: DesiredPipeline,
        name: str,
        operators: Mapping[str, RequestedOperator],
        *,
        drain: bool,
    ) -> RequestedOperator:
        """See to it that a pod that isn't wanted ends; with `drain`, after it has settled what it has sent."""
        op = operators[name]
        state, pod, settings = self._state(op), op.pod, self.settings
        if pod is None:
            return op
        if op.kill_by is not None or (op.stop_by is not None and self.now >= op.stop_by):
            return self._kill(op, "it hasn't ended in time")
        if op.stop_by is None:
            grace = settings.drain_grace if drain else settings.stop_grace
            if state.connection is not None:
                self.actions.append(AskStop(id, name, pod, drain, grace))
            elif not state.fatal:  # else it is ending by itself
                return self._kill(op, "it isn't needed any more")
            # The pod keeps its grace by itself; only what is stuck is ended from outside.
            op = replace(op, stop_by=self.now + grace + settings.retry)
        self._wake(op.stop_by)
        return self._tell(id, wanted, name, op, pod, state, operators) if drain else op

    def _kill(self, op: RequestedOperator, reason: str) -> RequestedOperator:
        """Ask the runtime, and again when the pod is still there after that."""
        assert op.pod is not None
        if op.kill_by is None or self.now >= op.kill_by:
            self.actions.append(Kill(op.pod, self.settings.stop_grace, reason))
            op = replace(op, kill_by=self.now + self.settings.stop_grace + self.settings.retry)
        self._wake(op.kill_by)
        return op

    def _strays(self, present: set[str | None]) -> dict[str, float]:
        """Pods of forgotten pipelines and of older epochs, found by a master that was away."""
        strays = {}
        for pod, state in self.observed.pods.items():
            if pod in present or state.ended:
                continue
            kill_by = self.requested.strays.get(pod)
            if kill_by is None or self.now >= kill_by:
                self.actions.append(Kill(pod, self.settings.stop_grace, "nobody wants it"))
                kill_by = self.now + self.settings.stop_grace + self.settings.retry
            self._wake(kill_by)
            strays[pod] = kill_by
        return strays

    def _state(self, op: RequestedOperator) -> PodState:
        return self.observed.pods.get(op.pod or "", _NOTHING)

    def _ready(self, op: RequestedOperator) -> bool:
        return op.pod is not None and self._state(op).ready_at is not None

    def _speed(self, node: str) -> float:
        if node in self.desired.speeds:
            return self.desired.speeds[node]
        return self.observed.nodes[node].speed if node in self.observed.nodes else 1.0

    def _wake(self, at: float | None) -> None:
        if at is not None and (self.wake_at is None or at < self.wake_at):
            self.wake_at = at


_NOTHING = PodState()
