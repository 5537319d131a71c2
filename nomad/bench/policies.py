"""What a policy means for one pipeline: which operators are bound to which node, and whether Nomad may move them.

    all-edge           everything on the start node
    all-cloud          everything but the source on the end node
    static-best        where the planner puts everything, knowing the conditions at the beginning; nothing moves
    static-best-after  the same, knowing the conditions at the end: what a move could reach at best
    nomad              placed by Nomad, and moved by it

The first operator is always on the start node and the last on the end node. Pure but for the planner's imports.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nomad import scheduler
from nomad.bench import timeline
from nomad.bench.scenario import PolicyForm, Scenario
from nomad.bench.timeline import Conditions, Step
from nomad.errors import ScenarioError


@dataclass(frozen=True, slots=True)
class Operator:
    """An operator as a planner sees it."""

    name: str
    work: float
    """Reference-seconds per message, at the beginning."""
    output_bytes: float
    memory_mb: float
    requires: frozenset[str] = frozenset()
    pin: str | None = None


@dataclass(frozen=True, slots=True)
class Shaped:
    """What the pipeline is, source to sink, and where it begins and ends."""

    operators: tuple[Operator, ...]
    start: str
    end: str


@dataclass(frozen=True, slots=True)
class Chosen:
    """How a policy submits a pipeline."""

    pins: dict[str, str]
    moves: bool


def choose(policy: PolicyForm, scenario: Scenario, pipeline: Shaped, steps: Sequence[Step]) -> Chosen:
    """Pins and moves. Raises `ScenarioError` when there is no placement, `PlacementError` without NumPy or SciPy."""
    own = {op.name: op.pin for op in pipeline.operators if op.pin is not None}
    free = [op.name for op in pipeline.operators[1:-1] if op.name not in own]
    match policy.name:
        case "all-edge":
            pins = dict.fromkeys(free, pipeline.start)
        case "all-cloud":
            pins = dict.fromkeys(free, pipeline.end)
        case "static-best":
            pins = best(scenario, pipeline, timeline.conditions(scenario, steps, -1.0)).placement
        case "static-best-after":
            pins = best(scenario, pipeline, timeline.conditions(scenario, steps)).placement
        case _:
            pins = policy.pins
    return Chosen({**own, **{name: node for name, node in pins.items() if name in free}}, policy.moves)


@dataclass(frozen=True, slots=True)
class Best:
    """The planner's answer."""

    placement: dict[str, str]
    latency: float
    """Seconds for a message, as the model has it."""


def best(scenario: Scenario, pipeline: Shaped, now: Conditions, *, fixed: dict[str, str] | None = None) -> Best:
    """The best placement under these conditions, or what `fixed` would be worth under them.

    Raises `ScenarioError` when there is none.
    """
    answer = scheduler.plan(problem(scenario, pipeline, now, fixed or {}))
    if not answer["feasible"]:
        raise ScenarioError(f"there is no placement: {answer['reasons']['text']}")
    return Best(answer["placement"], answer["latency"])


def problem(scenario: Scenario, pipeline: Shaped, now: Conditions, fixed: dict[str, str]) -> dict[str, Any]:
    """The placement problem in the planner's JSON form."""
    nodes = [node for node in scenario.topology.nodes if node.id not in now.lost]
    links = timeline.links_at(now.links, [node.id for node in nodes])
    ends = {pipeline.operators[0].name: pipeline.start, pipeline.operators[-1].name: pipeline.end}
    return {
        "routing": "direct",
        "contention": "none",
        "nodes": [
            {
                "id": node.id,
                "speed": now.speeds[node.id],
                "cores": node.cores,
                "memory_mb": node.memory_mb,
                "labels": sorted(node.labels),
            }
            for node in nodes
        ],
        "links": [
            {"from": a, "to": b, "latency": shape.latency, "bandwidth": shape.bandwidth}
            for (a, b), shape in links.items()
        ],
        "pipeline": {
            "id": "bench",
            "rate": now.rate,
            "operators": [
                {
                    "id": op.name,
                    "work": now.work.get(op.name, op.work),
                    "output_bytes": op.output_bytes,
                    "memory_mb": op.memory_mb,
                    "requires": sorted(op.requires),
                    "pin": ends.get(op.name) or fixed.get(op.name) or op.pin,
                }
                for op in pipeline.operators
            ],
            "edges": [[a.name, b.name] for a, b in zip(pipeline.operators, pipeline.operators[1:], strict=False)],
        },
    }
