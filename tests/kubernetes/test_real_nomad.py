"""What Nomad promises on Kubernetes, on a real cluster: images of the repository, installed by its scripts.

Nothing here is timed closely: benchmarks/kubernetes.py measures. What is counted, the last operator counts itself.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from benchmarks.kubernetes import counted, until
from nomad.client import Cluster, PipelineHandle
from nomad.kubernetes import names
from nomad.master.views import PipelineView
from tests.kubernetes.cluster.machine import TREE
from tests.kubernetes.cluster.real import Real
from tests.kubernetes.installed import Installed

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(400, func_only=True)]

DOCKER = "docker.io/library"
"""What containerd puts before a name without a registry."""

KINDS = (
    "namespaces,customresourcedefinitions,clusterroles,clusterrolebindings,pods,secrets,configmaps,services,endpointslices,"
    "serviceaccounts,roles,rolebindings,deployments,replicasets,daemonsets,controllerrevisions,networkpolicies,leases,"
    "persistentvolumeclaims,poddisruptionbudgets"
)


def everything(real: Real) -> set[str]:
    """What is in the cluster, but for what another installation has there."""
    found = json.loads(real.kubectl("get", KINDS, "--all-namespaces", "-o", "json"))["items"]
    return {f"{o['kind']} {o['metadata'].get('namespace', '')}/{o['metadata']['name']}" for o in found}


@pytest.fixture(scope="module")
def installed(real: Real) -> Iterator[Installed]:
    """Nomad, installed; afterwards removed, and nothing of it is left."""
    nomad = Installed(real, "nomad-tested")
    nomad.uninstall()  # of a run that was broken off
    nomad.install()
    yield nomad
    nomad.uninstall()
    left = {name for name in everything(real) if nomad.namespace in name}
    assert not left


@pytest.fixture
async def cluster(installed: Installed) -> AsyncIterator[Cluster]:
    async with installed.connected() as connected:
        yield connected


async def flows(pipeline: PipelineHandle, seconds: float = 2.0) -> None:
    """New numbers arrive at the last operator, none missed and none twice, ever."""
    before = await counted(pipeline)
    await asyncio.sleep(seconds)
    after = await counted(pipeline)
    assert after["last"] > before["last"]
    assert (after["missed"], after["doubled"]) == (0, 0)


def node_of(status: PipelineView, operator: str) -> str:
    return next(op.node for op in status.operators if op.name == operator)


def pod_id(status: PipelineView) -> str:
    """Nomad's name of the pod that the operator in the middle has."""
    return next(op.pod for op in status.operators if op.name == "work")


