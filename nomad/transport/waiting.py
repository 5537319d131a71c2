"""How a task waits for something that a callback of the event loop brings about.

Used by the connections of all transports, which have one reader and one writer each.
"""

from __future__ import annotations

import asyncio


class Waiter:
    """Lets one task wait; a wake-up without a waiting task is forgotten, so look at the state again after `wait`."""

    __slots__ = ("_future",)

    def __init__(self) -> None:
        self._future: asyncio.Future[None] | None = None

    async def wait(self) -> None:
        """Wait for the next `wake`."""
        if self._future is not None:
            raise RuntimeError("another task waits for this already; a connection has one reader and one writer")
        self._future = asyncio.get_running_loop().create_future()
        try:
            await self._future
        finally:
            self._future = None

    def wake(self) -> None:
        if self._future is not None and not self._future.done():
            self._future.set_result(None)
