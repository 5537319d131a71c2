"""Clusters for the tests that need one; each is started once in a process of tests, and ended with it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from tests.kubernetes.cluster.envtest import Envtest


@pytest.fixture(scope="session")
def envtest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Envtest]:
    """etcd and an API server for all tests of this process. Who stops the API server starts it again."""
    with Envtest(tmp_path_factory.mktemp("envtest")) as env:
        yield env


@pytest.fixture
def namespace(envtest: Envtest) -> Iterator[str]:
    """A new namespace in `envtest`, with its service account `default`; it ends with the test."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    envtest.create_namespace(name)
    yield name
    envtest.kubectl("delete", "namespace", name, "--wait=false", "--ignore-not-found")
