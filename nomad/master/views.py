"""What the master shows: frozen plain data, and nothing that changes under the reader's hands.

`app.Master` builds these from its state, `rest.api` serialises them as they are (they are the response types
of the OpenAPI document), the client reads the same JSON. They hold no behaviour and import no room of
the master. Times are seconds since the epoch, durations seconds, sizes bytes unless named `_mb`;
None is unknown or not applicable.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple


class Phase(StrEnum):
    """Where a pipeline stands."""

    PENDING = "pending"
    """Accepted, no pod asked for yet."""
    STARTING = "starting"
    """Pods are asked for and not all of them have been ready yet."""
    RUNNING = "running"
    DEGRADED = "degraded"
    """It ran, and an operator is being restarted."""
    COMPLETED = "completed"
    """A finite source ended and everything that came of it is settled."""
    FAILED = "failed"
    STOPPING = "stopping"
    STOPPED = "stopped"

    @property
    def final(self) -> bool:
        """Nothing will run any more."""
        return self in (Phase.COMPLETED, Phase.FAILED, Phase.STOPPED)


class OperatorState(StrEnum):
    """Where an operator's current instance stands."""

    PENDING = "pending"
    """No pod asked for yet."""
    STARTING = "starting"
    """Its pod is asked for, and not ready yet."""
    RUNNING = "running"
    UNRESPONSIVE = "unresponsive"
    """Its process lives, and its heart-beats are overdue. It isn't restarted for that."""
    RESTARTING = "restarting"
    """Its pod ended; the next one follows after a pause."""
    FINISHED = "finished"
    """A source that ended, with all of it settled."""
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"


class MoveState(StrEnum):
    """Where a move stands; `nomad.master.reconcile.migration` says what leads from one to the next."""

    PLANNED = "planned"
    """Ordered, and not begun."""
    STARTING = "starting"
    """The new instance is being started on the target, beside the old one."""
    CONNECTING = "connecting"
    """The neighbours shake hands with the new instance."""
    CARRYING = "carrying"
    """What the old instance has set aside is copied to the new one, where their folders aren't the same."""
    HANDING_OVER = "handing_over"
    """The old instance lets go of what it had set aside, the new one takes it over. A last operator ends calling, a
    source ends making messages."""
    SWITCHING = "switching"
    """The new instance is the one, which is stored first; its neighbours turn to it. There is no way back."""
    STOPPING = "stopping"
    """The old instance is ended, and what the move cost is counted."""
    DONE = "done"
    ROLLED_BACK = "rolled_back"
    """The old instance went on as if nothing had happened."""
    FAILED = "failed"
    """It was never begun."""

    @property
    def final(self) -> bool:
        """Nothing more will come of it."""
        return self in (MoveState.DONE, MoveState.ROLLED_BACK, MoveState.FAILED)


@dataclass(frozen=True, slots=True)
class MovePhase:
    """One state that a move went through."""

    name: str
    seconds: float


@dataclass(frozen=True, slots=True)
class MoveView:
    """One live move of one operator: why, how it went, and what it cost."""

    id: str
    pipeline: str
    operator: str
    source: str
    """The node that it moves from."""
    target: str
    """The same as `source` where a new instance takes the old one's place."""
    cause: str
    """"user", "drift", "settled" (the estimates have settled), "node-lost", "drain" (its pod is to end, and its node
    takes no new ones), "replace" (its pod is to end) or "upgrade" (its pod is out of date)."""
    reason: str
    state: MoveState
    asked: float
    """When it was ordered, seconds since the epoch."""
    started: float | None = None
    """When it was begun."""
    finished: float | None = None
    phases: list[MovePhase] = field(default_factory=list)
    """In order; the last one is complete once the move is."""
    predicted_latency_before: float | None = None
    """Seconds per message, as the cost model had it when the move was ordered."""
    predicted_latency_after: float | None = None
    predicted_gain: float | None = None
    """Seconds per message."""
    pause: float | None = None
    """Seconds by which the longest gap between arrivals at the last operator exceeded the usual one; None: unknown."""
    lost: int | None = None
    """Messages that neither instance was sent; counted, None where nobody could be asked."""
    doubled: int | None = None
    """Messages that the last operator's function was called with twice or out of order; counted."""
    epoch: int = 0
    """Of the new instance; 0 before there is one."""
    error: str = ""
    """Why it was rolled back or failed."""


