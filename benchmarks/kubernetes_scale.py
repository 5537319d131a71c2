"""What a master needs on a large cluster: 1,000 nodes and 5,000 pods of 500 pipelines, faked by kwok.

    python -m benchmarks.kubernetes_scale [--quick] [--silent] [--nodes N] [--pipelines N] [--beat SECONDS] [--json OUT]

An API server, kwok and a real `nomad master` process run here (see tests/kubernetes/cluster). Everything runs already
when the master starts: it takes over what an earlier one left. In the pods is no process; one program dials the master
as each of them would, and sends all their heart-beats, as often as the master asks for them. With `--silent` there are
kwok's nodes and as many pods alone: none has an agent, the pods are others', not Nomad's, and nobody says anything to
the master. Exit code 1 when a bar is missed.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from benchmarks import harness
from nomad.kubernetes import names, paths
from nomad.kubernetes.api import Api
from nomad.master.problem import Knowledge, build
from nomad.measure.book import Book
from nomad.runtime.kubernetes import KubernetesRuntime
from nomad.runtime.manifests import Boot
from nomad.settings import Kubernetes
from tests.kubernetes.cluster.scale import Scale
from tests.kubernetes.crowd import OPERATORS, Crowd
from tests.kubernetes.masters import MasterProcess, World, init_objects

NAMESPACE = "crowd"
PATIENCE = 300.0
"""Seconds until whatever is waited for counts as never."""
CALM = 40.0
"""Seconds without a request after which a master counts as steady."""
STEADY = 60.0
"""Seconds that a steady master is looked at."""
LEASE = ("--lease-seconds", "60", "--renew-seconds", "10")
"""API server, kwok and all pods' other ends share the machine with the master, which mustn't lose its lead for it."""
LIST_BAR, MEMORY_BAR, CPU_BAR, REQUESTS_BAR, AGAIN_BAR = 2.0, 300e6, 0.1, 0.1, 3.0


@dataclass(frozen=True, slots=True)
class Measured:
    """One row of the table; without a bar it is met."""

    what: str
    bar: str
    value: str
    met: bool = True


class Bench:
    """A large cluster and what is measured on it."""

    def __init__(self, env: Scale, api: Api, pipelines: int, beat: float, *, quick: bool, silent: bool) -> None:
        self.world = World(env, api, NAMESPACE, env.folder)
        self.crowd = Crowd(env, api, NAMESPACE, 0 if silent else pipelines, self.world.control)
        self._others = pipelines * OPERATORS if silent else 0
        self.rows: list[Measured] = []
        self._env = env
        self._api = api
        self._beat = beat
        self._steady = STEADY / 4 if quick else STEADY

    async def run(self) -> None:
        say("pipelines and pods are made")
        began = time.monotonic()
        await asyncio.to_thread(self._env.create_namespace, NAMESPACE)
        await asyncio.to_thread(self._env.apply, *init_objects(NAMESPACE))
        kubeconfig = await asyncio.to_thread(self._env.kubeconfig_for, "nomad-master", NAMESPACE)
        self.world.kubeconfig = kubeconfig
        await self.crowd.make()
        if self._others:
            await asyncio.to_thread(self._env.make_pods, NAMESPACE, self._others, {"app": "another"})
        say(f"took {time.monotonic() - began:.0f} s")
        await self._listed(kubeconfig)
        async with self._voices() as voices:
            if voices is not None:
                await self._pace(voices, self._beat)
            began = time.monotonic()
            master = await self.world.start("", "--warm", "0", *LEASE)
            try:
                await self._master(master, began, voices)
            finally:
                await master.end()

    async def _listed(self, kubeconfig: Path) -> None:
        """What the master does with its runtime, in this process."""
        settings = Kubernetes(namespace=NAMESPACE, warm=0)
        async with Api.open(str(kubeconfig)) as api:
            began = time.monotonic()
            boot = Boot(self.world.control, b"", 3600.0)
            runtime = await KubernetesRuntime.open(api, settings, boot, self.crowd.keys.of)
            try:
                pods, nodes = await runtime.list(), runtime.nodes
                listed = time.monotonic() - began
            finally:
                await runtime.close()
        assert (len(pods), len(nodes)) == (self.crowd.size, len(self.crowd.nodes)), (len(pods), len(nodes))
        began = time.monotonic()
        spec = self.crowd.spec
        problem = build(spec, Knowledge(Book()), nodes, pins={}, others=())
        snapshot = time.monotonic() - began
        assert problem["links"]
        self._row("nodes and pods listed", "", f"{listed:.2f} s")
        self._row("a snapshot of the cluster for the scheduler", "", f"{snapshot:.2f} s")
        self.listed, self.snapshot = listed, snapshot

    async def _master(self, master: MasterProcess, began: float, voices: asyncio.subprocess.Process | None) -> None:
        cluster = await self.world.leads(master)
        leads = time.monotonic() - began
        process = psutil.Process(master.process.pid)
        async with cluster:
            self._row("from the start of a master to its lead, all known again", "", f"{leads:.1f} s")
            while (ready := await self._ready()) < self.crowd.size:
                assert time.monotonic() - began < PATIENCE, f"{ready} operators run\n{master.log[-5000:]}"
                assert master.process.returncode is None, master.log[-5000:]
                assert voices is None or voices.returncode is None, "the pods' other ends have failed"
                say(f"  {ready} of {self.crowd.size} operators have reported")
                await asyncio.sleep(2.0)
            took = time.monotonic() - began
            used = sum(process.cpu_times()[:2])
            restarts = await self._restarts()
            text = f"{took:.1f} s, {used:.1f} s of CPU, {restarts} restarts"
            self._row(f"until all {self.crowd.size} pods have reported", "0 restarts", text, restarts == 0)
            await self._quiet()
            await self._steadily(process)
            await self._changes(master)
            if found := os.environ.get("NOMAD_SCALE_PROFILE"):
                await asyncio.to_thread(subprocess.run, [*found.split(), "--pid", str(process.pid)], check=False)
            restarts = await self._restarts()
            self._row("restarts in all", "", f"{restarts}")

    @staticmethod
    async def _pace(voices: asyncio.subprocess.Process, beat: float) -> None:
        assert voices.stdin is not None
        voices.stdin.write(f"{beat}\n".encode())
        await voices.stdin.drain()

    async def _quiet(self) -> None:
        """Until what follows a start is over, or it seems never to be: the states of hundreds of pipelines are shown a
        few at a time, and those who hadn't measured anything at their first turn at the next.
        """
        user = f"system:serviceaccount:{NAMESPACE}:nomad-master"
        began = time.monotonic()
        while time.monotonic() - began < PATIENCE:
            since = self._env.audit_size()
            await asyncio.sleep(CALM)
            if not [r for r in self._env.requests(since, user) if r.verb != "watch" and r.resource != "leases"]:
                return

    async def _steadily(self, process: psutil.Process) -> None:
        user = f"system:serviceaccount:{NAMESPACE}:nomad-master"
        since, before = self._env.audit_size(), sum(process.cpu_times()[:2])
        began = time.monotonic()
        await asyncio.sleep(self._steady)
        seconds = time.monotonic() - began
        cpu = (sum(process.cpu_times()[:2]) - before) / seconds
        memory = process.memory_info().rss
        asked = [r for r in self._env.requests(since, user) if r.verb != "watch"]
        self._row("steady: CPU", "<= 10 % of a core", f"{cpu:.1%}", cpu <= CPU_BAR)
        self._row("steady: memory", "<= 300 MB", f"{memory / 1e6:.0f} MB", memory <= MEMORY_BAR)
        rate, text = len(asked) / seconds, f"{len(asked)} in {seconds:.0f} s"
        self._row("steady: requests", "<= 1 in 10 s", text, rate <= REQUESTS_BAR + 1 / seconds)

    async def _changes(self, master: MasterProcess) -> None:
        """One thing changes in the cluster: until what the master does for it is seen there."""
        rounds = await self._sum(master, "nomad_reconcile_seconds_count")
        spent = await self._sum(master, "nomad_reconcile_seconds_sum")
        node = self.crowd.nodes[1]
        began = time.monotonic()
        await self._api.patch(paths.nodes(node), {"metadata": {"labels": {"changed": "yes"}}})
        while not await self._labelled(master, node):
            assert time.monotonic() - began < PATIENCE
            await asyncio.sleep(0.1)
        self._row("a node's labels change: until the master's view has it", "", f"{time.monotonic() - began:.2f} s")
        if self.crowd.size:
            await self._deleted(master)
        rounds = await self._sum(master, "nomad_reconcile_seconds_count") - rounds
        spent = (await self._sum(master, "nomad_reconcile_seconds_sum") - spent) / max(1.0, rounds)
        self._row("one reconcile round", "", f"{spent * 1e3:.0f} ms")
        whole = self.listed + self.snapshot + spent
        self._row("list, snapshot and one reconcile round", "<= 2 s", f"{whole:.2f} s", whole <= LIST_BAR)

    async def _deleted(self, master: MasterProcess) -> None:
        victim = next(iter(self.crowd.pods()))[1]
        began = time.monotonic()
        await self._api.delete(paths.pods(NAMESPACE, victim), grace=0)
        again = victim.removesuffix("-e1") + "-e2"
        while not await self.world.objects(paths.pods, **{names.PIPELINE_LABEL: "p0", names.OPERATOR_LABEL: "operator0",
                                                          names.EPOCH_LABEL: "2"}):  # fmt: skip
            assert time.monotonic() - began < PATIENCE, f"no {again}\n{master.log[-5000:]}"
            await asyncio.sleep(0.02)
        took = time.monotonic() - began
        self._row("a pod is deleted: until its successor is there", "<= 3 s", f"{took:.2f} s", took <= AGAIN_BAR)

    async def _ready(self) -> int:
        return sum(int(item["status"].get("ready", "0/").partition("/")[0]) for item in await self._pipelines())

    async def _restarts(self) -> int:
        return sum(op["restarts"] for item in await self._pipelines() for op in item["status"]["operators"])

    async def _pipelines(self) -> Sequence[Mapping[str, Any]]:
        """As `kubectl get pipelines` shows them: asking costs the master nothing."""
        found, _ = await self._api.list(paths.pipelines(NAMESPACE))
        return found

    async def _labelled(self, master: MasterProcess, node: str) -> bool:
        found = json.loads(await self._get(master, f"/api/v1/nodes/{node}"))
        return "changed=yes" in found["labels"]

    async def _sum(self, master: MasterProcess, metric: str) -> float:
        """Over all labels."""
        text = (await self._get(master, "/metrics")).splitlines()
        return sum(
            float(line.rpartition(" ")[2]) for line in text if line.partition("{")[0].partition(" ")[0] == metric
        )

    async def _get(self, master: MasterProcess, path: str) -> str:
        headers = {"Authorization": f"Bearer {self.crowd.token}"}
        async with aiohttp.ClientSession(headers=headers) as session, session.get(master.url + path) as answer:
            answer.raise_for_status()
            return await answer.text()

    @asynccontextmanager
    async def _voices(self) -> AsyncIterator[asyncio.subprocess.Process | None]:
        if self._others:
            yield None
            return
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.kubernetes.crowd", stdin=asyncio.subprocess.PIPE
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps(self.crowd.plan(self.world.control)).encode() + b"\n")
        try:
            yield process
        finally:
            process.stdin.close()
            await process.wait()

    def _row(self, what: str, bar: str, value: str, met: bool = True) -> None:
        self.rows.append(Measured(what, bar, value, met))
        say(f"{what}: {value}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


async def measure(nodes: int, pipelines: int, beat: float, *, quick: bool, silent: bool) -> list[Measured]:
    with tempfile.TemporaryDirectory(prefix="nomad-scale-") as folder:
        say(f"{nodes} nodes are made")
        env = await asyncio.to_thread(Scale(Path(folder) / "cluster", nodes).__enter__)
        try:
            async with Api.open(str(env.kubeconfig)) as api:
                bench = Bench(env, api, pipelines, beat, quick=quick, silent=silent)
                await bench.run()
                return bench.rows
        finally:
            await asyncio.to_thread(env.__exit__, None, None, None)


def main() -> None:
    asked = harness.arguments(
        __doc__,
        nodes={"type": int, "default": 1000},
        pipelines={"type": int, "default": 500},
        silent={"action": "store_true", "help": "kwok alone: as many pods, which aren't Nomad's, and no agents"},
        beat={"type": float, "default": 0.5, "metavar": "SECONDS", "help": "between heart-beats until the master says"},
    )
    found = asyncio.run(measure(asked.nodes, asked.pipelines, asked.beat, quick=asked.quick, silent=asked.silent))
    harness.table(
        f"a master of {asked.nodes} nodes and {asked.pipelines * OPERATORS} pods" + " of others" * asked.silent,
        ("", "bar", "measured", ""),
        [(row.what, row.bar, row.value, "" if row.met else "missed") for row in found],
    )
    harness.write(asked.json, {"rows": [asdict(row) for row in found]})
    sys.exit(any(not row.met for row in found))


if __name__ == "__main__":
    main()
