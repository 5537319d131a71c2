"""The first placement of a pipeline: where each operator goes, as views, or what a user is told instead. Pure.

Called by the facade, in a thread: a plan takes tens of milliseconds. The engine is `nomad.scheduler`, the problem is
`problem.build`'s.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nomad.errors import InvalidRequestError
from nomad.master.problem import missing
from nomad.master.views import PlacementView
from nomad.pipeline import OperatorSpec, PipelineSpec
from nomad.runtime.base import NodeInfo
from nomad.scheduler.sustain import plan_at_most


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a pipeline goes."""

    views: dict[str, PlacementView]
    """By operator name."""
    latency: float
    """Predicted seconds per message."""
    warning: str = ""
    """What isn't as it should be."""

    @property
    def nodes(self) -> dict[str, str]:
        """Operator -> node."""
        return {name: view.node for name, view in self.views.items()}


def place(problem: Mapping[str, Any]) -> Placement:
    """Where each operator of a new pipeline goes, and why.

    Raises `InvalidRequestError` (422) that says which constraint can't be met, and which nodes came nearest.
    """
    if not problem["nodes"]:
        raise InvalidRequestError("the cluster has no nodes that are there: start some", status=422)
    answer, share = plan_at_most(problem)
    if not answer["feasible"]:
        raise _refused(answer["reasons"])
    warning = ""
    if share < 1:
        rate = problem["pipeline"]["rate"]
        warning = (
            f"the cluster hasn't the processing power or bandwidth for {rate:.4g} messages per second, as far as is "
            "known: the pipeline will run under back-pressure"
        )
    pins = {op["id"] for op in problem["pipeline"]["operators"] if op["pin"] is not None}
    return Placement(
        {name: view(reason, pinned=name in pins) for name, reason in answer["reasons"].items()},
        answer["latency"],
        warning,
    )


def check_pins(
    spec: PipelineSpec,
    nodes: Sequence[NodeInfo],
    pins: Mapping[str, str],
    devices: Mapping[str, Mapping[str, int]] | None = None,
) -> None:
    """To the scheduler a pin is an order; a user who names both a node and a label or device that it lacks is told.

    `devices`: of each node what others have of its devices. Raises `InvalidRequestError` (422).
    """
    taken = devices or {}
    lacks = {op.name: {node.id: missing(op, node, taken.get(node.id, {})) for node in nodes} for op in spec.operators}
    ends = {spec.operators[-1].name: "the pipeline's end", spec.operators[0].name: "the pipeline's start"}
    for op in spec.operators:
        node = pins.get(op.name)
        lacking = lacks[op.name][node] if node is not None else []
        which = ends.get(op.name, "it is pinned there")
        if lacking:
            having = sorted(id for id, lack in lacks[op.name].items() if not lack)
            raise InvalidRequestError(
                f"operator {op.name!r} requires {', '.join(lacking)}, which its node {node!r} ({which}) "
                f"doesn't have; {'nodes that do: ' + ', '.join(having) if having else 'no node does'}",
                status=422,
                problem={
                    "constraint": "requires",
                    "operator": op.name,
                    "nearest": [{"node": n, "lacks": []} for n in having],
                },
            )


def check_packages(operators: Sequence[OperatorSpec], python: str, installed_for: Collection[str]) -> None:
    """Nodes' agents install what operators require, each for the Python of its own image.

    `installed_for`: of those that are there. Where none is, it isn't known. Raises `InvalidRequestError` (422).
    """
    needing = [repr(op.name) for op in operators if op.requirements]
    if needing and installed_for and python not in installed_for:
        there = " and ".join(sorted(installed_for))
        raise InvalidRequestError(
            f"what the operators {', '.join(needing)} require can't be installed: this cluster's agents do that for "
            f"Python {there}, and the pipeline was made with {python}. Put it into an image of their own instead of "
            f"requirements=, submit with Python {there}, or give agents the image for {python}",
            status=422,
        )


def check_devices(
    spec: PipelineSpec,
    nodes: Mapping[str, NodeInfo],
    placement: Mapping[str, str],
    taken: Mapping[str, Mapping[str, int]],
) -> None:
    """The scheduler knows whether a node has what one operator needs, not whether it has it for two of a pipeline.

    Raises `InvalidRequestError` (422).
    """
    sharing: dict[tuple[str, str], list[OperatorSpec]] = {}
    for op in spec.operators:
        for device in op.devices:
            sharing.setdefault((placement[op.name], device), []).append(op)
    for (node, device), ops in sharing.items():
        left = nodes[node].devices.get(device, 0) - taken.get(node, {}).get(device, 0)
        wanted = sum(op.devices[device] for op in ops)
        if wanted > left:
            names = ", ".join(repr(op.name) for op in ops)
            raise InvalidRequestError(
                f"operators {names} need {wanted} of the device {device} together, and {node}, the best node for them, "
                f"has {left}: pin one of them to another node that has it",
                status=422,
                problem={"constraint": "requires", "operator": ops[-1].name, "nearest": []},
            )


def view(reason: Mapping[str, Any], *, pinned: bool) -> PlacementView:
    """Why an operator is where it is, from the engine's answer."""
    second = reason["runner_up"]
    return PlacementView(
        node=reason["node"],
        summary=f"it is pinned to {reason['node']}" if pinned else reason["text"],
        cost=dict(reason["terms"]),
        runner_up=second["node"] if second else None,
        why_not=second["why"] if second else "",
    )


def _refused(reasons: Mapping[str, Any]) -> InvalidRequestError:
    near = ", ".join(f"{lack['node']} lacks {_told(lack['lacks'])}" for lack in reasons["nearest"])
    text = f"there is nowhere to place the pipeline: {reasons['text']}{f' ({near})' if near else ''}"
    if way_out := _WAYS_OUT.get(reasons["constraint"]):
        text += f". {way_out}"
    return InvalidRequestError(
        text, status=422, problem={key: reasons[key] for key in ("constraint", "operator", "nearest")}
    )


def _told(lacks: str) -> str:
    """To the scheduler devices are labels, too."""
    return lacks.replace("label device", "device")


_WAYS_OUT = {
    "memory": "Stop another pipeline, ask for less with @operator(memory=...), or add a node",
    "requires": "Give a node the labels or devices, or require less",
    "pin": "Pin fewer operators, or pin them elsewhere",
}
