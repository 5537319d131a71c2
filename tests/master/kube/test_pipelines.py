"""What a master does about Pipelines that users change, without a cluster; tests/kubernetes has more, with one."""

from __future__ import annotations

import asyncio
import copy
import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from nomad import bundle
from nomad.errors import ApiForbidden, ConflictError, NotFoundError
from nomad.kubernetes import paths
from nomad.master.kube import resource
from nomad.master.kube.pipelines import AT_ONCE, PipelineWatch
from nomad.master.kube.store import KubernetesStore
from nomad.master.state import Goal
from nomad.master.views import EventView
from nomad.pipeline import build
from nomad.tasks import alongside
from tests.clock import VirtualClock, settle
from tests.contract.store import BUNDLE, wanted
from tests.master.fakepods import OPERATORS
from tests.master.kube.fakeapi import FakeApi

KEY = bytes(range(32))
PIPELINE = paths.pipelines("nomad", "p")
GOOD = bundle.make(build(OPERATORS), KEY)
SPEC = bundle.read(GOOD, bundle.public_key(KEY)).spec("p", "edge", "cloud")
DIGEST = bundle.read(GOOD, bundle.public_key(KEY)).digest


class Submissions:
    """What `PipelineWatch` needs of a master: it takes nothing on."""

    def __init__(self) -> None:
        self.signing_key = KEY
        self.submitted = 0
        self.removed: list[str] = []
        self.events: asyncio.Queue[EventView] = asyncio.Queue()

    async def submit(self, data: bytes, **options: Any) -> None:
        self.submitted += 1
        raise ConflictError("there is a pipeline of that id already", status=409)

    async def remove(self, id: str) -> None:
        self.removed.append(id)
        raise NotFoundError("there is none", status=404)

    def pipeline(self, id: str) -> Any:
        raise NotFoundError("there is none", status=404)

    async def subscribe_events(self) -> AsyncIterator[EventView]:
        while True:
            yield await self.events.get()


class World:
    """A namespace with one master, at a time that is moved by hand."""

    def __init__(self) -> None:
        self.api, self.clock, self.master = FakeApi(), VirtualClock(), Submissions()

    @asynccontextmanager
    async def lead(self) -> AsyncIterator[PipelineWatch]:
        api: Any = self.api
        master: Any = self.master
        self.store = await KubernetesStore.open(api, "nomad", "master-a", clock=self.clock)
        watch = PipelineWatch(master, self.store, api, "nomad", "master-a", self.clock)
        async with alongside(watch.run()):
            await self.until(lambda: self.api._watches)
            yield watch
        await self.store.close()

    async def until(self, condition: Callable[[], object], *, passing: float = 0.0) -> None:
        async with asyncio.timeout(30):
            while not condition():
                if passing:
                    await self.clock.advance(passing)
                await asyncio.sleep(0.001)

    def put(self, digest: str = DIGEST, **metadata: Any) -> dict[str, Any]:
        """A Pipeline as somebody applies it."""
        body = resource.manifest(SPEC, digest)
        return self.api.put(PIPELINE, body | {"metadata": body["metadata"] | metadata})

    def code(self, data: bytes, digest: str = DIGEST) -> None:
        for secret in resource.bundle_secrets(digest, data):
            self.api.put(paths.secrets("nomad", secret["metadata"]["name"]), secret)

    def reads(self) -> int:
        """How many times code was read."""
        return sum(verb == "get" and "nomad-bundle" in path for verb, path in self.api.asked)

    def shown(self) -> str:
        return str(self.api.objects[PIPELINE].get("status", {}).get("phase", ""))


@pytest.fixture
def world() -> World:
    return World()


# What can't be done


@pytest.mark.parametrize("bad", ["its code", "its spec"])
async def test_what_is_hopeless_is_tried_again_when_the_object_changes(world: World, bad: str) -> None:
    digest = hashlib.sha256(b"no bundle").hexdigest()
    if bad == "its code":
        world.code(b"no bundle", digest)
    else:
        world.code(GOOD, digest)  # and not what is said in the object
    async with world.lead():
        world.put(digest)
        await world.until(lambda: world.shown() == "Failed", passing=0.1)
        assert world.reads() == 1
        await world.master.events.put(EventView(1, 1.0, "node.ready", "a node has come"))
        await world.clock.advance(3600.0)
        await world.until(world.master.events.empty)
        await world.clock.advance(3600.0)
        assert world.reads() == 1
        await world.api.patch(PIPELINE, {"spec": {"moves": False}})
        await world.until(lambda: world.reads() == 2, passing=0.1)
        world.code(GOOD)
        await world.api.patch(PIPELINE, {"spec": {"bundle": DIGEST, "moves": True}})
        await world.until(lambda: world.master.submitted, passing=0.1)


async def test_code_of_another_key_may_be_replaced(world: World) -> None:
    """The same code, signed with the right one, has Secrets of the same names; the object stays as it is."""
    world.code(bundle.make(build(OPERATORS), bytes(32)))
    async with world.lead():
        world.put()
        await world.until(lambda: world.shown() == "Failed", passing=0.1)
        assert not world.master.submitted
        world.code(GOOD)
        await world.until(lambda: world.master.submitted, passing=1.0)


async def test_what_may_come_right_is_tried_again_by_and_by(world: World) -> None:
    async with world.lead():
        world.put()
        await world.until(lambda: world.shown() == "Pending", passing=0.1)
        world.code(GOOD)
        await world.until(lambda: world.shown() == "Failed", passing=1.0)  # another pipeline has its id
        before = world.master.submitted
        await world.until(lambda: world.master.submitted > before, passing=1.0)


