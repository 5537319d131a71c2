"""The Pipelines of a namespace as a master knows them, and its writes to them. The lower half of `store`.

A write is a merge patch with the resource version that it was made for: what others have changed meanwhile is read
first, and kept. Statuses carry the writer's name and number; one with a higher number fences this master.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace

from nomad.errors import (
    ApiConflict,
    ApiExists,
    ApiInvalid,
    ApiNotFound,
    ConflictError,
    InvalidRequestError,
    StateError,
)
from nomad.kubernetes import paths
from nomad.kubernetes.api import Api
from nomad.kubernetes.names import API_VERSION, FINALIZER, GROUP, KIND
from nomad.master.kube import resource
from nomad.master.kube.past import PastOperator
from nomad.master.kube.resource import LABELS, Json
from nomad.master.kube.writes import ALWAYS, LOOP, USER, Writes
from nomad.master.views import MoveView

Change = Callable[[Json], object]
"""Changes a copy of a status, or of an object, in place."""

_WRITER = "master"
"""In a status: who wrote it."""


@dataclass(slots=True, eq=False)
class Held:
    """A Pipeline as this master knows it."""

    name: str
    uid: str
    found: Json
    """As it was last seen or written."""
    known: bool = False
    """This master has taken it on, or found it taken on when it was opened."""
    early: bool = False
    """It was there when this master began."""
    gone: bool = False
    past_moves: dict[str, MoveView] = field(default_factory=dict)
    past: dict[str, PastOperator] = field(default_factory=dict)
    written: dict[str, str] | None = None
    """Its ConfigMap's data; None: there is none."""
    behind: bool = False
    """Something of its past isn't in there yet."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    history_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    placing: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Pins are written to the spec, then to the status."""
    pending: list[Change] = field(default_factory=list)
    """Changes of the status that wait to be written."""

    @property
    def id(self) -> str:
        return resource.pipeline_id(self.found)

    @property
    def version(self) -> str:
        return str(self.found["metadata"]["resourceVersion"])

    @property
    def status(self) -> Json:
        return self.found.get("status") or {}

    @property
    def writer(self) -> str:
        return str(self.status.get(_WRITER, ""))

    @property
    def moves(self) -> dict[str, MoveView]:
        """Open ones and past ones; one that is still found among the open ones is past."""
        return {view.id: view for view in resource.open_moves(self.found)} | self.past_moves


