"""A pipeline of real operator instances in one event loop, over `inproc`; any can be cut, killed and restarted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from nomad import pipeline
from nomad.actor.instance import Instance
from nomad.bundle import LoadedOperator
from nomad.clock import Clock, SystemClock
from nomad.control import Assignment, LinkPeer
from nomad.pipeline import Operator

PATIENCE = 15.0
"""Seconds until a test gives up on something that must happen."""

KEY = bytes(range(32))


async def until(condition: Callable[[], Any], what: str = "") -> None:
    """Wait for `condition` to hold."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"it doesn't happen: {what or condition}"
        await asyncio.sleep(0.001)


class Member:
    """One operator of the chain, through all its instances."""

    def __init__(self, number: int, operator: Operator):
        self.number = number
        self.operator = operator
        self.epoch = 0
        self.address: str | None = None
        self.instance: Instance
        self.running: asyncio.Task[None]

    @property
    def name(self) -> str:
        return self.operator.spec.name

    @property
    def stats(self) -> Any:
        return self.instance.stats()


class Chain:
    """`operators` as `nomad.submit` takes them: the source first. Used as an async context."""

    def __init__(
        self,
        operators: Sequence[Any],
        folder: Path | None = None,
        *,
        clock: Clock | None = None,
        window_messages: int = 64,
        window_bytes: int = 1 << 20,
        codec: str = "data",
        speed: float = 1.0,
    ):
        self.members = [
            Member(number, operator) for number, operator in enumerate(pipeline.build(list(operators)).operators)
        ]
        self._folder = folder
        self._clock = clock or SystemClock()
        self._codec = codec
        self._options = {"window_messages": window_messages, "window_bytes": window_bytes, "speed": speed}

    def __getitem__(self, number: int) -> Member:
        return self.members[number]

    async def __aenter__(self) -> Self:
        for member in reversed(self.members):  # so that each knows where to dial
            await self._start(member)
        return self

    async def __aexit__(self, *exc: object) -> None:
        for member in self.members:
            await self.kill(member.number)

    async def finished(self) -> None:
        """Until the source has ended and all that it sent is settled. Raises what any member raised."""
        await self.ended(0)

    async def ended(self, number: int) -> None:
        """Until a member has ended by itself. Raises what any raised."""
        running = [member.running for member in self.members]
        async with asyncio.timeout(PATIENCE):
            while not running[number].done():
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
                running = [task for task in running if not task.done()] or running
                if self[number].running.done():
                    break
        self[number].running.result()

    async def kill(self, number: int) -> None:
        """End an instance as a kill would: nothing that it has in memory is saved or sent."""
        member = self[number]
        member.running.cancel()
        member.instance.cut()
        await asyncio.gather(member.running, return_exceptions=True)
        await member.instance.close()

    async def restart(self, *numbers: int) -> None:
        """Kill members, all of them first, and start them anew."""
        for number in numbers:
            await self.kill(number)
        for number in sorted(numbers, reverse=True):
            await self._start(self[number])

    async def _start(self, member: Member) -> None:
        member.epoch += 1
        folder = self._folder / member.name if self._folder else None
        if folder is not None:
            folder.mkdir(exist_ok=True)
        assignment = Assignment(
            "p", member.name, member.epoch, "node", b"", b"", b"", b"", KEY, "inproc:", self._links(member),
            workdir=str(folder or ""), **self._options,
        )  # fmt: skip
        loaded = LoadedOperator(member.operator.spec, member.operator.function, {}, self._codec, member.number)
        member.instance = Instance(assignment, loaded, self._clock)
        member.address = await member.instance.start()
        member.running = asyncio.create_task(member.instance.run(), name=f"{member.name} {member.epoch}")
        for other in (member.number - 1, member.number + 1):  # the neighbours learn the address and the epoch
            if 0 <= other < len(self.members) and self[other].epoch:
                self[other].instance.set_peers(self._links(self[other]))

    def _links(self, member: Member) -> list[LinkPeer]:
        links = []
        if member.number:
            peer = self[member.number - 1]
            links.append(LinkPeer(f"p:{peer.name}>{member.name}", "in", peer.name, None, peer.epoch))
        if member.number + 1 < len(self.members):
            peer = self[member.number + 1]
            links.append(LinkPeer(f"p:{member.name}>{peer.name}", "out", peer.name, peer.address, peer.epoch))
        return links
