"""How fast are the transports, next to raw blocking sockets in the same minute?

    python benchmarks/transport.py [--backends unix,tcp] [--repeats 5] [--seconds 1] [--loop uvloop] [--json FILE]

Two processes: one sends, one receives (or answers). For each workload all backends run one after another,
and that `--repeats` times; shown are medians. Ratios compare runs of the same round, so that a machine
that is slow for a minute is slow for both. CPU is that of both processes together.

Raw is what a program without a runtime would do: fixed-size messages over a blocking socket, one
`sendall` each, received by `recv_into` into one buffer over and over.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from nomad.errors import ConnectionBroken
from nomad.transport.base import Connection
from nomad.transport.registry import connect, listen


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


async def send(connection: Connection, workload: Workload, seconds: float) -> None:
    batch = [frame_of(workload)] * workload.batch
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        connection.write(batch)
        await connection.drain()
    await connection.close()


async def receive(connection: Connection) -> tuple[int, float]:
    """How many frames came until the sender closed, and the seconds from the first to the last."""
    count = len(await connection.recv())
    first = last = time.monotonic()
    warm = count
    try:
        while True:
            count += len(await connection.recv())
            last = time.monotonic()
    except ConnectionBroken:
        return count - warm, last - first


async def ask(connection: Connection, seconds: float) -> float:
    """The median seconds of a question and its answer."""
    question = [(b"q" * 64,)]
    times = []
    end = time.monotonic() + seconds
    while (began := time.monotonic()) < end:
        connection.write(question)
        await connection.recv()
        times.append(time.monotonic() - began)
    await connection.close()
    return statistics.median(times)


async def answer(connection: Connection) -> None:
    try:
        while True:
            connection.write(await connection.recv())
    except ConnectionBroken:
        pass


async def near(address: str, workload: Workload | None, seconds: float) -> float:
    """The sender's, or asker's, end."""
    connection = await connect(address)
    if workload is None:
        return await ask(connection, seconds)
    await send(connection, workload, seconds)
    return 0.0


async def measure(backend: str, workload: Workload | None, seconds: float, loop: str, folder: str) -> Result:
    done: asyncio.Future[tuple[int, float]] = asyncio.get_running_loop().create_future()

    async def far(connection: Connection) -> None:
        if workload is None:
            await answer(connection)
            done.set_result((1, 1.0))
        else:
            done.set_result(await receive(connection))

    address = {"unix": f"unix:{folder}/s", "zmq+ipc": f"zmq+ipc:{folder}/z", "inproc": "inproc:"}
    listener = await listen(address.get(backend, f"{backend}://127.0.0.1:0"), far)
    cpu = time.process_time()
    if backend == "inproc":
        round_trip, sender_cpu = await near(listener.reachable, workload, seconds), 0.0
    else:
        sender = await asyncio.create_subprocess_exec(
            *sender_command(listener.reachable, workload, seconds, loop), stdout=subprocess.PIPE
        )
        output, _ = await sender.communicate()
        round_trip, sender_cpu = json.loads(output)
    count, elapsed = await done
    await listener.close()
    cpu = time.process_time() - cpu + sender_cpu
    return Result(count / elapsed, cpu / max(count, 1), round_trip)


def sender_command(address: str, workload: Workload | None, seconds: float, loop: str) -> list[str]:
    task = json.dumps([address, workload and asdict(workload), seconds, loop])
    return [sys.executable, __file__, "--sender", task]


def sender_main(task: str) -> None:
    """In a process of its own: prints its median round trip and its CPU seconds."""
    address, fields, seconds, loop = json.loads(task)
    workload = fields and Workload(**fields)
    cpu = time.process_time()
    if address.startswith("raw "):
        round_trip = raw_near(address, workload, seconds)
    else:
        round_trip = run(near(address, workload, seconds), loop)
    print(json.dumps([round_trip, time.process_time() - cpu]))


def run(main, loop: str):  # type: ignore[no-untyped-def]
    if loop == "uvloop":
        import uvloop

        return uvloop.run(main)
    return asyncio.run(main)


# Raw


def raw_near(address: str, workload: Workload | None, seconds: float) -> float:
    _, kind, place = address.split(" ", 2)
    if kind == "unix":
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(place)
    else:
        sock = socket.create_connection(("127.0.0.1", int(place)))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    end = time.monotonic() + seconds
    with sock:
        if workload is None:
            times = []
            while (began := time.monotonic()) < end:
                sock.sendall(b"q" * 64)
                sock.recv(64)
                times.append(time.monotonic() - began)
            return statistics.median(times)
        payload = os.urandom(workload.size)
        while time.monotonic() < end:
            for _ in range(workload.batch):
                sock.sendall(payload)
    return 0.0


def raw_measure(backend: str, workload: Workload | None, seconds: float, folder: str) -> Result:
    kind = RAW[backend]
    with socket.socket(socket.AF_UNIX if kind == "unix" else socket.AF_INET) as listener:
        place = f"{folder}/raw" if kind == "unix" else ("127.0.0.1", 0)
        listener.bind(place)
        listener.listen()
        if kind == "tcp":
            place = str(listener.getsockname()[1])
        cpu = time.process_time()
        sender = subprocess.Popen(
            sender_command(f"raw {kind} {place}", workload, seconds, ""), stdout=subprocess.PIPE, text=True
        )
        sock, _ = listener.accept()
        with sock:
            count, elapsed = raw_far(sock, workload)
    output, _ = sender.communicate()
    if kind == "unix":
        os.unlink(f"{folder}/raw")
    round_trip, sender_cpu = json.loads(output)
    cpu = time.process_time() - cpu + sender_cpu
    return Result(count / elapsed, cpu / max(count, 1), round_trip)


def raw_far(sock: socket.socket, workload: Workload | None) -> tuple[int, float]:
    if workload is None:
        while data := sock.recv(64):
            sock.sendall(data)
        return 1, 1.0
    view = memoryview(bytearray(workload.size + 64))[64:]
    count = -1
    first = last = 0.0
    while True:
        filled = 0
        while filled < workload.size:
            got = sock.recv_into(view[filled:])
            if not got:
                return count, last - first
            filled += got
        count += 1
        last = time.monotonic()
        first = first or last


# All of it


def one(backend: str, workload: Workload | None, arguments: argparse.Namespace) -> Result:
    with tempfile.TemporaryDirectory(prefix="nomad-bench-") as folder:
        if backend in RAW:
            return raw_measure(backend, workload, arguments.seconds, folder)
        return run(measure(backend, workload, arguments.seconds, arguments.loop, folder), arguments.loop)


def machine() -> dict[str, object]:
    return {
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "when": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backends", default=",".join(BACKENDS), help="default: %(default)s")
    parser.add_argument("--workloads", default="", help="parts of their names, default: all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each run")
    parser.add_argument("--loop", choices=["uvloop", "asyncio"], default="uvloop")
    parser.add_argument("--json", type=Path, help="write all results to this file")
    parser.add_argument("--sender", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.sender:
        sender_main(arguments.sender)
        return
    backends = arguments.backends.split(",")
    found = []
    for workload in [*WORKLOADS, None]:
        name = workload.name if workload else ROUND_TRIP
        if not any(part in name for part in arguments.workloads.split(",")):
            continue
        rounds = [
            {backend: one(backend, workload, arguments) for backend in backends} for _ in range(arguments.repeats)
        ]
        show(name, workload, rounds)
        found += [
            {"workload": name, "round": number, "backend": backend, **asdict(result)}
            for number, results in enumerate(rounds)
            for backend, result in results.items()
        ]
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"machine": machine(), "loop": arguments.loop, "results": found}, indent=1)
        )


def show(name: str, workload: Workload | None, rounds: list[dict[str, Result]]) -> None:
    print(f"\n{name}")
    for backend in rounds[0]:
        results = [results[backend] for results in rounds]
        if workload is None:
            line = f"{1e6 * statistics.median(result.round_trip for result in results):10.1f} us p50"
        else:
            rate = statistics.median(result.rate for result in results)
            cpu = statistics.median(result.cpu for result in results)
            line = f"{rate:10.0f} frames/s {rate * workload.size / 1e6:8.0f} MB/s {1e6 * cpu:8.1f} us CPU per frame"
        reference = REFERENCE.get(backend)
        if reference in rounds[0]:
            if workload is None:
                ratio = statistics.median(r[backend].round_trip / r[reference].round_trip for r in rounds)
            else:
                ratio = statistics.median(r[backend].rate / r[reference].rate for r in rounds)
            line += f"   {ratio:6.2f} of {reference}"
        print(f"  {backend:9} {line}", flush=True)


if __name__ == "__main__":
    main()
