"""What the REST interface takes, with its bounds, and what it gives beside the master's own `views`.

Used by `api`, whose handlers name these types; their docstrings are descriptions in /openapi.json. Nothing is done
here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.types import JsonValue

from nomad.pipeline import PIPELINE_ID, check_id
from nomad.units import LEAST_BANDWIDTH, LONGEST_DELAY, MOST_BANDWIDTH

Seconds = Annotated[float, Field(ge=0, le=LONGEST_DELAY, allow_inf_nan=False)]
BytesPerSecond = Annotated[float, Field(ge=LEAST_BANDWIDTH, le=MOST_BANDWIDTH, allow_inf_nan=False)]
# Bounds that no real node or operator comes near, either.
Speed = Annotated[float, Field(ge=1e-3, le=1e6, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)]
EventId = Annotated[int, Field(ge=0, le=2**53)]
PipelineId = Annotated[str, AfterValidator(check_id), Field(json_schema_extra={"pattern": f"^{PIPELINE_ID.pattern}$"})]
MessageId = Annotated[str, Field(pattern=r"^[0-9]{1,19}$")]
Operator = Annotated[str, Field(description="Name of the operator.")]
Pin = Annotated[str, Field(pattern=r"^[^=]+=.+$", description="OPERATOR=NODE")]


class _Input(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class NodeChange(_Input):
    """What of a node can be changed."""

    speed: Speed
    """Reference-seconds of work per second and core; below 1 the node is emulated as slower."""


class LinkChange(_Input):
    """What of a link can be changed; what isn't named stays as it is."""

    latency: Seconds | None = None
    """Seconds, one way."""
    jitter: Seconds | None = None
    """Seconds, uniform around the latency, and not more than it."""
    bandwidth: BytesPerSecond | Literal["unlimited"] | None = None
    """Bytes per second."""
    loss: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Probability that a frame is lost and sent again."""


class PipelineChange(_Input):
    """What of a pipeline can be changed; what isn't named stays as it is."""

    moves: bool | None = None
    """Whether Nomad moves its operators by itself when that pays."""
    pins: dict[str, Annotated[str, Field(min_length=1)] | None] | None = None
    """Operator to the node that it is bound to, which must be the one that it is on; null unbinds it."""


class MoveForm(_Input):
    """Which operator is to move, and where to; without a node a new instance takes its place where it is."""

    operator: Annotated[str, Field(min_length=1)]
    """Its name."""
    node: Annotated[str, Field(min_length=1)] | None = None


class ProfileEntry(_Input):
    """What is expected of one operator."""

    cloud_execution_time: Amount | None = None
    """Seconds per message on a node of speed 1."""
    output_msg_size: Amount | None = None
    """Bytes per message sent on."""


class Chosen(_Input):
    """Which set-aside messages; without ids, all of them."""

    ids: list[MessageId] | None = None


@dataclass(frozen=True, slots=True)
class Health:
    """The master answers."""

    status: Literal["ok"] = "ok"


@dataclass(frozen=True, slots=True)
class ValueView:
    """A message, to look at and to decode."""

    value: JsonValue
    """As JSON can show it: arrays are described ($ndarray), bytes are $bytes, pickles only $pickle (their size)."""
    data: str
    """The message as the codec encoded it, in base64."""


@dataclass(frozen=True, slots=True)
class OutputView:
    """One live output."""

    value: JsonValue
    """As JSON can show it."""
    data: str
    """The message as the codec encoded it, in base64."""
    skipped: int
    """How many outputs before this one were left out because the reader was slow."""


@dataclass(frozen=True, slots=True)
class SetAsideMessage:
    """A message whose function raised."""

    id: str
    time: float
    """Seconds since the epoch."""
    error: dict[str, str]
    """type, message, traceback."""
    attempts: int
    value: JsonValue
    """As JSON can show it."""
    data: str
    """The message as the codec encoded it, in base64."""


@dataclass(frozen=True, slots=True)
class Rerun:
    """What became of messages that were run again."""

    ran: int
    failed: int
    """Of those, how many raised again; they stay set aside."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """How many messages are gone."""

    dropped: int


@dataclass(frozen=True, slots=True)
class PipelinePlan:
    """What becomes of one of several pipelines."""

    placement: dict[str, str]
    """Operator to node."""
    latency: float
    """Seconds."""


@dataclass(frozen=True, slots=True)
class PlanView:
    """The answer to a placement problem."""

    feasible: bool
    placement: dict[str, str]
    """Operator to node; empty if there is no placement."""
    latency: float | None
    """Seconds, predicted: the latest finish; of several pipelines, the sum."""
    reasons: dict[str, JsonValue]
    """By operator: its terms, the runner-up and why that lost; or the constraint that can't be met."""
    proven: bool
    """Nothing is better; or it is certain that there is no placement."""
    pipelines: dict[str, PipelinePlan] | None = None
    """By pipeline, where the problem has several."""
