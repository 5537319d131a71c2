"""The store of a master on Kubernetes, without a cluster; tests/kubernetes has its contract, with one."""

from __future__ import annotations

import asyncio
import base64
import gzip
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, cast

import pytest

from nomad.control import PodStats
from nomad.errors import ApiForbidden, ApiUnavailable, StateError
from nomad.kubernetes import paths
from nomad.kubernetes.names import API_VERSION, KIND, META_CONFIGMAP
from nomad.master import kubeobjects, kubestate, kubestore
from nomad.master.events import EventLog
from nomad.master.kubestore import KubernetesStore
from nomad.master.kubewrites import LOOP
from nomad.master.resource import LABELS
from nomad.master.state import Goal, Outcome
from nomad.master.store import StoredOperator
from nomad.master.views import EventView, MoveState, MoveView
from tests.clock import VirtualClock, settle
from tests.contract.store import BUNDLE, wanted
from tests.master.fakeapi import FakeApi

LINK, HISTORY = paths.secrets("nomad", "p-link"), paths.configmaps("nomad", "p-history")
PIPELINE = paths.pipelines("nomad", "p")
PAST = StoredOperator("square", 1, "p.square-e1", "p.square-e1", 0, PodStats(processed=7), highest=1)


@pytest.fixture
def api() -> FakeApi:
    return FakeApi()


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
async def store(api: Any, clock: VirtualClock) -> AsyncIterator[KubernetesStore]:
    store = await KubernetesStore.open(api, "nomad", "master-a", clock=clock)
    yield store
    await store.close()


# What isn't Nomad's


@pytest.mark.parametrize("path", [LINK, HISTORY])
async def test_what_a_user_calls_so_stays(api: FakeApi, store: KubernetesStore, path: str) -> None:
    mine = api.put(path, {"metadata": {"labels": {"app": "mine"}}, "data": {"key": "bWluZQ=="}})
    name = path.rpartition("/")[2]
    with pytest.raises(StateError, match=f"there is a {'Secret' if path == LINK else 'ConfigMap'} {name} .*isn't Nom"):
        await store.add_pipeline(wanted(), BUNDLE)
    assert api.objects[path] == mine
    assert store.of("p") is not None
    assert not store.known()


async def test_what_a_user_made_later_stays_too(api: FakeApi, store: KubernetesStore) -> None:
    await store.add_pipeline(wanted(), BUNDLE)
    mine = [api.put(path, {"data": {"key": "bWluZQ=="}}) for path in (LINK, HISTORY)]
    with pytest.raises(StateError, match="delete or rename it"):
        await store.save_operator("p", PAST)
    await store.save_operator("p", PAST)  # which is the same once more: an operator may start without its past
    await store.remove_pipeline("p", 1)
    assert PIPELINE not in api.objects
    assert [api.objects[path] for path in (LINK, HISTORY)] == mine


@pytest.mark.parametrize(
    "metadata",
    [
        {"labels": dict(LABELS)},
        {"ownerReferences": [{"apiVersion": API_VERSION, "kind": KIND, "name": "p", "uid": "an earlier one"}]},
    ],
)
async def test_what_an_earlier_pipeline_left_is_replaced(api: FakeApi, store: KubernetesStore, metadata: Any) -> None:
    for path in (LINK, HISTORY):
        api.put(path, {"metadata": metadata, "data": {"key": "bWluZQ=="}})
    await store.add_pipeline(wanted(), BUNDLE)
    await store.save_operator("p", PAST)
    (found,) = await store.pipelines()
    assert (found.wanted.link_key, found.operators[0].totals) == (wanted().link_key, replace(PAST).totals)
    await store.remove_pipeline("p", 1)
    assert not {LINK, HISTORY, PIPELINE} & api.objects.keys()


# Users wait for some seconds, whatever else waits


MOVE = MoveView("m", "p", "square", "cloud", "edge", "user", "because", MoveState.PLANNED, 1.0)


class Slow:
    """Has requests wait until they may go on, one after the other."""

    def __init__(self, api: FakeApi, verb: str, path: str) -> None:
        self.waiting: list[asyncio.Event] = []
        self._api, self._what = api, (verb, path)
        api.meet = self._meet  # type: ignore[method-assign]

    async def _meet(self, verb: str, path: str) -> None:
        if (verb, path) == self._what:
            self.waiting.append(asyncio.Event())
            await self.waiting[-1].wait()

    async def arrived(self, count: int) -> None:
        await until(lambda: len(self.waiting) >= count)

    def end(self) -> None:
        self._what = ("", "")
        for each in self.waiting:
            each.set()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


