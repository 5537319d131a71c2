"""The topology of an embedded cluster: its nodes and the links between them, as a YAML file or by names.

    nodes:
      edge:  {speed: 0.25, cores: 2, memory: 2Gi, labels: [camera]}
      cloud: {}
    links:
      - {from: edge, to: cloud, latency: 20ms, bandwidth: 100Mbit, jitter: 2ms, loss: 0.001}

A link stands for both directions unless `both: false`; what isn't declared isn't shaped. A node's cores
and memory default to this machine's, `speed` to 1.0. Called by the command line and by embedding
programs. Every problem is one `TopologyError` that lists file, line, place and the way out; nothing is
guessed and nothing unknown is ignored.
"""

from __future__ import annotations

import difflib
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from nomad import units
from nomad.control import Shape
from nomad.errors import TopologyError
from nomad.runtime.base import LinkInfo, NodeInfo


@dataclass(frozen=True, slots=True)
class Topology:
    """Nodes in the order of declaration, and directed links, each pair of nodes at most once."""

    nodes: tuple[NodeInfo, ...]
    links: tuple[LinkInfo, ...] = ()
    source: str = ""
    """Where it came from, for messages."""


def load(path: str | Path) -> Topology:
    """Read a topology file. Raises `TopologyError`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as exc:
        raise TopologyError(f"can't read the topology file {path}: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise TopologyError(f"the topology file {path} isn't UTF-8 text: {exc}") from exc
    return parse(text, source=str(path))


def parse(text: str, *, source: str = "topology") -> Topology:
    """A topology from YAML text. Raises `TopologyError`."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        _refuse_repeated_keys(root, source)
        data = yaml.safe_load(text)
    except yaml.YAMLError as exc:
        raise TopologyError(f"{source} isn't valid YAML: {exc}") from exc
    if not isinstance(data, dict):
        raise TopologyError(f'{source} must be a map with "nodes" and, if wanted, "links"')
    try:
        file = _File.model_validate(data)
    except ValidationError as exc:
        raise TopologyError(_explain(exc, root, source)) from None
    _check_links(file, root, source)
    nodes = tuple(node.info(name) for name, node in file.nodes.items())
    return Topology(nodes, tuple(link for entry in file.links for link in entry.infos()), source)


def from_names(names: Iterable[str]) -> Topology:
    """A topology of equal nodes without shaped links: `nomad up --node edge --node cloud`. Raises `TopologyError`."""
    chosen = list(names)
    if not chosen:
        raise TopologyError("a cluster needs at least one node: `--node NAME` or `--topology FILE`")
    for name in chosen:
        if chosen.count(name) > 1:
            raise TopologyError(f"node {name!r} is named twice; every node needs a name of its own")
        try:
            _node_name(name)
        except ValueError as exc:
            raise TopologyError(str(exc)) from None
    return Topology(tuple(_Node().info(name) for name in chosen), source="--node")


def _machine_memory_mb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**20


def _node_name(name: str) -> str:
    plain = name.replace("-", "").replace("_", "").replace(".", "")
    if not (plain.isascii() and plain.isalnum() and name[0].isalnum() and len(name) <= 63):
        raise ValueError(
            f"{name!r} is no name for a node: 1 to 63 letters, digits, '-', '_' or '.', "
            "beginning with a letter or digit"
        )
    return name


_Positive = Field(gt=0, allow_inf_nan=False)
_NotNegative = Field(ge=0, allow_inf_nan=False)
_NodeName = Annotated[str, AfterValidator(_node_name)]
_Seconds = Annotated[float, BeforeValidator(units.seconds), _NotNegative]


