"""The agent of one node of a real cluster: `python -m nomad.measure.node`, a process of its own beside the node's pods.

It dials the master, as pods do, and goes on while that is away or hangs: calibrates the node, says what is free on it,
answers other agents' probes, probes them when the master's survey asks for it (`nomad.measure.remote`), installs and
hands out what the node's operators require (`nomad.handout`), and lets its pods through to the master where those are
many (`nomad.gateway`). It knows nothing of pipelines.

    NOMAD_NODE       what the cluster calls the node
    NOMAD_BOOT       the file with {"control": the master's address, "key": hex, the agents' own}; it has a usual place
    NOMAD_LISTEN     where other agents and the node's pods reach it; tls://0.0.0.0:30020
    NOMAD_POD_IP     the address that they dial
    NOMAD_WORK       a folder, in which packages are installed; NOMAD_PACKAGES_BYTES: how large that may grow

pip's own variables and its configuration file say where packages come from. Building a package runs code of its
makers, here, where the agents' key is: only what comes ready-made is installed ("wheels"), unless PIP_ONLY_BINARY is
set to something else. That holds for packages of an index; what has an address of its own pip builds all the same, and
`nomad.handout` refuses it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from nomad import control, reach
from nomad.clock import Clock, SystemClock
from nomad.delivery.driver import shake_dialer
from nomad.errors import DeliveryError, NomadError, TransportError, UsageError, describe
from nomad.gateway import Gateway
from nomad.handout import Counter
from nomad.kubernetes import names
from nomad.measure.agent import Agent
from nomad.measure.calibrate import ROUNDS, calibrate
from nomad.measure.estimate import smooth
from nomad.measure.local import CALIBRATE_SECONDS, SHORT_ROUNDS
from nomad.measure.remote import KIND, PACES, REPORT_SECONDS
from nomad.packages import CACHE_BYTES, PYTHON, Cache
from nomad.reach import Silence
from nomad.tasks import Tasks
from nomad.transport.base import Connection, Frame
from nomad.transport.trunk import Trunk, carries

log = logging.getLogger(__name__)

BACKOFF_FIRST, BACKOFF_MOST = 0.1, 3.0
"""Seconds between attempts to reach the master, doubled from the first to the most."""

STEADY = 5.0
"""Seconds that a connection must have stood for the next attempt to be a first one again."""


@dataclass(frozen=True, slots=True)
class Boot:
    """What an agent is told at its start."""

    node: str
    control: str
    key: bytes
    listen: str
    advertise: str | None
    folder: Path
    limit: int

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Self:
        """As the environment describes it. Raises `UsageError`."""
        try:
            content = json.loads(
                Path(environ.get("NOMAD_BOOT") or f"{names.BOOT_FOLDER}/boot").read_text(encoding="utf-8")
            )
            return cls(
                environ["NOMAD_NODE"],
                content["control"],
                bytes.fromhex(content["key"]),
                environ.get("NOMAD_LISTEN") or f"tls://0.0.0.0:{names.AGENT_PORT}",
                environ.get("NOMAD_POD_IP") or None,
                Path(environ.get("NOMAD_WORK") or names.WORK_FOLDER) / "packages",
                int(environ.get("NOMAD_PACKAGES_BYTES") or CACHE_BYTES),
            )
        except KeyError as exc:
            raise UsageError(f"an agent isn't told {exc}: see `nomad.measure.node`") from None
        except (OSError, ValueError, TypeError) as exc:
            raise UsageError(f"what an agent is told can't be read: {exc}") from exc


class NodeAgent:
    """`run` until cancelled."""

    def __init__(
        self, boot: Boot, clock: Clock, calibrated: Callable[[Clock, int], Awaitable[float]] = calibrate
    ) -> None:
        """`calibrated`: the speed of the node by so many rounds, see `nomad.measure.calibrate`."""
        self.key = boot.key
        self._boot = boot
        self._clock = clock
        self._calibrated = calibrated
        self.listening: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """The address where it is reached."""
        self._packages = Cache(boot.folder, boot.limit)
        self._gateway = Gateway(boot.key)
        self._agent = Agent(boot.node, boot.key, clock, visits=(Counter(boot.key, self._packages), self._gateway))
        self._conn: Connection | None = None
        self._word: Frame | None = None
        """The master's last."""
        self._silence = Silence(clock, self._pass_on)
        self._pace = REPORT_SECONDS
        self._speed: float | None = None
        self._busy = Processors()
        self._tasks = Tasks()

    async def run(self) -> None:
        """Raises `TransportError` when it can't listen."""
        address = await self._agent.listen(self._boot.listen, self._boot.advertise)
        self.listening.set_result(address)
        try:
            self._tasks.start(asyncio.to_thread(self._packages.tidy), name="tidy packages")
            self._tasks.start(self._calibrate(), name="calibrate")
            self._tasks.start(self._report(), name="report")
            self._tasks.start(self._silence.watch(), name="watch for silence")
            await self._talk(address)
        finally:
            await self._tasks.close()
            await self._agent.close()

    async def _talk(self, address: str) -> None:
        """Keep a connection to the master."""
        backoff, me = BACKOFF_FIRST, f"{KIND}:{self._boot.node}"
        alone_since = self._clock.now()
        while True:
            met_at = self._clock.now()
            try:
                patience = reach.patience(met_at - alone_since)
                conn = await reach.dial(self._boot.control, patience)
                try:
                    hello = {"address": address, "python": PYTHON}
                    await shake_dialer(conn, self._boot.key, me, hello, patience, most=control.MOST_TOLD)
                    self._conn, trunk = conn, Trunk(conn)
                    self._gateway.opened(trunk)
                    self._word, self._pace = None, REPORT_SECONDS
                    self._silence.begin(conn)
                    self._say(self._state())
                    while True:
                        frames = await conn.recv()
                        self._silence.heard()
                        for frame in frames:
                            if carries(frame):
                                trunk.received(frame)
                            else:
                                self._receive(frame, conn)
                finally:
                    self._silence.end()
                    if self._conn is not None:
                        self._conn, alone_since = None, self._clock.now()
                    conn.abort()
                    self._gateway.closed("the agent of its node has lost the master")
            except (TransportError, DeliveryError) as exc:
                log.info("no master at %s: %s", self._boot.control, exc)
            except (ValueError, KeyError, TypeError) as exc:
                log.warning("the master at %s said what this agent doesn't understand: %r", self._boot.control, exc)
            if self._clock.now() - met_at >= STEADY:
                backoff = BACKOFF_FIRST
            await self._clock.sleep(backoff)
            backoff = min(BACKOFF_MOST, 2 * backoff)

    def _say(self, message: dict[str, Any]) -> None:
        """Tell the master, if it is there."""
        if self._conn is not None:
            try:
                self._conn.write([(control.pack(message),)])
            except TransportError:
                return  # `_talk` sees the same and dials again

    def _receive(self, frame: Frame, conn: Connection) -> None:
        message = control.unpack(bytes(frame[0]))
        if message["type"] == "word":
            self._silence.word(message)
            self._word = frame
            self._pass_on()
        elif message["type"] == "pace":
            self._pace = min(max(PACES[0], float(message["seconds"])), PACES[-1])
        elif message["type"] == "request":
            self._tasks.start(self._answer(conn, message["id"], message["method"], message["args"]), name="answer")

    def _pass_on(self) -> None:
        """The master is at work: tell pods that come by here."""
        if self._word is not None:
            self._gateway.pass_on(self._word)

    async def _answer(self, conn: Connection, number: int, method: str, args: dict[str, Any]) -> None:
        try:
            self._agent.close_idle()
            value: Any
            if method == "round_trips":
                ways = [(str(node), str(address)) for node, address in args["ways"]]
                value = await self._agent.round_trips(ways)
            elif method == "probe":
                probe = await self._agent.probe(str(args["node"]), str(args["address"]), int(args["nbytes"]))
                value = {"round_trip": probe.round_trip, "transfer": probe.transfer}
            else:
                raise NomadError(f"an agent doesn't know the request {method!r}")
            reply = {"type": "reply", "id": number, "ok": True, "value": value}
        except (NomadError, ValueError, KeyError, TypeError) as exc:
            reply = {"type": "reply", "id": number, "ok": False, "error": describe(exc)}
        if conn is self._conn:  # else it would answer what another master has asked, with the same number
            self._say(reply)

    # -- the node

    async def _calibrate(self) -> None:
        known = smooth(None, await self._calibrated(self._clock, ROUNDS), self._clock.now())
        while True:
            self._speed = known.value
            self._say(self._state())
            await self._clock.sleep(CALIBRATE_SECONDS)
            known = smooth(known, await self._calibrated(self._clock, SHORT_ROUNDS), self._clock.now())

    async def _report(self) -> None:
        waited = 0.0
        while True:
            await self._clock.sleep(REPORT_SECONDS)
            self._agent.close_idle()
            waited += REPORT_SECONDS
            if waited >= self._pace:  # which may have become quicker meanwhile: its master waits no longer than that
                waited = 0.0
                self._say(self._state())

    def _state(self) -> dict[str, Any]:
        speed, cores, memory = self._speed, self._busy.free(), memory_free_mb()
        return {"type": "report", "speed": speed, "cores_free": cores, "memory_free_mb": memory}


