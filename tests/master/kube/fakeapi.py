"""An API server in memory, for what `store` and its like ask of one; tests/kubernetes has them against a real one.

Versions, generations, finalizers, subresources `status` and preconditions are as Kubernetes has them; nothing that was
owned goes by itself.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, TypeVar

from nomad.errors import ApiConflict, ApiExists, ApiGone, ApiNotFound

Json = dict[str, Any]
T = TypeVar("T")


class FakeApi:
    """Every request waits for `meet`, which a test replaces to have it fail or wait."""

    def __init__(self) -> None:
        self.objects: dict[str, Json] = {}
        """By path."""
        self.asked: list[tuple[str, str]] = []
        """Verb and path of each request."""
        self._numbers = itertools.count(1)
        self._watches: list[tuple[str, asyncio.Queue[Json]]] = []

    async def meet(self, verb: str, path: str) -> None:
        """What is asked for comes by here first."""

    def put(self, path: str, body: Json) -> Json:
        """An object as somebody else makes it."""
        mark = {"name": path.rpartition("/")[2], "uid": f"uid-{next(self._numbers)}", "generation": 1}
        metadata = copy.deepcopy(body.get("metadata", {})) | mark
        metadata.pop("resourceVersion", None)
        self.objects[path] = copy.deepcopy(body) | {"metadata": metadata}
        return self._changed(path)

    async def get(self, path: str, params: Mapping[str, Any] | None = None) -> Json:
        await self._asked("get", path)
        return copy.deepcopy(self._there(path))

    async def create(self, path: str, body: Json, params: Mapping[str, Any] | None = None) -> Json:
        await self._asked("create", path)
        meta = body["metadata"]
        name = meta.get("name") or f"{meta['generateName']}{next(self._numbers)}"
        if f"{path}/{name}" in self.objects:
            raise ApiExists(f"{name} already exists")
        body = {key: value for key, value in body.items() if key != "status" or not path.endswith("/pipelines")}
        return copy.deepcopy(self.put(f"{path}/{name}", body))

    async def patch(self, path: str, body: Json, *, kind: str = "merge", manager: str = "") -> Json:
        await self._asked("patch", path)
        assert kind == "merge"
        whole, status = path.removesuffix("/status"), path.endswith("/status")
        there = self._there(whole)
        if body.get("metadata", {}).get("resourceVersion") not in (None, there["metadata"]["resourceVersion"]):
            raise ApiConflict(f"{whole} has changed")
        parts = {key: value for key, value in body.items() if status == (key == "status") or key == "metadata"}
        before = copy.deepcopy(there.get("spec"))
        _merge(there, {"status": parts.get("status", {})} if status else parts)
        if there.get("spec") != before:
            there["metadata"]["generation"] += 1
        found = copy.deepcopy(self._changed(whole))
        if there["metadata"].get("deletionTimestamp") and not there["metadata"].get("finalizers"):
            self.drop(whole)
        return found

    async def delete(self, path: str, *, uid: str | None = None, version: str | None = None) -> bool:
        await self._asked("delete", path)
        there = self.objects.get(path)
        if there is None:
            return False
        if uid not in (None, there["metadata"]["uid"]) or version not in (None, there["metadata"]["resourceVersion"]):
            raise ApiConflict(f"{path} is another")
        if there["metadata"].get("finalizers"):
            there["metadata"].setdefault("deletionTimestamp", "2026-01-01T00:00:00Z")
            self._changed(path)
        else:
            self.drop(path)
        return True

    def drop(self, path: str) -> None:
        """An object goes at once."""
        found = self._changed(path)
        del self.objects[path]
        self._tell(path, "DELETED", found)

    async def list(self, path: str, params: Mapping[str, Any] | None = None) -> tuple[list[Json], str]:
        return await self.collect(path, lambda item: item, params)

    async def collect(
        self, path: str, take: Callable[[Json], T], params: Mapping[str, Any] | None = None, *, limit: int = 0
    ) -> tuple[list[T], str]:
        await self._asked("list", path)
        label = (params or {}).get("labelSelector", "")
        found = [
            take(copy.deepcopy(item))
            for where, item in self.objects.items()
            if where.rpartition("/")[0] == path and (not label or label in item["metadata"].get("labels", {}))
        ]
        return found, str(next(self._numbers))

    async def watch(
        self,
        path: str,
        params: Mapping[str, Any] | None,
        resource_version: str,
        *,
        seconds: int = 300,
        opened: Callable[[], None] = lambda: None,
    ) -> AsyncIterator[Json]:
        """From now on: what changed since the list is lost."""
        waiting = (path, asyncio.Queue[Json]())
        self._watches.append(waiting)
        opened()
        try:
            while event := await waiting[1].get():
                yield event
            raise ApiGone("it is too old")
        finally:
            self._watches.remove(waiting)

    def forget(self) -> None:
        """What was changed before can't be watched any more."""
        for _, waiting in self._watches:
            waiting.put_nowait({})

    # Inside

    async def _asked(self, verb: str, path: str) -> None:
        self.asked.append((verb, path))
        await self.meet(verb, path)

    def _there(self, path: str) -> Json:
        if path not in self.objects:
            raise ApiNotFound(f"{path} not found")
        return self.objects[path]

    def _changed(self, path: str) -> Json:
        found = self.objects[path]
        kind = "MODIFIED" if "resourceVersion" in found["metadata"] else "ADDED"
        found["metadata"]["resourceVersion"] = str(next(self._numbers))
        self._tell(path, kind, found)
        return found

    def _tell(self, path: str, kind: str, found: Json) -> None:
        for where, waiting in self._watches:
            if where == path.rpartition("/")[0]:
                waiting.put_nowait({"type": kind, "object": copy.deepcopy(found)})


def _merge(there: Json, patch: Json) -> None:
    """RFC 7396."""
    for key, value in patch.items():
        if value is None:
            there.pop(key, None)
        elif isinstance(value, dict):
            if not isinstance(there.get(key), dict):
                there[key] = {}
            _merge(there[key], value)
        else:
            there[key] = copy.deepcopy(value)
