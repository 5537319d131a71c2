"""What reading the state of a large cluster over REST costs its master, and how long that holds up its event loop.

    python -m benchmarks.metrics_scale [--nodes 1000] [--pipelines 500] [--operators 10] [--quick] [--json OUT]

The master is one whose state is made up: its pods have all sent heart-beats, and nothing else happens. A process of its
own asks. CPU is the master's, of all its threads. "busy" is the most CPU that the loop took before it came round again,
"held up" the same by the wall clock, which on a machine that is shared others' work is part of; both are what a scrape
adds to the delay of heart-beats. Exit code 1 when a scrape keeps the loop busy for more than 50 ms at a time.
"""

from __future__ import annotations

import asyncio
import gc
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from aiohttp import web

from benchmarks import harness
from nomad.clock import SystemClock
from nomad.control import PodStats
from nomad.master import cycles
from nomad.master.app import Master
from nomad.master.assembly import Parts
from nomad.master.rest import webapp
from nomad.master.rest.http import server
from nomad.master.state import (
    Desired,
    DesiredPipeline,
    History,
    Observed,
    PodState,
    Requested,
    RequestedOperator,
    RequestedPipeline,
    operator_id,
)
from nomad.master.views import DataLinkView, PlacementView
from nomad.measure.book import Book
from nomad.measure.vivaldi import Coordinates
from nomad.pipeline import Kind, OperatorSpec, PipelineSpec
from nomad.runtime.base import NodeInfo, ObservedPod, PodPhase
from nomad.settings import Settings

TOKEN = "benchmark"
BUSY_BAR = 0.05
NEIGHBOURS = 6
"""Others that each node has probed."""
TICK = 0.001

CLIENT = """
import sys, urllib.request
url, token, coding = sys.argv[1:]
request = urllib.request.Request(url, headers={"Authorization": "Bearer " + token, "Accept-Encoding": coding})
with urllib.request.urlopen(request) as answer:
    print(len(answer.read()))
"""


@dataclass(frozen=True, slots=True)
class Read:
    """One request."""

    size: int
    """Bytes of the body as it was sent."""
    cpu: float
    busy: float
    held_up: float


class State:
    """What a master of `pipelines` with so many operators each, on so many nodes, would know; the same every time."""

    def __init__(self, nodes: int, pipelines: int, operators: int) -> None:
        self._random = random.Random(1)
        self.clock = SystemClock()
        self.desired, self.observed, self.book = Desired(), Observed(), Book()
        self._now = self.clock.now()
        self._nodes = [f"node-{number:04}" for number in range(nodes)]
        self.observed.nodes = {
            id: NodeInfo(id, cores=4, memory_mb=8192.0, labels=frozenset({"edge"}), python="3.11") for id in self._nodes
        }
        self.book.use_coordinates(Coordinates(self._random))
        for id in self._nodes:
            self.book.node_sample(id, self._now, speed=1.0, cores_free=3.0, memory_free_mb=4096.0)
            for other in self._random.sample(self._nodes, min(NEIGHBOURS, nodes)):
                self.book.link_sample(id, other, self._now, round_trip=self._random.uniform(0.001, 0.1))
        self.requested = Requested(
            {f"pipeline-{n}": self._pipeline(f"pipeline-{n}", operators) for n in range(pipelines)}
        )

    def _pipeline(self, id: str, operators: int) -> RequestedPipeline:
        names = [f"operator-{number}" for number in range(operators)]
        where = {name: self._random.choice(self._nodes) for name in names}
        edges = tuple(zip(names, names[1:], strict=False))
        self.desired.pipelines[id] = DesiredPipeline(
            spec=PipelineSpec(
                id, tuple(OperatorSpec(name, Kind.FUNCTION) for name in names), edges, where[names[0]], where[names[-1]]
            ),
            bundle="digest",
            link_key=bytes(32),
            created=1.0,
            placement={name: PlacementView(where[name], "it is near both ends and has the memory") for name in names},
        )
        asked = {}
        for name in names:
            pod = f"{operator_id(id, name)}-e1"
            asked[name] = RequestedOperator(
                epoch=1, highest=1, node=where[name], pod=pod, last_pod=pod, asked_at=self._now, ready=True
            )
            self.observed.pods[pod] = self._pod(id, name, where[name], pod, edges)
            if self._random.random() < 0.1:
                self.observed.history[operator_id(id, name)] = History(PodStats(processed=1000, received=1000))
        for source, target in edges:
            self.book.link_sample(where[source], where[target], self._now, round_trip=0.01, bandwidth=1e7)
        return RequestedPipeline(asked, was_running=True)

    def _pod(self, id: str, name: str, node: str, pod: str, edges: tuple[tuple[str, str], ...]) -> PodState:
        count = self._random.randrange(10**7)
        stats = PodStats(
            received=count, processed=count, emitted=count, sent_bytes=count * 1024, output_bytes=1024.5,
            service_time=self._random.random() / 100, busy=self._random.random(), busy_seconds=count / 1000,
            latency_p50=0.0123, latency_p99=0.0456, rss=42_000_000 + count, cpu=self._random.random() * 1000,
        )  # fmt: skip
        for beat in range(4):
            stats = replace(
                stats,
                received=stats.received + 40,
                processed=stats.processed + 40,
                emitted=stats.emitted + 40,
                busy_seconds=stats.busy_seconds + 0.4,
                sent_bytes=stats.sent_bytes + 40960,
            )
            self.book.heartbeat(id, name, pod, node, stats, self._now + beat)
        links = [
            DataLinkView(f"{id}:{a}>{b}", "out" if a == name else "in", "open", True, 1, 0.01, 0.01, 1e7)
            for a, b in edges
            if name in (a, b)
        ]
        return PodState(
            runtime=ObservedPod(pod, PodPhase.RUNNING, node, 1, pid=1),
            connection=1,
            assigned=True,
            ready_at=self._now,
            pid=1,
            heartbeat_at=self._now,
            stats=stats,
            links=links,
            rate=40.0,
        )


