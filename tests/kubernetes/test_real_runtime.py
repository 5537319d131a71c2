"""The runtime on real nodes: pods that a scheduler places and kubelets start, end and tell of."""

from __future__ import annotations

import asyncio
import random
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nomad.kubernetes import names, paths
from nomad.kubernetes.api import Api
from nomad.runtime import kubernetes as kubernetes_runtime
from nomad.runtime.base import ObservedPod, PodPhase, PodSpec
from nomad.runtime.kubernetes import KubernetesRuntime
from nomad.runtime.manifests import Boot
from nomad.settings import Kubernetes
from tests.contract import runtime as contract
from tests.contract.runtime import seen, until
from tests.kubernetes.cluster import images
from tests.kubernetes.cluster.binaries import cache
from tests.kubernetes.cluster.real import Real

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(300)]

IMAGE = "nomad.dev/standin:1"
NAME_LABEL = f"{names.GROUP}/name-in-tests"
"""Says which node is `here` for these tests, and for nobody else."""


@pytest.fixture(scope="module")
def standin(real: Real) -> str:
    """An image whose program behaves as its pod's name says, on every node."""
    program = cache() / "standin" / "standin"
    program.parent.mkdir(parents=True, exist_ok=True)
    source = Path(images.__file__).with_name("standin.c")
    subprocess.run(["gcc", "-static", "-Os", "-s", "-o", str(program), str(source)], check=True)
    real.load(images.archive(program.with_suffix(".tar"), IMAGE, {"standin": program}, ["/standin"]))
    return IMAGE


