"""The cluster of the tests is a real one, and what tests do to it happens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.kubernetes.cluster.images import TOOLBOX
from tests.kubernetes.cluster.processes import ClusterError, wait_until
from tests.kubernetes.cluster.real import NODES, Real

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(240)]

PORT = 8080


def web(namespace: str, node: str) -> dict[str, Any]:
    """A restricted pod on `node` that serves HTTP."""
    container = {
        "name": "web",
        "image": TOOLBOX,
        "command": ["/toolbox", "serve", f":{PORT}"],
        "readinessProbe": {"tcpSocket": {"port": PORT}, "periodSeconds": 1},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }
    security = {"runAsNonRoot": True, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": f"web-{node}", "namespace": namespace, "labels": {"app": "web"}},
        "spec": {
            "nodeSelector": {"nomad.dev/tier": node},
            "containers": [container],
            "securityContext": security,
            "terminationGracePeriodSeconds": 1,
        },
    }


@pytest.fixture
def webs(real: Real, real_namespace: str) -> Iterator[str]:
    """The namespace in which every node has a pod that serves HTTP."""
    real.apply(*(web(real_namespace, node) for node in NODES))
    for node in NODES:
        real.wait_pod(real_namespace, f"web-{node}")
    yield real_namespace
    real.heal()
    real.clear_delays()


def get(real: Real, namespace: str, source: str, url: str) -> tuple[float, str]:
    """What the pod on `source` gets, and how many seconds connecting took."""
    took, _, answer = real.kubectl("exec", "-n", namespace, f"web-{source}", "--", "/toolbox", "get", url).partition(
        "\n"
    )
    return float(took), answer.strip()


def url(real: Real, namespace: str, node: str) -> str:
    return f"http://{real.pod(namespace, f'web-{node}')['status']['podIP']}:{PORT}"


def test_pods_of_different_nodes_reach_each_other(real: Real, webs: str) -> None:
    for source in NODES:
        address = real.pod(webs, f"web-{source}")["status"]["podIP"]
        for target in NODES:
            assert get(real, webs, source, url(real, webs, target))[1] == f"web-{target} answers {address}"


def test_services_work_by_name_from_pods_and_by_port_of_the_node(real: Real, webs: str) -> None:
    real.kubectl("create", "service", "nodeport", "web", "--tcp", f"80:{PORT}", "-n", webs)
    name = f"http://web.{webs}.svc.cluster.local"

    seen: set[str] = set()

    def all_seen() -> bool:
        try:
            seen.add(get(real, webs, "edge", name)[1].split()[0])
        except ClusterError:  # until the nodes have heard of the Service
            return False
        return len(seen) == len(NODES)

    wait_until(all_seen, "all pods behind the Service to answer")
    port = real.get("service", "web", "-n", webs)["spec"]["ports"][0]["nodePort"]
    assert get(real, webs, "fog", f"http://{real.nodes['cloud'].place.address}:{port}")[1]
    assert "gitVersion" in get(real, webs, "edge", "https://kubernetes.default/version")[1]


def test_a_pod_that_is_not_restricted_is_refused(real: Real, real_namespace: str) -> None:
    pod = web(real_namespace, "edge")
    del pod["spec"]["securityContext"]
    with pytest.raises(ClusterError, match="violates PodSecurity"):
        real.apply(pod)


def test_a_killed_process_is_started_again(real: Real, webs: str) -> None:
    real.kill_pod(webs, "web-edge")

    def restarted() -> bool:
        status = real.pod(webs, "web-edge")["status"]["containerStatuses"][0]
        return bool(status["restartCount"] == 1 and status["ready"])

    wait_until(restarted, "the pod to be ready again")


def test_a_delay_between_two_nodes_can_change_while_they_talk(real: Real, webs: str) -> None:
    fog = url(real, webs, "fog")
    assert get(real, webs, "edge", fog)[0] < 0.03
    real.set_delay("edge", "fog", 0.005)
    assert 0.01 <= get(real, webs, "edge", fog)[0] < 0.05
    real.set_delay("edge", "fog", 0.08)
    assert 0.16 <= get(real, webs, "edge", fog)[0] < 0.22
    assert get(real, webs, "edge", url(real, webs, "cloud"))[0] < 0.03
    real.set_delay("edge", "fog", 0)
    assert get(real, webs, "edge", fog)[0] < 0.03


def test_pods_behind_nat_dial_out_and_cannot_be_dialled(real: Real, webs: str) -> None:
    real.set_nat("edge")
    try:
        with pytest.raises(ClusterError, match="timeout"):
            get(real, webs, "fog", url(real, webs, "edge"))
        address = real.nodes["edge"].place.address
        assert get(real, webs, "edge", url(real, webs, "fog"))[1] == f"web-fog answers {address}"
    finally:
        real.set_nat("edge", False)
    assert get(real, webs, "fog", url(real, webs, "edge"))[1]


def test_a_node_cut_off_is_lost_its_pods_go_on_and_it_comes_back(real: Real, webs: str) -> None:
    pid = real.pod_pid(webs, "web-edge")
    real.cut_node("edge")
    try:
        real.wait_nodes("edge", ready=False)
        assert get(real, webs, "cloud", url(real, webs, "edge"))[1]
    finally:
        real.heal()
    real.wait_nodes("edge")
    assert real.pod_pid(webs, "web-edge") == pid


def test_a_node_without_power_comes_back_with_its_pods(real: Real, webs: str) -> None:
    real.stop_node("edge")
    try:
        with pytest.raises(ClusterError):
            get(real, webs, "cloud", url(real, webs, "edge"))
        real.wait_nodes("edge", ready=False)
    finally:
        real.start_node("edge")

    def back() -> bool:
        status = real.pod(webs, "web-edge")["status"]["containerStatuses"][0]
        return bool(status["restartCount"] >= 1 and status["ready"])

    wait_until(back, "the pod to be started again", timeout=60)
    assert get(real, webs, "cloud", url(real, webs, "edge"))[1]


def test_a_drained_node_keeps_no_pods(real: Real, webs: str) -> None:
    try:
        real.drain("fog", "--force")
        assert "web-fog" not in real.kubectl("get", "pods", "-n", webs)
    finally:
        real.uncordon("fog")


def test_the_api_server_can_be_lost_while_pods_go_on(real: Real, webs: str) -> None:
    pid = real.pod_pid(webs, "web-cloud")
    real.stop_apiserver()
    try:
        with pytest.raises(ClusterError, match="refused"):
            real.get("nodes")
    finally:
        real.start_apiserver()
    real.wait_nodes()
    assert real.pod_pid(webs, "web-cloud") == pid
