"""The chart and what is rendered from it: restricted pods, and the names that Nomad's code knows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import nomad
from nomad.kubernetes import names
from nomad.runtime import manifests, policies
from nomad.runtime.base import PodSpec
from nomad.runtime.manifests import USER
from nomad.settings import Kubernetes

K8S = Path(__file__).resolve().parents[2] / "images" / "k8s"
CHART = K8S / "chart"
MANIFESTS = sorted((K8S / "manifests").glob("*.yaml"))
Json = dict[str, Any]


def documents() -> list[Json]:
    return [document for path in MANIFESTS for document in yaml.safe_load_all(path.read_text()) if document]


def named(kind: str, name: str) -> Json:
    (found,) = [item for item in documents() if item["kind"] == kind and item["metadata"]["name"] == name]
    return found


def templates() -> list[Json]:
    """The pods that are made from the manifests."""
    return [item["spec"]["template"] for item in documents() if item["kind"] in ("Deployment", "DaemonSet")]


def test_everything_is_in_the_namespace_and_carries_the_name_of_nomad() -> None:
    for item in documents():
        assert item["metadata"]["labels"][names.APP] == names.NOMAD, item
        cluster_wide = {"Namespace", "ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition"}
        assert ("namespace" in item["metadata"]) == (item["kind"] not in cluster_wide), item


def test_the_namespace_enforces_restricted_pods() -> None:
    labels = named("Namespace", "nomad")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize("template", templates(), ids=lambda template: template["metadata"]["labels"][names.COMPONENT])
def test_pods_are_restricted(template: Json) -> None:
    pod = template["spec"]
    assert pod["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert pod["enableServiceLinks"] is False
    assert pod["automountServiceAccountToken"] is (template["metadata"]["labels"][names.COMPONENT] == names.MASTER)
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert all({"name"} < set(volume) <= {"name", "emptyDir", "secret"} for volume in pod["volumes"])
    for container in pod["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["requests"]
        assert "memory" in container["resources"]["limits"]


def test_names_ports_and_folders_are_those_of_the_code() -> None:
    services = {item["metadata"]["name"]: item["spec"] for item in documents() if item["kind"] == "Service"}
    master = services[names.MASTER_NAME]
    assert master["selector"] == {names.APP: names.NOMAD, names.COMPONENT: names.MASTER, names.LEADER_LABEL: "true"}
    assert [port["port"] for port in master["ports"]] == [names.REST_PORT, names.CONTROL_PORT]
    assert [port["nodePort"] for port in services["nomad-rest"]["ports"]] == [names.REST_PORT]
    (container,) = named("Deployment", names.MASTER_NAME)["spec"]["template"]["spec"]["containers"]
    assert [port["containerPort"] for port in container["ports"]] == [names.REST_PORT, names.CONTROL_PORT]
    pod = named("DaemonSet", names.AGENT_NAME)["spec"]["template"]["spec"]
    assert [port["containerPort"] for port in pod["containers"][0]["ports"]] == [names.AGENT_PORT]
    assert {"name": "tls", "mountPath": names.TLS_FOLDER, "readOnly": True} in pod["containers"][0]["volumeMounts"]
    assert [volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume] == [
        names.AGENT_NAME,
        names.POD_TLS_SECRET,
    ]
    (definition,) = [item for item in documents() if item["kind"] == "CustomResourceDefinition"]
    assert definition["metadata"]["name"] == f"{names.PLURAL}.{names.GROUP}"
    assert definition["spec"]["names"]["kind"] == names.KIND


def test_components_are_selected_by_what_they_carry() -> None:
    for item in documents():
        if item["kind"] in ("Deployment", "DaemonSet"):
            selector = item["spec"]["selector"]["matchLabels"]
            assert selector.keys() == {names.APP, names.COMPONENT}
            assert selector.items() <= item["spec"]["template"]["metadata"]["labels"].items()


def test_nothing_of_nomads_is_open_that_no_policy_names_and_nobody_else_is_cut_off() -> None:
    own = {names.APP: names.NOMAD}
    closed = named("NetworkPolicy", "nomad-default-deny")["spec"]
    assert closed == {"podSelector": {"matchLabels": own}, "policyTypes": ["Ingress", "Egress"]}
    for item in documents():
        if item["kind"] == "NetworkPolicy":
            assert own.items() <= item["spec"]["podSelector"]["matchLabels"].items()
    settings = Kubernetes()
    spec = PodSpec("p.a-e1", "p", "a", 1, "edge", "tls://nomad-master:30001", b"", b"", 60.0)
    made = manifests.operator_pod(spec, settings, host="h", image="i")
    waits = manifests.warm_pod("nomad-warm-edge-xyz", "edge", settings, host="h", image="i", owner=None)
    claimed = {step["path"]: step.get("value") for step in manifests.claim_patch(spec, "u", None)}
    assert claimed["/metadata/labels/app.kubernetes.io~1name"] == names.NOMAD
    pods = [*templates(), made, waits]
    assert [pod for pod in pods if not own.items() <= pod["metadata"]["labels"].items()] == []


def test_masters_reach_the_api_server_at_its_usual_ports() -> None:
    """Of k3s and kubeadm, minikube, MicroK8s."""
    egress = named("NetworkPolicy", "nomad-master")["spec"]["egress"]
    assert egress == [{"ports": [{"protocol": "TCP", "port": port} for port in (443, 6443, 8443, 16443)]}]


def test_no_pipeline_has_a_policy_that_is_called_as_one_of_the_installation() -> None:
    """Neither with the defaults nor with anything that can be enabled."""
    template = (CHART / "templates" / "networkpolicies.yaml").read_text()
    installed = set(re.findall(r"^  name: (\S+)$", template, re.MULTILINE))
    assert {item["metadata"]["name"] for item in documents() if item["kind"] == "NetworkPolicy"} < installed
    for pipeline, operators in (
        ("nomad", ("master", "agent", "common", "operator", "relay")),
        ("nomad-default", ("deny",)),
    ):
        found = policies.network_policies(pipeline, [(name, "behind") for name in operators], owner=None)
        assert len(found) == len(operators) + 1
        assert not {policy["metadata"]["name"] for policy in found} & installed
    assert not [name for name in installed if name.startswith(policies.PREFIX)]


def test_a_master_that_waits_may_dial_the_one_that_leads() -> None:
    master = {names.APP: names.NOMAD, names.COMPONENT: names.MASTER}
    control = {"protocol": "TCP", "port": names.CONTROL_PORT}
    everyone = named("NetworkPolicy", "nomad-common")["spec"]
    assert everyone["podSelector"]["matchLabels"].items() <= master.items()
    assert {"to": [{"podSelector": {"matchLabels": master}}], "ports": [control]} in everyone["egress"]
    own = named("NetworkPolicy", names.MASTER_NAME)["spec"]
    assert {"from": [{"podSelector": {"matchLabels": {names.APP: names.NOMAD}}}], "ports": [control]} in own["ingress"]


def test_the_master_may_do_nothing_to_all() -> None:
    (role,) = [item for item in documents() if item["kind"] == "Role"]
    assert not [rule for rule in role["rules"] if "*" in rule["verbs"] + rule["resources"] + rule["apiGroups"]]
    (nodes,) = [item for item in documents() if item["kind"] == "ClusterRole"]
    assert nodes["rules"] == [{"apiGroups": [""], "resources": ["nodes"], "verbs": ["list", "watch"]}]


def test_the_chart_is_of_this_version_and_its_values_are_all_described() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == nomad.__version__
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())
    for group, known in schema["properties"].items():
        if group != "global":  # Helm's own
            assert set(known["properties"]) == set(values[group]), group
    documented = (K8S.parents[1] / "docs" / "kubernetes.md").read_text()
    for group, content in values.items():
        for key in content:
            assert f"`{group}.{key}`" in documented, f"docs/kubernetes.md doesn't say what {group}.{key} is"


def test_a_kind_cluster_has_the_three_nodes_and_the_port() -> None:
    cluster = yaml.safe_load((K8S.parent / "kind.yaml").read_text())
    workers = [node["labels"] for node in cluster["nodes"] if node["role"] == "worker"]
    assert workers == [{names.NODE_NAME_LABEL: tier, names.TIER_LABEL: tier} for tier in ("edge", "fog", "cloud")]
    (mapping,) = [port for node in cluster["nodes"] for port in node.get("extraPortMappings", ())]
    assert (mapping["containerPort"], mapping["listenAddress"]) == (names.REST_PORT, "127.0.0.1")
