"""The scenario of a benchmark: topology, pipeline, timeline and policies, as a YAML file.

    topology:                                   # inline, or the name of a topology file
      nodes: {edge: {speed: 0.25}, fog: {speed: 0.5}, cloud: {}}
      links: [{from: edge, to: cloud, latency: 20ms, bandwidth: 100Mbit}]
    pipeline:                                   # synthetic as here, or `program: FILE[:NAME]`
      start: edge
      end: cloud
      rate: 200                                 # messages per second
      message_bytes: 1024
      operators: [{name: work, work: 2ms, output_bytes: 1024}]
    duration: 60s
    policies: [all-edge, all-cloud, static-best, nomad]
    events:
      - {at: 20s, link: edge->cloud, latency: 100ms}

docs/bench.md has all keys. `load` reads a file, the runner does what it says. Files that a scenario names are looked
for beside it. Every problem is a `ScenarioError` with file, line and the way out; the topology's are `TopologyError`s.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import ErrorDetails

from nomad import topology as topologies
from nomad import units, yamlfile
from nomad.bench.synthetic import HEADER, SINK, SOURCE
from nomad.errors import ScenarioError
from nomad.pipeline import check_id
from nomad.topology import Topology
from nomad.yamlfile import Document, Place

LEAST_MESSAGE = HEADER.size

_Positive = Field(gt=0, allow_inf_nan=False)
_NotNegative = Field(ge=0, allow_inf_nan=False)
Seconds = Annotated[float, BeforeValidator(units.seconds), _NotNegative]
Duration = Annotated[float, BeforeValidator(units.seconds), _Positive]
Rate = Annotated[float, _Positive]
Bytes = Annotated[
    int, BeforeValidator(lambda value: round(units.memory_mb(value) * 2**20) if isinstance(value, str) else value)
]
Name = Annotated[str, AfterValidator(check_id)]


def _bandwidth(value: object) -> float:
    return math.inf if value == "unlimited" else units.bytes_per_second(value)


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class OperatorForm(_Form):
    """An operator of a synthetic pipeline, between its source and its sink."""

    name: Name
    work: Seconds = 0.0
    """Reference-seconds per message; it sleeps them, so that many operators fit on a small machine."""
    output_bytes: Annotated[Bytes, Field(ge=LEAST_MESSAGE)] = 1024
    memory: Annotated[float, BeforeValidator(units.memory_mb), _Positive] | None = None
    pin: str | None = None
    """Under every policy, this node."""


class PipelineForm(_Form):
    """A program's pipeline, or a synthetic one; never both."""

    program: str | None = None
    """`FILE` or `FILE:NAME`, as for `nomad submit`."""
    environment: dict[str, str] = {}
    """Variables that are set while the program's file is loaded."""
    operators: tuple[OperatorForm, ...] = ()
    rate: Rate | None = None
    """Messages per second of the source; of a program, what its source gives: the best placement depends on it."""
    message_bytes: Annotated[Bytes, Field(ge=LEAST_MESSAGE)] = 1024
    arrivals: Literal["even", "random"] = "even"
    """Whether a synthetic source sends evenly or at random, as the run's seed has it (a Poisson process)."""
    profiled: bool = True
    """Whether Nomad is told of the synthetic operators' work and output, or has to find out."""
    start: str | None = None
    end: str | None = None
    profile: tuple[dict[str, Annotated[float, _NotNegative]], ...] = ()
    """Of a program's operators in order, instead of the one in its file."""
    window_bytes: Annotated[Bytes, Field(ge=1024)] | None = None
    """Credits of each data link, in bytes, where the usual ones aren't wanted."""
    window_messages: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.program is None) == (not self.operators):
            raise ValueError("give either `program: FILE` or `operators: [...]`")
        if self.program is not None and (wrong := self.model_fields_set & {"message_bytes", "arrivals", "profiled"}):
            raise ValueError(f"{sorted(wrong)[0]!r} is for synthetic pipelines; a program has a source of its own")
        if self.program is None and (wrong := self.model_fields_set & {"environment", "profile"}):
            raise ValueError(f"{sorted(wrong)[0]!r} is for programs")
        if self.program is None and (missing := [k for k in ("start", "end", "rate") if getattr(self, k) is None]):
            raise ValueError(f"say where it starts and ends, and how fast its source is: {missing[0]!r} is missing")
        names = [SOURCE, *(op.name for op in self.operators), SINK]
        if len(set(names)) < len(names):
            raise ValueError(f"every operator needs a name of its own, and {SOURCE!r} and {SINK!r} are taken")
        return self