class Processors:
    """How many cores of the machine are idle, by what the kernel counts for all of it, containers or not."""

    def __init__(self, path: Path = Path("/proc/stat")) -> None:
        self._path = path
        self._before = self._counted()

    def free(self) -> float | None:
        """Since the last call; None where that isn't known."""
        before, now = self._before, self._counted()
        if before is None or now is None or now[0] <= before[0]:
            return None
        self._before = now
        return max(0.0, now[2] * (now[1] - before[1]) / (now[0] - before[0]))

    def _counted(self) -> tuple[int, int, int] | None:
        """Ticks in all, idle ticks (waiting for disks included), and cores."""
        try:
            lines = self._path.read_text(encoding="ascii").splitlines()
            ticks = [int(text) for text in lines[0].split()[1:9]]
        except (OSError, ValueError, IndexError):
            return None
        cores = sum(line.startswith("cpu") and line[3:4].isdigit() for line in lines)
        return sum(ticks), ticks[3] + ticks[4], cores


def memory_free_mb(path: Path = Path("/proc/meminfo")) -> float | None:
    """MiB that programs could have, by the kernel's estimate for the whole machine; None where that isn't known."""
    try:
        for line in path.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) / 1024
    except (OSError, ValueError, IndexError):
        return None
    return None


async def _run(boot: Boot) -> None:
    loop, me = asyncio.get_running_loop(), asyncio.current_task()
    assert me is not None
    loop.add_signal_handler(signal.SIGTERM, me.cancel)
    await NodeAgent(boot, SystemClock()).run()


def main() -> None:
    """Run the agent that the environment describes, until SIGTERM."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    os.environ.setdefault("PIP_ONLY_BINARY", ":all:")
    os.environ.setdefault("PIP_NO_CACHE_DIR", "1")  # what is installed is the cache
    try:
        asyncio.run(_run(Boot.of(os.environ)))
    except (UsageError, TransportError) as exc:
        sys.exit(f"agent: {exc}")
    except asyncio.CancelledError:
        return


if __name__ == "__main__":
    main()
