"""Nomad on the real cluster, installed as a user does it: the repository's images, and the scripts of images/k8s."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

import nomad
from benchmarks.kubernetes import Count, counted, numbers, until, work
from nomad.client import Cluster, PipelineHandle
from nomad.kubernetes import names
from tests.kubernetes.cluster import binaries, images
from tests.kubernetes.cluster.machine import TREE
from tests.kubernetes.cluster.processes import ClusterError
from tests.kubernetes.cluster.real import NODES, Real

SCRIPTS = TREE / "images" / "k8s"
NODE_PORT = 30_800
"""Beside that of an installation made by hand."""


class Installed:
    """Nomad in a namespace of its own. Made by `install`, removed by `uninstall`."""

    def __init__(self, cluster: Real, namespace: str) -> None:
        self.cluster = cluster
        self.namespace = namespace
        self.url = f"http://{cluster.nodes['cloud'].place.address}:{NODE_PORT}"
        self.master_image = "nomad-master:dev"
        self.operator_image = "nomad-operator:dev-py3.11"
        self.warm = 1

    def install(self) -> None:
        """Build what isn't built, and run the scripts. Raises `ClusterError` with what they said."""
        provide_images(self.cluster)
        self.script("init.sh")
        self.start()

    def start(self) -> None:
        """Start it, or change its images and how many pods wait."""
        self.script(
            "startup.sh",
            IMAGE=self.master_image,
            OPERATOR_IMAGES=f"3.11={self.operator_image}",
            WARM=str(self.warm),
            NODE_PORT=str(NODE_PORT),
        )

    def uninstall(self) -> None:
        self.script("cleanup.sh")

    def script(self, name: str, **environment: str) -> str:
        """What one of the scripts prints."""
        done = subprocess.run(
            [str(SCRIPTS / name)],
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=400,
        )
        if done.returncode:
            raise ClusterError(f"{name} failed:\n{done.stdout}{done.stderr}")
        return done.stdout

    @property
    def environment(self) -> dict[str, str]:
        """In which the scripts, kubectl and nomad find it."""
        programs = binaries.kubernetes()
        return {
            **os.environ,
            "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "KUBECONFIG": str(self.cluster.kubeconfig),
            "NAMESPACE": self.namespace,
            "NOMAD_MASTER": self.url,
        }

    @property
    def credentials(self) -> tuple[str, bytes]:
        """The token, and the key that signs operators' code."""
        data = self.cluster.get("secret", names.MASTER_NAME, "-n", self.namespace)["data"]
        token, key = (base64.b64decode(data[name]).decode() for name in ("token", "signing_key"))
        return token, bytes.fromhex(key)

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[Cluster]:
        token, key = self.credentials
        async with nomad.connect(self.url, token, signing_key=key) as cluster:
            await until(lambda: self._sees_nodes(cluster))
            yield cluster

    @staticmethod
    async def _sees_nodes(cluster: Cluster) -> bool:
        return {node.id for node in await cluster.nodes() if node.ready} >= set(NODES)

    @asynccontextmanager
    async def counting(self, cluster: Cluster, id: str, *, moves: bool = False) -> AsyncIterator[PipelineHandle]:
        """A pipeline from edge to cloud, at work, whose last operator counts what it misses and what it gets twice."""
        operators = [numbers(), work, Count()]
        pipeline = await cluster.submit(operators, start="edge", end="cloud", id=id, moves=moves)
        try:
            await counted(pipeline)
            yield pipeline
        finally:

            async def removed() -> bool:
                """Whichever master leads by now."""
                if any(view.id == id for view in await cluster.pipelines()):
                    await pipeline.remove()
                return True

            await until(removed)

    def kubectl(self, *args: str) -> str:
        return self.cluster.kubectl("-n", self.namespace, *args)

    def pod_of(self, pipeline: str, operator: str) -> str:
        """The name of the one pod that an operator has. Raises `ClusterError`."""
        selector = f"{names.PIPELINE_LABEL}={pipeline},{names.OPERATOR_LABEL}={operator}"
        found = self.kubectl(
            "get",
            "pods",
            "-l",
            selector,
            "--field-selector=status.phase=Running",
            "-o",
            "jsonpath={.items[*].metadata.name}",
        ).split()
        if len(found) != 1:
            raise ClusterError(f"{operator} has the pods {found}")
        return found[0]

    def images(self, selector: str) -> set[str]:
        """Those of the pods that run and stay."""
        found = self.cluster.get("pods", "-n", self.namespace, "-l", selector, "--field-selector=status.phase=Running")
        return {
            pod["spec"]["containers"][0]["image"]
            for pod in found["items"]
            if "deletionTimestamp" not in pod["metadata"]
        }

    @asynccontextmanager
    async def masters_with(self, **environment: str) -> AsyncIterator[None]:
        """Masters that have these variables beside their own."""
        await self._set(*(f"{name}={value}" for name, value in environment.items()))
        try:
            yield
        finally:
            await self._set(*(f"{name}-" for name in environment))

    async def _set(self, *changes: str) -> None:
        self.kubectl("set", "env", f"deployment/{names.MASTER_NAME}", *changes)
        await asyncio.to_thread(self.kubectl, "rollout", "status", f"deployment/{names.MASTER_NAME}", "--timeout=180s")
        async with self.connected():
            return

    async def ways(self) -> dict[str, int]:
        """How many pods are connected with the master by which way; none while no master leads."""
        headers = {"Authorization": f"Bearer {self.credentials[0]}"}
        try:
            async with aiohttp.ClientSession(headers=headers) as session, session.get(f"{self.url}/metrics") as answer:
                text = await answer.text()
        except aiohttp.ClientError:
            text = ""
        found = re.findall(r'^nomad_pods_connected\{way="(\w+)"\} (\d+)', text, re.MULTILINE)
        return {"direct": 0, "agent": 0} | {way: int(count) for way, count in found}

    def leaders(self) -> list[str]:
        """The pods of masters that lead."""
        return self.kubectl(
            "get", "pods", "-l", f"{names.LEADER_LABEL}=true", "-o", "jsonpath={.items[*].metadata.name}"
        ).split()


def provide_images(cluster: Real) -> None:
    """Have the images of the present sources on all nodes; builds them unless that was done for the same sources."""
    digest = hashlib.sha256()
    listed = subprocess.run(
        ["git", "ls-files", "nomad", "images", "setup.cfg", "pyproject.toml"],
        cwd=TREE,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in sorted(listed.stdout.split()):
        if (TREE / name).is_file():
            digest.update(name.encode() + (TREE / name).read_bytes())
    done = cluster.folder / "images"
    if not done.exists() or done.read_text() != digest.hexdigest():
        cluster.load(images.build(*images.NOMAD))
        done.write_text(digest.hexdigest())
