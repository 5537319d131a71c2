"""The runtime against a real API, with a stand-in for scheduler and kubelets."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import random
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nomad.errors import PodStartError
from nomad.kubernetes import names, paths
from nomad.kubernetes.api import Api
from nomad.runtime import kubernetes as kubernetes_runtime
from nomad.runtime import manifests, warm
from nomad.runtime.base import Apart, Distant, Machines, ObservedPod, PodPhase, PodSpec
from nomad.runtime.kubernetes import KubernetesRuntime
from nomad.runtime.manifests import Boot
from nomad.settings import Backoff, Kubernetes
from tests.contract import runtime as contract
from tests.contract.runtime import seen, until
from tests.kubernetes.cluster.envtest import Envtest
from tests.kubernetes.kubelet import Kubelet, make_node, set_ready
from tests.kubernetes.proxy import Proxy

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(120)]

BOOT = Boot("tls://nomad-master:30001", b"v" * 32, 60.0)


def key_of(name: str) -> bytes:
    return name.encode().ljust(32, b".")[:32]


@pytest.fixture
async def api(envtest: Envtest) -> AsyncIterator[Api]:
    async with Api.open(envtest.kubeconfig) as api:
        yield api


@pytest.fixture
async def restricted(envtest: Envtest, api: Api) -> AsyncIterator[str]:
    """A namespace that admits what Pod Security `restricted` allows."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    level = {"pod-security.kubernetes.io/enforce": "restricted"}
    await asyncio.to_thread(envtest.create_namespace, name, level)
    yield name
    await api.delete(paths.namespaces(name))


@pytest.fixture
async def node(api: Api) -> AsyncIterator[str]:
    """The only node of the cluster; Nomad calls it `here`."""
    name = f"node-{uuid.uuid4().hex[:8]}"
    await make_node(api, name, **{names.NODE_NAME_LABEL: "here", names.TIER_LABEL: "edge"})
    yield name
    await api.delete(paths.nodes(name))


@pytest.fixture
async def kubelet(api: Api, restricted: str, node: str) -> AsyncIterator[Kubelet]:
    async with Kubelet(api, restricted) as kubelet:
        yield kubelet


@pytest.fixture
def settings(restricted: str) -> Kubernetes:
    return Kubernetes(namespace=restricted, images={"3.11": "operator:1"}, warm=0)


class Harness:
    """Opens runtimes over one namespace."""

    def __init__(self, api: Api, kubelet: Kubelet, settings: Kubernetes) -> None:
        self.api = api
        self.kubelet = kubelet
        self.settings = settings
        self._opened: list[KubernetesRuntime] = []
        self._kills: set[asyncio.Task[None]] = set()

    async def open(self, api: Api | None = None, **changes: Any) -> KubernetesRuntime:
        settings = replace(self.settings, **changes)
        async with asyncio.timeout(contract.DEADLINE):
            runtime = await KubernetesRuntime.open(api or self.api, settings, BOOT, key_of, rng=random.Random(1))
        self._opened.append(runtime)
        return runtime

    def kill(self, pod: ObservedPod) -> None:
        name = manifests.pod_name(*pod.id.rpartition("-e")[0].split("."), pod.epoch)
        task = asyncio.get_running_loop().create_task(self.kubelet.end(name, 137))
        self._kills.add(task)

    async def close(self) -> None:
        await asyncio.gather(*self._kills)
        for runtime in self._opened:
            await runtime.close()

    async def pods(self, **labels: str) -> list[dict[str, Any]]:
        selector = ",".join(f"{key}={value}" for key, value in labels.items())
        found, _ = await self.api.list(paths.pods(self.settings.namespace), {"labelSelector": selector})
        return found

    async def waiting(self) -> list[dict[str, Any]]:
        """Warm pods that run, as the newest runtime knows."""
        found = await self.pods(**{names.STATE_LABEL: names.WARM})
        seen = [
            {
                pod.name
                for pods in runtime._pool._pods.values()
                for pod in pods.values()
                if pod.phase is PodPhase.RUNNING
            }
            for runtime in self._opened[-1:]
        ]
        return [
            pod
            for pod in found
            if pod["status"]["phase"] == "Running"
            and not deleting(pod)
            and all(pod["metadata"]["name"] in known for known in seen)
        ]


def deleting(pod: dict[str, Any]) -> bool:
    return "deletionTimestamp" in pod["metadata"]


