"""The API server of the tests is a real one, and can be lost."""

from __future__ import annotations

import pytest

from tests.kubernetes.cluster.envtest import Envtest, Request
from tests.kubernetes.cluster.processes import ClusterError, wait_until

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(120)]


def test_an_account_may_do_what_its_role_says_and_the_audit_log_tells_it(envtest: Envtest, namespace: str) -> None:
    envtest.kubectl("create", "serviceaccount", "reader", "-n", namespace)
    envtest.kubectl("create", "role", "reader", "--verb=list", "--resource=pods", "-n", namespace)
    envtest.kubectl(
        "create", "rolebinding", "reader", "--role=reader", f"--serviceaccount={namespace}:reader", "-n", namespace
    )
    kubeconfig = envtest.kubeconfig_for("reader", namespace)
    since = envtest.audit_size()
    envtest.kubectl("get", "pods", kubeconfig=kubeconfig)
    with pytest.raises(ClusterError, match="cannot list resource"):
        envtest.kubectl("get", "secrets", kubeconfig=kubeconfig)
    asked = envtest.requests(since, user=f"system:serviceaccount:{namespace}:reader")
    assert [(entry.verb, entry.resource, entry.code) for entry in asked] == [
        ("list", "pods", 200),
        ("list", "secrets", 403),
    ]
    assert all(isinstance(entry, Request) and entry.namespace == namespace for entry in asked)


def test_what_an_owner_owns_goes_with_it(envtest: Envtest, namespace: str) -> None:
    envtest.kubectl("create", "configmap", "owner", "-n", namespace)
    uid = envtest.get("configmap", "owner", "-n", namespace)["metadata"]["uid"]
    owner = {"apiVersion": "v1", "kind": "ConfigMap", "name": "owner", "uid": uid}
    owned = {"name": "owned", "namespace": namespace, "ownerReferences": [owner]}
    envtest.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": owned})
    envtest.kubectl("delete", "configmap", "owner", "-n", namespace)
    wait_until(lambda: "owned" not in envtest.kubectl("get", "configmaps", "-n", namespace), "the owned object to go")


def test_the_api_server_comes_back_with_everything(envtest: Envtest, namespace: str) -> None:
    envtest.kubectl("create", "configmap", "kept", "-n", namespace)
    envtest.stop_apiserver()
    with pytest.raises(ClusterError, match="refused"):
        envtest.kubectl("get", "configmaps", "-n", namespace)
    envtest.start_apiserver()
    assert envtest.get("configmap", "kept", "-n", namespace)["metadata"]["name"] == "kept"
