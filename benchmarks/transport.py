"""How fast are the transports, next to raw blocking sockets in the same minute?

    python -m benchmarks.transport [--quick] [--json OUT] [--backends unix,tcp] [--workloads 64] [--loop asyncio]

Two processes: one sends, one receives (or answers). For each workload all backends run one after another,
several times; shown are medians. Ratios compare runs of the same round, so that a machine that is slow for
a minute is slow for both. CPU is that of both processes together, without their start.

Raw is what a program without a runtime would do: messages of a known size over a blocking socket, one
`sendall` each, received by `recv_into` into one buffer over and over, which stays in the caches.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Coroutine
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import uvloop

from benchmarks import harness
from nomad.errors import ConnectionBroken
from nomad.transport.base import Connection
from nomad.transport.registry import connect, listen

T = TypeVar("T")


@dataclass(frozen=True)
class Workload:
    name: str
    size: int
    """Bytes of the large part, or of the head when there is no part."""
    batch: int
    """Frames per write."""
    part: bool
    """Whether the bytes travel as a part after a small head."""


WORKLOADS = [
    Workload("1 KiB, 256 per write", 1024, 256, part=False),
    Workload("64 KiB", 65_536, 4, part=True),
    Workload("640x480x3", 921_600, 1, part=True),
]
ROUND_TRIP = "round trip of 64 bytes"
RAW = {"raw unix": "unix", "raw tcp": "tcp"}
BACKENDS = ["raw unix", "unix", "zmq+ipc", "raw tcp", "tcp", "zmq+tcp", "inproc"]
REFERENCE = {"unix": "raw unix", "zmq+ipc": "raw unix", "inproc": "raw unix", "tcp": "raw tcp", "zmq+tcp": "raw tcp"}


@dataclass
class Near:
    """What the sender, or asker, found."""

    cpu: float = 0.0
    round_trip: float = 0.0
    """Seconds, the median."""


@dataclass
class Far:
    """What the receiver found."""

    count: int = 1
    seconds: float = 1.0
    cpu: float = 0.0


@dataclass
class Result:
    rate: float = 0.0
    """Frames per second."""
    cpu: float = 0.0
    """Seconds of CPU per frame, of both processes."""
    round_trip: float = 0.0
    """Seconds, the median."""


# Nomad


def frame_of(workload: Workload) -> tuple[bytes, ...]:
    payload = os.urandom(workload.size)
    return (b"h" * 40, payload) if workload.part else (payload,)


async def send(connection: Connection, workload: Workload, seconds: float) -> Near:
    batch = [frame_of(workload)] * workload.batch
    cpu, end = time.process_time(), time.monotonic() + seconds
    while time.monotonic() < end:
        connection.write(batch)
        await connection.drain()
    await connection.close()
    return Near(cpu=time.process_time() - cpu)


async def receive(connection: Connection) -> Far:
    """From the first frames, which aren't counted, until the sender closed."""
    await connection.recv()
    cpu, first, count = time.process_time(), time.monotonic(), 0
    last = first
    try:
        while True:
            count += len(await connection.recv())
            last = time.monotonic()
    except ConnectionBroken:
        return Far(count, last - first, time.process_time() - cpu)


async def ask(connection: Connection, seconds: float) -> Near:
    question = [(b"q" * 64,)]
    times = []
    end = time.monotonic() + seconds
    while (began := time.monotonic()) < end:
        connection.write(question)
        await connection.recv()
        times.append(time.monotonic() - began)
    await connection.close()
    return Near(round_trip=statistics.median(times))


async def answer(connection: Connection) -> Far:
    try:
        while True:
            connection.write(await connection.recv())
    except ConnectionBroken:
        return Far()


async def near(address: str, workload: Workload | None, seconds: float) -> Near:
    """The sender's, or asker's, end."""
    connection = await connect(address)
    return await (send(connection, workload, seconds) if workload else ask(connection, seconds))


async def measure(backend: str, workload: Workload | None, seconds: float, loop: str, folder: str) -> Result:
    done: asyncio.Future[Far] = asyncio.get_running_loop().create_future()

    async def far(connection: Connection) -> None:
        done.set_result(await (receive(connection) if workload else answer(connection)))

    address = {"unix": f"unix:{folder}/s", "zmq+ipc": f"zmq+ipc:{folder}/z", "inproc": "inproc:"}
    listener = await listen(address.get(backend, f"{backend}://127.0.0.1:0"), far)
    if backend == "inproc":
        sent = await near(listener.reachable, workload, seconds)
        sent.cpu = 0.0  # the receiver's is that of this one process
    else:
        sender = await asyncio.create_subprocess_exec(
            *sender_command(listener.reachable, workload, seconds, loop), stdout=subprocess.PIPE
        )
        output, _ = await sender.communicate()
        sent = Near(**json.loads(output))
    received = await done
    await listener.close()
    return result(sent, received)


def result(sent: Near, received: Far) -> Result:
    return Result(
        received.count / received.seconds, (sent.cpu + received.cpu) / max(received.count, 1), sent.round_trip
    )


def sender_command(address: str, workload: Workload | None, seconds: float, loop: str) -> list[str]:
    task = json.dumps([address, workload and asdict(workload), seconds, loop])
    return [sys.executable, "-m", "benchmarks.transport", "--sender", task]


