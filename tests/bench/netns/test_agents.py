"""Agents inside namespaces measure what real packets need. As root only."""

from __future__ import annotations

import asyncio
import statistics
from pathlib import Path

import pytest

from nomad.bench.netns.tun import Tun
from nomad.clock import SystemClock
from nomad.control import Shape
from nomad.errors import ConnectionBroken
from nomad.measure.seated import SeatedAgents
from nomad.settings import Seat
from nomad.topology import Topology

pytestmark = pytest.mark.usefixtures("host")


async def test_they_measure_latency_and_bandwidth(two: Topology) -> None:
    async with Tun().open(two, Path()) as network, SeatedAgents(network.seats, SystemClock()) as agents:
        for shape in (Shape(latency=0.01, bandwidth=1.25e6), Shape(latency=0.03, bandwidth=5e6)):
            await network.set_links([("a", "b", shape), ("b", "a", Shape())])
            await agents.probe("a", "b", 0)
            assert agents.connected("a", "b")
            assert not agents.connected("b", "a")
            probes = [await agents.probe("a", "b", 50_000) for _ in range(5)]
            assert shape.latency <= statistics.median(probe.round_trip for probe in probes) < shape.latency + 0.005
            transfer = statistics.median(probe.transfer for probe in probes if probe.transfer is not None)
            assert 50_000 / transfer == pytest.approx(shape.bandwidth, rel=0.15)


async def test_two_probes_at_once(two: Topology) -> None:
    async with Tun().open(two, Path()) as network, SeatedAgents(network.seats, SystemClock()) as agents:
        await network.set_link("a", "b", Shape(latency=0.05))
        found = await asyncio.gather(*(agents.probe(*way, 0) for way in (("a", "b"), ("b", "a"))))
        assert all(probe.round_trip >= 0.05 for probe in found)


async def test_an_agent_that_has_ended_is_missed(two: Topology) -> None:
    async with Tun().open(two, Path()) as network, SeatedAgents(network.seats, SystemClock()) as agents:
        await agents.probe("a", "b", 0)
        process = agents._posts["a"]._process
        assert process is not None
        process.kill()
        with pytest.raises(ConnectionBroken, match="agent of a has ended|agent of a isn't there"):
            await agents.probe("a", "b", 0)
        with pytest.raises(ConnectionBroken, match="agent of a isn't there"):
            await agents.probe("b", "a", 0)


async def test_one_that_cannot_be_started_is_missed() -> None:
    seats = {"here": Seat(), "nowhere": Seat(("/no/such/program",)), "bad": Seat(host="192.0.2.1")}
    async with SeatedAgents(seats, SystemClock()) as agents:
        for node in ("nowhere", "bad"):
            with pytest.raises(ConnectionBroken, match=f"agent of {node} isn't there"):
                await agents.probe("here", node, 0)
        assert (await agents.probe("here", "here", 0)).round_trip < 1.0