class Pipelines:
    """All Pipelines, those that no master has taken on included."""

    def __init__(self, api: Api, namespace: str, writes: Writes) -> None:
        self.held: dict[str, Held] = {}
        """By the object's name. For reading."""
        self._names: dict[str, set[str]] = {}  # by id: objects that have it, or have had it
        self._api = api
        self._namespace = namespace
        self._writes = writes

    def seen(self, found: Json) -> Held:
        """A Pipeline as it was read; an older one than is known already is left aside."""
        name, uid = found["metadata"]["name"], found["metadata"]["uid"]
        found["metadata"].pop("managedFields", None)
        self._writes.look((found.get("status") or {}).get(_WRITER, ""))
        held = self.held.get(name)
        if held is None or held.uid != uid:
            if held is not None and _version(found) < _version(held.found):
                return Held(name, uid, found, gone=True)
            if held is not None:
                self.lost(name, held.uid)
            held = self.held[name] = Held(name, uid, found)
        elif _version(found) >= _version(held.found):
            held.found = found
        self._names.setdefault(held.id, set()).add(name)
        return held

    def lost(self, name: str, uid: str) -> None:
        """A Pipeline isn't there any more."""
        held = self.held.get(name)
        if held is not None and held.uid == uid:
            held.gone = True
            del self.held[name]
            if names := self._names.get(held.id):
                names.discard(name)
                if not names:
                    del self._names[held.id]

    def of(self, pipeline: str) -> Held | None:
        """The Pipeline of that id: the one that was taken on, where there are several."""
        found = (self.held.get(name) for name in self._names.get(pipeline, ()))
        mine = [held for held in found if held is not None and not held.gone and held.id == pipeline]
        return min(mine, key=lambda held: (not held.known, held.name), default=None)

    async def create(self, content: Json, id: str) -> Held:
        """A new one, marked, so that it is known for half-made when the rest of its way fails, and goes again.

        Raises `StateError`, `ConflictError`, `InvalidRequestError`.
        """
        metadata = content["metadata"] | {"annotations": {resource.SUBMITTED_ANNOTATION: self._writes.writer}}
        body = content | {"metadata": metadata}
        path = paths.pipelines(self._namespace)
        try:
            return self.seen(await self._writes.patiently(lambda: self._api.create(path, body), USER))
        except ApiExists:
            pass  # by somebody who was faster, or by us, and the answer got lost
        except StateError as exc:
            if isinstance(exc.__cause__, ApiInvalid):
                raise InvalidRequestError(str(exc.__cause__), status=422) from exc
            raise
        path = paths.pipelines(self._namespace, content["metadata"]["name"])
        try:
            held = self.seen(await self._writes.patiently(lambda: self._api.get(path), USER))
        except ApiNotFound:
            raise StateError(f"pipeline {id!r} was deleted while it was submitted") from None
        if held.id != id:
            raise taken(id)
        return held

    async def take_over(self, held: Held) -> None:
        """Leave this master's name, whoever's is there."""
        while not held.gone:
            patch = {"metadata": {"resourceVersion": held.version}, "status": {_WRITER: self._writes.writer}}
            path = paths.pipelines(self._namespace, held.name, "status")
            try:
                self.seen(await self._writes.patiently(lambda: self._api.patch(path, patch), LOOP))  # noqa: B023
                return
            except ApiConflict:
                await self._read_again(held, LOOP)
            except ApiNotFound:
                self.lost(held.name, held.uid)

    async def _read_again(self, held: Held, patience: float) -> None:
        """After a conflict: somebody has changed it. Raises `StateError` when that was another master."""
        path = paths.pipelines(self._namespace, held.name)
        try:
            self.seen(await self._writes.patiently(lambda: self._api.get(path), patience))
        except ApiNotFound:
            self.lost(held.name, held.uid)

    async def write_status(self, held: Held, change: Change, patience: float) -> None:
        """Together with what others have changed of it meanwhile. Without effect once it is gone."""
        held.pending.append(change)
        try:
            async with self._writes.turn(held.lock, patience) as left:
                while not held.gone and any(waits is change for waits in held.pending):
                    batch = list(held.pending)
                    after = copy.deepcopy(held.status)
                    for each in batch:
                        each(after)
                    after[_WRITER] = self._writes.writer
                    if await self._patch(held, "status", resource.merge_patch(held.status, after), left):
                        held.pending = [waits for waits in held.pending if not any(waits is done for done in batch)]
        finally:
            held.pending = [waits for waits in held.pending if waits is not change]

    async def undo(self, held: Held, change: Change) -> None:
        """As `write_status`, after one that failed and may have taken effect nevertheless."""
        async with self._writes.turn(held.lock, ALWAYS):
            await self._read_again(held, ALWAYS)
        await self.write_status(held, change, ALWAYS)

    async def write(self, held: Held, change: Change, patience: float) -> None:
        """Change spec or metadata, on top of what users have changed meanwhile."""
        async with self._writes.turn(held.lock, patience) as left:
            while not held.gone:
                after = copy.deepcopy(held.found)
                change(after)
                patch = {
                    part: inner
                    for part in ("metadata", "spec")
                    if (inner := resource.merge_patch(held.found[part], after[part]))
                }
                if await self._patch(held, "", patch, left):
                    return

    async def _patch(self, held: Held, sub: str, patch: Json, patience: float) -> bool:
        """False: it has changed, look again. Nothing is sent when there is nothing to change."""
        if not patch:
            return True
        body = {"status": patch} if sub else patch
        body = body | {"metadata": {**body.get("metadata", {}), "resourceVersion": held.version}}
        path = paths.pipelines(self._namespace, held.name, sub)
        try:
            self.seen(await self._writes.patiently(lambda: self._api.patch(path, body), patience))
        except ApiConflict:
            await self._read_again(held, patience)
            return False
        except ApiNotFound:
            self.lost(held.name, held.uid)
        return True

    async def delete(self, held: Held, patience: float) -> None:
        """Ask for its end; it stays until it is released."""
        if held.gone or held.found["metadata"].get("deletionTimestamp"):
            return
        path = paths.pipelines(self._namespace, held.name)
        try:
            there = await self._writes.patiently(lambda: self._api.delete(path, uid=held.uid), patience)
        except ApiConflict:
            there = False
        if not there:
            self.lost(held.name, held.uid)
            return
        await self._read_again(held, patience)

    async def release(self, held: Held) -> None:
        """Let it go that is to be deleted."""

        def change(found: Json) -> None:
            found["metadata"]["finalizers"] = [
                name for name in found["metadata"].get("finalizers") or [] if name != FINALIZER
            ]

        await self.write(held, change, LOOP)
        if not any(name != FINALIZER for name in held.found["metadata"].get("finalizers") or []):
            self.lost(held.name, held.uid)

    async def replace(self, path: str, body: Json, patience: float) -> None:
        """Create it in the place of what an earlier Pipeline of that name may have left.

        Raises `StateError`, also where somebody else's is there.
        """
        mine = f"{path}/{body['metadata']['name']}"
        for _ in range(3):
            try:
                await self._writes.patiently(lambda: self._api.create(path, body), patience)
                return
            except ApiExists:
                if not await self.clear(mine, patience):
                    raise foreign(body["kind"], mine) from None
            except ApiNotFound as exc:
                raise StateError(f"{mine} can't be made: {exc}") from exc
        raise StateError(f"{mine} can't be replaced: somebody else makes it again and again")

    async def clear(self, path: str, patience: float) -> bool:
        """Have nothing there that is Nomad's. False: there is something, and it is somebody else's."""
        while True:
            try:
                found = await self._writes.patiently(lambda: self._api.get(path), patience)
            except ApiNotFound:
                return True
            if not _is_nomads(found):
                return False
            uid = found["metadata"]["uid"]
            with suppress(ApiConflict):  # there is another one by now
                await self._writes.patiently(lambda: self._api.delete(path, uid=uid), patience)  # noqa: B023
                return True


