"""Network coordinates: round trips between nodes that never spoke, from a few that each node had. Pure.

Vivaldi with height vectors, after F. Dabek, R. Cox, F. Kaashoek and R. Morris, "Vivaldi: A Decentralized Network
Coordinate System", SIGCOMM 2004: a node's coordinate is a point in a plane, which models the core of the network, and
a height above it, its access link, which every way from the node must go down first. Each round trip that
is measured pulls both its ends towards coordinates that would predict it, the surer end less.

Used by `book` on clusters where all pairs are too many. The randomness is passed in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

CE = 0.25
CC = 0.25
"""How far one sample moves an error and a coordinate; the paper's values."""

LEAST_HEIGHT = 1e-5
"""Seconds: keeps heights positive, as distances need them."""

LEAST_RTT = 1e-5


@dataclass(slots=True)
class _Node:
    x: float = 0.0
    y: float = 0.0
    height: float = LEAST_HEIGHT
    error: float = 1.0
    """Mean relative error of what it predicts: 1.0 knows nothing."""


class Coordinates:
    """Of the nodes of one cluster."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._nodes: dict[str, _Node] = {}

    def observe(self, a: str, b: str, round_trip: float) -> None:
        """A round trip of so many seconds was measured between two nodes."""
        round_trip = max(LEAST_RTT, round_trip)
        one, two = self._node(a), self._node(b)
        # Both ends move by where the other was before.
        before = _Node(one.x, one.y, one.height, one.error)
        self._move(one, two, round_trip)
        self._move(two, before, round_trip)

    def predict(self, a: str, b: str) -> tuple[float, float] | None:
        """Round trip in seconds and its expected error, in seconds too; None when a node was never measured."""
        one, two = self._nodes.get(a), self._nodes.get(b)
        if one is None or two is None:
            return None
        seconds = _distance(one, two)
        return seconds, seconds * (one.error + two.error) / 2

    def forget(self, node: str) -> None:
        """It has left the cluster."""
        self._nodes.pop(node, None)

    def _node(self, id: str) -> _Node:
        return self._nodes.setdefault(id, _Node())

    def _move(self, node: _Node, other: _Node, round_trip: float) -> None:
        predicted = _distance(node, other)
        weight = node.error / (node.error + other.error) if node.error + other.error > 0 else 0.5
        relative = abs(predicted - round_trip) / round_trip
        node.error = min(1.0, relative * CE * weight + node.error * (1 - CE * weight))
        force = CC * weight * (round_trip - predicted)
        dx, dy, height = node.x - other.x, node.y - other.y, node.height + other.height
        length = math.hypot(dx, dy)
        if length == 0.0:  # at the same point: away in any direction
            angle = self._random.uniform(0, 2 * math.pi)
            dx, dy, length = math.cos(angle) * height, math.sin(angle) * height, height
        whole = length + height
        node.x += force * dx / whole
        node.y += force * dy / whole
        node.height = max(LEAST_HEIGHT, node.height + force * height / whole)


def _distance(a: _Node, b: _Node) -> float:
    return math.hypot(a.x - b.x, a.y - b.y) + a.height + b.height
