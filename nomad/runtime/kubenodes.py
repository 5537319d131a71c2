"""The cluster's nodes as Nomad sees them.

`take` makes a `NodeInfo` of what the API shows of a node; `Nodes` keeps them, and knows which are lost: those that
the cluster doesn't hear any more, unless a process there was heard by the master lately. Called by
`nomad.runtime.kubernetes`; the tuple of all nodes is asked for again and again, so it is only made anew when
something has changed.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from nomad.clock import Clock
from nomad.kubernetes import names
from nomad.runtime.base import NodeInfo
from nomad.runtime.manifests import DEVICE_PREFIX, label

log = logging.getLogger(__name__)

Json = dict[str, Any]

MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}
"""What the cluster calls a kind of processor -> what machines call it themselves."""

ZONE_LABEL = "topology.kubernetes.io/zone"

OURS = frozenset({"node.kubernetes.io/unreachable", "node.kubernetes.io/not-ready"})
"""Taints that operator pods put up with; whether the node is ready is looked at by itself."""

_UNITS = {
    "n": Decimal("1e-9"),
    "u": Decimal("1e-6"),
    "m": Decimal("1e-3"),
    "k": Decimal(10**3),
    "M": Decimal(10**6),
    "G": Decimal(10**9),
    "T": Decimal(10**12),
    "P": Decimal(10**15),
    "E": Decimal(10**18),
    "Ki": Decimal(2**10),
    "Mi": Decimal(2**20),
    "Gi": Decimal(2**30),
    "Ti": Decimal(2**40),
    "Pi": Decimal(2**50),
    "Ei": Decimal(2**60),
}


@dataclass(frozen=True, slots=True)
class KubeNode:
    """A node, and what it is called in the cluster."""

    host: str
    info: NodeInfo
    """`ready`: as the cluster says."""


def take(item: Json, tolerations: Sequence[Mapping[str, Any]]) -> KubeNode:
    """A node as the API shows it."""
    metadata, spec, status = item["metadata"], item.get("spec", {}), item.get("status", {})
    host, labels = metadata["name"], metadata.get("labels") or {}
    allocatable = status.get("allocatable") or {}
    conditions = {found["type"]: found["status"] for found in status.get("conditions") or ()}
    arch = (status.get("nodeInfo") or {}).get("architecture", "")
    tier = labels.get(names.TIER_LABEL)
    info = NodeInfo(
        id=labels.get(names.NODE_NAME_LABEL) or host,
        cores=float(quantity(allocatable.get("cpu", "0"))),
        memory_mb=float(quantity(allocatable.get("memory", "0"))) / 2**20,
        arch=MACHINES.get(arch, arch),
        labels=frozenset(
            {*labels, *(f"{key}={value}" for key, value in labels.items() if value), *([tier] if tier else ())}
        ),
        ready=conditions.get("Ready") == "True",
        schedulable=not spec.get("unschedulable") and all(_tolerated(t, tolerations) for t in spec.get("taints") or ()),
        reachable=labels.get(names.REACHABLE_LABEL) != "false",
        zone=labels.get(ZONE_LABEL, ""),
        devices=_devices(allocatable),
    )
    return KubeNode(host, info)


def quantity(text: str | int | float) -> Decimal:
    """A Kubernetes quantity (`100m`, `16Gi`, `1e3`) as a number."""
    value = str(text)
    for digits in (2, 1):
        if value[-digits:] in _UNITS:
            return Decimal(value[:-digits]) * _UNITS[value[-digits:]]
    return Decimal(value)


def _tolerated(taint: Json, tolerations: Sequence[Mapping[str, Any]]) -> bool:
    if taint.get("effect") == "PreferNoSchedule" or taint.get("key") in OURS:
        return True
    if taint.get("key") == "node.kubernetes.io/unschedulable":
        return False
    return any(_matches(toleration, taint) for toleration in tolerations)


def _matches(toleration: Mapping[str, Any], taint: Json) -> bool:
    if toleration.get("effect") not in (None, "", taint.get("effect")):
        return False
    if toleration.get("key") in (None, ""):
        return toleration.get("operator") == "Exists"
    if toleration.get("key") != taint.get("key"):
        return False
    return toleration.get("operator") == "Exists" or toleration.get("value", "") == taint.get("value", "")


def _devices(allocatable: Json) -> dict[str, int]:
    """Resources that are named like `vendor.com/thing`; those of Nomad's own group by their plain names too."""
    found = {}
    for name, amount in allocatable.items():
        count = int(quantity(amount)) if "/" in name else 0
        if count:
            found[name] = count
            if name.startswith(DEVICE_PREFIX):
                found[name.removeprefix(DEVICE_PREFIX)] = count
    return found


