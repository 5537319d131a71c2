"""Installing on a real API server: the chart, what is rendered from it, and the scripts."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from nomad.cli.master import master as master_command
from nomad.kubernetes import names
from tests.kubernetes.cluster import binaries
from tests.kubernetes.cluster.envtest import Envtest

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(300)]

K8S = Path(__file__).resolve().parents[2] / "images" / "k8s"
MANIFESTS = ("0-namespace.yaml", "1-init.yaml", "2-nomad.yaml")
VERSION = ("--kube-version", binaries.KUBERNETES_VERSION)
EVERYTHING = """
namespace: {create: true}
images:
  operators: {"3.9": old:1, "3.11": example.com/o:1-py3.11, "3.13": example.com/o:1-py3.13}
  pullSecrets: [registry]
master:
  replicas: 3
  args: [--log-level=debug]
  storageClass: shared
  storageSize: 20Gi
  nodeSelector: {kubernetes.io/os: linux}
  tolerations: [{operator: Exists}]
operators:
  tolerations: [{key: site, operator: Equal, value: 'a "b"', effect: NoSchedule}, {key: edge, operator: Exists}]
agent: {nodeSelector: {kubernetes.io/os: linux}, env: {PIP_INDEX_URL: "https://example.com"}, pipConfig: index}
relay:
  enabled: true
  address: "tls://203.0.113.7:30030"
  nodeSelector: {kubernetes.io/os: linux}
  tolerations: [{operator: Exists}]
networkPolicy:
  outside: [203.0.113.0/24, 198.51.100.0/24]
  operatorEgress: [{to: [{ipBlock: {cidr: 10.1.0.0/16}}]}]
  restFrom: [{ipBlock: {cidr: 10.2.0.0/16}}]
tokenReview: {enabled: true, users: ["system:serviceaccount:team:ci"], groups: [developers]}
"""

POD = """
apiVersion: v1
kind: Pod
metadata: {name: p, namespace: nomad, labels: {app.kubernetes.io/name: nomad}}
spec:
  serviceAccountName: nomad-agent
  securityContext: {runAsNonRoot: true, runAsUser: 10001, seccompProfile: {type: RuntimeDefault}}
  containers:
    - name: a
      image: typo:2
      securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
