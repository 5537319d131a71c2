"""From what the master knows to a placement problem in its JSON form (docs/placement.md): a pipeline, the nodes that
are there, and what other pipelines take of them. Pure. Used for the first placement, for every later one, and to
record a problem from a live master.

What is known of a quantity is, in this order: what `drift` counts on; what was measured; what the topology declares or
the pipeline's profile says; a default that stands here. What a link or node was *changed to* by hand isn't looked at:
as on any cluster, that has to be measured.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nomad import needs
from nomad.measure.book import Book
from nomad.measure.estimate import Estimate
from nomad.pipeline import OperatorSpec, PipelineSpec
from nomad.runtime.base import NodeInfo
from nomad.scheduler.drift import Signal

DEFAULT_WORK = 1e-3
"""Reference-seconds per message of an operator that nothing is known of: a few thousand lines of Python, no model."""
DEFAULT_OUTPUT = 1024.0
"""Bytes per message that nothing is known of: a record, no picture."""
OPEN = frozenset({"schedulable"})
"""What nodes have that take new operators, and operators require that aren't on one already that takes none; left out
where all take some."""
MOST_NODES = 64
"""Of larger clusters about so many are looked at for one pipeline: a problem grows with the square of its nodes."""
DEFAULT_RATE = 1.0
"""Messages per second of a source that doesn't say: so few that no limit is what decides."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A pipeline that runs, and where."""

    spec: PipelineSpec
    nodes: Mapping[str, str]
    """Operator -> node."""


@dataclass(frozen=True, slots=True)
class Claims:
    """What a pipeline, or several, take."""

    cpu: dict[str, float]
    """Reference-seconds per second, by node."""
    memory_mb: dict[str, float]
    flows: dict[tuple[str, str], float]
    """Bytes per second by pair of nodes."""


@dataclass(frozen=True, slots=True)
class Operator:
    """What a problem says of an operator's messages."""

    work: float
    output_bytes: float
    selectivity: float


@dataclass(slots=True)
class Knowledge:
    """What there is to know."""

    book: Book
    level: Callable[[Signal], float | None] = lambda signal: None
    """What is to be counted on instead of the estimate, if there is such, by kind and what it is of."""

    def operator(self, spec: PipelineSpec, number: int) -> Operator:
        """The operator at this place of a pipeline."""
        name = spec.operators[number].name
        known, key = self.book.operator(spec.id, name), (spec.id, name)
        expected = spec.profile[number] if number < len(spec.profile) else {}
        work = expected.get("cloud_execution_time", DEFAULT_WORK)
        output = expected.get("output_msg_size", DEFAULT_OUTPUT)
        return Operator(
            work=self._of("work", key, known.work, work),
            output_bytes=self._of("output_bytes", key, known.output_bytes, output),
            selectivity=self._of("selectivity", key, known.selectivity, 1.0),
        )

    def rate(self, spec: PipelineSpec) -> float:
        """Messages per second that the first operator makes."""
        source = spec.operators[0]
        declared = 1 / source.interval if source.interval else DEFAULT_RATE
        return self._of(
            "departure", (spec.id, source.name), self.book.operator(spec.id, source.name).departure, declared
        )

    def speed(self, node: NodeInfo) -> float:
        """Reference-seconds of work per second and core."""
        return max(1e-6, self._of("speed", (node.id,), self.book.node(node.id).speed, node.speed))

    def link(self, source: str, target: str) -> tuple[float, float | None]:
        """Seconds one way, and bytes per second or None: not known to be limited."""
        known = self.book.link(source, target)
        latency = self._of("latency", (min(source, target), max(source, target)), known.latency, 0.0)
        counted = known.counted
        if counted is None:
            return latency, None
        bandwidth = self._of("bandwidth", (source, target), counted, 0.0) if counted.measured else counted.value
        return latency, max(bandwidth, 1.0)

    def _of(self, kind: str, key: tuple[str, ...], estimate: Estimate | None, otherwise: float) -> float:
        level = self.level((kind, key))
        if level is not None:
            return level
        return estimate.value if estimate is not None else otherwise


