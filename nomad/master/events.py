"""What happened, in order, with causes: kept in memory for readers, and written to the store in the background.

`add` never waits. What a crash of the master cuts off is the last instant of the record, never what it is about.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import Any

from nomad.clock import Clock
from nomad.errors import StateError
from nomad.fanout import Fanout, Subscription
from nomad.master.store import Store
from nomad.master.views import EventView

log = logging.getLogger(__name__)


class EventLog:
    """The events of one master. `run` writes them down until cancelled; `flush` writes the rest."""

    def __init__(self, store: Store, clock: Clock, kept: list[EventView], keep: int) -> None:
        """`kept`: what the store has; at most `keep` events are held, there and here. No number is given twice."""
        self._store = store
        self._clock = clock
        self._keep = keep
        self._events = deque(kept, maxlen=keep)
        self._last = (kept[-1].id if kept else 0) + store.event_gap
        self._unwritten: list[EventView] = []
        self._written = asyncio.Event()
        self._live: Fanout[EventView] = Fanout()

    def add(
        self,
        kind: str,
        message: str,
        *,
        pipeline: str | None = None,
        operator: str | None = None,
        cause: int | None = None,
        data: dict[str, Any] | None = None,
    ) -> int:
        """Note that something happened; its id, which others may name as their cause."""
        self._last += 1
        event = EventView(self._last, self._clock.wall(), kind, message, pipeline, operator, cause, data or {})
        log.info("%s: %s", kind, message)
        self._events.append(event)
        self._unwritten.append(event)
        self._written.set()
        self._live.publish(event)
        return event.id

    def list(self, pipeline: str | None, after: int, limit: int) -> list[EventView]:
        """Oldest first, ids above `after`; the newest `limit` of them."""
        found = [e for e in self._events if e.id > after and pipeline in (None, e.pipeline)]
        return found[-limit:] if limit > 0 else []

    def subscribe(self) -> Subscription[EventView]:
        return self._live.subscribe(self._keep)

    async def run(self) -> None:
        """Write events down as they come, several at a time. A store that fails costs events, nothing else."""
        while True:
            await self._written.wait()
            self._written.clear()
            try:
                await self.flush()
            except StateError as exc:
                log.warning("events are lost: %s", exc)

    async def flush(self) -> None:
        events, self._unwritten = self._unwritten, []
        if events:
            await self._store.add_events(events, self._keep)

    def close(self) -> None:
        """End all subscriptions."""
        self._live.close()