"""


@pytest.fixture(scope="module")
def envtest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Envtest]:
    """One of its own: what all namespaces share is installed and removed here."""
    with Envtest(tmp_path_factory.mktemp("install")) as env:
        yield env


def helm(*arguments: str, input: str | None = None) -> str:
    command = [str(binaries.helm()), *arguments]
    done = subprocess.run(command, input=input, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def parsed(text: str) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(text) if document]


class Scripts:
    """images/k8s/*.sh on a cluster."""

    def __init__(self, env: Envtest, tmp_path: Path) -> None:
        self.env = env
        (tmp_path / "kubectl").symlink_to(binaries.kubernetes() / "kubectl")
        path = f"{tmp_path}:{os.environ['PATH']}"
        self.environment = {**os.environ, "PATH": path, "KUBECONFIG": str(env.kubeconfig)}

    def run(self, script: str, code: int = 0, **environment: str) -> str:
        """What it prints, on both streams."""
        done = subprocess.run(
            [str(K8S / script)],
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == code, done.stdout
        return done.stdout


@pytest.fixture
def scripts(envtest: Envtest, tmp_path: Path) -> Iterator[Scripts]:
    made = Scripts(envtest, tmp_path)
    yield made
    for namespace in {"nomad", "second", "ours"} & {
        item["metadata"]["name"] for item in envtest.get("namespaces")["items"]
    }:
        made.run("cleanup.sh", NAMESPACE=namespace)
        envtest.kubectl("delete", "namespace", namespace, "--ignore-not-found")


def nomads(env: Envtest, *, namespaced: bool) -> set[str]:
    """Kind and name of everything of Nomad's in the cluster."""
    flag = "true" if namespaced else "false"
    kinds = env.kubectl("api-resources", "--verbs=list", f"--namespaced={flag}", "-o", "name").split()
    where = ("--all-namespaces",) if namespaced else ()
    found = env.kubectl("get", ",".join(kinds), *where, "--selector", f"{names.APP}={names.NOMAD}", "-o", "name")
    return set(found.split())


def test_the_chart_is_clean_with_its_defaults_and_with_everything_on(tmp_path: Path) -> None:
    values = tmp_path / "values.yaml"
    values.write_text(EVERYTHING)
    for arguments in ([], ["--values", str(values)]):
        assert "0 chart(s) failed" in helm("lint", "--strict", str(K8S / "chart"), *VERSION, *arguments)


def test_the_manifests_are_what_the_chart_gives(tmp_path: Path) -> None:
    environment = {**os.environ, "HELM": str(binaries.helm())}
    subprocess.run(
        [str(K8S / "render.sh"), str(tmp_path)], env=environment, capture_output=True, timeout=60, check=True
    )
    for name in MANIFESTS:
        assert (K8S / "manifests" / name).read_text() == (tmp_path / name).read_text(), "run images/k8s/render.sh"


def test_the_scripts_put_the_namespace_where_the_chart_puts_it() -> None:
    arguments = ["--namespace", "second", "--include-crds", "--set", "namespace.create=true", *VERSION]
    wanted = parsed(helm("template", "nomad", str(K8S / "chart"), *arguments))
    command = f". ./common.sh; for part in {' '.join(MANIFESTS)}; do manifest $part; echo ---; done"
    given = subprocess.run(
        ["sh", "-c", command, "./init.sh"],
        cwd=K8S,
        env={**os.environ, "NAMESPACE": "second"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout

    def key(item: dict[str, Any]) -> tuple[str, str]:
        return item["kind"], item["metadata"]["name"]

    assert sorted(parsed(given), key=key) == sorted(wanted, key=key)


def test_the_newest_operator_image_is_the_agents(tmp_path: Path) -> None:
    values = tmp_path / "values.yaml"
    values.write_text(EVERYTHING)
    rendered = parsed(helm("template", "nomad", str(K8S / "chart"), "--values", str(values), *VERSION))
    (agent,) = [item for item in rendered if item["kind"] == "DaemonSet"]
    assert agent["spec"]["template"]["spec"]["containers"][0]["image"] == "example.com/o:1-py3.13"


def test_all_pods_have_the_secrets_for_registries(tmp_path: Path) -> None:
    values = tmp_path / "values.yaml"
    values.write_text(EVERYTHING)
    rendered = parsed(helm("template", "nomad", str(K8S / "chart"), "--values", str(values), *VERSION))
    pods = {
        item["metadata"]["name"]: item["spec"]["template"]["spec"]
        for item in rendered
        if item["kind"] in ("Deployment", "DaemonSet")
    }
    assert {name: pod["imagePullSecrets"] for name, pod in pods.items()} == {
        name: [{"name": "registry"}] for name in ("nomad-master", "nomad-agent", "nomad-relay")
    }
    assert "--pull-secret=registry" in pods["nomad-master"]["containers"][0]["args"]  # for those that it makes


def test_operators_tolerations_come_to_the_master_as_it_takes_them(tmp_path: Path) -> None:
    values = tmp_path / "values.yaml"
    values.write_text(EVERYTHING)
    rendered = parsed(helm("template", "nomad", str(K8S / "chart"), "--values", str(values), *VERSION))
    deployments = {item["metadata"]["name"]: item for item in rendered if item["kind"] == "Deployment"}
    command = deployments["nomad-master"]["spec"]["template"]["spec"]["containers"][0]["args"]
    taken = master_command.make_context("master", command[2:]).params
    assert list(taken["toleration"]) == [
        {"key": "site", "operator": "Equal", "value": 'a "b"', "effect": "NoSchedule"},
        {"key": "edge", "operator": "Exists"},
    ]
    assert (taken["storage_class"], taken["storage_size"]) == ("shared", "20Gi")
    assert (taken["pull_secret"], taken["token_review"]) == (("registry",), True)


def test_master_and_relay_are_reached_by_ways_outside_of_the_pods_network(tmp_path: Path) -> None:
    values = tmp_path / "values.yaml"
    values.write_text(EVERYTHING)
    rendered = parsed(helm("template", "nomad", str(K8S / "chart"), "--values", str(values), *VERSION))
    policies = {item["metadata"]["name"]: item["spec"] for item in rendered if item["kind"] == "NetworkPolicy"}
    blocks = [{"ipBlock": {"cidr": cidr}} for cidr in ("203.0.113.0/24", "198.51.100.0/24")]
    assert {"to": blocks} in policies["nomad-common"]["egress"]  # of all pods
    for name, port in (("nomad-master", names.CONTROL_PORT), ("nomad-relay", names.RELAY_PORT)):
        (rule,) = [rule for rule in policies[name]["ingress"] if rule["ports"] == [{"protocol": "TCP", "port": port}]]
        assert rule["from"][-2:] == blocks


def test_values_of_an_older_chart_give_what_the_defaults_do() -> None:
    """`helm upgrade --reuse-values` knows no value that is newer than the installation."""
    newer = ["operators", "networkPolicy.apiPorts", "master.storageSize"]
    wanted, given = (
        helm("template", "nomad", str(K8S / "chart"), "--set", "master.storageClass=nfs", *VERSION, *arguments)
        for arguments in ([], ["--set", ",".join(f"{value}=null" for value in newer)])
    )
    assert given == wanted


def test_the_api_server_takes_all_of_it_and_warns_of_nothing(envtest: Envtest, tmp_path: Path) -> None:
    values = tmp_path / "values.yaml"
    values.write_text(EVERYTHING)
    envtest.create_namespace("dry", {"pod-security.kubernetes.io/enforce": "restricted"})
    arguments = ["--namespace", "dry", "--include-crds", "--values", str(values), *VERSION]
    rendered = helm("template", "nomad", str(K8S / "chart"), *arguments)
    done = subprocess.run(
        [str(binaries.kubernetes() / "kubectl"), "--kubeconfig", str(envtest.kubeconfig)]
        + ["apply", "--server-side", "--dry-run=server", "--validate=strict", "--filename", "-"],
        input=rendered,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == len(parsed(rendered))
    envtest.kubectl("delete", "namespace", "dry")


def admitted(env: Envtest) -> None:
    """The restricted namespace takes every pod: a Deployment is only warned of, and its pods are refused later."""
    for item in parsed((K8S / "manifests" / "2-nomad.yaml").read_text()):
        if item["kind"] in ("Deployment", "DaemonSet"):
            pod = {"apiVersion": "v1", "kind": "Pod", **item["spec"]["template"]}
            pod["metadata"] = {"name": "tried", "namespace": "nomad", **pod["metadata"]}
            env.kubectl("create", "--dry-run=server", "-f", "-", input=yaml.safe_dump(pod))


def test_scripts_install_twice_and_remove_all_of_it(envtest: Envtest, scripts: Scripts) -> None:
    before = nomads(envtest, namespaced=False)
    assert "isn't prepared: run images/k8s/init.sh first" in scripts.run("startup.sh", code=1)
    for _ in range(2):
        scripts.run("init.sh")
        changes = {
            "IMAGE": "m:2",
            "OPERATOR_IMAGES": "3.11=o:2,3.12=o:3",
            "PULL_SECRETS": "registry,other",
            "WARM": "0",
        }
        told = scripts.run("startup.sh", code=1, TIMEOUT="1", **changes)
        assert "no master leads after 1 s" in told  # no pods run here
    admitted(envtest)
    master = envtest.get("deployment", names.MASTER_NAME, "-n", "nomad")["spec"]["template"]["spec"]
    (container,) = master["containers"]
    assert container["image"] == "m:2"
    assert {"--images=3.11=o:2", "--images=3.12=o:3"} <= set(container["args"])
    assert {"--pull-secret=registry", "--pull-secret=other", "--warm=0"} <= set(container["args"])
    agent = envtest.get("daemonset", names.AGENT_NAME, "-n", "nomad")["spec"]["template"]["spec"]
    assert agent["containers"][0]["image"] == "o:3"
    assert agent["imagePullSecrets"] == master["imagePullSecrets"] == [{"name": "registry"}, {"name": "other"}]
    # What nobody is there for any more who would take the finalizer away.
    pipeline = {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": {"name": "left", "namespace": "nomad", "finalizers": [names.FINALIZER]},
        "spec": {
            "bundle": "0" * 64,
            "operators": [{"name": "a", "kind": "periodic"}, {"name": "b", "kind": "function"}],
            "edges": [{"source": "a", "target": "b"}],
            "start": "edge",
            "end": "cloud",
        },
    }
    envtest.apply(pipeline)
    scripts.run("cleanup.sh", TIMEOUT="1")
    assert nomads(envtest, namespaced=True) == set()
    assert nomads(envtest, namespaced=False) == before
    assert "nomad" not in envtest.kubectl("get", "namespaces", "-o", "name")
    scripts.run("cleanup.sh")


def test_images_that_nodes_cant_get_are_named(envtest: Envtest, scripts: Scripts) -> None:
    """While a master is waited for; those of an earlier try, which are asked for no more, aren't."""
    scripts.run("init.sh")
    pod = yaml.safe_load(POD)
    envtest.apply(pod)
    waiting = [
        {"name": name, "image": image, "imageID": "", "ready": False, "restartCount": 0, "state": {"waiting": state}}
        for name, image, state in (
            ("a", "typo:2", {"reason": "ImagePullBackOff"}),
            ("b", "old:1", {"reason": "ErrImagePull"}),
            ("c", "slow:3", {"reason": "ContainerCreating"}),
        )
    ]
    status = yaml.safe_dump({"status": {"containerStatuses": waiting}})
    envtest.kubectl("patch", "pod", "p", "-n", "nomad", "--subresource=status", "--type=merge", "-p", status)
    told = scripts.run("startup.sh", code=1, TIMEOUT="3", IMAGE="slow:3", OPERATOR_IMAGES="3.11=o:1,3.12=typo:2")
    assert told.count("nodes can't get the image") == 1
    assert "nodes can't get the image typo:2: is IMAGE or OPERATOR_IMAGES right" in told


def test_what_is_not_nomads_stays(envtest: Envtest, scripts: Scripts) -> None:
    envtest.create_namespace("ours")
    envtest.kubectl("create", "secret", "generic", "camera", "--from-literal=password=x", "-n", "ours")
    told = scripts.run("init.sh", NAMESPACE="ours")
    assert "exists and isn't Nomad's own: its labels stay" in told
    assert "pod-security.kubernetes.io/enforce" not in envtest.get("namespace", "ours")["metadata"]["labels"]
    scripts.run("init.sh", NAMESPACE="second")
    envtest.kubectl("create", "secret", "generic", "camera", "--from-literal=password=x", "-n", "second")
    told = scripts.run("cleanup.sh", NAMESPACE="second")
    assert "The custom resource stays: Nomad or pipelines are in other namespaces, too (ours)." in told
    assert "The namespace second stays" in told
    assert "secret/camera" in told
    scripts.run("cleanup.sh", NAMESPACE="ours")
    assert envtest.get("secret", "camera", "-n", "ours")
    assert nomads(envtest, namespaced=True) == set()


def test_a_namespace_stays_for_whatever_somebody_else_has_there(envtest: Envtest, scripts: Scripts) -> None:
    scripts.run("init.sh", NAMESPACE="shared")
    envtest.kubectl("create", "rolebinding", "ada", "--clusterrole=view", "--user=ada", "-n", "shared")
    envtest.kubectl("create", "quota", "small", "--hard=pods=100", "-n", "shared")
    told = scripts.run("cleanup.sh", NAMESPACE="shared")
    assert "The namespace shared stays" in told
    assert "rolebinding.rbac.authorization.k8s.io/ada" in told
    assert "resourcequota/small" in told
    assert envtest.get("rolebinding", "ada", "-n", "shared")
    for kind, name in (("rolebinding", "ada"), ("quota", "small")):
        envtest.kubectl("delete", kind, name, "-n", "shared")
    assert "stays" not in scripts.run("cleanup.sh", NAMESPACE="shared")


def test_what_is_called_as_nomads_stays(envtest: Envtest, scripts: Scripts) -> None:
    """Rights of somebody else, whose name a mistyped NAMESPACE gives."""
    for name in ("typo-nodes", "typo-token-review", "typo-token-reviews"):
        envtest.kubectl("create", "clusterrole", name, "--verb=get", "--resource=nodes")
        envtest.kubectl("create", "clusterrolebinding", name, f"--clusterrole={name}", "--user=somebody")
    scripts.run("cleanup.sh", NAMESPACE="typo")
    for kind in ("clusterrole", "clusterrolebinding"):
        for name in ("typo-nodes", "typo-token-review", "typo-token-reviews"):
            assert envtest.get(kind, name)
            envtest.kubectl("delete", kind, name)


def test_what_the_cluster_does_not_say_is_not_taken_for_an_answer(
    envtest: Envtest, scripts: Scripts, tmp_path: Path
) -> None:
    scripts.run("init.sh", NAMESPACE="second")
    (tmp_path / "silent").mkdir()
    kubectl = tmp_path / "silent" / "kubectl"
    real = binaries.kubernetes() / "kubectl"
    kubectl.write_text(f'#!/bin/sh\ncase "$*" in *"$SILENT"*) echo "no answer" >&2; exit 1 ;; esac\nexec {real} "$@"\n')
    kubectl.chmod(0o755)
    path = f"{kubectl.parent}:{os.environ['PATH']}"
    asked = [
        ("init.sh", "get namespace second"),
        ("init.sh", "get namespace --selector"),
        ("startup.sh", "get crd"),
        ("startup.sh", "get serviceaccount nomad-master"),
        ("cleanup.sh", "get namespace second"),
        ("cleanup.sh", "get crd"),
        ("cleanup.sh", "get pipelines.nomad.dev --namespace"),
        ("cleanup.sh", "get pipelines.nomad.dev --all-namespaces"),
        ("cleanup.sh", "get roles --all-namespaces"),
    ]
    for script, silent in asked:
        told = scripts.run(script, code=1, NAMESPACE="second", SILENT=silent, PATH=path)
        assert "no answer" in told
        assert f"{script}: the cluster doesn't say" in told, told
        assert envtest.get("crd", "pipelines.nomad.dev")
    envtest.kubectl("create", "secret", "generic", "camera", "--from-literal=password=x", "-n", "second")
    for silent in ("get namespace --selector", "api-resources", "name!=nomad"):
        scripts.run("cleanup.sh", code=1, NAMESPACE="second", SILENT=silent, PATH=path)
        assert envtest.get("secret", "camera", "-n", "second")


def test_credentials_come_from_the_masters_secret(envtest: Envtest, scripts: Scripts, namespace: str) -> None:
    told = scripts.run("credentials.sh", code=1, NAMESPACE=namespace)
    assert f"the Secret nomad-master isn't in the namespace {namespace}" in told
    entries = ["--from-literal=token=t0ken", f"--from-literal=signing_key={'ab' * 32}"]
    envtest.kubectl("create", "secret", "generic", names.MASTER_NAME, *entries, "-n", namespace)
    assert scripts.run("credentials.sh", NAMESPACE=namespace).splitlines() == [
        "export NOMAD_TOKEN=t0ken",
        f"export NOMAD_SIGNING_KEY={'ab' * 32}",
    ]


def test_a_cluster_that_is_not_there_is_said(scripts: Scripts, tmp_path: Path) -> None:
    (tmp_path / "without").mkdir()
    for program in ("basename", "dirname"):
        (tmp_path / "without" / program).symlink_to(f"/usr/bin/{program}")
    for script in ("init.sh", "startup.sh", "cleanup.sh", "credentials.sh"):
        assert "no cluster answers" in scripts.run(script, code=1, CONTEXT="elsewhere")
        assert "isn't a name for a namespace of yours" in scripts.run(script, code=1, NAMESPACE="kube-system")
        assert "kubectl isn't installed" in scripts.run(script, code=1, PATH=str(tmp_path / "without"))
