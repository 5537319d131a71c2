"""The backend `tun`: real packets between namespaces, delayed, shaped and dropped by a program of Nomad's own.

For kernels without netem. `nomad.bench.links` describes the seam and `switch` the program, which this module starts,
asks and ends. Needs root, /dev/net/tun and iproute2.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from nomad.bench.netns import switch
from nomad.bench.netns.namespaces import MTU, NETWORK_BITS, Namespaces, check_host
from nomad.client import Cluster
from nomad.control import Shape
from nomad.errors import UsageError
from nomad.settings import Seat
from nomad.topology import Topology

ANSWER_SECONDS = 10.0
"""How long the switch may take to answer, and to end."""


class Tun:
    """`nomad.bench.links.Backend`."""

    def __init__(self, *, mtu: int = MTU, seed: int = 1) -> None:
        self._mtu = mtu
        self._seed = seed

    @asynccontextmanager
    async def open(self, topology: Topology, folder: Path) -> AsyncIterator[TunNetwork]:
        check()
        nodes = [node.id for node in topology.nodes]
        namespaces = await asyncio.to_thread(Namespaces.make, nodes)
        try:
            network = await TunNetwork.start(namespaces, nodes, self._mtu, self._seed)
            try:
                await network.set_links((link.source, link.target, link.shape) for link in topology.links)
                yield network
            finally:
                await network.close()
        finally:
            await asyncio.to_thread(namespaces.close)


def check() -> None:
    """Raises `UsageError` unless this backend works here."""
    check_host()
    if not Path(switch.TUN).exists():
        raise UsageError(f"there is no {switch.TUN} here: load the kernel module `tun`, or take the links 'shaping'")


class TunNetwork:
    """`nomad.bench.links.Network`. Made by `Tun.open`."""

    shaped = False

    def __init__(self, namespaces: Namespaces, process: asyncio.subprocess.Process) -> None:
        self._namespaces = namespaces
        self._process = process
        self._asking = asyncio.Lock()
        self.real_time = False
        """Whether the switch runs before everything else; where that isn't allowed, its timing suffers under load."""

    @classmethod
    async def start(cls, namespaces: Namespaces, nodes: Iterable[str], mtu: int, seed: int) -> Self:
        """Raises `UsageError`."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            switch.__name__,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the one who started it
        )
        network = cls(namespaces, process)
        try:
            addresses = namespaces.addresses()
            ports = [{"node": n, "namespace": namespaces[n], "address": str(addresses[n])} for n in nodes]
            answer = await network._ask({"ports": ports, "bits": NETWORK_BITS, "mtu": mtu, "seed": seed})
        except BaseException:
            await network.close()
            raise
        network.real_time = answer["real_time"]
        return network

    @property
    def seats(self) -> Mapping[str, Seat]:
        return self._namespaces.seats()

    def attach(self, cluster: Cluster) -> None:
        """The master has no part in these links."""

    async def set_link(self, source: str, target: str, shape: Shape) -> None:
        await self.set_links([(source, target, shape)])

    async def set_links(self, links: Iterable[tuple[str, str, Shape]]) -> None:
        """Several at the same instant. Raises `UsageError` for a pair that isn't there."""
        await self._ask({"shapes": [[source, target, asdict(shape)] for source, target, shape in links]})

    async def stats(self) -> dict[str, Any]:
        """What the switch has counted: `packets`, `bytes`, `lost` and `dropped` of each line, and how late it was."""
        found: dict[str, Any] = await self._ask({"stats": True})
        return found

    async def close(self) -> None:
        """End the switch. Idempotent."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    async def _ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        async with self._asking, asyncio.timeout(ANSWER_SECONDS):
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            line = await self._process.stdout.readline()
        if not line:
            raise UsageError("the program that joins the namespaces has ended; what it printed last says why")
        answer = json.loads(line)
        if "error" in answer:
            raise UsageError(answer["error"])
        return answer["ok"]
