"""A pipeline of real operator instances in one event loop, over `inproc`; any can be cut, killed and restarted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from nomad import pipeline
from nomad.actor.instance import Instance
from nomad.bundle import LoadedOperator
from nomad.clock import Clock, SystemClock
from nomad.control import Assignment, LinkPeer, Role, Shape
from nomad.pipeline import Operator

PATIENCE = 30.0
"""Seconds until a test gives up on something that must happen."""

KEY = bytes(range(32))


async def until(condition: Callable[[], Any], what: str = "") -> None:
    """Wait for `condition` to hold."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"it doesn't happen: {what or condition}"
        await asyncio.sleep(0.001)


@dataclass
class Life:
    """One instance of an operator."""

    epoch: int
    instance: Instance
    address: str | None
    running: asyncio.Task[None]

    async def kill(self) -> None:
        """End it as a kill would: nothing that it has in memory is saved or sent."""
        self.running.cancel()
        self.instance.cut()
        await asyncio.gather(self.running, return_exceptions=True)
        await self.instance.close()

    def status(self, link: str) -> dict[str, Any]:
        """What it says of one of its links."""
        return next(status for status in self.instance.status()["links"] if status["link"] == link)


class Member:
    """One operator of the chain, through all its instances."""

    def __init__(self, number: int, operator: Operator):
        self.number = number
        self.operator = operator
        self.epoch = 0
        """The newest that was given to an instance."""
        self.life: Life
        """The one that the neighbours are told of."""
        self.next: Life | None = None
        """Its successor, while it moves."""

    @property
    def name(self) -> str:
        return self.operator.spec.name

    @property
    def instance(self) -> Instance:
        return self.life.instance

    @property
    def running(self) -> asyncio.Task[None]:
        return self.life.running

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
        listen: str = "inproc:",
        shape: Shape | None = None,
        apart: bool = False,
    ):
        """`apart`: each instance has a folder of its own, as in a cluster that isn't one machine."""
        self.members = [
            Member(number, operator) for number, operator in enumerate(pipeline.build(list(operators)).operators)
        ]
        self._folder = folder
        self._clock = clock or SystemClock()
        self._codec = codec
        self._listen = listen
        self._shape = shape or Shape()
        self._apart = apart
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
        """Kill an instance, and the one that is to take its place, if there is one."""
        member = self[number]
        await member.life.kill()
        if member.next is not None:
            await member.next.kill()
            member.next = None

    async def restart(self, *numbers: int) -> None:
        """Kill members, all of them first, and start them anew."""
        for number in numbers:
            await self.kill(number)
        for number in sorted(numbers, reverse=True):
            await self._start(self[number])

    # -- moves, step by step

    async def move(self, number: int) -> None:
        """All steps of a move. The first and the last operator are replaced in the same way."""
        await self.prepare(number)
        await self.connected(number)
        await self.hand_over(number)
        old = self.switch(number)
        if number == 0:
            await self.end_source(old)
        await self.taken_over(number)
        await old.kill()

    async def prepare(self, number: int) -> None:
        """Start the next instance, and tell the neighbours."""
        member = self[number]
        member.next = await self._live(member, Role.STANDBY)
        self.introduce(number)

    async def connected(self, number: int) -> None:
        """Until all have greeted each other."""
        member = self[number]
        new = member.next
        assert new is not None
        if number:
            before = self[number - 1]
            await until(lambda: before.life.status(self.link(number - 1))["standby"] == new.epoch)
        if number < self.last:
            after = self[number + 1]
            await until(lambda: new.status(self.link(number))["epoch"] == after.life.epoch)

    async def hand_over(self, number: int) -> None:
        """What was set aside is the next instance's from now on."""
        member = self[number]
        assert member.next is not None
        old, new = member.life.instance, member.next.instance
        goal = Role.HALTED if number in (0, self.last) else Role.RETIRED
        old.set_role(goal)
        await until(lambda: old.status()["role"] == goal)
        if number:
            new.set_role(Role.ACTIVE, old.status()["called"])
            await until(lambda: new.status()["role"] == Role.ACTIVE)

    async def end_source(self, old: Life) -> None:
        """What made messages ends, and begins in the next instance."""
        old.instance.set_role(Role.RETIRED)
        await until(lambda: old.instance.status()["role"] == Role.RETIRED)
        self[0].instance.set_role(Role.ACTIVE)

    def switch(self, number: int) -> Life:
        """The one before is to send to the next instance; the old one."""
        member = self[number]
        assert member.next is not None
        old, member.life, member.next = member.life, member.next, None
        if number:
            before = self[number - 1]
            before.instance.set_peers(self._links(before))
        return old

    async def taken_over(self, number: int) -> None:
        """Until the one behind hears the next instance; then no other is heard any more."""
        member = self[number]
        if number < self.last:
            after = self[number + 1]
            await until(lambda: after.life.status(self.link(number))["epoch"] == member.life.epoch)
        else:
            before = self[number - 1]
            await until(lambda: before.life.status(self.link(number - 1))["epoch"] == member.life.epoch)
        self.introduce(number)

    async def roll_back(self, number: int) -> None:
        """The next instance ends before the switch."""
        member = self[number]
        assert member.next is not None
        await member.next.kill()
        member.next = None
        member.instance.set_role(Role.ACTIVE)
        self.introduce(number)

    @property
    def last(self) -> int:
        return len(self.members) - 1

    def link(self, number: int) -> str:
        """The link out of an operator."""
        return f"p:{self[number].name}>{self[number + 1].name}"

    def introduce(self, number: int) -> None:
        """The neighbours learn where a member is, and its epoch."""
        for other in (number - 1, number + 1):
            if 0 <= other < len(self.members) and self[other].epoch:
                self[other].instance.set_peers(self._links(self[other]))
                following = self[other].next
                if following is not None:
                    following.instance.set_peers(self._links(self[other]))

    async def _start(self, member: Member) -> None:
        member.life = await self._live(member, Role.ACTIVE)
        self.introduce(member.number)

    async def _live(self, member: Member, role: Role) -> Life:
        member.epoch += 1
        folder = self._folder / member.name if self._folder else None
        if folder is not None:
            folder = folder / str(member.epoch) if self._apart else folder
            folder.mkdir(exist_ok=True, parents=True)
        assignment = Assignment(
            "p", member.name, member.epoch, "node", b"", b"", b"", b"", KEY, self._listen, self._links(member),
            workdir=str(folder or ""), role=role, **self._options,
        )  # fmt: skip
        loaded = LoadedOperator(member.operator.spec, member.operator.function, {}, self._codec, member.number)
        instance = Instance(assignment, loaded, self._clock)
        address = await instance.start()
        running = asyncio.create_task(instance.run(), name=f"{member.name} {member.epoch}")
        return Life(member.epoch, instance, address, running)

    def _links(self, member: Member) -> list[LinkPeer]:
        links = []
        if member.number:
            links.append(self._peer(self.link(member.number - 1), "in", self[member.number - 1]))
        if member.number + 1 < len(self.members):
            links.append(self._peer(self.link(member.number), "out", self[member.number + 1]))
        return links

    def _peer(self, link: str, direction: str, peer: Member) -> LinkPeer:
        out = direction == "out"
        told = LinkPeer(link, direction, peer.name, shape=self._shape, standby_shape=self._shape)
        if peer.epoch:
            told.address, told.peer_epoch = peer.life.address if out else None, peer.life.epoch
        if peer.next is not None:
            told.standby_address, told.standby_epoch = peer.next.address if out else None, peer.next.epoch
        return told
