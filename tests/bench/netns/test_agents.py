"""Agents inside namespaces measure what real packets need. As root only."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from nomad.bench.netns.tun import Tun
from nomad.clock import SystemClock
from nomad.control import Shape
from nomad.measure.seated import SeatedAgents
from nomad.topology import Topology

pytestmark = pytest.mark.usefixtures("host")


async def test_they_measure_latency_and_bandwidth(two: Topology) -> None:
    async with Tun().open(two, Path()) as network, SeatedAgents(network.seats, SystemClock()) as agents:
        for shape in (Shape(latency=0.01, bandwidth=1.25e6), Shape(latency=0.03, bandwidth=5e6)):
            await network.set_links([("a", "b", shape), ("b", "a", Shape())])
            await agents.probe("a", "b", 0)
            assert agents.connected("a", "b")
            assert not agents.connected("b", "a")
            probes = [await agents.probe("a", "b", 50_000) for _ in range(9)]
            assert shape.latency <= min(probe.round_trip for probe in probes) < shape.latency + 0.005
            transfer = statistics.median(probe.transfer for probe in probes if probe.transfer is not None)
            assert 50_000 / transfer == pytest.approx(shape.bandwidth, rel=0.25)
