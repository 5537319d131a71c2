"""Instances of real pods that take another's place under load: the ends of a pipeline, too; with one folder for all
pods of an operator, and with one for each.
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
from nomad.settings import Pods
from tests.integration.test_local import Local, double, ended, numbers, pod_processes, writing
from tests.integration.test_moves import TOPOLOGY

pytestmark = pytest.mark.slow

NAMES = ("counting", "double", "append")


def counting(world: Path) -> Callable[[], object]:
    """A source of 200 numbers a second that goes on where the one before it was: it takes them from a file."""
    path = str(world)

    def counting() -> object:
        import time

        begin = time.time()
        with open(path, "r+", encoding="ascii") as file:
            for made in range(1 << 30):
                file.seek(0)
                n = int(file.read())
                file.seek(0)
                file.write(f"{n + 1:020}")
                file.flush()
                yield n
                time.sleep(max(0.0, begin + (made + 1) / 200 - time.time()))

    return counting


def picky(broken: Path) -> Callable[[int], int]:
    """Doubles; while there is a file, it raises for some numbers."""
    path = str(broken)

    def double(x: int) -> int:
        import os

        if x % 50 == 7 and os.path.exists(path):
            raise ValueError(f"{x} is bad")
        return 2 * x

    return double


class Replacing(Local):
    """A master over three nodes, and a pipeline whose ends are on two of them."""

    def __init__(self, folder: Path, *, common: bool) -> None:
        super().__init__(folder / "state")
        self.topology = topology.parse(TOPOLOGY)
        self.settings = replace(self.settings, pods=Pods(common_folders=common))
        self.out, self.world = folder / "out", folder / "world"

    async def begin(self, middle: Callable[[int], int] = double) -> None:
        self.world.write_text("0")
        sink = pipeline.operator(writing(self.out), name="append")
        built = pipeline.build([counting(self.world), pipeline.operator(middle, name="double"), sink])
        data = bundle.make(built, self.master.signing_key)
        await self.master.submit(data, id="p", start="edge", end="cloud", moves=False)
        await self.until(lambda: self.phase() == "running" and len(numbers(self.out)) > 50)

    async def replaced(self, name: str) -> MoveView:
        """Put a new instance in an operator's place, and wait until that is over."""
        view = await self.master.move("p", name, None)
        await self.until(lambda: self.master.move_status("p", view.id).state.final)
        return self.master.move_status("p", view.id)

    async def all_is_well(self) -> None:
        """Stop, and look at what came out: all that the source took, once, in order."""
        seen = len(numbers(self.out))
        await self.until(lambda: len(numbers(self.out)) > seen + 50)
        await self.master.stop("p")
        await self.until(lambda: self.phase() == "stopped")
        assert numbers(self.out) == [2 * n for n in range(int(self.world.read_text()))]


@pytest.fixture(params=[True, False], ids=["common", "apart"])
async def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Replacing]:
    cluster = Replacing(tmp_path, common=request.param)
    yield cluster
    left = pod_processes(cluster.settings.state) if cluster.settings.state.exists() else []
    for process in left:
        os.killpg(process.pid, signal.SIGKILL)
    end = time.monotonic() + 10
    while not ended(left):
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


async def test_each_operator_is_replaced_under_load(cluster: Replacing) -> None:
    async with Master(cluster.settings, cluster.topology) as cluster.master:
        await cluster.begin()
        for name in ("append", "counting", "double", "append"):
            before = cluster.operator(name)
            view = await cluster.replaced(name)
            assert (view.state, view.error) == ("done", "")
            assert (view.operator, view.lost, view.doubled) == (name, 0, 0)
            assert view.pause is not None
            assert view.pause < 10.0  # what it is on a quiet machine is measured by a benchmark
            after = cluster.operator(name)
            assert (after.node, after.epoch, after.restarts) == (before.node, before.epoch + 1, 0)
            assert after.pid != before.pid
        await cluster.all_is_well()


