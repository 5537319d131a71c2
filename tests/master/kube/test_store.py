"""The store of a master on Kubernetes, without a cluster; tests/kubernetes has its contract, with one."""

from __future__ import annotations

import asyncio
import time

import pytest

from nomad.errors import ApiForbidden, ApiUnavailable, StateError
from nomad.master.kube.store import KubernetesStore
from nomad.master.state import Goal, Outcome
from tests.clock import VirtualClock
from tests.contract.store import BUNDLE, wanted
from tests.master.kube.fakeapi import FakeApi
from tests.master.kube.stores import HISTORY, LINK, MOVE, PAST, PIPELINE, Slow, held_up, opened, until

# Users wait for some seconds, whatever else waits


async def test_a_user_doesnt_wait_as_long_as_the_masters_own_writes(
    api: FakeApi, store: KubernetesStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, own = await held_up(api, store)
    monkeypatch.setattr("nomad.master.kube.store.USER", 0.05)
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


async def test_an_order_that_was_refused_is_taken_back(
    api: FakeApi, store: KubernetesStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was on its way already, together with a write of the master's own."""
    slow, own = await held_up(api, store)
    monkeypatch.setattr("nomad.master.kube.store.USER", 0.3)
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


# One bad object isn't everybody's


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
    api: FakeApi, store: KubernetesStore, clock: VirtualClock, verb: str, path: str, lost: bool
) -> None:
    for id in "pq":
        await store.add_pipeline(wanted(id), BUNDLE)
    if verb == "create":
        del api.objects[LINK]

    async def meet(asked: str, where: str) -> None:
        if (asked, where) == (verb, path):
            raise ApiForbidden("a policy is against it")

    api.meet = meet  # type: ignore[method-assign]
    async with opened(api, clock) as again:
        assert [found.wanted.spec.id for found in await again.pipelines()] == (["q"] if lost else ["p", "q"])
        assert again.unread == ({"p"} if lost else set())
        assert PIPELINE in api.objects


@pytest.mark.parametrize("how", ["deleted by force", "let go"])
async def test_what_couldnt_be_read_is_remembered_until_it_is_gone(
    api: FakeApi, store: KubernetesStore, clock: VirtualClock, how: str
) -> None:
    await store.add_pipeline(wanted(), BUNDLE)
    api.objects[LINK]["data"]["key"] = "no key"
    async with opened(api, clock) as again:
        assert await again.pipelines() == []
        assert again.unread == {"p"}
        (held,) = again.known()
        if how == "let go":
            await again.discard(held)
        else:
            again.lost(held.name, held.uid)
        assert not again.unread


@pytest.mark.parametrize(("verb", "path"), [("patch", f"{PIPELINE}/status"), ("get", LINK), ("get", HISTORY)])
async def test_a_master_doesnt_begin_without_the_api(
    api: FakeApi, store: KubernetesStore, clock: VirtualClock, monkeypatch: pytest.MonkeyPatch, verb: str, path: str
) -> None:
    """What can't be read now may be there: it isn't made anew."""
    await store.add_pipeline(wanted(), BUNDLE)
    await store.save_operator("p", PAST)
    for module in ("store", "objects", "owned"):
        monkeypatch.setattr(f"nomad.master.kube.{module}.LOOP", 0.0)

    async def meet(asked: str, where: str) -> None:
        if (asked, where) == (verb, path):
            raise ApiUnavailable("etcd is away")

    api.meet = meet  # type: ignore[method-assign]
    with pytest.raises(StateError, match="API doesn't answer"):
        async with opened(api, clock) as again:
            await again.pipelines()


# What goes while it is taken on


async def test_a_pipeline_that_goes_before_it_is_taken_on_is_not_taken_on(api: FakeApi, store: KubernetesStore) -> None:
    """Otherwise it would run, and nobody could see it."""
    slow = Slow(api, "patch", PIPELINE)  # by which its mark is taken away, last of all
    adding = asyncio.create_task(store.add_pipeline(wanted(), BUNDLE))
    await slow.arrived(1)
    (held,) = store.known()
    api.drop(PIPELINE)
    store.lost(held.name, held.uid)
    slow.end()
    with pytest.raises(StateError, match="was deleted while it was submitted"):
        await adding
    assert not store.known()
