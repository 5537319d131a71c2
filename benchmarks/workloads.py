"""The pipelines that the data-path benchmarks run: the same three functions for Nomad and for the raw reference.

The source waits for a file named `go`, notes when its first message leaves and counts to N; the operator
gives back what it gets; the sink checks that all comes once and in order, and notes when the last is
there. A message that doesn't come in its turn stops the run with the error in a file named `failed`.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FRAME = (480, 640, 3)


@dataclass(frozen=True, slots=True)
class Workload:
    """What the messages are, and how many make a run of about a second or two."""

    name: str
    count: int
    size: int
    """Bytes per message; 0 for numbers."""
    make: Callable[[int, Path], tuple[Callable[[], Iterator[Any]], Callable[[Any], Any], Callable[[Any], None]]]


def ints(count: int, folder: Path) -> Any:
    """The numbers from 0."""
    expected = 0

    def source() -> Iterator[int]:
        begin(folder)
        yield from range(count)

    def sink(x: int) -> None:
        nonlocal expected
        if x != expected:
            fail(folder, f"{x!r} came instead of {expected}")
        expected += 1
        if expected == count:
            finish(folder)

    return source, identity, sink


def blobs(size: int) -> Any:
    """Messages of `size` bytes, from a pool, so that making them takes no time; their beginning tells their turn."""

    def make(count: int, folder: Path) -> Any:
        kinds = 251 if size < 10_000 else 31
        expected = 0

        def source() -> Iterator[bytes]:
            pool = [i.to_bytes(8, "little") + bytes(size - 8) for i in range(kinds)]
            begin(folder)
            for i in range(count):
                yield pool[i % kinds]

        def sink(x: bytes) -> None:
            nonlocal expected
            if len(x) != size or int.from_bytes(x[:8], "little") != expected % kinds:
                fail(folder, f"{bytes(x[:8])!r} came instead of message {expected}")
            expected += 1
            if expected == count:
                finish(folder)

        return source, identity, sink

    return make


def frames(count: int, folder: Path) -> Any:
    """Pictures of 640 x 480 x 3 bytes, as arrays."""
    kinds = 7
    expected = 0

    def source() -> Iterator[Any]:
        import numpy as np

        pool = [np.full(FRAME, i, np.uint8) for i in range(kinds)]
        begin(folder)
        for i in range(count):
            yield pool[i % kinds]

    def sink(x: Any) -> None:
        nonlocal expected
        turn = expected % kinds
        if x.shape != FRAME or x[0, 0, 0] != turn or x[-1, -1, -1] != turn:
            fail(folder, f"a frame of {x[0, 0, 0]} came instead of message {expected}")
        expected += 1
        if expected == count:
            finish(folder)

    return source, identity, sink


def paced(count: int, folder: Path) -> Any:
    """One number every 5 ms: the time at which it left. The sink notes how long they took."""
    times: list[int] = []

    def source() -> Iterator[int]:
        begin(folder)
        for _ in range(count):
            time.sleep(0.005)
            yield time.monotonic_ns()

    def sink(x: int) -> None:
        times.append(time.monotonic_ns() - x)
        if len(times) == count:
            warm = times[count // 5 :]
            finish(folder, latency=statistics.median(warm) / 1e9)

    return source, identity, sink


WORKLOADS = (
    Workload("ints", 3_000_000, 0, ints),
    Workload("1 KiB", 200_000, 1024, blobs(1024)),
    Workload("64 KiB", 30_000, 65_536, blobs(65_536)),
    Workload("frame 640x480x3", 3_000, 640 * 480 * 3, frames),
    Workload("int, 200/s", 400, 0, paced),
)


def identity(x: Any) -> Any:
    """The operator."""
    return x


def begin(folder: Path) -> None:
    """Wait for the start, and note it."""
    while not (folder / "go").exists():
        time.sleep(0.001)
    (folder / "begun").write_text(str(time.monotonic()))


def finish(folder: Path, **figures: float) -> None:
    """Note the end. Renamed into place, so that who sees the file sees all of it."""
    (folder / "end").write_text(json.dumps({"time": time.monotonic(), **figures}))
    (folder / "end").rename(folder / "finished")


def fail(folder: Path, error: str) -> None:
    """Note what is wrong, and stop."""
    (folder / "failed").write_text(error)
    raise RuntimeError(error)