def same(found: Json, content: Json) -> bool:
    """Whether an object wants the pipeline that is to be submitted: what of it can't be changed."""
    try:
        ours, theirs = resource.spec(content), resource.spec(found)
    except InvalidRequestError:
        return False
    return replace(ours, profile=()) == replace(theirs, profile=()) and (
        found["spec"].get("bundle") == content["spec"]["bundle"]
    )


def owner(held: Held) -> Json:
    """The reference that makes an object go with the Pipeline."""
    return {"apiVersion": API_VERSION, "kind": KIND, "name": held.name, "uid": held.uid}


def body_of(kind: str, name: str, owner: Json | None = None) -> Json:
    """An object of Nomad's that goes with its `owner`."""
    metadata: Json = {"name": name, "labels": dict(LABELS)}
    if owner is not None:
        metadata["ownerReferences"] = [owner]
    return {"apiVersion": "v1", "kind": kind, "metadata": metadata}


def belongs(found: Json, held: Held) -> bool:
    """Whether it is of this Pipeline, and not of an earlier one of its name."""
    return any(owner["uid"] == held.uid for owner in found["metadata"].get("ownerReferences") or ())


def _is_nomads(found: Json) -> bool:
    metadata = found["metadata"]
    owners = metadata.get("ownerReferences") or ()
    return LABELS.items() <= (metadata.get("labels") or {}).items() or any(
        owner["kind"] == KIND and owner["apiVersion"].startswith(f"{GROUP}/") for owner in owners
    )


def foreign(kind: str, path: str) -> StateError:
    """Somebody else has what a pipeline is to have."""
    return StateError(
        f"there is a {kind} {path.rpartition('/')[2]} that isn't Nomad's, where the pipeline is to have its own: "
        "delete or rename it, or give the pipeline another id"
    )


def _version(found: Json) -> int:
    """Resource versions of one kind of object are numbers that grow."""
    return int(found["metadata"]["resourceVersion"])


def taken(id: str) -> ConflictError:
    """There is another pipeline of that id."""
    return ConflictError(
        f"there is a pipeline {id!r} already; take another id, or remove it: nomad rm {id}", status=409
    )
