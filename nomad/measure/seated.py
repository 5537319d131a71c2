"""The agents of a cluster whose nodes have network namespaces: one process in each, run as the node's pods are.

What they measure is what real packets between the nodes need. `outpost` is the program. Used by the master in the
place of `local.LocalAgents`, with which it shares what a survey asks for (`survey.Prober`).
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import secrets
import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from nomad.clock import Clock
from nomad.errors import ConnectionBroken
from nomad.measure import outpost
from nomad.measure.agent import IDLE_SECONDS, TIMEOUT, Probe
from nomad.measure.survey import one_by_one
from nomad.settings import Seat

log = logging.getLogger(__name__)

START_SECONDS = 20.0
"""How long an agent may take until it listens; it ends as quickly."""


class SeatedAgents:
    """One agent per seat, as `survey.Prober`. An async context: agents run inside.

    An agent that can't be started, or that ends, is missed: what asks for it gets `ConnectionBroken`.
    """

    def __init__(self, seats: Mapping[str, Seat], clock: Clock) -> None:
        self._clock = clock
        self._posts = {node: _Post(node, seat) for node, seat in seats.items()}
        self._used: dict[tuple[str, str], float] = {}

    async def __aenter__(self) -> Self:
        key = secrets.token_bytes(32)
        try:
            await asyncio.gather(*(post.start(key) for post in self._posts.values()))
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._close()

    def connected(self, source: str, target: str) -> bool:
        """As far as is known here: agents close connections that aren't used."""
        return self._clock.now() - self._used.get((source, target), float("-inf")) < IDLE_SECONDS

    async def probe(self, source: str, target: str, nbytes: int) -> Probe:
        """Let the agent of `source` probe the one of `target`. Raises `ConnectionBroken`."""
        address = self._posts[target].address
        if not address:
            raise ConnectionBroken(f"the agent of {target} isn't there")
        self._used.pop((source, target), None)
        found = await self._posts[source].ask({"node": target, "address": address, "nbytes": nbytes})
        self._used[source, target] = self._clock.now()
        return found

    async def round_trips(self, source: str, targets: Sequence[str]) -> Sequence[float | None]:
        return await one_by_one(self, source, targets)

    async def _close(self) -> None:
        await asyncio.gather(*(post.close() for post in self._posts.values()))


class _Post:
    """One agent's process and the conversation with it."""

    def __init__(self, node: str, seat: Seat) -> None:
        self.address = ""
        """Where other agents reach it; "" while it isn't there."""
        self._node = node
        self._seat = seat
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[Probe]] = {}

    async def start(self, key: bytes) -> None:
        """Have it listen, or log why it doesn't."""
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._seat.prefix,
                sys.executable,
                "-P",
                "-m",
                outpost.__name__,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for the master, which ends it then
            )
            self._send({"node": self._node, "key": key.hex(), "listen": f"tcp://{self._seat.host}:0"})
            assert self._process.stdout is not None
            async with asyncio.timeout(START_SECONDS):
                line = await self._process.stdout.readline()
        except (OSError, TimeoutError) as exc:
            log.warning("the agent of %s can't be started: %s", self._node, exc or "it doesn't answer")
            return
        if line:
            self.address = json.loads(line)["address"]
            self._reading = asyncio.create_task(self._read(), name=f"hear the agent of {self._node}")
        else:
            log.warning("the agent of %s ended at once", self._node)

    async def ask(self, request: dict[str, Any]) -> Probe:
        """Raises `ConnectionBroken` with the agent's own words, or when there is no agent."""
        if not self.address:
            raise ConnectionBroken(f"the agent of {self._node} isn't there")
        number = next(self._numbers)
        answer: asyncio.Future[Probe] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            self._send({**request, "id": number})
            async with asyncio.timeout(2 * TIMEOUT):
                return await answer
        except TimeoutError as exc:
            raise ConnectionBroken(f"the agent of {self._node} doesn't answer") from exc
        finally:
            del self._waiting[number]

    async def close(self) -> None:
        """End it."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(START_SECONDS):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        if self._reading is not None:
            await self._reading

    def _send(self, request: dict[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")  # a few bytes: nothing to wait for

    async def _read(self) -> None:
        """Hear its answers until it ends."""
        assert self._process is not None
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            said = json.loads(line)
            answer = self._waiting.get(said["id"])
            if answer is None or answer.done():
                continue
            if "error" in said:
                answer.set_exception(ConnectionBroken(said["error"]))
            else:
                answer.set_result(Probe(said["round_trip"], said["transfer"]))
        self.address = ""
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(ConnectionBroken(f"the agent of {self._node} has ended"))
