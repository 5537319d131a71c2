"""How bundles are written into a cluster, without one; tests/kubernetes has the contract of the store, with one."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest

from nomad.errors import ApiError, ApiExists, ApiNotFound, ApiUnavailable, StateError
from nomad.master.kube import resource
from nomad.master.kube.bundles import AT_ONCE, KEPT, Bundles
from nomad.master.kube.writes import USER, Writes
from tests.clock import VirtualClock
from tests.master.kube.fakeapi import FakeApi

T = TypeVar("T")

CHUNKS = 40
DATA = bytes(range(256)) * (CHUNKS * resource.CHUNK // 256 - 1)
DIGEST = hashlib.sha256(b"manifest").hexdigest()


class Secrets:
    """An API server that holds Secrets, and answers as `failing` says: the errors of each, by number of the chunk."""

    def __init__(self, clock: VirtualClock) -> None:
        self.clock = clock
        self.there: dict[str, Any] = {}
        self.failing: dict[int, list[ApiError]] = {}
        self.away = False
        self.asked: Counter[str] = Counter()
        self.now = self.most = 0

    async def create(self, path: str, body: Any) -> Any:
        name = body["metadata"]["name"]
        await self._answer(name)
        if name in self.there:
            raise ApiExists(name)
        self.there[name] = body
        return body

    async def get(self, path: str) -> Any:
        name = path.rpartition("/")[2]
        await self._answer(name)
        if name not in self.there:
            raise ApiNotFound(name)
        return self.there[name]

    async def _answer(self, name: str) -> None:
        self.asked[name] += 1
        self.now += 1
        self.most = max(self.most, self.now)
        await self.clock.sleep(0.1)
        self.now -= 1
        if self.away:
            raise ApiUnavailable("it can't be reached")
        if errors := self.failing.get(int(name.rpartition("-")[2])):
            raise errors.pop()


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def api(clock: VirtualClock) -> Secrets:
    return Secrets(clock)


@pytest.fixture
def bundles(api: Any, clock: VirtualClock) -> Bundles:
    return Bundles(api, "nomad", Writes("master-a", clock), clock)


async def passing(clock: VirtualClock, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives, while time passes as it has to."""
    task = asyncio.create_task(work)
    async with asyncio.timeout(30):
        while not task.done():
            if clock.sleeping:
                await clock.advance(0.1)
            await asyncio.sleep(0)
    return await task


async def test_several_chunks_are_on_their_way_at_once(api: Secrets, bundles: Bundles, clock: VirtualClock) -> None:
    before = clock.now()
    await passing(clock, bundles.add(DIGEST, DATA, USER))
    assert (len(api.there), api.most) == (CHUNKS, AT_ONCE)
    assert clock.now() - before == pytest.approx(0.1 * CHUNKS / AT_ONCE, abs=0.15)
    api.most = 0
    assert await passing(clock, bundles.read(DIGEST, USER)) == DATA
    assert api.most == AT_ONCE


async def test_a_chunk_that_is_turned_away_is_sent_again(api: Secrets, bundles: Bundles, clock: VirtualClock) -> None:
    errors = [ApiUnavailable("too many requests", status=429), ApiUnavailable("etcd is away", status=500)]
    api.failing = {3: list(errors), 17: list(errors), CHUNKS - 1: [errors[1]]}
    await passing(clock, bundles.add(DIGEST, DATA, USER))
    assert await passing(clock, bundles.read(DIGEST, USER)) == DATA
    sent = {number: api.asked[resource.bundle_name(DIGEST, number)] - 1 for number in range(CHUNKS)}
    assert {number: count for number, count in sent.items() if count != 1} == {3: 3, 17: 3, CHUNKS - 1: 2}


async def test_an_api_that_is_away_is_said_at_once(api: Secrets, bundles: Bundles, clock: VirtualClock) -> None:
    """Not after each of the chunks has waited for it."""
    before, api.away = clock.now(), True
    with pytest.raises(StateError, match="API doesn't answer"):
        await passing(clock, bundles.add(DIGEST, DATA, USER))
    assert clock.now() - before < USER + 1.0
    assert len(api.asked) == AT_ONCE


def test_all_of_a_bundle_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large one for each of its chunks took a master longer than it may lead without saying so."""
    hashed: list[int] = []
    sha256 = hashlib.sha256

    def counting(data: bytes = b"") -> Any:
        hashed.append(len(data))
        return sha256(data)

    monkeypatch.setattr(resource.hashlib, "sha256", counting)
    assert len(list(resource.bundle_secrets(DIGEST, DATA))) == CHUNKS
    assert hashed == [len(DATA)]


@pytest.mark.parametrize(
    ("size", "count"), [(0, 1), (1, 1), (resource.CHUNK, 1), (resource.CHUNK + 1, 2), (2 * resource.CHUNK, 2)]
)
def test_how_many_chunks_there_are(size: int, count: int) -> None:
    secrets = list(resource.bundle_secrets(DIGEST, bytes(size)))
    assert len(secrets) == count
    assert {secret["metadata"]["annotations"][resource.CHUNKS_ANNOTATION] for secret in secrets} == {str(count)}


SMALL = b"the bundle"


async def _unused_for_a_day(found: FakeApi, clock: VirtualClock) -> Bundles:
    bundles = Bundles(found, "nomad", Writes("master-a", clock), clock)  # type: ignore[arg-type]
    await bundles.add(DIGEST, SMALL, USER)
    await bundles.sweep(())
    await clock.advance(KEPT.total_seconds())
    return bundles


@pytest.mark.parametrize("verb", ["list", "delete"])
async def test_a_bundle_is_added_while_unused_ones_are_deleted(clock: VirtualClock, verb: str) -> None:
    """A user waits for none of it, and what has been unused until then is there."""
    found = FakeApi()
    bundles = await _unused_for_a_day(found, clock)
    there, go_on = asyncio.Event(), asyncio.Event()

    async def meet(asked: str, path: str) -> None:
        if asked == verb:
            there.set()
            await go_on.wait()

    found.meet = meet  # type: ignore[method-assign]
    sweeping = asyncio.create_task(bundles.sweep(()))
    async with asyncio.timeout(30):
        await there.wait()
        await bundles.add(DIGEST, SMALL, USER)
        go_on.set()
        await sweeping
    assert await bundles.read(DIGEST, USER) == SMALL


async def test_a_bundle_is_added_that_has_just_been_deleted(clock: VirtualClock) -> None:
    found = FakeApi()
    bundles = await _unused_for_a_day(found, clock)

    async def meet(verb: str, path: str) -> None:
        if verb == "patch":  # add() has looked, and would say that it is used
            found.objects.clear()

    found.meet = meet  # type: ignore[method-assign]
    await bundles.add(DIGEST, SMALL, USER)
    assert await bundles.read(DIGEST, USER) == SMALL


async def test_an_unused_bundle_goes_after_a_day(clock: VirtualClock) -> None:
    found = FakeApi()
    bundles = await _unused_for_a_day(found, clock)
    await bundles.sweep({DIGEST})
    assert (await bundles.sweep(())) == KEPT.total_seconds()
    assert len(found.objects) == 1
    await clock.advance(KEPT.total_seconds())
    await bundles.sweep(())
    assert not found.objects