class _Event(_Form):
    at: Seconds
    """After the first message has arrived at the end of the pipeline."""


class LinkEvent(_Event):
    """A link changes: at once, evenly over a while, or back and forth. What isn't given stays."""

    link: Annotated[str, Field(pattern=r"^\s*\S+\s*->\s*\S+\s*$")]
    latency: Seconds | None = None
    jitter: Seconds | None = None
    bandwidth: Annotated[float, BeforeValidator(_bandwidth), Field(gt=0)] | None = None
    """Infinite: unlimited."""
    loss: Annotated[float, Field(ge=0, lt=1)] | None = None
    both: bool = True
    over: Duration | None = None
    """A ramp: latency and bandwidth get there evenly in this time."""
    swing: Duration | None = None
    """An oscillation: the latency goes up and down by this much around its mean, as a sine."""
    period: Duration | None = None
    until: Duration | None = None
    """When the oscillation ends; at the end of the run if not given."""

    @property
    def ends(self) -> tuple[str, str]:
        """The nodes."""
        source, _, target = self.link.partition("->")
        return source.strip(), target.strip()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        changed = [self.latency, self.jitter, self.bandwidth, self.loss]
        if self.swing is None and all(value is None for value in changed):
            raise ValueError("say what changes: latency, jitter, bandwidth, loss or swing")
        if (self.swing is None) != (self.period is None):
            raise ValueError("`swing` and `period` belong together")
        if self.swing is not None and self.over is not None:
            raise ValueError("a link either gets somewhere (`over`) or goes back and forth (`swing`)")
        if self.until is not None and (self.swing is None or self.until <= self.at):
            raise ValueError("`until` is when a `swing` ends, after `at`")
        return self


class NodeEvent(_Event):
    """A node becomes slower or faster, is lost, or comes back."""

    node: str
    speed: Rate | None = None
    lost: bool | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.speed is None) == (self.lost is None):
            raise ValueError("say what happens to the node: `speed: 0.5`, `lost: true` or `lost: false`")
        return self


class RateEvent(_Event):
    """The synthetic source becomes faster or slower."""

    rate: Rate


class WorkEvent(_Event):
    """A synthetic operator takes longer, or less long, per message."""

    operator: str
    work: Seconds


class MoveEvent(_Event):
    """An operator is moved, as by `nomad move`, to these nodes in turn."""

    move: str
    to: Annotated[tuple[str, ...], Field(min_length=1)]
    every: Seconds = 0.0
    """Seconds from one move's beginning to the next; a move is always waited for."""
    times: Annotated[int, Field(ge=1)] = 1


_EVENTS: dict[str, type[_Event]] = {
    "link": LinkEvent,
    "node": NodeEvent,
    "rate": RateEvent,
    "operator": WorkEvent,
    "move": MoveEvent,
}


def _event_kind(value: Any) -> str | None:
    if isinstance(value, _Event):
        return next(name for name, form in _EVENTS.items() if isinstance(value, form))
    return next((name for name in _EVENTS if name in value), None) if isinstance(value, dict) else None


Event = Annotated[
    Annotated[LinkEvent, Tag("link")]
    | Annotated[NodeEvent, Tag("node")]
    | Annotated[RateEvent, Tag("rate")]
    | Annotated[WorkEvent, Tag("operator")]
    | Annotated[MoveEvent, Tag("move")],
    Discriminator(_event_kind, custom_error_type="event_kind", custom_error_message="must say what it is about"),
]

