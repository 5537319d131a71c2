"""The pod's half of the control channel, scripted, and a whole master around it on virtual time."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nomad import bundle, control, pipeline, reach
from nomad.clock import Clock
from nomad.control import Assignment, LinkPeer, LinkStatus, PodStats
from nomad.delivery.driver import shake_dialer
from nomad.errors import DeliveryError, TransportError
from nomad.master.app import Master
from nomad.master.views import OperatorView, PipelineView
from nomad.reach import Silence
from nomad.runtime.base import NodeInfo, PodSpec
from nomad.runtime.fake import FakeRuntime
from nomad.settings import Settings
from nomad.tasks import alongside
from nomad.topology import Topology
from nomad.transport.base import Connection
from tests.clock import VirtualClock

DEADLINE = 30.0
"""Real seconds until a test gives up waiting."""


HOLDS = ("ready", "standby", "greeted", "retired", "halted", "active", "turned", "heard", "stop")
"""What pods can be kept from doing while an operator moves, in the order in which it is waited for."""


class Pod:
    """One pod that says what it is told to. By itself it dials, becomes ready when assigned, ends when asked, and is
    connected to whom it is told of at once.
    """

    def __init__(self, spec: PodSpec, pods: Pods) -> None:
        self.spec = spec
        self.assignment: Assignment | None = None
        self.links: dict[str, LinkPeer] = {}
        self.speed: float | None = None
        self.heard: list[dict[str, Any]] = []
        self.ready_sent = False
        self.role = ""
        self.heard_epochs: dict[str, int] = {}
        """Link -> epoch of the sender that was heard last."""
        self.status: dict[str, Any] | None = None
        self._pods = pods
        self._conn: Connection | None = None
        self._end: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._dial = asyncio.Event()
        self._dial.set()

    async def run(self) -> int:
        """Until it ends by itself; the runtime cancels this for a kill."""
        talking = asyncio.create_task(self._talk(), name=f"talk {self.spec.id}")
        try:
            return await self._end
        finally:
            self.end(-9)
            talking.cancel()
            await asyncio.wait({talking})
            if self._conn is not None:
                await self._conn.close()

    def say(self, message: dict[str, Any]) -> None:
        assert self._conn is not None
        self._conn.write([(control.pack(message),)])

    def beat(self, error: dict[str, str] | None = None, **stats: Any) -> None:
        self.say({"type": "heartbeat", "stats": asdict(PodStats(**stats)), "error": error})

    def become_ready(self) -> None:
        source = not any(link.direction == "in" for link in self.links.values())
        self.say({"type": "ready", "address": None if source else f"inproc:{self.spec.id}", "pid": 4711})
        self.ready_sent = True

    @property
    def told(self) -> str:
        """The role that it was told to have."""
        return self.assignment.role if self.assignment is not None and not self.role else self.role

    def look(self) -> None:
        """Say how it stands, if that has changed."""
        pods, holds = self._pods, self._pods.holds
        if self._conn is None or self._conn.closed or not self.ready_sent:
            return
        told = self.told
        shown = self.status["role"] if self.status is not None else control.Role.ACTIVE
        role = shown if told in holds else told
        ends = []
        for link in self.links.values():
            before = pods.end(self, link.link, link.direction)
            if link.direction == "in":
                end = LinkStatus(link.link, "in", self.heard_epochs.get(link.link, 0))
                if "heard" in holds:
                    end.epoch = before.epoch
            else:
                epoch = link.peer_epoch if link.address else 0
                if epoch != before.epoch and ("turned" if before.epoch else "greeted") in holds:
                    epoch = before.epoch
                standby = link.standby_epoch if link.standby_address and "standby" not in holds else 0
                end = LinkStatus(link.link, "out", epoch, standby)
            ends.append(end)
        called = [(0, self.spec.epoch, b"")] if role == control.Role.HALTED else []
        status = {"type": "status", "role": str(role), "links": [asdict(end) for end in ends], "called": called}
        if status != self.status:
            self.status = status
            with suppress(TransportError):  # it is said again after the next connect
                self.say(status)
            pods.flow()

    def end(self, code: int) -> None:
        if not self._end.done():
            self._end.set_result(code)

    @property
    def over(self) -> bool:
        return self._end.done()

    def disconnect(self, *, stay: bool = False) -> None:
        """Lose the connection; with `stay`, don't dial again before `reconnect`."""
        if stay:
            self._dial.clear()
        if self._conn is not None:
            self._conn.abort()

    def reconnect(self) -> None:
        self._dial.set()

    async def _talk(self) -> None:
        silence = Silence(self._pods.clock)
        async with alongside(silence.watch()):
            await self._keep_talking(silence)

    async def _keep_talking(self, silence: Silence) -> None:
        while True:
            await self._dial.wait()
            try:
                conn = await reach.dial(self.spec.control, reach.PATIENCE_LEAST)
                hello = {"epoch": self.spec.epoch, "pid": 4711, "assigned": self.assignment is not None}
                await shake_dialer(conn, self.spec.key, self.spec.id, hello)
                self._conn = conn
                silence.begin(conn)
                self.status = None
                if self.ready_sent:
                    self.become_ready()
                    self.look()
                while True:
                    frames = await conn.recv()
                    silence.heard()
                    for frame in frames:
                        message = control.unpack(bytes(frame[0]))
                        if message["type"] == "word":
                            silence.word(message)
                        else:
                            self._hear(message)
            except (TransportError, DeliveryError):
                await asyncio.sleep(0.001)

    def _hear(self, message: dict[str, Any]) -> None:
        self.heard.append(message)
        match message["type"]:
            case "assign":
                self.assignment = control.assignment_from(message)
                self.links = {link.link: link for link in self.assignment.links}
                self.speed = self.assignment.speed
                waits = self.assignment.role == control.Role.STANDBY and "ready" in self._pods.holds
                if self._pods.become_ready and not waits:
                    self.become_ready()
                    self.look()
            case "peers":
                self.links |= {peer.link: peer for peer in map(control.peer_from, message["links"])}
                self.speed, self.role = message["speed"], message["role"]
                self.look()
            case "stop" if self._pods.obey and not (self.role in ("retired", "halted") and "stop" in self._pods.holds):
                self._pods.before_end(self)
                self.end(0)
            case "request" if message["id"] and (answer := self._pods.answers.get(message["method"])) is not None:
                self.say({"type": "reply", "id": message["id"], **answer(message["args"])})


