"""Pipelines that users change in the cluster: what `kubectl apply`, `patch` and `delete` of them do.

    async with alongside(PipelineWatch(master, store, api, namespace, identity).run()): ...

Started beside a master that leads and has a `KubernetesStore`. It calls `Master` as the REST interface does: a new
object is submitted, a changed one leads to `stop`, `change`, `move` or `update_profile`, one that is to be deleted to
`remove`. What can't be done is told in the object's status and as an Event, and tried again when something changes, and
by and by; what can't become right by waiting, only when the object changes. What the master itself did comes by here
too, and needs nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass

from nomad import bundle
from nomad.clock import Clock, SystemClock
from nomad.errors import (
    BundleError,
    BundleTampered,
    ConflictError,
    InvalidRequestError,
    NomadError,
    NotFoundError,
    PipelineError,
)
from nomad.kubernetes import answers, paths
from nomad.kubernetes.api import Api
from nomad.kubernetes.names import FINALIZER
from nomad.kubernetes.reflector import Reflector
from nomad.master.app import Master
from nomad.master.kube import resource
from nomad.master.kube.objects import Held
from nomad.master.kube.report import Reporter
from nomad.master.kube.resource import Json
from nomad.master.kube.store import KubernetesStore
from nomad.master.views import Phase, PipelineView
from nomad.settings import Backoff
from nomad.tasks import Tasks, alongside, first

log = logging.getLogger(__name__)

RETRY = Backoff(first=2.0, factor=2.0, limit=60.0)
"""Pauses before what couldn't be done is tried again."""

AT_ONCE = 2
"""Objects whose code is read and submitted at the same time: it may be large, and there may be hundreds of them."""


@dataclass(slots=True)
class _Retry:
    failures: int = 0
    due: float = 0.0


