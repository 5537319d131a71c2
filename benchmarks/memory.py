"""Whether back-pressure bounds memory: a sink 100 times slower than its source, for a minute.

Each actor's memory may grow, over what it has before the first message, by what its links' credits allow
(messages or bytes, whichever is less, for the inbox of each input and the replay buffer of each output)
and 20 %.

    python -m benchmarks.memory [--quick] [--seconds N] [--size BYTES] [--json OUT]

Exit code 1 when an actor's memory grows beyond that.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks import harness
from benchmarks.cluster import cluster, running
from benchmarks.workloads import begin, identity
from nomad.settings import Windows

PACE = 0.0002
"""Seconds per message at the source."""


def functions(folder: Path, size: int) -> Any:
    """A source, the identity, and a sink that takes 100 times as long per message as the source."""

    def source() -> Iterator[bytes]:
        begin(folder)
        number = 0
        start = time.monotonic()
        while True:
            number += 1
            time.sleep(max(0.0, start + number * PACE - time.monotonic()))
            yield number.to_bytes(8, "little") + bytes(size - 8)

    def sink(x: bytes) -> None:
        time.sleep(100 * PACE)

    return source, identity, sink


async def measure(seconds: float, size: int) -> dict[str, Any]:
    """Per operator: memory before, at most, growth and what is allowed, in bytes."""
    windows = Windows()
    per_link = min(windows.bytes, windows.messages * size)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        async with cluster() as master, running(master, functions(folder, size), "memory") as pids:
            processes = {operator: psutil.Process(pid) for operator, pid in pids.items()}
            await asyncio.sleep(1.0)
            base = {operator: process.memory_info().rss for operator, process in processes.items()}
            most = dict(base)
            (folder / "go").touch()
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                await asyncio.sleep(0.25)
                for operator, process in processes.items():
                    most[operator] = max(most[operator], process.memory_info().rss)
            processed = {operator.name: operator.stats.processed for operator in master.pipeline("memory").operators}
    results = {}
    for index, operator in enumerate(processes):
        links = 1 if index in (0, len(processes) - 1) else 2
        allowed = links * per_link * 1.2
        growth = most[operator] - base[operator]
        results[operator] = {
            "base": base[operator],
            "most": most[operator],
            "growth": growth,
            "allowed": allowed,
            "processed": processed[operator],
            "met": growth <= allowed,
        }
    return results


def main() -> None:
    args = harness.arguments(
        __doc__,
        seconds={"type": float, "help": "how long (default 60; 5 with --quick)"},
        size={"type": int, "default": 10_000, "help": "bytes per message (default %(default)s)"},
    )
    results = asyncio.run(measure(args.seconds or (5.0 if args.quick else 60.0), args.size))
    harness.table(
        "memory of actors, sink 100 times slower than the source (MiB)",
        ["actor", "before", "at most", "growth", "allowed", "messages", ""],
        [
            [
                operator,
                *(f"{result[key] / 2**20:.1f}" for key in ("base", "most", "growth", "allowed")),
                str(result["processed"]),
                "met" if result["met"] else "MISSED",
            ]
            for operator, result in results.items()
        ],
    )
    harness.write(args.json, {"memory": results})
    sys.exit(0 if all(result["met"] for result in results.values()) else 1)


if __name__ == "__main__":
    main()
