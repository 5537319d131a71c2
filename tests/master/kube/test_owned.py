"""What goes with a Pipeline: what isn't Nomad's stays, and a past that can't be written or read is all that is lost."""

from __future__ import annotations

import asyncio
import base64
import gzip
from dataclasses import replace
from typing import Any

import pytest

from nomad.errors import ApiUnavailable, StateError
from nomad.kubernetes.names import API_VERSION, KIND
from nomad.master.kube.resource import LABELS
from nomad.master.kube.store import KubernetesStore
from nomad.master.kube.writes import LOOP
from nomad.master.views import MoveState
from tests.clock import VirtualClock, settle
from tests.contract.store import BUNDLE, wanted
from tests.master.kube.fakeapi import FakeApi
from tests.master.kube.stores import HISTORY, LINK, MOVE, PAST, PIPELINE, opened

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


# A past that couldn't be written down at once, or read


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

    async with opened(api, clock) as again:
        (found,) = await again.pipelines()
    assert {move.id: move.state for move in found.moves} == {"m": MoveState.DONE, "n": MoveState.STARTING}
    assert [op.totals.processed for op in found.operators if op.name == "square"] == [7]


@pytest.mark.parametrize("part", ["moves.json.gz", "operators.json.gz"])
@pytest.mark.parametrize("damage", ["no base64", "no gzip", "cut off", "other bytes", "no JSON", "other JSON"])
async def test_a_pipeline_whose_past_cant_be_read_goes_on_without_it(
    api: FakeApi, store: KubernetesStore, clock: VirtualClock, damage: str, part: str
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
    async with opened(api, clock) as again:
        (found,) = await again.pipelines()
        assert found.moves == []
        await again.save_operator("p", PAST)
    async with opened(api, clock, "master-c") as again:
        (found,) = await again.pipelines()
        assert [op.totals for op in found.operators] == [PAST.totals]