class Ticks:
    """How long the loop was kept from coming round."""

    def __init__(self) -> None:
        self.busy = self.held_up = 0.0

    async def run(self) -> None:
        while True:
            wall, cpu = time.monotonic(), time.thread_time()
            await asyncio.sleep(TICK)
            self.busy = max(self.busy, time.thread_time() - cpu)
            self.held_up = max(self.held_up, time.monotonic() - wall - TICK)


@asynccontextmanager
async def serving(state: State) -> AsyncIterator[str]:
    """A master with that state, on a port of loopback. Gives its address."""
    with tempfile.TemporaryDirectory() as folder:
        master = Master(Settings(Path(folder)), None)
        master._opened = cast(
            Parts,
            SimpleNamespace(
                desired=state.desired,
                loop=SimpleNamespace(requested=state.requested),
                observed=state.observed,
                book=state.book,
                clock=state.clock,
                port=SimpleNamespace(connections={"direct": len(state.observed.pods), "agent": 0}),
            ),
        )
        runner = server.runner(webapp.application(master, token=TOKEN))
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            host, port = runner.addresses[0]
            yield f"http://{host}:{port}"
        finally:
            await runner.cleanup()


async def read(url: str, coding: str) -> Read:
    """Ask once."""
    ticks = Ticks()
    ticking = asyncio.create_task(ticks.run())
    client = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CLIENT, url, TOKEN, coding, stdout=asyncio.subprocess.PIPE
    )
    await asyncio.sleep(0.01)
    ticks.busy = ticks.held_up = 0.0  # starting a process isn't what is measured
    cpu = time.process_time()
    said, _ = await client.communicate()
    cpu = time.process_time() - cpu
    ticking.cancel()
    await asyncio.gather(ticking, return_exceptions=True)
    return Read(int(said), cpu, ticks.busy, ticks.held_up)


def cases() -> Iterator[tuple[str, str]]:
    """Path and the coding that the reader accepts."""
    for path in ("/metrics", "/api/v1/pipelines", "/api/v1/links", "/api/v1/nodes"):
        yield path, "identity"
        yield path, "gzip"


async def measure(args: Any) -> dict[str, Any]:
    """Per request: medians over runs, and the longest hold-up of all."""
    gc.set_threshold(cycles.COLLECT_AFTER, *gc.get_threshold()[1:])  # this and `freeze` as `nomad master` does
    state = State(args.nodes or 1000, args.pipelines or 500, args.operators or 10)
    results = {}
    gc.collect()
    gc.freeze()
    async with serving(state) as url:
        for path, coding in cases():
            await read(f"{url}{path}", coding)  # what is made at first use
            runs = [await read(f"{url}{path}", coding) for _ in range(1 if args.quick else 5)]
            results[f"{path} ({coding})"] = {
                "bytes": runs[0].size,
                "cpu": statistics.median(run.cpu for run in runs),
                "busy": max(run.busy for run in runs),
                "held_up": max(run.held_up for run in runs),
            }
    return results


def main() -> None:
    counts = {name: {"type": int, "help": f"how many ({number})"}
              for name, number in (("nodes", 1000), ("pipelines", 500), ("operators", 10))}  # fmt: skip
    args = harness.arguments(__doc__, **counts)
    results = asyncio.run(measure(args))
    harness.table(
        "one request (at most 50 ms of the loop at a time)",
        ["", "CPU ms", "MB", "busy ms", "held up ms"],
        [
            [
                name,
                f"{result['cpu'] * 1e3:.0f}",
                f"{result['bytes'] / 1e6:.2f}",
                f"{result['busy'] * 1e3:.0f}",
                f"{result['held_up'] * 1e3:.0f}",
            ]
            for name, result in results.items()
        ],
    )
    harness.write(args.json, {"metrics_scale": results})
    sys.exit(0 if all(result["busy"] <= BUSY_BAR for result in results.values()) else 1)


if __name__ == "__main__":
    main()
