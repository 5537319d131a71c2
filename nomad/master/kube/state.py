"""What is a master's own in its cluster: small facts and the last events in one ConfigMap, and its secrets in a Secret.

A part of `store`.
"""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress

from nomad.clock import Clock
from nomad.errors import ApiConflict, ApiError, ApiExists, ApiNotFound, StateError
from nomad.kubernetes import paths
from nomad.kubernetes.api import Api
from nomad.kubernetes.names import GROUP, MASTER_NAME, META_CONFIGMAP
from nomad.master.kube import resource
from nomad.master.kube.objects import body_of
from nomad.master.kube.past import MOST_EVENTS, is_fact, pack_events, unpack_events
from nomad.master.kube.resource import Json
from nomad.master.kube.writes import LOOP, USER, Writes, term_of
from nomad.master.views import EventView

log = logging.getLogger(__name__)

EVENTS_EVERY = 5.0
"""Seconds between two writes of the last events."""

EVENT_GAP = 10_000
"""More events than come in that time. A master's first one is numbered so far above the last that was kept: who has
read later ones that a crash cost would otherwise take new ones for them.
"""

_WRITER = f"{GROUP}/master"
"""Annotation: who wrote it."""


class MasterState:
    """Both. `run` writes events down, until cancelled; `close` the last ones."""

    def __init__(self, api: Api, namespace: str, writes: Writes, clock: Clock) -> None:
        self.events: list[EventView] = []
        """The last ones, oldest first. For reading."""
        self._api = api
        self._namespace = namespace
        self._writes = writes
        self._clock = clock
        self._found: Json = {}
        self._lock = asyncio.Lock()
        self._dirty = asyncio.Event()
        self._keep = MOST_EVENTS

    async def open(self, term: int) -> None:
        """Put this master's name on it, whose number is above `term` and above what was there."""
        path = paths.configmaps(self._namespace, META_CONFIGMAP)
        while True:
            try:
                self._found = await self._writes.patiently(lambda: self._api.get(path), LOOP)
                self._writes.term = 1 + max(term, term_of(self._writer))
                marks = {"resourceVersion": self._found["metadata"]["resourceVersion"], "annotations": self._marks}
                self._found = await self._writes.patiently(
                    lambda: self._api.patch(path, {"metadata": marks}),  # noqa: B023
                    LOOP,
                )
                break
            except ApiNotFound:
                self._writes.term = 1 + term
                with suppress(ApiExists):
                    self._found = await self._create({}, LOOP)
                    break
            except ApiConflict:
                continue
        try:
            self.events = unpack_events(self._found.get("binaryData") or {})
        except StateError as exc:
            log.error("%s", exc)

    @property
    def _marks(self) -> Json:
        return {_WRITER: self._writes.writer}

    @property
    def _writer(self) -> str:
        return str((self._found["metadata"].get("annotations") or {}).get(_WRITER, ""))

    async def _create(self, data: Json, patience: float) -> Json:
        body = body_of("ConfigMap", META_CONFIGMAP) | {"binaryData": data}
        body["metadata"]["annotations"] = self._marks
        path = paths.configmaps(self._namespace)
        return await self._writes.patiently(lambda: self._api.create(path, body), patience)

    async def _write(self, change: Callable[[Json], object], patience: float) -> None:
        path = paths.configmaps(self._namespace, META_CONFIGMAP)
        async with self._writes.turn(self._lock, patience) as left:
            while True:
                before = self._found.get("binaryData") or {}
                after = {"binaryData": dict(before)}
                change(after)
                patch = resource.merge_patch(before, after["binaryData"])
                if not patch:
                    return
                version = self._found["metadata"]["resourceVersion"]
                body = {"metadata": {"resourceVersion": version}, "binaryData": patch}
                try:
                    self._found = await self._writes.patiently(lambda: self._api.patch(path, body), left)  # noqa: B023
                    return
                except ApiConflict:
                    self._found = await self._writes.patiently(lambda: self._api.get(path), left)
                    self._writes.look(self._writer)
                except ApiNotFound:  # somebody has deleted it: what is known is written again
                    with suppress(ApiExists):
                        self._found = await self._create(before, left)

    def _with_events(self, state: Json) -> None:
        state["binaryData"].update(pack_events(self.events, self._keep))

    async def run(self) -> None:
        """Write events down a little after they came, many at a time."""
        while True:
            await self._dirty.wait()
            await self._clock.sleep(EVENTS_EVERY)
            self._dirty.clear()
            try:
                await self._write(self._with_events, LOOP)
            except (StateError, ApiError) as exc:
                if self._writes.fenced.is_set():
                    return
                log.warning("the last events can't be written down yet: %s", exc)
                self._dirty.set()
            except asyncio.CancelledError:
                self._dirty.set()  # for `close`
                raise

    async def close(self) -> None:
        """Write down the last events. Call it once `run` has ended."""
        if self._dirty.is_set() and not self._writes.fenced.is_set():
            try:
                await self._write(self._with_events, USER)
            except StateError as exc:
                log.warning("the last events are lost: %s", exc)

    @property
    def facts(self) -> dict[str, bytes]:
        """By name."""
        data = self._found.get("binaryData") or {}
        return {key: base64.b64decode(value) for key, value in data.items() if is_fact(key)}

    async def set(self, key: str, value: bytes, patience: float) -> None:
        """Raises `StateError`."""
        text = base64.b64encode(value).decode()
        await self._write(lambda state: state["binaryData"].__setitem__(key, text), patience)

    async def secret(self, name: str, make: Callable[[], str]) -> str:
        """One of the master's, as text; made when it isn't there yet. Raises `StateError`."""
        path = paths.secrets(self._namespace, MASTER_NAME)
        while True:
            try:
                found = await self._writes.patiently(lambda: self._api.get(path), LOOP)
            except ApiNotFound:
                found = None
            if text := ((found or {}).get("data") or {}).get(name):
                return _as_text(text, name)
            data = {name: base64.b64encode(make().encode()).decode()}
            try:
                if found is None:
                    body = body_of("Secret", MASTER_NAME) | {"type": "Opaque", "data": data}
                    await self._writes.patiently(
                        lambda body=body: self._api.create(paths.secrets(self._namespace), body),  # type: ignore[misc]
                        LOOP,
                    )
                else:
                    patch = {"metadata": {"resourceVersion": found["metadata"]["resourceVersion"]}, "data": data}
                    await self._writes.patiently(lambda patch=patch: self._api.patch(path, patch), LOOP)  # type: ignore[misc]
            except (ApiConflict, ApiNotFound):
                continue  # somebody else was faster: read what is there now
            return _as_text(data[name], name)

    def add(self, events: Sequence[EventView], keep: int) -> None:
        """Append, and drop all but the last `keep`."""
        self._keep = min(keep, MOST_EVENTS)
        self.events = [*self.events, *events][-self._keep :]
        self._dirty.set()


def place_of(name: str) -> str:
    """In words, where a secret of the master's is kept."""
    return f"{name} in the Secret {MASTER_NAME}"


def _as_text(data: str, name: str) -> str:
    try:
        return base64.b64decode(data).decode("ascii").strip()
    except ValueError as exc:
        raise StateError(f"{place_of(name)} isn't text: delete it to have a new one made") from exc
