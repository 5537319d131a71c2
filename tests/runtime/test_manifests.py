"""What is asked of a cluster, without one; that the API takes it is shown in tests/kubernetes."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from nomad.kubernetes import names
from nomad.pipeline import OPERATOR_NAME
from nomad.runtime import manifests, policies
from nomad.runtime.base import PodSpec
from nomad.runtime.manifests import Boot
from nomad.settings import Kubernetes

PIPELINES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}", fullmatch=True)
OPERATORS = st.from_regex(OPERATOR_NAME, fullmatch=True)
DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
LABEL_VALUE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
SETTINGS = Kubernetes(images={"3.11": "operator:1"})
OWNER = {"apiVersion": names.API_VERSION, "kind": names.KIND, "name": "test", "uid": "u"}


def spec(**changes: Any) -> PodSpec:
    made = PodSpec(
        id="test.square-e3",
        pipeline="test",
        operator="square",
        epoch=3,
        node="edge",
        control="tls://nomad-master:30001",
        key=b"k" * 32,
        verify_key=b"v" * 32,
        master_timeout=60.0,
        python="3.11",
    )
    return replace(made, **changes)


def pod(**changes: Any) -> dict[str, Any]:
    return manifests.operator_pod(spec(**changes), SETTINGS, host="edge-1", image="operator:1", owner=OWNER)


@given(PIPELINES, OPERATORS, st.integers(1, 10**9))
def test_every_operator_has_valid_names(pipeline: str, operator: str, epoch: int) -> None:
    assert DNS_LABEL.fullmatch(manifests.pod_name(pipeline, operator, epoch))
    assert DNS_LABEL.fullmatch(manifests.object_name(pipeline, operator))
    for value in manifests.operator_labels(pipeline, operator, epoch, "edge.example.com").values():
        assert LABEL_VALUE.fullmatch(value)


@given(st.lists(st.tuples(PIPELINES, OPERATORS, st.integers(1, 99)), min_size=2, max_size=2, unique=True))
def test_no_two_pods_have_the_same_name(pods: list[tuple[str, str, int]]) -> None:
    one, other = pods
    assert manifests.pod_name(*one) != manifests.pod_name(*other)


def test_names_that_could_be_read_in_two_ways_are_told_apart() -> None:
    found = {
        manifests.pod_name("a-b", "c", 1),
        manifests.pod_name("a", "b-c", 1),
        manifests.pod_name("a", "b_c", 1),
        manifests.pod_name("A", "b-c", 1),
    }
    assert len(found) == 4
    assert manifests.pod_name("face-recognition", "detect", 7) == "face-recognition-detect-e7"


def test_a_pod_says_who_it_is_and_where_it_belongs() -> None:
    metadata = pod()["metadata"]
    assert metadata["name"] == "test-square-e3"
    assert metadata["annotations"][names.POD_ANNOTATION] == "test.square-e3"
    assert metadata["ownerReferences"] == [{**OWNER, "controller": True}]
    assert metadata["labels"][names.STATE_LABEL] == names.TAKEN
    terms = pod()["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    field = {"key": "metadata.name", "operator": "In", "values": ["edge-1"]}
    assert terms == {"nodeSelectorTerms": [{"matchFields": [field]}]}
    assert "nodeName" not in pod()["spec"]


def test_a_pod_stays_on_a_node_that_does_not_answer() -> None:
    own = ({"key": "edge", "operator": "Exists"},)
    made = manifests.operator_pod(
        spec(), replace(SETTINGS, tolerations=own), host="edge-1", image="operator:1", owner=None
    )
    unreachable, not_ready, edge = made["spec"]["tolerations"]
    assert (unreachable["key"], not_ready["key"]) == ("node.kubernetes.io/unreachable", "node.kubernetes.io/not-ready")
    assert "tolerationSeconds" not in unreachable
    assert edge == own[0]


def test_pods_say_to_registries_who_they_are() -> None:
    settings = replace(SETTINGS, pull_secrets=("registry", "other"))
    cold = manifests.operator_pod(spec(), settings, host="edge-1", image="operator:1", owner=None)
    warm = manifests.warm_pod("nomad-warm-edge-xyz", "edge", settings, host="edge-1", image="operator:1", owner=None)
    assert cold["spec"]["imagePullSecrets"] == [{"name": "registry"}, {"name": "other"}]
    assert warm["spec"]["imagePullSecrets"] == cold["spec"]["imagePullSecrets"]
    assert pod()["spec"]["imagePullSecrets"] == []  # the API takes those of the service account then


def test_what_is_measured_is_asked_for() -> None:
    container = pod(memory_mb=512.0, cores=0.75, devices={"nvidia.com/gpu": 1, "camera": 2})["spec"]["containers"][0]
    devices = {"nvidia.com/gpu": "1", "nomad.dev/camera": "2"}
    assert container["resources"]["requests"] == {"memory": "512Mi", "cpu": "750m", **devices}
    assert container["resources"]["limits"] == {"memory": "1088Mi", **devices}


def test_variables_of_the_user_do_not_hide_ours_and_secrets_stay_references() -> None:
    container = pod(environment={"MODE": "fast"}, secrets={"TOKEN": "camera/token"})["spec"]["containers"][0]
    variables = {variable["name"]: variable for variable in container["env"]}
    assert variables["MODE"] == {"name": "MODE", "value": "fast"}
    assert variables["TOKEN"]["valueFrom"] == {"secretKeyRef": {"name": "camera", "key": "token"}}
    assert variables["NOMAD_POD_IP"]["valueFrom"]["fieldRef"]["fieldPath"] == "status.podIP"
    assert container["env"][-1]["name"].startswith("NOMAD_")


def test_a_waiting_pod_differs_from_a_new_one_in_nothing_that_its_process_sees() -> None:
    warm = manifests.warm_pod("nomad-warm-edge-xyz", "edge", SETTINGS, host="edge-1", image="operator:1", owner=None)
    cold = pod()
    assert warm["metadata"]["labels"][names.STATE_LABEL] == names.WARM
    assert names.POD_ANNOTATION not in warm["metadata"]["annotations"]
    mine, theirs = warm["spec"]["containers"][0], cold["spec"]["containers"][0]
    assert {**mine, "resources": None} == {**theirs, "resources": None}


def test_those_who_drain_nodes_may_evict_a_waiting_pod() -> None:
    """Nobody minds a node on which nothing but such pods is left; an operator that one was given to counts again."""
    masters = {"apiVersion": "apps/v1", "kind": "Deployment", "name": names.MASTER_NAME, "uid": "u"}
    made = manifests.warm_pod("nomad-warm-edge-xyz", "edge", SETTINGS, host="edge-1", image="operator:1", owner=masters)
    assert made["metadata"]["ownerReferences"] == [{**masters, "controller": True}]
    autoscalers = "cluster-autoscaler.kubernetes.io/daemonset-pod"
    assert made["metadata"]["annotations"][autoscalers] == "true"
    put = {step["path"]: step.get("value") for step in manifests.claim_patch(spec(), "uid-1", OWNER)}
    assert put["/metadata/annotations/cluster-autoscaler.kubernetes.io~1daemonset-pod"] == "false"
    assert put["/metadata/ownerReferences"] == [{**OWNER, "controller": True}]


def test_a_pod_is_claimed_only_while_it_waits() -> None:
    patch = manifests.claim_patch(spec(), "uid-1", OWNER)
    assert patch[:2] == [
        {"op": "test", "path": "/metadata/uid", "value": "uid-1"},
        {"op": "test", "path": "/metadata/labels/nomad.dev~1state", "value": "warm"},
    ]
    put = {step["path"]: step["value"] for step in patch[2:]}
    assert put["/metadata/annotations/nomad.dev~1pod"] == "test.square-e3"
    assert put["/metadata/labels/nomad.dev~1state"] == "taken"


def test_the_secret_of_a_pod_goes_with_it() -> None:
    made = {"metadata": {"name": "test-square-e3", "uid": "u1"}}
    secret = manifests.boot_secret(made, 3, b"k" * 32, Boot("tls://nomad-master:30001", b"v" * 32, 60.0))
    assert secret["metadata"]["name"] == "test-square-e3"
    assert secret["metadata"]["ownerReferences"][0]["uid"] == "u1"
    content = json.loads(base64.b64decode(secret["data"]["boot"]))
    assert content == {
        "pod": "test-square-e3",
        "epoch": 3,
        "control": "tls://nomad-master:30001",
        "key": "6b" * 32,
        "verify_key": "76" * 32,
        "master_timeout": 60.0,
    }


def test_a_folder_is_kept_where_the_cluster_has_a_place_for_it() -> None:
    settings = replace(SETTINGS, storage_class="nfs")
    made = manifests.operator_pod(spec(), settings, host="edge-1", image="operator:1", owner=None)
    claim = manifests.work_claim(spec(), settings, OWNER)
    assert made["spec"]["volumes"][-1]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert claim["spec"]["resources"] == {"requests": {"storage": "1Gi"}}
    large = manifests.work_claim(spec(), replace(settings, storage_size="20Gi"), OWNER)
    assert large["spec"]["resources"] == {"requests": {"storage": "20Gi"}}


def allowed(policy: dict[str, Any], direction: str) -> set[str]:
    key = {"ingress": "from", "egress": "to"}[direction]
    return {
        peer["podSelector"]["matchLabels"][names.OPERATOR_LABEL]
        for rule in policy["spec"][direction]
        for peer in rule[key]
    }


def test_the_network_lets_through_what_the_graph_says() -> None:
    edges = [("camera", "detect"), ("detect", "store"), ("camera", "store")]
    found = {
        policy["spec"]["podSelector"]["matchLabels"][names.OPERATOR_LABEL]: policy
        for policy in policies.network_policies("test", edges, owner=OWNER)
    }
    assert {name: allowed(policy, "ingress") for name, policy in found.items()} == {
        "camera": set(),
        "detect": {"camera"},
        "store": {"camera", "detect"},
    }
    assert {name: allowed(policy, "egress") for name, policy in found.items()} == {
        "camera": {"detect", "store"},
        "detect": {"store"},
        "store": set(),
    }
    assert all(policy["metadata"]["ownerReferences"] == [OWNER] for policy in found.values())


def test_where_some_can_only_dial_out_neighbours_may_dial_either_way() -> None:
    found = policies.network_policies("test", [("a", "b")], owner=None, either_way=True)
    assert [(allowed(policy, "ingress"), allowed(policy, "egress")) for policy in found] == [
        ({"b"}, {"b"}),
        ({"a"}, {"a"}),
    ]
