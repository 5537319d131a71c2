"""Measures the cluster beside the loop: on one machine, where all nodes are emulated, with agents in this process, or,
where nodes have network namespaces, with one in each of those.

Started by `assembly`. What is configured of emulated links and nodes goes to the emulation only; the book, and who
reads it, learns of it by measuring.
"""

from __future__ import annotations

from nomad.clock import Clock
from nomad.master.loop import Loop
from nomad.master.state import Desired, Goal, Observed
from nomad.measure.book import Book
from nomad.measure.calibrate import calibrate
from nomad.measure.estimate import smooth
from nomad.measure.local import LocalAgents, report
from nomad.measure.seated import SeatedAgents
from nomad.measure.survey import Survey
from nomad.settings import Pods
from nomad.tasks import alongside


async def measure(desired: Desired, observed: Observed, loop: Loop, book: Book, clock: Clock, *, pods: Pods) -> None:
    """Keep nodes and links measured until cancelled; nodes alone where neither `pods` are shaped nor all have seats."""

    def speed(node: str) -> float:
        return desired.speeds.get(node, observed.nodes[node].speed)

    def used() -> dict[str, tuple[float, float]]:
        found: dict[str, tuple[float, float]] = {}
        for state in observed.pods.values():
            if state.runtime is not None and not state.ended:
                cores, memory_mb = found.get(state.runtime.node, (0.0, 0.0))
                found[state.runtime.node] = cores + (state.stats.busy or 0.0), memory_mb + state.stats.rss / 2**20
        return found

    def needed() -> bool:
        return any(wanted.goal is Goal.RUN and not loop.is_over(id) for id, wanted in desired.pipelines.items())

    def ready() -> list[str]:
        return [node.id for node in observed.nodes.values() if node.ready]

    # First, and alone: it keeps the loop busy by the millisecond, which would add to the round trips.
    machine = smooth(None, await calibrate(clock), clock.now())
    nodes = report(book, machine, lambda: observed.nodes.values(), speed, used, clock)
    if not pods.shaped and not pods.seats.keys() >= observed.nodes.keys():
        await nodes
        return
    there = LocalAgents(observed.nodes, desired.shape, clock) if pods.shaped else SeatedAgents(pods.seats, clock)
    async with there as agents:
        survey = Survey(book, agents, ready, needed, clock)
        try:
            async with alongside(nodes):
                await survey.run()
        finally:
            await survey.close()
