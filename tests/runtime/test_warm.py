"""What becomes of waiting pods that are given away."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from nomad.errors import ApiError, ApiForbidden, ApiInvalid, ApiNotFound, ApiUnavailable
from nomad.kubernetes import names
from nomad.runtime import kubepods
from nomad.runtime.base import PodSpec
from nomad.runtime.kubenodes import Nodes
from nomad.runtime.warm import WarmPool
from nomad.settings import Kubernetes
from tests.clock import VirtualClock, settle

LARGE = PodSpec("p.square-e1", "p", "square", 1, "edge", "tcp://m:1", b"k" * 32, b"v" * 32, 60.0, memory_mb=500.0)


class Pods:
    """The API as far as it is asked for pods that are given away."""

    def __init__(self) -> None:
        self.refusal: ApiError | None = None
        self.resized = 0

    async def patch(self, path: str, body: Any, *, kind: str) -> Any:
        if path.endswith("/resize"):
            self.resized += 1
            if self.refusal is not None:
                raise self.refusal
        return {}


@pytest.fixture
async def api() -> Pods:
    return Pods()


def waiting(name: str) -> kubepods.KubePod:
    return kubepods.take(
        {
            "metadata": {
                "name": name,
                "uid": f"uid-{name}",
                "labels": {names.NODE_LABEL: "edge", names.STATE_LABEL: names.WARM},
            },
            "spec": {"containers": [{"name": "operator", "image": "operator:1"}], "nodeName": "edge"},
            "status": {
                "phase": "Running",
                "containerStatuses": [{"name": "operator", "state": {"running": {}}, "ready": True}],
            },
        }
    )


async def _claimed_after(api: Any, refusal: ApiError) -> bool:
    """Whether a large operator gets a waiting pod, after another one that was met with `refusal`."""
    clock = VirtualClock()
    pool = WarmPool(
        api,
        Kubernetes(namespace="test"),
        Nodes(clock, 10.0),
        None,  # type: ignore[arg-type]
        lambda pod: None,
        image="operator:1",
        clock=clock,
        rng=random.Random(1),
    )
    for name in ("one", "two"):
        pool.changed(None, waiting(name))
    api.refusal = refusal
    assert await pool.claim(LARGE, "operator:1", None)
    async with asyncio.timeout(30):
        while not api.resized:
            await asyncio.sleep(0)
    await settle()
    claimed = await pool.claim(LARGE, "operator:1", None)
    await pool.close()
    return claimed


NO_POD = {"name": "one", "kind": "pods"}
QUOTA = 'pods "one" is forbidden: exceeded quota: small, requested: memory=500Mi, used: memory=1Gi, limited: memory=1Gi'
NO_RIGHT = 'pods "one" is forbidden: User "nomad-master" cannot patch resource "pods/resize" in API group ""'


@pytest.mark.parametrize(
    "refusal",
    [
        ApiForbidden(NO_RIGHT, status=403, reason="Forbidden", details=NO_POD),
        ApiNotFound("the server could not find the requested resource", status=404, reason="NotFound", details={}),
        ApiNotFound("404 page not found", status=404),
    ],
)
async def test_where_pods_cant_be_resized_large_operators_start_cold(api: Pods, refusal: ApiError) -> None:
    assert not await _claimed_after(api, refusal)


@pytest.mark.parametrize(
    "refusal",
    [
        ApiInvalid("more than one may have"),
        ApiUnavailable("not now"),
        ApiForbidden(QUOTA, status=403, reason="Forbidden", details=NO_POD),
    ],
)
async def test_what_one_pod_was_refused_others_can_have(api: Pods, refusal: ApiError) -> None:
    assert await _claimed_after(api, refusal)


async def test_a_pod_that_went_meanwhile_says_nothing_of_the_cluster(
    api: Pods, caplog: pytest.LogCaptureFixture
) -> None:
    gone = ApiNotFound('pods "one" not found', status=404, reason="NotFound", details=NO_POD)
    assert await _claimed_after(api, gone)
    assert "start cold" not in caplog.text
