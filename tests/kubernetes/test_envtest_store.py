"""The store of a master on Kubernetes, against a real API server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from nomad.control import PodStats
from nomad.errors import StateError
from nomad.kubernetes import paths
from nomad.kubernetes.api import Api
from nomad.master.kube.store import KubernetesStore
from nomad.master.state import Goal, Outcome
from nomad.master.store import StoredOperator
from nomad.master.views import EventView, FailureView, MoveState, MoveView, PlacementView
from tests.clock import VirtualClock
from tests.contract.store import BUNDLE, CHECKS, wanted
from tests.kubernetes.cluster.envtest import Envtest
from tests.kubernetes.cluster.processes import ClusterError
from tests.kubernetes.watched import define

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def defined(envtest: Envtest) -> Envtest:
    define(envtest)
    return envtest


@pytest.fixture
async def api(defined: Envtest) -> AsyncIterator[Api]:
    async with Api.open(defined.kubeconfig) as api:
        yield api


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_contract(check: Callable[[Any], Awaitable[None]], api: Api, namespace: str) -> None:
    await check(lambda: KubernetesStore.open(api, namespace, "master-a"))


BIG = bytes(range(256)) * (3 << 10)  # 768 KiB


def _operator(epoch: int, name: str = "square") -> StoredOperator:
    return StoredOperator(name, epoch, f"p.{name}-e{epoch}", f"p.{name}-e{epoch}", 0, highest=epoch)


async def test_a_bundle_lies_in_chunks_and_what_is_changed_is_noticed(
    api: Api, namespace: str, defined: Envtest
) -> None:
    store = await KubernetesStore.open(api, namespace, "master-a")
    pipeline = wanted(bundle=BIG)
    await store.add_pipeline(pipeline, BIG)
    await store.add_pipeline(wanted("q", BIG), BIG)  # the same code: no more Secrets
    secrets = defined.get("secrets", "-n", namespace, "-l", f"nomad.dev/bundle={pipeline.bundle[:63]}")["items"]
    assert len(secrets) == 5
    assert await store.bundle(pipeline.bundle) == BIG
    name = secrets[1]["metadata"]["name"]
    with pytest.raises(ClusterError, match="immutable"):
        defined.kubectl("patch", "secret", name, "-n", namespace, "-p", '{"data": {"bundle": "AAAA"}}')
    defined.kubectl("delete", "secret", name, "-n", namespace)
    with pytest.raises(StateError, match=f"there is no Secret {name}"):
        await store.bundle(pipeline.bundle)
    await api.create(paths.secrets(namespace), _bare(secrets[1]) | {"data": {"bundle": "AAAA"}})
    with pytest.raises(StateError, match="is damaged"):
        await store.bundle(pipeline.bundle)
    await store.add_pipeline(wanted("r", BIG), BIG)  # mends it
    assert await store.bundle(pipeline.bundle) == BIG
    await store.close()


def _bare(secret: dict[str, Any]) -> dict[str, Any]:
    kept = ("name", "labels", "annotations")
    return secret | {"metadata": {key: value for key, value in secret["metadata"].items() if key in kept}}


async def test_a_bundle_stays_for_a_day(api: Api, namespace: str, defined: Envtest) -> None:
    clock = VirtualClock()
    store = await KubernetesStore.open(api, namespace, "master-a", clock=clock)
    await store.add_pipeline(wanted(), BUNDLE)
    await store.remove_pipeline("p", 1)

    def marks() -> list[Any]:
        found = defined.get("secrets", "-n", namespace, "-l", "nomad.dev/bundle")["items"]
        return [secret["metadata"]["annotations"].get("nomad.dev/unused-since") for secret in found]

    await until(lambda: marks() != [None], clock, 60.0)
    assert len(marks()) == 1
    await store.add_pipeline(wanted(), BUNDLE)
    assert marks() == [None]
    await store.remove_pipeline("p", 2)
    await until(lambda: marks() != [None], clock, 60.0)
    await until(lambda: marks() == [], clock, 3600.0)
    await store.close()


async def test_what_nothing_changes_asks_for_nothing(api: Api, namespace: str) -> None:
    store = await KubernetesStore.open(api, namespace, "master-a")
    await store.add_pipeline(wanted(), BUNDLE)
    view = MoveView("m", "p", "square", "cloud", "edge", "user", "because", MoveState.PLANNED, 1.0)
    for _ in range(3):
        before = api.requests
        await store.save_operator("p", _operator(1))
        await store.set_placement("p", wanted().placement)
        await store.set_placing("p", moves=True, pins={})
        await store.save_moves([view], 3)
        await store.set_meta("overrides", b"x")
        assert [event.id for event in await store.events(5)] == []
        assert len(await store.pipelines()) == 1
    assert api.requests - before == 2  # reading the link key and the history
    await store.close()


async def test_a_switch_is_one_write(api: Api, namespace: str) -> None:
    store = await KubernetesStore.open(api, namespace, "master-a")
    await store.add_pipeline(wanted(), BUNDLE)
    await store.save_operator("p", _operator(1))
    before = api.requests
    placement = {**wanted().placement, "square": PlacementView("edge", "it was moved")}
    view = MoveView("m", "p", "square", "cloud", "edge", "user", "because", MoveState.SWITCHING, 1.0)
    await store.save_switch("p", _operator(2), placement, view)
    assert api.requests - before == 1
    await asyncio.gather(*(store.save_operator("p", _operator(3, name)) for name in ("source", "square", "sink")))
    assert api.requests - before <= 3  # what comes while another write is under way goes together
    await store.close()


async def test_a_user_edits_at_the_same_time(api: Api, namespace: str, defined: Envtest) -> None:
    store = await KubernetesStore.open(api, namespace, "master-a")
    await store.add_pipeline(wanted(), BUNDLE)
    defined.kubectl("patch", "pipeline", "p", "-n", namespace, "--type=merge", "-p", '{"spec": {"moves": false}}')
    defined.kubectl("label", "pipeline", "p", "-n", namespace, "team=vision")
    await store.save_operator("p", _operator(4))
    await store.set_goal("p", Goal.STOP)
    found = defined.get("pipeline", "p", "-n", namespace)
    assert (found["spec"]["moves"], found["spec"]["goal"]) == (False, "Stop")
    assert found["metadata"]["labels"]["team"] == "vision"
    assert found["status"]["operators"][1]["epoch"] == 4
    await store.close()


async def test_a_master_that_was_superseded_writes_nothing_any_more(api: Api, namespace: str) -> None:
    old = await KubernetesStore.open(api, namespace, "master-a")
    await old.add_pipeline(wanted(), BUNDLE)
    await old.save_operator("p", _operator(1))
    new = await KubernetesStore.open(api, namespace, "master-b")
    with pytest.raises(StateError, match="leads no more"):
        await old.save_operator("p", _operator(2))
    assert old.fenced.is_set()
    for late in (
        old.set_meta("epoch_floor", b"9"),
        old.set_goal("p", Goal.STOP),
        old.set_outcome("p", Outcome.FAILED, ""),
        old.add_pipeline(wanted("q"), BUNDLE),
    ):
        with pytest.raises(StateError, match="leads no more, .*master-b"):
            await late
    await new.save_operator("p", _operator(2))
    (found,) = await new.pipelines()
    assert [op.epoch for op in found.operators] == [2]
    assert not new.fenced.is_set()
    await old.close()
    await new.close()


async def test_a_master_is_superseded_while_it_knows_of_no_pipeline(api: Api, namespace: str) -> None:
    old = await KubernetesStore.open(api, namespace, "master-a")
    new = await KubernetesStore.open(api, namespace, "master-b")
    with pytest.raises(StateError, match="leads no more"):
        await old.set_meta("epoch_floor", b"9")
    await new.set_meta("epoch_floor", b"3")
    await new.close()
    await old.close()


async def test_a_master_that_lost_its_lease_is_told(api: Api, namespace: str) -> None:
    store = await KubernetesStore.open(api, namespace, "master-a")
    store.fence("its lease has run out")
    with pytest.raises(StateError, match="its lease has run out"):
        await store.add_pipeline(wanted(), BUNDLE)
    await store.close()


async def test_the_api_server_is_away_for_a_while(api: Api, namespace: str, defined: Envtest) -> None:
    store = await KubernetesStore.open(api, namespace, "master-a")
    await store.add_pipeline(wanted(), BUNDLE)
    await asyncio.to_thread(defined.stop_apiserver)
    try:
        began = asyncio.get_running_loop().time()
        with pytest.raises(StateError, match="API doesn't answer"):
            await store.set_goal("p", Goal.STOP)
        assert asyncio.get_running_loop().time() - began < 15
        waiting = asyncio.create_task(store.save_operator("p", _operator(7)))
        over = asyncio.create_task(store.set_outcome("p", Outcome.COMPLETED, ""))
        await store.add_events([EventView(1, 1.0, "a", "while it was away")], 10)
        done, _ = await asyncio.wait({waiting}, timeout=10.0)
        assert not done
    finally:
        await asyncio.to_thread(defined.start_apiserver)
    await asyncio.gather(waiting, over)
    (found,) = await store.pipelines()
    assert ([op.epoch for op in found.operators], found.outcome) == ([7], Outcome.COMPLETED)
    await store.close()
    store = await KubernetesStore.open(api, namespace, "master-a")
    assert [event.message for event in await store.events(9)] == ["while it was away"]
    await store.close()


async def test_an_api_server_that_hangs_is_away(api: Api, namespace: str, defined: Envtest) -> None:
    store = await KubernetesStore.open(api, namespace, "master-a")
    await store.add_pipeline(wanted(), BUNDLE)
    await asyncio.to_thread(defined.pause_apiserver)
    try:
        with pytest.raises(StateError, match="API doesn't answer"):
            await store.set_goal("p", Goal.STOP)
    finally:
        await asyncio.to_thread(defined.resume_apiserver)
    await store.set_goal("p", Goal.STOP)
    (found,) = await store.pipelines()
    assert found.wanted.goal is Goal.STOP
    await store.close()


async def test_what_users_delete_of_a_masters_own(api: Api, namespace: str, defined: Envtest) -> None:
    store = await KubernetesStore.open(api, namespace, "master-a")
    await store.add_pipeline(wanted(), BUNDLE)
    await store.save_operator("p", replace(_operator(1), totals=PodStats(processed=3)))
    await store.set_meta("epoch_floor", b"3")
    defined.kubectl("delete", "configmap", "-n", namespace, "nomad-state", "p-history")
    await store.set_meta("overrides", b"x")
    await store.save_operator("p", replace(_operator(1), totals=PodStats(processed=4)))
    await store.close()
    store = await KubernetesStore.open(api, namespace, "master-a")
    assert await store.meta() == {"epoch_floor": b"3", "overrides": b"x"}
    (found,) = await store.pipelines()
    assert found.operators[0].totals.processed == 4
    defined.kubectl("delete", "secret", "-n", namespace, "p-link")
    (found,) = await store.pipelines()
    assert len(found.wanted.link_key) == 32
    assert (await store.pipelines())[0].wanted.link_key == found.wanted.link_key
    await store.close()


async def test_the_past_fits_whatever_it_is(api: Api, namespace: str) -> None:
    store = await KubernetesStore.open(api, namespace, "master-a")
    await store.add_pipeline(wanted(), BUNDLE)
    random = Random(1)
    trace = "".join(random.choice("abcdefghijklmnop") for _ in range(1 << 20))
    for name in ("source", "square", "sink"):
        totals = PodStats(processed=5, last_output=random.randbytes(400 << 10 if name == "sink" else 1000))
        await store.save_operator(
            "p", replace(_operator(1, name), totals=totals, failure=FailureView(1.0, "boom", "ValueError", trace))
        )
    events = [EventView(n, 1.0, "a", trace[:5000] + str(n)) for n in range(1000)]
    await store.add_events(events, 10_000)
    await store.close()
    store = await KubernetesStore.open(api, namespace, "master-a")
    (found,) = await store.pipelines()
    assert [op.totals.processed for op in found.operators] == [5, 5, 5]
    assert all(op.failure is not None and op.failure.message == "boom" for op in found.operators)
    assert (await store.events(9))[-1] == events[-1]
    await store.close()


async def until(condition: Callable[[], object], clock: VirtualClock, passing: float) -> None:
    """Wait for it, letting `passing` virtual seconds go by in every round."""
    async with asyncio.timeout(60):
        while not await asyncio.to_thread(condition):
            await clock.advance(passing)
            await asyncio.sleep(0.01)
