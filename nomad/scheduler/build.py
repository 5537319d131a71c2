"""From the JSON form to arrays: nodes and links in the order of their names, operators in topological order, rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nomad.scheduler.arrays import Floats, Ints
from nomad.scheduler.instance import TOLERANCE, Work
from nomad.scheduler.problem import NodeForm, OperatorForm, PipelineForm, ProblemForm
from nomad.scheduler.routes import Links

MOST = 1e60
"""Messages per second: rates grow along a pipeline, and must not overflow."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """The nodes by name, and the links between them."""

    nodes: tuple[NodeForm, ...]
    position: dict[str, int]
    speed: Floats
    room: Floats
    """[resource, node]: see `instance.Seats`."""
    labels: tuple[frozenset[str], ...]
    links: Links

    @classmethod
    def of(cls, problem: ProblemForm) -> Cluster:
        """The cluster of a problem."""
        nodes = tuple(sorted(problem.nodes, key=lambda node: node.id))
        position = {node.id: number for number, node in enumerate(nodes)}
        room = np.array([free(node) for node in nodes]).T.copy()
        return cls(
            nodes,
            position,
            np.array([node.speed for node in nodes]),
            room,
            tuple(frozenset(node.labels) for node in nodes),
            _links(problem, position),
        )


def free(node: NodeForm) -> tuple[float, float]:
    """MiB, and reference-seconds per second, that may be used of a node: what is left, tolerance included."""
    capacity = node.speed * node.cores
    memory = np.inf if node.memory_mb is None else node.memory_mb
    return (
        _with_tolerance(memory, node.used_memory_mb),
        _with_tolerance(capacity, node.used_cpu),
    )


def _with_tolerance(capacity: float, used: float) -> float:
    return capacity - used + TOLERANCE * capacity


def _links(problem: ProblemForm, position: dict[str, int]) -> Links:
    links = [link for link in problem.links if link.source != link.target]
    source = np.array([position[link.source] for link in links], dtype=np.int64)
    target = np.array([position[link.target] for link in links], dtype=np.int64)
    latency = np.array([link.latency for link in links], dtype=np.float64)
    bandwidth = np.array([np.inf if link.bandwidth is None else link.bandwidth for link in links], dtype=np.float64)
    used = np.array([link.used for link in links], dtype=np.float64)
    order = np.lexsort((target, source))
    return Links(source[order], target[order], latency[order], bandwidth[order], (bandwidth - used)[order])


def link_room(links: Links) -> Floats:
    """Bytes per second that may be used of each link, tolerance included, and infinite after the last."""
    finite = np.where(np.isfinite(links.bandwidth), links.bandwidth, 0.0)
    return np.append(links.free + TOLERANCE * finite, np.inf)


def work_of(pipelines: Sequence[PipelineForm], cluster: Cluster, among: Ints, *, contended: bool) -> Work:
    """The operators of some pipelines, to be placed on the nodes `among`."""
    ids: list[tuple[str, str]] = []
    operators: list[OperatorForm] = []
    rates: list[float] = []
    edges: list[tuple[int, int]] = []
    group: list[int] = []
    for number, pipeline in enumerate(pipelines):
        offset = len(ids)
        order, inputs = in_order(pipeline)
        by_id = {operator.id: operator for operator in pipeline.operators}
        position = {name: offset + place for place, name in enumerate(order)}
        emitted: dict[str, float] = {}
        for name in order:
            operator = by_id[name]
            taken = float(sum(emitted[before] for before in inputs[name])) if inputs[name] else pipeline.rate
            emitted[name] = min(taken * operator.selectivity, MOST)
            rates.append(taken)
            ids.append((pipeline.id, name))
            operators.append(operator)
            group.append(number)
            edges.extend((position[before], position[name]) for before in inputs[name])
    rate = np.array(rates)
    work = np.array([operator.work for operator in operators])
    output_bytes = np.array([operator.output_bytes for operator in operators])
    emitted_rate = rate * np.array([operator.selectivity for operator in operators])
    allowed = _allowed(operators, cluster, among)
    if not contended:
        serial = np.array([operator.serial for operator in operators])
        allowed &= ~serial[:, None] | ((work * rate)[:, None] <= cluster.speed[among] * (1 + TOLERANCE))
    return Work(
        tuple(ids),
        work,
        output_bytes,
        np.array([[operator.memory_mb for operator in operators], work * rate]),
        output_bytes * emitted_rate,
        allowed,
        tuple(edges),
        np.array(group),
    )


def _allowed(operators: Sequence[OperatorForm], cluster: Cluster, among: Ints) -> np.ndarray:
    allowed = np.zeros((len(operators), len(among)), dtype=bool)
    by_labels: dict[frozenset[str], np.ndarray] = {}
    for number, operator in enumerate(operators):
        if operator.pin is not None:
            allowed[number] = among == cluster.position[operator.pin]
            continue
        needed = frozenset(operator.requires)
        if needed not in by_labels:
            by_labels[needed] = np.array([needed <= cluster.labels[node] for node in among.tolist()], dtype=bool)
        allowed[number] = by_labels[needed]
    return allowed


def in_order(pipeline: PipelineForm) -> tuple[list[str], dict[str, list[str]]]:
    """Operators in topological order, and the inputs of each by name. Branches are finished before new ones are begun,
    so that few operators wait for their successors at a time."""
    inputs: dict[str, list[str]] = {operator.id: [] for operator in pipeline.operators}
    outputs: dict[str, list[str]] = {operator.id: [] for operator in pipeline.operators}
    for source, target in sorted(map(tuple, pipeline.edges)):
        inputs[target].append(source)
        outputs[source].append(target)
    missing = {name: len(before) for name, before in inputs.items()}
    waiting = {name: len(after) for name, after in outputs.items()}
    ready = {name for name, count in missing.items() if not count}
    order: list[str] = []
    while ready:
        # how many more operators would wait for a successor afterwards
        name = min(
            ready, key=lambda name: (bool(outputs[name]) - sum(waiting[before] == 1 for before in inputs[name]), name)
        )
        ready.remove(name)
        order.append(name)
        for before in inputs[name]:
            waiting[before] -= 1
        for after in outputs[name]:
            missing[after] -= 1
            if not missing[after]:
                ready.add(after)
    return order, inputs
