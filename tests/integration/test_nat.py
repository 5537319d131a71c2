"""Nodes that can only dial out, as behind NAT, with real pods: links to them, from them, and between two of them."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from nomad import bundle, pipeline, topology
from nomad.master.app import Master
from nomad.settings import Settings
from tests.integration.test_local import Local, double, ended, numbers, pod_processes, writing
from tests.integration.test_moves import ticking

pytestmark = pytest.mark.slow

TOPOLOGY = """
nodes:
  edge:  {memory: 4Gi, reachable: false}
  home:  {memory: 4Gi, reachable: false}
  cloud: {memory: 4Gi}
"""


class Nat(Local):
    """A master over three nodes of which two can't be dialled."""

    def __init__(self, state: Path) -> None:
        super().__init__(state)
        self.settings = Settings(state=state)
        self.settings = replace(self.settings, pods=replace(self.settings.pods, transport="tcp"))
        self.topology = topology.parse(TOPOLOGY)

    async def begin(self, out: Path, start: str, middle: str, end: str) -> None:
        operators: list[Any] = [ticking, pipeline.operator(double, name="double"), writing(out)]
        data = bundle.make(pipeline.build(operators), self.master.signing_key)
        await self.master.submit(data, id="p", start=start, end=end, moves=False)
        await self.until(lambda: self.phase() == "running" and len(numbers(out)) > 20)
        if self.operator("double").node != middle:
            await self.move(middle)

    async def move(self, node: str) -> None:
        view = await self.master.move("p", "double", node)
        await self.until(lambda: self.master.move_status("p", view.id).state.final)
        view = self.master.move_status("p", view.id)
        assert (view.state, view.error, view.lost, view.doubled) == ("done", "", 0, 0)

    async def more(self, out: Path, count: int) -> None:
        seen = len(numbers(out))
        await self.until(lambda: len(numbers(out)) > seen + count)

    def nobody_dials(self) -> None:
        """No pod on a node that can't be dialled has accepted a connection."""
        nodes = {op.pid: op.node for op in self.master.pipeline("p").operators}
        for process in pod_processes(self.settings.state):
            sockets = process.net_connections(kind="tcp")
            listening = {sock.laddr.port for sock in sockets if sock.status == "LISTEN"}
            assert listening
            accepted = [s for s in sockets if s.status == "ESTABLISHED" and s.laddr.port in listening]
            assert not accepted or nodes.get(process.pid) == "cloud", f"{nodes.get(process.pid)}: {accepted}"

    async def all_is_well(self, out: Path) -> None:
        """Stop, and look at what came out: all of it, once, in order."""
        await self.more(out, 20)
        await self.master.stop("p")
        await self.until(lambda: self.phase() == "stopped")
        got = numbers(out)
        assert got == [2 * n for n in range(len(got))]
        assert self.operator("ticking").stats.emitted == len(got)


@pytest.fixture
async def nat(tmp_path: Path) -> AsyncIterator[Nat]:
    nat = Nat(tmp_path / "state")
    yield nat
    left = pod_processes(nat.settings.state) if nat.settings.state.exists() else []
    for process in left:
        os.killpg(process.pid, signal.SIGKILL)
    end = time.monotonic() + 10
    while not ended(left):
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


async def test_connections_that_are_cut_again_and_again(nat: Nat, tmp_path: Path) -> None:
    """edge to home goes through the relay, home to cloud is dialled by its sender."""
    out = tmp_path / "out"
    async with Master(nat.settings, nat.topology) as nat.master:
        await nat.begin(out, "edge", "home", "cloud")
        for _, name in zip(range(15), cycle(["ticking", "double", "sink"]), strict=False):
            await nat.master.cut("p", name)
            await nat.more(out, 5)
        nat.nobody_dials()
        assert nat.operator("double").restarts == 0
        await nat.all_is_well(out)


async def test_moves_onto_and_off_nodes_that_cannot_be_dialled(nat: Nat, tmp_path: Path) -> None:
    """Each link comes to be dialled from either end, relayed, and local, while messages flow."""
    out = tmp_path / "out"
    async with Master(nat.settings, nat.topology) as nat.master:
        await nat.begin(out, "cloud", "home", "edge")  # home to edge: both can't be dialled; cloud to home: one can't
        nat.nobody_dials()
        for node in ("cloud", "edge", "home"):
            await nat.move(node)
            await nat.master.cut("p", "double")
            await nat.more(out, 5)
        await nat.all_is_well(out)


async def test_pods_that_are_killed_meet_again(nat: Nat, tmp_path: Path) -> None:
    out = tmp_path / "out"
    async with Master(nat.settings, nat.topology) as nat.master:
        await nat.begin(out, "edge", "home", "cloud")
        for _ in range(2):
            restarts = nat.operator("double").restarts
            pid = nat.operator("double").pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            await nat.until(lambda before=restarts: nat.operator("double").restarts > before)  # type: ignore[misc]
            await nat.until(lambda: nat.phase() == "running")
            await nat.more(out, 20)
        nat.nobody_dials()
        await nat.all_is_well(out)
