"""What every runtime must do, as functions. `tests/runtime/` runs them against each backend.

A harness opens runtimes over the same world (a second one is what a restarted master has) and makes pods
that behave as their operator's name says: `quiet` runs until it is stopped, `stubborn` ignores polite
requests, `exit3` ends by itself with code 3, `chatty` prints `line 0` to `line 4` and goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol

import pytest

from nomad.errors import PodStartError
from nomad.runtime.base import Emulated, ObservedPod, PodPhase, PodSpec, Runtime

DEADLINE = 30.0
"""Seconds until a test gives up waiting."""


class Harness(Protocol):
    async def open(self) -> Runtime:
        """A runtime over the harness's world, with the node `here`. The harness closes it."""
        ...

    def kill(self, pod: ObservedPod) -> None:
        """As `kill -9` would."""
        ...


def spec(behaviour: str, epoch: int = 1, node: str = "here", pipeline: str = "p") -> PodSpec:
    return PodSpec(
        id=f"{pipeline}.{behaviour}-e{epoch}",
        pipeline=pipeline,
        operator=behaviour,
        epoch=epoch,
        node=node,
        control="unix:/nowhere",
        key=b"k" * 32,
        verify_key=b"v" * 32,
        master_timeout=60.0,
    )


async def seen(changes: AsyncIterator[ObservedPod], pod_id: str, phase: PodPhase) -> ObservedPod:
    """The first change that shows the pod in `phase`; what changed before is read over, so start one pod at a time."""
    async with asyncio.timeout(DEADLINE):
        async for pod in changes:
            if pod.id == pod_id and pod.phase is phase:
                return pod
    raise AssertionError(f"the watch ended before {pod_id} was {phase}")


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not await condition():
            await asyncio.sleep(0.01)


async def check_a_started_pod_is_watched_and_listed(harness: Harness) -> None:
    runtime = await harness.open()
    changes = runtime.watch()
    await runtime.start(spec("quiet"))
    pod = await seen(changes, "p.quiet-e1", PodPhase.RUNNING)
    assert (pod.node, pod.epoch, pod.exit_code) == ("here", 1, None)
    assert [pod] == list(await runtime.list())


async def check_starting_twice_is_starting_once(harness: Harness) -> None:
    runtime = await harness.open()
    changes = runtime.watch()
    await runtime.start(spec("quiet"))
    first = await seen(changes, "p.quiet-e1", PodPhase.RUNNING)
    await runtime.start(spec("quiet"))
    assert list(await runtime.list()) == [first]


async def check_an_unknown_node_is_refused(harness: Harness) -> None:
    runtime = await harness.open()
    with pytest.raises(PodStartError, match="no node 'nowhere'"):
        await runtime.start(spec("quiet", node="nowhere"))
    assert list(await runtime.list()) == []


async def check_the_exit_code_is_seen(harness: Harness) -> None:
    runtime = await harness.open()
    changes = runtime.watch()
    await runtime.start(spec("exit3"))
    pod = await seen(changes, "p.exit3-e1", PodPhase.EXITED)
    assert pod.exit_code == 3
    assert pod.reason == "ended with exit code 3"
    assert list(await runtime.list()) == [pod]


async def check_a_killed_pod_is_seen(harness: Harness) -> None:
    runtime = await harness.open()
    changes = runtime.watch()
    await runtime.start(spec("quiet"))
    harness.kill(await seen(changes, "p.quiet-e1", PodPhase.RUNNING))
    pod = await seen(changes, "p.quiet-e1", PodPhase.EXITED)
    assert pod.exit_code == -9
    assert pod.reason == "was killed by SIGKILL"


async def check_a_stopped_pod_ends(harness: Harness) -> None:
    runtime = await harness.open()
    changes = runtime.watch()
    await runtime.start(spec("quiet"))
    await seen(changes, "p.quiet-e1", PodPhase.RUNNING)
    await runtime.stop("p.quiet-e1", grace=DEADLINE)
    pod = await seen(changes, "p.quiet-e1", PodPhase.EXITED)
    assert pod.exit_code in (0, -15)


async def check_a_stubborn_pod_is_killed_after_the_grace(harness: Harness) -> None:
    runtime = await harness.open()
    changes = runtime.watch()
    await runtime.start(spec("stubborn"))
    await seen(changes, "p.stubborn-e1", PodPhase.RUNNING)

    async def deaf() -> bool:
        return "deaf" in await runtime.logs("p.stubborn-e1")

    await until(deaf)
    await runtime.stop("p.stubborn-e1", grace=0.1)
    assert (await seen(changes, "p.stubborn-e1", PodPhase.EXITED)).exit_code == -9


