"""How well the backend `tun` of `nomad bench` keeps time, and how much it carries.

    sudo python -m benchmarks.links [--quick] [--json OUT]

Two namespaces, and nothing between them but the switch. Round trips of small datagrams say what it adds to a link's
latency; one TCP connection at a time says what of a link's bandwidth is reached, with packets of several sizes.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import socket
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks import harness
from nomad import topology
from nomad.bench.netns.inside import socket_in
from nomad.bench.netns.tun import Tun, TunNetwork
from nomad.control import Shape
from nomad.settings import Seat

LATENCIES = (0.0, 0.005, 0.02, 0.08)
MTUS = (1500, 9000, 65_000)
SHAPES = (
    Shape(),
    Shape(latency=0.02),
    Shape(latency=0.02, bandwidth=1.25e6),
    Shape(latency=0.02, bandwidth=12.5e6),
    Shape(latency=0.005, bandwidth=125e6),
)
NODES = topology.from_names(["a", "b"])
_fork = multiprocessing.get_context("fork")


def main() -> None:
    options = harness.arguments(__doc__)
    count, seconds = (100, 1.5) if options.quick else (400, 4.0)
    rounds = asyncio.run(round_trips(count))
    harness.table(
        "round trips of 100 bytes, milliseconds",
        ["latency, one way", "p50", "p99", "p50 above the link's", "switch late, mean", "most"],
        [[f"{1e3 * value:.2f}" for value in row.values()] for row in rounds],
    )
    carried = [row for mtu in MTUS for row in asyncio.run(throughput(mtu, seconds))]
    harness.table(
        "one TCP connection",
        ["MTU", "link", "Mbit/s", "packets/s", "cores", "late, µs", "dropped", "MiB"],
        [[str(value) for value in row.values()] for row in carried],
    )
    harness.write(options.json, {"round_trips": rounds, "throughput": carried})


async def round_trips(count: int) -> list[dict[str, float]]:
    """One row for each latency of the link, in seconds."""
    rows = []
    for latency in LATENCIES:
        async with Tun().open(NODES, Path()) as network:
            await both_ways(network, Shape(latency=latency))
            seats = network.seats
            times = await asyncio.to_thread(ping, seats["a"], seats["b"], count if latency < 0.05 else count // 4)
            stats = await network.stats()
        p50, p99 = statistics.median(times), sorted(times)[int(0.99 * len(times))]
        rows.append(
            {
                "latency": latency,
                "p50": p50,
                "p99": p99,
                "added": p50 - 2 * latency,
                "late_mean": stats["late_mean"],
                "late_most": stats["late_most"],
            }
        )
    return rows


def ping(source: Seat, target: Seat, count: int) -> list[float]:
    """Seconds of round trips; the two ends are processes of their own."""
    a, b = socket_in(source), socket_in(target)
    a.settimeout(5.0)
    echo = _fork.Process(target=_echo, args=(b,))
    echo.start()
    times = []
    for _ in range(count):
        began = time.monotonic()
        a.sendto(bytes(100), b.getsockname())
        a.recv(200)
        times.append(time.monotonic() - began)
        time.sleep(0.002)
    a.sendto(b"", b.getsockname())
    echo.join()
    a.close()
    b.close()
    return times


def _echo(sock: socket.socket) -> None:
    while True:
        data, peer = sock.recvfrom(200)
        if not data:
            return
        sock.sendto(data, peer)


async def throughput(mtu: int, seconds: float) -> list[dict[str, Any]]:
    """One row for each shape."""
    rows = []
    for shape in SHAPES:
        async with Tun(mtu=mtu).open(NODES, Path()) as network:
            await both_ways(network, shape)
            before, began = await network.stats(), time.monotonic()
            rate = await asyncio.to_thread(stream, network.seats["a"], network.seats["b"], seconds)
            after, took = await network.stats(), time.monotonic() - began
        packets = sum(line["packets"] for line in after["lines"])
        rows.append(
            {
                "mtu": mtu,
                "link": describe(shape),
                "mbit": round(8e-6 * rate, 1),
                "packets_per_second": round(packets / took),
                "core": round((after["cpu"] - before["cpu"]) / took, 2),
                "late": round(1e6 * after["late_mean"]),
                "dropped": sum(line["dropped"] for line in after["lines"]),
                "mib": after["memory"] >> 20,
            }
        )
    return rows


def describe(shape: Shape) -> str:
    if shape == Shape():
        return "no shape"
    limit = "" if shape.bandwidth is None else f", {8e-6 * shape.bandwidth:g} Mbit/s"
    return f"{1e3 * shape.latency:g} ms{limit}"


def stream(source: Seat, target: Seat, seconds: float) -> float:
    """Bytes per second of one TCP connection, in the second half of the time."""
    listener, sender = socket_in(target, socket.SOCK_STREAM), socket_in(source, socket.SOCK_STREAM)
    listener.listen()
    sender.connect(listener.getsockname())
    receiver, _ = listener.accept()
    writer = _fork.Process(target=_send, args=(sender, receiver))
    writer.start()
    sender.close()
    began, marks, total, buffer = time.monotonic(), [], 0, bytearray(1 << 20)
    while (now := time.monotonic()) < began + seconds:
        total += receiver.recv_into(buffer)
        if now > began + seconds / 2:
            marks.append((now, total))
    receiver.close()
    listener.close()
    writer.join()
    return (marks[-1][1] - marks[0][1]) / (marks[-1][0] - marks[0][0])


def _send(sender: socket.socket, receiver: socket.socket) -> None:
    receiver.close()  # the parent's alone, so that its close is the end
    try:
        while True:
            sender.sendall(bytes(1 << 16))
    except OSError:
        os._exit(0)  # the other end has had enough


async def both_ways(network: TunNetwork, shape: Shape) -> None:
    await network.set_links([("a", "b", shape), ("b", "a", shape)])


if __name__ == "__main__":
    main()
