"""What Nomad asks Kubernetes for: pods, their secrets and folders. Pure: specs in, JSON objects out.

Called by `nomad.runtime.kubernetes` and `nomad.runtime.warm`. Every pod here is admitted by Pod Security
`restricted`. A pod that waits for an operator and one that is made for it differ only in what they are called, in
what they ask for, and in what can't be given to a process any more that runs: secrets, devices, another image.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nomad.kubernetes import names
from nomad.runtime.base import PodSpec
from nomad.settings import Kubernetes

Json = dict[str, Any]

CONTAINER = "operator"
USER = 10001
"""The images' user, and its group."""

GRACE = 30
"""Seconds that a pod which somebody else deletes has for being replaced, and for handing over."""

INTERPRETER_MB = 96
"""MiB of a process that runs an operator which needs nothing: no pod asks for less."""

LEAST_CPU = "50m"
"""What an operator asks for whose need wasn't measured yet."""

CLAIM_FOLDER = f"{names.WORK_FOLDER}/claim"
"""Where a folder that outlives the pod is."""

OF_NODE_ANNOTATION = "cluster-autoscaler.kubernetes.io/daemonset-pod"
""""true": the pod is there because its node is, and doesn't keep the cluster autoscaler from removing that."""

PYTHON_ANNOTATION = f"{names.GROUP}/python"
"""On a pod with one of Nomad's own images: for which version of Python it was chosen ("" for any)."""

DEVICE_PREFIX = f"{names.GROUP}/"
"""A device that has a plain name in a pipeline is a resource of this group in the cluster."""

_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_VALUE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")


@dataclass(frozen=True, slots=True)
class Boot:
    """What every process of Nomad's is told at its start; its name and its key are its own."""

    control: str
    verify_key: bytes
    master_timeout: float


def pod_name(pipeline: str, operator: str, epoch: int) -> str:
    """What the pod of an operator is called in the cluster: a DNS label, and another one for every pod.

    As people would write it where that is possible; where something had to be changed, or could be read in two
    ways, with a hash.
    """
    return _named(f"{pipeline}-{operator}", f"{pipeline}.{operator}", f"-e{epoch}", clear="-" not in operator)


def object_name(pipeline: str, operator: str = "") -> str:
    """What other objects of a pipeline, or of its operator, are called; as `pod_name`."""
    text = f"{pipeline}-{operator}" if operator else pipeline
    return _named(text, f"{pipeline}.{operator}", "", clear="-" not in operator)


def _named(text: str, exact: str, end: str, *, clear: bool) -> str:
    if clear and len(text + end) <= 63 and _LABEL.fullmatch(text):
        return text + end
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower())
    tail = f"-{hashlib.sha256(exact.encode()).hexdigest()[:8]}{end}"
    head = plain[: 63 - len(tail)].strip("-")
    return (head + tail).lstrip("-")


def short(text: str) -> str:
    """`text` as a part of a name: readable, not unique."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:40].strip("-") or "node"


def label(text: str) -> str:
    """`text` as a label's value: itself where that is allowed."""
    if _VALUE.fullmatch(text):
        return text
    head = re.sub(r"[^A-Za-z0-9_.-]", "-", text)[:54].strip("-_.")
    return f"{head}-{hashlib.sha256(text.encode()).hexdigest()[:8]}".lstrip("-")


def operator_labels(pipeline: str, operator: str, epoch: int, node: str) -> dict[str, str]:
    """Labels of the pod of an operator."""
    return {
        **common(names.OPERATOR),
        names.PIPELINE_LABEL: label(pipeline),
        names.OPERATOR_LABEL: label(operator),
        names.EPOCH_LABEL: str(epoch),
        names.NODE_LABEL: label(node),
        names.STATE_LABEL: names.TAKEN,
    }