async def test_of_many_that_are_applied_few_have_their_code_read_at_the_same_time(world: World) -> None:
    """A namespace that is restored has hundreds of them, and code is large."""
    world.code(GOOD)
    reading, over = 0, asyncio.Event()

    async def meet(verb: str, path: str) -> None:
        nonlocal reading
        if verb == "get" and "nomad-bundle" in path:
            reading += 1
            await over.wait()

    world.api.meet = meet  # type: ignore[method-assign]
    async with world.lead():
        for number in range(5):
            body = resource.manifest(replace(SPEC, id=f"p{number}"), DIGEST)
            world.api.put(paths.pipelines("nomad", f"p{number}"), body)
        await world.until(lambda: reading == AT_ONCE)
        await settle()
        assert reading == AT_ONCE
        over.set()
        await world.until(lambda: world.master.submitted == 5, passing=0.1)


# What masters leave on objects


MARK = resource.SUBMITTED_ANNOTATION


async def test_what_a_master_never_came_to_the_end_of_goes(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.put(annotations={MARK: "1/master-0/abc"})
    async with world.lead():
        await world.until(lambda: PIPELINE not in world.api.objects, passing=0.1)
        assert "its submission began, and was never done" in caplog.text
        own = world.store._writes.writer
        world.put(annotations={MARK: own})  # the answer to its making came too late
        await world.until(lambda: PIPELINE not in world.api.objects, passing=0.1)
        assert not world.master.submitted


async def test_a_copy_of_what_a_master_made_is_submitted(world: World) -> None:
    """From a backup, say, with a mark that was never taken off, and a finalizer."""
    async with world.lead():
        world.code(GOOD)
        world.put(annotations={MARK: "1/master-0/abc"})
        await world.until(lambda: world.master.submitted, passing=0.1)
        assert PIPELINE in world.api.objects


async def test_a_mark_that_stayed_is_taken_off(world: World) -> None:
    async with world.lead():
        store = world.store
        failed = False

        async def meet(verb: str, path: str) -> None:
            nonlocal failed
            marks = world.api.objects.get(path, {}).get("metadata", {}).get("annotations", {})
            if verb == "patch" and MARK in marks and store.known() and not failed:
                failed = True
                raise ApiForbidden("a policy is against it, for now")

        world.api.meet = meet  # type: ignore[method-assign]
        await store.add_pipeline(wanted(), BUNDLE)
        await world.until(lambda: MARK not in world.api.objects[PIPELINE]["metadata"]["annotations"], passing=0.5)
        assert failed
        assert [held.name for held in store.known()] == ["p"]


# What has gone


async def test_nothing_is_kept_of_objects_that_are_gone(world: World) -> None:
    async with world.lead() as watch:
        reporter = watch._reporter
        for bad in ("taken on", "refused"):
            if bad == "taken on":
                await world.store.add_pipeline(wanted(), BUNDLE)
                held = world.store.of("p")
                assert held is not None
                await reporter.followed(held, "it can't be so")
                reporter._latency_at[held.uid] = 1.0
            else:
                digest = hashlib.sha256(b"no bundle").hexdigest()
                world.code(b"no bundle", digest)
                world.put(digest, finalizers=[])
                await world.until(lambda: world.shown() == "Failed", passing=0.1)
            world.api.drop(PIPELINE)
            kept: list[Any] = [reporter._refused, reporter._generations, reporter._latency_at, reporter._allowances]
            await world.until(lambda kept=kept: not any([*kept, watch._hopeless]), passing=0.1)  # type: ignore[misc]


@pytest.mark.parametrize("heard", [False, True])
async def test_another_object_of_the_same_name_is_another_pipeline(world: World, heard: bool) -> None:
    """The first was deleted by force, and applied again; `heard`: not both between two lists."""
    async with world.lead() as watch:
        await world.store.add_pipeline(wanted(), BUNDLE)
        await world.until(lambda: watch._seen and not watch._dirty and not watch._busy)
        first = world.store.of("p")
        assert first is not None
        world.code(GOOD)
        if not heard:
            world.api.forget()
        world.api.drop(PIPELINE)
        world.put()
        await world.until(lambda: world.master.removed and world.master.submitted, passing=0.1)
        assert world.master.removed == ["p"]
        assert first.gone
        await world.store.set_goal("p", Goal.REMOVE)  # which is about the first
        await world.store.remove_pipeline("p", 1)
        assert "deletionTimestamp" not in world.api.objects[PIPELINE]["metadata"]


async def test_a_new_object_is_seen_before_the_end_of_the_old_one(world: World) -> None:
    async with world.lead() as watch:
        await world.store.add_pipeline(wanted(), BUNDLE)
        await world.until(lambda: watch._seen and not watch._dirty and not watch._busy)
        first = world.store.of("p")
        old = copy.deepcopy(world.api.objects[PIPELINE])
        watching, world.api._watches = world.api._watches, []
        world.api.drop(PIPELINE)
        new = world.store.seen(copy.deepcopy(world.put()))  # as the answer to a request
        world.api._watches = watching
        for kind in ("MODIFIED", "DELETED"):
            old["metadata"]["resourceVersion"] = str(int(old["metadata"]["resourceVersion"]) + 1)
            watching[0][1].put_nowait({"type": kind, "object": copy.deepcopy(old)})
        await world.until(lambda: world.master.removed, passing=0.1)
        assert first is not None
        assert (first.gone, new.gone, world.store.of("p")) == (True, False, new)
