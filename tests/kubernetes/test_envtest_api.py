"""The client of Kubernetes' API against a real one: errors, pages, watches, and what happens when it goes away."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from nomad.errors import (
    ApiConflict,
    ApiExists,
    ApiForbidden,
    ApiGone,
    ApiInvalid,
    ApiNotFound,
    ApiUnauthorized,
    ApiUnavailable,
    UsageError,
)
from nomad.kubernetes import paths
from nomad.kubernetes.api import Api
from nomad.kubernetes.reflector import Reflector
from nomad.tasks import Tasks
from tests.kubernetes.cluster.envtest import Envtest, write_kubeconfig
from tests.kubernetes.proxy import Proxy

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(120)]

DEADLINE = 20.0


@pytest.fixture
async def api(envtest: Envtest) -> AsyncIterator[Api]:
    async with Api.open(envtest.kubeconfig) as api:
        yield api


@pytest.fixture
async def proxy(envtest: Envtest) -> AsyncIterator[Proxy]:
    async with Proxy(envtest.server) as proxy:
        yield proxy


@pytest.fixture
async def far(envtest: Envtest, proxy: Proxy, tmp_path: Path) -> AsyncIterator[Api]:
    """The API through the proxy."""
    async with Api.open(proxy.kubeconfig(envtest.kubeconfig, tmp_path / "kubeconfig")) as api:
        yield api


def configmap(name: str, **data: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}


class Copy:
    """A reflector of a namespace's ConfigMaps, and what it told."""

    def __init__(self, api: Api, namespace: str) -> None:
        self.told: list[tuple[str | None, str | None]] = []
        self._changed = asyncio.Event()
        self._tasks = Tasks()
        self.reflector: Reflector[str] = Reflector(
            api,
            paths.configmaps(namespace),
            lambda item: (item.get("data") or {}).get("x", ""),
            self._on_change,
            params={"fieldSelector": "metadata.name!=kube-root-ca.crt"},
        )

    async def __aenter__(self) -> Copy:
        self._tasks.start(self.reflector.run(), name="reflector")
        async with asyncio.timeout(DEADLINE):
            await self.reflector.synced()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._tasks.close()

    async def until(self, **items: str) -> None:
        async with asyncio.timeout(DEADLINE):
            while self.reflector.items != items:
                self._changed.clear()
                await self._changed.wait()

    def _on_change(self, old: str | None, new: str | None) -> None:
        self.told.append((old, new))
        self._changed.set()


async def test_an_object_that_isnt_there_is_named_and_a_path_that_isnt_there_is_not(api: Api, namespace: str) -> None:
    with pytest.raises(ApiNotFound) as no_pod:
        await api.patch(paths.pods(namespace, "one", "resize"), {}, kind="strategic")
    assert no_pod.value.details["name"] == "one"
    with pytest.raises(ApiNotFound) as no_path:
        await api.patch(paths.pods(namespace, "one", "enlarge"), {}, kind="strategic")
    assert "name" not in no_path.value.details


async def test_objects_are_made_changed_and_deleted(api: Api, namespace: str) -> None:
    path = paths.configmaps(namespace, "one")
    made = await api.create(paths.configmaps(namespace), configmap("one", x="1"))
    with pytest.raises(ApiExists):
        await api.create(paths.configmaps(namespace), configmap("one"))
    assert (await api.get(path))["data"] == {"x": "1"}
    await api.patch(path, {"data": {"x": "2"}})
    stale = {"metadata": {"resourceVersion": made["metadata"]["resourceVersion"]}, "data": {"x": "3"}}
    with pytest.raises(ApiConflict):
        await api.patch(path, stale)
    with pytest.raises(ApiConflict):
        await api.replace(path, {**configmap("one"), **stale, "metadata": {**made["metadata"]}})
    await api.patch(path, [{"op": "test", "path": "/data/x", "value": "2"}], kind="json")
    with pytest.raises(ApiInvalid):
        await api.patch(path, [{"op": "test", "path": "/data/x", "value": "nine"}], kind="json")
    with pytest.raises(ApiConflict):
        await api.delete(path, uid="another")
    with pytest.raises(ApiConflict):
        await api.delete(path, version="1")
    last = (await api.get(path))["metadata"]
    assert await api.delete(path, uid=last["uid"], version=last["resourceVersion"])
    assert not await api.delete(path)
    with pytest.raises(ApiNotFound, match="not found"):
        await api.get(path)


