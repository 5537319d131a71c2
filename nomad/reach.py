"""What pods and agents, whose control connections the master has, do alike to have one with a master that is at work.

`dial` doesn't wait long for one that doesn't answer, at first: another one may lead already, behind the same address.
`Silence` finds out that the other end of a connection hangs. Its machine still answers for it then, and neither TCP nor
TLS notice anything; but no more words come (see `nomad.control`). Used by `nomad.actor.channel` and
`nomad.measure.node`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from nomad import control
from nomad.clock import Clock
from nomad.transport import registry
from nomad.transport.base import Connection
from nomad.transport.tcp import arriving, break_unanswered

log = logging.getLogger(__name__)

PATIENCE_LEAST, PATIENCE_MOST = 3.0, 10.0
"""Seconds that a master may take to answer who dials it; as long as it was away, between these.

The least is for one that hangs: what dials it again must be through to the next one before that gives up waiting for
its pods (`settings.Reconcile.adopt_grace`). The most is for one that thousands dial at once.
"""

LOOK_SECONDS = 1.0
"""Between two looks at whether anything came."""


def patience(alone: float) -> float:
    """Seconds that a master may take to answer; `alone`: how long there was none."""
    return min(PATIENCE_MOST, max(PATIENCE_LEAST, alone))


async def dial(address: str, seconds: float) -> Connection:
    """A connection with the master, which may take that long to accept it. Raises `TransportError`."""
    conn = await registry.connect(address, timeout=seconds)
    break_unanswered(conn, control.UNANSWERED_SECONDS)
    return conn


class Silence:
    """Of the other end of one connection after another; `watch` beside what reads them."""

    def __init__(self, clock: Clock, amid: Callable[[], None] = lambda: None) -> None:
        """`amid` is called at times while a frame comes that takes long, and nothing behind it can be heard."""
        self._clock = clock
        self._amid = amid
        self._conn: Connection | None = None
        self._within: float | None = None
        self._looks = 0
        """Since anything came."""
        self._coming = 0
        """At the last one."""

    def begin(self, conn: Connection) -> None:
        """From now on it is about this connection, on which no word was heard yet."""
        self._conn, self._within = conn, None

    def resume(self, conn: Connection) -> None:
        """The connection that it was about before `end` is read again: words that were heard on it still count."""
        self._conn, self._looks = conn, 0

    def end(self) -> None:
        """Nobody reads the connection any more."""
        self._conn = None

    def heard(self) -> None:
        """Something has come."""
        self._looks = 0

    def word(self, message: dict[str, Any]) -> None:
        """One was heard. Raises `ValueError`, `KeyError` or `TypeError` when it isn't valid."""
        self._within = control.within_from(message)

    async def watch(self) -> None:
        """Break a connection on which nothing has come for too long. Until cancelled.

        Looks are counted, not seconds: while this process itself is held up, there are none.
        """
        while True:
            await self._clock.sleep(LOOK_SECONDS)
            self._looks += 1
            coming = 0 if self._conn is None else arriving(self._conn)
            if coming and coming != self._coming:
                self.heard()
                self._amid()
            self._coming = coming
            if self._conn is not None and self._within is not None and self._looks * LOOK_SECONDS > self._within:
                log.warning("%s hasn't said anything for %g s: taken for hung", self._conn.peer, self._within)
                self._conn.abort()
                self._conn = None