@pytest.fixture
async def harness(api: Api, kubelet: Kubelet, settings: Kubernetes) -> AsyncIterator[Harness]:
    harness = Harness(api, kubelet, settings)
    yield harness
    await harness.close()


WITHOUT_KUBELETS = [
    check
    for check in contract.CHECKS
    if check
    not in (
        contract.check_a_lost_node_loses_its_pods_and_takes_none,  # nothing here pretends to be a machine
        contract.check_a_stubborn_pod_is_killed_after_the_grace,  # needs what pods print
        contract.check_printed_lines_are_kept_and_followed,
    )
]


@pytest.mark.parametrize("check", WITHOUT_KUBELETS, ids=lambda check: check.__name__.removeprefix("check_"))
async def test_contract(harness: Harness, check: Callable[[Harness], Awaitable[None]]) -> None:
    await check(harness)


def spec(operator: str = "quiet", epoch: int = 1, **changes: Any) -> PodSpec:
    return replace(contract.spec(operator, epoch), python="3.11", **changes)


async def test_a_new_pod_has_its_secret_and_its_place(harness: Harness, node: str) -> None:
    runtime = await harness.open()
    assert all(isinstance(runtime, kind) for kind in (Distant, Apart, Machines))
    assert (runtime.folders_follow, runtime.node_of(node)) == (False, "here")
    runtime.owner = lambda pipeline: None
    assert runtime.pod_of("p-quiet-e1") is None
    await runtime.start(spec())
    assert runtime.pod_of("p-quiet-e1") == "p.quiet-e1"
    [made] = await harness.pods(**{names.PIPELINE_LABEL: "p"})
    secret = await harness.api.get(paths.secrets(harness.settings.namespace, "p-quiet-e1"))
    assert secret["metadata"]["ownerReferences"][0]["uid"] == made["metadata"]["uid"]
    boot = json.loads(base64.b64decode(secret["data"]["boot"]))
    assert (boot["pod"], boot["key"]) == ("p-quiet-e1", key_of("p-quiet-e1").hex())
    await seen_by_list(runtime, "p.quiet-e1", PodPhase.RUNNING)
    [made] = await harness.pods(**{names.PIPELINE_LABEL: "p"})
    assert made["spec"]["nodeName"] == node
    assert runtime.listen_address("p.quiet-e1") == "tls://0.0.0.0:30010"
    assert runtime.workdir("p", "quiet") == names.WORK_FOLDER


async def seen_by_list(runtime: KubernetesRuntime, pod_id: str, phase: PodPhase) -> ObservedPod:
    found: list[ObservedPod] = []

    async def there() -> bool:
        found[:] = [pod for pod in await runtime.list() if pod.id == pod_id and pod.phase is phase]
        return bool(found)

    await until(there)
    return found[0]


async def test_what_an_operator_may_send_is_what_the_graph_says(harness: Harness) -> None:
    runtime = await harness.open()
    owner = await harness.api.create(
        paths.configmaps(harness.settings.namespace),
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "pipeline"}},
    )
    reference = {"apiVersion": "v1", "kind": "ConfigMap", "name": "pipeline", "uid": owner["metadata"]["uid"]}
    runtime.owner = lambda pipeline: reference
    runtime.edges = lambda pipeline: [("quiet", "chatty")]
    await asyncio.gather(runtime.start(spec()), runtime.start(spec("chatty")))
    path = paths.networkpolicies(harness.settings.namespace)
    policies, _ = await harness.api.list(path)
    assert [policy["metadata"]["name"] for policy in policies] == ["links-p-chatty", "links-p-quiet"]
    before = harness.api.requests
    await runtime.start(spec("exit3"))
    assert harness.api.requests - before <= 2 + 8  # the stand-in for a kubelet asks through the same client
    # Everything of the pipeline goes with it.
    await harness.api.delete(paths.configmaps(harness.settings.namespace, "pipeline"))

    async def gone() -> bool:
        return not (await harness.api.list(path))[0] and not await harness.pods(**{names.PIPELINE_LABEL: "p"})

    await until(gone)
    assert {pod.phase for pod in await runtime.list()} == {PodPhase.EXITED}