async def test_applied_fields_are_owned(api: Api, namespace: str) -> None:
    path = paths.configmaps(namespace, "applied")
    await api.apply(path, configmap("applied", x="1", y="1"))
    await api.apply(path, configmap("applied", x="2"))
    assert (await api.get(path))["data"] == {"x": "2"}
    with pytest.raises(ApiConflict, match="conflict"):
        await api.apply(path, configmap("applied", x="3"), manager="somebody", force=False)


async def test_what_is_not_allowed_or_not_valid_says_so(api: Api, envtest: Envtest, namespace: str) -> None:
    async with Api.open(envtest.kubeconfig_for("default", namespace)) as other:
        with pytest.raises(ApiForbidden, match="cannot get resource"):
            await other.get(paths.secrets(namespace, "any"))
    with pytest.raises(ApiInvalid, match="metadata.name"):
        await api.create(paths.configmaps(namespace), configmap("Not Valid"))


async def test_who_is_not_known_is_told_so(envtest: Envtest, tmp_path: Path) -> None:
    file = tmp_path / "kubeconfig"
    write_kubeconfig(file, envtest.server, envtest.folder / "pki" / "ca.crt", {"token": "wrong"})
    async with Api.open(file) as api:
        with pytest.raises(ApiUnauthorized):
            await api.get("/version")