class Nodes:
    """All nodes, by Nomad's names."""

    def __init__(self, clock: Clock, grace: float) -> None:
        """`grace`: seconds that the last word from a node counts, at the least."""
        self._clock = clock
        self._grace = grace
        self.missed: Callable[[], float] = lambda: 0.0
        """Seconds in which processes that are there would have been heard: the last word counts for as long, too."""
        self._nodes: dict[str, KubeNode] = {}
        self._labels: dict[str, str] = {}
        self._hosts: dict[str, str] = {}
        self._heard: dict[str, float] = {}
        self._held: set[str] = set()  # not ready for the cluster, and shown as ready
        self._unready: set[str] = set()  # not ready for the cluster
        self._shown: tuple[NodeInfo, ...] | None = None
        self._began = clock.now()  # who was heard by an earlier master isn't known: all have had their say then

    def changed(self, old: KubeNode | None, new: KubeNode | None) -> set[str]:
        """Take in a change; the ids of the nodes that it is about."""
        before = self._hosts.pop(old.host, None) if old is not None else None
        if before is not None:
            del self._nodes[before]
            self._unready.discard(before)
        now = None
        if new is not None:
            renamed = old is None or old.info.id != new.info.id
            now = self._free(new) if renamed or before is None else before
            self._nodes[now] = new if now == new.info.id else replace(new, info=replace(new.info, id=now))
            self._hosts[new.host] = now
            self._labels[label(now)] = now
            if not new.info.ready:
                self._unready.add(now)
        if before is not None and before != now:
            self._labels.pop(label(before), None)
            self._heard.pop(before, None)
        self._shown = None
        return {name for name in (before, now) if name is not None}

    def _free(self, node: KubeNode) -> str:
        """What a node that comes is called: as it wants to be, unless another one is called that already."""
        others = (f"{node.host}-{n}" for n in itertools.count(2))
        name = next(name for name in itertools.chain((node.info.id, node.host), others) if name not in self._nodes)
        if name != node.info.id:
            there = self._nodes[node.info.id].host
            log.warning(
                "two nodes want to be called %s: %s is, and %s goes by the name %s until its label %s is another one",
                *(node.info.id, there, node.host, name, names.NODE_NAME_LABEL),
            )
        return name

    def heard(self, node: str) -> None:
        """A process there has just said something."""
        if node in self._nodes:
            self._heard[node] = self._clock.now()

    def get(self, node: str) -> KubeNode | None:
        return self._nodes.get(node)

    def at(self, host: str) -> str | None:
        """The node that the cluster calls `host`; None when there is none."""
        return self._hosts.get(host)

    def named(self, value: str) -> str:
        """The node whose id is that as a label's value; `value` itself when there is none."""
        return self._labels.get(value, value)

    def usable(self, node: str) -> bool:
        """New pods can be put there: the cluster hears it, and lets them."""
        found = self._nodes.get(node)
        return found is not None and found.info.ready and found.info.schedulable

    def all(self) -> tuple[NodeInfo, ...]:
        """All nodes, those that are lost included; the same tuple until something has changed."""
        held = set()
        if self._unready:
            since = self._clock.now() - max(self._grace, self.missed())
            held = {node for node in self._unready if self._heard.get(node, self._began) > since}
        if self._shown is None or held != self._held:
            self._held = held
            self._shown = tuple(
                replace(node.info, ready=True) if id in held else node.info for id, node in self._nodes.items()
            )
        return self._shown

    def ids(self) -> Sequence[str]:
        return tuple(self._nodes)

    @property
    def one_way(self) -> bool:
        """Some nodes can only dial out."""
        return any(not node.info.reachable for node in self._nodes.values())
