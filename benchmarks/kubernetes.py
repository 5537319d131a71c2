"""How soon things happen on Kubernetes: the bars of docs/kubernetes.md, on the cluster that kubectl speaks to.

    python -m benchmarks.kubernetes [--quick] [--only ROW] [--namespace NAME] [--json OUT]

Nomad must be installed there, with warm pods, and its REST interface be found (NOMAD_MASTER, NOMAD_TOKEN and
NOMAD_SIGNING_KEY, or the credentials file). Measures from the outside: what a client sees, and what the last operator
counts itself: messages missed, messages got twice, and the time between two messages. Exit code 1 when a bar is missed.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any

import nomad
from benchmarks import harness
from nomad.client import Cluster, PipelineHandle
from nomad.errors import NomadError
from nomad.kubernetes import names

INTERVAL = 0.005
"""Seconds between the source's messages."""

PATIENCE = 120.0
"""Seconds until whatever is waited for counts as never."""

ID = "measured"


class Numbers:
    """0, 1, 2, ..."""

    def __init__(self) -> None:
        self._next = 0

    def __call__(self) -> int:
        self._next += 1
        return self._next - 1


def numbers() -> Callable[..., Any]:
    """The source."""
    source: Callable[..., Any] = nomad.source(Numbers(), interval=INTERVAL, name="Numbers")
    return source


def work(number: int) -> int:
    """What is moved and killed."""
    return number


class Count:
    """The last operator: says every 50 ms what it has counted, and the longest gaps between messages."""

    def __init__(self) -> None:
        self._last: int | None = None
        self._at = self._told = 0.0
        self._missed = self._doubled = 0
        self._gaps: list[tuple[float, float]] = []

    def __call__(self, number: int) -> dict[str, Any] | None:
        now = time.time()
        if self._last is not None:
            self._missed += max(0, number - self._last - 1)
            self._doubled += number <= self._last
            if now - self._at > 4 * INTERVAL:
                self._gaps = [*self._gaps[-199:], (now, now - self._at)]
        self._last, self._at = number, now
        if now - self._told < 0.05:
            return None
        self._told = now
        return {"last": number, "missed": self._missed, "doubled": self._doubled, "gaps": self._gaps}


@dataclass(frozen=True, slots=True)
class Measured:
    """One row of the table."""

    what: str
    bar: str
    value: str
    met: bool