@dataclass(frozen=True, slots=True)
class EstimateView:
    """What is believed of a quantity, in its own unit."""

    value: float
    deviation: float
    """Smoothed absolute difference between the samples and the value."""
    age: float
    """Seconds since the last sample."""
    samples: int
    """Measured; 0: only declared, or profiled."""
    settled: bool
    """Enough samples, and close together."""


@dataclass(frozen=True, slots=True)
class NodeEstimatesView:
    """What is measured of a node; docs/measure.md says how."""

    speed: EstimateView | None = None
    """Reference-seconds of work per second and core."""
    cores_free: EstimateView | None = None
    memory_free_mb: EstimateView | None = None


@dataclass(frozen=True, slots=True)
class LinkEstimatesView:
    """What is measured of the way from one node to another."""

    latency: EstimateView | None = None
    """Seconds one way: half of the round trip."""
    bandwidth: EstimateView | None = None
    """Bytes per second, from transfers that filled the link."""
    reached: float | None = None
    """Bytes per second that it carried lately without being filled: a lower bound."""
    derived: bool = False
    """The latency is predicted from other links by network coordinates."""


@dataclass(frozen=True, slots=True)
class OperatorEstimatesView:
    """What is measured of an operator, wherever it runs."""

    work: EstimateView | None = None
    """Reference-seconds per message: seconds on the node where it runs, times the node's measured speed."""
    service: EstimateView | None = None
    """Seconds per message on the node where it runs."""
    output_bytes: EstimateView | None = None
    """Encoded bytes per message sent on."""
    selectivity: EstimateView | None = None
    """Messages sent on per message worked off."""
    arrival: EstimateView | None = None
    """Messages received per second."""
    departure: EstimateView | None = None
    """Messages worked off per second; of a source, made."""
    queue: EstimateView | None = None
    """Messages received and not yet worked off."""
    queue_bytes: EstimateView | None = None
    busy: EstimateView | None = None
    """Share of the time that its function runs."""
    settled: bool = False
    """What a placement depends on is measured and steady."""


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node and what is placed on it."""

    id: str
    speed: float
    """Reference-seconds of work per second and core."""
    cores: float
    memory_mb: float
    memory_used_mb: float
    """What the operators placed here ask for."""
    arch: str
    labels: list[str]
    python: str
    operators: list[str]
    """Operator ids, `pipeline.name`."""
    ready: bool = True
    """Pods can be started there; False while the node is lost."""
    devices: dict[str, int] = field(default_factory=dict)
    """Name of a device -> how many of it operators there can have."""
    schedulable: bool = True
    """Operators may be placed there; a node that is cordoned keeps those that it has."""
    reachable: bool = True
    """Pods elsewhere can dial those there; behind NAT they can't."""
    estimates: NodeEstimatesView = field(default_factory=NodeEstimatesView)


@dataclass(frozen=True, slots=True)
class LinkView:
    """A directed link between two nodes: what is declared of it, and what its data links measure."""

    source: str
    target: str
    latency: float
    """One way."""
    jitter: float
    bandwidth: float | None
    """Bytes per second; None is unlimited."""
    loss: float
    rtt: float | None = None
    """Least of the round trips that data links over it measure now."""
    estimates: LinkEstimatesView = field(default_factory=LinkEstimatesView)


