"""From heart-beats to the book, and from there to views and metrics: on a fake runtime and virtual time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from nomad.cli.common import duration, estimate
from nomad.control import Shape
from nomad.master.observe import Observer
from nomad.master.pace import Pace
from nomad.master.state import Observed
from nomad.master.views import EstimateView
from nomad.measure.book import Book
from nomad.runtime.base import LinkInfo
from nomad.settings import Heartbeats
from nomad.topology import Topology
from tests.clock import VirtualClock
from tests.master.fakepods import Cluster

PROFILE = [{}, {"cloud_execution_time": 0.5, "output_msg_size": 100}, {}]


def link(name: str, **fields: Any) -> dict[str, Any]:
    return {"link": name, "direction": "out", "state": "open", "connected": True, **fields}


async def beats(cluster: Cluster, count: int) -> None:
    """The pod of `square`, 20 messages a beat of 10 ms each, half a second apart; its way to the sink takes 30 ms."""
    pod = cluster.pods[cluster.operator("square").pod]
    sink = cluster.operator("sink").epoch
    for number in range(count):
        done = 20 * number
        pod.beat(
            received=done,
            processed=done,
            emitted=done,
            sent_bytes=done * 64,
            busy_seconds=done * 0.01,
            links=[link("p:square>sink", peer_epoch=sink, rtt_least=0.06, bandwidth=2e6, reached=1e3)],
        )
        await cluster.until(lambda n=done: cluster.operator("square").stats.processed == n)
        await cluster.clock.advance(0.5)


@pytest.mark.parametrize("at", [0.5, 0.0, -1.0, 5e-324, math.inf, math.nan, None])
async def test_a_rate_is_that_of_the_clock_of_a_pod_where_that_can_be(at: float | None) -> None:
    observed, clock = Observed(), VirtualClock()
    observer = Observer(observed, Book(), clock, lambda: None, Pace(Heartbeats(), clock))
    for number in range(4):
        stats = {"processed": 5 * number} | ({} if at is None else {"at": at * number})
        observer.said("p.f-e1", "p.f", {"type": "heartbeat", "stats": stats})
        await clock.advance(0.5)
    assert observed.pods["p.f-e1"].rate == pytest.approx(10)


async def test_heartbeats_become_estimates_in_views_and_metrics(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    async with cluster.run() as master:
        await cluster.submit_and_run()
        source = cluster.operator("square")
        assert source.estimates.work is None
        other = "edge" if source.node == "cloud" else "cloud"
        await beats(cluster, 12)
        known = cluster.operator("square").estimates
        assert known.settled
        assert known.work is not None
        assert known.work.value == pytest.approx(0.01), "of a node that is declared as fast as the reference core"
        assert known.arrival is not None
        assert known.arrival.value == pytest.approx(40)
        assert known.output_bytes is not None
        assert known.output_bytes.value == 64
        links = {(view.source, view.target): view.estimates for view in master.links()}
        sink = cluster.operator("sink").node
        if source.node != sink:
            latency, bandwidth = links[source.node, sink].latency, links[source.node, sink].bandwidth
            assert latency is not None
            assert latency.value == pytest.approx(0.03)
            assert latency.age <= 1.0
            assert bandwidth is not None
            assert bandwidth.value == pytest.approx(2e6)
            assert (
                b'nomad_link_latency_seconds{source="%s",target="%s"} 0.03'
                % (
                    source.node.encode(),
                    sink.encode(),
                )
                in await master.metrics()
            )
        else:
            assert links[source.node, other].latency is None, "inside a node there is no link to measure"
        assert b"nomad_operator_work_reference_seconds" in await master.metrics()
        await master.remove("p")
        assert master._parts.book.operator("p", "square").work is None


async def test_what_is_declared_or_profiled_is_shown_as_such(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    shape = Shape(latency=0.04, bandwidth=1e6)
    cluster.topology = Topology(cluster.topology.nodes, (LinkInfo("edge", "cloud", shape),))
    async with cluster.run() as master:
        await cluster.submit("p", profile=PROFILE)
        work = cluster.operator("square").estimates.work
        assert work is not None
        assert (work.value, work.samples) == (0.5, 0)
        await master.set_link("edge", "cloud", latency=1.0)
        known = next(view.estimates for view in master.links() if view.source == "edge")
        assert known.latency is not None
        assert (known.latency.value, known.latency.samples) == (0.04, 0), "a change has to be measured"
        speed = master.node("edge").estimates.speed
        assert speed is not None
        assert (speed.value, speed.samples) == (1.0, 0)
        assert b"nomad_node_speed{" not in await master.metrics()
        await master.update_profile("p", [{}, {"cloud_execution_time": 0.25}, {}])
        work = cluster.operator("square").estimates.work
        assert work is not None
        assert work.value == 0.25


def test_how_estimates_are_printed() -> None:
    assert estimate(None, duration) is None
    assert estimate(EstimateView(0.012, 0.001, 1.0, 5, True), duration) == "12 ms ± 1 ms"
    assert estimate(EstimateView(0.012, 0.006, 1.0, 0, False), duration) == "12 ms?"
