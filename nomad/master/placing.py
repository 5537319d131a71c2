"""Between the master's values and the scheduler's: a snapshot of the cluster, and a plan as views. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

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
) -> dict[str, PlacementView]:
    """Where each operator of a new pipeline goes, and why.

    Raises `InvalidRequestError` (422) that says which constraint can't be met, and which nodes came nearest.
    """
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
            operators=tuple(_operator(spec, number, op) for number, op in enumerate(spec.operators)),
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


def _operator(spec: PipelineSpec, number: int, op: OperatorSpec) -> scheduler.Operator:
    expected = spec.profile[number] if number < len(spec.profile) else {}
    first, last = number == 0, number == len(spec.operators) - 1
    return scheduler.Operator(
        id=op.name,
        memory_mb=op.memory_mb,
        requires=op.requires,
        work=expected.get("cloud_execution_time"),
        output_bytes=expected.get("output_msg_size"),
        pin=spec.start if first else spec.end if last else None,
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
