"""How a task waits for something that a callback of the event loop brings about.

Used by the connections of all transports.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Waiter:
    """Lets tasks wait; a wake-up without a waiting task is forgotten, so look at the state before and after `wait`.

    Unlike an `asyncio.Event` it holds no state that could differ from the one that is waited for.
    """

    __slots__ = ("_futures", "_telling", "callback")

    def __init__(self) -> None:
        self._futures: list[asyncio.Future[None]] = []
        self._telling = False
        self.callback: Callable[[], None] | None = None
        """Called after `wake` too, for owners that would rather not have a task wait."""

    async def wait(self) -> None:
        """Wait for the next `wake`."""
        future = asyncio.get_running_loop().create_future()
        self._futures.append(future)
        try:
            await future
        finally:
            if future in self._futures:  # cancelled before a `wake`
                self._futures.remove(future)

    def wake(self) -> None:
        """Let all go on that wait now, and have the callback called soon: its owner may be in the middle of a call."""
        if self._futures:
            futures, self._futures = self._futures, []
            for future in futures:
                if not future.done():
                    future.set_result(None)
        if self.callback is not None and not self._telling:
            self._telling = True
            asyncio.get_running_loop().call_soon(self._tell)

    def _tell(self) -> None:
        self._telling = False
        if self.callback is not None:
            self.callback()


class Once:
    """What happens once, if it does: an `asyncio.Event` in small, as there are thousands of connections."""

    __slots__ = ("_happened", "_waiter")

    def __init__(self) -> None:
        self._happened = False
        self._waiter: Waiter | None = None

    def set(self) -> None:
        """It has happened."""
        self._happened = True
        if self._waiter is not None:
            self._waiter.wake()

    def is_set(self) -> bool:
        return self._happened

    async def wait(self) -> None:
        """Returns at once when it has happened already."""
        if not self._happened:
            self._waiter = self._waiter or Waiter()
            await self._waiter.wait()
