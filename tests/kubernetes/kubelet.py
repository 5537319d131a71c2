"""A stand-in for scheduler and kubelets where there is only an API: it runs pods by writing what nodes would report.

Pods behave as their operator's name says (`tests.contract.runtime`): `exit3` ends by itself, `stubborn` is killed
when its grace is over, everything else runs until it is asked to end. Pods for which `refuse` has a sentence are
never started; those for which `schedule` is False aren't even put on a node.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from nomad.errors import ApiConflict, ApiError, ApiNotFound
from nomad.kubernetes import names, paths
from nomad.kubernetes.api import Api
from nomad.kubernetes.reflector import Reflector
from nomad.tasks import Tasks

Json = dict[str, Any]


async def make_node(api: Api, name: str, *, ready: str = "True", cpu: str = "4", **labels: str) -> None:
    """A node as a kubelet would have registered it."""
    body = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}}
    await api.create(paths.nodes(), body)
    await set_ready(api, name, ready, cpu=cpu)
    spec = {"spec": {"taints": None}}  # admission taints new nodes; a controller would take that away
    await api.patch(paths.nodes(name), spec)


async def set_ready(api: Api, name: str, ready: str, *, cpu: str = "4") -> None:
    amounts = {"cpu": cpu, "memory": "8Gi", "pods": "110"}
    conditions = [{"type": "Ready", "status": ready, "reason": "Test", "message": "a test says so"}]
    status = {"allocatable": amounts, "capacity": amounts, "conditions": conditions}
    await api.patch(paths.nodes(name, "status"), {"status": status})


class Kubelet:
    """Runs the pods of one namespace. `async with`."""

    def __init__(self, api: Api, namespace: str) -> None:
        self.api = api
        self.namespace = namespace
        self.refuse: Callable[[Json], Json | None] = lambda pod: None
        """The `waiting` state of a container that can't be started."""
        self.schedule: Callable[[Json], str] = lambda pod: ""
        """Why a pod can't be put on its node."""
        self._pods: Reflector[Json] = Reflector(api, paths.pods(namespace), lambda item: item, self._changed)
        self._busy: set[tuple[str, str]] = set()
        self._tasks = Tasks()

    async def __aenter__(self) -> Kubelet:
        self._tasks.start(self._pods.run(), name="kubelet")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._tasks.close()

    async def end(self, name: str, code: int) -> None:
        """The container ends with that exit code (128 + n for a signal)."""
        ended = {"exitCode": code, "reason": "Completed" if code == 0 else "Error"}
        await self._status(name, "Succeeded" if code == 0 else "Failed", {"terminated": ended})

    def _changed(self, old: Json | None, new: Json | None) -> None:
        if new is None:
            return
        phase = new["status"].get("phase")
        if "deletionTimestamp" in new["metadata"]:
            self._once(new, "end", self._finish)
        elif phase == "Pending" and not new["status"].get("containerStatuses"):
            self._once(new, "start", self._start)

    def _once(self, pod: Json, what: str, work: Callable[[Json], Any]) -> None:
        key = (pod["metadata"]["uid"], what)
        if key not in self._busy:
            self._busy.add(key)
            self._tasks.start(self._try(work, pod), name=f"{what} {pod['metadata']['name']}")

    async def _try(self, work: Callable[[Json], Any], pod: Json) -> None:
        try:
            await work(pod)
        except (ApiNotFound, ApiConflict):
            pass  # deleted meanwhile

    async def _start(self, pod: Json) -> None:
        name = pod["metadata"]["name"]
        if why := self.schedule(pod):
            condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": why}
            await self.api.patch(paths.pods(self.namespace, name, "status"), {"status": {"conditions": [condition]}})
            return
        affinity = pod["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        node = affinity["nodeSelectorTerms"][0]["matchFields"][0]["values"][0]
        target = {"apiVersion": "v1", "kind": "Node", "name": node}
        binding = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name}, "target": target}
        await self.api.create(paths.pods(self.namespace, name, "binding"), binding)
        waiting = self.refuse(pod)
        if waiting is not None:
            await self._status(name, "Pending", {"waiting": waiting})
            return
        resources = pod["spec"]["containers"][0]["resources"]
        await self._status(name, "Running", {"running": {"startedAt": "2026-01-01T00:00:00Z"}}, resources)
        if pod["metadata"]["labels"].get(names.OPERATOR_LABEL) == "exit3":
            await self.end(name, 3)

    async def _finish(self, pod: Json) -> None:
        name, metadata = pod["metadata"]["name"], pod["metadata"]
        if pod["status"].get("phase") == "Running":
            stubborn = metadata["labels"].get(names.OPERATOR_LABEL) == "stubborn"
            if stubborn:
                await asyncio.sleep(metadata["deletionGracePeriodSeconds"])
            await self.end(name, 137 if stubborn else 143)
        await self.api.delete(paths.pods(self.namespace, name), grace=0, uid=metadata["uid"])

    async def _status(self, name: str, phase: str, state: Json, resources: Json | None = None) -> None:
        container = {
            "name": "operator",
            "image": "image",
            "imageID": "image",
            "ready": "running" in state,
            "restartCount": 0,
            "state": state,
            "resources": resources or {},  # as a node says that can change them
        }
        status = {"status": {"phase": phase, "containerStatuses": [container]}}
        for _ in range(5):
            try:
                await self.api.patch(paths.pods(self.namespace, name, "status"), status)
                return
            except ApiConflict:
                continue
            except ApiError:
                await asyncio.sleep(0.2)