def build(
    spec: PipelineSpec,
    knowledge: Knowledge,
    nodes: Iterable[NodeInfo],
    *,
    pins: Mapping[str, str],
    others: Iterable[Placed] = (),
    claimed: Callable[[Placed], Claims] | None = None,
    demand: float = 1.0,
    now: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The problem, with routing `direct`: pods dial one another. `nodes`: those that are there; `pins`: operator ->
    node, those of the ends included; `others`: the pipelines that run beside it, of which `claimed`
    says what they take where that is known already. `demand`: times the rate that is seen, where the source is known to
    be held back. `now`: operator -> the node where it runs, which it may stay on though
    that takes no new operators. Of more than `MOST_NODES` nodes those that don't suit any operator well are left out.
    """
    now = now or {}
    taken = {*now.values(), *pins.values()}
    there = {n.id: n for n in sorted(nodes, key=lambda n: n.id) if n.schedulable or n.id in taken}
    closed = {node.id for node in there.values() if not node.schedulable}
    others = list(others)
    taken_by = claimed or functools.partial(claims, knowledge=knowledge)
    whole, devices = _together(map(taken_by, others)), devices_taken(others)
    if len(there) > MOST_NODES:
        near = _near(spec, knowledge, there, pins, now, Taken(whole.cpu, whole.memory_mb, devices))
        there = {id: node for id, node in there.items() if id in near}
        closed &= near
    operators = [knowledge.operator(spec, number) for number in range(len(spec.operators))]
    links = []
    for source in there:
        for target in there:
            if source != target:
                latency, bandwidth = knowledge.link(source, target)
                used = 0.0 if bandwidth is None else min(bandwidth, whole.flows.get((source, target), 0.0))
                links.append({"from": source, "to": target, "latency": latency, "bandwidth": bandwidth, "used": used})
    speeds = {node.id: knowledge.speed(node) for node in there.values()}
    return {
        "routing": "direct",
        "contention": "none",
        "nodes": [
            {
                "id": node.id,
                "speed": speeds[node.id],
                "cores": node.cores,
                "memory_mb": node.memory_mb,
                "labels": sorted(
                    node.labels
                    | _devices(spec, node, devices.get(node.id, {}))
                    | (OPEN if closed and node.id not in closed else frozenset())
                ),
                "arch": node.arch,
                "used_cpu": min(whole.cpu.get(node.id, 0.0), speeds[node.id] * node.cores),
                "used_memory_mb": min(whole.memory_mb.get(node.id, 0.0), node.memory_mb),
            }
            for node in there.values()
        ],
        "links": links,
        "pipeline": {
            "id": spec.id,
            "rate": knowledge.rate(spec) * demand,
            "operators": [
                {
                    "id": op.name,
                    "work": known.work,
                    "output_bytes": known.output_bytes,
                    "memory_mb": op.memory_mb,
                    "selectivity": known.selectivity,
                    "requires": sorted(
                        requires(op) | (OPEN if closed and now.get(op.name) not in closed else frozenset())
                    ),
                    "pin": pins.get(op.name),
                    "serial": True,
                }
                for op, known in zip(spec.operators, operators, strict=True)
            ],
            "edges": [list(edge) for edge in spec.edges],
        },
    }


@dataclass(frozen=True, slots=True)
class Taken:
    """What other pipelines have of each node."""

    cpu: Mapping[str, float]
    memory_mb: Mapping[str, float]
    devices: Mapping[str, Mapping[str, int]]


def _near(
    spec: PipelineSpec,
    knowledge: Knowledge,
    nodes: Mapping[str, NodeInfo],
    pins: Mapping[str, str],
    now: Mapping[str, str],
    taken: Taken,
) -> set[str]:
    """Where the operators are, and for each that isn't bound the nodes that would suit it best if it were alone: those
    that have what it needs, by how far they are from the pipeline's ends and how fast they are, the idle ones first.
    """
    found = {node for node in (*pins.values(), *now.values()) if node in nodes}
    ends = [node for node in dict.fromkeys((spec.start, spec.end)) if node in nodes]
    away = {id: sum(knowledge.link(end, id)[0] for end in ends if end != id) for id in nodes}
    speeds = {id: knowledge.speed(node) for id, node in nodes.items()}
    load = {id: taken.cpu.get(id, 0.0) / max(speeds[id] * node.cores, 1e-6) for id, node in nodes.items()}
    arriving = rates(spec, knowledge)
    free = [(number, op) for number, op in enumerate(spec.operators) if op.name not in pins]
    ranked = []
    for number, op in free:
        work, choosy = knowledge.operator(spec, number).work, bool(requires(op))
        cost: dict[str, tuple[int, float, float, str]] = {}
        for id, node in nodes.items():
            lacks = int(not node.schedulable)
            if choosy:
                lacks += len(missing(op, node, taken.devices.get(id, {})))
            lacks += node.memory_mb - taken.memory_mb.get(id, 0.0) < op.memory_mb
            lacks += node.cores * speeds[id] * (1 - load[id]) < work * arriving[op.name]
            cost[id] = lacks, away[id] + work / speeds[id], load[id], id
        ranked.append(heapq.nsmallest(MOST_NODES, nodes, key=cost.__getitem__))
    for best in zip(*ranked, strict=True):
        if len(found) >= MOST_NODES:
            break
        found.update(best)
    return found


def requires(op: OperatorSpec) -> frozenset[str]:
    """What a node must have for an operator: labels, and devices in words."""
    return op.requires | needs.device_labels(op.devices)


def missing(op: OperatorSpec, node: NodeInfo, taken: Mapping[str, int]) -> list[str]:
    """What of `requires` a node hasn't got, when other operators there have `taken` so many of its devices."""
    return sorted(requires(op) - node.labels - needs.offered(op.devices, _left(node, taken)))


def devices_taken(placed: Iterable[Placed]) -> dict[str, dict[str, int]]:
    """Node -> device -> how many operators there have."""
    found: dict[str, dict[str, int]] = {}
    for pipeline in placed:
        for op in pipeline.spec.operators:
            for name, count in op.devices.items():
                there = found.setdefault(pipeline.nodes[op.name], {})
                there[name] = there.get(name, 0) + count
    return found


def _devices(spec: PipelineSpec, node: NodeInfo, taken: Mapping[str, int]) -> frozenset[str]:
    """What a node has of the devices that operators of a pipeline need, in the words of `requires`."""
    found: frozenset[str] = frozenset()
    for op in spec.operators:
        found |= needs.offered(op.devices, _left(node, taken))
    return found


def _left(node: NodeInfo, taken: Mapping[str, int]) -> dict[str, int]:
    return {name: count - taken.get(name, 0) for name, count in node.devices.items()}


def rates(spec: PipelineSpec, knowledge: Knowledge, known: Sequence[Operator] | None = None) -> dict[str, float]:
    """Operator -> messages per second that come to it, by the model: sources and selectivities.

    `known`: what is known of the operators, where that was looked up already.
    """
    emitted: dict[str, float] = {}
    found: dict[str, float] = {}
    source = knowledge.rate(spec)
    for number, op in enumerate(spec.operators):  # in topological order
        before = [emitted[a] for a, b in spec.edges if b == op.name]
        found[op.name] = sum(before) if before else source
        operator = known[number] if known is not None else knowledge.operator(spec, number)
        emitted[op.name] = found[op.name] * operator.selectivity
    return found


def claims(placed: Placed, knowledge: Knowledge) -> Claims:
    """What a pipeline takes where it is, by what is known of it."""
    found, spec = Claims({}, {}, {}), placed.spec
    operators = [knowledge.operator(spec, number) for number in range(len(spec.operators))]
    arriving = rates(spec, knowledge, operators)
    known = {op.name: operator for op, operator in zip(spec.operators, operators, strict=True)}
    for op in spec.operators:
        node = placed.nodes[op.name]
        found.cpu[node] = found.cpu.get(node, 0.0) + known[op.name].work * arriving[op.name]
        found.memory_mb[node] = found.memory_mb.get(node, 0.0) + op.memory_mb
    for source, target in spec.edges:
        way = (placed.nodes[source], placed.nodes[target])
        flow = known[source].output_bytes * known[source].selectivity * arriving[source]
        found.flows[way] = found.flows.get(way, 0.0) + flow
    return found


def _together(each: Iterable[Claims]) -> Claims:
    whole = Claims({}, {}, {})
    for one in each:
        for node, cpu in one.cpu.items():
            whole.cpu[node] = whole.cpu.get(node, 0.0) + cpu
        for node, memory_mb in one.memory_mb.items():
            whole.memory_mb[node] = whole.memory_mb.get(node, 0.0) + memory_mb
        for way, flow in one.flows.items():
            whole.flows[way] = whole.flows.get(way, 0.0) + flow
    return whole
