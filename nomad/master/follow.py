"""Live log lines of a pipeline, over restarts of its pods. Called by the facade."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from nomad.master.loop import Loop
from nomad.master.state import Observed
from nomad.master.views import LogLine
from nomad.runtime.base import Runtime
from nomad.tasks import Tasks

WAITING = 1_000
"""Lines that wait for a slow reader; then the files wait, which have them anyway."""


def follow(
    loop: Loop, observed: Observed, runtime: Runtime, pipeline: str, operators: Sequence[str]
) -> AsyncIterator[LogLine]:
    """Lines that the operators print from now on, until the pipeline is over."""
    now = {name: _present(loop, observed, pipeline, name) for name in operators}
    # The files' ends are noted here and not at the first step, so that "now" is when this is called.
    lines = {name: runtime.follow(pod) for name, pod in now.items() if pod is not None}
    return _merged(loop, observed, runtime, pipeline, now, lines)


async def _merged(
    loop: Loop,
    observed: Observed,
    runtime: Runtime,
    pipeline: str,
    now: dict[str, str | None],
    lines: dict[str, AsyncIterator[str]],
) -> AsyncIterator[LogLine]:
    queue: asyncio.Queue[LogLine | None] = asyncio.Queue(WAITING)

    async def pump(name: str) -> None:
        pod, source = now[name], lines.get(name)
        while True:
            if pod is not None and source is not None:
                async for line in source:
                    await queue.put(LogLine(name, pod, line))
            pod = await _next(loop, observed, pipeline, name, pod)
            if pod is None:
                await queue.put(None)
                return
            source = runtime.follow(pod)

    tasks = Tasks()
    try:
        for name in now:
            tasks.start(pump(name), name=f"follow {pipeline}.{name}")
        left = len(now)
        while left:
            line = await queue.get()
            if line is None:
                left -= 1
            else:
                yield line
    finally:
        await tasks.close()


async def _next(loop: Loop, observed: Observed, pipeline: str, operator: str, last: str | None) -> str | None:
    """The pod that follows `last`, or None when none will."""

    def present() -> str | None:
        return _present(loop, observed, pipeline, operator)

    await loop.until(lambda: loop.is_over(pipeline) or present() not in (None, last))
    return present() if present() != last else None


def _present(loop: Loop, observed: Observed, pipeline: str, operator: str) -> str | None:
    """The operator's pod, once the runtime knows it."""
    have = loop.requested.pipelines.get(pipeline)
    pod = have.operators[operator].pod if have is not None else None
    return pod if pod in observed.pods and observed.pods[pod].runtime is not None else None
