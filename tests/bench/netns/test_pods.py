"""Pipelines over links of real packets, with each node's pods in its namespace. As root only."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from nomad import bundle, pipeline, topology
from nomad.bench import links, synthetic
from nomad.control import Shape
from nomad.master.app import Master
from nomad.settings import Pods, Settings

DEADLINE = 45.0

pytestmark = [pytest.mark.usefixtures("host"), pytest.mark.no_cover]


@dataclass(slots=True)
class World:
    """A running pipeline: source on edge, work on fog, sink on cloud."""

    folder: Path
    master: Master
    network: links.Network

    def latencies(self) -> list[float]:
        return [arrival.arrived - arrival.made for arrival in synthetic.arrivals(self.folder)]

    async def more(self, count: int) -> list[float]:
        """Latencies of the next `count` messages."""
        before = len(self.latencies())
        await self.until(lambda: len(self.latencies()) >= before + count)
        return self.latencies()[before : before + count]

    async def until(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + DEADLINE
        while not condition():
            assert time.monotonic() < end, self.master.pipelines()
            await asyncio.sleep(0.02)

    async def stop(self) -> None:
        await self.master.stop("p")
        await self.until(lambda: self.master.pipeline("p").phase == "stopped")


@asynccontextmanager
async def world(folder: Path, backend: str, declared: str, message_bytes: int = 1024) -> AsyncIterator[World]:
    nodes = topology.parse("nodes: {edge: {}, fog: {}, cloud: {}}\n" + declared)
    synthetic.turn(folder, rate=200.0, work={"work": 0.0})
    functions = synthetic.functions(folder, [synthetic.Made("work", message_bytes)], message_bytes)
    async with links.backend(backend).open(nodes, folder) as network:
        pods = Pods(transport="tcp", shaped=network.shaped, seats=network.seats, master_timeout=10.0)
        async with Master(Settings(state=folder / "state", pods=pods), nodes) as master:
            data = bundle.make(pipeline.build(functions), master.signing_key)
            await master.submit(data, id="p", start="edge", end="cloud", moves=False, pins={"work": "fog"})
            running = World(folder, master, network)
            await running.until(running.latencies)
            yield running


async def test_pods_run_in_the_namespace_of_their_node(tmp_path: Path) -> None:
    async with world(tmp_path, "tun", "links: [{from: edge, to: fog, latency: 20ms}]") as running:
        for operator in running.master.pipeline("p").operators:
            name = running.network.seats[operator.node].prefix[1].removeprefix("--net=")
            assert os.stat(f"/proc/{operator.pid}/ns/net").st_ino == os.stat(name).st_ino
        assert 0.02 <= min(await running.more(50)) < 0.03
        await running.network.set_link("fog", "cloud", Shape(latency=0.05))
        await running.more(50)  # some were sent before
        assert 0.07 <= min(await running.more(50)) < 0.08
        await running.stop()
        assert synthetic.outcome(running.folder).lost == 0


@pytest.mark.slow
async def test_links_are_measured_by_what_their_packets_need(tmp_path: Path) -> None:
    """The master isn't told of a change: the pipeline's own messages tell, and agents where there are none."""
    declared = "links: [{from: edge, to: fog, latency: 10ms}, {from: edge, to: cloud, latency: 30ms}]"
    async with world(tmp_path, "tun", declared) as running:
        book = running.master._parts.book

        def latency(source: str, target: str) -> float | None:
            estimate = book.link(source, target).latency
            return estimate.value if estimate is not None and estimate.measured else None

        def about(source: str, target: str, seconds: float) -> bool:
            found = latency(source, target)
            return found is not None and 0.95 * seconds <= found < 1.1 * seconds + 0.005

        await running.until(lambda: about("edge", "fog", 0.01) and about("edge", "cloud", 0.03))
        await running.network.set_link("edge", "fog", Shape(latency=0.05))  # one direction: half of the round trip
        await running.network.set_link("edge", "cloud", Shape(latency=0.1))
        await running.until(lambda: about("edge", "fog", 0.03) and about("edge", "cloud", 0.065))


async def test_a_lossy_link_loses_no_message(tmp_path: Path) -> None:
    declared = "links: [{from: edge, to: fog, latency: 2ms, loss: 0.05}, {from: fog, to: cloud, latency: 2ms}]"
    async with world(tmp_path, "tun", declared) as running:
        await running.more(300)
        await running.stop()
        outcome = synthetic.outcome(running.folder)
        assert (outcome.lost, outcome.doubled, outcome.disorder) == (0, 0, 0)
        assert outcome.arrived >= 300
