"""`nomad master` at a real API server, with the rights that its Role gives it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import nomad
from nomad.kubernetes import names, paths
from nomad.master.views import PipelineView
from tests.kubernetes.cluster.envtest import Envtest
from tests.kubernetes.masters import Host, World, container, world
from tests.master.fakepods import OPERATORS

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(240)]


@pytest.fixture
async def there(envtest: Envtest, namespace: str, tmp_path: Path) -> AsyncIterator[tuple[World, Host]]:
    async with world(envtest, namespace, tmp_path) as made:
        yield made


async def submit(here: World, cluster: nomad.Cluster, id: str = "p") -> PipelineView:
    await cluster.submit(OPERATORS, id=id, start=here.nodes[0], end=here.nodes[2])
    view: PipelineView = await here.phase(cluster, id, "running")
    return view


async def test_a_pipeline_over_rest(there: tuple[World, Host]) -> None:
    """What is submitted runs in pods of the cluster, warm ones first; what is removed leaves nothing."""
    here, host = there
    master = await here.start("master-a")
    assert await master.get("/healthz") in (0, 200)
    cluster = await here.leads(master)
    assert await master.get("/readyz") == 200
    labels = {names.COMPONENT: names.OPERATOR}
    async with cluster:
        assert {node.id for node in await cluster.nodes()} == set(here.nodes)
        while len(await here.objects(paths.pods, **labels, **{names.STATE_LABEL: names.WARM})) < 3:
            await asyncio.sleep(0.05)
        view = await submit(here, cluster)
        assert view.operators[0].node == here.nodes[0]
        pods = await here.objects(paths.pods, **labels, **{names.PIPELINE_LABEL: "p"})
        assert {pod["metadata"]["annotations"][names.POD_ANNOTATION] for pod in pods.values()} == {
            "p.source-e1", "p.square-e1", "p.sink-e1",
        }  # fmt: skip

        victim = next(name for name, pod in pods.items() if pod["metadata"]["labels"][names.OPERATOR_LABEL] == "square")
        host.pod(victim).end(-9)
        await here.phase(cluster, "p", "degraded")
        assert (await here.phase(cluster, "p", "running")).operators[1].restarts == 1
        await (await cluster.pipeline("p")).remove()
        async with asyncio.timeout(30):
            while await here.objects(paths.pods, **labels, **{names.PIPELINE_LABEL: "p"}):
                await asyncio.sleep(0.1)
        assert not await here.objects(paths.pipelines)
    assert await master.end() == 0
    lease = await here.api.get(paths.leases(here.namespace, names.MASTER_NAME))
    assert not lease["spec"].get("holderIdentity")


@pytest.mark.parametrize("how", ["ended", "killed"])
async def test_the_next_master_goes_on(there: tuple[World, Host], how: str) -> None:
    """No operator is started again, whichever way the master went."""
    here, _ = there
    first, second = await here.start("master-a"), await here.start("master-b")
    await here.until(lambda: first.leads or second.leads)
    leader, other = (first, second) if first.leads else (second, first)
    async with await here.leads(leader) as cluster:
        pods = [op.pod for op in (await submit(here, cluster)).operators]
    assert await other.get("/readyz") == 200
    assert await other.get("/api/v1/pipelines") == 503
    assert not other.leads
    await asyncio.sleep(1.1)  # nodes tell times in whole seconds
    began = time.monotonic()
    if how == "ended":
        assert await leader.end() == 0
    else:
        await leader.end(9)
        await container(here.api, here.namespace, leader.identity, died=True)
    async with await here.leads(other) as cluster:
        view = await here.phase(cluster, "p", "running")
        assert time.monotonic() - began < 10.0
        assert [op.pod for op in view.operators] == pods
        assert [op.restarts for op in view.operators] == [0, 0, 0]
        labelled = await here.objects(paths.pods, **{names.LEADER_LABEL: "true"})
        assert list(labelled) == [other.identity]
