"""How a pod stays with its master, seen from there: real processes, and ways that end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nomad import pipeline
from nomad.clock import SystemClock
from nomad.errors import TransportError
from nomad.gateway import Gateway
from nomad.handout import key_of
from nomad.measure.agent import Agent
from nomad.tasks import Tasks
from nomad.transport.base import Connection
from nomad.transport.registry import transport_for
from nomad.transport.trunk import Trunk
from tests.actor.pods import Master, endless, master, ready
from tests.contract.transport import pair


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Master]:
    async with master(tmp_path) as made:
        yield made


async def test_a_pod_comes_by_way_of_its_nodes_agent_while_that_is_there(here: Master) -> None:
    agents, tasks = bytes(32), Tasks()
    gateway = Gateway(agents)

    async def read(conn: Connection, trunk: Trunk) -> None:
        with contextlib.suppress(TransportError):
            while True:
                for frame in await conn.recv():
                    trunk.received(frame)

    async with pair(transport_for("inproc:"), "inproc:") as (near, far):
        trunk = Trunk(near)
        tasks.start(read(near, trunk), name="the agent's end")
        accepted = Trunk(far, lambda conn: tasks.start(here.serve(conn), name="a pod") and None)
        tasks.start(read(far, accepted), name="the master's end")
        gateway.opened(trunk)
        agent = Agent("edge", agents, SystemClock(), visits=(gateway,))
        address = await agent.listen("tcp://127.0.0.1:0")

        pod = await ready(here, pipeline.build([endless, str]), 0)
        pod.tell({"type": "via", "address": "tcp://127.0.0.1:1", "key": b""})
        assert await pod.ask("samples") is not None
        assert pod.connections == 1, "an agent that isn't there costs no connection"
        pod.tell({"type": "via", "address": address, "key": key_of(agents, pod.name)})
        await pod.says("ready", 2)
        assert pod.connections == 2
        assert pod.conn is not None
        assert "#" in pod.conn.peer, "it came over the trunk"
        assert await pod.ask("samples") is not None

        await agent.close()
        await pod.says("ready", 3)
        assert "#" not in pod.conn.peer
        assert await pod.ask("samples") is not None
        trunk.lost("the end")
        await tasks.close()


async def test_a_master_that_hangs_up_is_not_dialled_on_and_on(here: Master) -> None:
    pod = await ready(here, pipeline.build([endless, print]), 0)
    began = time.monotonic()
    for number in range(2, 7):
        assert pod.conn is not None
        pod.conn.abort()
        await pod.says("ready", times=number)
    assert time.monotonic() - began > 0.05 * (1 + 2 + 4 + 8 + 16), "each attempt waits twice as long as the one before"


async def test_without_a_master_it_stops_by_itself(here: Master) -> None:
    lonely = here.start("p.lonely-e1", control=f"unix:{here.folder}/nobody", master_timeout=0.1)
    here.key = bytes(32)  # and a master that can't prove itself is none
    fooled = here.start("p.fooled-e1", master_timeout=0.1)
    for pod in (lonely, fooled):
        await pod.until(lambda p=pod: p.process.poll() is not None)
        assert pod.process.returncode == 5
        assert "no master for 0.1 s, stopping" in here.log(pod.name)
    assert fooled.connections == 0