async def test_a_user_doesnt_wait_as_long_as_the_masters_own_writes(
    api: FakeApi, store: KubernetesStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.add_pipeline(wanted(), BUNDLE)
    monkeypatch.setattr(kubestore, "USER", 0.05)
    slow = Slow(api, "patch", f"{PIPELINE}/status")
    own = asyncio.create_task(store.save_operator("p", StoredOperator("square", 1, "p.square-e1", "", 0, highest=1)))
    await slow.arrived(1)
    began = time.monotonic()
    for refused in (
        store.set_goal("p", Goal.STOP),
        store.set_placing("p", moves=False, pins={}),
        store.order_move(MOVE, 3),
    ):
        with pytest.raises(StateError, match="API doesn't answer"):
            await refused
    assert time.monotonic() - began < 5
    slow.end()
    await own
    await store.set_outcome("p", Outcome.FAILED, "")  # comes after what was withdrawn
    found = api.objects[PIPELINE]
    assert (found["spec"]["goal"], found["spec"]["moves"]) == ("Run", True)
    assert "openMoves" not in found["status"]


async def test_a_fact_doesnt_wait_for_events(
    api: FakeApi, store: KubernetesStore, clock: VirtualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubestore, "USER", 0.05)
    slow = Slow(api, "patch", paths.configmaps("nomad", META_CONFIGMAP))
    await store.add_events([EventView(1, 1.0, "a", "b")], 10)
    await clock.advance(kubestate.EVENTS_EVERY)
    await slow.arrived(1)
    with pytest.raises(StateError, match="API doesn't answer"):
        await store.set_meta("overrides", b"x")
    slow.end()
    await store.set_meta("overrides", b"x")


async def test_an_order_that_was_refused_is_taken_back(
    api: FakeApi, store: KubernetesStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was on its way already, together with a write of the master's own."""
    await store.add_pipeline(wanted(), BUNDLE)
    monkeypatch.setattr(kubestore, "USER", 0.3)
    slow = Slow(api, "patch", f"{PIPELINE}/status")
    own = asyncio.create_task(store.save_operator("p", StoredOperator("square", 1, "p.square-e1", "", 0, highest=1)))
    await slow.arrived(1)
    order = asyncio.create_task(store.order_move(MOVE, 3))
    await api.patch(PIPELINE, {"metadata": {"labels": {"team": "vision"}}})  # the first one conflicts
    slow.waiting[0].set()
    await slow.arrived(2)
    with pytest.raises(StateError, match="API doesn't answer"):
        await order
    slow.waiting[1].set()
    await own
    assert [entry["id"] for entry in api.objects[PIPELINE]["status"]["openMoves"]] == ["m"]
    slow.end()
    await until(lambda: "openMoves" not in api.objects[PIPELINE]["status"])
    await store.order_move(MOVE, 3)
    assert [entry["id"] for entry in api.objects[PIPELINE]["status"]["openMoves"]] == ["m"]


# A past that couldn't be written down at once


async def test_a_past_that_couldnt_be_written_down_is_with_the_next_write(
    api: FakeApi, store: KubernetesStore, clock: VirtualClock
) -> None:
    await store.add_pipeline(wanted(), BUNDLE)
    other = replace(MOVE, id="n", asked=2.0)
    await store.save_moves([MOVE, other], 10)

    async def away(verb: str, path: str) -> None:
        if "configmaps" in path and verb != "get":
            raise ApiUnavailable("nobody answers")

    meet, api.meet = api.meet, away  # type: ignore[method-assign]
    done = replace(MOVE, state=MoveState.DONE)
    late = [asyncio.create_task(store.save_moves([done], 10)), asyncio.create_task(store.save_operator("p", PAST))]
    await settle()
    await clock.advance(3 * LOOP)
    assert [type(error) for error in await asyncio.gather(*late, return_exceptions=True)] == [StateError, StateError]
    api.meet = meet  # type: ignore[method-assign]
    await store.save_moves([replace(other, state=MoveState.STARTING)], 10)
    await store.save_operator("p", replace(PAST, restarts=1))

    again = await KubernetesStore.open(cast(Any, api), "nomad", "master-b", clock=clock)
    (found,) = await again.pipelines()
    await again.close()
    assert {move.id: move.state for move in found.moves} == {"m": MoveState.DONE, "n": MoveState.STARTING}
    assert [op.totals.processed for op in found.operators if op.name == "square"] == [7]


# One bad object isn't everybody's


@asynccontextmanager
async def _closing(store: KubernetesStore) -> AsyncIterator[KubernetesStore]:
    try:
        yield store
    finally:
        await store.close()


@pytest.mark.parametrize(
    ("verb", "path", "lost"),
    [
        ("patch", f"{PIPELINE}/status", False),
        ("get", LINK, True),
        ("create", LINK.removesuffix("/p-link"), False),
        ("get", HISTORY, False),
    ],
)
async def test_a_master_begins_whatever_one_pipeline_is_like(
    api: Any, store: KubernetesStore, clock: VirtualClock, verb: str, path: str, lost: bool
) -> None:
    for id in "pq":
        await store.add_pipeline(wanted(id), BUNDLE)
    if verb == "create":
        del api.objects[LINK]

    async def meet(asked: str, where: str) -> None:
        if (asked, where) == (verb, path):
            raise ApiForbidden("a policy is against it")

    api.meet = meet
    again = await KubernetesStore.open(api, "nomad", "master-b", clock=clock)
    assert [found.wanted.spec.id for found in await again.pipelines()] == (["q"] if lost else ["p", "q"])
    assert again.unread == ({"p"} if lost else set())
    assert PIPELINE in api.objects
    await again.close()


@pytest.mark.parametrize("how", ["deleted by force", "let go"])
async def test_what_couldnt_be_read_is_remembered_until_it_is_gone(
    api: Any, store: KubernetesStore, clock: VirtualClock, how: str
) -> None:
    await store.add_pipeline(wanted(), BUNDLE)
    api.objects[LINK]["data"]["key"] = "no key"
    async with _closing(await KubernetesStore.open(api, "nomad", "master-b", clock=clock)) as again:
        assert await again.pipelines() == []
        assert again.unread == {"p"}
        (held,) = again.known()
        if how == "let go":
            await again.discard(held)
        else:
            again.lost(held.name, held.uid)
        assert not again.unread


@pytest.mark.parametrize("part", ["moves.json.gz", "operators.json.gz"])
@pytest.mark.parametrize("damage", ["no base64", "no gzip", "cut off", "other bytes", "no JSON", "other JSON"])
async def test_a_pipeline_whose_past_cant_be_read_goes_on_without_it(
    api: Any, store: KubernetesStore, clock: VirtualClock, damage: str, part: str
) -> None:
    await store.add_pipeline(wanted(), BUNDLE)
    await store.save_operator("p", PAST)
    data = api.objects[HISTORY]["binaryData"]
    packed = base64.b64decode(data[part])
    damaged = {
        "no gzip": b"what is this",
        "cut off": packed[:-9],
        "other bytes": packed[:10] + b"\xff" * 20 + packed[30:],
        "no JSON": gzip.compress(b"what is this"),
        "other JSON": gzip.compress(b'"what is this"'),
    }
    data[part] = "x" if damage == "no base64" else base64.b64encode(damaged[damage]).decode()
    async with _closing(await KubernetesStore.open(api, "nomad", "master-b", clock=clock)) as again:
        (found,) = await again.pipelines()
        assert found.moves == []
        await again.save_operator("p", PAST)
    async with _closing(await KubernetesStore.open(api, "nomad", "master-c", clock=clock)) as again:
        (found,) = await again.pipelines()
        assert [op.totals for op in found.operators] == [PAST.totals]


@pytest.mark.parametrize(("verb", "path"), [("patch", f"{PIPELINE}/status"), ("get", LINK), ("get", HISTORY)])
async def test_a_master_doesnt_begin_without_the_api(
    api: Any, store: KubernetesStore, clock: VirtualClock, monkeypatch: pytest.MonkeyPatch, verb: str, path: str
) -> None:
    """What can't be read now may be there: it isn't made anew."""
    await store.add_pipeline(wanted(), BUNDLE)
    await store.save_operator("p", PAST)
    monkeypatch.setattr(kubestore, "LOOP", 0.0)
    monkeypatch.setattr(kubeobjects, "LOOP", 0.0)

    async def meet(asked: str, where: str) -> None:
        if (asked, where) == (verb, path):
            raise ApiUnavailable("etcd is away")

    api.meet = meet
    with pytest.raises(StateError, match="API doesn't answer"):
        async with _closing(await KubernetesStore.open(api, "nomad", "master-b", clock=clock)) as again:
            await again.pipelines()


async def test_numbers_of_events_arent_given_again(api: Any, store: KubernetesStore, clock: VirtualClock) -> None:
    """A reader has events that a crash of the master cost, and goes on after the last of them."""
    log = EventLog(store, clock, await store.events(10), 10)
    assert log.add("a", "kept") == 1
    await log.flush()
    await clock.advance(kubestate.EVENTS_EVERY)
    await until(lambda: api.objects[paths.configmaps("nomad", META_CONFIGMAP)].get("binaryData"))
    read = log.add("a", "lost")
    await log.flush()
    again = await KubernetesStore.open(api, "nomad", "master-b", clock=clock)
    log = EventLog(again, clock, await again.events(10), 10)
    new = log.add("a", "new")
    assert [event.message for event in log.list(None, 0, 10)] == ["kept", "new"]
    assert [event.id for event in log.list(None, read, 10)] == [new]
    await again.close()


async def test_events_that_are_on_their_way_when_a_master_ends_arrive(api: Any, clock: VirtualClock) -> None:
    store = await KubernetesStore.open(api, "nomad", "master-a", clock=clock)
    slow = Slow(api, "patch", paths.configmaps("nomad", META_CONFIGMAP))
    await store.add_events([EventView(1, 1.0, "a", "b")], 10)
    await clock.advance(kubestate.EVENTS_EVERY)
    await slow.arrived(1)
    end = asyncio.create_task(store.close())
    await slow.arrived(2)
    slow.end()
    await end
    async with _closing(await KubernetesStore.open(api, "nomad", "master-b", clock=clock)) as again:
        assert [event.id for event in await again.events(10)] == [1]
