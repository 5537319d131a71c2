"""A thousand nodes that aren't there: an envtest with kwok, which says that nodes are ready and that pods run.

kube-scheduler binds pods to the faked nodes, with affinities, resources and taints as on real ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from nomad.kubernetes import paths
from nomad.kubernetes.api import Api
from tests.kubernetes.cluster import binaries
from tests.kubernetes.cluster.envtest import Envtest, scheduler_command

ANNOTATION = "kwok.x-k8s.io/node"
TIERS = {"edge": 0.7, "fog": 0.25, "cloud": 0.05}
"""The nodes' tiers and the share of each."""
AT_ONCE = 32
"""Requests that make objects, and pods that are made to run."""
IMAGE = "nomad.dev/pause:1"
HEARTBEAT_SECONDS = 300
"""How often a node writes that nothing changed, as kubelets do."""
OPTIONS = {
    "apiVersion": "config.kwok.x-k8s.io/v1alpha1",
    "kind": "KwokConfiguration",
    "options": {"podPlayStageParallelism": AT_ONCE, "nodePlayStageParallelism": 4, "nodeLeaseParallelism": 4},
}
NODE_STATUS = """
conditions:
- {type: Ready, status: "True", reason: KubeletReady, message: ready, lastHeartbeatTime: {{ Now | Quote }},
   lastTransitionTime: {{ .metadata.creationTimestamp | Quote }}}
"""
POD_STATUS = """
phase: Running
startTime: {{ Now | Quote }}
podIP: {{ PodIPWith .spec.nodeName false .metadata.uid .metadata.name .metadata.namespace | Quote }}
conditions:
- {type: Initialized, status: "True", lastTransitionTime: {{ Now | Quote }}}
- {type: ContainersReady, status: "True", lastTransitionTime: {{ Now | Quote }}}
- {type: Ready, status: "True", lastTransitionTime: {{ Now | Quote }}}
containerStatuses:
{{ range .spec.containers }}
- {name: {{ .name | Quote }}, image: {{ .image | Quote }}, ready: true, started: true, restartCount: 0,
   state: {running: {startedAt: {{ Now | Quote }}}}}
{{ end }}
"""


class Scale(Envtest):
    """`node_count` nodes `edge-0` ... `cloud-...`, all ready. Use it as an `Envtest`."""

    # New nodes get a taint that a controller takes away, which isn't here: it would end nodes that aren't there.
    apiserver_options = (*Envtest.apiserver_options, "--disable-admission-plugins=TaintNodesByCondition")

    def __init__(self, folder: Path, node_count: int = 1000) -> None:
        super().__init__(folder)
        self.node_count = node_count

    def _start(self) -> None:
        super()._start()
        self._processes.start("kube-scheduler", scheduler_command(binaries.kubernetes(), self.folder))
        config = self.folder / "kwok.yaml"
        config.write_text(yaml.safe_dump_all([OPTIONS, *stages()]))
        self._processes.start(
            "kwok",
            [
                str(binaries.build("kwok")),
                f"--kubeconfig={self.kubeconfig}",
                f"--config={config}",
                f"--manage-nodes-with-annotation-selector={ANNOTATION}=fake",
                "--v=ERROR",
                "--node-lease-duration-seconds=200",
                "--cidr=10.200.0.0/16",
            ],
        )
        asyncio.run(self._create({paths.nodes(): nodes(self.node_count)}))
        self._processes.wait("kwok", lambda: self._ready_nodes() == self.node_count, "until all nodes are ready", 180)

    def make_pods(
        self, namespace: str, count: int, labels: Mapping[str, str] | None = None, timeout: float = 300
    ) -> None:
        """`count` pods `fake-<number>` with these labels, dealt out to the nodes; returns when all run."""
        names = [name for name, _ in node_names(self.node_count)]
        made = [pod(number, dict(labels or {}), names[number % len(names)]) for number in range(count)]
        asyncio.run(self._create({paths.pods(namespace): made}))
        self.wait_running(namespace, count, timeout)

    def wait_running(self, namespace: str, count: int, timeout: float = 300) -> None:
        """Until so many pods run there."""
        self._processes.wait("kwok", lambda: self._running_pods(namespace) >= count, f"until {count} pods run", timeout)

    async def _create(self, wanted: Mapping[str, Any]) -> None:
        limit = asyncio.Semaphore(AT_ONCE)
        async with Api.open(self.kubeconfig) as api:

            async def create(path: str, body: dict[str, Any]) -> None:
                async with limit:
                    await api.create(path, body)

            async with asyncio.TaskGroup() as group:
                for path, bodies in wanted.items():
                    for body in bodies:
                        group.create_task(create(path, body))

    def _ready_nodes(self) -> int:
        path = 'jsonpath={.items[*].status.conditions[?(@.type=="Ready")].status}'
        return self.kubectl("get", "nodes", "-o", path).split().count("True")

    def _running_pods(self, namespace: str) -> int:
        found = self.kubectl("get", "pods", "-n", namespace, "--field-selector=status.phase=Running", "--no-headers")
        return len(found.splitlines())


