"""Many pipelines that run already, as a master that has just ended left them, and the control channels of their pods.

`Crowd` makes their objects by the master's own store, and their pods, which kwok lets run. No process is in those:
one process for all of them (this file, as a program) runs the agents of all nodes, reaches the master by way of those
as each pod would that an earlier master had told to, says that it is at work, and from then on, if asked, sends every
pod's heart-beats, as often as the master tells it.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import cycle
from pathlib import Path
from typing import Any

from nomad import bundle, control, pipeline
from nomad.actor.route import Route
from nomad.actor.threads import new_loop
from nomad.bundle import Bundle
from nomad.clock import Clock, SystemClock
from nomad.control import PodStats, Role
from nomad.delivery.driver import shake_dialer
from nomad.errors import ApiExists, DeliveryError, TransportError
from nomad.handout import key_of
from nomad.kubernetes import names, paths
from nomad.kubernetes.api import Api
from nomad.kubernetes.certificates import Certificates
from nomad.master.assembly import Secrets
from nomad.master.enact import Keys
from nomad.master.kube.store import KubernetesStore
from nomad.master.state import DesiredPipeline
from nomad.master.store import StoredOperator
from nomad.master.views import DataLinkView, PlacementView
from nomad.measure.node import Boot, NodeAgent
from nomad.pipeline import PipelineSpec
from nomad.runtime import manifests
from nomad.runtime.base import PodSpec
from nomad.settings import Kubernetes
from nomad.tasks import Tasks
from nomad.transport import certificates as tls
from nomad.transport.base import Connection
from tests.kubernetes.cluster.scale import AT_ONCE, Scale, node_names

OPERATORS = 10
"""Of each pipeline."""
IMAGE = "operator:3.11"
NEAR = 0.00005
"""Seconds there and back over each link: next to the milliseconds that functions take nothing, so that no move pays."""
DIALS_AT_ONCE = 64
PLAN_BYTES = 64 << 20
DIAL_SECONDS = 30.0


def same(value: object) -> object:
    return value


class Crowd:
    """`pipelines` of `OPERATORS` each, dealt out to the nodes of a cluster."""

    def __init__(self, env: Scale, api: Api, namespace: str, pipelines: int, control: str) -> None:
        self._env = env
        self._api = api
        self._namespace = namespace
        self._count = pipelines
        self._settings = Kubernetes(namespace=namespace, images={"3.11": IMAGE}, control=control, warm=0)
        self.nodes = [name for name, _ in node_names(env.node_count)]
        self.folder = env.folder / f"crowd-{namespace}"
        self.keys: Keys
        self.token: str
        self.spec: PipelineSpec
        """Of one of them."""

    @property
    def size(self) -> int:
        """How many pods."""
        return self._count * OPERATORS

    async def make(self) -> None:
        """All objects; returns when all pods run."""
        clock = SystemClock()
        store = await KubernetesStore.open(self._api, self._namespace, "earlier")
        try:
            own = await Secrets.of(store)
            self.keys, self.token = own.keys, own.token
            certificates = Certificates(self._api, self._namespace, clock)
            await certificates.renew()
            certificates.put(self.folder, tls.POD)
            code = _code(own.signing_key)
            self.spec = code[0].spec("another", self.nodes[0], self.nodes[-1])
            limit = asyncio.Semaphore(AT_ONCE)

            async def one(number: int) -> None:
                async with limit:
                    await self._pipeline(store, code, number, clock.wall())

            async with asyncio.TaskGroup() as group:
                for number in range(self._count):
                    group.create_task(one(number))
        finally:
            await store.close()
        await asyncio.to_thread(self._env.wait_running, self._namespace, self.size)

    async def _pipeline(self, store: KubernetesStore, code: tuple[Bundle, bytes], number: int, now: float) -> None:
        found, data = code
        first = number * OPERATORS
        where = [self.nodes[(first + index) % len(self.nodes)] for index in range(OPERATORS)]
        spec = found.spec(f"p{number}", where[0], where[-1])
        placed = {op.name: PlacementView(node, "it was there") for op, node in zip(spec.operators, where, strict=True)}
        key = bytes(32)
        await store.add_pipeline(DesiredPipeline(spec, found.digest, key, now, placed, moves=True), data)
        operators = [
            StoredOperator(op.name, 1, f"{spec.id}.{op.name}-e1", f"{spec.id}.{op.name}-e1", 0, highest=1)
            for op in spec.operators
        ]
        await asyncio.gather(*(store.save_operator(spec.id, operator) for operator in operators))
        owner = store.owner(spec.id)
        for op, node in zip(operators, where, strict=True):
            assert op.pod is not None
            pod = PodSpec(
                op.pod, spec.id, op.name, 1, node, self._settings.control, b"", b"", 3600.0, python=found.python
            )
            body = manifests.operator_pod(pod, self._settings, host=node, image=IMAGE, owner=owner)
            body["spec"]["nodeName"] = node  # the scheduler would only take longer
            try:
                await self._api.create(paths.pods(self._namespace), body)
            except ApiExists:
                pass

    def plan(self, address: str) -> dict[str, Any]:
        """What the program needs to be all these pods."""
        return {
            "control": address,
            "tls": str(self.folder),
            "pod_key": self.keys.pods.hex(),
            "agents_key": self.keys.of(names.AGENT).hex(),
            "nodes": self.nodes,
            "pods": [[pod, name, node] for (pod, name), node in zip(self.pods(), cycle(self.nodes), strict=False)],
        }

    def pods(self) -> Iterator[tuple[str, str]]:
        """Nomad's id and the cluster's name of each."""
        for number in range(self._count):
            for index in range(OPERATORS):
                pipeline_id, operator = f"p{number}", f"operator{index}"
                yield f"{pipeline_id}.{operator}-e1", manifests.pod_name(pipeline_id, operator, 1)


def _code(signing_key: bytes) -> tuple[Bundle, bytes]:
    operators = [pipeline.source(lambda: 0, name="operator0")]
    operators += [pipeline.operator(same, name=f"operator{index}") for index in range(1, OPERATORS)]
    data = bundle.make(pipeline.build(operators), signing_key)
    return bundle.read(data, bundle.public_key(signing_key)), data


class Voices:
    """The control channels of all pods; a program of its own, told what to do by lines on its standard input."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self._address = plan["control"]
        self._keys = Keys(bytes.fromhex(plan["pod_key"]), b"")
        self._pods: list[tuple[str, str, str]] = [(pod, name, node) for pod, name, node in plan["pods"]]
        key, folder = bytes.fromhex(plan["agents_key"]), Path(plan["tls"])
        boots = [
            Boot(node, self._address, key, "tls://127.0.0.1:0", None, folder / "packages", 1) for node in plan["nodes"]
        ]
        self._agents = {boot.node: NodeAgent(boot, SystemClock(), reference_speed) for boot in boots}
        self._connected: dict[str, Connection] = {}
        self._limit = asyncio.Semaphore(DIALS_AT_ONCE)
        self._tasks = Tasks()
        self._began = time.monotonic()
        self._first = 0.0
        """The pace of a pod that the master hasn't told one; 0: none beats at all, whatever it was told."""
        self._paces: dict[str, float] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        """The next heart-beats."""

    async def run(self, lines: asyncio.StreamReader) -> None:
        """Until there are no more lines, each of which is the pace of pods that the master tells none."""
        for node, agent in self._agents.items():
            self._tasks.start(agent.run(), name=f"the agent of {node}")
        for pod, name, node in self._pods:
            self._tasks.start(self._keep(pod, name, self._agents[node]), name=name)
        while line := await lines.readline():
            self._first = float(line)
            for pod in self._connected:
                self._pace(pod, self._paces[pod] or self._first)
        await self._tasks.close()

    async def _keep(self, pod: str, name: str, agent: NodeAgent) -> None:
        route = Route(self._address, name)
        route.turn(await agent.listening, key_of(agent.key, name))
        hello = {"epoch": 1, "pid": 1, "assigned": True}
        while True:
            try:
                async with self._limit:
                    conn, _ = await route.dial()
                    await shake_dialer(conn, self._keys.of(name), name, hello, DIAL_SECONDS)
                source = ".operator0-" in pod
                ready = {"type": "ready", "address": None if source else "tls://10.0.0.1:30010", "pid": 1}
                conn.write([(control.pack(ready),)])
                conn.write([(control.pack({"type": "status", "role": str(Role.ACTIVE), "links": []}),)])
                self._connected[pod] = conn
                self._pace(pod, self._first)
                while True:
                    for frame in await conn.recv():
                        message = control.unpack(bytes(frame[0]))
                        if message["type"] == "via":
                            route.turn(message["address"], message["key"])
                            conn.abort()
                        elif message["type"] == "pace":
                            self._pace(pod, message["seconds"])
            except (TransportError, DeliveryError, OSError):
                self._connected.pop(pod, None)
                await asyncio.sleep(0.5)

    def _pace(self, pod: str, seconds: float) -> None:
        """So often it beats from now on. The first time may be any moment: all together they are spread evenly."""
        self._paces[pod] = seconds
        if timer := self._timers.pop(pod, None):
            timer.cancel()
        if self._first:
            wait = random.uniform(0, seconds)
            self._timers[pod] = asyncio.get_running_loop().call_later(wait, self._beat, pod)

    def _beat(self, pod: str) -> None:
        loop = asyncio.get_running_loop()
        self._timers[pod] = loop.call_later(self._paces[pod], self._beat, pod)
        if conn := self._connected.get(pod):
            try:
                conn.write([(control.pack(heartbeat(pod, time.monotonic() - self._began)),)])
            except TransportError:
                pass  # it dials again


