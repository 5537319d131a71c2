"""A cluster with real pods and slowed links is measured, and what is measured is what was set."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from nomad import bundle, pipeline, topology
from nomad.master.app import Master
from nomad.master.views import EstimateView, LinkEstimatesView, OperatorEstimatesView
from nomad.settings import Settings

DEADLINE = 40.0
"""Seconds until a test gives up waiting."""

CLUSTER = """
nodes: {edge: {speed: 0.5}, cloud: {}}
links: [{from: edge, to: cloud, latency: 20ms, bandwidth: 4MB/s}]
"""


def source(nbytes: int, rate: float) -> Callable[[], Iterator[bytes]]:
    def messages() -> Iterator[bytes]:
        import time

        while True:
            yield bytes(nbytes)
            time.sleep(1 / rate)

    return messages


def work(message: bytes) -> bytes:
    import time

    time.sleep(0.008)  # and not by computing: the machine may be busy
    return message[:100]


def sink(message: bytes) -> None:
    pass


@asynccontextmanager
async def cluster(tmp_path: Path) -> AsyncIterator[Master]:
    settings = Settings.from_environment({}, state=tmp_path)
    async with Master(settings, topology.parse(CLUSTER)) as master:
        yield master


async def run(master: Master, nbytes: int, rate: float) -> None:
    operators = [source(nbytes, rate), pipeline.operator(work, pin="edge"), sink]
    data = bundle.make(pipeline.build(operators), master.signing_key)
    await master.submit(data, id="p", start="edge", end="cloud", moves=False)


def link(master: Master) -> LinkEstimatesView:
    return next(view.estimates for view in master.links() if (view.source, view.target) == ("edge", "cloud"))


def operator(master: Master, name: str) -> OperatorEstimatesView:
    return next(op.estimates for op in master.pipeline("p").operators if op.name == name)


async def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "what was waited for didn't happen"
        await asyncio.sleep(0.05)


def near(estimate: EstimateView | None, value: float, samples: int = 1) -> bool:
    """Within what a busy machine may add."""
    return estimate is not None and estimate.samples >= samples and 0.6 * value <= estimate.value <= 1.6 * value


async def test_idle_links_and_nodes_are_measured_from_the_start(tmp_path: Path) -> None:
    async with cluster(tmp_path) as master:
        await until(lambda: near(link(master).latency, 0.02, samples=2))
        await until(lambda: near(link(master).bandwidth, 4e6))
        await until(lambda: all(node.estimates.speed and node.estimates.speed.samples for node in master.nodes()))
        edge, cloud = (master.node(name).estimates.speed for name in ("edge", "cloud"))
        assert edge is not None
        assert cloud is not None
        assert edge.value == pytest.approx(cloud.value / 2)


@pytest.mark.slow
async def test_what_messages_tell_of_operators_and_links(tmp_path: Path) -> None:
    async with cluster(tmp_path) as master:
        await run(master, 2000, 25)
        await until(lambda: (known := operator(master, "work").work) is not None and known.samples >= 6)
        known = operator(master, "work")
        speed = master.node("edge").estimates.speed
        assert speed is not None
        assert known.service is not None
        assert known.work is not None
        assert near(known.service, 0.016), "8 ms, and twice as long on the slow node"
        assert known.work.value == pytest.approx(known.service.value * speed.value, rel=0.3)
        assert near(known.arrival, operator(master, "messages").departure.value)  # type: ignore[union-attr]
        assert near(known.output_bytes, 102)
        await until(lambda: near(link(master).latency, 0.02, samples=8))
        await master.set_link("edge", "cloud", latency=0.15)
        await master.set_link("cloud", "edge", latency=0.15)
        changed = time.monotonic()
        await until(lambda: near(link(master).latency, 0.15))
        assert time.monotonic() - changed < 15, "a drift must be seen within seconds"


@pytest.mark.slow
async def test_large_messages_tell_the_bandwidth(tmp_path: Path) -> None:
    async with cluster(tmp_path) as master:
        data = bundle.make(pipeline.build([source(100_000, 4), sink]), master.signing_key)
        await master.submit(data, id="p", start="edge", end="cloud", moves=False)
        await until(lambda: near(link(master).bandwidth, 4e6, samples=8))
        await master.set_link("edge", "cloud", bandwidth=1e6)
        await until(lambda: near(link(master).bandwidth, 1e6))
        assert near(link(master).latency, 0.02), "it isn't taken for latency"
