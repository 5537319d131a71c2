"""The agents of a cluster on one machine: in the master's process, over connections slowed down as data links are.

They measure what the pods would: when an emulated link is changed, only the next probes tell. The machine is calibrated
once, since all nodes are this machine; a node's speed is that, times how fast it is emulated, which is what a
calibration stretched like its pods would find. Used by the master's assembly. Must not be asked for what is configured.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

from nomad.clock import Clock
from nomad.control import Shape
from nomad.measure.agent import Agent, Probe
from nomad.measure.book import Book
from nomad.measure.calibrate import calibrate
from nomad.measure.estimate import Estimate, smooth
from nomad.measure.survey import one_by_one
from nomad.runtime.base import NodeInfo

REPORT_SECONDS = 1.0
"""How often a node says how fast it is and what is free."""

CALIBRATE_SECONDS = 30.0
"""How often the machine is timed again: by a short run, since its speed hardly changes."""

SHORT_ROUNDS = 3


class LocalAgents:
    """One agent per node, as `survey.Prober`. An async context: agents listen inside."""

    def __init__(self, nodes: Iterable[str], shape: Callable[[str, str], Shape], clock: Clock) -> None:
        """`shape` says how the way from one node to another is emulated now."""
        key = secrets.token_bytes(32)
        self._clock = clock
        self._agents = {node: Agent(node, key, clock, self._towards(shape, node)) for node in nodes}
        self._addresses: dict[str, str] = {}
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        for node, agent in self._agents.items():
            self._stack.push_async_callback(agent.close)
            self._addresses[node] = await agent.listen("inproc:")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    def connected(self, source: str, target: str) -> bool:
        return self._agents[source].connected(target)

    async def probe(self, source: str, target: str, nbytes: int) -> Probe:
        self._agents[source].close_idle()
        return await self._agents[source].probe(target, self._addresses[target], nbytes)

    async def round_trips(self, source: str, targets: Sequence[str]) -> Sequence[float | None]:
        return await one_by_one(self, source, targets)

    @staticmethod
    def _towards(shape: Callable[[str, str], Shape], node: str) -> Callable[[str], Shape]:
        return lambda other: shape(node, other)


async def report(
    book: Book,
    machine: Estimate,
    nodes: Callable[[], Iterable[NodeInfo]],
    speed: Callable[[str], float],
    used: Callable[[], dict[str, tuple[float, float]]],
    clock: Clock,
) -> None:
    """Tell the book about the nodes until cancelled.

    `machine`: how fast a core is. `speed`: how fast a node is emulated; above 1 it is as fast as the machine. `used`:
    of each node the cores and MiB that its pods use.
    """
    while True:
        taken = used()
        for node in nodes():
            cores, memory_mb = taken.get(node.id, (0.0, 0.0))
            book.node_sample(
                node.id,
                clock.now(),
                speed=machine.value * min(1.0, speed(node.id)),
                cores_free=max(0.0, node.cores - cores),
                memory_free_mb=max(0.0, node.memory_mb - memory_mb),
            )
        await clock.sleep(REPORT_SECONDS)
        if machine.age(clock.now()) >= CALIBRATE_SECONDS:
            machine = smooth(machine, await calibrate(clock, SHORT_ROUNDS), clock.now())
