"""The one source of time. Components take a `Clock`, so that tests run on a virtual one."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """Time for components that schedule or measure."""

    def now(self) -> float:
        """Monotonic seconds."""
        ...

    def wall(self) -> float:
        """Seconds since the epoch, for records that people read."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait; a virtual clock returns when its time has been moved on."""
        ...


class SystemClock:
    """Real time."""

    now = staticmethod(time.monotonic)
    wall = staticmethod(time.time)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
