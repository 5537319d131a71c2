from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from nomad.master.kube.store import KubernetesStore
from tests.clock import VirtualClock
from tests.master.kube.fakeapi import FakeApi
from tests.master.kube.stores import opened


@pytest.fixture
def api() -> FakeApi:
    return FakeApi()


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
async def store(api: FakeApi, clock: VirtualClock) -> AsyncIterator[KubernetesStore]:
    async with opened(api, clock, "master-a") as made:
        yield made
