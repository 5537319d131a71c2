"""What `reconcile` decides and the loop has carried out: plain data, one class per kind of action.

Made by `reconcile` only. `loop` notes each as an event, `enact` carries it out; some are only to be noted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from nomad.control import LinkPeer
from nomad.master.state import Called, MoveOrder, Outcome
from nomad.master.views import MoveState


@dataclass(frozen=True, slots=True)
class Start:
    """Ask the runtime for a pod."""

    pipeline: str
    operator: str
    pod: str
    epoch: int
    node: str


@dataclass(frozen=True, slots=True)
class Assign:
    """Tell a new pod what it is."""

    pipeline: str
    operator: str
    pod: str
    links: tuple[LinkPeer, ...]
    speed: float
    role: str
    epoch: int
    node: str


@dataclass(frozen=True, slots=True)
class TellPeers:
    """Tell a pod what changed about its links, or about itself."""

    pipeline: str
    operator: str
    pod: str
    links: tuple[LinkPeer, ...]
    speed: float
    role: str
    called: Called = ()
    """What the instance before said, to one that takes over from a last operator."""


@dataclass(frozen=True, slots=True)
class AskStop:
    """Ask a pod, over its control channel, to end."""

    pipeline: str
    operator: str
    pod: str
    drain: bool
    grace: float


@dataclass(frozen=True, slots=True)
class Kill:
    """Ask the runtime to end a pod."""

    pod: str
    grace: float
    reason: str


@dataclass(frozen=True, slots=True)
class Ended:
    """A pod has ended; the next one follows at `retry_at`, or none does."""

    pipeline: str
    operator: str
    pod: str
    retry_at: float | None
    expected: bool
    """It was to end."""
    reason: str = ""
    """What is known of how, beyond what its process left."""


@dataclass(frozen=True, slots=True)
class Ready:
    """A pod is at work."""

    pipeline: str
    operator: str
    pod: str
    adopted: bool


@dataclass(frozen=True, slots=True)
class Hearing:
    """An operator's heart-beats went missing, or came back."""

    pipeline: str
    operator: str
    pod: str
    silent: bool


@dataclass(frozen=True, slots=True)
class Running:
    """All operators of a pipeline are ready for the first time."""

    pipeline: str


@dataclass(frozen=True, slots=True)
class Finish:
    """A pipeline is over."""

    pipeline: str
    outcome: Outcome
    reason: str


@dataclass(frozen=True, slots=True)
class Forget:
    """Delete a pipeline of which nothing runs."""

    pipeline: str


@dataclass(frozen=True, slots=True)
class Moving:
    """A move has come to another state."""

    pipeline: str
    order: MoveOrder
    source: str
    """The node that it moves from."""
    left: MoveState | None
    """None: it has only now been looked at."""
    seconds: float
    """How long it was in that state."""
    state: MoveState
    epoch: int
    """Of the new instance; 0 before there is one."""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Switch:
    """Write down, before anything of it is said, that another pod is the operator's present one."""

    pipeline: str
    operator: str
    pod: str
    order: MoveOrder


@dataclass(frozen=True, slots=True)
class Measure:
    """Ask pods for what a move is measured by."""

    pipeline: str
    move: str
    link: str
    """From the operator before to the one that moves."""
    old: str
    """Pod."""
    new: str
    sink: str
    """The last operator's pod."""
    switching: bool
    """The switch is about to begin; else it has been done."""
    since: float
    """When it began, on the master's clock."""


@dataclass(frozen=True, slots=True)
class Carry:
    """Copy what one instance of an operator has set aside to the next one."""

    pipeline: str
    operator: str
    old: str
    """Pod."""
    new: str


@dataclass(frozen=True, slots=True)
class Relieve:
    """Order a move, because the present pod of an operator is to end or is out of date."""

    pipeline: str
    operator: str
    pod: str
    node: str
    """Where that is."""
    cause: str
    """"replace" and "upgrade": another one is to take its place there; "drain": elsewhere."""
    reason: str
    again: bool
    """It was asked for before."""


@dataclass(frozen=True, slots=True)
class Rehome:
    """Find another node for an operator that can't run on its own."""

    pipeline: str
    operator: str
    node: str
    """The one that won't do."""
    reason: str
    again: bool
    """It was asked for before."""


Action: TypeAlias = (
    Start
    | Assign
    | TellPeers
    | AskStop
    | Kill
    | Ended
    | Ready
    | Hearing
    | Running
    | Finish
    | Forget
    | Moving
    | Switch
    | Measure
    | Carry
    | Relieve
    | Rehome
)
