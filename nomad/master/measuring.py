"""Measures the cluster beside the loop: on one machine, where all nodes are emulated, with agents in this process, or,
where nodes have network namespaces, with one in each of those; elsewhere with the agents that dial in from the nodes.

Started by `assembly`. What is configured of emulated links and nodes goes to the emulation only; the book, and who
reads it, learns of it by measuring.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from nomad.clock import Clock
from nomad.kubernetes import names
from nomad.master.loop import Loop
from nomad.master.state import Desired, Goal, Observed
from nomad.measure.book import Book
from nomad.measure.calibrate import calibrate
from nomad.measure.estimate import smooth
from nomad.measure.local import LocalAgents, report
from nomad.measure.remote import RemoteAgents
from nomad.measure.seated import SeatedAgents
from nomad.measure.survey import MOST_ELSEWHERE, Survey
from nomad.runtime.base import NodeInfo
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
        survey = Survey(book, agents, ready, lambda: _needed(desired, loop), clock)
        try:
            async with alongside(nodes):
                await survey.run()
        finally:
            await survey.close()


FORGET_EVERY = 5.0
"""Seconds between looks at which nodes have left the cluster."""


async def measure_machines(
    desired: Desired, observed: Observed, loop: Loop, book: Book, clock: Clock, agents: RemoteAgents
) -> None:
    """Keep links measured, by agents on nodes that are machines of their own, until cancelled.

    What the agents say of nodes goes to the book by itself.
    """

    def ready() -> list[str]:
        return [id for id in agents.nodes() if (node := observed.nodes.get(id)) is not None and node.ready]

    survey = Survey(book, agents, ready, lambda: _needed(desired, loop), clock, most=MOST_ELSEWHERE)

    async def forget() -> None:
        known: set[str] = set()
        while True:
            for id in known - observed.nodes.keys():
                survey.forget(id)
            known = set(observed.nodes)
            await clock.sleep(FORGET_EVERY)

    try:
        async with alongside(forget()):
            await survey.run()
    finally:
        await survey.close()


def seen(nodes: Sequence[NodeInfo], behind: Collection[str]) -> Sequence[NodeInfo]:
    """Nodes as the runtime has them, but those that agents can't dial (`behind`), where no label says otherwise."""
    if not behind:
        return nodes
    said = f"{names.REACHABLE_LABEL}=true"
    return [replace(node, reachable=False) if node.id in behind and said not in node.labels else node for node in nodes]


def _needed(desired: Desired, loop: Loop) -> bool:
    """Whether anybody is going to decide by what links are like."""
    return any(wanted.goal is Goal.RUN and not loop.is_over(id) for id, wanted in desired.pipelines.items())
