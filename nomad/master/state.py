"""What the master knows, as three values that are never mixed.

    Desired     what users want. Written by the facade (`app`) only, after it was stored; a pipeline that is to be
                removed is taken out by the loop, once nothing is left of it.
    Requested   what was asked of the runtime and told to pods. Replaced by the loop only, with what
                `reconcile.step` returns; its values are never changed in place.
    Observed    what was seen: of pods by the runtime, and from pods themselves. Written by `observe` only.

Plain data. Times are of the master's monotonic clock unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

from nomad.control import LinkPeer, LinkStatus, PodStats, Role, Shape
from nomad.master.views import DataLinkView, FailureView, MoveState, PlacementView
from nomad.pipeline import PipelineSpec
from nomad.runtime.base import NodeInfo, ObservedPod, PodPhase


class Goal(StrEnum):
    """What the user wants of a pipeline."""

    RUN = "run"
    STOP = "stop"
    """Drained, then ended; it stays visible."""
    REMOVE = "remove"
    """Ended at once and forgotten."""


class Outcome(StrEnum):
    """How a pipeline ended, for good."""

    COMPLETED = "completed"
    FAILED = "failed"
    STOPPED = "stopped"


Called: TypeAlias = tuple[tuple[int, int, bytes], ...]
"""Lane, origin and path of the last message in each lane that a last operator was called for."""

ORDERS_KEPT = 8
"""Moves of one pipeline that may wait."""


@dataclass(frozen=True, slots=True)
class MoveOrder:
    """One operator is to go to another node, while the pipeline runs. They are carried out one by one."""

    id: str
    """Unique for ever."""
    operator: str
    node: str
    cause: str
    """As `views.MoveView` has them."""
    reason: str
    """One sentence."""
    predicted: Mapping[str, float] = field(default_factory=dict)
    """`latency_before`, `latency_after` and `gain`, seconds per message; what isn't known isn't there."""
    asked_at: float = 0.0
    """Seconds since the epoch."""
    placement: PlacementView | None = None
    """Why it is to be there, as the scheduler says it."""
    relieves: str = ""
    """The pod whose place another one is to take, on the same node or elsewhere; "": whichever it is."""


@dataclass(slots=True)
class DesiredPipeline:
    """A pipeline as it was submitted, and what is wanted of it now."""

    spec: PipelineSpec
    bundle: str
    """Digest of its bundle in the store."""
    link_key: bytes
    """32 bytes, made for this pipeline: what its pods prove to each other."""
    created: float
    """Seconds since the epoch."""
    placement: dict[str, PlacementView]
    """Operator name -> node and why."""
    warnings: tuple[str, ...] = ()
    goal: Goal = Goal.RUN
    epoch_floor: int = 0
    """Epochs of its operators are above this, so that no pod id is ever used twice."""
    moves: bool = True
    """Nomad may move operators by itself when that pays; users may at any time."""
    pins: dict[str, str] = field(default_factory=dict)
    """Operator -> the node that it was bound to by name; the first and the last are bound anyway, see `bound`."""
    orders: list[MoveOrder] = field(default_factory=list)
    """Moves that are under way or wait, oldest first. Added by `moves`, taken out by the loop once they have ended."""

    @property
    def sources(self) -> frozenset[str]:
        """The operators that nothing leads to."""
        return frozenset(op.name for op in self.spec.operators) - {target for _, target in self.spec.edges}

    @property
    def ends(self) -> frozenset[str]:
        """The operators that nothing comes to, and those that nothing leads on from. Nobody behind these recognises
        what two instances of them do twice, or in what order.
        """
        return self.sources | (frozenset(op.name for op in self.spec.operators) - {a for a, _ in self.spec.edges})

    @property
    def bound(self) -> dict[str, str]:
        """Operator -> node, of all that can't be placed elsewhere."""
        first, last = self.spec.operators[0].name, self.spec.operators[-1].name
        return {**self.pins, first: self.spec.start, last: self.spec.end}

    def node_of(self, operator: str) -> str:
        return self.placement[operator].node


@dataclass(slots=True)
class Desired:
    """All that users want."""

    pipelines: dict[str, DesiredPipeline] = field(default_factory=dict)
    shapes: dict[tuple[str, str], Shape] = field(default_factory=dict)
    """Directed pair of nodes -> how their link is emulated; others aren't."""
    speeds: dict[str, float] = field(default_factory=dict)
    """Node -> emulated speed, where it isn't the declared one."""
    lost: set[str] = field(default_factory=set)
    """Emulated nodes that are made to fail."""
    epoch_floor: int = 0
    """The highest epoch that a removed pipeline has used."""
    unread: AbstractSet[str] = frozenset()
    """Pipelines that are wanted, but couldn't be read: nobody looks after them, and their pods are left as they are."""
    closing: bool = False
    """The master ends: all pods are stopped, and what is wanted of pipelines stays as it is."""

    def shape(self, source: str, target: str) -> Shape:
        return self.shapes.get((source, target), Shape()) if source != target else Shape()


