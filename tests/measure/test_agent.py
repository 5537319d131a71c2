"""Agents on real, slowed connections: what they measure is what the links do; and what becomes of faults."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from nomad.clock import SystemClock
from nomad.control import Shape
from nomad.delivery.driver import shake_dialer
from nomad.errors import ConnectionBroken, HandshakeError
from nomad.measure import agent as agents
from nomad.measure.agent import Agent
from nomad.measure.local import LocalAgents
from nomad.transport.base import Connection
from tests.clock import VirtualClock, settle

KEY = bytes(32)


@asynccontextmanager
async def pair(
    shape: Shape | None = None, address: str = "inproc:", key: bytes = KEY
) -> AsyncIterator[tuple[Agent, str]]:
    """An agent `a`, and the address of an agent `b`; both slow down what they send."""
    shaped = shape or Shape()
    a, b = Agent("a", KEY, SystemClock(), lambda _: shaped), Agent("b", key, SystemClock(), lambda _: shaped)
    try:
        yield a, await b.listen(address)
    finally:
        await a.close()
        await b.close()


@pytest.mark.parametrize("address", ["inproc:", "tcp://127.0.0.1:0"])
async def test_a_probe_times_the_way_and_a_transfer_the_bandwidth(address: str) -> None:
    async with pair(Shape(latency=0.03, bandwidth=2e6), address) as (a, b):
        await a.probe("b", b)
        assert a.connected("b")
        probes = [await a.probe("b", b, 100_000) for _ in range(5)]
    assert min(p.round_trip for p in probes) == pytest.approx(0.06, abs=0.01)
    times = sorted(p.transfer for p in probes if p.transfer is not None)
    assert times[2] == pytest.approx(0.05, abs=0.01)


async def test_a_changed_link_shows_in_the_next_probe() -> None:
    shapes = {("a", "b"): Shape(latency=0.001), ("b", "a"): Shape()}
    async with LocalAgents(["a", "b"], lambda x, y: shapes[x, y], SystemClock()) as local:
        assert min([(await local.probe("a", "b", 0)).round_trip for _ in range(5)]) < 0.02
        shapes["b", "a"] = Shape(latency=0.05)
        assert (await local.probe("a", "b", 0)).round_trip > 0.05
        assert local.connected("a", "b")
        assert not local.connected("b", "a")


async def test_an_agent_that_is_not_there_is_an_error() -> None:
    async with pair() as (a, _):
        with pytest.raises(ConnectionBroken):
            await a.probe("c", "inproc:nobody-listens-here")


async def test_an_agent_of_another_cluster_is_refused() -> None:
    async with pair(key=bytes(31) + b"1") as (a, b):
        with pytest.raises(HandshakeError):
            await a.probe("b", b)
        assert not a.connected("b")


async def test_a_probe_that_is_under_way_when_the_connection_ends_fails() -> None:
    shape = Shape()
    async with pair(shape) as (a, b):
        await a.probe("b", b)
        shape.latency = 30.0
        probe = asyncio.ensure_future(a.probe("b", b))
        await settle()
        await a.close()
        with pytest.raises(ConnectionBroken):
            await probe


async def test_no_answer_is_an_error_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agents, "TIMEOUT", 0.05)
    async with pair(Shape(latency=5.0)) as (a, b):
        with pytest.raises(ConnectionBroken, match="hasn't answered"):
            await a.probe("b", b)


async def test_idle_connections_are_closed() -> None:
    clock = VirtualClock()
    a, b = Agent("a", KEY, clock), Agent("b", KEY, clock)
    try:
        await a.probe("b", await b.listen("inproc:"))
        a.close_idle()
        assert a.connected("b")
        await clock.advance(agents.IDLE_SECONDS + 1)
        a.close_idle()
        assert not a.connected("b")
    finally:
        await a.close()
        await b.close()


async def test_handshakes_are_no_part_of_the_round_trips_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = VirtualClock()

    async def shake(conn: Connection, key: bytes, identity: str, hello: dict[str, Any]) -> dict[str, Any]:
        welcome = await shake_dialer(conn, key, identity, hello)
        clock._now += 1.0  # which it takes this process to do it
        return welcome

    monkeypatch.setattr(agents, "shake_dialer", shake)
    asking, others = Agent("a", KEY, clock), [Agent(f"b{k}", KEY, clock) for k in range(6)]
    try:
        ways = [(other.node, await other.listen("inproc:")) for other in others]
        assert await asking.round_trips(ways) == [0.0] * 6
        assert clock.now() == 1006.0
        assert await asking.round_trips(ways) == [0.0] * 6
        assert clock.now() == 1006.0, "connections that stand are used again"
    finally:
        for agent in (asking, *others):
            await agent.close()


async def test_of_several_ways_those_that_fail_or_are_slow_keep_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agents, "TIMEOUT", 0.5)
    monkeypatch.setattr(agents, "NEXT_SECONDS", 0.01)
    shapes = {"slow": Shape(latency=0.2), "silent": Shape(latency=30.0)}
    asking = Agent("a", KEY, SystemClock())
    others = [Agent(id, KEY, SystemClock(), lambda _, id=id: shapes.get(id, Shape())) for id in ("slow", "silent", "b")]
    try:
        ways = [("nobody", "inproc:nobody-listens-here")]
        ways += [(other.node, await other.listen("inproc:")) for other in others]
        nobody, slow, silent, found = await asking.round_trips(ways)
        assert nobody is None
        assert slow is not None
        assert slow >= 0.2
        assert silent is None
        assert found is not None
        assert found < 0.2
        assert [asking.connected(node) for node, _ in ways] == [False, True, False, True]
        assert await asking.round_trips([]) == []
    finally:
        for agent in (asking, *others):
            await agent.close()
