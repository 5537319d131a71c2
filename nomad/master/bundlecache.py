"""Bundles in memory, each read once for all operators that need it at the same time. Used by the enactor."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from weakref import WeakValueDictionary

from nomad import bundle
from nomad.bundle import Bundle
from nomad.master.store import Store

KEPT = 4
"""Bundles; the operators of a pipeline are assigned at about the same time."""

KEPT_BYTES = 96 << 20
"""Of all that are kept; the newest is, whatever its size."""

READ_AT_ONCE = 2
"""Different bundles: while one is put together it takes several times its size."""


class BundleCache:
    """Verified bundles of a store, by digest."""

    def __init__(self, store: Store, verify_key: bytes) -> None:
        self._store = store
        self._verify_key = verify_key
        self._kept: OrderedDict[str, Bundle] = OrderedDict()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # of those that are asked for now
        self._reading = asyncio.Semaphore(READ_AT_ONCE)

    async def get(self, digest: str) -> Bundle:
        """Raises `StateError` or `BundleError`."""
        lock = self._locks.setdefault(digest, asyncio.Lock())
        async with lock:
            if digest not in self._kept:
                async with self._reading:
                    data = await self._store.bundle(digest)
                    self._kept[digest] = await asyncio.to_thread(bundle.read, data, self._verify_key)
            found = self._kept[digest]
            self._kept.move_to_end(digest)
            while len(self._kept) > 1 and (len(self._kept) > KEPT or sum(map(_size, self._kept.values())) > KEPT_BYTES):
                self._kept.popitem(last=False)
            return found


def _size(found: Bundle) -> int:
    return len(found.manifest_bytes) + len(found.types) + sum(map(len, found.code.values()))