async def reference_speed(clock: Clock, rounds: int) -> float:
    """Of nodes that aren't: calibrating a thousand would take the one machine that they all are."""
    return 1.0


def heartbeat(pod: str, seconds: float) -> dict[str, Any]:
    """Of an operator that works off ten messages a second."""
    pipeline_id, _, rest = pod.partition(".")
    index = int(rest.rpartition("-e")[0].removeprefix("operator"))
    count = int(10 * seconds)
    links = []
    for direction, one, other in (("in", index - 1, index), ("out", index, index + 1)):
        if one >= 0 and other < OPERATORS:
            links.append(
                asdict(
                    DataLinkView(
                        link=f"{pipeline_id}:operator{one}>operator{other}",
                        direction=direction,
                        state="open",
                        connected=True,
                        peer_epoch=1,
                        rtt=NEAR,
                        rtt_least=NEAR if direction == "out" else None,
                        reached=1e5 if direction == "out" else None,
                    )
                )
            )
    stats = PodStats(received=count, processed=count, emitted=count, service_time=0.001, output_bytes=1000.0, busy=0.01)
    stats = replace(
        stats, busy_seconds=0.001 * count, sent_bytes=1000 * count, latency_p50=0.05, rss=30 << 20, cpu=seconds / 100,
        latency_p99=0.06, last_output=b"\x00" * 8, links=links, at=seconds,
    )  # fmt: skip
    return control.heartbeat(stats, None)


async def run() -> None:
    lines = asyncio.StreamReader(limit=PLAN_BYTES)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    plan = json.loads(await lines.readline())
    tls.use(Path(plan["tls"]))
    await Voices(plan).run(lines)


def main() -> None:
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(run())


if __name__ == "__main__":
    main()
