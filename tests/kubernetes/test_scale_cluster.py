"""The faked nodes are nodes to everyone who asks, and pods on them run and end."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.kubernetes.cluster.processes import wait_until
from tests.kubernetes.cluster.scale import Scale, pod

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(300)]


def test_a_thousand_nodes_take_pods_and_the_scheduler_binds_by_tier(scale: Scale) -> None:
    tiers = Counter(node["metadata"]["labels"]["nomad.dev/tier"] for node in scale.get("nodes")["items"])
    assert tiers == {"edge": 700, "fog": 250, "cloud": 50}
    scale.create_namespace("pods")
    scale.make_pods("pods", 50, {"app": "fake"})
    wanted = pod(1000, {}, "")
    del wanted["spec"]["nodeName"]
    wanted["spec"]["nodeSelector"] = {"nomad.dev/tier": "cloud"}
    wanted["metadata"]["namespace"] = "pods"
    scale.apply(wanted)
    scale.kubectl("wait", "--for=condition=Ready", "pod/fake-1000", "-n", "pods", "--timeout=60s")
    assert scale.get("pod", "fake-1000", "-n", "pods")["spec"]["nodeName"].startswith("cloud-")
    scale.kubectl("delete", "pods", "--all", "-n", "pods", "--wait=false")
    wait_until(lambda: not scale.get("pods", "-n", "pods")["items"], "the pods to end")
