"""`nomad master` as processes at an API server without nodes, each with the rights that its manifests give it, and
operator pods that dial in over TLS and do as they are told.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import yaml

import nomad
from nomad.clock import SystemClock
from nomad.errors import ApiNotFound
from nomad.kubernetes import names, paths
from nomad.kubernetes.api import Api
from nomad.runtime.base import PodSpec
from nomad.tasks import Tasks
from nomad.transport import certificates as tls
from tests.kubernetes.cluster.envtest import Envtest
from tests.kubernetes.kubelet import Json, Kubelet, make_node
from tests.master.fakepods import Pod, Pods
from tests.ports import free_port

INIT = Path(__file__).parents[2] / "images" / "k8s" / "manifests" / "1-init.yaml"
DEADLINE = 60.0
"""Seconds until a test gives up waiting."""


def init_objects(namespace: str) -> list[Json]:
    """What init.sh puts into a cluster, for another namespace."""
    found = []
    for item in yaml.safe_load_all(INIT.read_text()):
        if item is None or item["kind"] == "NetworkPolicy":
            continue
        if "namespace" in item["metadata"]:
            item["metadata"]["namespace"] = namespace
        if item["kind"].startswith("ClusterRole"):
            item["metadata"]["name"] = f"{namespace}-{item['metadata']['name']}"
            if "roleRef" in item:
                item["roleRef"]["name"] = f"{namespace}-{item['roleRef']['name']}"
        for subject in item.get("subjects", ()):
            subject["namespace"] = namespace
        found.append(item)
    return found


class Host(Kubelet):
    """Runs operator pods: each dials the master that its Secret names, as the process in a container would."""

    def __init__(self, api: Api, namespace: str, folder: Path) -> None:
        super().__init__(api, namespace)
        self.pods = Pods(SystemClock())
        self._folder = folder
        self._running = Tasks()
        self._by_name: dict[str, asyncio.Task[None]] = {}

    async def __aexit__(self, *_: object) -> None:
        await super().__aexit__()
        await self._running.close()
        tls.use(None)

    def pod(self, name: str) -> Pod:
        """The process in the pod of that name."""
        return self.pods[name]

    async def _start(self, pod: Json) -> None:
        name = pod["metadata"]["name"]
        if pod["metadata"]["labels"].get(names.COMPONENT) == names.OPERATOR:
            await super()._start(pod)
            self._by_name[name] = self._running.start(self._run(name), name=f"pod {name}")

    async def _finish(self, pod: Json) -> None:
        if (task := self._by_name.pop(pod["metadata"]["name"], None)) is not None:
            task.cancel()
        await super()._finish(pod)

    async def _run(self, name: str) -> None:
        boot = json.loads((await self._secret(name))["boot"])
        for file, content in (await self._secret(names.POD_TLS_SECRET)).items():
            (self._folder / file).write_bytes(content)
        tls.use(self._folder)
        spec = PodSpec(
            id=boot["pod"], pipeline="", operator="", epoch=boot["epoch"], node="", control=boot["control"],
            key=bytes.fromhex(boot["key"]), verify_key=bytes.fromhex(boot["verify_key"]), master_timeout=60.0,
        )  # fmt: skip
        code = await self.pods.host(spec)
        self._by_name.pop(name, None)
        await self.end(name, 128 - code if code < 0 else code)

    async def _secret(self, name: str) -> dict[str, bytes]:
        async with asyncio.timeout(DEADLINE):
            while True:
                try:
                    secret = await self.api.get(paths.secrets(self.namespace, name))
                    return {key: base64.b64decode(value) for key, value in secret["data"].items()}
                except ApiNotFound:
                    await asyncio.sleep(0.05)


def image_environment() -> dict[str, str]:
    """What the master's image sets for the interpreter and the C library."""
    text = (Path(__file__).parents[2] / "images" / "Dockerfile.master").read_text()
    found = dict(re.findall(r"^ +((?:MALLOC|PYTHON)\w+)=(\w+)", text, re.MULTILINE))
    assert len(found) == 4, found
    return found


