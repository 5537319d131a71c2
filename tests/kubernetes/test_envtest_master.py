"""`nomad master` at a real API server, with the rights that its Role gives it."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import nomad
from nomad.kubernetes import names, paths
from nomad.master.views import PipelineView
from nomad.settings import Reconcile
from tests.kubernetes.cluster.envtest import Envtest, Request
from tests.kubernetes.masters import Host, World, container, init_objects, world
from tests.kubernetes.proxy import Proxy
from tests.master.fakepods import OPERATORS
from tests.ports import free_port

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
    """No operator is started again, whichever way the master went; and nobody waits for the lease to run out."""
    here, _ = there
    slow = ("--lease-seconds", "600", "--renew-seconds", "300")
    first, second = await here.start("master-a", *slow), await here.start("master-b", *slow)
    await here.until(lambda: first.leads or second.leads)
    leader, other = (first, second) if first.leads else (second, first)
    async with await here.leads(leader) as cluster:
        pods = [op.pod for op in (await submit(here, cluster)).operators]
    assert await other.get("/readyz") == 200
    assert await other.get("/api/v1/pipelines") == 503
    assert not other.leads
    await asyncio.sleep(1.1)  # nodes tell times in whole seconds
    if how == "ended":
        assert await leader.end() == 0
    else:
        await leader.end(9)
        await container(here.api, here.namespace, leader.identity, died=True)
    async with await here.leads(other) as cluster:
        view = await here.phase(cluster, "p", "running")
        assert [op.pod for op in view.operators] == pods
        assert [op.restarts for op in view.operators] == [0, 0, 0]
        labelled = await here.objects(paths.pods, **{names.LEADER_LABEL: "true"})
        assert list(labelled) == [other.identity]


async def listed(here: World) -> list[str]:
    """The pods of masters that miss the one that leads sooner than its lease runs out."""
    lease = await here.api.get(paths.leases(here.namespace, names.MASTER_NAME))
    text = lease["metadata"].get("annotations", {}).get(names.STANDBYS_ANNOTATION, "{}")
    return [name.partition("_")[0] for name in json.loads(text).get("standbys", [])]


def with_account(namespace: str, account: str) -> list[dict[str, Any]]:
    """What gives another service account the rights that masters have."""
    made = []
    for item in init_objects(namespace):
        if item["kind"].endswith("RoleBinding"):
            item["metadata"]["name"] += f"-{account}"
            item["subjects"] = [{"kind": "ServiceAccount", "name": account, "namespace": namespace}]
            made.append(item)
    body = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": account, "namespace": namespace}}
    return [body, *made]


async def test_one_that_is_lost_with_its_node_is_followed_in_ten_seconds(there: tuple[World, Host]) -> None:
    """A process that is stopped says nothing, its connections stay open and its pod is said to run: as it is when a
    node loses its power. Continued, it writes nothing, and ends.
    """
    here, _ = there
    ports = free_port(), free_port()
    async with Proxy(f"tls://127.0.0.1:{ports[0]}") as service:
        here.control = service.url.replace("https", "tls")
        first = await here.start("master-a", "--control-listen", f"tls://127.0.0.1:{ports[0]}")
        async with await here.leads(first):
            pass
        await asyncio.to_thread(here.env.apply, *with_account(here.namespace, "another"))
        here.kubeconfig = await asyncio.to_thread(here.env.kubeconfig_for, "another", here.namespace)
        second = await here.start("master-b", "--control-listen", f"tls://127.0.0.1:{ports[1]}")
        async with asyncio.timeout(30):
            while await listed(here) != ["master-b"]:
                await asyncio.sleep(0.1)
        first.process.send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        await here.until(lambda: second.leads)
        took = time.monotonic() - stopped
        print(f"led again after {took:.2f} s")
        assert took <= 10.0
        assert list(await here.objects(paths.pods, **{names.LEADER_LABEL: "true"})) == ["master-b"]
        since = here.env.audit_size()
        first.process.send_signal(signal.SIGCONT)
        async with asyncio.timeout(20):
            assert await first.process.wait() != 0
        asked = here.env.requests(since, f"system:serviceaccount:{here.namespace}:nomad-master")
        assert not [request for request in asked if request.verb not in ("get", "list", "watch")], asked
        assert second.process.returncode is None


async def test_pods_of_a_leader_that_hangs_come_to_the_next_one(there: tuple[World, Host]) -> None:
    """Its machine answers for it, and their connections stand: they miss its words, and none is started anew."""
    here, host = there
    ports = free_port(), free_port()
    async with Proxy(f"tls://127.0.0.1:{ports[0]}") as service:
        here.control = service.url.replace("https", "tls")
        first = await here.start("master-a", "--control-listen", f"tls://127.0.0.1:{ports[0]}")
        async with await here.leads(first) as cluster:
            before = [op.pod for op in (await submit(here, cluster)).operators]
        second = await here.start("master-b", "--control-listen", f"tls://127.0.0.1:{ports[1]}")
        async with asyncio.timeout(30):
            while await listed(here) != ["master-b"]:
                await asyncio.sleep(0.1)
        heard = dict(service.answers)
        async with asyncio.timeout(30):  # until all have heard a word: there is nothing else to be said
            while any(service.answers.get(one, count + 2) < count + 2 for one, count in heard.items()):
                await asyncio.sleep(0.1)
        first.process.send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        await here.until(lambda: second.leads)
        led = time.monotonic()
        service.turn(f"tls://127.0.0.1:{ports[1]}")  # as the Service does
        async with await here.leads(second) as cluster:
            while time.monotonic() < led + Reconcile().adopt_grace + 2.0:
                view = await (await cluster.pipeline("p")).status()
                assert [op.restarts for op in view.operators] == [0, 0, 0], f"{led - stopped:.1f} s to the next leader"
                await asyncio.sleep(0.5)
            assert (view.phase, [op.pod for op in view.operators]) == ("running", before)


async def test_its_rights_are_those_that_it_uses(there: tuple[World, Host]) -> None:
    """No request is refused, and nothing is allowed that is never asked for."""
    here, host = there
    since = here.env.audit_size()
    first, second = await here.start("master-a"), await here.start("master-b")
    await here.until(lambda: first.leads or second.leads)
    leader, other = (first, second) if first.leads else (second, first)
    async with await here.leads(leader) as cluster:
        await submit(here, cluster)
        handle = await cluster.pipeline("p")
        await handle.change(moves=False)
        await handle.logs()
        square = (await handle.status()).operators[1]
        names_of = {pod["metadata"]["annotations"].get(names.POD_ANNOTATION): name for name, pod in (
            await here.objects(paths.pods, **{names.COMPONENT: names.OPERATOR})).items()}  # fmt: skip
        host.pod(names_of[square.pod]).end(-9)
        await here.phase(cluster, "p", "degraded")
        await here.phase(cluster, "p", "running")
    await leader.end()
    async with await here.leads(other) as cluster:
        await (await cluster.pipeline("p")).remove()
    user = f"system:serviceaccount:{here.namespace}:nomad-master"
    async with asyncio.timeout(120):  # it looks for bundles that nobody has after a minute
        while ("secrets", "list") not in {
            (request.resource, request.verb) for request in here.env.requests(since, user)
        }:
            await asyncio.sleep(1)
    await other.end()
    requests = [request for request in here.env.requests(since, user) if request.resource]
    refused = [request for request in requests if request.code == 403]
    assert not refused, refused
    used = {(request.group, request.resource, request.verb) for request in requests}
    # What an apply makes is asked for as a patch, and takes the right to create, too.
    used |= {(request.group, request.resource, "create") for request in requests if request.code == 201}
    allowed = {right for role in init_objects(here.namespace) for right in rights(role)}
    assert not used - allowed, f"used, and not in the Role: {sorted(used - allowed)}"
    assert not allowed - used, f"in the Role, and not used: {sorted(allowed - used)}"


def rights(role: dict[str, Any]) -> set[tuple[str, str, str]]:
    """Group, resource and verb of all that the master's roles allow."""
    if role["kind"] not in ("Role", "ClusterRole"):
        return set()
    return {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


IDLE_SECONDS = 41


async def test_an_idle_master_asks_for_hardly_anything(there: tuple[World, Host]) -> None:
    """With a pipeline that runs and another master that waits: one request in ten seconds beside their watches."""
    here, _ = there
    master = await here.start("master-a")
    async with await here.leads(master) as cluster:
        await here.start("master-b")
        await submit(here, cluster)
        async with asyncio.timeout(30):
            while await listed(here) != ["master-b"]:
                await asyncio.sleep(0.1)
        user = f"system:serviceaccount:{here.namespace}:nomad-master"

        def asked(since: int) -> list[Request]:
            """Without the look for unused bundles, which comes once, a minute after the start."""
            found = [r for r in here.env.requests(since, user) if r.verb != "watch"]
            sweep = next((r for r in found if (r.verb, r.resource) == ("list", "secrets")), None)
            return [r for r in found if r is not sweep]

        since, quiet = here.env.audit_size(), time.monotonic()
        while time.monotonic() - quiet < 11:  # what follows a start is over
            await asyncio.sleep(0.5)
            if [r for r in asked(since) if r.resource != "leases"]:
                since, quiet = here.env.audit_size(), time.monotonic()
        since = here.env.audit_size()
        await asyncio.sleep(IDLE_SECONDS)
        assert len(asked(since)) <= IDLE_SECONDS / 10 + 1, asked(since)


AWAY_SECONDS = 60.0


async def test_the_api_server_is_away_for_a_minute(there: tuple[World, Host]) -> None:
    """The master ends in time, and what its container starts next waits; pods go on, and are found again."""
    here, host = there
    master = await here.start("master-a")
    async with await here.leads(master) as cluster:
        before = (await submit(here, cluster)).operators
    here.env.stop_apiserver()
    back = time.monotonic() + AWAY_SECONDS
    try:
        async with asyncio.timeout(20):
            assert await master.process.wait() != 0
        again = await here.start()
        while await again.get("/readyz") != 200:
            assert time.monotonic() < back, again.log
            await asyncio.sleep(0.1)
        while time.monotonic() < back:  # it is well, and knows that it doesn't lead
            assert await again.get("/readyz") == 200, again.log
            assert not again.leads
            await asyncio.sleep(1.0)
    finally:
        await asyncio.to_thread(here.env.start_apiserver)
    async with await here.leads(again) as cluster:
        view = await here.phase(cluster, "p", "running")
        assert [op.pod for op in view.operators] == [op.pod for op in before]
        assert [op.restarts for op in view.operators] == [0, 0, 0]