async def test_a_waiting_pod_is_given_to_an_operator_and_replaced(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm, "REFILL", 0.1)
    runtime = await harness.open(warm=1)
    [waiting] = await warm_pods(harness, 1)
    name = waiting["metadata"]["name"]
    assert name.startswith("nomad-warm-here-")
    assert runtime.pod_of(name) == ""
    assert list(await runtime.list()) == []
    changes = runtime.watch()
    await runtime.start(spec(memory_mb=300.0))
    pod = await seen(changes, "p.quiet-e1", PodPhase.RUNNING)
    assert (pod.node, pod.leaving, pod.outdated) == ("here", False, False)
    assert runtime.pod_of(name) == "p.quiet-e1"

    async def resized() -> bool:
        found = await harness.api.get(paths.pods(harness.settings.namespace, name))
        resources = found["spec"]["containers"][0]["resources"]
        return resources["requests"]["memory"] == "300Mi" and resources["limits"] == {"memory": "664Mi"}

    await until(resized)
    [fresh] = await warm_pods(harness, 1)
    assert fresh["metadata"]["name"] != name
    # Another master finds it as what it is now.
    other = await harness.open(warm=1)
    assert other.pod_of(name) == "p.quiet-e1"
    await runtime.stop("p.quiet-e1", grace=1.0)
    await seen(changes, "p.quiet-e1", PodPhase.EXITED)


async def test_a_node_with_waiting_pods_is_drained_without_force(
    harness: Harness, envtest: Envtest, node: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm, "REFILL", 0.1)
    selector = manifests.selector(names.MASTER)
    pod = {"containers": [{"name": "master", "image": "master:1"}]}
    deployment = await harness.api.create(
        paths.deployments(harness.settings.namespace),
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": names.MASTER_NAME},
            "spec": {
                "replicas": 0,
                "selector": {"matchLabels": selector},
                "template": {"metadata": {"labels": selector}, "spec": pod},
            },
        },
    )
    owner = {"apiVersion": "apps/v1", "kind": "Deployment", "name": names.MASTER_NAME}
    runtime = await harness.open(warm=1)
    runtime.owner = lambda pipeline: {**owner, "uid": deployment["metadata"]["uid"]}
    await runtime.start(spec())  # the one that was there before had no owner
    [waiting] = await warm_pods(harness, 1)
    assert waiting["metadata"]["ownerReferences"][0]["kind"] == "Deployment"
    told = await asyncio.to_thread(envtest.kubectl, "drain", node, "--delete-emptydir-data", "--timeout=60s")
    assert f"pod/{waiting['metadata']['name']} evicted" in told