@dataclass(frozen=True, slots=True)
class Told:
    """What a pod was told over one connection."""

    connection: int
    links: tuple[LinkPeer, ...]
    """All of its links; an address that isn't known is None."""
    speed: float
    role: str = Role.ACTIVE


@dataclass(frozen=True, slots=True)
class RequestedOperator:
    """What was asked for one operator."""

    epoch: int = 0
    """Of the present or last pod; grows with every pod, also over restarts of the master."""
    highest: int = 0
    """The highest epoch that was given; above `epoch` while, or after, another instance was to take over."""
    node: str = ""
    """Where the present or last pod was asked for."""
    pod: str | None = None
    """The pod that was asked for and isn't known to have ended."""
    last_pod: str = ""
    asked_at: float = 0.0
    """When the pod was asked for, or adopted."""
    adopted: bool = False
    """An earlier master asked for the pod, or it was away."""
    grace: float = 0.0
    """Seconds that an adopted pod may take to report, if more than `Reconcile.adopt_grace`."""
    restarts: int = 0
    failures: int = 0
    """In a row, for the pause before the next pod."""
    start_failures: int = 0
    """How often in a row no pod could be started on the node."""
    retry_at: float = 0.0
    """No next pod before this; another node needs no pause."""
    rehomes: int = 0
    """How often another node was asked for, with no effect yet, ..."""
    rehome_at: float = 0.0
    """... before when not again, ..."""
    rehome_nodes: int = 0
    """... unless nodes have changed since: `Observed.node_changes` of then."""
    relieves: int = 0
    """How often a move was asked for because the pod is to end, or out of date, ..."""
    relieved_at: float = 0.0
    """... and when the last time."""
    told: Told | None = None
    ready: bool = False
    """The pod was ready, and that was noted."""
    silent: bool = False
    """Its heart-beats are overdue, and that was noted."""
    away: bool = False
    """Its node is lost; the pod is waited for."""
    stop_by: float | None = None
    """It was asked to end until then."""
    kill_by: float | None = None
    """The runtime was asked to end it until then."""


@dataclass(frozen=True, slots=True)
class RequestedMove:
    """A move that is under way, or whose last pod is still to end. `migration` leads it from state to state."""

    order: MoveOrder
    source: str
    """The node that it moves from."""
    state: MoveState
    since: float
    """When it came to that state."""
    second: RequestedOperator = field(default_factory=RequestedOperator)
    """What was asked for the instance that isn't the operator's present one: the new one, after the switch the old."""
    switch_at: float = 0.0
    """When the handing over began."""
    switched: bool = False
    """The switch is stored, and the new instance is the present one."""
    carrying: bool = False
    """Copying what is set aside was asked for."""
    handed: bool = False
    """The old instance has let go, so that the new one may take over."""
    called: Called = ()
    """What the old instance said then."""

    @property
    def holds(self) -> bool:
        """The present instance, dead or alive, is left as it is: the next one stands ready to take its place."""
        return not self.switched and self.state in (MoveState.HANDING_OVER, MoveState.SWITCHING)


@dataclass(frozen=True, slots=True)
class RequestedPipeline:
    """What was asked for one pipeline."""

    operators: Mapping[str, RequestedOperator]
    move: RequestedMove | None = None
    """One at a time."""
    ended_moves: frozenset[str] = frozenset()
    """Of the orders that are still there, those that nothing more will come of."""
    outcome: Outcome | None = None
    reason: str = ""
    stored: bool = False
    """The outcome is written down. Until then its pods are left as they are: the next master is to see it end, too."""
    drain_until: float | None = None
    """Stopping has begun; the operators behind the source go on until it has drained, or until then."""
    was_running: bool = False
    """All operators have been ready at the same time once."""
    forgetting: bool = False
    """Nothing of it runs any more, and what is left is being deleted."""

    @property
    def pods(self) -> list[str]:
        """All pods that were asked for and aren't known to have ended."""
        second = [] if self.move is None else [self.move.second]
        return [op.pod for op in (*self.operators.values(), *second) if op.pod is not None]


@dataclass(frozen=True, slots=True)
class Requested:
    """All that was asked for."""

    pipelines: Mapping[str, RequestedPipeline] = field(default_factory=dict)
    strays: Mapping[str, float] = field(default_factory=dict)
    """Pods that run and that nobody wants -> until when the runtime was asked to end them."""

    def operator_of(self, pod: str) -> tuple[str, str] | None:
        """Pipeline and operator that `pod` is a pod of, the present one or the other one of a move."""
        pipeline, _, rest = pod.partition(".")
        found = self.pipelines.get(pipeline)
        return (pipeline, rest.rpartition("-e")[0]) if found is not None and pod in found.pods else None

    @property
    def pods(self) -> set[str]:
        """All pods that were asked for."""
        return {pod for pipeline in self.pipelines.values() for pod in pipeline.pods}


