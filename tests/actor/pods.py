"""Pods as real processes, and a master's end of their control channels that does only what a test tells it to."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nomad import bundle, control
from nomad.control import Assignment, LinkPeer, PodStats
from nomad.delivery.driver import shake_listener
from nomad.errors import DeliveryError, TransportError
from nomad.pipeline import Pipeline
from nomad.transport import registry
from nomad.transport.base import Connection, Frame, Listener

PATIENCE = 30.0
SIGNING_KEY = bytes(range(32))
VERIFY_KEY = bundle.public_key(SIGNING_KEY)
LINK_KEY, POD_KEY = bytes(32), bytes(range(1, 33))


class Pod:
    """One process, what it has said, and the connection that it says it on."""

    def __init__(self, name: str, process: subprocess.Popen[bytes]):
        self.name = name
        self.process = process
        self.said: list[dict[str, Any]] = []
        self.hello: dict[str, Any] = {}
        self.connections = 0
        self.conn: Connection | None = None
        self._requests = 0

    def heard(self, frames: list[Frame]) -> None:
        for frame in frames:
            message = control.unpack(bytes(frame[0]))
            if message["type"] == "heartbeat":
                message["stats"] = asdict(PodStats()) | message["stats"]
            self.said.append(message)

    def all(self, kind: str) -> list[dict[str, Any]]:
        """What it has said of one kind."""
        return [m for m in self.said if m["type"] == kind]

    async def says(self, kind: str, times: int = 1) -> dict[str, Any]:
        """Wait until it has said something of a kind so many times; the last."""
        await self.until(lambda: len(self.all(kind)) >= times, f"{self.name} says {kind!r}")
        return self.all(kind)[-1]

    async def until(self, condition: Callable[[], Any], what: str = "") -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end, f"it doesn't happen: {what or condition}"
            await asyncio.sleep(0.005)

    def tell(self, message: dict[str, Any]) -> None:
        assert self.conn is not None
        self.conn.write([(control.pack(message),)])

    async def ask(self, method: str, **args: Any) -> Any:
        """The value of a reply; a refusal is an `AssertionError` with its error."""
        reply = await self.asked(method, **args)
        assert reply["ok"], reply["error"]
        return reply["value"]

    async def asked(self, method: str, **args: Any) -> dict[str, Any]:
        self._requests += 1
        number = self._requests
        self.tell({"type": "request", "id": number, "method": method, "args": args})
        await self.until(lambda: any(m["id"] == number for m in self.all("reply")), f"a reply to {method}")
        return next(m for m in self.all("reply") if m["id"] == number)

    async def ended(self) -> int:
        """Its exit code, once it has ended and all that it said has been read."""
        await self.until(lambda: self.process.poll() is not None, f"{self.name} ends")
        await self.until(lambda: self.conn is None)
        return self.process.returncode


class Master:
    """Listens for pods and keeps what they say."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.pods: dict[str, Pod] = {}
        self.listener: Listener
        self.key = POD_KEY

    def start(
        self,
        name: str,
        *,
        epoch: int = 1,
        control: str | None = None,
        master_timeout: float = 60.0,
        as_file: bool = False,
        **environment: str,
    ) -> Pod:
        """A new process; it dials in by itself. `as_file`: what it is told at its start is in a file."""
        boot = {
            "pod": name, "epoch": epoch, "control": control or self.listener.reachable, "key": POD_KEY.hex(),
            "verify_key": VERIFY_KEY.hex(), "master_timeout": master_timeout,
        }  # fmt: skip
        environment["NOMAD_POD"] = json.dumps(boot)
        if as_file:
            file = self.folder / f"{name}.boot"
            file.write_text(environment.pop("NOMAD_POD"))
            environment["NOMAD_BOOT"] = str(file)
        with open(self.folder / f"{name}.log", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "nomad.actor"], stdout=log, stderr=log, cwd=self.folder,
                env={**os.environ, **environment, "PYTHONPATH": os.getcwd()},
            )  # fmt: skip
        self.pods[name] = Pod(name, process)
        return self.pods[name]

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    async def serve(self, conn: Connection) -> None:
        try:
            name, hello, first = await shake_listener(conn, lambda _: self.key, lambda identity, hello: {})
        except (TransportError, DeliveryError):
            return
        pod = self.pods[name]
        pod.hello, pod.conn = hello, conn
        pod.connections += 1
        pod.heard(first)
        try:
            while True:
                pod.heard(await conn.recv())
        except TransportError:
            if pod.conn is conn:
                pod.conn = None


@contextlib.asynccontextmanager
async def master(folder: Path) -> AsyncIterator[Master]:
    made = Master(folder)
    made.listener = await registry.listen("unix:", made.serve)
    try:
        yield made
    finally:
        for pod in made.pods.values():
            pod.process.kill()
            pod.process.wait()
        await made.listener.close()


def assignment(pipeline: Pipeline, number: int, *, epoch: int = 1, workdir: Path | None = None, **changes: Any) -> Any:
    """The message that makes a pod operator number `number`; nobody's address is known yet."""
    packed = bundle.read(bundle.make(pipeline, SIGNING_KEY), VERIFY_KEY)
    names = [operator.spec.name for operator in pipeline.operators]
    name = names[number]
    if workdir is not None:
        workdir.mkdir(exist_ok=True)
    made = Assignment(
        "p", name, epoch, "node", packed.manifest_bytes, packed.signature, packed.code[name], packed.types, LINK_KEY,
        "unix:", links(names, number), workdir=str(workdir or ""),
    )  # fmt: skip
    return {"type": "assign", **asdict(made), **changes}


def links(
    names: list[str], number: int, address: str | None = None, epochs: tuple[int, int] = (0, 0)
) -> list[LinkPeer]:
    """The links of operator number `number` of a chain; `address` is that of the next one."""
    made = []
    if number:
        before = names[number - 1]
        made.append(LinkPeer(f"p:{before}>{names[number]}", "in", before, None, epochs[0]))
    if number + 1 < len(names):
        after = names[number + 1]
        made.append(LinkPeer(f"p:{names[number]}>{after}", "out", after, address, epochs[1]))
    return made


def peers(names: list[str], number: int, address: str | None, epochs: tuple[int, int]) -> dict[str, Any]:
    """The message that tells a pod where its neighbours are."""
    return {"type": "peers", "links": [asdict(link) for link in links(names, number, address, epochs)]}


async def ready(here: Master, built: Pipeline, number: int, **options: Any) -> Pod:
    """A pod that runs operator number `number`."""
    pod = here.start(f"p.{built.operators[number].spec.name}-e1", **options)
    await pod.until(lambda: pod.conn, "it dials in")
    pod.tell(assignment(built, number, workdir=here.folder / "work"))
    await pod.says("ready")
    return pod


def endless() -> Iterator[int]:
    number = 0
    while True:
        yield number
        number += 1