@pytest.fixture
def here(real: Real, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The cluster's name of the node that is called `here`."""
    monkeypatch.setattr(names, "NODE_NAME_LABEL", NAME_LABEL)
    monkeypatch.setattr(contract, "DEADLINE", 60.0)
    real.kubectl("label", "node", "edge", f"{NAME_LABEL}=here", "--overwrite")
    yield "edge"
    real.kubectl("label", "node", "edge", f"{NAME_LABEL}-")


class Harness:
    def __init__(self, real: Real, api: Api, namespace: str) -> None:
        self.real = real
        self.api = api
        self.settings = Kubernetes(namespace=namespace, images={"3.11": IMAGE}, warm=0)
        self._opened: list[KubernetesRuntime] = []

    async def open(self, **changes: Any) -> KubernetesRuntime:
        boot = Boot("tls://nowhere:30001", b"v" * 32, 60.0)
        settings = replace(self.settings, **changes)
        runtime = await KubernetesRuntime.open(self.api, settings, boot, lambda name: b"k" * 32, rng=random.Random(1))
        self._opened.append(runtime)
        return runtime

    def kill(self, pod: ObservedPod) -> None:
        name = self._opened[-1]._objects.get(pod.id) or self._opened[0]._objects[pod.id]
        self.real.kill_pod(self.settings.namespace, name)

    async def close(self) -> None:
        for runtime in self._opened:
            await runtime.close()


@pytest.fixture
async def harness(real: Real, real_namespace: str, here: str, standin: str) -> AsyncIterator[Harness]:
    async with Api.open(real.kubeconfig) as api:
        secret = {"metadata": {"name": names.POD_TLS_SECRET}, "stringData": {"tls.crt": "", "tls.key": ""}}
        await api.create(paths.secrets(real_namespace), secret)
        harness = Harness(real, api, real_namespace)
        yield harness
        await harness.close()


ON_NODES = [
    check
    for check in contract.CHECKS
    if check is not contract.check_a_lost_node_loses_its_pods_and_takes_none  # nothing here pretends to be a machine
]


@pytest.mark.parametrize("check", ON_NODES, ids=lambda check: check.__name__.removeprefix("check_"))
async def test_contract(harness: Harness, check: Callable[[Harness], Awaitable[None]]) -> None:
    await check(harness)


def spec(operator: str = "quiet", epoch: int = 1, **changes: Any) -> PodSpec:
    return replace(contract.spec(operator, epoch), python="3.11", **changes)


async def test_a_waiting_pod_is_at_work_in_no_time_and_gets_what_its_operator_needs(
    harness: Harness, record_property: Callable[[str, object], None]
) -> None:
    runtime = await harness.open(warm=1)
    waiting: list[dict[str, Any]] = []

    async def waits() -> bool:
        found, _ = await harness.api.list(
            paths.pods(harness.settings.namespace),
            {"labelSelector": f"{names.STATE_LABEL}={names.WARM},{names.NODE_LABEL}=here"},
        )
        waiting[:] = [pod for pod in found if pod["status"]["phase"] == "Running"]
        return bool(waiting)

    async def known() -> bool:
        """To the runtime as well, which hears of it a moment later."""
        image = waiting[0]["spec"]["containers"][0]["image"]
        return bool(runtime._pool._fit(spec(memory_mb=200.0), image))

    await until(waits)
    await until(known)
    name = waiting[0]["metadata"]["name"]
    changes = runtime.watch()
    began = time.monotonic()
    await runtime.start(spec(memory_mb=200.0))
    await seen(changes, "p.quiet-e1", PodPhase.RUNNING)
    took = time.monotonic() - began
    record_property("claim seconds", took)
    assert took < 2.0
    assert runtime.pod_of(name) == "p.quiet-e1"

    async def resized() -> bool:
        pod = await harness.api.get(paths.pods(harness.settings.namespace, name))
        requests = pod["spec"]["containers"][0]["resources"]["requests"]
        return requests["memory"] == "200Mi" or not runtime._pool._resizes

    await until(resized)
    await runtime.stop("p.quiet-e1", grace=5.0)
    await seen(changes, "p.quiet-e1", PodPhase.EXITED)


async def test_what_the_scheduler_refuses_is_told_in_its_words(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubernetes_runtime, "STUCK", 1.0)
    runtime = await harness.open()
    changes = runtime.watch()
    await runtime.start(spec(memory_mb=10_000_000.0))
    pod = await seen(changes, "p.quiet-e1", PodPhase.EXITED)
    assert pod.failed
    assert "Insufficient memory" in pod.reason


async def test_an_image_that_is_not_there_is_told_in_the_nodes_words(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubernetes_runtime, "STUCK", 3.0)
    runtime = await harness.open(pull_policy="Never")
    changes = runtime.watch()
    await runtime.start(spec(image="nomad.dev/none:1"))
    pod = await seen(changes, "p.quiet-e1", PodPhase.EXITED)
    assert pod.failed
    assert "ErrImageNeverPull" in pod.reason
    assert "nomad.dev/none:1" in pod.reason


async def test_a_missing_secret_is_told_in_the_nodes_words(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes_runtime, "STUCK", 1.0)
    runtime = await harness.open()
    changes = runtime.watch()
    await runtime.start(spec(secrets={"TOKEN": "camera/token"}))
    pod = await seen(changes, "p.quiet-e1", PodPhase.EXITED)
    assert pod.failed
    assert 'secret "camera" not found' in pod.reason


async def test_printed_lines_are_followed_and_none_is_missed(harness: Harness) -> None:
    runtime = await harness.open()
    changes = runtime.watch()
    await runtime.start(spec("ticking"))
    await seen(changes, "p.ticking-e1", PodPhase.RUNNING)
    found: list[int] = []

    async def follow() -> None:
        async for line in runtime.follow("p.ticking-e1"):
            found.append(int(line.removeprefix("tick ")))

    follower = asyncio.create_task(follow())

    async def many() -> bool:
        return len(found) > 20

    await until(many)
    await runtime.stop("p.ticking-e1", grace=1.0)
    async with asyncio.timeout(contract.DEADLINE):
        await follower
    assert found == list(range(found[0], found[0] + len(found)))


async def test_a_pod_that_somebody_else_deletes_is_leaving_while_it_goes_on(harness: Harness) -> None:
    runtime = await harness.open()
    changes = runtime.watch()
    await runtime.start(spec("stubborn"))
    await seen(changes, "p.stubborn-e1", PodPhase.RUNNING)
    await harness.api.delete(paths.pods(harness.settings.namespace, "p-stubborn-e1"), grace=3)
    async with asyncio.timeout(contract.DEADLINE):
        async for pod in changes:
            if pod.leaving:
                break
    assert pod.phase is PodPhase.RUNNING
    assert (await seen(changes, "p.stubborn-e1", PodPhase.EXITED)).exit_code == -9
