"""Agents as processes, on seats that are simply this machine. In namespaces: tests/bench/netns/test_agents.py."""

from __future__ import annotations

import asyncio

import pytest

from nomad.clock import SystemClock
from nomad.errors import ConnectionBroken
from nomad.measure.seated import SeatedAgents
from nomad.settings import Seat


async def test_they_probe_each_other() -> None:
    async with SeatedAgents({"a": Seat(), "b": Seat()}, SystemClock()) as agents:
        assert not agents.connected("a", "b")
        there, back = await asyncio.gather(agents.probe("a", "b", 0), agents.probe("b", "a", 100_000))
        assert 0 < there.round_trip < 10.0
        assert there.transfer is None
        assert back.transfer is not None
        assert agents.connected("a", "b")


async def test_one_that_has_ended_is_missed() -> None:
    async with SeatedAgents({"a": Seat(), "b": Seat()}, SystemClock()) as agents:
        await agents.probe("a", "b", 0)
        process = agents._posts["a"]._process
        assert process is not None
        process.kill()
        with pytest.raises(ConnectionBroken, match=r"agent of a (has ended|isn't there)"):
            await agents.probe("a", "b", 0)
        with pytest.raises(ConnectionBroken, match="agent of a isn't there"):
            await agents.probe("b", "a", 0)


async def test_one_that_cannot_be_started_is_missed() -> None:
    seats = {"here": Seat(), "nowhere": Seat(("/no/such/program",)), "bad": Seat(host="192.0.2.1")}
    async with SeatedAgents(seats, SystemClock()) as agents:
        for node in ("nowhere", "bad"):
            with pytest.raises(ConnectionBroken, match=f"agent of {node} isn't there"):
                await agents.probe("here", node, 0)
        assert (await agents.probe("here", "here", 0)).round_trip < 10.0
