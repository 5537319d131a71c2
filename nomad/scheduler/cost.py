"""What it costs to run an operator on a node: one function per term, in seconds per message."""

from __future__ import annotations

from nomad.scheduler.model import Link, Node, Operator, Policy


def work_of(operator: Operator, policy: Policy) -> float:
    """Reference-seconds per message, or what the policy assumes."""
    return policy.default_work if operator.work is None else operator.work


def bytes_of(operator: Operator, policy: Policy) -> float:
    """Bytes per message sent on, or what the policy assumes."""
    return policy.default_output_bytes if operator.output_bytes is None else operator.output_bytes


def processing(work: float, node: Node) -> float:
    """work / speed"""
    return work / node.speed


def transfer(size: float, link: Link | None) -> float:
    """latency + size / bandwidth; 0 inside a node and over a link that isn't declared"""
    if link is None:
        return 0.0
    return link.latency + (size / link.bandwidth if link.bandwidth is not None else 0.0)
