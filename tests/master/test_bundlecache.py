"""Bundles that a master holds: each is read once, and not all of them stay."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from nomad import bundle
from nomad.errors import BundleError, StateError
from nomad.master import bundlecache
from nomad.master.bundlecache import BundleCache
from nomad.pipeline import build

KEY = bytes(range(32))


def numbers() -> Iterator[int]:
    yield from range(3)


def double(number: int) -> int:
    return 2 * number


def made(index: int) -> bytes:
    return bundle.make(build([numbers, double, print], profile=[{"cloud_execution_time": float(index)}, {}, {}]), KEY)


class Stored:
    """Bundles `0`, `1` and so on, which are given once they may be."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.under_way = self.most = 0
        self.ready = asyncio.Event()
        self.failing: list[Exception] = []

    async def bundle(self, digest: str) -> bytes:
        self.asked[digest] += 1
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            await self.ready.wait()
        finally:
            self.under_way -= 1
        if self.failing:
            raise self.failing.pop()
        return b"no bundle" if digest == "bad" else made(int(digest))


@pytest.fixture
def stored() -> Stored:
    return Stored()


@pytest.fixture
def cache(stored: Any) -> BundleCache:
    return BundleCache(stored, bundle.public_key(KEY))


async def _all(cache: BundleCache, stored: Stored, *digests: str) -> list[Any]:
    asking = [asyncio.create_task(cache.get(digest)) for digest in digests]
    async with asyncio.timeout(30):
        while not stored.asked:
            await asyncio.sleep(0)
        stored.ready.set()
        return await asyncio.gather(*asking, return_exceptions=True)


async def test_all_operators_of_a_pipeline_wait_for_the_same_bundle(stored: Stored, cache: BundleCache) -> None:
    found = await _all(cache, stored, *["1"] * 20)
    assert stored.asked == {"1": 1}
    assert all(each is found[0] for each in found)
    assert await cache.get("1") is found[0]


async def test_few_are_read_at_the_same_time(stored: Stored, cache: BundleCache) -> None:
    await _all(cache, stored, *map(str, range(8)))
    assert (stored.most, stored.asked.total()) == (bundlecache.READ_AT_ONCE, 8)


async def test_who_gives_up_or_fails_leaves_it_to_the_next(stored: Stored, cache: BundleCache) -> None:
    given_up = asyncio.create_task(cache.get("1"))
    while not stored.asked:
        await asyncio.sleep(0)
    given_up.cancel()
    stored.failing = [StateError("it is missing")]
    failed, found = await _all(cache, stored, "1", "1")
    assert isinstance(failed, StateError)
    assert found.digest == (await cache.get("1")).digest
    assert stored.asked == {"1": 3}
    assert given_up.cancelled()


async def test_what_is_no_bundle_isnt_kept(stored: Stored, cache: BundleCache) -> None:
    stored.ready.set()
    for _ in range(2):
        with pytest.raises(BundleError):
            await cache.get("bad")
    assert stored.asked == {"bad": 2}


@pytest.mark.parametrize(("name", "value"), [("KEPT", 3), ("KEPT_BYTES", 3 * len(made(1)))])
async def test_the_last_ones_stay(
    stored: Stored, cache: BundleCache, monkeypatch: pytest.MonkeyPatch, name: str, value: int
) -> None:
    monkeypatch.setattr(bundlecache, name, value)
    stored.ready.set()
    for digest in "1213141516":
        await cache.get(digest)
    assert stored.asked == dict.fromkeys("123456", 1)  # what is used stays
    await cache.get("2")
    assert stored.asked["2"] == 2
    monkeypatch.setattr(bundlecache, "KEPT_BYTES", 1)
    assert await cache.get("7") is await cache.get("7")  # the newest, whatever its size