def operator_pod(
    spec: PodSpec,
    settings: Kubernetes,
    *,
    host: str,
    image: str,
    owner: Json | None = None,
) -> Json:
    """The pod for `spec` on the cluster's node `host`. `owner`: whom it ends with, as an owner reference."""
    name = pod_name(spec.pipeline, spec.operator, spec.epoch)
    annotations = {names.POD_ANNOTATION: spec.id}
    if not spec.image:
        annotations[PYTHON_ANNOTATION] = spec.python
    variables: list[Json] = [{"name": key, "value": value} for key, value in sorted(spec.environment.items())]
    for key, reference in sorted(spec.secrets.items()):
        secret, _, entry = reference.partition("/")
        variables.append({"name": key, "valueFrom": {"secretKeyRef": {"name": secret, "key": entry}}})
    pod = _pod(
        name,
        settings,
        host=host,
        image=image,
        labels=operator_labels(spec.pipeline, spec.operator, spec.epoch, spec.node),
        annotations=annotations,
        owners=_owned(owner),
        resources=resources(spec),
        variables=variables,
    )
    if settings.storage_class:
        claim = {"claimName": object_name(spec.pipeline, spec.operator)}
        pod["spec"]["volumes"].append({"name": "claim", "persistentVolumeClaim": claim})
        pod["spec"]["containers"][0]["volumeMounts"].append({"name": "claim", "mountPath": CLAIM_FOLDER})
    return pod


def warm_pod(name: str, node: str, settings: Kubernetes, *, host: str, image: str, owner: Json | None) -> Json:
    """A pod on `node` (the cluster's `host`) that waits for an operator.

    `owner`: as for an operator's pod. Not a kind that counts its pods: that would let go of one which it didn't make.
    """
    labels = {**common(names.OPERATOR), names.STATE_LABEL: names.WARM, names.NODE_LABEL: label(node)}
    return _pod(
        name,
        settings,
        host=host,
        image=image,
        labels=labels,
        annotations={PYTHON_ANNOTATION: settings.warm_python, OF_NODE_ANNOTATION: "true"},
        owners=_owned(owner),
        resources={"requests": {"memory": f"{INTERPRETER_MB}Mi", "cpu": "10m"}},
        variables=[],
    )


def claim_patch(spec: PodSpec, uid: str, owner: Json | None) -> list[Json]:
    """The JSON patch by which a waiting pod is given to `spec`; it is refused when that pod doesn't wait any more.

    Other than a resource version, this doesn't mind what the node says of the pod at the same moment.
    """

    def at(field: str, key: str) -> str:
        return f"/metadata/{field}/" + key.replace("~", "~0").replace("/", "~1")

    def put(path: str, value: Any) -> Json:
        return {"op": "add", "path": path, "value": value}

    labels = operator_labels(spec.pipeline, spec.operator, spec.epoch, spec.node)
    annotations = {names.POD_ANNOTATION: spec.id, PYTHON_ANNOTATION: spec.python, OF_NODE_ANNOTATION: "false"}
    return [
        {"op": "test", "path": "/metadata/uid", "value": uid},
        {"op": "test", "path": at("labels", names.STATE_LABEL), "value": names.WARM},
        *(put(at("labels", key), value) for key, value in labels.items()),
        *(put(at("annotations", key), value) for key, value in annotations.items()),
        put("/metadata/ownerReferences", _owned(owner)),
    ]


def resize_patch(spec: PodSpec) -> Json:
    """The patch of a running pod's `resize` by which it asks for what `spec` needs."""
    return {"spec": {"containers": [{"name": CONTAINER, "resources": resources(spec)}]}}


def resources(spec: PodSpec) -> Json:
    """What an operator asks for, and the memory that it may have at most: twice that, so that what was estimated too
    low doesn't end it, and what leaks doesn't end the others. Cores aren't limited: what is free may be used.
    """
    memory = max(INTERPRETER_MB, round(spec.memory_mb))
    cores = LEAST_CPU if spec.cores is None else f"{max(10, round(spec.cores * 1000))}m"
    devices = {device(name): str(count) for name, count in spec.devices.items()}
    return {
        "requests": {"memory": f"{memory}Mi", "cpu": cores, **devices},
        "limits": {"memory": f"{2 * memory + 64}Mi", **devices},
    }


def device(name: str) -> str:
    """A device as a resource of the cluster."""
    return name if "/" in name else DEVICE_PREFIX + name


def boot_secret(pod: Json, epoch: int, key: bytes, boot: Boot) -> Json:
    """What the process in `pod` (as the API has it) reads first. It goes when the pod goes."""
    metadata = pod["metadata"]
    content = {
        "pod": metadata["name"],
        "epoch": epoch,
        "control": boot.control,
        "key": key.hex(),
        "verify_key": boot.verify_key.hex(),
        "master_timeout": boot.master_timeout,
    }
    owner = {"apiVersion": "v1", "kind": "Pod", "name": metadata["name"], "uid": metadata["uid"]}
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": metadata["name"], "labels": common(names.OPERATOR), "ownerReferences": [owner]},
        "type": f"{names.GROUP}/boot",
        "immutable": True,
        "data": {"boot": base64.b64encode(json.dumps(content).encode()).decode()},
    }


