"""What `make demo` runs: a whole cluster in this terminal, for half a minute.

A master and three emulated nodes, edge, fog and cloud, with slow links between them, run the pipeline of
face_recognition.py; what happens is shown while it happens. Then everything is stopped, also on Ctrl-C and
SIGTERM at any moment; and should this process be killed outright, its pods follow within seconds.

Ends with 0 when the astronaut was recognised and no frame was lost or doubled, with 1 when not.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

import nomad
from nomad import topology
from nomad.client import Cluster, PipelineHandle
from nomad.master.serve import serve
from nomad.master.views import LinkView, NodeView, OperatorView, Phase, PipelineView
from nomad.settings import Pods, Rest, Settings, Windows

TOPOLOGY = """
nodes:
  edge:  {speed: 0.25, cores: 1, memory: 1Gi}
  fog:   {speed: 0.5, cores: 2, memory: 2Gi}
  cloud: {speed: 1.0, cores: 4, memory: 8Gi}
links:
  - {from: edge, to: fog, latency: 5ms, jitter: 1ms, bandwidth: 200Mbit}
  - {from: fog, to: cloud, latency: 20ms, jitter: 2ms, bandwidth: 100Mbit}
  - {from: edge, to: cloud, latency: 40ms, jitter: 5ms, bandwidth: 20Mbit}
