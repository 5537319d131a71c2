"""Live moves of real pods, under load and over links that are emulated; nodes that fail.

Not measured: pods and their master are in `test_local`, moves in `tests/actor` and `tests/master`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from nomad import bundle, pipeline, topology
from nomad.master.app import Master
from nomad.master.views import MoveView
from nomad.settings import Settings
from tests.integration.test_local import Local, double, ended, numbers, pod_processes, writing

pytestmark = pytest.mark.no_cover

TOPOLOGY = """
nodes: {edge: {memory: 4Gi}, fog: {memory: 4Gi}, cloud: {memory: 4Gi}}
links:
  - {from: edge, to: fog, latency: 20ms}
  - {from: fog, to: cloud, latency: 20ms}
  - {from: edge, to: cloud, latency: 20ms}
"""
NEXT = {"edge": "fog", "fog": "cloud", "cloud": "edge"}
RATE = 200


def ticking() -> object:
    """RATE numbers a second, whatever happens behind."""
    import itertools
    import time

    begin = time.time()
    for n in itertools.count():
        yield n
        time.sleep(max(0.0, begin + (n + 1) / 200 - time.time()))


class Moving(Local):
    """A master over three nodes."""

    def __init__(self, state: Path) -> None:
        super().__init__(state)
        self.topology = topology.parse(TOPOLOGY)

    async def begin(self, out: Path, middle: Callable[[int], int] = double) -> None:
        built = pipeline.build([ticking, pipeline.operator(middle, name="double"), writing(out)])
        data = bundle.make(built, self.master.signing_key)
        await self.master.submit(data, id="p", start="edge", end="cloud", moves=False)
        await self.until(lambda: self.phase() == "running" and len(numbers(out)) > 50)

    async def move(self) -> MoveView:
        """Move `double` on to the next node, and wait until that is over."""
        view = await self.master.move("p", "double", NEXT[self.operator("double").node])
        await self.until(lambda: self.master.move_status("p", view.id).state.final)
        return self.master.move_status("p", view.id)

    async def all_is_well(self, out: Path) -> None:
        """Stop, and look at what came out: all of it, once, in order."""
        seen = len(numbers(out))
        await self.until(lambda: len(numbers(out)) > seen + 50)
        await self.master.stop("p")
        await self.until(lambda: self.phase() == "stopped")
        got = numbers(out)
        assert got == [2 * n for n in range(len(got))]
        assert self.operator("ticking").stats.emitted == len(got)


@pytest.fixture
async def moving(tmp_path: Path) -> AsyncIterator[Moving]:
    moving = Moving(tmp_path / "state")
    yield moving
    left = pod_processes(moving.settings.state) if moving.settings.state.exists() else []
    for process in left:
        os.killpg(process.pid, signal.SIGKILL)
    end = time.monotonic() + 10
    while not ended(left):
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


async def test_moves_under_load_lose_and_double_nothing(moving: Moving, tmp_path: Path) -> None:
    out = tmp_path / "out"
    async with Master(moving.settings, moving.topology) as moving.master:
        await moving.begin(out)
        for _ in range(4):
            view = await moving.move()
            assert (view.state, view.error) == ("done", "")
            assert (view.lost, view.doubled) == (0, 0)
            assert view.pause is not None
            assert view.pause < 10.0  # what it is on a quiet machine is measured by a benchmark
            assert moving.operator("double").node == view.target
        assert moving.operator("double").restarts == 0
        latencies = await moving.master.latencies("p")
        assert len(latencies) > 100
        assert all(0 < sample.latency < 10 for sample in latencies)
        await moving.all_is_well(out)


@pytest.mark.slow
async def test_a_model_is_loaded_before_the_move_turns_to_it(moving: Moving, tmp_path: Path) -> None:
    out, gone = tmp_path / "out", tmp_path / "broken"
    broken = str(gone)

    class Model:
        factor = 0

        def setup(self) -> None:
            import os
            import time

            if os.path.exists(broken):
                raise FileNotFoundError("no weights")
            time.sleep(2.0)
            self.factor = 2

        def __call__(self, x: int) -> int:
            return x * self.factor

    async with Master(moving.settings, moving.topology) as moving.master:
        await moving.begin(out, Model())
        view = await moving.move()
        assert (view.state, view.error, view.lost, view.doubled) == ("done", "", 0, 0)
        assert next(phase.seconds for phase in view.phases if phase.name == "starting") > 2.0
        assert view.pause is not None
        assert view.pause < 2.0
        gone.touch()
        view = await moving.move()
        assert (view.state, view.error) == (
            "rolled_back",
            "the new instance failed: FileNotFoundError: setup: no weights",
        )
        await moving.all_is_well(out)


async def test_the_target_is_killed_while_it_starts(moving: Moving, tmp_path: Path) -> None:
    out = tmp_path / "out"
    async with Master(moving.settings, moving.topology) as moving.master:
        await moving.begin(out)
        before = moving.operator("double")
        view = await moving.master.move("p", "double", NEXT[before.node])
        await moving.until(lambda: len(pod_processes(moving.settings.state)) == 4)
        known = {op.pid for op in moving.master.pipeline("p").operators}
        (victim,) = [process for process in pod_processes(moving.settings.state) if process.pid not in known]
        os.killpg(victim.pid, signal.SIGKILL)
        await moving.until(lambda: moving.master.move_status("p", view.id).state.final)
        assert moving.master.move_status("p", view.id).state == "rolled_back"
        assert moving.operator("double").pid == before.pid
        assert (await moving.move()).state == "done"
        await moving.all_is_well(out)


async def test_a_lost_node_is_left_within_seconds(moving: Moving, tmp_path: Path) -> None:
    out = tmp_path / "out"
    async with Master(moving.settings, moving.topology) as moving.master:
        await moving.begin(out)
        while moving.operator("double").node != "fog":
            assert (await moving.move()).state == "done"
        seen = len(numbers(out))
        await moving.master.lose_node("fog")
        begin = time.monotonic()
        await moving.until(lambda: moving.operator("double").node != "fog" and moving.phase() == "running")
        await moving.until(lambda: len(numbers(out)) > seen + 50)
        assert time.monotonic() - begin < 20.0
        assert not moving.master.node("fog").ready
        await moving.all_is_well(out)


MASTER = """
import asyncio, sys
from pathlib import Path
from nomad import topology
from nomad.master.app import Master
from nomad.settings import Settings

