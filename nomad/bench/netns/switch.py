"""The program between TUN devices: `python -m nomad.bench.netns.switch`, started by `tun`, as root.

It makes one TUN device in each namespace, reads the IP packets that programs there send to other nodes, holds each as
the line between the two nodes says, and writes it to the device of the node that it goes to. A process of its own, with
a loop of its own and real-time priority, so that neither the master nor busy pods disturb the timing; it sleeps when
nothing is due. It ends, and its devices with it, when its standard input does.

One JSON object a line, each answered by one line {"ok": ...} or {"error": "..."}:

    {"ports": [{"node", "namespace", "address"}], "bits": 16, "mtu": 9000, "seed": 1}     first
    {"shapes": [[source, target, {"latency", "jitter", "bandwidth", "loss"}], ...]}
    {"stats": true}                            counters; also seconds of CPU, and the most bytes of memory so far
"""

from __future__ import annotations

import fcntl
import gc
import heapq
import json
import os
import select
import struct
import sys
import time
from collections.abc import Iterable
from ipaddress import IPv4Address
from pathlib import Path
from random import Random
from typing import Any

from nomad.bench.netns import namespaces
from nomad.bench.netns.line import Line
from nomad.control import Shape
from nomad.errors import UsageError

DEVICE = "nomad0"
"""Its name in every namespace."""
TUN = "/dev/net/tun"
_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_QUEUE = 2000
"""Packets that wait in a device until they are read."""
_BATCH = 32
"""Packets read from one device before the others, and what is due, have their turn."""


class Switch:
    """Ports and the lines between them. `write` hands a packet to a port; time is passed in."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)
        self._numbers: dict[str, int] = {}
        self._routes: list[dict[bytes, tuple[Line, int]]] = []  # of each port: address -> line, port
        self._lines: list[tuple[Line, int]] = []  # with the port at its end
        self._index: dict[tuple[str, str], int] = {}
        self._due: list[tuple[float, int]] = []  # heap of when, index into _lines; a line stands there once
        self._waits: list[bool] = []
        self.late = 0.0
        """Seconds that packets were given out after their time, summed ..."""
        self.late_most = 0.0
        self.given = 0
        """... over this many."""

    def add_ports(self, ports: Iterable[tuple[str, bytes]]) -> None:
        """Nodes with their addresses, each to be written to by its number in this order."""
        nodes = list(ports)
        for number, (node, _) in enumerate(nodes):
            self._numbers[node] = number
            self._routes.append({})
            for target, (peer, address) in enumerate(nodes):
                if target != number:
                    line = Line(Shape(), self._random)
                    self._index[node, peer] = len(self._lines)
                    self._lines.append((line, target))
                    self._waits.append(False)
                    self._routes[number][address] = (line, len(self._lines) - 1)

    def set_shape(self, source: str, target: str, shape: Shape, now: float) -> None:
        """Raises `KeyError` for a pair that isn't there."""
        self._lines[self._index[source, target]][0].set_shape(shape, now)
        self._due = [(line.due, index) for index, (line, _) in enumerate(self._lines) if self._waits[index]]
        heapq.heapify(self._due)

    def packet(self, port: int, packet: bytes, now: float) -> None:
        """A packet that was sent at `port`. What isn't IPv4 to a node is dropped."""
        route = self._routes[port].get(packet[16:20])
        if route is None or packet[0] >> 4 != 4:
            return
        line, index = route
        line.send(packet, now)
        if not self._waits[index] and (due := line.due) != float("inf"):
            self._waits[index] = True
            heapq.heappush(self._due, (due, index))

    @property
    def next(self) -> float:
        """When the next packet is due; infinity when none is."""
        return self._due[0][0] if self._due else float("inf")

    def arrived(self, now: float) -> list[tuple[int, bytes]]:
        """What is due, as port and packet."""
        due, found = self._due, []
        while due and due[0][0] <= now:
            when, index = due[0]
            line, port = self._lines[index]
            for packet in line.take(now):
                found.append((port, packet))
            self.late += now - when
            self.late_most = max(self.late_most, now - when)
            self.given += 1
            if (following := line.due) == float("inf"):
                self._waits[index] = False
                heapq.heappop(due)
            else:
                heapq.heapreplace(due, (following, index))
        return found

    def stats(self) -> dict[str, Any]:
        """Counters per line, and how late packets were given out, in seconds."""
        lines = [
            {
                "source": source,
                "target": target,
                "packets": (line := self._lines[index][0]).packets,
                "bytes": line.bytes,
                "lost": line.lost,
                "dropped": line.dropped,
            }
            for (source, target), index in self._index.items()
        ]
        return {"lines": lines, "late_mean": self.late / max(1, self.given), "late_most": self.late_most}


