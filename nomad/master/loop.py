"""The only one that acts: waits until something changed, decides by `reconcile.step`, and has it enacted.

What a step decides is enacted for each pod in order, and for different pods at the same time; the next step
doesn't wait for it. An action that fails leaves what is seen as it is, or reports to the observer, and
the next step decides anew. Every decision is noted as an event with the one that led to it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable

from nomad.clock import Clock
from nomad.errors import NomadError, RequestError
from nomad.master import reconcile
from nomad.master.enact import Enactor
from nomad.master.events import EventLog
from nomad.master.moves import MoveLog, story
from nomad.master.observe import Observer
from nomad.master.pace import Pace
from nomad.master.reconcile.actions import (
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
from nomad.master.state import Desired, Observed, Requested, operator_id
from nomad.master.views import FailureView
from nomad.settings import Settings
from nomad.tasks import Tasks

log = logging.getLogger(__name__)

LONG = 0.02
"""Seconds. On clusters so large that a round takes longer, there is a pause after it, of so many times what it took:
who reports meanwhile, thousands perhaps, isn't kept waiting, and is looked at together.
"""
BREATHE = 2.0
LONGEST_PAUSE = 0.5


class Loop:
    """`run` until cancelled; `wake` when something changed."""

    def __init__(
        self,
        *,
        desired: Desired,
        requested: Requested,
        observed: Observed,
        observer: Observer,
        events: EventLog,
        moves: MoveLog,
        woken: asyncio.Event,
        settings: Settings,
        pace: Pace,
        clock: Clock,
        over: Callable[[str], None],
    ) -> None:
        """`woken`: set by whoever changed something. `over` is called when nothing of a pipeline runs any more."""
        self.requested = requested
        self._desired = desired
        self._observed = observed
        self._observer = observer
        observer.first_failure = self._failing
        self._events = events
        self._moves = moves
        self._woken = woken
        self._settings = settings
        self._pace = pace
        self._clock = clock
        self._over = over
        self._known_over: set[str] = set()
        self._stopped = False
        self._lanes: dict[str, deque[Action]] = {}
        self._tasks = Tasks()
        self._causes: dict[str, int] = {}
        self._waiting: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []
        self.stepped: Callable[[float], None] = lambda seconds: None
        """Called with how long each round took."""

    async def run(self, enactor: Enactor) -> None:
        """Keep things as they should be."""
        try:
            while True:
                self._woken.clear()
                began = time.thread_time()
                decision = self._step(enactor)
                took = time.thread_time() - began
                self.stepped(took)
                if took >= LONG:
                    await self._clock.sleep(min(LONGEST_PAUSE, BREATHE * took))
                await self._wait(decision.wake_at, decision.listen_at)
        finally:
            self._stopped = True
            for _, future in self._waiting:
                if not future.done():
                    future.set_exception(_going_down())
            await self._tasks.close()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds; it is looked at after every step. Raises `RequestError` when the loop ends."""
        if condition():
            return
        if self._stopped:
            raise _going_down()
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((condition, future))
        await future

    def _step(self, enactor: Enactor) -> reconcile.Decision:
        """Decide, and set off what was decided."""
        decision = reconcile.step(
            self._desired,
            self.requested,
            self._observed,
            self._clock.now(),
            self._settings.reconcile,
            overdue=self._pace.overdue,
        )
        self.requested = decision.requested
        for action in decision.actions:
            self._note(action)
            self._enqueue(action, enactor)
        self._observer.prune(self.requested.pods)
        ordered = {order.id for wanted in self._desired.pipelines.values() for order in wanted.orders}
        for move in self._observed.tallies.keys() - ordered:  # one that was counted too late, too
            del self._observed.tallies[move]
        self._tell_of_the_end()
        self._tell_waiting()
        return decision

    def is_over(self, pipeline: str) -> bool:
        """Nothing of it runs, and nothing will."""
        have = self.requested.pipelines.get(pipeline)
        if have is None:
            return pipeline not in self._desired.pipelines
        return (have.outcome is not None or have.forgetting) and not have.pods

    @property
    def idle(self) -> bool:
        """No pod runs, and nothing is being carried out."""
        return not (self.requested.pods or self.requested.strays or self._lanes)

    def _tell_of_the_end(self) -> None:
        over = {id for id in self.requested.pipelines if self.is_over(id)}
        for id in over - self._known_over:
            self._over(id)
        self._known_over = over

    def _tell_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        for condition, future in waiting:
            if future.done():
                continue
            if condition():
                future.set_result(None)
            else:
                self._waiting.append((condition, future))

    def _enqueue(self, action: Action, enactor: Enactor) -> None:
        match action:
            case Running(key) | Finish(key) | Forget(key):
                pass
            case Moving() | Measure() | Carry() | Relieve() | Rehome():
                # Nothing of theirs must wait for a pod's, or follow it.
                key = f"{action.pipeline} {type(action).__name__}"
            case _:
                key = action.pod
        lane = self._lanes.get(key)
        if lane is not None:
            asked = {other.operator for other in lane if isinstance(other, Rehome)}
            if not isinstance(action, Rehome) or action.operator not in asked:  # the answer would be the same
                lane.append(action)
            return
        self._lanes[key] = lane = deque([action])
        self._tasks.start(self._run_lane(key, lane, enactor), name=f"enact {key}")

    async def _run_lane(self, key: str, lane: deque[Action], enactor: Enactor) -> None:
        try:
            while lane:
                action = lane[0]
                try:
                    await enactor.enact(action)
                except NomadError as exc:
                    log.warning("%s: %s", action, exc)
                except Exception:  # a mistake of ours must not keep the pod's next actions from being enacted
                    log.exception("%s failed", action)
                lane.popleft()
        finally:
            del self._lanes[key]
        self._woken.set()

    async def _wait(self, wake_at: float | None, listen_at: float | None) -> None:
        """Until something changed, or `wake_at`, or heart-beats are overdue, by `listen_at` at the earliest."""
        while not await self._changed(min((at for at in (wake_at, listen_at) if at is not None), default=None)):
            now = self._clock.now()
            if listen_at is None or (wake_at is not None and now >= wake_at):
                return
            listen_at = reconcile.listen_at(self.requested, self._observed, overdue=self._pace.overdue)
            if listen_at is None or now >= listen_at:
                return

    async def _changed(self, until: float | None) -> bool:
        """Wait for a change; False: there was none until then."""
        if until is None:
            await self._woken.wait()
            return True
        waits = {
            asyncio.create_task(self._woken.wait(), name="something changed"),
            asyncio.create_task(self._clock.sleep(max(0.0, until - self._clock.now())), name="next deadline"),
        }
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()
            await asyncio.wait(waits)
        return self._woken.is_set()

    def _note(self, action: Action) -> None:
        """What is being done, as an event."""
        match action:
            case Start(id, operator, pod, _, node):
                op = self.requested.pipelines[id].operators[operator]
                verb = "restarting" if op.restarts > 0 and op.pod == pod else "starting"
                self._add(f"operator.{verb}", f"{verb} {operator} on {node}", id, operator, pod=pod, node=node)
            case Moving():
                self._moved(action)
            case Rehome(id, operator, node, reason, again):
                if not again:
                    text = f"{operator} needs another node than {node}: {reason}"
                    self._add("operator.homeless", text, id, operator)
            case Relieve(id, operator, pod, node, cause, reason, again):
                if not again:
                    kind = "outdated" if cause == "upgrade" else "leaving"
                    self._add(f"operator.{kind}", f"{operator} is to be replaced: {reason}", id, operator, pod=pod)
            case Ready(id, operator, pod, adopted):
                verb = "adopted" if adopted else "ready"
                text = f"{operator} went on without a master" if adopted else f"{operator} is at work"
                self._add(f"operator.{verb}", text, id, operator, pod=pod)
            case Ended(id, operator, pod, retry_at, expected, reason):
                failure = self._observer.bury(pod, operator_id(id, operator), expected=expected, reason=reason)
                if expected or failure is None:
                    other = pod != self.requested.pipelines[id].operators[operator].last_pod
                    text = (
                        f"an instance of {operator} that isn't needed has ended" if other else f"{operator} has ended"
                    )
                    self._add("operator.stopped", text, id, operator, pod=pod)
                else:
                    wait = 0.0 if retry_at is None else retry_at - self._clock.now()
                    pause = f"; restart in {wait:.1f} s" if wait > 0 else ""
                    text = f"{operator}: {failure}{pause}"
                    self._add("operator.failed", text, id, operator, pod=pod, exit_code=failure.exit_code)
            case Hearing(id, operator, pod, silent):
                text = f"the heart-beats of {operator} {'are overdue' if silent else 'are back'}"
                self._add(f"operator.{'unresponsive' if silent else 'responsive'}", text, id, operator, pod=pod)
            case AskStop(id, operator, pod, drain, _):
                text = f"{operator} is asked to {'settle what it has sent, and ' if drain else ''}end"
                self._add("operator.stopping", text, id, operator, pod=pod)
            case Kill(pod, _, reason):
                of = self.requested.operator_of(pod) or (None, None)
                self._add("pod.killed", f"pod {pod} is ended: {reason}", *of, pod=pod)
            case Running(id):
                self._add("pipeline.running", f"all operators of {id} are at work", id)
            case Finish(id, outcome, reason):
                text = f"{id} is {outcome}" if outcome != "completed" else f"{id} is complete"
                self._add(f"pipeline.{outcome}", f"{text}{': ' if reason else ''}{reason}", id)
            case Forget(id):
                self._add("pipeline.removed", f"{id} is removed", id)
                self._over(id)
                self._forget_causes(id)
            case Assign() | TellPeers() | Switch() | Measure() | Carry():
                log.debug("%s", action)

    def _failing(self, operator: str, failure: FailureView) -> None:
        id, name = operator.split(".")
        text = f"{name} has its first message that failed: {failure.type}: {failure.message}"
        self._add("operator.failing", text, id, name)

    def _add(self, kind: str, message: str, id: str | None, operator: str | None = None, **data: object) -> None:
        """Note an event; what happened last to the same operator, or pipeline, led to it."""
        about = operator_id(id, operator) if id and operator else id or ""
        cause = self._causes.get(about) or self._causes.get(id or "")
        self._causes[about] = self._events.add(kind, message, pipeline=id, operator=operator, cause=cause, data=data)

    def _moved(self, action: Moving) -> None:
        """A move has come to another state; one that has ended isn't wanted any more."""
        id, order = action.pipeline, action.order
        view = self._moves.note(action, self._observed.tallies.get(order.id))
        if action.left is not None or view.state.final:
            data = {"move": order.id, "source": view.source, "target": view.target, "seconds": action.seconds}
            if view.state.final:
                data |= {
                    "phases": {phase.name: phase.seconds for phase in view.phases},
                    "pause": view.pause,
                    "lost": view.lost,
                    "doubled": view.doubled,
                    "predicted_gain": view.predicted_gain,
                    "cause": view.cause,
                }
            self._add(f"move.{view.state}", story(view), id, order.operator, **data)
        if view.state.final:
            wanted = self._desired.pipelines[id]
            wanted.orders = [other for other in wanted.orders if other.id != order.id]

    def caused(self, pipeline: str, event: int, operator: str | None = None) -> None:
        """What happens next to the pipeline, or to one operator of it, happens because of this event."""
        if operator is not None:
            self._causes[operator_id(pipeline, operator)] = event
            return
        self._forget_causes(pipeline)
        self._causes[pipeline] = event

    def _forget_causes(self, pipeline: str) -> None:
        for about in [about for about in self._causes if about == pipeline or about.startswith(f"{pipeline}.")]:
            del self._causes[about]


def _going_down() -> RequestError:
    return RequestError("the master is going down", status=503)