async def test_face_recognition_over_edge_fog_and_cloud(installed: Installed, cluster: Cluster) -> None:
    token, key = installed.credentials
    environment = {**installed.environment, "NOMAD_TOKEN": token, "NOMAD_SIGNING_KEY": key.hex()}
    command = [sys.executable, "-m", "nomad", "submit", "examples/face_recognition.py", "--pin", "detect=fog"]
    done = await asyncio.to_thread(
        subprocess.run, command, env=environment, cwd=TREE, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pipeline = await cluster.pipeline("faces")
    try:
        async with asyncio.timeout(200):
            async for record in pipeline.outputs("record"):
                if record["truth"] not in (None, "nobody", "unknown"):
                    assert record["names"] == [record["truth"]]
                    break
        status = await pipeline.status()
        assert {node_of(status, name) for name in ("frames", "detect", "record")} == {"edge", "fog", "cloud"}
        shown = installed.kubectl("get", "pipelines")
        assert "faces" in shown
        assert "Running" in shown
    finally:
        await pipeline.remove()


async def test_killed_pods_and_processes_lose_and_double_nothing(installed: Installed, cluster: Cluster) -> None:
    async with installed.counting(cluster, "killed") as pipeline:
        for force in (False, True):
            await killed(installed, pipeline, force=force)
            await flows(pipeline)


async def test_without_pods_that_wait_operators_start_cold(installed: Installed, cluster: Cluster) -> None:
    """Those that waited go; pods are made for their operators, also after one that was killed."""
    waiting = f"{names.STATE_LABEL}={names.WARM}"
    installed.warm = 0
    try:
        await asyncio.to_thread(installed.start)

        async def nobody_waits() -> bool:
            return not installed.kubectl("get", "pods", "-l", waiting, "-o", "name").split()

        await until(nobody_waits)
        async with installed.counting(cluster, "cold") as pipeline:
            first = installed.pod_of("cold", "work")
            await killed(installed, pipeline)
            await flows(pipeline)
            for pod in (first, *(installed.pod_of("cold", name) for name in ("Numbers", "work", "Count"))):
                assert pod.startswith("cold-"), "one that has waited is called nomad-warm-..."
            assert await nobody_waits()
    finally:
        installed.warm = 1
        await asyncio.to_thread(installed.start)


async def test_pods_that_come_to_the_master_by_way_of_their_agents(installed: Installed, cluster: Cluster) -> None:
    """As it is where pods are many. A pod is killed, agents are, and the operator moves."""
    agents = f"{names.COMPONENT}={names.AGENT}"

    async def all_by_agents() -> bool:
        ways = await installed.ways()
        return ways["agent"] >= 3 and not ways["direct"]

    async with installed.masters_with(NOMAD_GATHER_FROM="1"), installed.counting(cluster, "gathered") as pipeline:
        await until(all_by_agents)
        await killed(installed, pipeline)
        await flows(pipeline)
        await until(all_by_agents)
        installed.kubectl("delete", "pods", "-l", agents, "--grace-period=1", "--wait=false")
        await flows(pipeline)
        await until(all_by_agents)
        restarts = {op.name: op.restarts for op in (await pipeline.status()).operators}
        await to(pipeline, "cloud")
        await flows(pipeline)
        assert {op.name: op.restarts for op in (await pipeline.status()).operators} == restarts
        await until(all_by_agents)


async def test_moves_lose_and_double_nothing(installed: Installed, cluster: Cluster) -> None:
    async with installed.counting(cluster, "moved") as pipeline:
        for number in range(6):
            placed = node_of(await pipeline.status(), "work")
            move = await pipeline.move("work", "fog" if placed != "fog" else "cloud")
            ended = await pipeline.wait_for_move(move.id)
            assert ended.state == "done", (number, ended)
            assert (ended.lost, ended.doubled) == (0, 0)
        await flows(pipeline)


async def test_a_drained_node_is_left_in_time(installed: Installed, cluster: Cluster) -> None:
    async with installed.counting(cluster, "drained") as pipeline:
        await to(pipeline, "fog")
        try:
            ours = f"--pod-selector={names.APP}={names.NOMAD}"
            await asyncio.to_thread(installed.cluster.drain, "fog", ours)
            status = await pipeline.status()
            assert node_of(status, "work") != "fog"
            assert all(op.restarts == 0 for op in status.operators)
            await flows(pipeline)
        finally:
            installed.cluster.uncordon("fog")


async def test_a_lost_node_is_left_and_comes_back(installed: Installed, cluster: Cluster) -> None:
    async with installed.counting(cluster, "lost") as pipeline:
        await to(pipeline, "fog")
        installed.cluster.stop_node("fog")
        try:

            async def elsewhere() -> bool:
                status = await pipeline.status()
                return node_of(status, "work") != "fog" and status.phase == "running"

            await until(elsewhere)
            await flows(pipeline)
        finally:
            installed.cluster.start_node("fog")
        await flows(pipeline)


async def test_an_edge_without_the_control_plane_works_on(installed: Installed, cluster: Cluster) -> None:
    """The node counts as lost for Kubernetes; its pods are the same when it is back."""
    async with installed.counting(cluster, "cut") as pipeline:
        before = {op.name: op.pod for op in (await pipeline.status()).operators}
        installed.cluster.cut_node("edge", pods=False)
        try:
            await asyncio.to_thread(installed.cluster.wait_nodes, "edge", ready=False)
            await flows(pipeline, seconds=15.0)
        finally:
            installed.cluster.heal()
        await asyncio.to_thread(installed.cluster.wait_nodes, "edge")
        await flows(pipeline)
        status = await pipeline.status()
        assert {op.name: op.pod for op in status.operators} == before
        assert all(op.restarts == 0 for op in status.operators)


async def test_a_killed_master_is_followed_and_nothing_stops(installed: Installed, cluster: Cluster) -> None:
    async with installed.counting(cluster, "led") as pipeline:
        (leader,) = installed.leaders()
        installed.cluster.kill_pod(installed.namespace, leader)

        async def followed() -> bool:
            return installed.leaders() not in ([], [leader]) and bool(await cluster.pipelines())

        await until(followed)
        await flows(pipeline)
        assert all(op.restarts == 0 for op in (await pipeline.status()).operators)


async def test_a_master_of_another_image_takes_over_and_no_operator_notices(
    installed: Installed, cluster: Cluster
) -> None:
    async with installed.counting(cluster, "steered") as pipeline:
        pods: list[dict[str, tuple[str, int]]] = []

        async def led() -> bool:
            """By masters of the image that was asked for."""
            status = await pipeline.status()
            pods.append({op.name: (op.pod, op.restarts) for op in status.operators})
            masters = installed.images(f"{names.COMPONENT}={names.MASTER}")
            return masters == {installed.master_image} and status.phase == "running"

        await until(led)
        async with upgraded(installed, master="nomad-master:next"):
            await until(led)
            await flows(pipeline)
        await until(led)
        await flows(pipeline)
        assert all(found == pods[0] for found in pods)


async def test_an_upgrade_of_all_images_loses_nothing(installed: Installed, cluster: Cluster) -> None:
    async with (
        installed.counting(cluster, "upgraded") as pipeline,
        upgraded(installed, master="nomad-master:next", operator="nomad-operator:next-py3.11"),
    ):

        async def everywhere() -> bool:
            operators = installed.images(f"{names.PIPELINE_LABEL}=upgraded")
            masters = installed.images(f"{names.COMPONENT}={names.MASTER}")
            renewed = (masters, operators) == ({installed.master_image}, {installed.operator_image})
            return renewed and (await pipeline.status()).phase == "running"

        await until(everywhere)
        await flows(pipeline)


async def test_the_right_actor_moves_when_a_link_gets_slow(installed: Installed, cluster: Cluster) -> None:
    """From 5 to 80 ms between the pods of edge and fog, for real packets; the last operator misses nothing."""
    real = installed.cluster
    for one, other in (("edge", "fog"), ("fog", "cloud"), ("edge", "cloud")):
        real.set_delay(one, other, 0.005)
    try:
        async with installed.counting(cluster, "drifting", moves=True) as pipeline:
            await to(pipeline, "fog")
            await asyncio.sleep(10.0)
            real.set_delay("edge", "fog", 0.08)

            async def left() -> bool:
                return node_of(await pipeline.status(), "work") != "fog"

            await until(left)
            await flows(pipeline)
            moves = [move for move in await pipeline.moves() if move.cause != "user"]
            assert {move.operator for move in moves} == {"work"}
    finally:
        real.clear_delays()


async def test_kubectl_shows_and_deletes_pipelines(installed: Installed, cluster: Cluster) -> None:
    async with installed.counting(cluster, "listed"):
        exported = json.loads(installed.kubectl("get", "pipeline", "listed", "-o", "json"))
        installed.kubectl("delete", "pipeline", "listed", "--timeout=60s")

        async def gone() -> bool:
            return all(view.id != "listed" for view in await cluster.pipelines())

        await until(gone)
        for field in ("resourceVersion", "uid", "creationTimestamp", "finalizers", "generation", "managedFields"):
            exported["metadata"].pop(field, None)
        installed.cluster.apply(exported)

        async def back() -> bool:
            return any(view.id == "listed" and view.phase == "running" for view in await cluster.pipelines())

        await until(back)
        await flows(await cluster.pipeline("listed"))


@asynccontextmanager
async def upgraded(installed: Installed, *, master: str = "", operator: str = "") -> AsyncIterator[None]:
    """Nomad with images of these names, while messages flow: the same image under another name is another image."""
    before = installed.master_image, installed.operator_image
    after = master or before[0], operator or before[1]
    for node in installed.cluster.nodes.values():
        for old, new in zip(before, after, strict=True):
            if new != old:
                node.ctr("images", "tag", "--force", f"{DOCKER}/{old}", f"{DOCKER}/{new}")
    installed.master_image, installed.operator_image = after
    try:
        await asyncio.to_thread(installed.start)
        yield
    finally:
        installed.master_image, installed.operator_image = before
        await asyncio.to_thread(installed.start)


async def killed(installed: Installed, pipeline: PipelineHandle, *, force: bool = False) -> None:
    """Kill the process of the operator in the middle, or delete its pod by force; ends when another is at work."""
    before, pod = pod_id(await pipeline.status()), installed.pod_of(pipeline.id, "work")
    if force:
        installed.kubectl("delete", "pod", pod, "--grace-period=0", "--force", "--wait=false")
    else:
        installed.cluster.kill_pod(installed.namespace, pod)

    async def another() -> bool:
        status = await pipeline.status()
        return pod_id(status) != before and status.phase == "running"

    await until(another)


async def to(pipeline: PipelineHandle, node: str) -> None:
    """Have the operator in the middle on `node`."""
    if node_of(await pipeline.status(), "work") != node:
        move = await pipeline.move("work", node)
        assert (await pipeline.wait_for_move(move.id)).state == "done"
