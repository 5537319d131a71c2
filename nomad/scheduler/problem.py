"""The JSON form of a placement problem: what is valid, and what it means when something is left out.

`planner.plan` and the REST interface read problems with it. Seconds, bytes, bytes per second, MiB. What isn't given
takes the default that stands here; None is "unlimited" for a bandwidth and for a memory. Nothing is placed here.
"""

from __future__ import annotations

import graphlib
import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nomad.errors import PlacementError

Id = Annotated[str, Field(min_length=1, max_length=300)]
# No real cluster comes near these bounds; within them nothing overflows.
Amount = Annotated[float, Field(ge=0, le=1e18)]
Positive = Annotated[float, Field(ge=1e-9, le=1e18)]


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


F = TypeVar("F", bound=_Form)


class NodeForm(_Form):
    """A node that operators can be placed on."""

    id: Id
    speed: Positive = 1.0
    """Reference-seconds of work per second and core."""
    cores: Amount = 1.0
    memory_mb: Amount | None = None
    """None is unlimited."""
    labels: list[str] = []
    arch: str = ""
    used_cpu: Amount = 0.0
    """Reference-seconds per second that are taken already."""
    used_memory_mb: Amount = 0.0


class LinkForm(_Form):
    """A directed link."""

    model_config = ConfigDict(serialize_by_alias=True)

    source: Id = Field(alias="from")
    target: Id = Field(alias="to")
    latency: Amount = 0.0
    """Seconds, one way."""
    bandwidth: Annotated[float, Field(ge=1e-9)] | None = None
    """Bytes per second; None is unlimited."""
    used: Amount = 0.0
    """Bytes per second that are taken already."""


class OperatorForm(_Form):
    """An operator, and what it needs."""

    id: Id
    work: Amount = 0.0
    """Reference-seconds per message."""
    output_bytes: Amount = 0.0
    """Per message sent on."""
    memory_mb: Amount = 0.0
    selectivity: Amount = 1.0
    """Messages sent on per message taken."""
    requires: list[str] = []
    """Labels that its node must have, all of them."""
    pin: Id | None = None
    """The node that it must be on; overrides `requires`."""
    serial: bool = False
    """It takes one message at a time, so that one core must keep up: work x rate <= speed."""


class PipelineForm(_Form):
    """Operators and what flows between them."""

    id: Id = "pipeline"
    rate: Amount = 1.0
    """Messages per second that each source takes."""
    operators: Annotated[list[OperatorForm], Field(min_length=1, max_length=1000)]
    edges: list[Annotated[list[Id], Field(min_length=2, max_length=2)]] = []


class ProblemForm(_Form):
    """A cluster, and one pipeline (`pipeline`) or several (`pipelines`: the sum of their latencies counts)."""

    routing: Literal["direct", "shortest"] = "direct"
    contention: Literal["none", "co-located"] = "none"
    nodes: Annotated[list[NodeForm], Field(min_length=1, max_length=50_000)]
    links: list[LinkForm] = []
    pipeline: PipelineForm | None = None
    pipelines: Annotated[list[PipelineForm], Field(min_length=1, max_length=200)] | None = None

    @property
    def all_pipelines(self) -> list[PipelineForm]:
        """The pipelines to place, by id: the order in which they are given is of no consequence."""
        given = self.pipelines if self.pipelines is not None else [self.pipeline] if self.pipeline else []
        return sorted(given, key=lambda pipeline: pipeline.id)


def read(data: Any) -> ProblemForm:
    """A problem, checked. Raises `PlacementError` that names what is wrong and where."""
    problem = data if isinstance(data, ProblemForm) else checked(ProblemForm, data)
    check(problem)
    return problem


def checked(form: type[F], data: Any) -> F:
    """`data` in this form. Raises `PlacementError`."""
    try:
        return form.model_validate(data)
    except ValidationError as exc:
        raise PlacementError(_told(exc)) from None


def check(problem: ProblemForm) -> None:
    """What the form of each field can't say: names that are there, once, and graphs without cycles."""
    if (problem.pipeline is None) == (problem.pipelines is None):
        raise PlacementError("give either 'pipeline' or 'pipelines'")
    nodes = _once("node", (node.id for node in problem.nodes))
    seen = set()
    for link in problem.links:
        ends = (link.source, link.target)
        for end in ends:
            if end not in nodes:
                raise PlacementError(f"link {link.source!r} -> {link.target!r}: there is no node {end!r}")
        if ends in seen:
            raise PlacementError(f"link {link.source!r} -> {link.target!r} is given twice")
        seen.add(ends)
    _once("pipeline", (pipeline.id for pipeline in problem.all_pipelines))
    for pipeline in problem.all_pipelines:
        _check_pipeline(pipeline, nodes)


def _check_pipeline(pipeline: PipelineForm, nodes: set[str]) -> None:
    where = f"pipeline {pipeline.id!r}: "
    operators = _once(f"{where}operator", (operator.id for operator in pipeline.operators))
    for operator in pipeline.operators:
        if operator.pin is not None and operator.pin not in nodes:
            raise PlacementError(f"{where}operator {operator.id!r} is pinned to {operator.pin!r}, which is no node")
    before: dict[str, set[str]] = {operator: set() for operator in operators}
    for source, target in pipeline.edges:
        for end in (source, target):
            if end not in operators:
                raise PlacementError(f"{where}edge {source!r} -> {target!r}: there is no operator {end!r}")
        if source in before[target]:
            raise PlacementError(f"{where}edge {source!r} -> {target!r} is given twice")
        before[target].add(source)
    try:
        graphlib.TopologicalSorter(before).prepare()
    except graphlib.CycleError as exc:
        raise PlacementError(f"{where}the edges make a cycle: {' -> '.join(reversed(exc.args[1]))}") from None


def _once(what: str, ids: Iterable[str]) -> set[str]:
    seen: set[str] = set()
    for item in ids:
        if item in seen:
            raise PlacementError(f"{what} {item!r} is given twice")
        seen.add(item)
    return seen


def _told(exc: ValidationError) -> str:
    """The first mistakes, each with its place, e.g. "nodes[2].speed: Input should be greater than 0 (is 0)"."""
    lines = []
    for error in exc.errors(include_url=False)[:3]:
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).lstrip(".")
        if error["type"] == "extra_forbidden":
            lines.append(f"{place}: there is no such key")
        elif error["type"] == "missing":
            lines.append(f"{place}: is missing")
        else:
            given = json.dumps(error["input"], default=repr)
            lines.append(f"{place or 'the problem'}: {error['msg']} (is {given[:60]})")
    return "; ".join(lines)