POLICIES = ("all-edge", "all-cloud", "static-best", "static-best-after", "nomad")
"""Policies that a scenario may name without saying what they are."""


class PolicyForm(_Form):
    """A policy of the scenario's own."""

    name: Name
    pins: dict[str, str] = {}
    """Operator -> node."""
    moves: bool = False
    """Whether Nomad may move what isn't pinned."""


def _policy(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value not in POLICIES:
        raise ValueError(
            f"{value!r} is no policy; {yamlfile.suggestion(value, POLICIES, 'known')}. "
            "One of your own is a map: {name: fog, pins: {detect: fog}}"
        )
    return {"name": value, "moves": value == "nomad"}


class ScenarioForm(_Form):
    """A scenario file."""

    name: Name | None = None
    about: str = ""
    topology: dict[str, Any] | str
    pipeline: PipelineForm
    duration: Duration
    ends_with_moves: bool = False
    """The run is over `settle` seconds after its last planned move, if that is sooner than `duration`."""
    settle: Seconds = 5.0
    """What is left out of the figures at the beginning and after each event."""
    policies: Annotated[tuple[Annotated[PolicyForm, BeforeValidator(_policy)], ...], Field(min_length=1)] = (
        PolicyForm(name="nomad", moves=True),
    )
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (1,)
    repeats: Annotated[int, Field(ge=1)] = 1
    events: tuple[Event, ...] = ()


@dataclass(frozen=True, slots=True)
class Scenario:
    """A scenario that can be run."""

    name: str
    form: ScenarioForm
    topology: Topology
    folder: Path
    """Where the files are that it names."""
    sha256: str
    """Of the file's text."""

    @property
    def operators(self) -> tuple[str, ...]:
        """Names from source to sink of a synthetic pipeline; of a program they are known once it is loaded."""
        return (SOURCE, *(op.name for op in self.form.pipeline.operators), SINK) if self.synthetic else ()

    @property
    def synthetic(self) -> bool:
        """Whether the harness makes the pipeline."""
        return self.form.pipeline.program is None

    @property
    def program(self) -> str:
        """`FILE` or `FILE:NAME`, from where the scenario is."""
        return str(self.folder / (self.form.pipeline.program or ""))


def load(path: str | Path) -> Scenario:
    """Read a scenario file. Raises `ScenarioError`, and `TopologyError` for its topology."""
    text = yamlfile.read(path, "scenario", ScenarioError)
    return parse(text, source=str(path), folder=Path(path).resolve().parent)


def parse(text: str, *, source: str = "scenario", folder: Path | None = None) -> Scenario:
    """A scenario from YAML text. Raises as `load` does."""
    folder = folder or Path.cwd()
    document = yamlfile.parse(text, source, ScenarioError)
    if not isinstance(document.data, dict):
        raise ScenarioError(f"{source} must be a map with topology, pipeline and duration")
    form = yamlfile.validate(document, ScenarioForm, ScenarioError, known=_known, words=_words, place=_place)
    topology = (
        topologies.load(folder / form.topology)
        if isinstance(form.topology, str)
        else topologies.read(document.part("topology"))
    )
    scenario = Scenario(
        name=form.name or Path(source).stem,
        form=form,
        topology=topology,
        folder=folder,
        sha256=hashlib.sha256(text.encode()).hexdigest(),
    )
    _check(scenario, document)
    return scenario


def check_operators(scenario: Scenario, names: Iterable[str]) -> None:
    """Events and pins name operators that there are: of a program, once it is loaded. Raises `ScenarioError`."""
    known = list(names)
    for what, name in _named_operators(scenario.form):
        if name not in known:
            hint = yamlfile.suggestion(name, known, "operators")
            raise ScenarioError(f"{scenario.name}: {what} {name!r}, which is no operator of the pipeline; {hint}")


def _named_operators(form: ScenarioForm) -> Iterable[tuple[str, str]]:
    for event in form.events:
        if isinstance(event, MoveEvent):
            yield "an event moves", event.move
        elif isinstance(event, WorkEvent):
            yield "an event changes the work of", event.operator
    for policy in form.policies:
        for operator in policy.pins:
            yield f"the policy {policy.name} pins", operator


def _check(scenario: Scenario, document: Document) -> None:
    """Names that a model can't check: of nodes and operators."""
    form = scenario.form
    nodes = [node.id for node in scenario.topology.nodes]

    def check_node(name: str | None, *place: int | str) -> None:
        if name is not None and name not in nodes:
            hint = yamlfile.suggestion(name, nodes, "known nodes")
            raise ScenarioError(f"{document.where(place)}: {name!r} is no node of the topology; {hint}")

    check_node(form.pipeline.start, "pipeline", "start")
    check_node(form.pipeline.end, "pipeline", "end")
    for number, operator in enumerate(form.pipeline.operators):
        check_node(operator.pin, "pipeline", "operators", number, "pin")
    for number, policy in enumerate(form.policies):
        for operator_name, node in policy.pins.items():
            check_node(node, "policies", number, "pins", operator_name)
    names = [policy.name for policy in form.policies]
    if repeated := [name for number, name in enumerate(names) if name in names[:number]]:
        raise ScenarioError(f"{document.where(['policies'])}: {repeated[0]!r} stands there twice")
    for number, event in enumerate(form.events):
        where = document.where(["events", number])
        if event.at >= form.duration:
            raise ScenarioError(f"{where}: {event.at:g} s is not before the end, {form.duration:g} s")
        match event:
            case LinkEvent():
                for end in event.ends:
                    check_node(end, "events", number, "link")
                if event.ends[0] == event.ends[1]:
                    raise ScenarioError(f"{where}: a link leads from one node to another")
            case NodeEvent():
                check_node(event.node, "events", number, "node")
            case MoveEvent():
                for node in event.to:
                    check_node(node, "events", number, "to")
            case RateEvent() | WorkEvent() if not scenario.synthetic:
                raise ScenarioError(
                    f"{where}: a program's load and work are its own; only a synthetic pipeline's change"
                )
    if scenario.synthetic:
        check_operators(scenario, scenario.operators)
        for event in form.events:
            if isinstance(event, WorkEvent) and event.operator in (SOURCE, SINK):
                raise ScenarioError(f"{scenario.name}: {event.operator!r} has no work that could change")


def _place(place: Place) -> Place:
    """Without the kind of an event and of a topology, which the file doesn't have."""
    found = list(place)
    if len(found) > 2 and found[0] == "events" and found[2] in _EVENTS:
        del found[2]
    return found[:1] if found[:1] == ["topology"] else found


def _words(item: ErrorDetails, place: Place) -> str | None:
    match item["type"]:
        case "event_kind":
            return f"says nothing that happens; name one of {', '.join(_EVENTS)} in it"
        case "string_pattern_mismatch":
            return f"{item['input']!r} is no link; write it as edge->cloud"
        case "too_short":
            return "must not be empty"
        case _ if place == ["topology"]:
            return "must be a map with nodes and links, or the name of a topology file"
        case _:
            return None


def _known(place: Place) -> list[str]:
    """The keys of the map at `place`."""
    match list(place):
        case []:
            return yamlfile.keys(ScenarioForm)
        case ["pipeline"]:
            return yamlfile.keys(PipelineForm)
        case ["pipeline", "operators", _]:
            return yamlfile.keys(OperatorForm)
        case ["policies", _]:
            return yamlfile.keys(PolicyForm)
        case ["events", *_]:
            return sorted({key for form in _EVENTS.values() for key in yamlfile.keys(form)})
        case _:
            return ["cloud_execution_time", "output_msg_size"]