async def test_a_token_that_ran_out_is_read_again(envtest: Envtest, namespace: str, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("old")
    file = tmp_path / "kubeconfig"
    write_kubeconfig(file, envtest.server, envtest.folder / "pki" / "ca.crt", {"tokenFile": str(token)})
    async with Api.open(file) as api:
        token.write_text(envtest.kubectl("create", "token", "default", "-n", namespace).strip())
        assert "gitVersion" in await api.get("/version")


async def test_a_watch_has_its_token_read_again(api: Api, envtest: Envtest, namespace: str, tmp_path: Path) -> None:
    await api.create(paths.configmaps(namespace), configmap("one", x="1"))
    envtest.kubectl("create", "role", "reader", "--verb=list,watch", "--resource=configmaps", "-n", namespace)
    binding = ("create", "rolebinding", "reader", "--role=reader", f"--serviceaccount={namespace}:default")
    envtest.kubectl(*binding, "-n", namespace)
    token, file = tmp_path / "token", tmp_path / "kubeconfig"
    valid = envtest.kubectl("create", "token", "default", "-n", namespace).strip()
    token.write_text(valid)
    write_kubeconfig(file, envtest.server, envtest.folder / "pki" / "ca.crt", {"tokenFile": str(token)})
    async with Api.open(file) as other:
        _, version = await other.list(paths.configmaps(namespace))
        token.write_text("wrong")
        await other._login.renew()
        token.write_text(valid)
        with pytest.raises(ApiUnauthorized):
            await anext(other.watch(paths.configmaps(namespace), None, version))
        await api.create(paths.configmaps(namespace), configmap("two"))
        async with asyncio.timeout(DEADLINE):
            event = await anext(other.watch(paths.configmaps(namespace), None, version))
        assert event["object"]["metadata"]["name"] == "two"


async def test_without_a_cluster_there_is_nothing_to_open(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no Kubernetes cluster"):
        async with Api.open(tmp_path / "none"):
            pass


async def test_lists_come_in_pages(api: Api, namespace: str) -> None:
    for number in range(7):
        await api.create(paths.configmaps(namespace), configmap(f"page-{number}"))
    before = api.requests
    found, version = await api.collect(paths.configmaps(namespace), lambda item: item["metadata"]["name"], limit=3)
    assert [name for name in found if name.startswith("page-")] == [f"page-{number}" for number in range(7)]
    assert version.isdigit()
    assert api.requests - before == 3
    whole, _ = await api.list(paths.configmaps(namespace))
    assert len(whole) == len(found)


async def test_a_page_that_is_too_old_begins_the_list_again(api: Api, envtest: Envtest, namespace: str) -> None:
    for number in range(6):
        await api.create(paths.configmaps(namespace), configmap(f"page-{number}"))
    seen: list[str] = []

    def take(item: dict[str, Any]) -> str:
        if not seen:
            compact(envtest, api)
        seen.append(item["metadata"]["name"])
        return seen[-1]

    found, _ = await api.collect(paths.configmaps(namespace), take, limit=2)
    assert len(set(found)) == len(found) >= 6


def compact(envtest: Envtest, api: Api) -> None:
    """Throw away the past: etcd's, and with a new API server also what that remembers."""
    server = next(part for part in envtest._apiserver if part.startswith("--etcd-servers="))
    url = server.partition("=")[2]
    read = urllib.request.Request(f"{url}/v3/kv/range", data=b'{"key": "AA=="}')
    with urllib.request.urlopen(read, timeout=10) as answer:
        revision = json.load(answer)["header"]["revision"]
    cut = urllib.request.Request(f"{url}/v3/kv/compaction", data=json.dumps({"revision": revision}).encode())
    with urllib.request.urlopen(cut, timeout=10):
        pass
    envtest.stop_apiserver()
    envtest.start_apiserver()


async def test_a_watch_tells_changes_and_its_place(api: Api, namespace: str) -> None:
    _, version = await api.list(paths.configmaps(namespace))
    await api.create(paths.configmaps(namespace), configmap("one"))
    await api.delete(paths.configmaps(namespace, "one"))
    async with asyncio.timeout(DEADLINE):
        events = [
            event["type"] async for event in api.watch(paths.configmaps(namespace), None, version, seconds=6)
        ]  # ends by itself
    assert events[:2] == ["ADDED", "DELETED"]
    assert set(events[2:]) <= {"BOOKMARK"}


async def test_a_reflector_follows_through_everything(
    api: Api, far: Api, proxy: Proxy, envtest: Envtest, namespace: str
) -> None:
    await api.create(paths.configmaps(namespace), configmap("kept", x="1"))
    await api.create(paths.configmaps(namespace), configmap("gone", x="1"))
    async with Copy(far, namespace) as copy:
        assert copy.reflector.items == {"kept": "1", "gone": "1"}
        await api.patch(paths.configmaps(namespace, "kept"), {"data": {"x": "2"}})
        await copy.until(kept="2", gone="1")
        # The connection is cut, and for a while there is none.
        proxy.refusing = True
        await proxy.cut()
        await api.delete(paths.configmaps(namespace, "gone"))
        await api.create(paths.configmaps(namespace), configmap("new", x="1"))
        while not copy.reflector.error:
            await asyncio.sleep(0.01)
        proxy.refusing = False
        await copy.until(kept="2", new="1")
        # Its place is forgotten: only a list can help.
        proxy.refusing = True
        await proxy.cut()
        await api.delete(paths.configmaps(namespace, "new"))
        await api.patch(paths.configmaps(namespace, "kept"), {"data": {"x": "3"}})
        await asyncio.to_thread(compact, envtest, api)
        proxy.refusing = False
        await copy.until(kept="3")
        assert copy.told == [
            (None, "1"),
            (None, "1"),
            ("1", "2"),
            ("1", None),
            (None, "1"),
            *copy.told[5:],
        ]
        assert sorted(copy.told[5:], key=str) == [("1", None), ("2", "3")]


async def test_a_place_that_is_too_old_is_gone(api: Api, envtest: Envtest, namespace: str) -> None:
    _, version = await api.list(paths.configmaps(namespace))
    for number in range(3):
        await api.patch(paths.namespaces(namespace), {"metadata": {"labels": {"n": str(number)}}})
        await api.create(paths.configmaps(namespace), configmap(f"n{number}"))
    await asyncio.to_thread(compact, envtest, api)
    with pytest.raises(ApiGone):
        async for _ in api.watch(paths.configmaps(namespace), None, version, seconds=3):
            pass


async def test_answers_to_writes_are_taken_in_at_once_and_older_events_are_not(api: Api, namespace: str) -> None:
    async with Copy(api, namespace) as copy:
        made = await api.create(paths.configmaps(namespace), configmap("one", x="1"))
        copy.reflector.seen(made)
        newer = await api.patch(paths.configmaps(namespace, "one"), {"data": {"x": "2"}})
        copy.reflector.seen(newer)
        assert copy.reflector.items == {"one": "2"}
        await api.create(paths.configmaps(namespace), configmap("two", x="1"))
        await copy.until(one="2", two="1")
        assert copy.told == [(None, "1"), ("1", "2"), (None, "1")]
        await api.delete(paths.configmaps(namespace, "one"))
        await copy.until(two="1")
        copy.reflector.seen(newer)
        assert copy.reflector.items == {"two": "1"}


async def test_an_api_server_that_is_killed_comes_back(api: Api, envtest: Envtest, namespace: str) -> None:
    await api.create(paths.configmaps(namespace), configmap("one", x="1"))
    async with Copy(api, namespace) as copy:
        await asyncio.to_thread(envtest.stop_apiserver)
        with pytest.raises(ApiUnavailable, match="can't be reached"):
            await api.get("/version")
        while not copy.reflector.error:
            await asyncio.sleep(0.01)
        assert copy.reflector.items == {"one": "1"}
        await asyncio.to_thread(envtest.start_apiserver)
        await api.patch(paths.configmaps(namespace, "one"), {"data": {"x": "2"}})
        await copy.until(one="2")
        assert copy.told == [(None, "1"), ("1", "2")]


async def test_who_is_told_to_wait_waits(api: Api, envtest: Envtest, namespace: str) -> None:
    """The API's own flow control lets an account ask for one thing at a time, and turns the rest away."""
    level = {
        "apiVersion": "flowcontrol.apiserver.k8s.io/v1",
        "kind": "PriorityLevelConfiguration",
        "metadata": {"name": namespace},
        "spec": {
            "type": "Limited",
            "limited": {
                "nominalConcurrencyShares": 0,
                "lendablePercent": 0,
                "borrowingLimitPercent": 0,
                "limitResponse": {"type": "Reject"},
            },
        },
    }
    account = {"kind": "ServiceAccount", "serviceAccount": {"name": "default", "namespace": namespace}}
    everything = {"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"], "namespaces": ["*"], "clusterScope": True}
    flow = {
        "apiVersion": "flowcontrol.apiserver.k8s.io/v1",
        "kind": "FlowSchema",
        "metadata": {"name": namespace},
        "spec": {
            "priorityLevelConfiguration": {"name": namespace},
            "matchingPrecedence": 2,
            "rules": [
                {
                    "subjects": [account],
                    "resourceRules": [everything],
                    "nonResourceRules": [{"verbs": ["*"], "nonResourceURLs": ["*"]}],
                }
            ],
        },
    }
    flows = "/apis/flowcontrol.apiserver.k8s.io/v1"
    await api.create(f"{flows}/prioritylevelconfigurations", level)
    await api.create(f"{flows}/flowschemas", flow)

    class Waiting:
        """Real time, with a note of who waits."""

        def __init__(self) -> None:
            self.waits: list[float] = []

        def now(self) -> float:
            return asyncio.get_running_loop().time()

        wall = now

        async def sleep(self, seconds: float) -> None:
            self.waits.append(seconds)
            await asyncio.sleep(seconds / 10)

    clock = Waiting()
    try:
        async with Api.open(envtest.kubeconfig_for("default", namespace), clock=clock) as other:
            async with asyncio.timeout(DEADLINE):
                while not clock.waits:  # a moment after the API was told so
                    await asyncio.gather(*(other.get("/version") for _ in range(10)), return_exceptions=True)
            assert all(1.0 <= wait <= 10.0 for wait in clock.waits)
            assert "gitVersion" in await other.get("/version")
    finally:
        await api.delete(f"{flows}/flowschemas/{namespace}")
        await api.delete(f"{flows}/prioritylevelconfigurations/{namespace}")
