"""A cluster's API in memory, for `KubernetesRuntime`: objects by their paths, and watches of them.

It knows no kinds, checks nothing and runs nothing: what a test wants of it is put there by the test.
"""

from __future__ import annotations

import asyncio
import copy
import functools
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, cast

from nomad.errors import ApiExists, ApiInvalid, ApiNotFound
from nomad.kubernetes.api import Api
from nomad.runtime.kubernetes import KubernetesRuntime
from nomad.runtime.manifests import Boot
from nomad.settings import Kubernetes
from tests.clock import VirtualClock, settle

Json = dict[str, Any]

NODES = "/api/v1/nodes"
PODS = "/api/v1/namespaces/test/pods"
CLAIMS = "/api/v1/namespaces/test/persistentvolumeclaims"
SECRETS = "/api/v1/namespaces/test/secrets"


class Cluster:
    """`nomad.kubernetes.api.Api`, as far as the runtime asks."""

    def __init__(self) -> None:
        self.objects: dict[str, Json] = {}
        """By path."""
        self.asked: list[str] = []
        """`POST <path>`, `PATCH <path>`, `DELETE <path>`, in order."""
        self.before: Callable[[str], None] = lambda request: None
        """Called with each of these before anything is done; what it raises is the answer."""
        self.after: Callable[[str], None] = lambda request: None
        """The same once it is done."""
        self._version = 0
        self._watches: list[tuple[str, Json, asyncio.Queue[Json]]] = []

    def put(self, path: str, item: Json) -> Json:
        """Have it in the collection `path`, made or changed."""
        found = copy.deepcopy(item)
        self._version += 1
        found["metadata"] |= {"resourceVersion": str(self._version)}
        found["metadata"].setdefault("uid", f"uid-{self._version}")
        place = f"{path}/{found['metadata']['name']}"
        kind = "MODIFIED" if place in self.objects else "ADDED"
        self.objects[place] = found
        self._tell(path, kind, found)
        return copy.deepcopy(found)

    def remove(self, path: str, name: str) -> bool:
        """Whether it was there."""
        found = self.objects.pop(f"{path}/{name}", None)
        if found is None:
            return False
        self._version += 1
        found["metadata"]["resourceVersion"] = str(self._version)
        self._tell(path, "DELETED", found)
        return True

    # What the runtime asks for

    async def get(self, path: str) -> Json:
        if path not in self.objects:
            raise ApiNotFound(path)
        return copy.deepcopy(self.objects[path])

    async def collect(
        self, path: str, take: Callable[[Json], Any], params: Mapping[str, Any] | None = None
    ) -> tuple[list[Any], str]:
        found = [item for place, item in self.objects.items() if place.rpartition("/")[0] == path]
        return [take(copy.deepcopy(item)) for item in found if _chosen(item, params)], str(self._version)

    async def list(self, path: str, params: Mapping[str, Any] | None = None) -> tuple[list[Json], str]:
        return await self.collect(path, lambda item: item, params)

    async def watch(
        self, path: str, params: Json, version: str, *, seconds: int, opened: Callable[[], None]
    ) -> AsyncIterator[Json]:
        queue: asyncio.Queue[Json] = asyncio.Queue()
        self._watches.append((path, params, queue))
        opened()
        while True:
            yield await queue.get()

    async def create(self, path: str, body: Json) -> Json:
        request = self._begin(f"POST {path}")
        if f"{path}/{body['metadata']['name']}" in self.objects:
            raise ApiExists(f"{path}/{body['metadata']['name']} exists", status=409)
        made = self.put(path, body)
        self.after(request)
        return made

    async def apply(self, path: str, body: Json) -> Json:
        return self.put(path.rpartition("/")[0], body)

    async def patch(self, path: str, body: Any, *, kind: str) -> Json:
        """A JSON patch of tests and additions, and of subresources any, of which nothing is kept."""
        request = self._begin(f"PATCH {path}")
        if path not in self.objects:
            path = path.rpartition("/")[0]
        if path not in self.objects:
            raise ApiNotFound(path)
        found = copy.deepcopy(self.objects[path])
        for step in body if kind == "json" else ():
            *way, last = (part.replace("~1", "/").replace("~0", "~") for part in step["path"].split("/")[1:])
            place = functools.reduce(lambda item, part: item.setdefault(part, {}), way, found)
            if step["op"] == "test" and place.get(last) != step["value"]:
                raise ApiInvalid(f"{step['path']} isn't {step['value']}")
            place[last] = step["value"]
        made = self.put(path.rpartition("/")[0], found)
        self.after(request)
        return made

    async def delete(self, path: str, *, params: Json | None = None, **_: Any) -> bool:
        request = self._begin(f"DELETE {path}")
        collection, _, name = path.rpartition("/")
        gone = self.remove(collection, name)
        self.after(request)
        return gone

    # Inside

    def _begin(self, request: str) -> str:
        self.asked.append(request)
        self.before(request)
        return request

    def _tell(self, path: str, kind: str, item: Json) -> None:
        for watched, params, queue in self._watches:
            if watched == path and _chosen(item, params):
                queue.put_nowait({"type": kind, "object": copy.deepcopy(item)})


def node(name: str, cpu: str = "2", **labels: str) -> Json:
    status = {"allocatable": {"cpu": cpu, "memory": "4Gi"}, "conditions": [{"type": "Ready", "status": "True"}]}
    return {"metadata": {"name": name, "labels": labels}, "spec": {}, "status": status}


@asynccontextmanager
async def running(cluster: Cluster, clock: VirtualClock, **settings: Any) -> AsyncIterator[KubernetesRuntime]:
    """The runtime on that cluster."""
    runtime = await KubernetesRuntime.open(
        cast(Api, cluster),
        Kubernetes(namespace="test", images={"3.11": "operator:1"}, **settings),
        Boot("tls://master@m:1", b"", 10.0),
        lambda name: name.encode(),
        keep_ended=1,
        clock=clock,
    )
    try:
        await settle()
        yield runtime
    finally:
        await runtime.close()


def _chosen(item: Json, params: Mapping[str, Any] | None) -> bool:
    selector = (params or {}).get("labelSelector", "")
    wanted = dict(part.split("=", 1) for part in selector.split(",") if part)
    return wanted.items() <= (item["metadata"].get("labels") or {}).items()