class _Refused(Exception):
    """A request can't be carried out; the message is the answer."""


class Program:
    """The switch with its devices and its conversation with the one who started it."""

    def __init__(self) -> None:
        self._switch = Switch(0)
        self._devices: list[int] = []
        self._heard = b""
        self._refused = 0

    def run(self) -> None:
        """Until standard input ends."""
        gc.disable()  # nothing here makes cycles, and a collection would hold packets up
        switch, monotonic, read, write = self._switch, time.monotonic, os.read, os.write
        while True:
            wait = switch.next - monotonic()
            timeout = None if wait == float("inf") else max(0.0, wait)
            for ready in select.select([0, *self._devices], (), (), timeout)[0]:
                if ready == 0:
                    if not self._listen():
                        return
                    switch = self._switch
                    continue
                port = self._devices.index(ready)
                try:
                    for _ in range(_BATCH):
                        packet = read(ready, 65535)
                        switch.packet(port, packet, monotonic())
                except BlockingIOError:
                    pass  # all read
            for port, packet in switch.arrived(monotonic()):
                try:
                    write(self._devices[port], packet)
                except OSError:  # what the kernel won't take, as a network card would drop it
                    self._refused += 1

    def _listen(self) -> bool:
        """Answer what was asked; whether there will be more."""
        heard = os.read(0, 1 << 16)
        *lines, self._heard = (self._heard + heard).split(b"\n")
        for line in lines:
            try:
                answer = {"ok": self._answer(json.loads(line))}
            except (UsageError, _Refused) as exc:
                answer = {"error": str(exc)}
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()
        return bool(heard)

    def _answer(self, request: dict[str, Any]) -> Any:
        if "ports" in request:
            return self._open(request["ports"], request["bits"], request["mtu"], request["seed"])
        if "shapes" in request:
            now = time.monotonic()
            for source, target, shape in request["shapes"]:
                try:
                    self._switch.set_shape(source, target, Shape(**shape), now)
                except KeyError:
                    raise _Refused(f"there is no link from {source!r} to {target!r}") from None
            return None
        status = Path("/proc/self/status").read_text()  # rusage would count the process that forked this one, too
        memory = int(status.partition("VmHWM:")[2].split()[0]) << 10
        return {**self._switch.stats(), "refused": self._refused, "cpu": time.process_time(), "memory": memory}

    def _open(self, ports: list[dict[str, str]], bits: int, mtu: int, seed: int) -> dict[str, bool]:
        self._switch = Switch(seed)
        self._switch.add_ports([(port["node"], IPv4Address(port["address"]).packed) for port in ports])
        for port in ports:
            self._devices.append(device(f"nomad{os.getpid()}", port["namespace"], port["address"], bits, mtu))
        return {"real_time": _real_time()}


def device(made_as: str, namespace: str, address: str, bits: int, mtu: int) -> int:
    """A new TUN device in the namespace, up; its descriptor, which doesn't block. It goes when that is closed.

    For a moment it has the name `made_as` outside of it. Raises `UsageError`.
    """
    try:
        descriptor = os.open(TUN, os.O_RDWR | os.O_NONBLOCK)
    except OSError as exc:
        raise UsageError(f"{TUN} can't be opened: {exc.strerror}; is the kernel module `tun` loaded?") from exc
    try:
        fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", made_as.encode(), _IFF_TUN | _IFF_NO_PI))
        namespaces.run(["ip", "link", "set", "dev", made_as, "netns", namespace, "name", DEVICE])
        namespaces.ip(
            namespace,
            [
                f"link set dev {DEVICE} mtu {mtu} txqueuelen {_QUEUE} addrgenmode none",
                f"address add {address}/{bits} dev {DEVICE}",
                f"link set dev {DEVICE} up",
            ],
        )
    except OSError as exc:
        os.close(descriptor)
        raise UsageError(f"no TUN device can be made: {exc.strerror}; that needs root") from exc
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _real_time() -> bool:
    """Run before everything that isn't real-time; False where that isn't allowed, and timing suffers under load."""
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except PermissionError:
        return False
    return True


if __name__ == "__main__":
    Program().run()