async def warm_pods(harness: Harness, count: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []

    async def there() -> bool:
        found[:] = await harness.waiting()
        return len(found) == count

    await until(there)
    return found


async def test_a_waiting_pod_goes_to_one_operator_only(harness: Harness) -> None:
    first, second = await harness.open(warm=1), await harness.open(warm=1)
    [waiting] = await warm_pods(harness, 1)
    name = waiting["metadata"]["name"]

    async def known() -> bool:
        return second.pod_of(name) == "" and second._pods.items[name].phase is PodPhase.RUNNING

    await until(known)
    await asyncio.gather(first.start(spec("quiet")), second.start(spec("chatty")))
    taken = await harness.pods(**{names.STATE_LABEL: names.TAKEN})
    assert len({pod["metadata"]["annotations"][names.POD_ANNOTATION] for pod in taken}) == 2
    assert len(taken) == 2


async def test_what_a_running_process_can_not_be_given_starts_cold(harness: Harness) -> None:
    runtime = await harness.open(warm=1)
    [waiting] = await warm_pods(harness, 1)
    await runtime.start(spec("quiet", secrets={"TOKEN": "camera/token"}))
    await runtime.start(spec("chatty", image="own:1"))
    assert runtime.pod_of(waiting["metadata"]["name"]) == ""
    assert runtime.pod_of("p-quiet-e1") == "p.quiet-e1"
    assert runtime.pod_of("p-chatty-e1") == "p.chatty-e1"


async def test_the_pool_follows_its_number_its_image_and_the_nodes(harness: Harness, node: str) -> None:
    first = await harness.open(warm=2)
    old = await warm_pods(harness, 2)
    await first.close()
    await harness.open(warm=1, images={"3.11": "operator:1", "3.12": "operator:2"})

    async def replaced() -> bool:
        found = await harness.waiting()
        return [pod["spec"]["containers"][0]["image"] for pod in found] == ["operator:2"]

    await until(replaced)
    names_before = {pod["metadata"]["name"] for pod in old}
    assert not names_before & {pod["metadata"]["name"] for pod in await harness.waiting()}
    await harness.api.delete(paths.nodes(node))

    async def none() -> bool:
        return await harness.pods(**{names.STATE_LABEL: names.WARM}) == []

    await until(none)


async def test_an_operator_with_another_image_than_new_ones_is_outdated(harness: Harness) -> None:
    first = await harness.open()
    await first.start(spec())
    await seen_by_list(first, "p.quiet-e1", PodPhase.RUNNING)
    await first.close()
    second = await harness.open(images={"3.11": "operator:2"})
    assert [pod.outdated for pod in await second.list()] == [True]


async def test_what_can_not_start_says_why_and_is_given_up(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes_runtime, "STUCK", 0.5)
    harness.kubelet.schedule = lambda pod: "0/1 nodes are available: 1 Insufficient memory."
    runtime = await harness.open()
    changes = runtime.watch()
    await runtime.start(spec())
    async with asyncio.timeout(contract.DEADLINE):
        reasons = []
        async for pod in changes:
            reasons.append((pod.phase, pod.failed, pod.reason))
            if pod.phase is PodPhase.EXITED:
                break
    said = "Unschedulable: 0/1 nodes are available: 1 Insufficient memory."
    assert reasons == [
        (PodPhase.STARTING, False, ""),
        (PodPhase.STARTING, False, said),
        (PodPhase.EXITED, True, said),
    ]

    async def gone() -> bool:
        return await harness.pods(**{names.PIPELINE_LABEL: "p"}) == []

    await until(gone)
    assert [(pod.failed, pod.reason) for pod in await runtime.list()] == [(True, said)]


async def test_a_hopeless_image_is_given_up_at_once(harness: Harness) -> None:
    waiting = {"reason": "InvalidImageName", "message": 'couldn\'t parse image name "no such"'}
    harness.kubelet.refuse = lambda pod: waiting
    runtime = await harness.open()
    changes = runtime.watch()
    await runtime.start(spec())
    pod = await seen(changes, "p.quiet-e1", PodPhase.EXITED)
    assert (pod.failed, pod.reason) == (True, 'InvalidImageName: couldn\'t parse image name "no such"')


async def test_waiting_pods_that_can_not_start_are_not_made_again_and_again(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm, "STUCK", 0.1)
    monkeypatch.setattr(warm, "BACKOFF", Backoff(first=0.5, factor=100.0, limit=300.0))
    made: set[str] = set()
    waiting = {"reason": "ImagePullBackOff", "message": "no such image"}

    def refuse(pod: dict[str, Any]) -> dict[str, Any]:
        made.add(pod["metadata"]["name"])
        return waiting

    harness.kubelet.refuse = refuse
    await harness.open(warm=1)

    async def twice() -> bool:
        return len(made) == 2 and await harness.pods(**{names.STATE_LABEL: names.WARM}) == []

    await until(twice)
    before = harness.api.requests
    await asyncio.sleep(1.0)
    assert len(made) == 2
    assert harness.api.requests == before


async def test_what_the_cluster_refuses_is_told(harness: Harness, settings: Kubernetes, api: Api) -> None:
    runtime = await harness.open()
    with pytest.raises(PodStartError, match=r"no image for Python 3\.9; there are some for 3\.11"):
        await runtime.start(replace(spec(), python="3.9"))
    limits = {"limits": [{"type": "Container", "max": {"memory": "1Mi"}}]}
    limit = {"apiVersion": "v1", "kind": "LimitRange", "metadata": {"name": "small"}, "spec": limits}
    await api.create(f"/api/v1/namespaces/{settings.namespace}/limitranges", limit)
    epochs = itertools.count(1)

    async def refused() -> bool:
        try:
            await runtime.start(spec("chatty", next(epochs)))
        except PodStartError as exc:
            return "maximum memory usage per Container is 1Mi" in str(exc)
        return False

    await until(refused)


async def test_what_a_limit_range_refuses_one_operator_others_get_warm(
    harness: Harness, settings: Kubernetes, api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    limits = {"limits": [{"type": "Container", "max": {"memory": "1Gi"}}]}
    limit = {"apiVersion": "v1", "kind": "LimitRange", "metadata": {"name": "small"}, "spec": limits}
    await api.create(f"/api/v1/namespaces/{settings.namespace}/limitranges", limit)
    runtime = await harness.open(warm=2)
    waited = {pod["metadata"]["name"] for pod in await warm_pods(harness, 2)}
    caplog.set_level("INFO")
    await runtime.start(spec("quiet", memory_mb=700.0))

    async def refused() -> bool:
        return "maximum memory usage per Container is 1Gi" in caplog.text

    await until(refused)
    await runtime.start(spec("chatty", memory_mb=300.0))
    taken = await harness.pods(**{names.STATE_LABEL: names.TAKEN})
    assert {pod["metadata"]["name"] for pod in taken} == waited


async def test_a_cordoned_node_takes_none_and_says_so(harness: Harness, node: str) -> None:
    runtime = await harness.open()
    await harness.api.patch(paths.nodes(node), {"spec": {"unschedulable": True}})

    async def cordoned() -> bool:
        return not runtime.nodes[0].schedulable

    await until(cordoned)
    with pytest.raises(PodStartError, match="takes no new pods"):
        await runtime.start(spec())


async def test_a_pod_that_somebody_else_deletes_is_leaving(harness: Harness) -> None:
    runtime = await harness.open()
    changes = runtime.watch()
    await runtime.start(spec("stubborn"))
    await seen(changes, "p.stubborn-e1", PodPhase.RUNNING)
    await harness.api.delete(paths.pods(harness.settings.namespace, "p-stubborn-e1"), grace=2)
    async with asyncio.timeout(contract.DEADLINE):
        async for pod in changes:
            if pod.leaving:
                break
    assert pod.phase is PodPhase.RUNNING
    ended = await seen(changes, "p.stubborn-e1", PodPhase.EXITED)
    assert (ended.exit_code, ended.leaving) == (-9, False)


async def test_a_node_that_only_the_cluster_has_lost_is_kept_while_it_is_heard(harness: Harness, node: str) -> None:
    runtime = await harness.open(node_grace=1.0)
    changes = runtime.watch()
    await runtime.start(spec())
    await seen(changes, "p.quiet-e1", PodPhase.RUNNING)
    await set_ready(harness.api, node, "Unknown")

    async def ready() -> bool:
        return runtime.nodes[0].ready

    async def lost() -> bool:
        return not runtime.nodes[0].ready

    await until(lost)
    runtime.heard("p-quiet-e1")
    assert runtime.nodes[0].ready
    await until(lost)
    runtime.heard(f"agent:{node}")
    assert runtime.nodes[0].ready
    with pytest.raises(PodStartError, match="is lost"):
        await runtime.start(spec("chatty"))
    assert [pod.phase for pod in await runtime.list()] == [PodPhase.RUNNING]
    await set_ready(harness.api, node, "True")
    await until(ready)


async def test_ended_pods_stay_for_their_logs_and_only_a_few(harness: Harness) -> None:
    runtime = await harness.open()
    for epoch in range(1, 7):
        changes = runtime.watch()
        await runtime.start(spec("exit3", epoch))
        await seen(changes, f"p.exit3-e{epoch}", PodPhase.EXITED)
    assert [pod.id for pod in await runtime.list()] == [f"p.exit3-e{epoch}" for epoch in (3, 4, 5, 6)]

    async def pruned() -> bool:
        return len(await harness.pods(**{names.PIPELINE_LABEL: "p"})) == 4

    await until(pruned)


async def test_folders_are_kept_where_the_cluster_has_a_place_for_them(harness: Harness) -> None:
    runtime = await harness.open(warm=1, storage_class="nfs")
    await warm_pods(harness, 1)
    assert runtime.folders_follow
    for epoch in (1, 2):
        await runtime.start(spec(epoch=epoch))
        await seen_by_list(runtime, f"p.quiet-e{epoch}", PodPhase.RUNNING)
    path = paths.claims(harness.settings.namespace)
    claims, _ = await harness.api.list(path)
    assert [claim["spec"]["storageClassName"] for claim in claims] == ["nfs"]
    made = await harness.pods(**{names.PIPELINE_LABEL: "p"})
    folders = [volume for pod in made for volume in pod["spec"]["volumes"] if "persistentVolumeClaim" in volume]
    assert len(folders) == 2
    for epoch in (1, 2):
        await runtime.stop(f"p.quiet-e{epoch}", grace=1.0)
        await seen_by_list(runtime, f"p.quiet-e{epoch}", PodPhase.EXITED)
    await runtime.forget("p")

    async def gone() -> bool:
        claims, _ = await harness.api.list(path)
        return all(deleting(claim) for claim in claims)

    await until(gone)


async def test_secrets_that_operators_can_not_have_are_named(harness: Harness) -> None:
    path = paths.secrets(harness.settings.namespace)
    await harness.api.create(path, {"metadata": {"name": "camera"}, "stringData": {"token": "x"}})
    own = {"name": "nomad-master", "labels": {names.APP: names.NOMAD}}
    await harness.api.create(path, {"metadata": own, "stringData": {"token": "x"}})
    runtime = await harness.open()
    assert await runtime.missing_secrets(["camera/token"]) == []
    asked = ["camera/token", "camera/pin", "nomad-master/token", "other/key"]
    problems = await runtime.missing_secrets(asked)
    assert len(problems) == 3
    assert problems[0] == "the secret camera has no key pin"
    assert problems[1] == "the secret nomad-master is Nomad's own, and no operator's"
    assert problems[2].startswith(f"there is no secret other in the namespace {harness.settings.namespace}: kubectl ")
    assert problems[2].endswith(" create secret generic other --from-literal=key=...")


async def test_pods_go_on_while_the_api_is_away(harness: Harness, envtest: Envtest, tmp_path: Path) -> None:
    async with Proxy(envtest.server) as proxy, contextlib.AsyncExitStack() as stack:
        config = proxy.kubeconfig(envtest.kubeconfig, tmp_path / "kubeconfig")
        far = await stack.enter_async_context(Api.open(config))
        runtime = await harness.open(far)
        changes = runtime.watch()
        await runtime.start(spec())
        pod = await seen(changes, "p.quiet-e1", PodPhase.RUNNING)
        proxy.refusing = True
        await proxy.cut()
        starting = asyncio.create_task(runtime.start(spec("chatty")))
        assert [found.id for found in await runtime.list()] == ["p.quiet-e1"]
        harness.kill(pod)
        proxy.refusing = False
        ended = await seen(changes, "p.quiet-e1", PodPhase.EXITED)
        assert ended.exit_code == -9
        await starting
        await seen_by_list(runtime, "p.chatty-e1", PodPhase.RUNNING)
        await runtime.close()


@pytest.mark.parametrize("warm", [0, 1])
async def test_a_start_whose_answer_is_lost_starts_one_pod(
    harness: Harness, envtest: Envtest, tmp_path: Path, warm: int
) -> None:
    async with Proxy(envtest.server) as proxy, contextlib.AsyncExitStack() as stack:
        config = proxy.kubeconfig(envtest.kubeconfig, tmp_path / "kubeconfig")
        far = await stack.enter_async_context(Api.open(config))
        runtime = await harness.open(far, warm=warm)
        await warm_pods(harness, warm)

        async def waits() -> bool:
            running = [pod for pod in runtime._pods.items.values() if pod.phase is PodPhase.RUNNING]
            return len(running) == warm

        await until(waits)
        await far.get("/version")  # over a connection that the next request uses
        proxy.mute = True
        starting = asyncio.create_task(runtime.start(spec()))

        async def made() -> bool:
            return len(await harness.pods(**{names.PIPELINE_LABEL: "p"})) == 1

        await until(made)
        assert not starting.done()
        proxy.mute = False
        await proxy.cut()
        await starting
        await seen_by_list(runtime, "p.quiet-e1", PodPhase.RUNNING)
        [pod] = await harness.pods(**{names.PIPELINE_LABEL: "p"})
        assert pod["metadata"]["name"].startswith("nomad-warm-" if warm else "p-quiet-e1")
        await harness.api.get(paths.secrets(harness.settings.namespace, pod["metadata"]["name"]))
        await runtime.close()


async def test_an_idle_runtime_asks_for_nothing(harness: Harness, envtest: Envtest, tmp_path: Path) -> None:
    async with Api.open(envtest.kubeconfig) as own:
        runtime = await harness.open(own, warm=1)
        await warm_pods(harness, 1)
        await runtime.start(spec())
        await seen_by_list(runtime, "p.quiet-e1", PodPhase.RUNNING)
        await asyncio.sleep(4.0)  # a waiting pod may be made anew
        before = own.requests
        await asyncio.sleep(5.0)
        assert own.requests == before
        await runtime.close()
