"""The master with real pods: processes of this machine, over unix sockets."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from nomad import bundle, pipeline, topology
from nomad.delivery import codec
from nomad.errors import ConflictError
from nomad.master.app import Master
from nomad.master.views import OperatorView
from nomad.runtime.local import LocalRuntime
from nomad.settings import Settings

DEADLINE = 30.0
"""Seconds until a test gives up waiting."""

NODES = topology.from_names(["edge", "cloud"])


def counting(end: int | None, pause: float = 0.0) -> Callable[[], Any]:
    """A source that yields 0, 1, 2 ... up to `end`, or for ever."""

    def source() -> Any:
        import itertools
        import time

        for n in itertools.count() if end is None else range(end):
            yield n
            if pause:
                time.sleep(pause)

    return source


def double(x: int) -> int:
    return 2 * x


def writing(path: Path) -> Callable[[int], None]:
    """A sink that appends each value as a line."""
    name = str(path)

    def sink(x: int) -> None:
        with open(name, "a") as file:
            file.write(f"{x}\n")

    return sink


def numbers(path: Path) -> list[int]:
    return [int(line) for line in path.read_text().split()] if path.exists() else []


class Local:
    """A master over one state folder, and what tests ask of it."""

    def __init__(self, state: Path) -> None:
        self.settings = Settings(state=state)
        self.master: Master

    @asynccontextmanager
    async def run(self) -> AsyncIterator[Master]:
        async with Master(self.settings, NODES) as self.master:
            yield self.master

    async def submit(self, operators: list[Any], id: str = "p") -> None:
        data = bundle.make(pipeline.build(operators), self.master.signing_key)
        await self.master.submit(data, id=id, start="edge", end="cloud")

    async def until(self, condition: Callable[[], object]) -> None:
        await until(condition, lambda: self.master.pipelines())

    def phase(self) -> str:
        return self.master.pipeline("p").phase

    def over(self) -> bool:
        """It has completed, and its processes have ended: their last counters are in."""
        return self.phase() == "completed" and not any(op.pid for op in self.master.pipeline("p").operators)

    def operator(self, name: str) -> OperatorView:
        return next(op for op in self.master.pipeline("p").operators if op.name == name)


async def until(condition: Callable[[], object], what: Callable[[], object] = lambda: "") -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, f"what was waited for didn't happen: {what()}"
        await asyncio.sleep(0.01)


def pod_processes(state: Path) -> list[psutil.Process]:
    """The processes of all pods that run."""
    records = [json.loads(path.read_text()) for path in (state / "run").glob("*.json")]
    return [psutil.Process(record["pid"]) for record in records if not record["ended"]]


def ended(processes: list[psutil.Process]) -> bool:
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


@pytest.fixture
async def local(tmp_path: Path) -> AsyncIterator[Local]:
    local = Local(tmp_path / "state")
    yield local
    if local.settings.state.exists():  # also what a test that failed has left
        runtime = await LocalRuntime.open(NODES.nodes, local.settings.state, tmp_path)
        for pod in await runtime.list():
            await runtime.stop(pod.id, grace=0.0)
        await until(lambda: ended(pod_processes(local.settings.state)))
        await runtime.close()


async def test_a_finite_pipeline_runs_to_its_end(local: Local, tmp_path: Path) -> None:
    out = tmp_path / "out"
    async with local.run() as master:
        await local.submit([counting(1000), double, writing(out)])
        await local.until(lambda: local.phase() == "completed")
        await local.until(lambda: all(op.state == "finished" for op in master.pipeline("p").operators))
        assert numbers(out) == [2 * n for n in range(1000)]
        assert [op.stats.processed for op in master.pipeline("p").operators] == [1000] * 3
        last = master.last_output("p", "double")
        assert last is not None
        assert codec.decode_one(last) == 1998


async def test_live_outputs_lines_and_an_orderly_stop(local: Local, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def shout(x: int) -> int:
        print("saw", x)
        return x

    async with local.run() as master:
        await local.submit([counting(None, 0.005), shout, writing(out)])
        values = []
        async for item in master.tail("p", "shout"):
            values.append(codec.decode_one(item.value))
            if len(values) == 10:
                break
        assert values == list(range(values[0], values[0] + 10))
        async for line in master.follow_logs("p", "shout"):
            assert line.line.startswith("saw ")
            break
        await master.stop("p")
        await local.until(lambda: local.phase() == "stopped")
        got = numbers(out)
        assert got == list(range(len(got)))  # what the source had sent was settled
        assert local.operator("source").stats.emitted == len(got)
        assert (await master.logs("p", "shout", 1))[0].line == f"saw {len(got) - 1}"


async def test_kill_9_of_operators_loses_and_doubles_nothing(local: Local, tmp_path: Path) -> None:
    out = tmp_path / "out"
    async with local.run():
        await local.submit([counting(3000, 0.001), double, writing(out)])
        for name, epoch in [("double", 1), ("sink", 1), ("double", 2)]:
            seen = len(numbers(out))
            await local.until(lambda seen=seen: len(numbers(out)) > seen + 50)
            victim = local.operator(name)
            assert victim.epoch == epoch
            assert victim.pid is not None
            os.kill(victim.pid, signal.SIGKILL)
            await local.until(lambda name=name, epoch=epoch: local.operator(name).epoch == epoch + 1)
        await local.until(lambda: local.phase() == "completed")
        got = numbers(out)
        assert sorted(set(got)) == [2 * n for n in range(3000)]
        assert got == sorted(got)
        # What the sink had written when it was killed, and hadn't noted yet, it has written again.
        assert len(got) <= 3001
        assert [op.restarts for op in local.master.pipeline("p").operators] == [0, 2, 1]
        assert local.operator("double").last_failure is not None
        assert "SIGKILL" in local.operator("double").last_failure.message  # type: ignore[union-attr]


async def test_on_error_fail_ends_the_pipeline_with_the_traceback(local: Local, tmp_path: Path) -> None:
    def picky(x: int) -> int:
        if x == 5:
            raise ValueError("five is too much")
        return x

    async with local.run() as master:
        await local.submit([counting(None, 0.01), pipeline.operator(picky, on_error="fail"), writing(tmp_path / "out")])
        await local.until(lambda: local.phase() == "failed")
        assert "five is too much" in master.pipeline("p").reason
        await local.until(lambda: all(op.state in ("stopped", "failed") for op in master.pipeline("p").operators))
        failure = local.operator("picky").last_failure
        assert failure is not None
        assert 'raise ValueError("five is too much")' in failure.traceback or "ValueError" in failure.traceback
        assert failure.exit_code == 4


async def test_messages_set_aside_are_seen_and_run_again(local: Local, tmp_path: Path) -> None:
    flag, out = tmp_path / "mended", tmp_path / "out"
    name = str(flag)

    def picky(x: int) -> int:
        import os

        if x % 100 == 50 and not os.path.exists(name):
            raise ValueError(f"no {x}")
        return x

    async with local.run() as master:
        await local.submit([counting(None, 0.001), picky, writing(out)])
        await local.until(lambda: local.operator("picky").stats.set_aside >= 2)
        records = await master.set_aside("p", "picky")
        assert [codec.decode_one(record.value) for record in records[:2]] == [50, 150]
        assert records[0].error["message"] == "no 50"
        failure = local.operator("picky").last_failure
        assert failure is not None
        assert failure.message.startswith("no ")
        flag.touch()
        assert await master.rerun("p", "picky", [records[0].id]) == {"ran": 1, "failed": 0}
        await local.until(lambda: 50 in numbers(out))
        assert await master.drop("p", "picky", [records[1].id]) == {"dropped": 1}
        assert 150 not in numbers(out)
        await master.remove("p")
        assert not (local.settings.state / "pods" / "p").exists()


async def test_what_was_set_aside_stays_visible_when_the_pipeline_has_ended(local: Local, tmp_path: Path) -> None:
    def picky(x: int) -> int:
        return 1 // (x % 2)

    async with local.run() as master:
        await local.submit([counting(4), picky, writing(tmp_path / "out")])
        await local.until(local.over)
        records = await master.set_aside("p", "picky")
        assert [codec.decode_one(r.value) for r in records] == [0, 2]
        assert all("ZeroDivisionError" in r.error["traceback"] for r in records)
        with pytest.raises(ConflictError, match="has ended: submit it again"):
            await master.rerun("p", "picky")
        assert await master.drop("p", "picky", [records[0].id]) == {"dropped": 1}
        assert [r.id for r in await master.set_aside("p", "picky")] == [records[1].id]


async def test_an_error_that_has_no_words_is_set_aside_like_any_other(local: Local, tmp_path: Path) -> None:
    def picky(x: int) -> int:
        class Mute(Exception):
            def __str__(self) -> str:
                raise RuntimeError("no words")

        if x % 2:
            raise Mute
        return x

    async with local.run():
        await local.submit([counting(10), picky, writing(tmp_path / "out")])
        await local.until(local.over)
        assert numbers(tmp_path / "out") == [0, 2, 4, 6, 8]
        assert local.operator("picky").restarts == 0
        assert local.operator("picky").stats.set_aside == 5


async def test_a_function_may_fork_and_signal_its_children(local: Local, tmp_path: Path) -> None:
    def forking(x: int) -> int:
        import multiprocessing

        context = multiprocessing.get_context("fork")
        worker = context.Process(target=time.sleep, args=(60,))
        worker.start()
        worker.terminate()
        worker.join()
        return worker.exitcode  # type: ignore[return-value]

    async with local.run():
        await local.submit([counting(20), forking, writing(tmp_path / "out")])
        await local.until(lambda: local.phase() == "completed")
        assert numbers(tmp_path / "out") == [-signal.SIGTERM] * 20
        assert local.operator("forking").restarts == 0


MASTER = """
import asyncio, sys
from pathlib import Path
from nomad import topology
from nomad.master.app import Master
from nomad.settings import Settings

