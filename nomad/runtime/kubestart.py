"""Asks a cluster for pods and for what belongs to them, step by step. Called by `nomad.runtime.kubernetes` and `warm`.

An API that doesn't answer may have done what it was asked for: `find` looks, before anything is asked for again.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence

from nomad.clock import Clock
from nomad.errors import ApiConflict, ApiError, ApiExists, ApiUnavailable
from nomad.kubernetes import names, paths
from nomad.kubernetes.api import Api, Json
from nomad.runtime import manifests, policies
from nomad.runtime.base import PodSpec
from nomad.runtime.manifests import Boot
from nomad.settings import Kubernetes

log = logging.getLogger(__name__)

PATIENCE = 90.0
"""Seconds that an API which doesn't answer is waited for: it may be restarted under way."""

RETRY = 1.0
"""Seconds between two tries."""


class Starter:
    """Creates objects of pipelines. All methods raise `ApiError`."""

    def __init__(
        self,
        api: Api,
        settings: Kubernetes,
        boot: Boot,
        key_of: Callable[[str], bytes],
        seen: Callable[[Json], None],
        clock: Clock,
    ) -> None:
        """`key_of`: the key of the process of that name. `seen` takes in what the API answered about a pod."""
        self._api = api
        self._settings = settings
        self._namespace = settings.namespace
        self._boot = boot
        self._key_of = key_of
        self._seen = seen
        self._clock = clock
        self._guards: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)  # by pipeline
        self._guarded: dict[str, object] = {}  # by pipeline: what the network policies that are in force were made of

    async def make(self, body: Json, epoch: int) -> None:
        """Create a pod, and the secret that it waits for."""
        pod = await self._api.create(paths.pods(self._namespace), body)
        self._seen(pod)
        try:
            await self._equip(pod, epoch)
        except ApiError:
            await self.delete(pod["metadata"]["name"], pod["metadata"]["uid"], 1)
            raise

    async def find(self, spec: PodSpec) -> str:
        """Take in what an earlier request has made of `spec` after all: the name of the waiting pod that was given to
        it, "" when none was.
        """
        labels = manifests.operator_labels(spec.pipeline, spec.operator, spec.epoch, spec.node)
        wanted = (names.PIPELINE_LABEL, names.OPERATOR_LABEL, names.EPOCH_LABEL)
        chosen = {"labelSelector": ",".join(f"{key}={labels[key]}" for key in wanted)}
        found, _ = await self._api.list(paths.pods(self._namespace), chosen)
        given = ""
        for pod in found:
            if (name := pod["metadata"]["name"]) == manifests.pod_name(spec.pipeline, spec.operator, spec.epoch):
                await self._equip(pod, spec.epoch)
            else:
                given = name
            self._seen(pod)
        return given

    async def delete(self, name: str, uid: str, grace: int) -> None:
        """Delete that pod, and no later one of its name; `grace` in seconds."""
        try:
            await self._api.delete(paths.pods(self._namespace, name), grace=grace, uid=uid)
        except ApiConflict:
            pass

    async def guard(
        self, pipeline: str, edges: Sequence[tuple[str, str]], owner: Json | None, *, either_way: bool
    ) -> None:
        """See to the network policies of a pipeline before its first pod starts."""
        made_of = tuple(edges), either_way
        async with self._guards[pipeline]:
            if self._guarded.get(pipeline) == made_of:
                return
            wanted = policies.network_policies(pipeline, edges, owner=owner, either_way=either_way)
            path = functools.partial(paths.networkpolicies, self._namespace)
            await asyncio.gather(*(self._api.apply(path(found["metadata"]["name"]), found) for found in wanted))
            self._guarded[pipeline] = made_of

    async def keep_folder(self, spec: PodSpec, owner: Json | None) -> None:
        """See to it that the operator has a folder that outlives its pods, of its own."""
        claim = manifests.work_claim(spec, self._settings, owner)
        name, labels = claim["metadata"]["name"], claim["metadata"]["labels"]
        try:
            await self._api.create(paths.claims(self._namespace), claim)
        except ApiExists:
            metadata = (await self._api.get(paths.claims(self._namespace, name)))["metadata"]
            if not labels.items() <= (metadata.get("labels") or {}).items():
                raise ApiConflict(
                    f"the PersistentVolumeClaim {name} isn't Nomad's, and the operator's folder would be called the "
                    "same: call the pipeline or the operator otherwise"
                ) from None
            owners = {found["uid"] for found in metadata.get("ownerReferences") or ()}
            if "deletionTimestamp" in metadata or (owner is not None and owners and owner["uid"] not in owners):
                # What is noted there is of messages that this one hasn't had; it goes by itself.
                raise ApiUnavailable(
                    f"the PersistentVolumeClaim {name} of an earlier pipeline of that name isn't gone yet"
                ) from None

    async def forget(self, pipeline: str, selector: str) -> None:
        """Delete everything of a pipeline but its pods."""
        chosen = {"labelSelector": f"{selector},{names.PIPELINE_LABEL}={manifests.label(pipeline)}"}
        await self._api.delete(paths.networkpolicies(self._namespace), params=chosen)
        if self._settings.storage_class:
            await self._api.delete(paths.claims(self._namespace), params=chosen)
        self._guarded.pop(pipeline, None)
        self._guards.pop(pipeline, None)

    async def _equip(self, pod: Json, epoch: int) -> None:
        """Give a pod its secret, unless it has it."""
        secret = manifests.boot_secret(pod, epoch, self._key_of(pod["metadata"]["name"]), self._boot)
        until = self._clock.now() + PATIENCE
        while True:
            try:
                await self._api.create(paths.secrets(self._namespace), secret)
                return
            except ApiExists:
                return
            except ApiUnavailable:
                if self._clock.now() >= until:
                    raise
            await self._clock.sleep(RETRY)
