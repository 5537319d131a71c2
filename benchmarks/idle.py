"""What an actor costs that has nothing to do: CPU and memory of each pod of a pipeline whose source waits.

    python -m benchmarks.idle [--quick] [--seconds N] [--json OUT]

Exit code 1 when an actor takes more than 0.5 % of a core or 50 MB.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import psutil

from benchmarks import harness
from benchmarks.cluster import cluster, running
from benchmarks.workloads import identity
from nomad.pipeline import source

CPU_BAR = 0.005
MEMORY_BAR = 50e6


@source(interval=3600)
def seldom() -> None:
    """A source without a message."""


async def measure(seconds: float) -> dict[str, Any]:
    """Per operator: share of a core, bytes resident."""
    async with cluster() as master, running(master, [seldom, identity, print], "idle") as pids:
        await asyncio.sleep(2.0)  # what starting up has left to do
        processes = {operator: psutil.Process(pid) for operator, pid in pids.items()}
        before = {operator: process.cpu_times() for operator, process in processes.items()}
        await asyncio.sleep(seconds)
        results = {}
        for operator, process in processes.items():
            after = process.cpu_times()
            used = after.user + after.system - before[operator].user - before[operator].system
            rss = process.memory_info().rss
            met = used / seconds <= CPU_BAR and rss <= MEMORY_BAR
            results[operator] = {"cpu": used / seconds, "rss": rss, "threads": process.num_threads(), "met": met}
    return results


def main() -> None:
    args = harness.arguments(__doc__, seconds={"type": float, "help": "how long (default 30; 5 with --quick)"})
    results = asyncio.run(measure(args.seconds or (5.0 if args.quick else 30.0)))
    harness.table(
        "idle actors (at most 0.5 % of a core, 50 MB)",
        ["actor", "% of a core", "MB", "threads", ""],
        [
            [
                operator,
                f"{result['cpu'] * 100:.2f}",
                f"{result['rss'] / 1e6:.1f}",
                str(result["threads"]),
                "met" if result["met"] else "MISSED",
            ]
            for operator, result in results.items()
        ],
    )
    harness.write(args.json, {"idle": results})
    sys.exit(0 if all(result["met"] for result in results.values()) else 1)


if __name__ == "__main__":
    main()