class Bench:
    """A cluster, and what is done to it."""

    def __init__(self, cluster: Cluster, namespace: str, *, quick: bool) -> None:
        self._cluster = cluster
        self._namespace = namespace
        self._quick = quick

    async def ends(self) -> tuple[str, str, list[str]]:
        """First node, last node, and those that operators can be moved between."""
        nodes = [node.id for node in await self._cluster.nodes() if node.ready]
        if len(nodes) < 2:
            raise NomadError(f"two nodes are needed; there are {', '.join(nodes) or 'none'}")
        known = [name for name in ("edge", "fog", "cloud") if name in nodes]
        nodes = known if len(known) == 3 else nodes
        return nodes[0], nodes[-1], nodes[1:] if len(nodes) > 2 else nodes

    async def submit(self, *, warm: bool) -> float:
        """Seconds from the submission to the first output."""
        first, last, _ = await self.ends()
        operators = [numbers(), work, Count()] if warm else [_cold(numbers()), _cold(work), _cold(Count())]
        began = time.monotonic()
        pipeline = await self._cluster.submit(operators, start=first, end=last, id=ID, moves=False)
        try:
            await anext(aiter(seen(pipeline)))
            return time.monotonic() - began
        finally:
            await self.gone(pipeline)

    async def submissions(self, *, warm: bool) -> list[Measured]:
        took = []
        if not warm:
            self.kubectl("create", "secret", "generic", ID, "--from-literal=key=any")
        try:
            for _ in range(2 if self._quick else 5):
                if warm:
                    await self.warm()
                took.append(await self.submit(warm=warm))
        finally:
            if not warm:
                self.kubectl("delete", "secret", ID)
        bar = 3.0 if warm else 8.0
        kind = "warm pods" if warm else "cold pods, images present"
        median = statistics.median(took)
        spread = f"{median:.2f} s (of {len(took)}: {min(took):.2f} to {max(took):.2f})"
        return [Measured(f"submit to the first output, {kind}", f"<= {bar:g} s", spread, median <= bar)]

    async def moves(self) -> list[Measured]:
        count = 6 if self._quick else 50
        async with self.running() as pipeline:
            _, _, nodes = await self.ends()
            before, asked, failed = await counted(pipeline), [], 0
            for number in range(count):
                await self.warm()
                placed = next(op for op in (await pipeline.status()).operators if op.name == "work").node
                began = time.time()
                move = await pipeline.move("work", next(node for node in nodes if node != placed))
                ended = await pipeline.wait_for_move(move.id)
                failed += ended.state != "done"
                asked.append(began)
                print(f"\r  move {number + 1} of {count}", end="", file=sys.stderr, flush=True)
            print(file=sys.stderr)
            after = await counted(pipeline)
        gaps = sorted(
            max((gap for at, gap in after["gaps"] if start <= at < end), default=0.0)
            for start, end in zip(asked, [*asked[1:], time.time()], strict=True)
        )
        p50, p99 = statistics.median(gaps), gaps[min(len(gaps) - 1, int(0.99 * len(gaps)))]
        missed, doubled = after["missed"] - before["missed"], after["doubled"] - before["doubled"]
        what = f"live move, {count} moves ({failed} not done)"
        return [
            Measured(f"{what}: gap at the sink, p50", "<= 100 ms", f"{p50 * 1e3:.0f} ms", p50 <= 0.1),
            Measured(f"{what}: gap at the sink, p99", "<= 500 ms", f"{p99 * 1e3:.0f} ms", p99 <= 0.5),
            Measured(f"{what}: lost, doubled", "0, 0", f"{missed}, {doubled}", missed == doubled == failed == 0),
        ]

    async def pod_killed(self) -> list[Measured]:
        took, lost = [], 0
        async with self.running() as pipeline:
            for _ in range(2 if self._quick else 5):
                await self.warm()
                before, at = await self._pod(pipeline), time.time()
                self.kubectl(
                    "delete", "pod", "--grace-period=0", "--force", "--wait=false",
                    "-l", f"{names.PIPELINE_LABEL}={ID},{names.OPERATOR_LABEL}=work",
                )  # fmt: skip
                await until(lambda before=before: self._replaced(pipeline, before))
                await asyncio.sleep(1.0)  # what it counts now is from after the gap
                now = await counted(pipeline)
                took.append(max((gap for when, gap in now["gaps"] if when >= at), default=0.0))
                lost = now["missed"] + now["doubled"]
        worst = max(took)
        return [
            Measured(f"pod killed ({len(took)} times) to flowing again", "<= 3 s", f"{worst:.2f} s", worst <= 3.0),
            Measured("pod killed: lost or doubled", "0", str(lost), lost == 0),
        ]

    async def master_killed(self) -> list[Measured]:
        async with self.running() as pipeline:
            before = await counted(pipeline)
            leader = self.kubectl("get", "pods", "-l", f"{names.LEADER_LABEL}=true", "-o", "name").split()[0]
            at = time.time()
            self.kubectl("delete", "--grace-period=0", "--force", "--wait=false", leader)
            await until(lambda: self._led_by_another(leader))
            took = time.time() - at
            status = await pipeline.status()
            restarts = sum(operator.restarts for operator in status.operators)
            after = await counted(pipeline)
        worst = max((gap for when, gap in after["gaps"] if when >= at), default=0.0)
        wrong = after["missed"] + after["doubled"] - before["missed"] - before["doubled"]
        data = f"{restarts} restarts, longest gap {worst * 1e3:.0f} ms, {wrong} lost or doubled"
        return [
            Measured("master killed to led again", "<= 10 s", f"{took:.1f} s", took <= 10.0),
            Measured("operators meanwhile", "0 restarts", data, restarts == 0 and wrong == 0),
        ]

    async def _pod(self, pipeline: PipelineHandle) -> str:
        return next(op.pod for op in (await pipeline.status()).operators if op.name == "work")

    async def _replaced(self, pipeline: PipelineHandle, before: str) -> bool:
        status = await pipeline.status()
        return status.phase == "running" and all(op.pod != before for op in status.operators)

    async def _led_by_another(self, before: str) -> bool:
        leaders = self.kubectl("get", "pods", "-l", f"{names.LEADER_LABEL}=true", "-o", "name").split()
        return any(leader != before for leader in leaders) and bool(await self._cluster.pipelines())

    async def warm(self) -> None:
        """Until each node has a pod that waits."""
        _, _, nodes = await self.ends()
        selector = f"{names.STATE_LABEL}={names.WARM}"

        async def filled() -> bool:
            pods = json.loads(self.kubectl("get", "pods", "-l", selector, "-o", "json"))["items"]
            running = {pod["spec"].get("nodeName") for pod in pods if pod["status"].get("phase") == "Running"}
            return len(running) >= len(nodes)

        await until(filled)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[PipelineHandle]:
        """A pipeline that counts."""
        first, last, _ = await self.ends()
        pipeline = await self._cluster.submit([numbers(), work, Count()], start=first, end=last, id=ID, moves=False)
        try:
            await counted(pipeline)
            yield pipeline
        finally:
            await self.gone(pipeline)

    async def gone(self, pipeline: PipelineHandle) -> None:
        await pipeline.remove()

        async def removed() -> bool:
            return all(view.id != ID for view in await self._cluster.pipelines())

        await until(removed)

    def kubectl(self, *args: str) -> str:
        """Its output. Raises `NomadError` with what it said."""
        found = subprocess.run(["kubectl", "-n", self._namespace, *args], capture_output=True, text=True, check=False)
        if found.returncode:
            raise NomadError(f"kubectl {' '.join(args)}: {found.stderr.strip()}")
        return found.stdout


