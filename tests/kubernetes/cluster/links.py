"""The program between the nodes' pod subnets: `python -m tests.kubernetes.cluster.links SOCKET TUN`, as root.

Packets that the host's routing sends to its TUN device (between pods of different nodes, where a delay is set) are
held as the line between the two nodes says and given back to the same device, from where the host routes them on.
The lines are those of `nomad.bench.netns`. Every connection to SOCKET gives one JSON object and gets one back:

    {"subnets": {"edge": "10.244.1.0/24", ...}, "shapes": [[source, target, {"latency", ...}], ...]}

A pair that isn't named any more has a line without delay; a packet without a line is given back at once.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import socket
import struct
import sys
import time
from ipaddress import IPv4Network
from pathlib import Path
from random import Random
from typing import Any

from nomad.bench.netns.line import Line
from nomad.control import Shape

TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
SUBNET_BYTES = 3
"""Every node's pods have a /24."""


class Lines:
    def __init__(self) -> None:
        self._lines: dict[tuple[bytes, bytes], Line] = {}
        self._random = Random(1)

    def configure(self, request: dict[str, Any]) -> None:
        subnets = {
            node: IPv4Network(subnet).network_address.packed[:SUBNET_BYTES]
            for node, subnet in request["subnets"].items()
        }
        now = time.monotonic()
        wanted = {(subnets[source], subnets[target]): Shape(**shape) for source, target, shape in request["shapes"]}
        for pair in wanted.keys() - self._lines.keys():
            self._lines[pair] = Line(Shape(), self._random)
        for pair, line in self._lines.items():
            line.set_shape(wanted.get(pair, Shape()), now)

    def packet(self, packet: bytes, now: float) -> bool:
        """Take a packet in; False when it has no line."""
        line = self._lines.get((packet[12:15], packet[16:19])) if packet[0] >> 4 == 4 else None
        if line is None:
            return False
        line.send(packet, now)
        return True

    def wait(self, now: float) -> float | None:
        """Seconds until a packet is due; None when none is on its way."""
        due = min((line.due for line in self._lines.values()), default=float("inf"))
        return None if due == float("inf") else max(0.0, due - now)

    def arrived(self, now: float) -> list[bytes]:
        return [packet for line in self._lines.values() if line.due <= now for packet in line.take(now)]


def open_tun(name: str) -> int:
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    return descriptor


def give(tun: int, packet: bytes) -> None:
    try:
        os.write(tun, packet)
    except OSError:  # what the kernel won't take, as a network card would drop it
        pass


def run(path: Path, name: str) -> None:
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except PermissionError:
        pass  # on a busy machine packets are late, then
    lines, tun = Lines(), open_tun(name)
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        while True:
            ready = select.select([tun, listener.fileno()], (), (), lines.wait(time.monotonic()))[0]
            if listener.fileno() in ready:
                answer(listener, lines)
            if tun in ready:
                try:
                    for _ in range(32):
                        packet = os.read(tun, 65535)
                        if not lines.packet(packet, time.monotonic()):
                            give(tun, packet)
                except BlockingIOError:
                    pass  # all read
            for packet in lines.arrived(time.monotonic()):
                give(tun, packet)


def answer(listener: socket.socket, lines: Lines) -> None:
    connection, _ = listener.accept()
    with connection, connection.makefile("rwb") as stream:
        lines.configure(json.loads(stream.readline()))
        stream.write(b"{}\n")


def ask(path: Path, request: dict[str, Any]) -> None:
    """Configure the program that listens at `path`."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(path))
        with connection.makefile("rwb") as stream:
            stream.write(json.dumps(request).encode() + b"\n")
            stream.flush()
            stream.readline()


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2])
