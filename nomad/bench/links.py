"""The seam for link backends: what makes the network between the nodes of a benchmark slow.

The same scenario runs with any of them:

    shaping  the transport holds messages back; anywhere, the default
    netem    `tc netem` between network namespaces, as root
    tun      a program on TUN devices that delays, shapes and drops packets between namespaces, as root

A backend is opened before the master starts, for one run, and closed after the last pod has ended:

    async with backend(name).open(topology, folder) as network:     # namespaces and links are there, as declared
        settings.pods.seats = network.seats                         # where pods run, and where they listen
        settings.pods.shaped = network.shaped
        async with serve(settings, topology) ...:
            network.attach(cluster)
            await network.set_link("edge", "cloud", Shape(latency=0.1))     # whenever the timeline says so

The runner is the only caller. Closing must remove all that was made, also after a failure or Ctrl-C.
"""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Protocol

from nomad.client import Cluster
from nomad.control import Shape
from nomad.settings import Seat
from nomad.topology import Topology

BACKENDS = {
    "shaping": "nomad.bench.links:Shaping",
    "netem": "nomad.bench.netns.netem:Netem",
    "tun": "nomad.bench.netns.tun:Tun",
}
"""Name -> `module:class`; a class is only imported when its backend is asked for."""


class Network(Protocol):
    """The links of one run, while they are there."""

    @property
    def seats(self) -> Mapping[str, Seat]:
        """Per node: the command before its pods' (`ip netns exec NAME`) and the address where they listen.

        Empty when pods run and listen as they always do.
        """
        ...

    @property
    def shaped(self) -> bool:
        """Whether it is the transport that is to delay messages; False where packets are delayed anyway."""
        ...

    def attach(self, cluster: Cluster) -> None:
        """The run's master is up; called once, before the first `set_link`."""
        ...

    async def set_link(self, source: str, target: str, shape: Shape) -> None:
        """The directed link from node to node is like this from now on: latency one way, all fields at once."""
        ...


class Backend(Protocol):
    """Makes networks. Its class takes no arguments."""

    def open(self, topology: Topology, folder: Path) -> AbstractAsyncContextManager[Network]:
        """The links of `topology` as declared; pairs that it doesn't declare are left alone. `folder` is the run's own.

        Raises `UsageError` that says what is missing (root, a kernel module, a program) and which backend works.
        """
        ...


def backend(name: str) -> Backend:
    """The backend of that name, one of `BACKENDS`."""
    module, _, attribute = BACKENDS[name].partition(":")
    made: Backend = getattr(importlib.import_module(module), attribute)()
    return made


class Shaping:
    """Links emulated by the pods' own transport."""

    @asynccontextmanager
    async def open(self, topology: Topology, folder: Path) -> AsyncIterator[Network]:
        """Nothing has to be made: the master tells pods how to treat their links."""
        yield _Shaped()


class _Shaped:
    seats: Mapping[str, Seat] = {}
    shaped = True

    def attach(self, cluster: Cluster) -> None:
        self._cluster = cluster

    async def set_link(self, source: str, target: str, shape: Shape) -> None:
        await self._cluster.set_link(
            source,
            target,
            latency=shape.latency,
            jitter=shape.jitter,
            bandwidth="unlimited" if shape.bandwidth is None else shape.bandwidth,
            loss=shape.loss,
        )
