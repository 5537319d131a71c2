"""Stores of masters on a Kubernetes without a cluster, for the tests of what they are made of."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

from nomad.clock import Clock
from nomad.control import PodStats
from nomad.kubernetes import paths
from nomad.master.kube.store import KubernetesStore
from nomad.master.store import StoredOperator
from nomad.master.views import MoveState, MoveView
from tests.contract.store import BUNDLE, wanted
from tests.master.kube.fakeapi import FakeApi

LINK, HISTORY = paths.secrets("nomad", "p-link"), paths.configmaps("nomad", "p-history")
PIPELINE = paths.pipelines("nomad", "p")
PAST = StoredOperator("square", 1, "p.square-e1", "p.square-e1", 0, PodStats(processed=7), highest=1)
MOVE = MoveView("m", "p", "square", "cloud", "edge", "user", "because", MoveState.PLANNED, 1.0)


@asynccontextmanager
async def opened(api: FakeApi, clock: Clock, identity: str = "master-b") -> AsyncIterator[KubernetesStore]:
    """The store of a master that begins."""
    store = await KubernetesStore.open(cast(Any, api), "nomad", identity, clock=clock)
    try:
        yield store
    finally:
        await store.close()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


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


async def held_up(api: FakeApi, store: KubernetesStore) -> tuple[Slow, asyncio.Task[None]]:
    """A pipeline whose status the master writes, as it does by itself, which takes until it may go on."""
    await store.add_pipeline(wanted(), BUNDLE)
    slow = Slow(api, "patch", f"{PIPELINE}/status")
    own = asyncio.create_task(store.save_operator("p", StoredOperator("square", 1, "p.square-e1", "", 0, highest=1)))
    await slow.arrived(1)
    return slow, own
