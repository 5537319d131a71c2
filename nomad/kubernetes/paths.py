"""Where things are in Kubernetes' API: the one place that knows groups and versions. Pure.

Each function gives a collection's path, or an object's when it is given its name, or a subresource's.
"""

from __future__ import annotations

from urllib.parse import quote

from nomad.kubernetes.names import GROUP, PLURAL, VERSION


def _core(namespace: str, plural: str, *rest: str) -> str:
    return _join("/api/v1", namespace, plural, *rest)


def _group(group: str, version: str, namespace: str, plural: str, *rest: str) -> str:
    return _join(f"/apis/{group}/{version}", namespace, plural, *rest)


def _join(root: str, namespace: str, plural: str, *rest: str) -> str:
    scope = f"/namespaces/{quote(namespace, safe='')}" if namespace else ""
    return "/".join([f"{root}{scope}/{plural}", *(quote(part, safe="") for part in rest if part)])


def pods(namespace: str, name: str = "", sub: str = "") -> str:
    """`sub`: `log`, `status`, `resize`, `eviction`."""
    return _core(namespace, "pods", name, sub)


def secrets(namespace: str, name: str = "") -> str:
    return _core(namespace, "secrets", name)


def configmaps(namespace: str, name: str = "") -> str:
    return _core(namespace, "configmaps", name)


def services(namespace: str, name: str = "") -> str:
    return _core(namespace, "services", name)


def claims(namespace: str, name: str = "") -> str:
    """Persistent volume claims."""
    return _core(namespace, "persistentvolumeclaims", name)


def nodes(name: str = "", sub: str = "") -> str:
    return _core("", "nodes", name, sub)


def namespaces(name: str = "") -> str:
    return _core("", "namespaces", name)


def events(namespace: str, name: str = "") -> str:
    """What `kubectl describe` shows (events.k8s.io)."""
    return _group("events.k8s.io", "v1", namespace, "events", name)


def leases(namespace: str, name: str = "") -> str:
    return _group("coordination.k8s.io", "v1", namespace, "leases", name)


def deployments(namespace: str, name: str = "") -> str:
    return _group("apps", "v1", namespace, "deployments", name)


def daemonsets(namespace: str, name: str = "") -> str:
    return _group("apps", "v1", namespace, "daemonsets", name)


def networkpolicies(namespace: str, name: str = "") -> str:
    return _group("networking.k8s.io", "v1", namespace, "networkpolicies", name)


def pipelines(namespace: str, name: str = "", sub: str = "") -> str:
    """`sub`: `status`."""
    return _group(GROUP, VERSION, namespace, PLURAL, name, sub)


def definitions(name: str = "") -> str:
    """Custom resource definitions."""
    return _group("apiextensions.k8s.io", "v1", "", "customresourcedefinitions", name)


def tokenreviews() -> str:
    return _group("authentication.k8s.io", "v1", "", "tokenreviews")


def accessreviews() -> str:
    """Whether the one who asks may do something."""
    return _group("authorization.k8s.io", "v1", "", "selfsubjectaccessreviews")
