"""The only one that acts: waits until something changed, decides by `reconcile.step`, and has it enacted.

What a step decides is enacted for each pod in order, and for different pods at the same time; the next step
doesn't wait for it. An action that fails leaves what is seen as it is, or reports to the observer, and
the next step decides anew. Every decision is noted as an event with the one that led to it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable

from nomad.clock import Clock
from nomad.errors import NomadError, RequestError
from nomad.master import reconcile
from nomad.master.enact import Enactor
from nomad.master.events import EventLog
from nomad.master.observe import Observer
from nomad.master.reconcile import (
    Action,
    AskStop,
    Assign,
    Ended,
    Finish,
    Forget,
    Hearing,
    Kill,
    Ready,
    Running,
    Start,
    TellPeers,
)
from nomad.master.state import Desired, Observed, Requested, operator_id
from nomad.settings import Settings
from nomad.tasks import Tasks

log = logging.getLogger(__name__)


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
        woken: asyncio.Event,
        settings: Settings,
        clock: Clock,
        over: Callable[[str], None],
    ) -> None:
        """`woken`: set by whoever changed something. `over` is called when nothing of a pipeline runs any more."""
        self.requested = requested
        self._desired = desired
        self._observed = observed
        self._observer = observer
        self._events = events
        self._woken = woken
        self._settings = settings
        self._clock = clock
        self._over = over
        self._known_over: set[str] = set()
        self._stopped = False
        self._lanes: dict[str, deque[Action]] = {}
        self._tasks = Tasks()
        self._causes: dict[str, int] = {}
        self._waiting: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []

    async def run(self, enactor: Enactor) -> None:
        """Keep things as they should be."""
        try:
            while True:
                self._woken.clear()
                wake_at = self._step(enactor)
                await self._wait(wake_at)
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

    def _step(self, enactor: Enactor) -> float | None:
        """Decide and set off what was decided; when to look again though nothing happens."""
        decision = reconcile.step(
            self._desired,
            self.requested,
            self._observed,
            self._clock.now(),
            self._settings.reconcile,
            overdue=self._settings.heartbeats.overdue,
        )
        self.requested = decision.requested
        for action in decision.actions:
            self._note(action)
            self._enqueue(action, enactor)
        self._observer.prune({op.pod for p in self.requested.pipelines.values() for op in p.operators.values()})
        self._tell_of_the_end()
        self._tell_waiting()
        return decision.wake_at

    def is_over(self, pipeline: str) -> bool:
        """Nothing of it runs, and nothing will."""
        have = self.requested.pipelines.get(pipeline)
        if have is None:
            return pipeline not in self._desired.pipelines
        return (have.outcome is not None or have.forgetting) and not any(op.pod for op in have.operators.values())

    @property
    def idle(self) -> bool:
        """No pod runs, and nothing is being carried out."""
        running = any(op.pod for p in self.requested.pipelines.values() for op in p.operators.values())
        return not (running or self.requested.strays or self._lanes)

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
        key = action.pipeline if isinstance(action, (Running, Finish, Forget)) else action.pod
        lane = self._lanes.get(key)
        if lane is not None:
            lane.append(action)
            return
        self._lanes[key] = lane = deque([action])
        self._tasks.start(self._run_lane(key, lane, enactor), name=f"enact {key}")

    async def _run_lane(self, key: str, lane: deque[Action], enactor: Enactor) -> None:
        try:
            while lane:
                action = lane.popleft()
                try:
                    await enactor.enact(action)
                except NomadError as exc:
                    log.warning("%s: %s", action, exc)
                except Exception:  # a mistake of ours must not keep the pod's next actions from being enacted
                    log.exception("%s failed", action)
        finally:
            del self._lanes[key]
        self._woken.set()

    async def _wait(self, wake_at: float | None) -> None:
        """Until something changed or `wake_at`."""
        if wake_at is None:
            await self._woken.wait()
            return
        waits = {
            asyncio.create_task(self._woken.wait(), name="something changed"),
            asyncio.create_task(self._clock.sleep(max(0.0, wake_at - self._clock.now())), name="next deadline"),
        }
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()
            await asyncio.wait(waits)

    def _note(self, action: Action) -> None:
        """What is being done, as an event."""
        match action:
            case Start(id, operator, pod, _, node):
                again = self.requested.pipelines[id].operators[operator].restarts > 0
                verb = "restarting" if again else "starting"
                self._add(f"operator.{verb}", f"{verb} {operator} on {node}", id, operator, pod=pod, node=node)
            case Ready(id, operator, pod, adopted):
                verb = "adopted" if adopted else "ready"
                text = f"{operator} went on without a master" if adopted else f"{operator} is at work"
                self._add(f"operator.{verb}", text, id, operator, pod=pod)
            case Ended(id, operator, pod, retry_at, expected):
                failure = self._observer.bury(pod, operator_id(id, operator), expected=expected)
                if expected or failure is None:
                    self._add("operator.stopped", f"{operator} has ended", id, operator, pod=pod)
                else:
                    pause = "" if retry_at is None else f"; restart in {retry_at - self._clock.now():.1f} s"
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
            case Assign() | TellPeers():
                log.debug("%s", action)

    def _add(self, kind: str, message: str, id: str | None, operator: str | None = None, **data: object) -> None:
        """Note an event; what happened last to the same operator, or pipeline, led to it."""
        about = operator_id(id, operator) if id and operator else id or ""
        cause = self._causes.get(about) or self._causes.get(id or "")
        self._causes[about] = self._events.add(kind, message, pipeline=id, operator=operator, cause=cause, data=data)

    def caused(self, pipeline: str, event: int) -> None:
        """What happens to the pipeline next, happens because of this event."""
        self._forget_causes(pipeline)
        self._causes[pipeline] = event

    def _forget_causes(self, pipeline: str) -> None:
        for about in [about for about in self._causes if about == pipeline or about.startswith(f"{pipeline}.")]:
            del self._causes[about]


def _going_down() -> RequestError:
    return RequestError("the master is going down", status=503)
