"""Agents as processes that dial a real master: what they measure is in its views, and they come and go."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from nomad import control
from nomad.actor.channel import Channel
from nomad.clock import Clock, SystemClock
from nomad.delivery.driver import shake_dialer, shake_listener
from nomad.errors import TransportError
from nomad.handout import key_of
from nomad.master.app import Master
from nomad.master.assembly import Secrets
from nomad.measure import node, remote
from nomad.measure.node import Processors, memory_free_mb
from nomad.runtime.base import NodeInfo
from nomad.runtime.fake import FakeRuntime
from nomad.settings import Settings
from nomad.tasks import Tasks
from nomad.transport import certificates, registry
from nomad.transport.base import Connection
from nomad.transport.trunk import Trunk, carries
from tests.certificates import authority, put
from tests.clock import VirtualClock
from tests.ports import free_port

DEADLINE = 30.0


class Machines(FakeRuntime):
    """Nodes that aren't emulated, and are called otherwise in their cluster."""

    lose_node = restore_node = None  # type: ignore[assignment]

    def node_of(self, name: str) -> str | None:
        id = name.removeprefix("host-")
        return id if any(node.id == id for node in self._nodes) else None


class Site:
    """A master and the agents' processes."""

    def __init__(self, folder: Path, scheme: str) -> None:
        self.folder = folder
        self.scheme = scheme
        self.control = f"{scheme}://127.0.0.1:{free_port()}"
        self.runtime = Machines([NodeInfo(id) for id in ("edge", "fog", "cloud")])
        self.agents: dict[str, subprocess.Popen[bytes]] = {}
        self.tls = folder / "tls"

    @asynccontextmanager
    async def master(self) -> AsyncIterator[Master]:
        settings = Settings(state=self.folder / "state", control=self.control)
        async with Master(settings, None, runtime=self.runtime) as master:
            own = await Secrets.of(master._parts.store)
            boot = {"control": self.control, "key": own.keys.of(remote.KIND).hex()}
            (self.folder / "boot").write_text(json.dumps(boot))
            yield master

    def start(self, id: str, **changes: str) -> None:
        environment = {
            "NOMAD_BOOT": str(self.folder / "boot"),
            "NOMAD_NODE": f"host-{id}",
            "NOMAD_LISTEN": f"{self.scheme}://127.0.0.1:0",
            "NOMAD_WORK": str(self.folder / id),
            "NOMAD_TLS": str(self.tls),
            **changes,
        }
        with open(self.folder / f"{id}.log", "ab") as log:
            self.agents[id] = subprocess.Popen(
                [sys.executable, "-m", node.__name__], env={**os.environ, **environment}, stdout=log, stderr=log
            )

    def kill(self, id: str, number: signal.Signals = signal.SIGKILL) -> int:
        self.agents[id].send_signal(number)
        return self.agents.pop(id).wait(DEADLINE)


