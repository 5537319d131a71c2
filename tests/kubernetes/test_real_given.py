"""Nomad on whatever cluster there is, also the user's: prepared, started, used through a forwarded port, removed.

On a user's cluster the images of images/build.sh must be there already, as `make cluster` puts them; or OPERATOR_IMAGES
and IMAGE name others, as for images/k8s/startup.sh.
"""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import nomad
from benchmarks.kubernetes import Count, counted, numbers, until, work
from tests.kubernetes.cluster import binaries
from tests.kubernetes.cluster.envtest import Control
from tests.kubernetes.cluster.processes import wait_until
from tests.kubernetes.cluster.real import Real
from tests.kubernetes.installed import Installed, provide_images
from tests.ports import free_port

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(400)]

NAMESPACE = "nomad-given"
NODE_PORT = 30_810
"""Beside other installations."""


class Elsewhere(Installed):
    """Nomad on a cluster of which nothing is known but its kubeconfig."""

    def __init__(self, cluster: Control) -> None:
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        self.cluster = cluster  # type: ignore[assignment]
        self.namespace = NAMESPACE
        self.url = f"http://127.0.0.1:{free_port()}"
        self.images = os.environ.get("OPERATOR_IMAGES", f"{python}=nomad-operator:dev-py{python}")

    def start(self) -> None:
        self.script("startup.sh", OPERATOR_IMAGES=self.images, NODE_PORT=str(NODE_PORT))

    @contextmanager
    def forwarded(self) -> Iterator[None]:
        """`kubectl port-forward`, which serves `url`."""
        port = self.url.rpartition(":")[2]
        command = [str(binaries.kubernetes() / "kubectl"), "-n", self.namespace, "port-forward"]
        with subprocess.Popen(
            [*command, "service/nomad-master", f"{port}:30000"], env=self.environment, stdout=subprocess.DEVNULL
        ) as process:
            try:
                wait_until(self._answers, "the forwarded port to answer")
                yield
            finally:
                process.terminate()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/healthz", timeout=5):
                return True
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False


@pytest.fixture
def elsewhere(some_cluster: Control) -> Iterator[Elsewhere]:
    if isinstance(some_cluster, Real):
        provide_images(some_cluster)
    installed = Elsewhere(some_cluster)
    installed.uninstall()  # of a run that was broken off
    installed.script("init.sh")
    installed.start()
    yield installed
    installed.uninstall()
    assert installed.namespace not in some_cluster.kubectl("get", "namespaces")


async def test_a_pipeline_runs_on_any_cluster(elsewhere: Elsewhere) -> None:
    token, key = elsewhere.credentials
    with elsewhere.forwarded():
        async with nomad.connect(elsewhere.url, token, signing_key=key) as cluster:

            async def nodes_are_ready() -> bool:
                found = await cluster.nodes()
                return bool(found) and all(node.ready for node in found)

            await until(nodes_are_ready)
            nodes = sorted(node.id for node in await cluster.nodes())
            operators = [numbers(), work, Count()]
            pipeline = await cluster.submit(operators, start=nodes[0], end=nodes[-1], id="anywhere")
            try:
                count = await counted(pipeline)
                assert (count["missed"], count["doubled"]) == (0, 0)
            finally:
                await pipeline.remove()
