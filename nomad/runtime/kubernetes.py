"""Pods of a Kubernetes cluster, on its own nodes.

One pod for each operator: a warm one that waited for it on its node, or a new one. What is in the cluster is the truth:
two reflectors keep a copy of the operator pods and of the nodes, and everything that is asked here is answered from
it; another master finds the same. Pods that have ended stay, for their logs, until their operator has `keep_ended`
newer ones or the pipeline is forgotten; those whose objects somebody deletes are told as ended.

    manifests, policies     what the cluster is asked for (pure)
    kubepods, kubenodes     what is made of what it shows (pure)
    kubestart, warm         asking for pods; those that wait for an operator
    kubelogs, kubesecrets   what pods print; what they can't be given

Opened by the master that leads, and only by that one: it keeps the waiting pods, too. Called by the master's loop.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import random
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from typing import Any, Self

from nomad.clock import Clock, SystemClock
from nomad.errors import ApiError, ApiExists, ApiUnavailable, PodStartError, StateError
from nomad.fanout import Fanout
from nomad.kubernetes import names, paths
from nomad.kubernetes.api import Api, Json
from nomad.kubernetes.reflector import Reflector
from nomad.runtime import kubelogs, kubenodes, kubepods, kubesecrets, kubestart, manifests
from nomad.runtime.base import NodeInfo, ObservedPod, PodPhase, PodSpec
from nomad.runtime.kubenodes import KubeNode, Nodes
from nomad.runtime.kubepods import KubePod
from nomad.runtime.kubestart import Starter
from nomad.runtime.manifests import Boot
from nomad.runtime.warm import STUCK, WarmPool
from nomad.settings import Kubernetes
from nomad.tasks import Tasks, alongside

log = logging.getLogger(__name__)

SELECTOR = f"{names.APP}={names.NOMAD},{names.COMPONENT}={names.OPERATOR}"


class KubernetesRuntime:
    """`nomad.runtime.base.Runtime`, `Distant`, `Apart` and `Machines` on a cluster. Made by `open`."""

    def __init__(
        self,
        api: Api,
        settings: Kubernetes,
        boot: Boot,
        key_of: Callable[[str], bytes],
        *,
        keep_ended: int = 3,
        clock: Clock | None = None,
        rng: random.Random | None = None,
    ) -> None:
        clock, rng = clock or SystemClock(), rng or random.Random()
        self._api = api
        self._settings = settings
        self._namespace = settings.namespace
        self._keep_ended = keep_ended
        self._clock = clock
        self._nodes = Nodes(clock, settings.node_grace)
        self._node_list: Reflector[KubeNode] = Reflector(
            api,
            paths.nodes(),
            functools.partial(kubenodes.take, tolerations=settings.tolerations),
            self._node_changed,
            clock=clock,
            rng=rng,
        )
        self._pods: Reflector[KubePod] = Reflector(
            api,
            paths.pods(self._namespace),
            kubepods.take,
            self._pod_changed,
            params={"labelSelector": SELECTOR},
            clock=clock,
            rng=rng,
        )
        self._starter = Starter(api, settings, boot, key_of, self._pods.seen, clock)
        self._pool = WarmPool(
            api,
            settings,
            self._nodes,
            self._starter,
            self._pods.seen,
            image=self._image_for(settings.warm_python) if settings.warm else "",
            clock=clock,
            rng=rng,
        )
        self._objects: dict[str, str] = {}  # Nomad's id of a pod -> its name
        self._seen: dict[str, ObservedPod] = {}  # all that `list` gives, by Nomad's id
        self._of_operator: dict[tuple[str, str], list[str]] = {}  # ids of those, in the order of their epochs
        self._stopping: dict[str, int] = {}  # uids of pods that this master has asked to end, within how many seconds
        self._discarded: set[str] = set()  # uids of pods that nobody wants to see any more
        self._judging: set[str] = set()  # uids of pods that are given a little more time to start
        self._changes: Fanout[ObservedPod] = Fanout()
        self._tasks = Tasks()
        self._watches: list[asyncio.Task[None]] = []
        self.owner: Callable[[str], Json | None] = lambda pipeline: None
        """The owner reference of what belongs to a pipeline; of "": of what belongs to none."""
        self.edges: Callable[[str], Sequence[tuple[str, str]]] = lambda pipeline: ()
        """A pipeline's graph."""
        self._pool.owner = lambda: self.owner("")

    @classmethod
    async def open(
        cls,
        api: Api,
        settings: Kubernetes,
        boot: Boot,
        key_of: Callable[[str], bytes],
        *,
        keep_ended: int = 3,
        clock: Clock | None = None,
        rng: random.Random | None = None,
    ) -> Self:
        """A runtime that has seen the cluster's nodes and pods. Waits for the API as long as that takes.

        `key_of`: the key of the process of that name, which is its pod's in the cluster.
        """
        runtime = cls(api, settings, boot, key_of, keep_ended=keep_ended, clock=clock, rng=rng)
        try:
            await runtime._watch(runtime._node_list, "watch nodes")  # first: pods name their nodes by labels
            await runtime._watch(runtime._pods, "watch pods")
        except BaseException:
            await runtime.close()
            raise
        runtime._pool.look_at(runtime._nodes.ids())
        runtime._watches.append(runtime._tasks.start(runtime._pool.run(), name="keep warm pods"))
        return runtime

    async def _watch(self, reflector: Reflector[Any], name: str) -> None:
        """Returns once it has the list."""
        self._watches.append(self._tasks.start(reflector.run(), name=name))
        async with alongside(self.watching()):
            await reflector.synced()

    async def watching(self) -> None:
        """Until `close`. Raises what a watch ended with: the runtime is blind then, and its master is to end."""
        ended, _ = await asyncio.wait(self._watches, return_when=asyncio.FIRST_COMPLETED)
        for task in ended:
            if not task.cancelled():
                task.result()

    def knows(
        self,
        connected: Callable[[str], bool],
        edges: Callable[[str], Sequence[tuple[str, str]]],
        missed: Callable[[], float],
    ) -> None:
        """`connected(name)`: whether that process has reported to the master, so that it can be put to work at once;
        `edges(pipeline)`: its graph; `missed()`: seconds in which a process that is there would have been heard.
        """
        self._pool.connected, self.edges, self._nodes.missed = connected, edges, missed

    # What the runtime knows

    @property
    def nodes(self) -> Sequence[NodeInfo]:
        return self._nodes.all()

    async def list(self) -> Sequence[ObservedPod]:
        return tuple(self._seen.values())

    def watch(self) -> AsyncIterator[ObservedPod]:
        return self._changes.subscribe()

    def pod_of(self, name: str) -> str | None:
        pod = self._pods.items.get(name)
        if pod is None:
            return None
        return "" if pod.warm else pod.pod or None

    def heard(self, name: str) -> None:
        """The process of this name, or the agent of a node (`agent:<host>`), has just said something."""
        kind, colon, host = name.partition(":")
        if colon:
            if kind == names.AGENT and (node := self._nodes.at(host)) is not None:
                self._nodes.heard(node)
        elif (pod := self._pods.items.get(name)) is not None:
            self._nodes.heard(self._nodes.named(pod.node))

    def node_of(self, name: str) -> str | None:
        return self._nodes.at(name)

    @property
    def folders_follow(self) -> bool:
        return bool(self._settings.storage_class)

    def workdir(self, pipeline: str, operator: str) -> str:
        return manifests.CLAIM_FOLDER if self._settings.storage_class else names.WORK_FOLDER

    def listen_address(self, pod_id: str) -> str:
        return f"{self._settings.transport}://0.0.0.0:{names.DATA_PORT}"

    async def logs(self, pod_id: str, *, tail: int | None = None) -> Sequence[str]:
        name = self._objects.get(pod_id)
        if name is None:
            return []
        return await kubelogs.tail(self._api, self._namespace, name, tail)

    def follow(self, pod_id: str) -> AsyncIterator[str]:
        name = self._objects.get(pod_id, "")
        return kubelogs.follow(self._api, self._namespace, name, lambda: self._pods.items.get(name), self._clock)

    async def missing_secrets(self, references: Collection[str]) -> Sequence[str]:
        return await kubesecrets.missing(self._api, self._namespace, references)

    # What it does

    async def start(self, spec: PodSpec) -> None:
        until = self._clock.now() + kubestart.PATIENCE
        tried = existed = False
        while True:
            try:
                if tried and (given := await self._starter.find(spec)):
                    self._pool.enlarge(given, spec)
                if spec.id not in self._seen:
                    tried = True
                    await self._start(spec)
                return
            except ApiUnavailable as exc:
                # Another node wouldn't help, and another try must not make a second pod.
                if self._clock.now() >= until:
                    raise PodStartError(f"pod {spec.id} can't be started: {exc}") from exc
                log.info("pod %s waits for the cluster's API: %s", spec.id, exc)
            except ApiExists as exc:
                # Perhaps by this request: the client sends again what it is told to, done or not.
                if existed:
                    raise PodStartError(f"pod {spec.id} can't be started: there is another pod: {exc}") from exc
                existed = True
                continue
            except ApiError as exc:
                raise PodStartError(f"pod {spec.id} can't be started: {exc}") from exc
            await self._clock.sleep(kubestart.RETRY)

    async def _start(self, spec: PodSpec) -> None:
        node = self._nodes.get(spec.node)
        if node is None:
            there = ", ".join(sorted(self._nodes.ids()))
            raise PodStartError(f"pod {spec.id}: there is no node {spec.node!r}; there are {there or 'none'}")
        if not node.info.schedulable:
            raise PodStartError(f"pod {spec.id}: the node {spec.node!r} takes no new pods: it is cordoned or tainted")
        if not node.info.ready:
            raise PodStartError(f"pod {spec.id}: the node {spec.node!r} is lost")
        image = spec.image or self._image_for(spec.python)
        if not image:
            there = ", ".join(sorted(self._settings.images)) or "none"
            raise PodStartError(
                f"pod {spec.id}: there is no image for Python {spec.python}; there are some for {there}"
            )
        self._prune(spec.pipeline, spec.operator)
        owner, edges = self.owner(spec.pipeline), self.edges(spec.pipeline)
        await self._starter.guard(spec.pipeline, edges, owner, either_way=self._nodes.one_way)
        if await self._pool.claim(spec, image, owner):
            return
        if self._settings.storage_class:
            await self._starter.keep_folder(spec, owner)
        body = manifests.operator_pod(spec, self._settings, host=node.host, image=image, owner=owner)
        await self._starter.make(body, spec.epoch)

    async def stop(self, pod_id: str, *, grace: float) -> None:
        pod = self._pods.items.get(self._objects.get(pod_id, ""))
        if pod is None or pod.phase is PodPhase.EXITED:
            return
        seconds = max(1, math.ceil(grace))  # 0 would mean: forget the pod without waiting for its end
        if pod.deleting and self._stopping.get(pod.uid, seconds + 1) <= seconds:
            return  # it was asked already, and its node may be away for long
        self._stopping[pod.uid] = seconds
        await self._starter.delete(pod.name, pod.uid, seconds)

    async def forget(self, pipeline: str) -> None:
        ids = [pod_id for key, ids in self._of_operator.items() if key[0] == pipeline for pod_id in ids]
        try:
            for pod_id in ids:
                seen = self._seen.get(pod_id)
                if seen is not None and seen.phase is PodPhase.EXITED:
                    await self._discard(pod_id)
            await self._starter.forget(pipeline, SELECTOR)
        except ApiError as exc:
            raise StateError(f"what is left of pipeline {pipeline} can't be deleted yet: {exc}") from exc

    async def close(self) -> None:
        await self._tasks.close()
        await self._pool.close()
        self._changes.close()

    # Inside

    def _image_for(self, python: str) -> str:
        """The image for code of a version of Python; "" is any, so the newest. "" when there is none."""
        images = self._settings.images
        if python:
            return images.get(python, "")
        newest = max(images, key=lambda version: [int(part) for part in version.split(".")], default="")
        return images.get(newest, "")

    def _prune(self, pipeline: str, operator: str) -> None:
        """Keep the newest ended pods of an operator only; what can't be deleted now is tried again the next time."""

        async def discard(pod_id: str) -> None:
            try:
                await self._discard(pod_id)
            except ApiError as exc:
                log.warning("pod %s, which has ended, can't be deleted yet: %s", pod_id, exc)

        ids = self._of_operator.get((pipeline, operator), [])
        ended = [pod_id for pod_id in ids if self._seen[pod_id].phase is PodPhase.EXITED]
        for pod_id in ended[: max(0, len(ended) - self._keep_ended)]:
            self._tasks.start(discard(pod_id), name=f"delete {pod_id}")

    async def _discard(self, pod_id: str) -> None:
        """Delete what is left of an ended pod. Raises `ApiError`; it is shown until that has worked."""
        pod = self._pods.items.get(self._objects.get(pod_id, ""))
        if pod is not None:
            await self._starter.delete(pod.name, pod.uid, 1)
            if (now := self._pods.items.get(pod.name)) is not None and now.uid == pod.uid:
                self._discarded.add(pod.uid)
        self._drop(pod_id)

    # What the cluster shows

    def _node_changed(self, old: KubeNode | None, new: KubeNode | None) -> None:
        self._pool.look_at(self._nodes.changed(old, new))

    def _pod_changed(self, old: KubePod | None, new: KubePod | None) -> None:
        self._pool.changed(old, new)
        if new is not None and new.pod and new.uid not in self._discarded:
            self._objects[new.pod] = new.name
            self._judge(new)
            self._show(new)
        if new is None and old is not None:
            self._stopping.pop(old.uid, None)
            self._discarded.discard(old.uid)
            if self._objects.get(old.pod) == old.name:
                del self._objects[old.pod]
            seen = self._seen.get(old.pod)
            if seen is not None and seen.phase is not PodPhase.EXITED:
                self._tell(self._ended(seen, "was deleted, and nobody has seen how it ended"))

    def _show(self, pod: KubePod) -> None:
        before = self._seen.get(pod.pod)
        if before is not None and before.failed:
            return
        leaving = pod.alive is False and pod.phase is not PodPhase.EXITED and pod.uid not in self._stopping
        outdated = pod.python is not None and self._image_for(pod.python) not in ("", pod.image)
        now = pod.observed(self._nodes.named(pod.node), leaving=leaving, outdated=outdated)
        if before is None:
            ids = self._of_operator.setdefault((pod.pipeline, pod.operator), [])
            ids.append(pod.pod)
            ids.sort(key=lambda pod_id: int(pod_id.rpartition("-e")[2]))
        if now != before:
            self._tell(now)

    def _tell(self, pod: ObservedPod) -> None:
        self._seen[pod.id] = pod
        self._changes.publish(pod)

    def _ended(self, pod: ObservedPod, reason: str, *, failed: bool = False) -> ObservedPod:
        return ObservedPod(pod.id, PodPhase.EXITED, pod.node, pod.epoch, reason=reason, failed=failed)

    def _drop(self, pod_id: str) -> None:
        """Show it no more."""
        seen = self._seen.pop(pod_id, None)
        self._objects.pop(pod_id, None)
        if seen is not None:
            key = (pod_id.partition(".")[0], pod_id.partition(".")[2].rpartition("-e")[0])
            self._of_operator[key].remove(pod_id)
            if not self._of_operator[key]:
                del self._of_operator[key]

    def _judge(self, pod: KubePod) -> None:
        """Watch a pod that something keeps from starting."""
        if pod.stuck and pod.alive and pod.uid not in self._judging:
            self._judging.add(pod.uid)
            self._tasks.start(self._give_up(pod), name=f"wait for {pod.pod}")

    async def _give_up(self, pod: KubePod) -> None:
        """A pod that still can't be started after a while won't be: the master may try another node."""
        try:
            await self._clock.sleep(0.0 if pod.hopeless else STUCK)
        finally:
            self._judging.discard(pod.uid)
        now, seen = self._pods.items.get(pod.name), self._seen.get(pod.pod)
        if now is None or seen is None or now.uid != pod.uid or not now.stuck or not now.alive:
            return
        self._stopping[pod.uid] = 1
        self._tell(self._ended(seen, now.reason, failed=True))
        try:
            await self._starter.delete(now.name, now.uid, 1)
        except ApiError as exc:
            log.warning("pod %s, which can't be started, can't be deleted either: %s", pod.name, exc)