async def check_stopping_what_is_not_there_is_fine(harness: Harness) -> None:
    runtime = await harness.open()
    await runtime.stop("p.never-e1", grace=1.0)
    changes = runtime.watch()
    await runtime.start(spec("exit3"))
    await seen(changes, "p.exit3-e1", PodPhase.EXITED)
    await runtime.stop("p.exit3-e1", grace=1.0)


async def check_pods_outlive_the_runtime_and_are_adopted(harness: Harness) -> None:
    first = await harness.open()
    changes = first.watch()
    await first.start(spec("quiet"))
    quiet = await seen(changes, "p.quiet-e1", PodPhase.RUNNING)
    await first.start(spec("stubborn"))
    await seen(changes, "p.stubborn-e1", PodPhase.RUNNING)
    await first.close()

    second = await harness.open()
    changes = second.watch()
    listed = {pod.id: pod for pod in await second.list()}
    assert listed["p.quiet-e1"] == quiet
    assert listed["p.stubborn-e1"].phase is PodPhase.RUNNING
    await second.start(spec("quiet"))  # is there already
    assert len(await second.list()) == 2
    harness.kill(quiet)
    await seen(changes, "p.quiet-e1", PodPhase.EXITED)
    await second.stop("p.stubborn-e1", grace=0.1)
    await seen(changes, "p.stubborn-e1", PodPhase.EXITED)


async def check_what_ended_unwatched_is_found_ended(harness: Harness) -> None:
    first = await harness.open()
    changes = first.watch()
    await first.start(spec("quiet"))
    pod = await seen(changes, "p.quiet-e1", PodPhase.RUNNING)
    await first.close()
    harness.kill(pod)
    second = await harness.open()

    async def ended() -> bool:
        return [found.phase for found in await second.list()] == [PodPhase.EXITED]

    await until(ended)


async def check_printed_lines_are_kept_and_followed(harness: Harness) -> None:
    runtime = await harness.open()
    changes = runtime.watch()
    await runtime.start(spec("chatty"))
    pod = await seen(changes, "p.chatty-e1", PodPhase.RUNNING)

    async def printed() -> bool:
        return len(await runtime.logs(pod.id)) == 5

    await until(printed)
    assert list(await runtime.logs(pod.id)) == [f"line {n}" for n in range(5)]
    assert list(await runtime.logs(pod.id, tail=2)) == ["line 3", "line 4"]
    assert list(await runtime.logs("p.never-e1")) == []
    follower = runtime.follow(pod.id)
    harness.kill(pod)
    async with asyncio.timeout(DEADLINE):
        assert [line async for line in follower] == []  # nothing new, and it ends with the pod
    assert list(await runtime.logs(pod.id, tail=1)) == ["line 4"]


async def check_a_forgotten_pipeline_leaves_nothing(harness: Harness) -> None:
    runtime = await harness.open()
    changes = runtime.watch()
    await runtime.start(spec("exit3"))
    await runtime.start(spec("quiet", pipeline="other"))
    await seen(changes, "p.exit3-e1", PodPhase.EXITED)
    await runtime.forget("p")
    assert [pod.id for pod in await runtime.list()] == ["other.quiet-e1"]
    assert list(await runtime.logs("p.exit3-e1")) == []


async def check_a_lost_node_loses_its_pods_and_takes_none(harness: Harness) -> None:
    runtime = await harness.open()
    assert isinstance(runtime, Emulated)
    assert [node.ready for node in runtime.nodes] == [True]
    changes = runtime.watch()
    await runtime.start(spec("quiet"))
    await seen(changes, "p.quiet-e1", PodPhase.RUNNING)
    runtime.lose_node("here")
    assert (await seen(changes, "p.quiet-e1", PodPhase.EXITED)).exit_code == -9
    assert [node.ready for node in runtime.nodes] == [False]
    with pytest.raises(PodStartError, match="'here' is lost"):
        await runtime.start(spec("quiet", epoch=2))
    runtime.restore_node("here")
    assert [node.ready for node in runtime.nodes] == [True]
    await runtime.start(spec("quiet", epoch=2))
    await seen(changes, "p.quiet-e2", PodPhase.RUNNING)


CHECKS = [check for name, check in sorted(globals().items()) if name.startswith("check_")]