@dataclass(frozen=True, slots=True)
class DataLinkView:
    """One end of a data link, as its pod sees it."""

    link: str
    """`pipeline:from>to`."""
    direction: str
    """"in" or "out"."""
    state: str = ""
    """"open": messages flow. "waiting": the sender is connected and has nothing to send yet, as after a move while
    nothing flows. The others are those of docs/delivery.md.
    """
    connected: bool = False
    peer_epoch: int = 0
    """Of the instance at the other end that was heard last."""
    rtt: float | None = None
    """Newest round trip."""
    rtt_least: float | None = None
    """Least round trip since the last heart-beat, of what didn't wait behind anything; only of "out", as the next."""
    bandwidth: float | None = None
    """Bytes per second of what filled the link since the last heart-beat."""
    reached: float | None = None
    """Bytes per second that got through since the last heart-beat: a lower bound."""
    unsettled_messages: int = 0
    """Sent and not acknowledged ("out"), or received and not settled ("in")."""
    unsettled_bytes: int = 0


@dataclass(frozen=True, slots=True)
class StatsView:
    """An operator's counters, added up over its processes, and gauges of the present one."""

    received: int = 0
    processed: int = 0
    emitted: int = 0
    failed: int = 0
    set_aside: int = 0
    """Messages now set aside (a gauge)."""
    retried: int = 0
    queue_messages: int = 0
    queue_bytes: int = 0
    unacked_messages: int = 0
    unacked_bytes: int = 0
    duplicates: int = 0
    fenced: int = 0
    reconnects: int = 0
    service_time: float | None = None
    output_bytes: float | None = None
    busy: float | None = None
    latency_p50: float | None = None
    latency_p99: float | None = None
    mode: str = ""
    paused: bool = False
    rss: int = 0
    cpu: float = 0.0
    rate: float | None = None
    """Messages processed per second over the last heart-beats."""
    links: list[DataLinkView] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class FailureView:
    """The last thing that went wrong with an operator."""

    time: float
    message: str
    """One sentence: the exception, or how the process ended."""
    type: str = ""
    """Name of the exception, "" when the process just ended."""
    traceback: str = ""
    exit_code: int | None = None
    """Negative: killed by that signal."""
    log: list[str] = field(default_factory=list)
    """The last lines that the pod printed, 20 at most."""

    def __str__(self) -> str:
        """In a sentence: a bare message, like the `0` of a `KeyError: 0`, says too little."""
        return f"{self.type}: {self.message}" if self.type else self.message


@dataclass(frozen=True, slots=True)
class PlacementView:
    """Why an operator lives where it lives."""

    node: str
    summary: str
    """One sentence."""
    cost: dict[str, float] = field(default_factory=dict)
    """The terms of its cost, by name."""
    runner_up: str | None = None
    """The node that came second."""
    why_not: str = ""
    """Why the second lost."""


@dataclass(frozen=True, slots=True)
class OperatorView:
    """One operator of a pipeline."""

    id: str
    """`pipeline.name`."""
    name: str
    kind: str
    node: str
    state: OperatorState
    pod: str
    """Id of the present or last pod; "" before the first."""
    pid: int | None
    epoch: int
    restarts: int
    heartbeat_age: float | None
    """Seconds since the last heart-beat of the present pod."""
    stats: StatsView
    last_failure: FailureView | None
    placement: PlacementView
    reason: str = ""
    """Why it is in this state, where that isn't plain."""
    moving_to: str | None = None
    """The node that it is being moved to now."""
    pin: str | None = None
    """The node that it is bound to."""
    image: str = ""
    """The container image that it asks for; "" is the cluster's own."""
    requirements: list[str] = field(default_factory=list)
    """Packages that are installed for it."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of its process."""
    secrets: dict[str, str] = field(default_factory=dict)
    """Variable -> `name/key` of the secret that it gets its value from."""
    devices: dict[str, int] = field(default_factory=dict)
    """Name of a device -> how many of it its node must have for it."""
    estimates: OperatorEstimatesView = field(default_factory=OperatorEstimatesView)


