"""What one message costs each of three operators before it goes on, with warm and with cold caches.

On a quiet link a message finds nothing in the processor's caches that it needs. Here they are emptied before each
step, and processor time is taken, which other work on the machine changes far less than time. All three operators are
in one process, and what one writes is handed to the next by this program, so that waking up, reading and writing are
not in the figures: they are those of Nomad's own code, of msgpack and of the three functions, which do nothing.

    python -m benchmarks.cold [--quick] [--json OUT]
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from nomad.actor.source import Source
from nomad.actor.threads import new_loop
from nomad.transport.direct import Direct
from nomad.transport.stream import StreamConnection
from tests.actor.chain import Chain, until

STEPS = ("source", "operator", "sink")
FIRST = 200
"""Messages until both functions have proved to be quick, and all is as it stays."""
DIRT_BYTES = 6 << 20
"""More than a core's own caches hold."""


class Writes:
    """In place of a stream, or of the system call that writes to one: keeps what is written, and when that was."""

    def __init__(self, stream: Any):
        self.data = b""
        self.at = 0
        self._stream = stream

    def write(self, data: bytes) -> int:
        self.at = time.thread_time_ns()
        self.data = bytes(data)
        return len(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Calls:
    """Counts the calls of Nomad's Python functions up to a write, or to the sink's function."""

    def __init__(self) -> None:
        self.count = 0
        self.done = False

    def __call__(self, frame: Any, event: str, arg: Any) -> None:
        self.done = self.done or frame.f_code in (Writes.write.__code__, _sink.__code__)
        self.count += event == "call" and not self.done and frame.f_code.co_filename != __file__


_called_at = 0
_received = 0
_done = threading.Semaphore(0)


def _source() -> Iterator[int]:
    for number in range(FIRST):
        time.sleep(0.002)
        yield number
    _done.acquire()


def _operator(value: int) -> int:
    return value


def _sink(value: int) -> None:
    global _called_at, _received
    _called_at = time.thread_time_ns()
    _received += 1


async def measure(count: int) -> dict[str, dict[str, float]]:
    """Medians by step: microseconds of the processor with warm and with cold caches, and functions called."""
    times: dict[str, list[list[int]]] = {step: [[], []] for step in STEPS}
    calls: dict[str, int] = {}
    dirt = np.zeros(DIRT_BYTES // 8)
    with tempfile.TemporaryDirectory() as folder:
        async with Chain([_source, _operator, _sink], Path(folder), listen="unix:", window_messages=1 << 16) as chain:
            source, operator, sink = (member.instance for member in chain.members)
            assert isinstance(source.actor, Source)
            await until(lambda: _received == FIRST)
            direct = source.outbox.links[0].direct
            assert isinstance(direct, Direct)
            ends = [next(iter(instance._ins.values()))._raw for instance in (operator, sink)]
            conn = operator.outbox.links[0]._raw
            assert isinstance(conn, StreamConnection)
            writes = Writes(None), Writes(conn._transport)
            direct._send, conn._transport = writes[0].write, writes[1]  # type: ignore[assignment]
            steps: list[tuple[str, Callable[[], object], Callable[[], int]]] = [
                ("source", lambda: send(7, time.time_ns()), lambda: writes[0].at),
                ("operator", lambda: _arrives(ends[0], writes[0].data), lambda: writes[1].at),
                ("sink", lambda: _arrives(ends[1], writes[1].data), lambda: _called_at),
            ]
            send = source.actor._send_by_itself
            for number in range(2 * count):
                cold = number >= count
                for name, step, end in steps:
                    if cold:
                        dirt += 1
                    begun = time.thread_time_ns()
                    step()
                    times[name][cold].append(end() - begun)
            for name, step, _ in steps:
                sys.setprofile(counted := Calls())
                step()
                sys.setprofile(None)
                calls[name] = counted.count
            source.actor.drain()
            _done.release()
    return {
        step: {
            "warm_us": statistics.median(times[step][0]) / 1e3,
            "cold_us": statistics.median(times[step][1]) / 1e3,
            "functions": calls[step],
        }
        for step in STEPS
    }


def _arrives(end: Any, data: bytes) -> None:
    """Bytes come in, as the event loop has it."""
    end.get_buffer(-1)[: len(data)] = data
    end.buffer_updated(len(data))


def main() -> None:
    args = harness.arguments(__doc__)
    with asyncio.Runner(loop_factory=new_loop) as runner:
        results = runner.run(measure(20 if args.quick else 300))
    rows = [[step, *(f"{results[step][key]:.0f}" for key in ("warm_us", "cold_us", "functions"))] for step in STEPS]
    total = [f"{sum(results[step][key] for step in STEPS):.0f}" for key in ("warm_us", "cold_us", "functions")]
    harness.table(
        "one message, processor time without waking up, reading and writing",
        ["operator", "warm us", "cold us", "Python functions"],
        [*rows, ["all", *total]],
    )
    harness.write(args.json, {"cold": results})


if __name__ == "__main__":
    main()
