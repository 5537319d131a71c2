"""The runtime seam: where pods come from.

A pod is one process (or one Kubernetes pod) that hosts one operator. A runtime starts, stops, lists
and watches pods and knows its nodes; it doesn't know what a pipeline is. The master's loop is the
only caller. `start` means *asked for*: whether a pod runs is told by `list` and `watch`, and by
the pod itself once it has connected to the master's control address.
"""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol, runtime_checkable

from nomad.control import Shape


class PodPhase(StrEnum):
    """What a runtime can see of a pod from outside."""

    STARTING = "starting"
    RUNNING = "running"
    EXITED = "exited"


@dataclass(frozen=True, slots=True)
class PodSpec:
    """A pod to start."""

    id: str
    """Unique for ever: `<pipeline>.<operator>-e<epoch>`."""
    pipeline: str
    operator: str
    epoch: int
    node: str
    control: str
    """The address of the master's control listener."""
    key: bytes
    """32 bytes; the pod proves itself to the master with it, and the master to the pod."""
    verify_key: bytes
    """Raw Ed25519 public key (32 bytes) that signed bundles must match; given here and not over the control channel."""
    master_timeout: float
    """Seconds that the pod goes on without a master before it stops by itself."""
    memory_mb: float = 64.0
    """MiB that the operator asks for."""
    cores: float | None = None
    """Cores that it needs, as far as that was measured."""
    python: str = ""
    """`3.11`-style minor version that its code was made with; "" is any."""
    image: str = ""
    """The container image that it asks for; "" is the runtime's own."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of its process."""
    secrets: Mapping[str, str] = field(default_factory=dict)
    """Variable -> `name/key` of the secret that it gets its value from, where the runtime has secrets."""
    devices: Mapping[str, int] = field(default_factory=dict)
    """Name of a device, e.g. `nvidia.com/gpu` -> how many."""
    requirements: tuple[str, ...] = ()
    """Packages that its process has to have, as pip takes them; it sees to that itself, once it has its assignment."""


@dataclass(frozen=True, slots=True)
class ObservedPod:
    """A pod as the runtime sees it; the same type from every runtime."""

    id: str
    phase: PodPhase
    node: str
    epoch: int
    pid: int | None = None
    exit_code: int | None = None
    """Negative: killed by that signal."""
    reason: str = ""
    leaving: bool = False
    """It was asked to end by somebody else than the master (a node that is drained, `kubectl delete pod`), and goes on
    for a while: time to put another one in its place."""
    outdated: bool = False
    """It runs another image than a new pod would: time to replace it."""
    failed: bool = False
    """It has ended without ever having run, `reason` says why: on another node it may."""


def reason_of(exit_code: int | None) -> str:
    """How a process ended, in words."""
    if exit_code is None:
        return "ended while nobody watched it"
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    try:
        return f"was killed by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"was killed by signal {-exit_code}"


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """A node that pods can be placed on."""

    id: str
    speed: float = 1.0
    """Reference-seconds of work per second and core; 1.0 is one core of the reference machine."""
    cores: float = 1.0
    memory_mb: float = 1024.0
    arch: str = ""
    labels: frozenset[str] = frozenset()
    python: str = ""
    """`3.11`-style minor version of the pods there."""
    ready: bool = True
    """Pods can be started there; a node that isn't ready has lost the pods that it had."""
    schedulable: bool = True
    """New pods may be put there; what runs there goes on (a node that is cordoned isn't)."""
    reachable: bool = True
    """Pods elsewhere can dial those there; behind NAT they can't."""
    zone: str = ""
    devices: Mapping[str, int] = field(default_factory=dict)
    """What pods there can ask for, by name."""


@dataclass(frozen=True, slots=True)
class LinkInfo:
    """The declared state of a directed link between two nodes."""

    source: str
    target: str
    shape: Shape = field(default_factory=Shape)


class Runtime(Protocol):
    """What the master needs of the world; as few members as do."""

    @property
    def nodes(self) -> Sequence[NodeInfo]:
        """The nodes as they are now, those that are lost included. Asked for twice a second: where there are many of
        them, it is the same object again for as long as nothing has changed.
        """
        ...

    async def start(self, spec: PodSpec) -> None:
        """Ask for a pod. Idempotent by `spec.id`. Raises `PodStartError` when it can't be started."""
        ...

    async def stop(self, pod_id: str, *, grace: float) -> None:
        """Ask for a pod to end: politely, and after `grace` seconds by force. Unknown ids are fine."""
        ...

    async def list(self) -> Sequence[ObservedPod]:
        """All pods of this runtime, including those that an earlier master process started, and lately ended ones."""
        ...

    def watch(self) -> AsyncIterator[ObservedPod]:
        """Changes as they happen, from the call on (not from the first step on): call it, then `list`, then iterate."""
        ...

    async def logs(self, pod_id: str, *, tail: int | None = None) -> Sequence[str]:
        """The last `tail` lines that the pod printed, oldest first; also of a pod that has ended."""
        ...

    def follow(self, pod_id: str) -> AsyncIterator[str]:
        """Lines from now on, until the pod has ended."""
        ...

    def workdir(self, pipeline: str, operator: str) -> str:
        """A folder that survives the operator's processes ("" when there is none)."""
        ...

    def listen_address(self, pod_id: str) -> str:
        """Where a pod should listen for data links."""
        ...

    def pod_of(self, name: str) -> str | None:
        """Which pod the process is that calls itself `name`: the same, where processes are started for one pod each.

        "" for a process that waits to be given to one, None for one that isn't known.
        """
        ...

    async def missing_secrets(self, references: Collection[str]) -> Sequence[str]:
        """Of secrets (`name/key`) that pods are to have: a sentence for each that they can't be given, saying why."""
        ...

    async def forget(self, pipeline: str) -> None:
        """Delete what is left of a pipeline that has no running pods: work folders, logs, records."""
        ...

    async def close(self) -> None:
        """Release what this object holds (watchers, tasks); pods go on."""
        ...


@runtime_checkable
class Distant(Protocol):
    """What a runtime offers beside that when it may lose sight of nodes that the master goes on hearing."""

    def heard(self, name: str) -> None:
        """The process of this name (`pod_of`), or the agent of a node (`agent:<node>`), has just said something."""
        ...

    def knows(
        self,
        connected: Callable[[str], bool],
        edges: Callable[[str], Sequence[tuple[str, str]]],
        missed: Callable[[], float],
    ) -> None:
        """Before the first pod is started: whether a process that waits has reported to the master, so that it can be
        put to work at once; a pipeline's graph, for what has to be opened between its pods; and in how many seconds a
        process that is there would have been `heard`, which are more where there are many.
        """
        ...


@runtime_checkable
class Apart(Protocol):
    """What a runtime offers beside that when pods of one operator may have different folders."""

    @property
    def folders_follow(self) -> bool:
        """Whether an operator has the same folder wherever it is; else what is in it has to be carried over."""
        ...


@runtime_checkable
class Machines(Protocol):
    """What a runtime offers beside that whose nodes have names of their own in the cluster: what agents call them."""

    def node_of(self, name: str) -> str | None:
        """What Nomad calls the node that the cluster calls `name`; None when there is none."""
        ...


@runtime_checkable
class Emulated(Protocol):
    """What a runtime offers beside that when its nodes only pretend to be machines."""

    def lose_node(self, node: str) -> None:
        """As if its power failed: the processes of all its pods are killed, and none is started there."""
        ...

    def restore_node(self, node: str) -> None:
        """Pods can be started there again."""
        ...