async def main():
    async with Master(Settings(state=Path(sys.argv[1])), topology.from_names(["edge", "cloud"])) as master:
        await master.submit(Path(sys.argv[2]).read_bytes(), id="p", start="edge", end="cloud")
        while not master.pipeline("p").operators[-1].stats.processed:
            await asyncio.sleep(0.01)
        print("running", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
async def killed_master(local: Local, tmp_path: Path, out: Path) -> None:
    """A process whose master had the pipeline `p` at work when it met kill -9."""
    async with local.run() as master:
        key = master.signing_key
    made = tmp_path / "bundle"
    made.write_bytes(bundle.make(pipeline.build([counting(None, 0.002), double, writing(out)]), key))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", MASTER, str(local.settings.state), str(made), stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"running\n"
    process.kill()
    await process.communicate()


@pytest.mark.usefixtures("killed_master")
async def test_after_kill_9_of_the_master_the_next_one_takes_over_and_nothing_stops(local: Local, out: Path) -> None:
    before = len(numbers(out))
    await until(lambda: len(numbers(out)) > before + 100)  # no master is needed for that
    pods = pod_processes(local.settings.state)
    assert len(pods) == 3
    async with local.run() as master:
        await local.until(lambda: local.phase() == "running")
        assert {op.pid for op in master.pipeline("p").operators} == {pod.pid for pod in pods}
        assert [op.restarts for op in master.pipeline("p").operators] == [0, 0, 0]
        reader = master.tail("p", "double")
        assert codec.decode_one((await anext(reader)).value) % 2 == 0
        victim = local.operator("double").pid
        assert victim is not None
        os.kill(victim, signal.SIGKILL)  # an adopted process is watched like any other
        await local.until(lambda: local.operator("double").epoch == 2)
        await local.until(lambda: local.phase() == "running")
        await master.stop("p")
        await local.until(lambda: local.phase() == "stopped")
        got = numbers(out)
        assert got == [2 * n for n in range(len(got))]
    assert ended(pods)


async def test_the_next_master_resumes_what_a_normal_end_left(local: Local, tmp_path: Path) -> None:
    out = tmp_path / "out"
    async with local.run():
        await local.submit([counting(None, 0.01), double, writing(out)])
        await local.until(lambda: numbers(out))
    local.settings = replace(local.settings, pods=replace(local.settings.pods, transport="tcp"))
    async with local.run() as master:
        before = len(numbers(out))
        await local.until(lambda: len(numbers(out)) > before)
        assert {op.epoch for op in master.pipeline("p").operators} == {2}
        await master.remove("p")