def work_claim(spec: PodSpec, settings: Kubernetes, owner: Json | None) -> Json:
    """The folder of an operator that outlives its pods: two of them have it at the same time while it moves."""
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {
            "name": object_name(spec.pipeline, spec.operator),
            "labels": {**common(names.OPERATOR), names.PIPELINE_LABEL: label(spec.pipeline)},
            **({"ownerReferences": [owner]} if owner else {}),
        },
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "storageClassName": settings.storage_class,
            "resources": {"requests": {"storage": settings.storage_size}},
        },
    }


def common(component: str) -> dict[str, str]:
    """Labels of everything that belongs to a component."""
    return {**selector(component), names.MANAGED_BY: names.NOMAD}


def selector(component: str) -> dict[str, str]:
    """The labels by which a component's pods are found."""
    return {names.APP: names.NOMAD, names.COMPONENT: component}


def _pod(
    name: str,
    settings: Kubernetes,
    *,
    host: str,
    image: str,
    labels: Mapping[str, str],
    annotations: Mapping[str, str],
    owners: list[Json],
    resources: Json,
    variables: list[Json],
) -> Json:
    field = {"apiVersion": "v1", "fieldPath": "status.podIP"}
    own: list[Json] = [
        {"name": "NOMAD_BOOT", "value": f"{names.BOOT_FOLDER}/boot"},
        {"name": "NOMAD_TLS", "value": names.TLS_FOLDER},
        {"name": "NOMAD_WORK", "value": names.WORK_FOLDER},
        {"name": "NOMAD_READY_PORT", "value": str(names.READY_PORT)},
        {"name": "NOMAD_POD_IP", "valueFrom": {"fieldRef": field}},
    ]
    container = {
        "name": CONTAINER,
        "image": image,
        "imagePullPolicy": settings.pull_policy,
        "env": [*variables, *own],
        "ports": [{"name": "data", "containerPort": names.DATA_PORT, "protocol": "TCP"}],
        "resources": resources,
        "readinessProbe": {"tcpSocket": {"port": names.READY_PORT}, "periodSeconds": 5, "timeoutSeconds": 2},
        "lifecycle": {"preStop": {"exec": {"command": ["sh", "-c", PRE_STOP]}}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "boot", "mountPath": names.BOOT_FOLDER, "readOnly": True},
            {"name": "tls", "mountPath": names.TLS_FOLDER, "readOnly": True},
            {"name": "work", "mountPath": names.WORK_FOLDER},
            {"name": "tmp", "mountPath": "/tmp"},
        ],
    }
    # A node that doesn't answer may be cut off and at work: its pods are left alone, and nobody else deletes them.
    forever = [
        {"key": f"node.kubernetes.io/{state}", "operator": "Exists", "effect": "NoExecute"}
        for state in ("unreachable", "not-ready")
    ]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "labels": dict(labels),
            "annotations": dict(annotations),
            "ownerReferences": owners,
        },
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": GRACE,
            "automountServiceAccountToken": False,
            "imagePullSecrets": [{"name": secret} for secret in settings.pull_secrets],
            "enableServiceLinks": False,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER,
                "runAsGroup": USER,
                "fsGroup": USER,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "affinity": {"nodeAffinity": _only_on(host)},
            "tolerations": [*forever, *(dict(toleration) for toleration in settings.tolerations)],
            "containers": [container],
            "volumes": [
                {"name": "boot", "secret": {"secretName": name, "defaultMode": 0o440}},
                {"name": "tls", "secret": {"secretName": names.POD_TLS_SECRET, "defaultMode": 0o440}},
                {"name": "work", "emptyDir": {}},
                {"name": "tmp", "emptyDir": {}},
            ],
        },
    }


def _owned(owner: Json | None) -> list[Json]:
    """Owner references of a pod, with its owner as the controller that makes it anew: so those who drain nodes may
    evict it.
    """
    return [{**owner, "controller": True}] if owner else []


def _only_on(host: str) -> Json:
    """That node and no other; unlike `nodeName` it leaves resources and taints to the scheduler."""
    field = {"key": "metadata.name", "operator": "In", "values": [host]}
    return {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{"matchFields": [field]}]}}


PRE_STOP = 'kill -USR1 1; while [ -e "$NOMAD_WORK/serving" ]; do sleep 0.2; done'
"""Somebody else deletes the pod: it says so to the master, and is left at work until it has been replaced."""
