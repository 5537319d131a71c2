from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from nomad.errors import PodStartError
from nomad.runtime.base import NodeInfo, ObservedPod, PodPhase, PodSpec
from nomad.runtime.fake import FakeRuntime
from tests.contract import runtime as contract


class FakeHarness:
    """One fake is the whole world: opening it again is what a second master sees."""

    def __init__(self) -> None:
        self.runtime = FakeRuntime([NodeInfo("here")], host=self._behave)

    async def open(self) -> FakeRuntime:
        return self.runtime

    def kill(self, pod: ObservedPod) -> None:
        self.runtime.kill(pod.id)

    async def _behave(self, spec: PodSpec) -> int:
        if spec.operator == "exit3":
            return 3
        if spec.operator == "stubborn":
            self.runtime.stop_delay = 3600.0
            self.runtime.say(spec.id, "deaf")
        elif spec.operator == "chatty":
            for n in range(5):
                self.runtime.say(spec.id, f"line {n}")
        await asyncio.Event().wait()
        return 0


@pytest.fixture
async def harness() -> AsyncIterator[FakeHarness]:
    harness = FakeHarness()
    yield harness
    await harness.runtime.shutdown()


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
async def test_contract(check, harness: FakeHarness) -> None:
    await check(harness)


async def test_a_start_fails_when_asked_to(harness: FakeHarness) -> None:
    harness.runtime.fail_starts.append("no memory left")
    with pytest.raises(PodStartError, match="no memory left"):
        await harness.runtime.start(contract.spec("quiet"))
    await harness.runtime.start(contract.spec("quiet"))
    assert harness.runtime.started == ["p.quiet-e1"]


async def test_a_delayed_pod_is_starting_until_then(harness: FakeHarness) -> None:
    harness.runtime.start_delay = 3600.0
    await harness.runtime.start(contract.spec("quiet"))
    assert [pod.phase for pod in await harness.runtime.list()] == [PodPhase.STARTING]
    changes = harness.runtime.watch()
    harness.runtime.kill("p.quiet-e1")
    assert (await contract.seen(changes, "p.quiet-e1", PodPhase.EXITED)).exit_code == -9
