"""Clusters for the tests that need one; each is started once in a process of tests, and ended with it."""

from __future__ import annotations

import importlib
import uuid
from collections.abc import Iterator

import pytest

from nomad.kubernetes.kubeconfig import PACKAGE
from tests.kubernetes.cluster import given, machine
from tests.kubernetes.cluster.envtest import Control, Envtest
from tests.kubernetes.cluster.given import Given
from tests.kubernetes.cluster.real import Real
from tests.kubernetes.cluster.scale import Scale


@pytest.fixture(scope="session", autouse=True)
def client() -> None:
    """Kubernetes' client is here from the start, so that not each kubeconfig is read by a process of its own."""
    importlib.import_module(PACKAGE)


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


@pytest.fixture(scope="session")
def real() -> Iterator[Real]:
    """The cluster of three nodes; one that is up already is used and left."""
    if found := given.kubeconfig():
        pytest.skip(f"needs control over nodes, and KUBECONFIG names another cluster ({found})")
    if reason := machine.unfit():
        pytest.skip(reason)
    cluster = Real()
    was_up = cluster.is_up()
    if not was_up:
        cluster.up()
    try:
        yield cluster
    finally:
        if not was_up:
            cluster.down()


@pytest.fixture(scope="session")
def some_cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Control:
    """The user's cluster where KUBECONFIG names one, else `real`: for tests that leave the nodes alone."""
    if kubeconfig := given.kubeconfig():
        return Given(kubeconfig, tmp_path_factory.mktemp("given"))
    found = request.getfixturevalue("real")
    assert isinstance(found, Control)
    return found


@pytest.fixture(scope="session")
def scale(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scale]:
    """An API server with 1,000 faked nodes."""
    with Scale(tmp_path_factory.mktemp("scale")) as env:
        yield env


@pytest.fixture
def real_namespace(real: Real) -> Iterator[str]:
    """A new namespace in `real` that enforces Pod Security `restricted`; it ends with the test."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    real.create_namespace(name, {"pod-security.kubernetes.io/enforce": "restricted"})
    yield name
    real.kubectl("delete", "namespace", name, "--ignore-not-found", "--wait=false")