def sender_main(task: str) -> None:
    """In a process of its own: prints what it measured."""
    address, fields, seconds, loop = json.loads(task)
    workload = fields and Workload(**fields)
    if address.startswith("raw "):
        sent = raw_near(address, workload, seconds)
    else:
        sent = run(near(address, workload, seconds), loop)
    print(json.dumps(asdict(sent)))


def run(main: Coroutine[Any, Any, T], loop: str) -> T:
    if loop == "uvloop":
        return uvloop.run(main)
    return asyncio.run(main)


# Raw


def raw_near(address: str, workload: Workload | None, seconds: float) -> Near:
    _, kind, place = address.split(" ", 2)
    if kind == "unix":
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(place)
    else:
        sock = socket.create_connection(("127.0.0.1", int(place)))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    cpu, end = time.process_time(), time.monotonic() + seconds
    with sock:
        if workload is None:
            times = []
            while (began := time.monotonic()) < end:
                sock.sendall(b"q" * 64)
                sock.recv(64)
                times.append(time.monotonic() - began)
            return Near(round_trip=statistics.median(times))
        payload = os.urandom(workload.size)
        while time.monotonic() < end:
            for _ in range(workload.batch):
                sock.sendall(payload)
    return Near(cpu=time.process_time() - cpu)


def raw_measure(backend: str, workload: Workload | None, seconds: float, folder: str) -> Result:
    kind = RAW[backend]
    with socket.socket(socket.AF_UNIX if kind == "unix" else socket.AF_INET) as listener:
        listener.bind(f"{folder}/raw" if kind == "unix" else ("127.0.0.1", 0))
        listener.listen()
        place = f"{folder}/raw" if kind == "unix" else listener.getsockname()[1]
        sender = subprocess.Popen(
            sender_command(f"raw {kind} {place}", workload, seconds, ""), stdout=subprocess.PIPE, text=True
        )
        sock, _ = listener.accept()
        with sock:
            received = raw_far(sock, workload)
    output, _ = sender.communicate()
    return result(Near(**json.loads(output)), received)


def raw_far(sock: socket.socket, workload: Workload | None) -> Far:
    if workload is None:
        if sock.family == socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while data := sock.recv(64):
            sock.sendall(data)
        return Far()
    view = memoryview(bytearray(workload.size + 64))[64:]
    count, cpu, first, last = -1, time.process_time(), 0.0, 0.0
    while True:
        filled = 0
        while filled < workload.size:
            got = sock.recv_into(view[filled:])
            if not got:
                return Far(count, last - first, time.process_time() - cpu)
            filled += got
        count += 1
        last = time.monotonic()
        first = first or last


# All of it


def one(backend: str, workload: Workload | None, seconds: float, loop: str) -> Result:
    with tempfile.TemporaryDirectory(prefix="nomad-bench-") as folder:
        if backend in RAW:
            return raw_measure(backend, workload, seconds, folder)
        return run(measure(backend, workload, seconds, loop, folder), loop)


def main() -> None:
    arguments = harness.arguments(
        __doc__,
        backends={"default": ",".join(BACKENDS), "metavar": "A,B", "help": "default: %(default)s"},
        workloads={"default": "", "metavar": "A,B", "help": "beginnings of their names; default: all"},
        loop={"choices": ["uvloop", "asyncio"], "default": "uvloop"},
        sender={"help": argparse.SUPPRESS},
    )
    if arguments.sender:
        sender_main(arguments.sender)
        return
    repeats, seconds = (1, 0.2) if arguments.quick else (7, 0.5)
    backends = arguments.backends.split(",")
    found = []
    for workload in [*WORKLOADS, None]:
        name = workload.name if workload else ROUND_TRIP
        if not name.startswith(tuple(arguments.workloads.split(","))):
            continue
        rounds = [
            {backend: one(backend, workload, seconds, arguments.loop) for backend in backends} for _ in range(repeats)
        ]
        show(name, workload, rounds)
        found += [
            {"workload": name, "round": number, "backend": backend, **asdict(result)}
            for number, results in enumerate(rounds)
            for backend, result in results.items()
        ]
    harness.write(arguments.json, {"loop": arguments.loop, "results": found})


def show(name: str, workload: Workload | None, rounds: list[dict[str, Result]]) -> None:
    def median(backend: str, figure: str, reference: str = "") -> float:
        return statistics.median(
            getattr(results[backend], figure) / (getattr(results[reference], figure) if reference else 1)
            for results in rounds
        )

    rows = []
    for backend in rounds[0]:
        reference = REFERENCE.get(backend, "")
        known = reference in rounds[0]
        if workload is None:
            cells = [f"{1e6 * median(backend, 'round_trip'):.0f}"]
            cells += [f"{median(backend, 'round_trip', reference):.2f}" if known else ""]
        else:
            rate = median(backend, "rate")
            cells = [f"{rate:,.0f}", f"{rate * workload.size / 1e6:,.0f}", f"{1e6 * median(backend, 'cpu'):.1f}"]
            cells += [f"{median(backend, figure, reference):.2f}" if known else "" for figure in ("rate", "cpu")]
        rows.append([backend, *cells])
    if workload is None:
        harness.table(name, ["", "us, p50", "of raw"], rows)
    else:
        harness.table(name, ["", "frames/s", "MB/s", "CPU us/frame", "rate of raw", "CPU of raw"], rows)


if __name__ == "__main__":
    main()
