"""What blocking sockets reach without a runtime: the reference that others are measured by.

The workloads' three functions run in three processes, joined by unix sockets, without acknowledgements,
replay or flow control but the sockets' own: numbers in msgpack batches of 512; larger messages unbatched, with one
sendall and one recv each. The table has messages of 1 KiB also with a reader that takes 256 KiB at a time, which is a
batch at one of two ends.

    python -m benchmarks.raw [--quick] [--json OUT]
"""

from __future__ import annotations

import functools
import itertools
import json
import mmap
import multiprocessing
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgpack

from benchmarks import harness
from benchmarks.workloads import FRAME, WORKLOADS, Workload

BATCH = 512
_fork = multiprocessing.get_context("fork")


def run(workload: Workload, count: int, *, buffered: bool = False) -> harness.Run:
    """One run. `buffered`: several messages may be read at a time."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "go").touch()
        source, operator, sink = workload.make(count, folder)
        first, second = socket.socketpair(), socket.socketpair()
        batch = 1 if workload.name == "int, 200/s" else BATCH
        parts: list[Callable[[], Any]] = [
            lambda: _send(first[0], source(), workload, batch),
            lambda: _send(second[0], map(operator, _receive(first[1], workload, buffered)), workload, batch),
            lambda: _consume(map(sink, _receive(second[1], workload, buffered))),
        ]
        results = _fork.SimpleQueue()
        processes = [_fork.Process(target=_measured, args=(part, results)) for part in parts]
        for process in processes:
            process.start()
        for end in (*first, *second):
            end.close()
        cpu = sum(results.get() for _ in processes)
        for process in processes:
            process.join()
        if not (folder / "finished").exists():
            raise RuntimeError(f"raw, {workload.name}: the sink didn't get all of it")
        end = json.loads((folder / "finished").read_text())
        return harness.Run(count, end["time"] - float((folder / "begun").read_text()), cpu, end.get("latency"))


def _measured(part: Callable[[], Any], results: Any) -> None:
    before = time.process_time()
    try:
        part()
    finally:
        results.put(time.process_time() - before)


def _consume(items: Iterable[Any]) -> None:
    for _ in items:
        pass


def _send(sock: socket.socket, values: Iterable[Any], workload: Workload, batch: int) -> None:
    if workload.size:
        for value in values:
            sock.sendall(value)
    else:
        values = iter(values)
        while chunk := list(itertools.islice(values, batch)):
            body = msgpack.packb(chunk)
            sock.sendall(len(body).to_bytes(4, "little") + body)
    sock.shutdown(socket.SHUT_WR)


def _receive(sock: socket.socket, workload: Workload, buffered: bool) -> Iterator[Any]:
    if workload.name.startswith("frame"):
        return _frames(sock, workload.size)
    if workload.size and buffered:
        return iter(functools.partial(sock.makefile("rb", buffering=1 << 18).read, workload.size), b"")
    if workload.size:
        return iter(functools.partial(sock.recv, workload.size, socket.MSG_WAITALL), b"")
    return itertools.chain.from_iterable(_batches(sock))


def _frames(sock: socket.socket, size: int) -> Iterator[Any]:
    import numpy as np

    # One buffer for all, as page faults of fresh ones cost more than the copy; and one that begins with a page, as some
    # processors copy at a third of the speed to where malloc puts large blocks, 16 bytes behind.
    buffer = np.frombuffer(mmap.mmap(-1, size), np.uint8)
    while sock.recv_into(buffer, size, socket.MSG_WAITALL):
        yield buffer.reshape(FRAME)


def _batches(sock: socket.socket) -> Iterator[list[Any]]:
    while header := sock.recv(4, socket.MSG_WAITALL):
        yield msgpack.unpackb(sock.recv(int.from_bytes(header, "little"), socket.MSG_WAITALL))


def _name(workload: Workload, buffered: bool) -> str:
    return f"{workload.name}, buffered reads" if buffered else workload.name


def main() -> None:
    args = harness.arguments(__doc__)
    results = {}
    ways = [(workload, False) for workload in WORKLOADS]
    ways += [(workload, True) for workload in WORKLOADS if workload.name == "1 KiB"]
    for workload, buffered in ways:
        count = workload.count // 10 if args.quick else workload.count
        runs = [run(workload, count, buffered=buffered) for _ in range(2 if args.quick else 5)]
        results[_name(workload, buffered)] = harness.summary(runs)
    harness.table(
        "raw: blocking unix sockets, three processes",
        ["workload", "messages/s", "MB/s", "CPU us per message", "p50 us"],
        [
            [
                _name(workload, buffered),
                f"{result['rate']:,.0f}",
                f"{result['rate'] * workload.size / 1e6:,.0f}" if workload.size else "",
                f"{result['cpu_us']:.2f}",
                f"{result['latency_p50'] * 1e6:.0f}" if result["latency_p50"] else "",
            ]
            for workload, buffered in ways
            for result in [results[_name(workload, buffered)]]
        ],
    )
    harness.write(args.json, {"raw": results})


if __name__ == "__main__":
    main()
