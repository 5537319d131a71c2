"""The data thread of a pod's process, and the event loops that Nomad's processes run.

Links, actor and user's functions never hold up what the main thread says to the master (`host`), since they live in a
loop of their own.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class DataThread:
    """The thread with the loop in which links and actor live."""

    def __init__(self) -> None:
        self._loop = new_loop()
        self._thread = threading.Thread(target=self._run, name="data", daemon=True)
        self._thread.start()

    def call(self, job: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine there."""
        return asyncio.run_coroutine_threadsafe(job, self._loop)

    def run(self, job: Callable[..., None], *args: Any) -> None:
        """Call a function there, without waiting."""
        self._loop.call_soon_threadsafe(job, *args)

    async def on_loop(self, job: Callable[[], T]) -> T:
        """Call a function there, and wait for its result."""

        async def wrapped() -> T:
            return job()

        return await asyncio.wrap_future(self.call(wrapped()))

    def close(self) -> None:
        """End the loop and wait for the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()


def new_loop() -> asyncio.AbstractEventLoop:
    """A uvloop where it exists, asyncio's own loop elsewhere."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