async def main():
    async with Master(Settings(state=Path(sys.argv[1])), topology.parse(Path(sys.argv[2]).read_text())) as master:
        while master.pipeline("p").phase != "running":
            await asyncio.sleep(0.01)
        operator = next(op for op in master.pipeline("p").operators if op.name == "double")
        target = {"edge": "fog", "fog": "cloud", "cloud": "edge"}[operator.node]
        move = await master.move("p", "double", target)
        while master.move_status("p", move.id).state != sys.argv[3]:
            await asyncio.sleep(0)
        print("there", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "state",
    [
        "starting",
        pytest.param("connecting", marks=pytest.mark.slow),
        pytest.param("handing_over", marks=pytest.mark.slow),
        "switching",
        pytest.param("stopping", marks=pytest.mark.slow),
    ],
)
async def test_the_master_is_killed_in_the_middle(moving: Moving, tmp_path: Path, state: str) -> None:
    out = tmp_path / "out"
    await _leave_running(moving, out)
    (tmp_path / "topology.yaml").write_text(TOPOLOGY)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        MASTER,
        str(moving.settings.state),
        str(tmp_path / "topology.yaml"),
        state,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"there\n"
    process.kill()
    await process.communicate()
    async with Master(moving.settings, moving.topology) as moving.master:
        await moving.until(lambda: moving.phase() == "running")
        await moving.until(lambda: all(move.state.final for move in moving.master.moves("p")))
        (view,) = moving.master.moves("p")
        assert view.state in ("done", "rolled_back")
        assert moving.operator("double").node == (view.target if view.state == "done" else view.source)
        assert [op.restarts for op in moving.master.pipeline("p").operators] == [0, 0, 0]
        await moving.all_is_well(out)


async def _leave_running(moving: Moving, out: Path) -> None:
    """A pipeline at work, as a master that was killed leaves it."""
    settings = moving.settings
    moving.settings = replace(settings, pods=replace(settings.pods, outlive_master=True))
    async with Master(moving.settings, moving.topology) as moving.master:
        await moving.begin(out)
    moving.settings = Settings(state=settings.state)