@dataclass(slots=True)
class PodState:
    """What is seen of one pod."""

    runtime: ObservedPod | None = None
    """What the runtime sees; None before it has said anything."""
    start_error: str | None = None
    """The runtime couldn't start it."""
    connection: int | None = None
    """The number of its present control connection."""
    assigned: bool = False
    """It has said that it has its assignment."""
    ready_at: float | None = None
    """When it was first seen ready by this master."""
    address: str | None = None
    """Where it accepts data links, once it is ready."""
    pid: int | None = None
    heartbeat_at: float | None = None
    stats: PodStats = field(default_factory=PodStats)
    links: list[DataLinkView] = field(default_factory=list)
    """What the stats say of its links."""
    rate: float | None = None
    """Messages processed per second, smoothed over the last heart-beats."""
    finished: bool = False
    says_leaving: bool = False
    error: dict[str, str] | None = None
    """type, message and traceback of what it reported last."""
    fatal: bool = False
    """The error ends the pipeline."""
    role: str = ""
    """What it says of itself: one of `control.Role`."""
    ends: dict[tuple[str, str], LinkStatus] = field(default_factory=dict)
    """Link and direction -> whom it is connected to."""
    called: Called = ()
    """How far a last operator has come that has halted."""
    carried: bool = False
    """It has what its predecessor had set aside."""
    carry_error: str = ""
    """Why it hasn't."""
    switched: bool = False
    """It is written down that this is its operator's present pod, after a move."""
    switch_error: str = ""
    """Why that couldn't be written down."""

    @property
    def leaving(self) -> bool:
        """Somebody else than the master wants it to end; it goes on for a while, so that another can take over."""
        return self.says_leaving or (self.runtime is not None and self.runtime.leaving)

    @property
    def exited(self) -> bool:
        """Its process is gone."""
        return self.runtime is not None and self.runtime.phase is PodPhase.EXITED

    @property
    def ended(self) -> bool:
        """Nothing more will be seen of it: its process is gone, and all that it said has been heard."""
        return self.start_error is not None or (self.exited and self.connection is None)

    @property
    def exit_code(self) -> int | None:
        return self.runtime.exit_code if self.runtime is not None else None


@dataclass(slots=True)
class History:
    """What is left of an operator's ended pods."""

    totals: PodStats = field(default_factory=PodStats)
    """Their counters, added up; gauges are of the last."""
    failure: FailureView | None = None


@dataclass(slots=True)
class Tally:
    """What is known of the cost of a move."""

    counted: bool = False
    """Both instances have been asked."""
    measured: bool = False
    """So has the last operator; there is nothing more to wait for."""
    pause: float | None = None
    lost: int | None = None
    doubled: int | None = None


@dataclass(frozen=True, slots=True)
class Relay:
    """A relay that links may go through."""

    address: str
    """`tls://` for links that are to be encrypted from end to end."""
    key: bytes = field(repr=False)
    """Its own: what links' keys are made of."""


@dataclass(slots=True)
class Observed:
    """All that is seen."""

    nodes: dict[str, NodeInfo] = field(default_factory=dict)
    node_changes: int = 0
    """How often something about the nodes has changed."""
    pods: dict[str, PodState] = field(default_factory=dict)
    """Present pods, and ended ones until the loop has noticed."""
    history: dict[str, History] = field(default_factory=dict)
    """By operator id."""
    tallies: dict[str, Tally] = field(default_factory=dict)
    """By move, until it has ended."""
    homeless: dict[str, str] = field(default_factory=dict)
    """Operator id -> why there is no other node for it."""
    over: set[str] = field(default_factory=set)
    """Pipelines of which it is written down how they ended."""
    relay: Relay | None = None
    """Where links go through whose ends are both on nodes that can't be dialled."""
    folders_follow: bool = True
    """An operator has the same folder wherever it is."""

    def usable(self, node: str) -> bool:
        """Whether pods can run there."""
        return node in self.nodes and self.nodes[node].ready

    def open(self, node: str) -> bool:
        """Whether new pods may be started there."""
        return self.usable(node) and self.nodes[node].schedulable


def operator_id(pipeline: str, operator: str) -> str:
    """How an operator is called in the cluster."""
    return f"{pipeline}.{operator}"


def pod_id(pipeline: str, operator: str, epoch: int) -> str:
    """How a pod is called; unique for ever, as epochs are."""
    return f"{pipeline}.{operator}-e{epoch}"


def pipeline_of(pod: str) -> str:
    """The pipeline that a pod of that name is of."""
    return pod.partition(".")[0]


def link_id(pipeline: str, source: str, target: str) -> str:
    """How a data link is called."""
    return f"{pipeline}:{source}>{target}"