@pytest.fixture(params=["tcp", "tls"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    made = Site(tmp_path, request.param)
    if made.scheme == "tls":
        put(made.tls, authority())
        certificates.use(made.tls)
    yield made
    for id in list(made.agents):
        made.kill(id)
    certificates.use(None)


async def until(condition: Callable[[], Any], what: str) -> None:
    async with asyncio.timeout(DEADLINE):
        while not condition():
            await asyncio.sleep(0.05)
    assert condition(), what


async def test_agents_measure_nodes_and_links_for_a_master(site: Site) -> None:
    async with site.master() as master:
        for id in ("edge", "fog", "cloud"):
            site.start(id)

        def known() -> bool:
            links = [link.estimates.latency for link in master.links()]
            nodes = [node.estimates for node in master.nodes()]
            return all(link is not None and link.samples for link in links) and all(
                node.speed is not None and node.speed.samples and node.cores_free is not None for node in nodes
            )

        await until(known, "everything is measured")
        assert all(link.estimates.latency.value < 5.0 for link in master.links())  # type: ignore[union-attr]
        assert all(0.01 < node.estimates.speed.value < 100 for node in master.nodes())  # type: ignore[union-attr]
        assert all(node.reachable for node in master.nodes())
        agents = master._parts.agents
        assert agents is not None
        assert agents.address("edge").startswith(f"{site.scheme}://127.0.0.1:")
        found = await agents.round_trips("edge", ["fog", "nowhere", "cloud"])
        assert [seconds is not None and 0 < seconds < 10 for seconds in found] == [True, False, True]

        # One ends as it is asked to; what is known of its node stays.
        assert site.kill("fog", signal.SIGTERM) == 0
        await until(lambda: not agents.address("fog"), "it is missed")
        assert sorted(agents.nodes()) == ["cloud", "edge"]
        assert master.node("fog").estimates.speed is not None
        site.start("fog")
        await until(lambda: agents.address("fog"), "it is back")

    # A new master finds the agents again.
    site.runtime = Machines([NodeInfo(id) for id in ("edge", "fog", "cloud")])
    async with site.master() as master:
        agents = master._parts.agents
        assert agents is not None
        await until(lambda: len(agents.nodes()) == 3, "all have dialled the new master")


@pytest.mark.slow
async def test_a_node_that_nobody_can_dial_is_found_out(site: Site) -> None:
    async with site.master() as master:
        for id in ("edge", "fog"):
            site.start(id)
        site.start("cloud", NOMAD_POD_IP="127.0.0.9" if site.scheme == "tcp" else "192.0.2.1")
        await until(lambda: not master.node("cloud").reachable, "nobody gets through to it")
        assert master.node("edge").reachable
        assert master.node("fog").reachable


async def test_an_agent_removes_what_one_that_was_killed_had_not_installed_yet(tmp_path: Path) -> None:
    left = tmp_path / "packages" / "0123.new"
    left.mkdir(parents=True)

    async def calibrated(clock: Clock, rounds: int) -> float:
        return 1.0

    boot = node.Boot("edge", "tcp://127.0.0.1:1", bytes(32), "tcp://127.0.0.1:0", None, tmp_path / "packages", 1 << 30)
    agent = asyncio.create_task(node.NodeAgent(boot, SystemClock(), calibrated).run())
    await until(lambda: not left.exists(), "what was left is gone")
    agent.cancel()
    await asyncio.wait([agent])


async def test_a_master_that_hangs_is_dialled_anew_and_pods_learn_of_its_words(tmp_path: Path) -> None:
    """Each word goes on to those who come by way of the agent; when there are no more, all of them lose the master."""
    key, clock, conns = bytes(32), VirtualClock(), []

    async def calibrated(clock: Clock, rounds: int) -> float:
        return 1.0

    async def serve(conn: Connection) -> None:
        _, _, frames = await shake_listener(conn, lambda name: key, lambda name, hello: {})
        conns.append((conn, Trunk(conn, pods.append)))
        with suppress(TransportError):
            while True:
                for frame in frames:
                    if carries(frame):
                        conns[-1][1].received(frame)
                frames = await conn.recv()

    pods: list[Connection] = []
    master = await registry.listen("inproc:", serve)
    boot = node.Boot("edge", master.reachable, key, "tcp://127.0.0.1:0", None, tmp_path / "packages", 1 << 30)
    agent = node.NodeAgent(boot, clock, calibrated)
    running = asyncio.create_task(agent.run())
    pod = await registry.connect(await agent.listening)
    try:
        await until(lambda: conns, "it dials")
        await shake_dialer(pod, key_of(key, "one"), f"{control.VIA}one", {})
        pod.write([(b"as in a",), (b"handshake",)])
        await until(lambda: pods, "the pod is let through")
        await clock.advance(600)
        assert len(conns) == 1, "a master that says no words is left alone"
        word = (control.pack({"type": "word", "within": 10.0}),)
        for _ in range(3):
            conns[0][0].write([word])
            assert [bytes(part) for part in (await pod.recv())[0]] == list(word)
            await clock.advance(8)
        assert len(conns) == 1
        await clock.advance(4)
        with pytest.raises(TransportError):
            await pod.recv()
        await clock.advance(1)
        await until(lambda: len(conns) == 2, "it dials again")
    finally:
        pod.abort()
        await pod.close()
        running.cancel()
        await asyncio.wait([running])
        await master.close()


@pytest.mark.parametrize("asked", [{"ways": None}, {"ways": [3]}, {"ways": [["a"]]}, {}, [], "ways"])
async def test_a_request_that_is_not_understood_is_answered_at_once(asked: Any, tmp_path: Path) -> None:
    key, replies = bytes(32), asyncio.Queue[dict[str, Any]]()

    async def calibrated(clock: Clock, rounds: int) -> float:
        return 1.0

    async def serve(conn: Connection) -> None:
        _, _, frames = await shake_listener(conn, lambda name: key, lambda name, hello: {})
        conn.write([(control.pack({"type": "request", "id": 7, "method": "round_trips", "args": asked}),)])
        with suppress(TransportError):
            while True:
                for message in (control.unpack(bytes(frame[0])) for frame in frames):
                    if message["type"] == "reply":
                        replies.put_nowait(message)
                frames = await conn.recv()

    master = await registry.listen("inproc:", serve)
    boot = node.Boot("edge", master.reachable, key, "tcp://127.0.0.1:0", None, tmp_path / "packages", 1 << 30)
    agent = asyncio.create_task(node.NodeAgent(boot, VirtualClock(), calibrated).run())
    try:
        async with asyncio.timeout(DEADLINE):
            reply = await replies.get()
        assert (reply["id"], reply["ok"]) == (7, False)
        assert reply["error"]["message"]
    finally:
        agent.cancel()
        await asyncio.wait([agent])
        await master.close()


async def test_an_agent_reports_at_the_pace_that_it_is_told_until_it_connects_anew(tmp_path: Path) -> None:
    key, clock, reports = bytes(32), VirtualClock(), []
    conns: list[Connection] = []

    async def calibrated(clock: Clock, rounds: int) -> float:
        return 1.0

    async def serve(conn: Connection) -> None:
        _, _, frames = await shake_listener(conn, lambda name: key, lambda name, hello: {})
        conns.append(conn)
        with suppress(TransportError):
            while True:
                reports.extend(clock.now() for frame in frames if control.unpack(bytes(frame[0]))["type"] == "report")
                frames = await conn.recv()

    async def counted(seconds: float) -> int:
        before = len(reports)
        await clock.advance(seconds)
        return len(reports) - before

    master = await registry.listen("inproc:", serve)
    boot = node.Boot("edge", master.reachable, key, "tcp://127.0.0.1:0", None, tmp_path / "packages", 1 << 30)
    agent = asyncio.create_task(node.NodeAgent(boot, clock, calibrated).run())
    try:
        await until(lambda: reports, "it says what it knows at once")
        assert 18 <= await counted(90) <= 22, "a few more when it is calibrated"
        conns[0].write([(control.pack({"type": "pace", "seconds": remote.PACES[1]}),)])
        await counted(remote.PACES[1])  # the pause that it was in
        assert 9 <= await counted(90) <= 13
        conns[0].write([(control.pack({"type": "pace", "seconds": remote.PACES[-1]}),)])
        await counted(remote.PACES[1])  # now it is in a long one
        conns[0].abort()
        async with asyncio.timeout(DEADLINE):
            while len(conns) < 2:
                await counted(1)
        assert await counted(remote.SILENT * remote.REPORT_SECONDS - 1) >= 2, "its new master knows no other pace"
        assert 18 <= await counted(90) <= 22, "a few more when it is calibrated"
    finally:
        agent.cancel()
        await asyncio.wait([agent])
        await master.close()


class Side:
    """A pod that has nothing to say."""

    ending = False

    def hello(self) -> dict[str, Any]:
        return {}

    def met(self) -> None: ...

    def heard(self, message: dict[str, Any]) -> None: ...

    async def do(self, method: str, args: dict[str, Any]) -> Any: ...

    def abandoned(self, seconds: float) -> None: ...


async def test_pods_of_an_agent_that_hangs_come_directly(site: Site) -> None:
    """The agent's process is stopped: its machine goes on answering for it, and it passes no words on."""
    key, tasks = bytes(32), Tasks()
    agents: list[Connection] = []
    pods: list[Connection] = []

    async def serve(conn: Connection) -> None:
        with suppress(TransportError):
            name, _, frames = await shake_listener(conn, lambda name: key, lambda name, hello: {})
            (agents if name.startswith(remote.KIND) else pods).append(conn)
            trunk = Trunk(conn, lambda conn: tasks.start(serve(conn), name="a pod that comes by the agent") and None)
            while True:
                for frame in frames:
                    if carries(frame):
                        trunk.received(frame)
                frames = await conn.recv()

    async def say_words() -> None:
        while True:
            for conn in (*agents, *(pod for pod in pods if "#" not in pod.peer)):
                with suppress(TransportError):
                    conn.write([(control.pack({"type": "word", "within": 5.0}),)])
            await asyncio.sleep(0.2)

    listening = f"{site.scheme}://127.0.0.1:{free_port()}"
    master = await registry.listen(site.control, serve)
    (site.folder / "boot").write_text(json.dumps({"control": site.control, "key": key.hex()}))
    site.start("edge", NOMAD_LISTEN=listening)
    tasks.start(say_words(), name="say words")
    channel = Channel(site.control, "one", key, 3600.0, Side(), SystemClock())
    tasks.start(channel.keep(), name="keep")
    try:
        await until(lambda: pods and agents, "both are there")
        pods[-1].write([(control.pack({"type": "via", "address": listening, "key": key_of(key, "one")}),)])
        await until(lambda: "#" in pods[-1].peer, "it comes by way of the agent")
        await until(lambda: channel._silence._within, "it has heard a word there")
        site.agents["edge"].send_signal(signal.SIGSTOP)
        await until(lambda: "#" not in pods[-1].peer, "it misses the agent")
        assert not agents[-1].closed, "the agent's own connection stands"
    finally:
        await tasks.close()
        await channel.close()
        await master.close()


def test_an_agent_says_what_it_misses() -> None:
    process = subprocess.run(
        [sys.executable, "-m", node.__name__],
        env={**os.environ, "NOMAD_BOOT": "/nowhere"},
        capture_output=True,
        check=False,
    )
    assert process.returncode == 1
    assert process.stderr.decode().startswith("agent: ")


def test_what_is_free_is_read_from_the_kernel(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 0 0 100 0 0 0 0 0 0\ncpu0 1\ncpu1 2\nintr 3\n")
    processors = Processors(stat)
    assert processors.free() is None
    stat.write_text("cpu  150 0 0 250 0 0 0 0 0 0\ncpu0 1\ncpu1 2\nintr 3\n")
    assert processors.free() == 1.5
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 2048 kB\nMemAvailable: 1024 kB\n")
    assert memory_free_mb(meminfo) == 1.0
    assert memory_free_mb(tmp_path / "none") is None
    assert Processors(tmp_path / "none").free() is None
