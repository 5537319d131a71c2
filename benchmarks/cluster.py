"""A real cluster for benchmarks: a master in this process, pods as processes, all state in a temporary folder."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks import harness
from benchmarks.workloads import Workload
from nomad import bundle
from nomad.master.app import Master
from nomad.master.views import PipelineView
from nomad.pipeline import build
from nomad.settings import Settings
from nomad.topology import from_names

NODE = "here"
START_TIMEOUT = 60.0


@asynccontextmanager
async def cluster() -> AsyncIterator[Master]:
    """A master with one node. No REST: what is measured doesn't go through it."""
    with tempfile.TemporaryDirectory(prefix="nomad-bench-") as state:
        settings = Settings.from_environment({}, state=Path(state))
        settings = replace(settings, pods=replace(settings.pods, outlive_master=False))
        async with Master(settings, from_names([NODE])) as master:
            yield master


@asynccontextmanager
async def running(master: Master, functions: Sequence[Callable[..., Any]], id: str) -> AsyncIterator[dict[str, int]]:
    """A pipeline of `functions` while it runs, all pods ready: operator -> pid of its pod. Removed at the end."""
    data = bundle.make(build(functions), master.signing_key)
    await master.submit(data, id=id, start=NODE, end=NODE)
    try:
        view = await _until(master, id, lambda view: view.phase in ("running", "failed"), START_TIMEOUT)
        if view.phase == "failed":
            raise RuntimeError(f"pipeline {id} failed: {view.reason}")
        yield {operator.name: operator.pid for operator in view.operators if operator.pid is not None}
    finally:
        await master.stop(id)
        await _until(master, id, lambda view: view.phase.final, START_TIMEOUT)
        await master.remove(id)


async def run(master: Master, workload: Workload, count: int, id: str, *, timeout: float = 120.0) -> harness.Run:
    """One run of a workload. CPU is that of the pods and of this process, the master's, from start to finish."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        async with running(master, workload.make(count, folder), id) as pids:
            before = _cpu(pids.values()) + time.process_time()
            (folder / "go").touch()
            deadline = time.monotonic() + timeout
            while not (folder / "finished").exists():
                if (folder / "failed").exists():
                    raise RuntimeError(f"{workload.name}: {(folder / 'failed').read_text()}")
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{workload.name}: not finished after {timeout:g} s: {_progress(master, id)}")
                await asyncio.sleep(0.02)
            cpu = _cpu(pids.values()) + time.process_time() - before
        end = json.loads((folder / "finished").read_text())
        return harness.Run(count, end["time"] - float((folder / "begun").read_text()), cpu, end.get("latency"))


def _cpu(pids: Any) -> float:
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return sum(t.user + t.system for t in times)


def _progress(master: Master, id: str) -> str:
    operators = master.pipeline(id).operators
    return ", ".join(f"{op.name} {op.state} {op.stats.processed} processed" for op in operators)


async def _until(master: Master, id: str, condition: Callable[[PipelineView], bool], timeout: float) -> PipelineView:
    deadline = time.monotonic() + timeout
    while not condition(view := master.pipeline(id)):
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"pipeline {id} is {view.phase} after {timeout:g} s ({view.reason}): {_progress(master, id)}"
            )
        await asyncio.sleep(0.02)
    return view