class MasterProcess:
    """One `nomad master`."""

    def __init__(self, identity: str, url: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self.identity = identity
        self.url = url
        self.process = process
        self._log = log

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def leads(self) -> bool:
        return "leads: REST" in self.log

    async def get(self, path: str) -> int:
        """The status of an answer, 0 without one."""
        try:
            async with aiohttp.ClientSession() as session, session.get(f"{self.url}{path}") as response:
                return response.status
        except aiohttp.ClientError:
            return 0

    async def end(self, number: int = signal.SIGTERM) -> int:
        if self.process.returncode is None:
            self.process.send_signal(number)
        async with asyncio.timeout(DEADLINE):
            return await self.process.wait()


class World:
    """A namespace with what `init.sh` makes, nodes, and masters on it."""

    def __init__(self, env: Envtest, api: Api, namespace: str, folder: Path) -> None:
        self.env = env
        self.api = api
        self.namespace = namespace
        self.folder = folder
        self.masters: list[MasterProcess] = []
        self.nodes = [f"{tier}-{namespace}" for tier in ("edge", "fog", "cloud")]
        self.control = f"tls://127.0.0.1:{free_port()}"

    async def prepare(self) -> None:
        await asyncio.to_thread(self.env.apply, *init_objects(self.namespace))
        self.kubeconfig = await asyncio.to_thread(self.env.kubeconfig_for, "nomad-master", self.namespace)
        for node in self.nodes:
            await make_node(self.api, node, **{names.TIER_LABEL: node.partition("-")[0]})

    async def start(self, identity: str = "", *options: str) -> MasterProcess:
        """A master; with an identity, in a pod of that name."""
        if identity:
            await self.master_pod(identity)
        port = free_port()
        log = self.folder / f"master-{len(self.masters)}.log"
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "nomad", "master", "--kubeconfig", str(self.kubeconfig),
                "--namespace", self.namespace, "--identity", identity, "--control", self.control,
                "--host", "127.0.0.1", "--port", str(port), "--images", "3.11=operator:3.11", *options,
                stdout=output, stderr=output, env={**os.environ, **image_environment()},
            )  # fmt: skip
        master = MasterProcess(identity, f"http://127.0.0.1:{port}", process, log)
        self.masters.append(master)
        return master

    async def leads(self, master: MasterProcess) -> nomad.Cluster:
        """A client of a master, once that leads."""
        await self.until(lambda: master.leads or master.process.returncode is not None)
        assert master.leads, master.log
        secret = await self.api.get(paths.secrets(self.namespace, names.MASTER_NAME))
        data = {key: base64.b64decode(value).decode() for key, value in secret["data"].items()}
        return nomad.connect(master.url, data["token"], signing_key=bytes.fromhex(data["signing_key"]))

    async def until(self, condition: Callable[[], Any]) -> None:
        end = time.monotonic() + DEADLINE
        while not condition():
            assert time.monotonic() < end, "\n".join(f"--- {m.identity}\n{m.log}" for m in self.masters)
            await asyncio.sleep(0.02)

    async def phase(self, cluster: nomad.Cluster, id: str, phase: str) -> Any:
        """The pipeline, once it is in that phase."""
        end = time.monotonic() + DEADLINE
        while (view := await (await cluster.pipeline(id)).status()).phase != phase:
            assert time.monotonic() < end, f"{view}\n" + "\n".join(m.log for m in self.masters)
            await asyncio.sleep(0.05)
        return view

    async def objects(self, path: Callable[[str], str], **labels: str) -> dict[str, Json]:
        """What there is of a kind, by name."""
        selector = ",".join(f"{name}={value}" for name, value in labels.items())
        found, _ = await self.api.list(path(self.namespace), {"labelSelector": selector} if selector else None)
        return {item["metadata"]["name"]: item for item in found}

    async def master_pod(self, name: str) -> None:
        """A pod of the masters' Deployment, as its node has started it."""
        body = {
            "metadata": {"name": name, "labels": {names.APP: names.NOMAD, names.COMPONENT: names.MASTER}},
            "spec": {"containers": [{"name": "master", "image": "none"}], "automountServiceAccountToken": False},
        }
        await self.api.create(paths.pods(self.namespace), body)
        await container(self.api, self.namespace, name)


async def container(api: Api, namespace: str, name: str, *, died: bool = False) -> None:
    """What a kubelet says of a master's container: that it runs, or that it has just ended."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    state: dict[str, Any] = {"state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}}}
    if died:
        ended = {"exitCode": 137, "startedAt": "2026-01-01T00:00:00Z", "finishedAt": now}
        state = {"state": {"waiting": {"reason": "CrashLoopBackOff"}}, "lastState": {"terminated": ended}}
    status = {"name": "master", "image": "none", "imageID": "", "ready": False, "restartCount": 0, **state}
    body = {"status": {"phase": "Running", "containerStatuses": [status]}}
    await api.patch(paths.pods(namespace, name, "status"), body)


@asynccontextmanager
async def world(env: Envtest, namespace: str, folder: Path) -> AsyncIterator[tuple[World, Host]]:
    (folder / "tls").mkdir()
    async with Api.open(env.kubeconfig) as api:
        made = World(env, api, namespace, folder)
        await made.prepare()
        try:
            async with Host(api, namespace, folder / "tls") as host:
                try:
                    yield made, host
                finally:
                    await asyncio.gather(*(master.end(signal.SIGKILL) for master in made.masters))
        finally:
            for node in made.nodes:
                await api.delete(paths.nodes(node))
