"""A plan where one that keeps all limits can't be had: for the largest share of the rate that can be sustained.

Memory, labels, pins and ways hold all the same; limits of processing power and bandwidth are a matter of the rate, and
a pipeline that is asked for more than there is runs under back-pressure. Called for placements that are carried out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nomad.scheduler import needs_libraries, plan

HALVINGS = 12
"""Below a four-thousandth of the rate, limits of the rate are left out."""


def plan_at_most(problem: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
    """The answer, and the share of the pipeline's rate that it is for: 1 unless that can't be sustained.

    If there is no placement at any rate, the answer says why. Raises `PlacementError`.
    """
    answer = plan(problem)
    if answer["feasible"]:
        return answer, 1.0
    idle = plan(_at(problem, 0.0))
    if not idle["feasible"]:
        return idle, 0.0
    for halving in range(1, HALVINGS + 1):
        answer = plan(_at(problem, 0.5**halving))
        if answer["feasible"]:
            return answer, 0.5**halving
    return idle, 0.0


def describe_at_most(problem: Mapping[str, Any], placement: Mapping[str, str]) -> tuple[dict[str, Any] | None, float]:
    """What there is to say of a placement, in the form of a plan's answer, and the share of the rate that it can
    sustain. None if it isn't possible at any rate. Raises `PlacementError`.
    """
    with needs_libraries():
        from nomad.scheduler.planner import Planner

        for share in (*(0.5**halving for halving in range(HALVINGS + 1)), 0.0):
            found = Planner(_at(problem, share)).describe(placement)
            if found is not None:
                return found, share
    return None, 0.0


def _at(problem: Mapping[str, Any], share: float) -> dict[str, Any]:
    pipeline = problem["pipeline"]
    return {**problem, "pipeline": {**pipeline, "rate": pipeline["rate"] * share}}