"""
PERSON = "Eileen Collins"
REFRESH = 0.5
"""Seconds between two looks at the cluster."""
PLAIN_EVERY = 3.0
"""Seconds between two lines where there is no terminal."""
RATE_OVER = 5.0
"""Seconds over which the rate of records is taken."""
START_TIMEOUT, SETTLE_TIMEOUT = 60.0, 20.0
"""Seconds until the first record, and for what is under way at the end."""


@dataclass
class Tally:
    """What the records tell: who was seen, whether that was right, how long it took, and what is missing."""

    numbers: Counter[int] = field(default_factory=Counter)
    names: Counter[str] = field(default_factory=Counter)
    right: int = 0
    seconds: list[float] = field(default_factory=list)
    last: dict[str, Any] | None = None
    arrivals: deque[float] = field(default_factory=deque)

    def add(self, record: dict[str, Any], now: float) -> None:
        """Count one record of face_recognition.py's last operator; `now` in monotonic seconds."""
        seen = record["names"] or ["nobody"]
        self.numbers[record["frame"]] += 1
        self.names.update(seen)
        self.right += seen == [record["truth"]]
        self.seconds.append(record["seconds"])
        self.last = record
        self.arrivals.append(now)

    @property
    def records(self) -> int:
        return self.numbers.total()

    @property
    def doubled(self) -> int:
        return self.records - len(self.numbers)

    @property
    def lost(self) -> int:
        """Frames missing between the first and the last that were recorded."""
        return max(self.numbers) - min(self.numbers) + 1 - len(self.numbers) if self.numbers else 0

    def seen(self) -> str:
        """Names with their numbers, the most frequent first."""
        return ", ".join(f"{name} {count}" for name, count in self.names.most_common())

    def rate(self, now: float) -> float:
        """Records per second, lately."""
        while self.arrivals and self.arrivals[0] < now - RATE_OVER:
            self.arrivals.popleft()
        if len(self.arrivals) < 2:
            return 0.0
        return (len(self.arrivals) - 1) / max(now - self.arrivals[0], 1e-9)

    def latency(self, share: float, last: int | None = None) -> float:
        """Seconds from camera to record that `share` of the (last) frames stay below."""
        ordered = sorted(self.seconds[-last:] if last else self.seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


class Screen:
    """Shows what is known: drawn anew in place on a terminal, else as a line now and then."""

    def __init__(self, console: Console, seconds: float):
        self.console = console
        self.seconds = seconds
        self.nodes: list[NodeView] = []
        self.links: list[LinkView] = []
        self.status: PipelineView | None = None
        self.tally = Tally()
        self.first: float | None = None
        """When the first record came, in monotonic seconds."""
        self._live: Live | None = None
        self._begin = time.monotonic()
        self._next_line = 0.0
        self._placed = False

    @contextmanager
    def open(self) -> Iterator[None]:
        """Draw until the block ends; what was drawn last stays."""
        if not self.console.is_terminal:
            yield
            return
        with Live(self.picture(), console=self.console, auto_refresh=False) as self._live:
            yield

    def refresh(self) -> None:
        if self._live is not None:
            self._live.update(self.picture(), refresh=True)
        elif self.status is not None:
            self._lines(self.status)

    def elapsed(self, now: float) -> float:
        return 0.0 if self.first is None else now - self.first

    def picture(self) -> RenderableType:
        now = time.monotonic()
        if self.status is None:
            return Text("Starting the cluster ...")
        head = Text.assemble(
            (f"pipeline {self.status.id}: {self.status.phase}", "bold"),
            "   starting ..."
            if self.first is None
            else f"   {min(self.elapsed(now), self.seconds):.0f} of {self.seconds:.0f} s",
        )
        return Group(head, self._operators(self.status), self._results(now))

    def _operators(self, status: PipelineView) -> Table:
        nodes = {node.id: node for node in self.nodes}
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in ("operator", "node", "state"):
            table.add_column(heading)
        for heading in ("messages", "per second", "ms each", "busy", "output"):
            table.add_column(heading, justify="right")
        before = None
        for operator in status.operators:
            if before is not None and before != operator.node:
                table.add_row("", Text(self._link(before, operator.node), style="dim"))
            before, stats = operator.node, operator.stats
            table.add_row(
                Text(operator.name, style="bold"),
                f"{operator.node}  (speed {nodes[operator.node].speed:g})" if operator.node in nodes else operator.node,
                str(operator.state),
                str(messages(operator)),
                shown(stats.rate, "{:.1f}"),
                shown(stats.service_time, "{:.0f}", 1000),
                shown(stats.busy, "{:.0f} %", 100),
                shown(stats.output_bytes, "{:.1f} kB", 0.001),
            )
        return table

    def _link(self, source: str, target: str) -> str:
        for link in self.links:
            if (link.source, link.target) == (source, target):
                speed = f", {link.bandwidth * 8 / 1e6:.0f} Mbit/s" if link.bandwidth is not None else ""
                return f"  |  {link.latency * 1000:.0f} ms{speed}"
        return "  |"

    def _results(self, now: float) -> RenderableType:
        tally = self.tally
        if not tally.records:
            return Text("")
        last = tally.last or {}
        half, most = tally.latency(0.5, 50) * 1000, tally.latency(0.99) * 1000
        return Group(
            Text("seen     ").append(tally.seen(), "bold"),
            Text(
                f"frames   {tally.records} recorded, {tally.rate(now):.1f} a second; "
                f"from camera to record {half:.0f} ms (99 %: {most:.0f} ms)"
            ),
            Text(f"last     frame {last['frame']}: {', '.join(last['names']) or 'nobody'}", style="dim"),
        )

    def _lines(self, status: PipelineView) -> None:
        now = time.monotonic()
        if not self._placed:
            self._placed = True
            for node in self.nodes:
                on_it = ", ".join(operator.name for operator in status.operators if operator.node == node.id)
                self.console.print(f"{node.id} (speed {node.speed:g}): {on_it or 'nothing'}")
        if now < self._next_line:
            return
        self._next_line = now + PLAIN_EVERY
        tally = self.tally
        self.console.print(
            f"{now - self._begin:4.0f} s  {status.phase}: {tally.records} frames, {tally.rate(now):.1f} a second, "
            f"{tally.latency(0.5, 50) * 1000:.0f} ms from camera to record; seen: {tally.seen() or 'nobody yet'}"
        )

    def summary(self) -> None:
        tally, print_ = self.tally, self.console.print
        if not tally.records:
            print_("No frame came through.")
            return
        print_(
            f"\n[bold]{tally.records} frames[/bold], {tally.right} with the right answer "
            f"({100 * tally.right / tally.records:.1f} %); {tally.lost} lost, {tally.doubled} doubled."
        )
        print_(
            f"From camera to record: {tally.latency(0.5) * 1000:.0f} ms for half of them, "
            f"{tally.latency(0.99) * 1000:.0f} ms for 99 %."
        )
        seen = tally.names[PERSON]
        print_(f"{PERSON} was recognised {seen} times." if seen else f"{PERSON} was never recognised.")


def messages(operator: OperatorView) -> int:
    """Messages done: a source only emits."""
    return operator.stats.processed or operator.stats.emitted


def shown(value: float | None, form: str, factor: float = 1.0) -> str:
    return "" if value is None else form.format(value * factor)


NEXT = """
To go on by yourself, with [bold].venv/bin[/bold] on your PATH:

  nomad up --node edge --node fog --node cloud       a cluster that stays
  nomad submit examples/face_recognition.py          this pipeline, in another terminal
  nomad show faces                                   where it runs, and how fast
  nomad tail faces record                            its records, live
  nomad link set edge fog --latency 80ms             a worse link
  nomad stop faces

README.md shows how to run functions of your own."""


class DemoError(Exception):
    """The demo can't go on; the message says why."""


async def read(outputs: AsyncIterator[Any], screen: Screen) -> None:
    async for record in outputs:
        now = time.monotonic()
        screen.first = screen.first or now
        screen.tally.add(record, now)


async def watch(cluster: Cluster, pipeline: PipelineHandle, screen: Screen, reader: asyncio.Task[None]) -> None:
    """Show the pipeline until its time is over, stop it, and go on until all that was under way is recorded."""
    begin, stopping = time.monotonic(), None
    while True:
        screen.nodes, screen.links = await cluster.nodes(), await cluster.links()
        screen.status = status = await pipeline.status()
        screen.refresh()
        now = time.monotonic()
        if status.phase == Phase.FAILED:
            failures = [operator.last_failure for operator in status.operators if operator.last_failure]
            raise DemoError("\n".join([f"The pipeline failed: {status.reason}", *(f.traceback for f in failures)]))
        if reader.done():
            await reader  # raises what it ended with
            if status.phase.final:
                return
        if screen.first is None and now - begin > START_TIMEOUT:
            raise DemoError(f"No frame was recorded within {START_TIMEOUT:.0f} s.")
        if stopping is None and screen.elapsed(now) > screen.seconds:
            await pipeline.stop()
            stopping = now
        if stopping is not None and now - stopping > SETTLE_TIMEOUT:
            raise DemoError(f"The pipeline didn't settle within {SETTLE_TIMEOUT:.0f} s.")
        await asyncio.sleep(REFRESH)


async def demo(seconds: float, console: Console) -> bool:
    """The whole demo; whether it went as it should."""
    import face_recognition as example

    screen = Screen(console, seconds)
    with tempfile.TemporaryDirectory(prefix="nomad-demo-") as folder:
        async with embedded(Path(folder)) as cluster:
            pipeline = await cluster.submit(
                example.operators,
                start=example.start_node,
                end=example.end_node,
                id=example.pipeline_id,
                profile=example.profile,
            )
            async with pipeline.outputs("record") as outputs:
                reader = asyncio.create_task(read(outputs, screen), name="records")
                try:
                    with screen.open():
                        await watch(cluster, pipeline, screen, reader)
                finally:
                    reader.cancel()
                    await asyncio.wait([reader])
    screen.summary()
    return bool(screen.tally.names[PERSON]) and not screen.tally.lost and not screen.tally.doubled


@asynccontextmanager
async def embedded(folder: Path) -> AsyncIterator[Cluster]:
    """A master with its nodes in this process, and a client of it; all of it is gone at the end."""
    settings = Settings(
        state=folder / "state",
        rest=Rest(port=0),
        windows=Windows(bytes=3 << 20),  # three frames under way: where the machine is slow, so is the camera
        pods=Pods(master_timeout=2.0),  # what is killed outright must not leave pods behind for long
    )
    async with serve(settings, topology.parse(TOPOLOGY)) as served:
        async with nomad.connect(served.url, served.token, signing_key=served.signing_key) as cluster:
            yield cluster


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Watch a face-recognition pipeline over an edge, a fog and a cloud node."
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="how long frames are taken (default: %(default)g)")
    seconds = parser.parse_args().seconds
    console = Console(highlight=False, soft_wrap=True)

    async def run() -> bool:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await demo(seconds, console)

    try:
        as_it_should = asyncio.run(run())
    except KeyboardInterrupt:
        console.print("Stopped; nothing is left running.")
        return 130
    except asyncio.CancelledError:
        return 143
    except (nomad.NomadError, DemoError) as exc:
        console.print(f"[red]{escape(str(exc))}[/red]")
        return 1
    console.print(NEXT)
    return 0 if as_it_should else 1


if __name__ == "__main__":
    sys.exit(main())
