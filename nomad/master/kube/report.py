"""What people see of a pipeline with kubectl: the status of its object, and Events.

Run by `PipelineWatch`. Writes a status when what it shows has changed, not when time has passed: a pipeline that runs
steadily costs no request. Events are what matters of the master's own, a few per pipeline and minute; what is beyond
that, or can't be written, is only in the master's.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, datetime

from nomad.clock import Clock
from nomad.errors import ApiError, NomadError, NotFoundError, StateError
from nomad.kubernetes import paths
from nomad.kubernetes.api import Api
from nomad.kubernetes.names import API_VERSION, GROUP, KIND
from nomad.master.app import Master
from nomad.master.kube import resource
from nomad.master.kube.objects import Held
from nomad.master.kube.resource import Json
from nomad.master.kube.store import KubernetesStore
from nomad.master.views import EventView, OperatorState, Phase, PipelineView
from nomad.tasks import Tasks, alongside

log = logging.getLogger(__name__)

GATHER = 0.2
"""Seconds from an event to the status that shows it: what happens together is shown together."""

EVERY = 10.0
"""Seconds between looks at what changes without events. They ask for nothing."""

MOST = 25
"""Pipelines that are looked at each time, in turn."""

LATENCY_EVERY = 60.0
"""Seconds from one status that was only written for a new latency to the next."""

LATENCY_CHANGE = 0.25
"""By how much of itself a latency must differ from the one that is shown."""

BURST, REFILL = 20, 10.0
"""Events of one pipeline at once, and seconds to the next."""

WRITTEN_AT_ONCE = 20
"""Events of all pipelines: statuses, which people look at first, mustn't wait behind them."""

_NORMAL, _WARNING = "Normal", "Warning"

SHOWN = {
    "pipeline.submitted": (_NORMAL, "Submitted"),
    "pipeline.running": (_NORMAL, "Running"),
    "pipeline.completed": (_NORMAL, "Completed"),
    "pipeline.stopping": (_NORMAL, "Stopping"),
    "pipeline.stopped": (_NORMAL, "Stopped"),
    "pipeline.removing": (_NORMAL, "Removing"),
    "pipeline.failed": (_WARNING, "Failed"),
    "pipeline.warning": (_WARNING, "Warning"),
    "operator.failed": (_WARNING, "OperatorFailed"),
    "operator.failing": (_WARNING, "OperatorFailing"),
    "operator.homeless": (_WARNING, "OperatorHomeless"),
    "operator.rehomed": (_NORMAL, "OperatorRehomed"),
    "operator.unresponsive": (_WARNING, "OperatorUnresponsive"),
    "move.ordered": (_NORMAL, "MoveOrdered"),
    "move.done": (_NORMAL, "Moved"),
    "move.rolled_back": (_WARNING, "MoveRolledBack"),
    "move.failed": (_WARNING, "MoveFailed"),
}
"""Kind of event of the master -> type and reason of the Event."""


@dataclass(slots=True)
class _Allowance:
    left: float
    at: float
    last: tuple[str, str] = ("", "")


