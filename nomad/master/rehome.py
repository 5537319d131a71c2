"""Another node for an operator that can't run on its own: what the enactor asks when `reconcile` wants one.

The other operators stay where they are, as far as their nodes are there; the engine of the first placement chooses.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from nomad.master.placing import place
from nomad.master.problem import Knowledge, Placed, build
from nomad.master.state import Desired, DesiredPipeline, Observed
from nomad.master.views import PlacementView
from nomad.measure.book import Book


class Homes:
    """Chooses by what is known now. `is_over`: whether nothing of a pipeline runs, so that it takes nothing."""

    def __init__(self, desired: Desired, observed: Observed, book: Book, is_over: Callable[[str], bool]) -> None:
        self._desired = desired
        self._observed = observed
        self._book = book
        self._is_over = is_over

    async def __call__(self, wanted: DesiredPipeline, operator: str, avoid: str) -> PlacementView:
        """Raises `InvalidRequestError` with the constraint that can't be met."""
        nodes = [node for id, node in self._observed.nodes.items() if self._observed.open(id) and id != avoid]
        there = {node.id for node in nodes}
        now = {op.name: wanted.node_of(op.name) for op in wanted.spec.operators if op.name != operator}
        others = [
            Placed(other.spec, {op.name: other.node_of(op.name) for op in other.spec.operators})
            for id, other in self._desired.pipelines.items()
            if other is not wanted and not self._is_over(id)
        ]
        pins = {name: node for name, node in now.items() if node in there}
        problem = build(wanted.spec, Knowledge(self._book), nodes, pins=pins, others=others)
        return (await asyncio.to_thread(place, problem)).views[operator]