def stages() -> list[dict[str, Any]]:
    """What kwok does: nodes write now and then that they are well, pods that have a node run, and end when deleted."""
    is_ready = {
        "key": '.status.conditions.[] | select(.type == "Ready") | .status',
        "operator": "In",
        "values": ["True"],
    }
    every = {"durationMilliseconds": HEARTBEAT_SECONDS * 500, "jitterDurationMilliseconds": HEARTBEAT_SECONDS * 1000}
    deleted = ".metadata.deletionTimestamp"
    pending = {"key": ".status.phase", "operator": "In", "values": ["Pending"]}
    return [
        stage("heartbeat", "Node", [is_ready], {"statusTemplate": NODE_STATUS}, every),
        stage("run", "Pod", [{"key": deleted, "operator": "DoesNotExist"}, pending], {"statusTemplate": POD_STATUS}),
        stage("end", "Pod", [{"key": deleted, "operator": "Exists"}], {"delete": True}),
    ]


def stage(
    name: str, kind: str, matching: list[dict[str, Any]], then: dict[str, Any], delay: dict[str, int] | None = None
) -> dict[str, Any]:
    spec = {
        "resourceRef": {"apiGroup": "v1", "kind": kind},
        "selector": {"matchExpressions": matching},
        "delay": delay or {},
        "next": then,
    }
    return {"apiVersion": "kwok.x-k8s.io/v1alpha1", "kind": "Stage", "metadata": {"name": name}, "spec": spec}


def nodes(count: int) -> list[dict[str, Any]]:
    return [node(name, tier) for name, tier in node_names(count)]


def node_names(count: int) -> Iterator[tuple[str, str]]:
    """Name and tier of each node."""
    left = count
    for tier, share in TIERS.items():
        amount = left if tier == list(TIERS)[-1] else round(count * share)
        left -= amount
        for number in range(amount):
            yield f"{tier}-{number}", tier


def node(name: str, tier: str) -> dict[str, Any]:
    capacity = {"cpu": "4" if tier == "edge" else "32", "memory": "8Gi" if tier == "edge" else "128Gi", "pods": "110"}
    architecture = "arm64" if tier == "edge" else "amd64"
    labels = {
        "kubernetes.io/hostname": name,
        "kubernetes.io/os": "linux",
        "kubernetes.io/arch": architecture,
        "nomad.dev/tier": tier,
    }
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": labels, "annotations": {ANNOTATION: "fake"}},
        "status": {
            "capacity": capacity,
            "allocatable": capacity,
            "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "ready"}],
            "addresses": [{"type": "Hostname", "address": name}],
            "nodeInfo": {"architecture": architecture, "operatingSystem": "linux", "kubeletVersion": "v1.36.3"},
        },
    }


def pod(number: int, labels: dict[str, str], node_name: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": f"fake-{number}", "labels": labels},
        "spec": {
            "nodeName": node_name,
            "containers": [{"name": "main", "image": IMAGE}],
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": 1,
        },
    }
