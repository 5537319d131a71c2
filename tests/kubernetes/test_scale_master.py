"""A master of 1,000 nodes and 5,000 pods that it finds when it starts."""

from __future__ import annotations

import pytest

from benchmarks.kubernetes_scale import Bench
from nomad.kubernetes.api import Api
from tests.kubernetes.cluster.scale import Scale

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(1200)]

PIPELINES = 500
BEAT = 2.0


async def test_a_master_of_a_large_cluster(scale: Scale) -> None:
    """It adopts all pods and replaces none, sees a change and acts on it in time, and stays small.

    How much of a core it takes says the benchmark: the machine of a test has much else to do.
    """
    async with Api.open(str(scale.kubeconfig)) as api:
        bench = Bench(scale, api, PIPELINES, BEAT, quick=True)
        await bench.run()
    missed = [row for row in bench.rows if not row.met and "CPU" not in row.what]
    assert not missed, missed
