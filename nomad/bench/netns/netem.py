"""The backend `netem`: veth pairs between namespaces, slowed down by the kernel's own `tc netem`.

Every pair of nodes has a veth pair of its own, so that each direction is the one queue of one device. A device and its
counterpart are named after the node at the other end, `to<number>`. `nomad.bench.links` describes the seam. Needs root,
iproute2 and a kernel with sch_netem; without that, `tun` does the same in user space.

Other than with `tun`, packets overtake each other where there is jitter and no bandwidth.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from nomad.bench.netns.line import HELD_BYTES, QUEUE_BYTES, QUEUE_SECONDS
from nomad.bench.netns.namespaces import MTU, Namespaces, check_host, ip, run
from nomad.client import Cluster
from nomad.control import Shape
from nomad.errors import UsageError
from nomad.settings import Seat
from nomad.topology import Topology

PACKET_BYTES = 1500
"""netem counts what it holds in packets; this is the least size that its limit is made for."""


class Netem:
    """`nomad.bench.links.Backend`."""

    @asynccontextmanager
    async def open(self, topology: Topology, folder: Path) -> AsyncIterator[NetemNetwork]:
        check_host("tc")
        nodes = [node.id for node in topology.nodes]
        namespaces = await asyncio.to_thread(Namespaces.make, nodes)
        try:
            await asyncio.to_thread(check_kernel, namespaces[nodes[0]])
            await asyncio.to_thread(mesh, namespaces)
            network = NetemNetwork(namespaces)
            for link in topology.links:
                await network.set_link(link.source, link.target, link.shape)
            yield network
        finally:
            await asyncio.to_thread(namespaces.close)


class NetemNetwork:
    """`nomad.bench.links.Network`. Made by `Netem.open`."""

    shaped = False

    def __init__(self, namespaces: Namespaces) -> None:
        self._namespaces = namespaces
        self._shapes: dict[tuple[str, str], Shape] = {}

    @property
    def seats(self) -> Mapping[str, Seat]:
        return self._namespaces.seats()

    def attach(self, cluster: Cluster) -> None:
        """The master has no part in these links."""

    async def set_link(self, source: str, target: str, shape: Shape) -> None:
        """Raises `UsageError` for a pair that isn't there."""
        nodes = list(self._namespaces)
        if source not in nodes or target not in nodes or source == target:
            raise UsageError(f"there is no link from {source!r} to {target!r}")
        device = f"to{nodes.index(target)}"
        before = self._shapes.get((source, target), Shape())
        if command := change(self._namespaces[source], device, before, shape):
            await asyncio.to_thread(run, command)
        self._shapes[source, target] = shape


def check_kernel(namespace: str) -> None:
    """Raises `UsageError` unless the kernel has netem; tried on the loopback of a namespace that nobody uses yet."""
    try:
        run(change(namespace, "lo", Shape(), Shape(latency=0.001)))
        run(change(namespace, "lo", Shape(latency=0.001), Shape()))
    except UsageError as exc:
        raise UsageError(
            f"this kernel has no netem (module sch_netem): {exc}. Take the links 'tun', which need no such module"
        ) from exc


def change(namespace: str, device: str, before: Shape, shape: Shape) -> list[str]:
    """The command that makes a device's link like `shape`; empty when there is nothing to do."""
    start = ["tc", "-n", namespace, "qdisc"]
    if shape == Shape():
        return [] if before == Shape() else [*start, "delete", "dev", device, "root"]
    return [*start, "replace", "dev", device, "root", "netem", *parameters(shape)]


def parameters(shape: Shape) -> list[str]:
    """`shape` as `tc netem` takes it. The limit has room for what is on the way and for the same queue as `tun` has."""
    if shape.bandwidth is None:
        limit = HELD_BYTES / PACKET_BYTES
    else:
        queue = max(QUEUE_SECONDS * shape.bandwidth, QUEUE_BYTES)
        limit = (queue + (shape.latency + shape.jitter) * shape.bandwidth) / PACKET_BYTES
    found = ["limit", str(math.ceil(limit)), "delay", f"{round(1e6 * shape.latency)}us"]
    if shape.jitter:
        found.append(f"{round(1e6 * shape.jitter)}us")
    if shape.loss:
        found += ["loss", f"{100 * shape.loss:.6f}%"]
    if shape.bandwidth is not None:
        found += ["rate", f"{round(8 * shape.bandwidth)}bit"]
    return found


def mesh(namespaces: Namespaces) -> None:
    """A veth pair between each two namespaces. Raises `UsageError`."""
    nodes, addresses = list(namespaces), namespaces.addresses()
    pairs = list(itertools.combinations(range(len(nodes)), 2))
    run(
        ["ip", "-batch", "-"],
        "\n".join(
            f"link add to{b} netns {namespaces[nodes[a]]} type veth peer name to{a} netns {namespaces[nodes[b]]}"
            for a, b in pairs
        ),
    )
    for node in nodes:
        peers = [(f"to{number}", addresses[peer]) for number, peer in enumerate(nodes) if peer != node]
        ip(namespaces[node], _wiring(str(addresses[node]), [(device, str(address)) for device, address in peers]))


def _wiring(own: str, peers: Iterable[tuple[str, str]]) -> list[str]:
    """The `ip` commands of one namespace. Its address is the loopback's, as it is the same on all its devices."""
    commands = [f"address add {own}/32 dev lo"]
    for device, address in peers:
        # One packet a segment: netem would delay, and lose, what the kernel has put together as one.
        commands.append(f"link set dev {device} mtu {MTU} addrgenmode none gso_max_segs 1 up")
        commands.append(f"route add {address}/32 dev {device} src {own}")
    return commands