@dataclass(frozen=True, slots=True)
class PipelineView:
    """A pipeline and all of its operators, in topological order."""

    id: str
    phase: Phase
    reason: str
    """Why it is in this phase, where that isn't plain."""
    created: float
    start: str
    end: str
    codec: str
    operators: list[OperatorView]
    edges: list[tuple[str, str]]
    profile: list[dict[str, float]]
    warnings: list[str]
    """What the environment check found and let pass (other package versions)."""
    moves: bool = True
    """Whether Nomad moves its operators by itself when that pays."""


@dataclass(frozen=True, slots=True)
class EventView:
    """Something that happened. Ids grow; `cause_id` is the event that led to this one."""

    id: int
    time: float
    kind: str
    """Like `pipeline.submitted`, `operator.restarting`, `link.changed`."""
    message: str
    pipeline: str | None = None
    operator: str | None = None
    cause_id: int | None = None
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ExplainedOperatorView:
    """Why an operator is where it is, by what is known now. Predictions are of the model in docs/placement.md."""

    name: str
    node: str
    pinned: bool
    terms: dict[str, float]
    """Seconds: input, transfer, processing and queueing, which add up to `finish`; empty where the placement isn't
    possible as it is."""
    waits_for: str | None
    """The operator whose output comes last."""
    finish: float | None
    """Predicted seconds from the source to its end."""
    measured: float | None
    """The same as measured: the median of recent messages."""
    runner_up: str | None
    """The best node that it could be moved to alone."""
    runner_up_latency: float | None
    """Predicted latency of the pipeline with it there."""
    why_not: str
    """Why the runner-up lost."""
    decided: str
    """Why it was placed there, as it was seen then."""


@dataclass(frozen=True, slots=True)
class ConsideredView:
    """What came of the last look at a pipeline's placement."""

    time: float
    cause: str
    """Why it was looked at: "settled", "change", "overload", "node-new" or "interval"."""
    text: str
    """What was decided, and why; or why nothing is moved."""
    latency: float | None
    """Predicted then, in seconds."""
    queueing: float
    """Seconds that a message waited in queues that grow, as predicted then."""
    move: str | None
    """Which operator was to go where; None: nothing was moved."""


@dataclass(frozen=True, slots=True)
class BundleView:
    """A pipeline's code, as it was submitted."""

    digest: str
    """SHA-256 of its manifest, in hex."""
    data: str
    """The signed bundle, in base64: what `POST /pipelines` takes."""


@dataclass(frozen=True, slots=True)
class ExplainView:
    """Why a pipeline is placed as it is, by what is known now."""

    pipeline: str
    rate: float
    """Messages per second of its source that are counted on."""
    sustained: float
    """Share of that rate that the placement keeps up with, by the model; 1 is all of it."""
    predicted: float | None
    """Latency in seconds; None: not possible as it is."""
    measured: float | None
    """The median at the last operator."""
    operators: list[ExplainedOperatorView]
    considered: ConsideredView | None
    """None before the first look."""
    moves: bool
    """Whether Nomad moves its operators by itself."""
    moves_left: int
    """Moves that it may still make within the hour."""


@dataclass(frozen=True, slots=True)
class LatencyView:
    """What the last operator saw of one message."""

    time: float
    """When its function was done with it, in seconds since the epoch."""
    latency: float
    """Seconds since the source had emitted it."""


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line that a pod printed."""

    operator: str
    """Name of the operator."""
    pod: str
    line: str


@dataclass(frozen=True, slots=True)
class SetAsideView:
    """A message whose function raised. `value` is the encoded input."""

    id: str
    time: float
    error: dict[str, str]
    """type, message, traceback."""
    attempts: int
    value: bytes


class TailItem(NamedTuple):
    """One live output, encoded alone by the codec, and how many were skipped just before it."""

    value: bytes
    skipped: int = 0
