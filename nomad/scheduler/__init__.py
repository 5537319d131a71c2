"""Decides where operators live. Pure functions over an immutable snapshot: no clock, no I/O, no hidden random.

`plan` is the engine: a problem in its JSON form in, the answer in its JSON form out (docs/placement.md); it needs
NumPy and SciPy, the extra `scheduler`. `place` is the master's first placement of one pipeline, and needs nothing.
"""

from typing import Any

from nomad.errors import PlacementError
from nomad.scheduler.greedy import place
from nomad.scheduler.model import Infeasible, Lack, Link, Node, Operator, Plan, Policy, Reason, RunnerUp, Snapshot

__all__ = [
    "Infeasible",
    "Lack",
    "Link",
    "Node",
    "Operator",
    "Plan",
    "Policy",
    "Reason",
    "RunnerUp",
    "Snapshot",
    "place",
    "plan",
]


def plan(problem: Any) -> dict[str, Any]:
    """Where each operator should be, why there and not elsewhere; or which constraint can't be met.

    The same problem gets the same answer, in whatever order its parts are given. Raises `PlacementError` that names
    what isn't valid, and where NumPy or SciPy is missing.
    """
    try:
        from nomad.scheduler import planner
    except ModuleNotFoundError as exc:
        if exc.name is None or exc.name.partition(".")[0] not in ("numpy", "scipy"):
            raise
        raise PlacementError(f"planning needs {exc.name}: pip install 'nomad[scheduler]'") from exc
    return planner.plan(problem)