class PipelineWatch:
    """Keeps a master's pipelines as the objects in its namespace say. `run` is its one task."""

    def __init__(
        self,
        master: Master,
        store: KubernetesStore,
        api: Api,
        namespace: str,
        identity: str,
        clock: Clock | None = None,
    ) -> None:
        self._master = master
        self._store = store
        self._clock = clock or SystemClock()
        self._reporter = Reporter(master, store, api, namespace, identity, self._clock)
        self._reflector: Reflector[Json] = Reflector(
            api, paths.pipelines(namespace), self._take, self._changed, clock=self._clock
        )
        self._seen: dict[str, Held] = {}
        """By uid: what is in the cluster, as far as was heard."""
        self._dirty: dict[str, Held] = {}
        self._woken = asyncio.Event()
        self._retries: dict[str, _Retry] = {}
        self._hopeless: dict[str, int] = {}
        """By uid: the generation of an object that can't be run as it is."""
        self._busy: set[str] = set()
        self._submitting = asyncio.Semaphore(AT_ONCE)
        self._tasks = Tasks()

    async def run(self) -> None:
        """Until cancelled, or fenced."""
        try:
            async with alongside(self._reflector.run(), self._reporter.run(), self._watch_cluster()):
                while not self._store.fenced.is_set():
                    self._woken.clear()
                    self._look()
                    await self._wait()
        finally:
            await self._tasks.close()

    # What changes

    @staticmethod
    def _take(found: Json) -> Json:
        found["metadata"].pop("managedFields", None)
        kept: Json = answers.shared(found)
        return kept

    def _changed(self, old: Json | None, new: Json | None) -> None:
        if old is not None and (new is None or _uid(old) != _uid(new)):
            # Gone; where there is a new one of that name, nobody may have heard of it in between.
            held = self._seen.pop(_uid(old))
            self._store.lost(held.name, held.uid)
            self._dirty[held.uid] = held
            old = None
        if new is not None:
            held = self._store.seen(new)
            if held.gone:  # there is a new one of that name already
                held = self._seen.get(held.uid, held)
            self._seen[held.uid] = held
            if old is None or _wanted(old) != _wanted(new):
                self._retries.pop(held.uid, None)
            self._dirty[held.uid] = held
        self._woken.set()

    async def _watch_cluster(self) -> None:
        """Where a pipeline couldn't be placed, it may be once a node has come; an operator pinned, once it is there."""
        async for event in self._master.subscribe_events():
            if event.kind.startswith("node."):
                self._retries.clear()
                self._all_dirty()
                continue
            held = self._store.of(event.pipeline or "") if event.kind.startswith("move.") else None
            if held is not None and self._retries.pop(held.uid, None) is not None:
                self._dirty[held.uid] = held
                self._woken.set()

    def _all_dirty(self) -> None:
        for item in self._reflector.items.values():
            held = self._store.held(item["metadata"]["name"])
            if held is not None:
                self._dirty[held.uid] = held
        self._woken.set()

    def _look(self) -> None:
        """Set off what there is to do for each that has changed, one thing at a time for each."""
        now = self._clock.now()
        for uid, held in list(self._dirty.items()):
            retry = self._retries.get(uid)
            if uid not in self._busy and (retry is None or retry.due <= now):
                del self._dirty[uid]
                self._busy.add(uid)
                self._tasks.start(self._settle(held), name=f"look after pipeline {held.name}")

    async def _wait(self) -> None:
        due = [self._retries[uid].due for uid in self._dirty if uid in self._retries and uid not in self._busy]
        pause = [self._clock.sleep(max(0.0, min(due) - self._clock.now()))] if due else []
        await first(self._woken.wait(), self._store.fenced.wait(), *pause)

    async def _settle(self, held: Held) -> None:
        again = False
        try:
            again = not await self._look_after(held)
        except NomadError as exc:
            log.warning("pipeline %s: %s", held.name, exc)
            again = True
        except Exception:  # a mistake of ours with one pipeline must not end the looking after all others
            log.exception("looking after pipeline %s failed", held.name)
            again = True
        finally:
            self._busy.discard(held.uid)
            if held.gone:
                self._hopeless.pop(held.uid, None)
                self._reporter.forget(held.uid)
            if again and not held.gone:
                retry = self._retries.setdefault(held.uid, _Retry())
                retry.failures += 1
                retry.due = self._clock.now() + RETRY.delay(retry.failures)
                self._dirty[held.uid] = held
            else:
                self._retries.pop(held.uid, None)
            self._woken.set()

    # What is to be done

    async def _look_after(self, held: Held) -> bool:
        """Make it so for one object. False: not all could be done, and is worth another try."""
        if held.gone:
            if held.known:
                await self._remove(held)
            return True
        if held.known:
            if held.found["metadata"].get("deletionTimestamp"):
                await self._remove(held)
                return True
            done = await self._follow(held)
            await self._store.unmark(held)
            return done
        if held.id in self._store.adding:
            return False
        half_made = self._store.half_made(held)
        if half_made or held.found["metadata"].get("deletionTimestamp"):
            if half_made:
                log.warning("pipeline %s goes: its submission began, and was never done", held.name)
            if FINALIZER in (held.found["metadata"].get("finalizers") or ()):
                await self._store.discard(held)
            return True
        if self._hopeless.get(held.uid) == _generation(held):
            return True
        async with self._submitting:
            return held.gone or await self._submit(held)

    async def _remove(self, held: Held) -> None:
        try:
            await self._master.remove(held.id)
        except NotFoundError:
            if not held.gone:  # known to the store, but not readable when the master was started
                await self._store.discard(held)

    async def _submit(self, held: Held) -> bool:
        generation = _generation(held)
        if held.found["spec"].get("goal") == "Stop":
            await self._reporter.refuse(held, "Stopped", "its goal is Stop: there is nothing to run")
            return True
        try:
            spec, pins = resource.spec(held.found), resource.pins(held.found)
            digest = str(held.found["spec"].get("bundle"))
            data = await self._store.bundle(digest)
            signed = await asyncio.to_thread(bundle.read, data, bundle.public_key(self._master.signing_key))
            differs = _differs(held.found, signed)
            if differs:
                raise InvalidRequestError(
                    f"spec.{differs} isn't what was signed: it differs from the bundle", status=422
                )
            await self._master.submit(
                data,
                id=spec.id,
                start=spec.start,
                end=spec.end,
                profile=spec.profile,
                moves=resource.moves(held.found),
                pins=pins,
            )
        except NomadError as exc:
            if held.known or held.gone or held.id in self._store.adding:
                return True
            # What can't be stored, or placed, may come right without anybody changing the object. So may what another
            # key has signed: the Secrets of the same code, signed anew, have the same names.
            tampered = isinstance(exc, BundleTampered)
            hopeless = not tampered and (isinstance(exc, (BundleError, PipelineError)) or _is_the_objects(exc))
            failed = hopeless or tampered or isinstance(exc, ConflictError)  # the other one may be removed
            await self._reporter.refuse(held, "Failed" if failed else "Pending", str(exc))
            if hopeless:
                self._hopeless[held.uid] = generation
            return hopeless
        return True

    async def _follow(self, held: Held) -> bool:
        """Do what was changed of a pipeline that is known."""
        try:
            view = self._master.pipeline(held.id)
        except NotFoundError:  # it can't be read, which the log says
            return True
        refused = ""
        if held.found["spec"].get("goal") == "Stop" and not (view.phase.final or view.phase is Phase.STOPPING):
            view = await self._master.stop(held.id)
        if not view.phase.final:
            try:
                refused = await self._place(held, view)
            except (InvalidRequestError, ConflictError, PipelineError) as exc:
                refused = str(exc)
        await self._reporter.followed(held, refused)
        return not refused

    async def _place(self, held: Held, view: PipelineView) -> str:
        """Moves, pins and profile. What is still to be waited for, or "". Raises what the master refuses with."""
        moves = resource.moves(held.found)
        if moves != view.moves:
            await self._master.change(held.id, moves=moves)
        profile = [dict(entry) for entry in resource.spec(held.found).profile]
        if profile != view.profile:
            await self._master.update_profile(held.id, profile)
        ends = {view.operators[0].name, view.operators[-1].name}
        there = {op.name: op.pin for op in view.operators if op.pin and op.name not in ends}
        wanted = resource.pins(held.found)
        bound = {op.name: op.pin for op in view.operators if op.name in ends}
        changes: dict[str, str | None] = dict.fromkeys(there.keys() - wanted.keys())
        changes |= {name: node for name, node in wanted.items() if (there | bound).get(name) != node}
        elsewhere = self._elsewhere(view, changes)
        now = {name: node for name, node in changes.items() if name not in elsewhere}
        # A pin to another node is first taken off.
        now |= {name: None for name in elsewhere if name in there}
        if now:
            await self._master.change(held.id, pins=now)
        for name, node in elsewhere.items():
            if not any(move.operator == name and not move.state.final for move in self._master.moves(held.id)):
                await self._master.move(held.id, name, node, reason=f"its Pipeline pins it to {node}")
        return "; ".join(
            f"{name} is to be moved to {node} before it is pinned there" for name, node in elsewhere.items()
        )

    @staticmethod
    def _elsewhere(view: PipelineView, changes: Mapping[str, str | None]) -> dict[str, str]:
        """Those that have to be moved first."""
        ends = {view.operators[0].name, view.operators[-1].name}
        nodes = {op.name: op.node for op in view.operators}
        return {
            name: node
            for name, node in changes.items()
            if node is not None and name not in ends and name in nodes and nodes[name] != node
        }


def _uid(found: Json) -> str:
    return str(found["metadata"]["uid"])


def _wanted(found: Json) -> tuple[object, object]:
    return found["metadata"].get("generation"), found["metadata"].get("deletionTimestamp")


def _generation(held: Held) -> int:
    return int(held.found["metadata"].get("generation", 0))


def _differs(found: Json, signed: bundle.Bundle) -> str:
    """The field in which an object isn't what its bundle says; "" where there is none."""
    spec = resource.spec(found)
    said = signed.spec(spec.id, spec.start, spec.end)
    if signed.digest != found["spec"].get("bundle"):
        return "bundle"
    for name in ("operators", "edges", "codec"):
        if getattr(spec, name) != getattr(said, name):
            return name
    return ""


def _is_the_objects(exc: NomadError) -> bool:
    """Whether it is the object itself that isn't valid, and not the state of the cluster."""
    return isinstance(exc, InvalidRequestError) and str(exc).startswith(("spec.", "status."))
