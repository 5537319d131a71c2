"""A master's own in its cluster: facts don't wait for events, and no event is numbered twice or lost on its way."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from nomad.errors import StateError
from nomad.kubernetes import paths
from nomad.kubernetes.names import META_CONFIGMAP
from nomad.master.events import EventLog
from nomad.master.kube.state import EVENTS_EVERY
from nomad.master.kube.store import KubernetesStore
from nomad.master.views import EventView
from tests.clock import VirtualClock
from tests.master.kube.fakeapi import FakeApi
from tests.master.kube.stores import Slow, opened, until


async def test_a_fact_doesnt_wait_for_events(
    api: FakeApi, store: KubernetesStore, clock: VirtualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nomad.master.kube.store.USER", 0.05)
    slow = Slow(api, "patch", paths.configmaps("nomad", META_CONFIGMAP))
    await store.add_events([EventView(1, 1.0, "a", "b")], 10)
    await clock.advance(EVENTS_EVERY)
    await slow.arrived(1)
    with pytest.raises(StateError, match="API doesn't answer"):
        await store.set_meta("overrides", b"x")
    slow.end()
    await store.set_meta("overrides", b"x")


async def test_numbers_of_events_arent_given_again(api: FakeApi, store: KubernetesStore, clock: VirtualClock) -> None:
    """A reader has events that a crash of the master cost, and goes on after the last of them."""
    log = EventLog(store, clock, await store.events(10), 10)
    assert log.add("a", "kept") == 1
    await log.flush()
    await clock.advance(EVENTS_EVERY)
    await until(lambda: api.objects[paths.configmaps("nomad", META_CONFIGMAP)].get("binaryData"))
    read = log.add("a", "lost")
    await log.flush()
    async with opened(api, clock) as again:
        log = EventLog(again, clock, await again.events(10), 10)
        new = log.add("a", "new")
        assert [event.message for event in log.list(None, 0, 10)] == ["kept", "new"]
        assert [event.id for event in log.list(None, read, 10)] == [new]


async def test_events_that_are_on_their_way_when_a_master_ends_arrive(api: FakeApi, clock: VirtualClock) -> None:
    store = await KubernetesStore.open(cast(Any, api), "nomad", "master-a", clock=clock)
    slow = Slow(api, "patch", paths.configmaps("nomad", META_CONFIGMAP))
    await store.add_events([EventView(1, 1.0, "a", "b")], 10)
    await clock.advance(EVENTS_EVERY)
    await slow.arrived(1)
    end = asyncio.create_task(store.close())
    await slow.arrived(2)
    slow.end()
    await end
    async with opened(api, clock) as again:
        assert [event.id for event in await again.events(10)] == [1]
