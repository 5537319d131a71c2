"""How a master writes to its cluster: again while the API doesn't answer, and never once another master leads.

`Writes` is shared by all that `store` is made of. A call that returned has taken effect; one that raised may have.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from nomad.clock import Clock
from nomad.errors import ApiConflict, ApiError, ApiNotFound, ApiUnavailable, StateError
from nomad.tasks import first

log = logging.getLogger(__name__)

T = TypeVar("T")

USER = 5.0
"""Seconds that a user waits for an API that doesn't answer, before being told so."""
LOOP = 90.0
"""Seconds that the master's own work waits: an API server that is replaced is back by then."""
ALWAYS = float("inf")
"""For what nobody would do again."""

_LONGEST_PAUSE = 5.0


class Writes:
    """The writes of one master."""

    def __init__(self, identity: str, clock: Clock, lasts: Callable[[], bool] = lambda: True) -> None:
        """`lasts`: whether this master leads, asked before each write."""
        self.term = 0
        """Higher than that of all masters before; known once what they left was looked at."""
        self.fenced = asyncio.Event()
        """Another master leads. Nothing is written any more; this process should end."""
        self._identity = identity
        self._clock = clock
        self._lasts = lasts
        self._why = ""

    @property
    def writer(self) -> str:
        """What this process leaves on what it writes; unique for ever."""
        return f"{self.term}/{self._identity}"

    def fence(self, why: str) -> None:
        """Write nothing any more. `why` is a clause for those who want to."""
        if not self.fenced.is_set():
            log.error("this master leads no more: %s", why)
            self._why = why
            self.fenced.set()

    def look(self, writer: str) -> None:
        """Fence when what is there was written by a master that came after this one."""
        if writer != self.writer and term_of(writer) >= self.term > 0:
            self.fence(f"{writer} leads now")

    async def patiently(self, call: Callable[[], Awaitable[T]], patience: float) -> T:
        """What `call` gives; asked again for `patience` seconds while the API doesn't answer.

        Raises `ApiConflict` and `ApiNotFound` as they come, `StateError` for everything else.
        """
        deadline, pause = self._clock.now() + patience, 0.1
        while True:
            self._check()
            try:
                async with asyncio.timeout(None if patience == ALWAYS else max(1.0, deadline - self._clock.now())):
                    return await call()
            except (ApiConflict, ApiNotFound):
                raise
            except (ApiUnavailable, TimeoutError) as exc:
                if self._clock.now() + pause >= deadline:
                    raise StateError(
                        f"Kubernetes' API doesn't answer, so nothing can be written down; what runs goes on ({exc})"
                    ) from exc
                log.debug("asking again in %.1f s: %s", pause, exc)
            except ApiError as exc:
                raise StateError(f"Kubernetes' API refuses what has to be written down: {exc}") from exc
            await first(self._clock.sleep(pause * random.uniform(0.8, 1.2)), self.fenced.wait())
            pause = min(2 * pause, _LONGEST_PAUSE)

    @asynccontextmanager
    async def turn(self, lock: asyncio.Lock, patience: float) -> AsyncIterator[float]:
        """Hold `lock`, which other writes have meanwhile: what is left of `patience` then. Raises `StateError`."""
        began = self._clock.now()
        try:
            async with asyncio.timeout(None if patience == ALWAYS else patience):
                await lock.acquire()
        except TimeoutError as exc:
            raise StateError(
                "Kubernetes' API doesn't answer, so nothing can be written down; what runs goes on (another write has "
                "waited for it longer)"
            ) from exc
        try:
            yield patience - (self._clock.now() - began)
        finally:
            lock.release()

    def is_about_one(self, exc: StateError) -> bool:
        """Whether it is one object that couldn't be read or written, and others may do."""
        return not self.fenced.is_set() and not isinstance(exc.__cause__, (ApiUnavailable, TimeoutError))

    def _check(self) -> None:
        if not self._lasts():
            self.fence("its time has run out")
        if self.fenced.is_set():
            raise StateError(f"this master leads no more, {self._why}: ask again, another one answers")


def term_of(writer: str) -> int:
    """0 where no master has written."""
    number, _, _ = writer.partition("/")
    return int(number) if number.isdecimal() else 0