def _cold(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The same, with a variable from a secret: that has to be there when its pod starts, so it gets a new one."""
    cold: Callable[..., Any] = nomad.operator(operator, secrets={"MEASURED": f"{ID}/key"})
    return cold


async def seen(pipeline: PipelineHandle) -> AsyncIterator[dict[str, Any]]:
    """What the last operator says, over masters that come and go."""
    while True:
        try:
            async for value in pipeline.outputs("Count"):
                yield value
        except NomadError:
            pass
        await asyncio.sleep(0.1)


async def counted(pipeline: PipelineHandle) -> dict[str, Any]:
    """What the last operator has counted until now."""
    async with asyncio.timeout(PATIENCE):
        async for value in seen(pipeline):
            return value
    raise NomadError("the last operator says nothing")


async def until(true: Callable[[], Awaitable[bool]]) -> None:
    """Look every tenth of a second. Raises `TimeoutError`."""
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                if await true():
                    return
            except NomadError:
                pass  # there is no master just now
            await asyncio.sleep(0.1)


ROWS: dict[str, Callable[[Bench], Awaitable[list[Measured]]]] = {
    "warm": lambda bench: bench.submissions(warm=True),
    "cold": lambda bench: bench.submissions(warm=False),
    "moves": Bench.moves,
    "pod-killed": Bench.pod_killed,
    "master-killed": Bench.master_killed,
}


async def measure(namespace: str, only: Sequence[str], *, quick: bool) -> list[Measured]:
    found: list[Measured] = []
    async with nomad.connect() as cluster:
        bench = Bench(cluster, namespace, quick=quick)
        for name, row in ROWS.items():
            if not only or name in only:
                print(f"{name} ...", file=sys.stderr)
                found += await row(bench)
    return found


def main() -> None:
    asked = harness.arguments(
        __doc__,
        only={"choices": list(ROWS), "action": "append", "default": [], "help": "this row; can be repeated"},
        namespace={"default": names.NOMAD, "help": "where Nomad is installed"},
    )
    try:
        found = asyncio.run(measure(asked.namespace, asked.only, quick=asked.quick))
    except (NomadError, TimeoutError) as exc:
        sys.exit(f"nothing more can be measured: {exc or f'what was waited for took longer than {PATIENCE:g} s'}")
    harness.table(
        "Nomad on Kubernetes",
        ("", "bar", "measured", ""),
        [(row.what, row.bar, row.value, "" if row.met else "missed") for row in found],
    )
    harness.write(asked.json, {"rows": [asdict(row) for row in found]})
    sys.exit(any(not row.met for row in found))


if __name__ == "__main__":
    main()
