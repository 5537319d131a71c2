"""Between the master's values and the scheduler's: a snapshot of the cluster, and a plan as views. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from nomad import scheduler
from nomad.control import Shape
from nomad.errors import InvalidRequestError
from nomad.master.views import PlacementView
from nomad.pipeline import OperatorSpec, PipelineSpec
from nomad.runtime.base import NodeInfo


def place(
    spec: PipelineSpec,
    nodes: Iterable[NodeInfo],
    shapes: Mapping[tuple[str, str], Shape],
    speeds: Mapping[str, float],
    used_memory_mb: Mapping[str, float],
    pins: Mapping[str, str],
) -> dict[str, PlacementView]:
    """Where each operator of a pipeline goes, and why. `pins`: operator -> the node that it is bound to.

    Raises `InvalidRequestError` (422) that says which constraint can't be met, and which nodes came nearest.
    """
    nodes = list(nodes)
    _check_pins(spec, nodes, pins)
    plan = scheduler.place(
        scheduler.Snapshot(
            nodes=tuple(
                scheduler.Node(
                    id=node.id,
                    speed=speeds.get(node.id, node.speed),
                    cores=node.cores,
                    memory_mb=node.memory_mb,
                    labels=node.labels,
                    arch=node.arch,
                    used_memory_mb=used_memory_mb.get(node.id, 0.0),
                )
                for node in nodes
            ),
            operators=tuple(_operator(spec, number, op, pins) for number, op in enumerate(spec.operators)),
            edges=spec.edges,
            links=tuple(
                scheduler.Link(source, target, shape.latency, shape.bandwidth)
                for (source, target), shape in shapes.items()
            ),
        )
    )
    if isinstance(plan, scheduler.Infeasible):
        raise InvalidRequestError(
            plan.text,
            status=422,
            problem={
                "constraint": plan.constraint,
                "operator": plan.operator,
                "nearest": [{"node": lack.node, "lacks": lack.lacks} for lack in plan.nearest],
            },
        )
    return {name: _view(reason) for name, reason in plan.reasons.items()}


def _check_pins(spec: PipelineSpec, nodes: Sequence[NodeInfo], pins: Mapping[str, str]) -> None:
    """To the scheduler a pin is an order; a user who names both a node and a label that it lacks is told."""
    labels = {node.id: node.labels for node in nodes}
    ends = {spec.operators[-1].name: "the pipeline's end", spec.operators[0].name: "the pipeline's start"}
    for op in spec.operators:
        node = pins.get(op.name)
        missing = sorted(op.requires - labels[node]) if node is not None else []
        which = ends.get(op.name, "it is pinned there")
        if missing:
            having = sorted(id for id, has in labels.items() if op.requires <= has)
            raise InvalidRequestError(
                f"operator {op.name!r} requires {', '.join(missing)}, which its node {node!r} ({which}) "
                f"doesn't have; {'nodes that do: ' + ', '.join(having) if having else 'no node does'}",
                status=422,
                problem={
                    "constraint": "requires",
                    "operator": op.name,
                    "nearest": [{"node": n, "lacks": []} for n in having],
                },
            )


def _operator(spec: PipelineSpec, number: int, op: OperatorSpec, pins: Mapping[str, str]) -> scheduler.Operator:
    expected = spec.profile[number] if number < len(spec.profile) else {}
    return scheduler.Operator(
        id=op.name,
        memory_mb=op.memory_mb,
        requires=op.requires,
        work=expected.get("cloud_execution_time"),
        output_bytes=expected.get("output_msg_size"),
        pin=pins.get(op.name),
    )


def _view(reason: scheduler.Reason) -> PlacementView:
    second = reason.runner_up
    return PlacementView(
        node=reason.node,
        summary=reason.text,
        cost=dict(reason.terms),
        runner_up=second.node if second else None,
        why_not=f"{second.total * 1e3:.4g} ms per message there, {reason.total * 1e3:.4g} ms here" if second else "",
    )
