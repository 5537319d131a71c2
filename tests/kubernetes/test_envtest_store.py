"""The store of a master on Kubernetes, against a real API server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from nomad.kubernetes.api import Api
from nomad.master.kubestore import KubernetesStore
from tests.contract.store import CHECKS
from tests.kubernetes.cluster.envtest import Envtest

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(300)]

CRD = Path(__file__).parents[2] / "images/k8s/crd.yaml"


@pytest.fixture(scope="session")
def defined(envtest: Envtest) -> Envtest:
    """With the definition of Pipelines."""
    envtest.kubectl("apply", "-f", str(CRD))
    envtest.kubectl("wait", "--for=condition=Established", "crd/pipelines.nomad.dev", "--timeout=30s")
    return envtest


@pytest.fixture
async def api(defined: Envtest) -> AsyncIterator[Api]:
    async with Api.open(defined.kubeconfig) as api:
        yield api


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_contract(check: Callable[[Any], Awaitable[None]], api: Api, namespace: str) -> None:
    await check(lambda: KubernetesStore.open(api, namespace, "master-a"))