class _Node(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    speed: Annotated[float, _Positive] = 1.0
    cores: Annotated[float, _Positive] = Field(default_factory=lambda: float(os.cpu_count() or 1))
    memory: Annotated[float, BeforeValidator(units.memory_mb), _Positive] = Field(default_factory=_machine_memory_mb)
    labels: frozenset[Annotated[str, Field(min_length=1)]] = frozenset()
    arch: str = Field(default_factory=platform.machine)

    @model_validator(mode="before")
    @classmethod
    def _empty_is_default(cls, data: Any) -> Any:
        return {} if data is None else data

    def info(self, name: str) -> NodeInfo:
        return NodeInfo(
            id=name,
            speed=self.speed,
            cores=self.cores,
            memory_mb=self.memory,
            arch=self.arch,
            labels=self.labels,
            python=f"{sys.version_info.major}.{sys.version_info.minor}",
        )


class _Link(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(alias="from")
    target: str = Field(alias="to")
    latency: _Seconds = 0.0
    jitter: _Seconds = 0.0
    bandwidth: Annotated[float, BeforeValidator(units.bytes_per_second), _Positive] | None = None
    loss: Annotated[float, Field(ge=0, lt=1)] = 0.0
    both: bool = True

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.source == self.target:
            raise ValueError(f"leads from {self.source!r} to itself; links inside a node can't be shaped, leave it out")
        if self.jitter > self.latency:
            raise ValueError(f"jitter ({self.jitter:g} s) can't be more than latency ({self.latency:g} s)")
        return self

    def infos(self) -> list[LinkInfo]:
        ends = [(self.source, self.target), (self.target, self.source)] if self.both else [(self.source, self.target)]
        return [LinkInfo(a, b, Shape(self.latency, self.jitter, self.bandwidth, self.loss)) for a, b in ends]


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    nodes: Annotated[dict[_NodeName, _Node], Field(min_length=1)]
    links: tuple[_Link, ...] = ()


def _check_links(file: _File, root: yaml.Node | None, source: str) -> None:
    """Links lead to nodes that are there, and no direction is declared twice."""
    seen: dict[tuple[str, str], int] = {}
    for index, link in enumerate(file.links):
        where = f"{source}, line {_line(root, ['links', index])}, links.{index}"
        for end in (link.source, link.target):
            if end not in file.nodes:
                near = difflib.get_close_matches(end, file.nodes, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known nodes: {', '.join(file.nodes)}"
                raise TopologyError(f"{where}: leads to {end!r}, which is no node of this topology; {hint}")
        for info in link.infos():
            ends = (info.source, info.target)
            if ends in seen:
                raise TopologyError(
                    f"{where}: declares {ends[0]} to {ends[1]} again (first in links.{seen[ends]}); "
                    "a link stands for both directions unless it says `both: false`"
                )
            seen[ends] = index


def _explain(error: ValidationError, root: yaml.Node | None, source: str) -> str:
    """All problems of a file, one a line, each with the place where it stands."""
    lines = []
    for item in error.errors(include_url=False):
        place = [part for part in item["loc"] if part != "[key]"]
        lines.append(f"{source}, line {_line(root, place)}{_dotted(place)}: {_problem(item, place)}")
    return "\n".join(lines)


def _dotted(place: Sequence[int | str]) -> str:
    return f", {'.'.join(str(part) for part in place)}" if place else ""


def _problem(item: ErrorDetails, place: Sequence[int | str]) -> str:
    match item["type"]:
        case "extra_forbidden":
            known = _known_keys(place)
            near = difflib.get_close_matches(str(place[-1]), known, n=1)
            return f"unknown key {place[-1]!r}; " + (
                f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            )
        case "value_error":
            return str(item["ctx"]["error"])
        case "missing":
            return f"{place[-1]!r} is missing"
        case "too_short":
            return "declare at least one node"
        case "model_type" | "dict_type":
            return f"must be a map, like {{speed: 0.5, labels: [camera]}}, not {item['input']!r}"
        case "tuple_type" | "frozen_set_type":
            return f"must be a list, not {item['input']!r}"
        case "string_type":
            return f"must be text, not {item['input']!r}; put it in quotes"
        case _:
            return f"{item['msg'][0].lower()}{item['msg'][1:]}, not {item['input']!r}"


def _known_keys(place: Sequence[int | str]) -> list[str]:
    models: dict[int | str, type[BaseModel]] = {"nodes": _Node, "links": _Link}
    model = models[place[0]] if len(place) > 1 else _File
    return [info.alias or name for name, info in model.model_fields.items()]


def _line(root: yaml.Node | None, place: Sequence[int | str]) -> int:
    """The line of the deepest part of `place` that the file has, from 1."""
    node, line = root, 1
    for part in place:
        if isinstance(node, yaml.MappingNode):
            found = next(((key, value) for key, value in node.value if key.value == str(part)), None)
            if found is None:
                return line
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            return line
    return line


def _refuse_repeated_keys(root: yaml.Node | None, source: str) -> None:
    """YAML loaders silently keep the last of two equal keys; a node that is declared twice is a mistake."""
    todo: list[yaml.Node] = [root] if root is not None else []
    visited: set[int] = set()  # an alias may lead back to where it stands
    while todo:
        node = todo.pop()
        if id(node) in visited:
            continue
        visited.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            todo.extend(node.value)
        elif isinstance(node, yaml.MappingNode):
            seen: dict[str, int] = {}
            for key, value in node.value:
                line = key.start_mark.line + 1
                if not isinstance(key, yaml.ScalarNode):
                    raise TopologyError(f"{source}, line {line}: a key must be text")
                if key.value in seen:
                    raise TopologyError(
                        f"{source}, line {line}: {key.value!r} stands there twice (first in line {seen[key.value]}); "
                        "give the second a name of its own or take it out"
                    )
                seen[key.value] = line
                todo.append(value)
