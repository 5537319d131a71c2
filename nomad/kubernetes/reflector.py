"""A copy of a list in the cluster that is kept up to date: list once, then watch from there.

Used for pods, nodes and pipelines. What arrives is transformed at once, so that only what is needed of
each object stays in memory. Changes are told in order, each once. A watch that breaks is taken up where it was;
one whose place is too old is begun again with a list, and what changed meanwhile is told as changes. Asks for
nothing while nothing happens, but for a new watch every few minutes. An object that can't be understood is passed over,
with a warning: whoever can write one shall not blind a master to all others.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Mapping
from contextlib import aclosing
from typing import Any, Generic, TypeVar

from nomad.clock import Clock, SystemClock
from nomad.errors import ApiError, ApiGone
from nomad.kubernetes.api import Api, Json
from nomad.settings import Backoff

log = logging.getLogger(__name__)

T = TypeVar("T")

WATCH_SECONDS = (300, 600)
"""A watch is ended by the API after a time in between, not all of them at the same moment."""

SHORTEST = 1.0
"""Seconds; a watch that brought nothing and ended sooner counts as a failure."""

BACKOFF = Backoff(first=0.2, factor=2.0, limit=5.0)
"""An API that comes back is noticed within seconds: what happens to pods isn't seen before."""


class Reflector(Generic[T]):
    """Objects of one list, by name. `run` is its one task, owned by who made it."""

    def __init__(
        self,
        api: Api,
        path: str,
        take: Callable[[Json], T],
        on_change: Callable[[T | None, T | None], None] = lambda old, new: None,
        *,
        params: Mapping[str, Any] | None = None,
        clock: Clock | None = None,
        rng: random.Random | None = None,
    ) -> None:
        """`take` keeps of an object what is needed; what it raises means that the object can't be understood, and what
        was known of it stays. `on_change(old, new)` is called with each change, at once and in order: None and the new
        one, both, or the old one and None; not when both are equal. `params`: selectors.
        """
        self.items: dict[str, T] = {}
        """By the object's name. For reading."""
        self.error = ""
        """Why it is behind; "" when it isn't, as far as is known."""
        self._versions: dict[str, int] = {}
        self._odd: set[str] = set()  # names of objects that can't be understood
        self._api = api
        self._path = path
        self._take = take
        self._on_change = on_change
        self._params = dict(params or {})
        self._clock = clock or SystemClock()
        self._rng = rng or random.Random()
        self._synced = asyncio.Event()
        self._place = ""  # the resource version up to which everything was heard

    async def run(self) -> None:
        """List and watch until cancelled. Raises what `on_change` does."""
        failures = 0
        while True:
            began, heard = self._clock.now(), False
            try:
                if not self._place:
                    await self._list()
                seconds = self._rng.randint(*WATCH_SECONDS)
                watch = self._api.watch(self._path, self._params, self._place, seconds=seconds, opened=self._ok)
                async with aclosing(watch) as events:  # type: ignore[type-var]
                    async for event in events:
                        heard, failures = True, 0
                        self._event(event)
            except ApiGone as exc:
                log.info("%s is listed again: %s", self._path, exc)
                self._place = ""
            except ApiError as exc:
                self._behind(str(exc))
            if heard or self._clock.now() - began >= SHORTEST:
                failures = 0 if not self.error else max(failures, 1)
            else:
                failures += 1
            if failures:
                await self._clock.sleep(BACKOFF.delay(failures) * self._rng.uniform(0.5, 1.5))

    async def synced(self) -> None:
        """Wait until the list was read once."""
        await self._synced.wait()

    def seen(self, item: Json) -> None:
        """Take in what an answer to a write showed, ahead of the watch; an older event that is under way is ignored,
        and so is an answer that the watch was ahead of: the object may be gone by now.
        """
        if not self._place or _number(item["metadata"]["resourceVersion"]) > _number(self._place):
            self._put(item)

    # Inside

    async def _list(self) -> None:
        found, place = await self._api.collect(self._path, self._reduced, self._params)
        at = _number(place)
        names = set()
        for name, version, taken in found:
            names.add(name)
            for item in taken:
                self._set(name, version, item)
        for name in [name for name in self.items if name not in names and self._versions[name] <= at]:
            self._drop(name)
        self._odd &= names
        self._place = place
        self._synced.set()

    def _event(self, event: Json) -> None:
        item = event["object"]
        if event["type"] == "DELETED":
            name = item["metadata"]["name"]
            if self._versions.get(name, 0) <= _number(item["metadata"]["resourceVersion"]):
                self._drop(name)
        elif event["type"] != "BOOKMARK":
            self._put(item)
        self._place = item["metadata"]["resourceVersion"]

    def _reduced(self, item: Json) -> tuple[str, int, tuple[T, ...]]:
        """Name, version, and what is kept of it: nothing of one that can't be understood."""
        metadata = item["metadata"]
        name, version = metadata["name"], _number(metadata["resourceVersion"])
        try:
            taken = self._take(item)
        except Exception:
            if name not in self._odd:
                self._odd.add(name)
                log.warning("%s/%s can't be understood and is passed over", self._path, name, exc_info=True)
            return name, version, ()
        self._odd.discard(name)
        return name, version, (taken,)

    def _put(self, item: Json) -> None:
        name, version, taken = self._reduced(item)
        for kept in taken:
            self._set(name, version, kept)

    def _set(self, name: str, version: int, item: T) -> None:
        if version < self._versions.get(name, 0):
            return  # from before what is known already
        self._versions[name] = version
        old = self.items.get(name)
        if old != item:
            self.items[name] = item
            self._on_change(old, item)

    def _drop(self, name: str) -> None:
        self._odd.discard(name)
        self._versions.pop(name, None)
        old = self.items.pop(name, None)
        if old is not None:
            self._on_change(old, None)

    def _ok(self) -> None:
        if self.error:
            log.info("%s is up to date again", self._path)
            self.error = ""

    def _behind(self, error: str) -> None:
        if not self.error:
            log.warning("%s can't be watched: %s", self._path, error)
        self.error = error


def _number(version: str) -> int:
    """Resource versions grow; what isn't a number is taken for newer than anything."""
    return int(version) if version.isdigit() else 1 << 63
