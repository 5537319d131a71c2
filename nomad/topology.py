"""The topology of an embedded cluster: its nodes and the links between them, as a YAML file or by names.

    nodes:
      edge:  {speed: 0.25, cores: 2, memory: 2Gi, labels: [near], devices: {camera: 1}}
      home:  {reachable: false}
      cloud: {}
    links:
      - {from: edge, to: cloud, latency: 20ms, bandwidth: 100Mbit, jitter: 2ms, loss: 0.001}

Pods on a node with `reachable: false` are never dialled from others, as behind NAT.
A link stands for both directions unless `both: false`; what isn't declared isn't shaped. A node's cores
and memory default to this machine's, `speed` to 1.0. Called by the command line and by embedding
programs. Every problem is one `TopologyError` that lists file, line, place and the way out; nothing is
guessed and nothing unknown is ignored.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import ErrorDetails

from nomad import needs, units, yamlfile
from nomad.control import Shape
from nomad.errors import PipelineError, TopologyError
from nomad.runtime.base import LinkInfo, NodeInfo
from nomad.yamlfile import Document, Place


@dataclass(frozen=True, slots=True)
class Topology:
    """Nodes in the order of declaration, and directed links, each pair of nodes at most once."""

    nodes: tuple[NodeInfo, ...]
    links: tuple[LinkInfo, ...] = ()
    source: str = ""
    """Where it came from, for messages."""


def load(path: str | Path) -> Topology:
    """Read a topology file. Raises `TopologyError`."""
    return parse(yamlfile.read(path, "topology", TopologyError), source=str(path))


def parse(text: str, *, source: str = "topology") -> Topology:
    """A topology from YAML text. Raises `TopologyError`."""
    return read(yamlfile.parse(text, source, TopologyError))


def read(document: Document) -> Topology:
    """A topology from a file's content, or from a part of a file. Raises `TopologyError`."""
    if not isinstance(document.data, dict):
        raise TopologyError(f'{document.source} must be a map with "nodes" and, if wanted, "links"')
    file = yamlfile.validate(document, _File, TopologyError, known=_known_keys, words=_words)
    _check_links(file, document)
    nodes = tuple(node.info(name) for name, node in file.nodes.items())
    return Topology(nodes, tuple(link for entry in file.links for link in entry.infos()), document.source)


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


def _devices(value: Any) -> dict[str, int]:
    try:
        return needs.devices(value)
    except PipelineError as exc:
        raise ValueError(str(exc)) from None


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
    devices: Annotated[dict[str, int], BeforeValidator(_devices)] = {}
    reachable: bool = True

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
            devices=self.devices,
            reachable=self.reachable,
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


def _check_links(file: _File, document: Document) -> None:
    """Links lead to nodes that are there, and no direction is declared twice."""
    seen: dict[tuple[str, str], int] = {}
    for index, link in enumerate(file.links):
        where = document.where(["links", index])
        for end in (link.source, link.target):
            if end not in file.nodes:
                hint = yamlfile.suggestion(end, file.nodes, "known nodes")
                raise TopologyError(f"{where}: leads to {end!r}, which is no node of this topology; {hint}")
        for info in link.infos():
            ends = (info.source, info.target)
            if ends in seen:
                raise TopologyError(
                    f"{where}: declares {ends[0]} to {ends[1]} again (first in links.{seen[ends]}); "
                    "a link stands for both directions unless it says `both: false`"
                )
            seen[ends] = index


def _words(item: ErrorDetails, place: Place) -> str | None:
    match item["type"]:
        case "too_short":
            return "declare at least one node"
        case "model_type" | "dict_type":
            return f"must be a map, like {{speed: 0.5, labels: [camera]}}, not {item['input']!r}"
        case _:
            return None


def _known_keys(place: Place) -> list[str]:
    models: dict[int | str, type[BaseModel]] = {"nodes": _Node, "links": _Link}
    return yamlfile.keys(models[place[0]] if place else _File)
