"""Background tasks that someone owns: kept while they run, heard when they fail, awaited on close."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

log = logging.getLogger(__name__)


class Tasks:
    """The tasks of one owner. A task that fails is logged; the owner's others go on."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        """Run `work` until it ends or `close`."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._running.add(task)
        task.add_done_callback(self._done)
        return task

    async def close(self) -> None:
        """Cancel what runs and wait for it. Idempotent."""
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(self._running)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s failed", task.get_name(), exc_info=error)


class Turns:
    """For work that would hold up the event loop: `await turns.give()` in it, and often, lets others have their turn
    whenever it has gone on for so many seconds. What comes in meanwhile waits for up to twice as long.
    """

    def __init__(self, seconds: float = 0.005) -> None:
        self._seconds = seconds
        self._since = time.perf_counter()

    async def give(self) -> None:
        """Let the loop come round, if it is time for it."""
        if time.perf_counter() - self._since >= self._seconds:
            await asyncio.sleep(0)
            self._since = time.perf_counter()


async def first(*work: Coroutine[Any, Any, Any]) -> None:
    """Run `work` until one of them is done, and cancel the others. What it returned or failed with isn't looked at."""
    tasks = [asyncio.create_task(coroutine) for coroutine in work]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def alongside(*work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run `work` while the block runs, and cancel it at the block's end.

    If one of them fails, the block is cancelled and what it failed with is raised in its place. Other than with a
    task group, an exception of the block itself passes through as it is.
    """
    block = asyncio.current_task()
    assert block is not None
    cancellations = block.cancelling()
    errors: list[BaseException] = []

    def done(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            if not errors:
                block.cancel()
            errors.append(error)

    tasks = [asyncio.create_task(coroutine) for coroutine in work]
    for task in tasks:
        task.add_done_callback(done)
    try:
        yield
    except asyncio.CancelledError:
        if errors and block.uncancel() <= cancellations:
            raise errors[0] from None
        raise
    finally:
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