class Pods:
    """All pods of a fake runtime, and how they behave."""

    def __init__(self, clock: Clock | None = None) -> None:
        """`clock`: by which they miss a master that hangs; without, they don't."""
        self.clock = clock or VirtualClock()
        self.all: dict[str, Pod] = {}
        self.become_ready = True
        self.obey = True
        self.before_end: Callable[[Pod], None] = lambda pod: None
        self.answers: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {}
        self.holds: set[str] = set()
        """Of `HOLDS`."""

    async def host(self, spec: PodSpec) -> int:
        self.all[spec.id] = pod = Pod(spec, self)
        return await pod.run()

    def release(self) -> None:
        """Let pods do all that they were kept from."""
        self.holds.clear()
        for pod in self.all.values():
            with suppress(TransportError):
                if pod.assignment is not None and not pod.ready_sent and not pod.over:
                    pod.become_ready()
                pod.look()

    def flow(self) -> None:
        """Messages go from each operator to the next: who is sent to is heard by those that it sends to."""
        for pod in list(self.all.values()):
            for link in pod.links.values():
                epoch = self.end(pod, link.link, link.direction).epoch
                operator = f"{pod.spec.pipeline}.{link.peer_operator}"
                if (
                    link.direction == "out"
                    and epoch
                    and not pod.over
                    and (peer := self.all.get(f"{operator}-e{epoch}"))
                ):
                    source = not any(end.direction == "in" for end in pod.links.values())
                    fed = pod.told != control.Role.STANDBY if source else any(pod.heard_epochs.values())
                    if fed and peer.heard_epochs.get(link.link, 0) < pod.spec.epoch:
                        peer.heard_epochs[link.link] = pod.spec.epoch
                        peer.look()

    @staticmethod
    def end(pod: Pod, link: str, direction: str) -> LinkStatus:
        """One end of a link, as the pod said last."""
        links = pod.status["links"] if pod.status is not None else []
        return next(
            (LinkStatus(**end) for end in links if (end["link"], end["direction"]) == (link, direction)),
            LinkStatus(link, direction),
        )

    def __getitem__(self, id: str) -> Pod:
        return self.all[id]


NODES = (NodeInfo("edge", memory_mb=1024), NodeInfo("cloud", memory_mb=1024, labels=frozenset({"gpu"})))


class Cluster:
    """A state folder, a fake runtime and a clock, on which one master after the other runs."""

    def __init__(self, state: Path, nodes: Sequence[NodeInfo] = NODES) -> None:
        self.clock = VirtualClock()
        self.pods = Pods()
        self.runtime = FakeRuntime(nodes, host=self.pods.host, clock=self.clock)
        self.topology: Topology | None = Topology(tuple(nodes))
        self.settings = replace(Settings(state=state), control=f"inproc:{uuid.uuid4().hex}")
        self.master: Master

    @asynccontextmanager
    async def run(self, *, killed: bool = False) -> AsyncIterator[Master]:
        """A master; `killed` leaves the pods running at its end, as kill -9 does."""
        settings = replace(self.settings, pods=replace(self.settings.pods, outlive_master=killed))
        async with Master(settings, self.topology, runtime=self.runtime, clock=self.clock) as self.master:
            yield self.master

    async def until(self, condition: Callable[[], object], *, passing: float = 0.0) -> None:
        """Wait for `condition`, letting `passing` virtual seconds go by in every round."""
        end = time.monotonic() + DEADLINE
        while not condition():
            assert time.monotonic() < end, "what was waited for didn't happen"
            if passing:
                await self.clock.advance(passing)
            await asyncio.sleep(0.001)

    async def submit(self, id: str | None = "p", *, pins: dict[str, str] | None = None, **options: Any) -> PipelineView:
        data = bundle.make(pipeline.build(OPERATORS, **options), self.master.signing_key)
        return await self.master.submit(data, id=id, start="edge", end="cloud", pins=pins)

    async def submit_and_run(self, id: str = "p") -> None:
        await self.submit(id)
        await self.until(lambda: self.phase(id) == "running")

    def phase(self, id: str = "p") -> str:
        return self.master.pipeline(id).phase

    def operator(self, name: str, id: str = "p") -> OperatorView:
        return next(op for op in self.master.pipeline(id).operators if op.name == name)

    def kinds(self, after: int = 0) -> list[str]:
        """Kinds of the events."""
        return [event.kind for event in self.master.events(after=after)]


def source() -> int:
    return 1


def square(x: int) -> int:
    return x * x


def sink(x: int) -> None:
    pass


OPERATORS = [source, square, sink]
