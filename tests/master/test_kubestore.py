"""The store of a master on Kubernetes, without a cluster; tests/kubernetes has its contract, with one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from nomad.control import PodStats
from nomad.errors import StateError
from nomad.kubernetes import paths
from nomad.kubernetes.names import API_VERSION, KIND
from nomad.master.kubestore import KubernetesStore
from nomad.master.resource import LABELS
from nomad.master.store import StoredOperator
from tests.clock import VirtualClock
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
