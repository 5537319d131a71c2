"""A master of the tests, with scripted pods, whose store is a real API server."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from nomad import bundle, pipeline
from nomad.kubernetes.api import Api
from nomad.master.app import Master
from nomad.master.kube import resource
from nomad.master.kube.pipelines import PipelineWatch
from nomad.master.kube.store import KubernetesStore
from nomad.pipeline import PipelineSpec
from nomad.tasks import alongside
from tests.kubernetes.cluster.envtest import Envtest
from tests.master.fakepods import OPERATORS, Cluster

CRD = Path(__file__).parents[2] / "images/k8s/crd.yaml"

DEADLINE = 60.0
"""Seconds until a test gives up waiting."""


class Watched(Cluster):
    """One master after the other, in one namespace."""

    def __init__(self, envtest: Envtest, namespace: str, api: Api, state: Path) -> None:
        super().__init__(state)
        self.envtest = envtest
        self.namespace = namespace
        self.api = api
        self.store: KubernetesStore

    @asynccontextmanager
    async def lead(self, *, killed: bool = True) -> AsyncIterator[Master]:
        """A master that leads."""
        settings = replace(self.settings, pods=replace(self.settings.pods, outlive_master=killed))
        self.store = await KubernetesStore.open(self.api, self.namespace, "master-a")
        async with Master(
            settings, self.topology, runtime=self.runtime, store=self.store, clock=self.clock
        ) as self.master:
            watch = PipelineWatch(self.master, self.store, self.api, self.namespace, "master-a")
            async with alongside(watch.run()):
                yield self.master

    async def kubectl(self, *arguments: str, input: str | None = None) -> str:
        return await asyncio.to_thread(self.envtest.kubectl, "-n", self.namespace, *arguments, input=input)

    async def apply(self, *objects: dict[str, Any]) -> str:
        return await self.kubectl("apply", "-f", "-", input=yaml.safe_dump_all(objects))

    async def column(self, path: str, name: str = "p") -> str:
        """A field of a Pipeline; "" where there is none."""
        return await self.kubectl("get", "pipeline", name, "-o", f"jsonpath={{{path}}}", "--ignore-not-found")

    async def shows(self, path: str, wanted: str | Callable[[str], object], name: str = "p") -> None:
        """Wait until the field is what is wanted."""
        matches = wanted if callable(wanted) else wanted.__eq__
        end, found = time.monotonic() + DEADLINE, ""
        while not matches(found := await self.column(path, name)):
            assert time.monotonic() < end, f"{path} of {name} is {found!r}, and not {wanted}"
            await self.clock.advance(0.05)

    async def gone(self, name: str = "p") -> None:
        await self.shows(".metadata.name", "", name)

    def objects(self, id: str = "p", **options: Any) -> list[dict[str, Any]]:
        """What `nomad export` writes: the Secrets of the bundle, and the Pipeline."""
        data = bundle.make(pipeline.build(OPERATORS), self.master.signing_key)
        found = bundle.read(data, bundle.public_key(self.master.signing_key))
        spec: PipelineSpec = found.spec(id, options.pop("start", "edge"), options.pop("end", "cloud"))
        return resource.exported(spec, found.digest, data, **{"moves": True, "pins": {}, **options})


def define(envtest: Envtest) -> None:
    """Have the API server know what a Pipeline is."""
    envtest.kubectl("apply", "-f", str(CRD))
    envtest.kubectl("wait", "--for=condition=Established", "crd/pipelines.nomad.dev", "--timeout=30s")


def refused(call: Callable[[], object]) -> str:
    """What kubectl says when it fails."""
    try:
        call()
    except (RuntimeError, subprocess.CalledProcessError) as exc:
        return str(exc)
    raise AssertionError("it wasn't refused")