async def test_processes_that_have_to_go_are_replaced(cluster: Replacing) -> None:
    async with Master(cluster.settings, cluster.topology) as cluster.master:
        await cluster.begin()
        for op in cluster.master.pipeline("p").operators:
            assert op.pid is not None
            os.kill(op.pid, signal.SIGUSR1)
        await cluster.until(lambda: [op.epoch for op in cluster.master.pipeline("p").operators] == [2, 2, 2])
        await cluster.until(lambda: all(move.state.final for move in cluster.master.moves("p")))
        views = cluster.master.moves("p")
        assert [(view.state, view.cause, view.lost, view.doubled) for view in views] == [("done", "replace", 0, 0)] * 3
        assert [op.restarts for op in cluster.master.pipeline("p").operators] == [0, 0, 0]
        await cluster.all_is_well()


async def test_a_message_set_aside_is_there_after_a_move_and_can_be_run_again(cluster: Replacing) -> None:
    broken = cluster.out.with_name("broken")
    broken.touch()
    async with Master(cluster.settings, cluster.topology) as cluster.master:
        await cluster.begin(picky(broken))
        await cluster.until(lambda: cluster.operator("double").stats.set_aside >= 2)
        view = await cluster.replaced("double")
        assert (view.state, view.error) == ("done", "")
        view = await cluster.master.move("p", "double", "edge" if cluster.operator("double").node != "edge" else "fog")
        await cluster.until(lambda: cluster.master.move_status("p", view.id).state.final)
        broken.unlink()
        kept = await cluster.master.set_aside("p", "double")
        assert len(kept) >= 2
        await cluster.master.rerun("p", "double", None)
        assert await cluster.master.set_aside("p", "double") == []
        seen = len(numbers(cluster.out))
        await cluster.until(lambda: len(numbers(cluster.out)) > seen + 50)
        await cluster.master.stop("p")
        await cluster.until(lambda: cluster.phase() == "stopped")
        assert sorted(numbers(cluster.out)) == [2 * n for n in range(int(cluster.world.read_text()))]


MASTER = """
import asyncio, sys
from pathlib import Path
from nomad import topology
from nomad.master.app import Master
from nomad.settings import Pods, Settings

state, topo, name, until, common = sys.argv[1:]

async def main():
    settings = Settings(state=Path(state), pods=Pods(common_folders=common == "True"))
    async with Master(settings, topology.parse(Path(topo).read_text())) as master:
        while master.pipeline("p").phase != "running":
            await asyncio.sleep(0.01)
        move = await master.move("p", name, None)
        while (view := master.move_status("p", move.id)).state != until:
            if until in [phase.name for phase in view.phases]:
                break  # it was so short that it wasn't seen
            await asyncio.sleep(0)
        print("there", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("name", ["append", "counting", pytest.param("double", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "state",
    [
        pytest.param("connecting", marks=pytest.mark.slow),
        pytest.param("carrying", marks=pytest.mark.slow),
        "handing_over",
        "switching",
        pytest.param("stopping", marks=pytest.mark.slow),
    ],
)
async def test_the_master_is_killed_in_the_middle(cluster: Replacing, tmp_path: Path, name: str, state: str) -> None:
    common = cluster.settings.pods.common_folders
    if state == "carrying" and (common or name == "counting"):
        pytest.skip("nothing is carried over")
    settings = cluster.settings
    outliving = replace(settings, pods=replace(settings.pods, outlive_master=True))
    async with Master(outliving, cluster.topology) as cluster.master:
        await cluster.begin()
    (tmp_path / "topology.yaml").write_text(TOPOLOGY)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", MASTER, str(settings.state), str(tmp_path / "topology.yaml"), name, state, str(common)),
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"there\n"
    process.kill()
    await process.communicate()
    async with Master(settings, cluster.topology) as cluster.master:
        await cluster.until(lambda: cluster.phase() == "running")
        await cluster.until(lambda: all(move.state.final for move in cluster.master.moves("p")))
        (view,) = cluster.master.moves("p")
        assert view.state in ("done", "rolled_back")
        assert cluster.operator(name).epoch == (2 if view.state == "done" else 1)
        assert [op.restarts for op in cluster.master.pipeline("p").operators] == [0, 0, 0]
        await cluster.all_is_well()
