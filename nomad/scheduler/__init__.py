"""Decides where operators live. Pure functions over an immutable snapshot: no clock, no I/O, no hidden random."""

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
]
