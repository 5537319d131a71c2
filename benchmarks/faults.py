"""Whether anything is lost, doubled or out of order while operators are killed and connections are cut.

A source counts; behind it stand an operator, a generator that drops some and multiplies others, and a sink
that writes down what it is called with. Meanwhile processes (all but the source's) get kill -9, and connections are
broken, at random moments. At the end the sink's file must hold exactly the expected lines.

    python -m benchmarks.faults [--quick] [--seconds N] [--seed N] [--json OUT]

A kill that interrupts the sink's own call leaves in doubt whether that call took effect, and it is made again: at most
one repeated line per kill of the sink, right behind the original, is what docs/delivery.md allows; it is reported.
Exit code 1 when anything else differs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.cluster import cluster, running
from nomad.errors import RequestError

PACE = 1000
"""Messages a second at the source."""
EVERY = (0.2, 0.8)
"""Seconds between two faults, at random."""


def functions(count: int, out: Path) -> list[Callable[..., Any]]:
    """Source, identity, a generator that gives 0, 1 or 2 messages, and a sink that writes lines to `out`."""

    def source() -> Iterator[int]:
        start = time.monotonic()
        for number in range(count):
            time.sleep(max(0.0, start + number / PACE - time.monotonic()))
            yield number

    def same(x: int) -> int:
        return x

    def spread(x: int) -> Iterator[tuple[int, int]]:
        for k in range(x % 3):
            yield x, k

    def sink(x: tuple[int, int]) -> None:
        with out.open("a") as file:
            file.write(f"{x[0]} {x[1]}\n")

    return [source, same, spread, sink]


async def measure(seconds: float, rng: random.Random) -> dict[str, Any]:
    """One run with faults for `seconds`; what was done and what came out of it."""
    count = int(seconds * PACE)
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "lines"
        kills = {"same": 0, "spread": 0, "sink": 0}
        cuts = 0
        async with cluster() as master, running(master, functions(count, out), "faults"):
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                await asyncio.sleep(rng.uniform(*EVERY))
                victim = rng.choice([op for op in master.pipeline("faults").operators if op.name != "source"])
                if victim.pid is None:
                    continue
                if rng.random() < 0.5:
                    os.kill(victim.pid, signal.SIGKILL)
                    kills[victim.name] += 1
                else:
                    with contextlib.suppress(RequestError):  # it is being restarted
                        await master.cut("faults", victim.name)
                        cuts += 1
            while not master.pipeline("faults").phase.final:
                if time.monotonic() > end + 120:
                    break
                await asyncio.sleep(0.05)
            view = master.pipeline("faults")
        got = out.read_text().splitlines()
    expected = [f"{x} {k}" for x in range(count) for k in range(x % 3)]
    repeated = _repeated(got)
    once = [line for k, line in enumerate(got) if k not in repeated]
    return {
        "phase": str(view.phase),
        "kills": kills,
        "cuts": cuts,
        "expected": len(expected),
        "got": len(got),
        "in_doubt_repeated": len(repeated),
        "exact": once == expected and len(repeated) <= kills["sink"] and view.phase == "completed",
    }


def _repeated(lines: list[str]) -> set[int]:
    """Numbers of lines that repeat the one before."""
    return {k for k in range(1, len(lines)) if lines[k] == lines[k - 1]}


def main() -> None:
    """Run, print, write."""
    args = harness.arguments(
        __doc__,
        seconds={"type": float, "default": 60.0, "help": "how long faults go on"},
        seed={"type": int, "default": None, "help": "of the faults; printed"},
    )
    seed = random.randrange(1 << 32) if args.seed is None else args.seed
    print(f"seed {seed}")
    result = asyncio.run(measure(8.0 if args.quick else args.seconds, random.Random(seed)))
    rows = [[key, str(value)] for key, value in result.items()]
    harness.table("Faults", ["what", ""], rows)
    harness.write(args.json, {"seed": seed, "faults": result})
    sys.exit(0 if result["exact"] else 1)


if __name__ == "__main__":
    main()