class Reporter:
    """Shows one master's pipelines. `run` is its one task."""

    def __init__(
        self, master: Master, store: KubernetesStore, api: Api, namespace: str, identity: str, clock: Clock
    ) -> None:
        self._master = master
        self._store = store
        self._api = api
        self._namespace = namespace
        self._identity = (identity or "nomad")[:128]
        self._clock = clock
        self._woken = asyncio.Event()
        self._due: dict[str, None] = {}  # ids of the pipelines to look at
        self._writing = 0
        self._allowances: OrderedDict[str, _Allowance] = OrderedDict()
        self._latency_at: dict[str, float] = {}
        self._refused: dict[str, str] = {}
        self._generations: dict[str, int] = {}
        self._tasks = Tasks()

    async def run(self) -> None:
        """Until cancelled."""
        try:
            async with alongside(self._listen(), self._look_again()):
                while True:
                    await self._woken.wait()
                    await self._clock.sleep(GATHER)
                    self._woken.clear()
                    await self._show_due()
        finally:
            await self._tasks.close()

    async def refuse(self, held: Held, phase: str, reason: str) -> None:
        """Show that an object isn't taken on, and why. Raises `StateError`."""
        generation = held.found["metadata"].get("generation", 0)

        def change(status: Json) -> None:
            same = (status.get("phase"), status.get("reason")) == (phase, reason)
            status |= {"phase": phase, "reason": reason, "observedGeneration": generation}
            if not same:
                self._condition(status, ready=False, phase=phase, reason=reason, generation=generation)

        shown = held.status
        if (shown.get("phase"), shown.get("reason")) != (phase, reason):
            self.event(held, _NORMAL if phase == "Stopped" else _WARNING, "NotSubmitted", reason)
        await self._store.report(held, change)

    async def followed(self, held: Held, refused: str) -> None:
        """What an object wants has been done, but for what `refused` says. Raises `StateError`."""
        if refused and self._refused.get(held.uid) != refused:
            self.event(held, _WARNING, "Refused", refused)
        self._refused[held.uid] = refused
        self._generations[held.uid] = held.found["metadata"].get("generation", 0)
        await self._show(held)

    def forget(self, uid: str) -> None:
        """An object is gone."""
        for known in (self._refused, self._generations, self._latency_at, self._allowances):
            known.pop(uid, None)

    def event(self, held: Held, kind: str, reason: str, note: str) -> None:
        """An Event about a pipeline, in the background; what is over the pipeline's allowance isn't written."""
        now = self._clock.now()
        allowance = self._allowances.setdefault(held.uid, _Allowance(BURST, now))
        self._allowances.move_to_end(held.uid)
        while len(self._allowances) > 1000:
            self._allowances.popitem(last=False)
        allowance.left = min(BURST, allowance.left + (now - allowance.at) / REFILL)
        allowance.at = now
        if allowance.left < 1 or allowance.last == (reason, note):
            log.debug("no Event of %s: %s", held.name, note)
            return
        if self._writing >= WRITTEN_AT_ONCE:
            log.debug("no Event of %s, there are too many at once: %s", held.name, note)
            return
        allowance.left -= 1
        allowance.last = (reason, note)
        self._writing += 1
        self._tasks.start(self._write(held, kind, reason, note), name="write an Event")

    # Inside

    async def _listen(self) -> None:
        async for event in self._master.subscribe_events():
            if event.pipeline is None:
                continue
            self._due[event.pipeline] = None
            self._woken.set()
            held = self._store.held(resource.object_name(event.pipeline)) or self._store.of(event.pipeline)
            if held is not None and held.id == event.pipeline and event.kind in SHOWN:
                self.event(held, *SHOWN[event.kind], _note(event))

    async def _look_again(self) -> None:
        left: list[str] = []
        while True:
            left = left or [held.id for held in self._store.known()]
            self._due.update(dict.fromkeys(left[:MOST]))
            del left[:MOST]
            self._woken.set()
            await self._clock.sleep(EVERY)

    async def _show_due(self) -> None:
        due, self._due = self._due, {}
        for id in due:
            held = self._store.of(id)
            if held is not None and held.known:
                try:
                    await self._show(held)
                except StateError as exc:
                    log.debug("the status of %s can't be shown yet: %s", id, exc)

    async def _show(self, held: Held) -> None:
        try:
            view = self._master.pipeline(held.id)
        except NotFoundError:
            return
        except NomadError as exc:
            log.debug("%s", exc)
            return
        ready = sum(op.state is OperatorState.RUNNING for op in view.operators)
        phase, reason = str(view.phase).capitalize(), view.reason or self._refused.get(held.uid, "")
        latency = self._latency(held, view)
        generation = int(self._generations.get(held.uid) or held.status.get("observedGeneration", 0))

        def change(status: Json) -> None:
            if status.get("outcome") and not view.phase.final:
                return  # a newer one is on its way
            status |= {"phase": phase, "ready": f"{ready}/{len(view.operators)}", "observedGeneration": generation}
            for key, value in (("reason", reason), ("latency", latency)):
                if value:
                    status[key] = value
                else:
                    status.pop(key, None)
            self._condition(
                status, ready=ready == len(view.operators), phase=phase, reason=reason, generation=generation
            )

        await self._store.report(held, change)

    def _latency(self, held: Held, view: PipelineView) -> str:
        """Rounded; the one that is shown already unless it is far off, and wasn't changed lately."""
        measured = view.operators[-1].stats.latency_p50
        if view.phase is not Phase.RUNNING or measured is None:
            return ""
        shown, new = held.status.get("latency", ""), _rounded(measured)
        if not shown:
            self._latency_at[held.uid] = self._clock.now()
            return new
        near = abs(_seconds(shown) - measured) <= LATENCY_CHANGE * _seconds(shown)
        if near or self._clock.now() - self._latency_at.get(held.uid, -LATENCY_EVERY) < LATENCY_EVERY:
            return str(shown)
        self._latency_at[held.uid] = self._clock.now()
        return new

    def _condition(self, status: Json, *, ready: bool, phase: str, reason: str, generation: int) -> None:
        now = datetime.fromtimestamp(self._clock.wall(), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        before = status.get("conditions") or []
        status["conditions"] = resource.condition(
            before, "Ready", "True" if ready else "False", phase, reason, now, generation
        )

    async def _write(self, held: Held, kind: str, reason: str, note: str) -> None:
        body = {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {"generateName": f"{held.name}-", "namespace": self._namespace},
            "eventTime": datetime.fromtimestamp(self._clock.wall(), UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "reportingController": f"{GROUP}/master",
            "reportingInstance": self._identity,
            "action": reason,
            "reason": reason,
            "type": kind,
            "note": note.encode()[:1000].decode(errors="ignore"),
            "regarding": {
                "apiVersion": API_VERSION,
                "kind": KIND,
                "namespace": self._namespace,
                "name": held.name,
                "uid": held.uid,
            },
        }
        try:
            await self._api.create(paths.events(self._namespace), body)
        except ApiError as exc:
            log.debug("an Event of %s is lost: %s", held.name, exc)
        finally:
            self._writing -= 1


def _note(event: EventView) -> str:
    cause = event.data.get("cause") if event.kind == "move.done" else None
    return f"{event.message} ({cause})" if cause else event.message


def _rounded(seconds: float) -> str:
    """Two digits, like "1.2 s" or "35 ms"."""
    text = f"{seconds:.2g}"
    return f"{float(text):g} s" if float(text) >= 1 else f"{float(f'{seconds * 1e3:.2g}'):g} ms"


def _seconds(text: str) -> float:
    """The inverse; 0 for what is none."""
    number, _, unit = text.partition(" ")
    try:
        return float(number) * (1e-3 if unit == "ms" else 1.0)
    except ValueError:
        return 0.0
