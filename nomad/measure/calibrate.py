"""How fast a core of this machine is, against a reference core: a short, fixed mix of work, timed. No I/O.

Run by a node's agent, in its event loop: each piece takes about a millisecond, and between two of them the loop
has its turn. What is timed is the CPU time of the thread, so that a busy machine is no slower machine.

**The reference core** does each piece in the time that `PIECES` says. The times were fixed once, in November 2026, on a
core of an Intel Xeon server under CPython 3.11.7: what the fastest tenth of 400 runs took at most, so that nothing
else counts. They are constants since, and define what a reference-second is. The speed of a core is the geometric
mean, over the pieces, of reference time to its own time: 2.0 does twice the work per second. It is that of the core
*with its Python*, since that is what operators run on. NumPy's piece counts only where NumPy is loaded anyway.
"""

from __future__ import annotations

import hashlib
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from nomad.clock import Clock

ROUNDS = 15
"""Runs of each piece in a calibration, about 70 ms of CPU in all; their median counts."""

PAUSE = 0.004
"""Seconds between two pieces: what else the process does goes on."""


def _integers() -> int:
    total = 0
    for number in range(14_000):
        total = (total * 31 + number) & 0xFFFFFFFF
    return total


def _floats() -> float:
    x = 0.5
    for number in range(1, 10_000):
        x = x * 0.999 + math.sqrt(number) / number
    return x


def _bytes() -> str:
    block = bytes(range(256)) * 256
    joined = b"".join(block[start : start + 512] for start in range(0, len(block), 64))
    return hashlib.blake2b(joined).hexdigest()


def _maps() -> int:
    counts: dict[str, list[int]] = {}
    for number in range(3_600):
        counts.setdefault(str(number % 600), []).append(number)
    return sum(len(found) for found in sorted(counts.values()))


def _arrays() -> float:
    numpy: Any = sys.modules["numpy"]
    values = numpy.arange(60_000, dtype=numpy.float32)[::-1].reshape(200, 300)
    return float(numpy.sqrt(values + 1.0).sum() + numpy.sort(values, axis=0).mean() + numpy.cumsum(values)[-1])


PIECES: dict[str, tuple[Callable[[], object], float]] = {
    "integers": (_integers, 1.22e-3),
    "floats": (_floats, 0.88e-3),
    "bytes": (_bytes, 1.06e-3),
    "maps": (_maps, 0.608e-3),
    "arrays": (_arrays, 0.438e-3),
}
"""Name -> the piece, and the seconds that the reference core takes for it."""


def pieces() -> list[str]:
    """The pieces that are run here."""
    return [name for name in PIECES if name != "arrays" or "numpy" in sys.modules]


def speed_of(times: dict[str, list[float]]) -> float:
    """The speed of a core that took these times; the reference core's is 1.0."""
    ratios = [PIECES[name][1] / statistics.median(taken) for name, taken in times.items()]
    return statistics.geometric_mean(ratios)


async def calibrate(clock: Clock, rounds: int = ROUNDS) -> float:
    """Reference-seconds of work per second that a core of this machine does."""
    times: dict[str, list[float]] = {name: [] for name in pieces()}
    for _ in range(rounds):
        for name, taken in times.items():
            taken.append(run(name))
            await clock.sleep(PAUSE)
    return speed_of(times)


def run(name: str) -> float:
    """Seconds of CPU that a piece took just now."""
    piece, _ = PIECES[name]
    before = time.thread_time()
    piece()
    return max(time.thread_time() - before, 1e-9)


def calibrate_now(rounds: int = ROUNDS) -> float:
    """`calibrate`, all at once: for a program that has nothing else to do."""
    return speed_of({name: [run(name) for _ in range(rounds)] for name in pieces()})
