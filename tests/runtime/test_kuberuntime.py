"""The runtime on a cluster that behaves as an API server can't be made to."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from nomad.errors import ApiExists, ApiInvalid, ApiUnavailable, PodStartError, StateError
from nomad.kubernetes import names
from nomad.runtime import kubernetes, kubestart, manifests
from nomad.runtime.base import PodSpec
from nomad.settings import Kubernetes
from tests.clock import VirtualClock, settle
from tests.runtime.cluster import CLAIMS, NODES, PODS, SECRETS, Cluster, Json, node, running


@pytest.fixture
def cluster() -> Cluster:
    cluster = Cluster()
    cluster.put(NODES, node("edge-1"))
    return cluster


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


def pod(name: str, id: str, *, ended: bool = False) -> Json:
    labels = {names.APP: names.NOMAD, names.COMPONENT: names.OPERATOR, names.STATE_LABEL: names.TAKEN}
    state = {"terminated": {"exitCode": 0}} if ended else {"running": {}}
    return {
        "metadata": {"name": name, "labels": labels, "annotations": {names.POD_ANNOTATION: id}},
        "spec": {"nodeName": "edge-1"},
        "status": {"containerStatuses": [{"name": "operator", "state": state}]},
    }


def spec(epoch: int = 1) -> PodSpec:
    return PodSpec(f"p.a-e{epoch}", "p", "a", epoch, "edge-1", "tls://m:1", b"", b"", 10.0)


async def test_what_cannot_be_understood_is_passed_over(
    cluster: Cluster, clock: VirtualClock, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.put(NODES, node("odd-1", cpu="many"))
    cluster.put(PODS, pod("odd-pod", "no id"))
    async with running(cluster, clock, warm=0) as runtime:
        assert [info.id for info in runtime.nodes] == ["edge-1"]
        cluster.put(PODS, pod("odder-pod", "p.a-e"))
        cluster.put(NODES, node("edge-1", cpu="few"))
        cluster.put(NODES, node("edge-2"))
        cluster.put(NODES, node("odd-1", cpu="too many"))
        cluster.put(PODS, pod("p-a-e1", "p.a-e1"))
        await settle()
        assert [(info.id, info.cores) for info in runtime.nodes] == [("edge-1", 2.0), ("edge-2", 2.0)]
        assert [found.id for found in await runtime.list()] == ["p.a-e1"]
        told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert sorted(text.split(" can't")[0].rpartition("/")[2] for text in told) == [
            *("edge-1", "odd-1", "odd-pod", "odder-pod")
        ]
        cluster.put(NODES, node("odd-1"))
        await settle()
        assert "odd-1" in [info.id for info in runtime.nodes]


async def test_the_end_of_a_watch_is_noticed(
    cluster: Cluster, clock: VirtualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a mistake of Nomad's own")

    async with running(cluster, clock, warm=0) as runtime:
        monkeypatch.setattr(runtime._nodes, "changed", fail)
        cluster.put(NODES, node("edge-2"))
        with pytest.raises(RuntimeError, match="a mistake"):
            await runtime.watching()
    monkeypatch.setattr(kubernetes.Nodes, "changed", fail)
    with pytest.raises(RuntimeError, match="a mistake"):
        async with running(cluster, clock, warm=0):
            pass


async def test_a_runtime_that_is_closed_does_not_miss_its_watches(cluster: Cluster, clock: VirtualClock) -> None:
    async with running(cluster, clock, warm=0) as runtime:
        pass
    await runtime.watching()


async def test_a_pod_that_was_made_by_a_request_which_was_sent_again_is_taken(
    cluster: Cluster, clock: VirtualClock
) -> None:
    """The API answers the first time with 503 although it has made the pod, and the second time that there is one."""

    def after(request: str) -> None:
        if request == f"POST {PODS}":
            raise ApiExists("there is one", status=409)

    cluster.after = after
    async with running(cluster, clock, warm=0) as runtime:
        await runtime.start(spec())
        assert [found.id for found in await runtime.list()] == ["p.a-e1"]
        assert f"{SECRETS}/p-a-e1" in cluster.objects
        assert cluster.asked.count(f"POST {PODS}") == 1


async def test_a_pod_of_somebody_elses_that_is_called_the_same_is_told(cluster: Cluster, clock: VirtualClock) -> None:
    cluster.put(PODS, {"metadata": {"name": "p-a-e1"}})
    async with running(cluster, clock, warm=0) as runtime:
        with pytest.raises(PodStartError, match="there is another pod: .*pods/p-a-e1 exists"):
            await runtime.start(spec())
    assert f"{SECRETS}/p-a-e1" not in cluster.objects


async def test_an_ended_pod_that_cannot_be_deleted_is_deleted_later(cluster: Cluster, clock: VirtualClock) -> None:
    away = True

    def before(request: str) -> None:
        if away and request.startswith("DELETE"):
            raise ApiUnavailable("nobody answers")

    def pods() -> set[str]:
        return {path.rpartition("/")[2] for path in cluster.objects if path.startswith(PODS)}

    cluster.before = before
    for epoch in (1, 2):
        cluster.put(PODS, pod(f"p-a-e{epoch}", f"p.a-e{epoch}", ended=True))
    async with running(cluster, clock, warm=0) as runtime:
        await runtime.start(spec(3))
        await settle()
        assert {found.id for found in await runtime.list()} == {"p.a-e1", "p.a-e2", "p.a-e3"}
        away = False
        await runtime.start(spec(4))
        await settle()
        assert {found.id for found in await runtime.list()} == {"p.a-e2", "p.a-e3", "p.a-e4"}
        assert pods() == {"p-a-e2", "p-a-e3", "p-a-e4"}
        away = True
        with pytest.raises(StateError, match="can't be deleted yet: nobody answers"):
            await runtime.forget("p")
        away = False
        await runtime.forget("p")
        assert pods() == {"p-a-e3", "p-a-e4"}
        assert {found.id for found in await runtime.list()} == {"p.a-e3", "p.a-e4"}
        await settle()
        assert runtime._discarded == set()


async def test_a_folder_of_somebody_elses_is_not_given_to_an_operator(cluster: Cluster, clock: VirtualClock) -> None:
    async with running(cluster, clock, warm=0, storage_class="nfs") as runtime:
        for epoch in (1, 2):
            await runtime.start(spec(epoch))
        assert f"{CLAIMS}/p-a" in cluster.objects
        cluster.put(CLAIMS, {"metadata": {"name": "p-a", "labels": {"app": "photos"}}})
        with pytest.raises(PodStartError, match="the PersistentVolumeClaim p-a isn't Nomad's"):
            await runtime.start(spec(3))
        assert f"{PODS}/p-a-e3" not in cluster.objects


@pytest.mark.parametrize("left", ["it is being deleted", "its pipeline is gone"])
async def test_the_folder_of_an_earlier_pipeline_of_that_name_is_waited_out(
    cluster: Cluster, clock: VirtualClock, left: str
) -> None:
    """What an operator notes there is of messages that the new pipeline hasn't had."""
    owner = {"apiVersion": "nomad.dev/v1alpha1", "kind": "Pipeline", "name": "p", "uid": "new"}
    async with running(cluster, clock, warm=0, storage_class="shared") as runtime:
        runtime.owner = lambda pipeline: owner
        claim = manifests.work_claim(spec(), Kubernetes(storage_class="shared"), owner)
        if left == "it is being deleted":
            claim["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        else:
            claim["metadata"]["ownerReferences"] = [{**owner, "uid": "old"}]
        cluster.put(CLAIMS, claim)
        start = asyncio.create_task(runtime.start(spec()))
        await settle()
        await clock.advance(5)
        assert f"POST {PODS}" not in cluster.asked
        cluster.remove(CLAIMS, claim["metadata"]["name"])
        await clock.advance(kubestart.RETRY)
        await start
        made = cluster.objects[f"{CLAIMS}/{claim['metadata']['name']}"]
        assert made["metadata"]["ownerReferences"] == [owner]
        assert f"{PODS}/p-a-e1" in cluster.objects


def waiting(cluster: Cluster) -> list[str]:
    """Two pods that wait on edge-1."""
    for name in ("warm-b", "warm-c"):
        made = pod(name, "")
        del made["metadata"]["annotations"][names.POD_ANNOTATION]
        made["metadata"]["labels"] |= {names.STATE_LABEL: names.WARM, names.NODE_LABEL: "edge-1"}
        made["spec"]["containers"] = [{"name": "operator", "image": "operator:1"}]
        cluster.put(PODS, made)
    return ["warm-b", "warm-c"]


def taken(cluster: Cluster) -> list[str]:
    return [
        path.rpartition("/")[2]
        for path, found in cluster.objects.items()
        if path.startswith(PODS) and found["metadata"]["labels"][names.STATE_LABEL] == names.TAKEN
    ]


async def test_a_waiting_pod_that_was_given_away_by_a_request_which_was_sent_again_is_the_only_one(
    cluster: Cluster, clock: VirtualClock
) -> None:
    """The API answers the first time with 503 although it has done it, and the second time that it waits no more."""
    pods = waiting(cluster)

    def after(request: str) -> None:
        if request in [f"PATCH {PODS}/{name}" for name in pods]:
            raise ApiInvalid("it waits no more")

    cluster.after = after
    async with running(cluster, clock, warm=2) as runtime:
        await runtime.start(spec())
        (name,) = taken(cluster)
        assert [found.id for found in await runtime.list()] == ["p.a-e1"]
        await settle()
        assert cluster.asked.count(f"PATCH {PODS}/{name}/resize") == 1


async def test_a_waiting_pod_that_was_given_away_into_the_void_asks_for_what_its_operator_needs(
    cluster: Cluster, clock: VirtualClock
) -> None:
    pods = waiting(cluster)

    def after(request: str) -> None:
        if request in [f"PATCH {PODS}/{name}" for name in pods]:
            raise ApiUnavailable("nobody answers")

    cluster.after = after
    async with running(cluster, clock, warm=2) as runtime:
        start = asyncio.create_task(runtime.start(spec()))
        await settle()
        await clock.advance(kubestart.RETRY)
        await start
        (name,) = taken(cluster)
        await settle()
        assert cluster.asked.count(f"PATCH {PODS}/{name}/resize") == 1


async def test_a_pod_that_was_given_away_meanwhile_is_not_taken_away_as_one_too_many(clock: VirtualClock) -> None:
    class Slow(Cluster):
        async def delete(self, path: str, **options: Any) -> bool:
            await settle()
            return await super().delete(path, **options)

    cluster = Slow()
    cluster.put(NODES, node("edge-1"))
    pods = waiting(cluster)
    async with running(cluster, clock, warm=0) as runtime:  # which begins to take both away
        await runtime.start(spec())
        await settle(100)
        assert len(taken(cluster)) == 1
        assert not any(f"{PODS}/{name}" in cluster.objects for name in set(pods) - set(taken(cluster)))
