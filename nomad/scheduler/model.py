"""What a placement is made from and what it answers, as plain frozen data.

The master makes a `Snapshot` and acts on the `Plan`; nothing here knows a cluster, a clock or the other.
Seconds, bytes, bytes per second, MiB throughout. Unknown is None, never a magic number: what is assumed
instead stands in the `Policy`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Node:
    """A node that operators can be placed on."""

    id: str
    speed: float = 1.0
    """Reference-seconds of work per second and core."""
    cores: float = 1.0
    memory_mb: float = 1024.0
    labels: frozenset[str] = frozenset()
    arch: str = ""
    used_memory_mb: float = 0.0
    """What the operators of other pipelines have been promised."""

    @property
    def free_memory_mb(self) -> float:
        """What is left of its memory, before this placement."""
        return self.memory_mb - self.used_memory_mb


@dataclass(frozen=True, slots=True)
class Link:
    """The way from one node to another. Directed; a way that isn't given costs nothing, as in the emulation."""

    source: str
    target: str
    latency: float = 0.0
    bandwidth: float | None = None
    """None is unlimited."""


@dataclass(frozen=True, slots=True)
class Operator:
    """What an operator needs. `id` is its name in the pipeline."""

    id: str
    memory_mb: float = 0.0
    requires: frozenset[str] = frozenset()
    work: float | None = None
    """Reference-seconds per message."""
    output_bytes: float | None = None
    """Per message sent on."""
    pin: str | None = None
    """The node that it must be on. Overrides `requires`: who names a node knows it."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A cluster, and one pipeline to place on it. The order of nodes and links is of no consequence."""

    nodes: tuple[Node, ...]
    operators: tuple[Operator, ...]
    """In topological order."""
    edges: tuple[tuple[str, str], ...]
    links: tuple[Link, ...] = ()
    placement: Mapping[str, str] = field(default_factory=dict)
    """Where operators are now, operator -> node; empty before the first placement."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What is assumed, and how long is searched."""

    default_work: float = 1e-3
    """Reference-seconds per message of an operator that nothing is known of."""
    default_output_bytes: float = 1024.0
    max_steps: int = 20_000
    """Nodes tried, over all operators, before the search gives up."""


@dataclass(frozen=True, slots=True)
class RunnerUp:
    """The best node that an operator wasn't placed on."""

    node: str
    terms: Mapping[str, float]
    total: float


@dataclass(frozen=True, slots=True)
class Reason:
    """Why an operator is where it is."""

    node: str
    terms: Mapping[str, float]
    """Seconds per message by name of the term; see `cost`."""
    total: float
    """The sum of the terms: what the node was chosen by."""
    runner_up: RunnerUp | None
    text: str
    """The same as a sentence."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A placement that breaks no constraint."""

    placement: Mapping[str, str]
    """Operator -> node."""
    reasons: Mapping[str, Reason]
    latency: float
    """Predicted seconds from the source's call to the end of the last operator."""


@dataclass(frozen=True, slots=True)
class Lack:
    """A node that came near, and what it lacks, e.g. "label gpu" or "36 MiB of memory"."""

    node: str
    lacks: str


@dataclass(frozen=True, slots=True)
class Infeasible:
    """There is no placement. A value, because it is an answer."""

    constraint: str
    """What can't be met: "nodes", "pin", "requires" or "memory"; or "search": given up, which proves nothing."""
    operator: str
    nearest: tuple[Lack, ...]
    """At most three, the nearest first."""
    text: str
    """The same as a sentence, with the way out."""
