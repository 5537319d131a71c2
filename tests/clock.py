"""A clock that tests move by hand."""

from __future__ import annotations

import asyncio
import heapq
import itertools


class VirtualClock:
    """`nomad.clock.Clock` that stands still until `advance` is called."""

    def __init__(self, start: float = 1000.0, wall: float = 1_700_000_000.0) -> None:
        self._now = start
        self._wall_ahead = wall - start
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()

    def now(self) -> float:
        return self._now

    def wall(self) -> float:
        return self._now + self._wall_ahead

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        future = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._now + seconds, next(self._numbers), future))
        await future

    @property
    def sleeping(self) -> int:
        """How many tasks sleep on this clock."""
        return sum(not future.done() for _, _, future in self._sleepers)

    async def advance(self, seconds: float) -> None:
        """Move time on, waking each sleeper at its moment and letting it run before the next."""
        end = self._now + seconds
        await settle()
        while self._sleepers and self._sleepers[0][0] <= end:
            when, _, future = heapq.heappop(self._sleepers)
            if not future.done():
                self._now = max(self._now, when)
                future.set_result(None)
                await settle()
        self._now = end
        await settle()


async def settle(rounds: int = 25) -> None:
    """Let everything run that can run without time passing; `rounds` bounds the longest chain of wake-ups."""
    for _ in range(rounds):
        await asyncio.sleep(0)
