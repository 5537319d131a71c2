"""Real packets through the switch: times, rates, losses. As root only."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from nomad.bench.links import backend
from nomad.bench.netns.namespaces import FOLDER
from nomad.bench.netns.tun import Tun, TunNetwork
from nomad.control import Shape
from nomad.errors import UsageError
from nomad.settings import Seat
from nomad.topology import Topology, parse
from tests.bench.netns.conftest import SocketAt
from tests.bench.netns.test_namespaces import until

OWN_TIME = 0.002
"""Seconds that the two hops through the kernel and the switch may add, on a machine that has other things to do."""

pytestmark = pytest.mark.usefixtures("host")


def one_way(source: socket.socket, target: socket.socket, count: int = 1) -> float:
    """Least seconds of packets that follow each other: what other processes do to them is no part of the link."""
    times = []
    for _ in range(count):
        began = time.monotonic()
        source.sendto(b"text", target.getsockname())
        target.recv(100)
        times.append(time.monotonic() - began)
    return min(times)


async def both_ways(network: TunNetwork, shape: Shape) -> None:
    await network.set_links([("a", "b", shape), ("b", "a", shape)])


@pytest.mark.parametrize("latency", [0.0, 0.005, 0.02, 0.08])
async def test_round_trips(latency: float, two: Topology, socket_at: SocketAt) -> None:
    async with Tun().open(two, Path()) as network:
        await both_ways(network, Shape(latency=latency))
        a, b = (socket_at(network.seats[node]) for node in ("a", "b"))
        times = []
        for _ in range(15):
            began = time.monotonic()
            one_way(a, b)
            one_way(b, a)
            times.append(time.monotonic() - began)
        assert min(times) >= 2 * latency
        assert sorted(times)[len(times) // 4] <= 2 * latency * 1.02 + OWN_TIME


async def test_declared_links_are_there_from_the_start(socket_at: SocketAt) -> None:
    text = """
        nodes: {a: {}, b: {}, c: {}}
        links: [{from: a, to: b, latency: 30ms, both: false}, {from: b, to: c, latency: 10ms}]
    """
    async with backend("tun").open(parse(text), Path()) as network:
        assert network.shaped is False
        a, b, c = (socket_at(network.seats[node]) for node in ("a", "b", "c"))
        for source, target, latency in [(a, b, 0.03), (b, a, 0.0), (b, c, 0.01), (c, b, 0.01), (a, c, 0.0)]:
            assert latency <= one_way(source, target, 6) < latency + OWN_TIME


async def test_a_change_counts_at_once(two: Topology, socket_at: SocketAt) -> None:
    async with Tun().open(two, Path()) as network:
        a, b = (socket_at(network.seats[node]) for node in ("a", "b"))
        for latency in (0.05, 0.005, 0.02, 0.0):
            await network.set_link("a", "b", Shape(latency=latency))
            assert latency <= one_way(a, b, 6) < latency + OWN_TIME
            assert one_way(b, a, 6) < OWN_TIME  # the other direction stays as it was


async def test_jitter(two: Topology, socket_at: SocketAt) -> None:
    async with Tun().open(two, Path()) as network:
        await network.set_link("a", "b", Shape(latency=0.02, jitter=0.01))
        a, b = (socket_at(network.seats[node]) for node in ("a", "b"))
        times = sorted(one_way(a, b) for _ in range(40))
        assert times[0] >= 0.01
        assert times[30] < 0.03  # what comes later may have met other processes
        assert statistics.median(times) == pytest.approx(0.02, abs=0.006)
        assert times[30] - times[0] > 0.006


async def test_loss(two: Topology, socket_at: SocketAt) -> None:
    async with Tun().open(two, Path()) as network:
        await network.set_link("a", "b", Shape(loss=0.1))
        a, b = (socket_at(network.seats[node]) for node in ("a", "b"))
        b.settimeout(0.0)
        arrived, sent = 0, 2000
        for number in range(sent):
            a.sendto(b"text", b.getsockname())
            if number % 20 == 19:
                arrived += await drained(b, number, network)
        lost = (await line(network))["lost"]
        assert lost == pytest.approx(0.1 * sent, abs=60)
        assert arrived == sent - lost


async def line(network: TunNetwork) -> dict[str, int]:
    stats = await network.stats()
    return next(line for line in stats["lines"] if (line["source"], line["target"]) == ("a", "b"))


async def drained(sock: socket.socket, number: int, network: TunNetwork) -> int:
    """Receive what came through, once the switch has seen packet `number`."""
    async with asyncio.timeout(30):
        while (await line(network))["packets"] <= number:
            await asyncio.sleep(0.001)
    found = 0
    while True:
        try:
            sock.recv(100)
        except BlockingIOError:
            return found
        found += 1


@pytest.mark.parametrize(
    ("bandwidth", "mtu"),
    [(1.25e6, 9000), *(pytest.param(*each, marks=pytest.mark.slow) for each in [(1.25e6, 1500), (12.5e6, 9000)])],
)
async def test_bandwidth(bandwidth: float, mtu: int, two: Topology, socket_at: SocketAt) -> None:
    async with Tun(mtu=mtu).open(two, Path()) as network:
        await both_ways(network, Shape(latency=0.01, bandwidth=bandwidth))
        for _ in range(4):  # a receiver that has to wait for the machine finds more at once later
            rate = await asyncio.to_thread(tcp_rate, network.seats["a"], network.seats["b"], socket_at)
            if 0.93 * bandwidth <= rate < bandwidth:  # headers take their share
                break
        assert 0.93 * bandwidth <= rate < bandwidth


def tcp_rate(source: Seat, target: Seat, socket_at: SocketAt, seconds: float = 1.5) -> float:
    """Bytes per second of one connection in the second half of the time."""
    listener, sender = socket_at(target, socket.SOCK_STREAM), socket_at(source, socket.SOCK_STREAM)
    listener.listen()
    sender.connect(listener.getsockname())
    receiver, _ = listener.accept()
    receiver.settimeout(5.0)
    over = threading.Event()

    def send() -> None:
        try:
            while not over.is_set():
                sender.sendall(bytes(1 << 16))
        except OSError:  # it was in the middle of one when the connection was shut down
            pass

    thread = threading.Thread(target=send)
    thread.start()
    began, marks, total = time.monotonic(), [], 0
    while (now := time.monotonic()) < began + seconds:
        total += len(receiver.recv(1 << 20))
        marks.append((now, total))
    over.set()
    sender.shutdown(socket.SHUT_RDWR)
    receiver.close()
    thread.join()
    late = [mark for mark in marks if mark[0] > began + seconds / 2]
    return (late[-1][1] - late[0][1]) / (late[-1][0] - late[0][0])


async def test_a_datagram_of_many_packets_arrives_whole(two: Topology, socket_at: SocketAt) -> None:
    async with Tun(mtu=1500).open(two, Path()) as network:
        await both_ways(network, Shape(latency=0.005, jitter=0.004))
        a, b = (socket_at(network.seats[node]) for node in ("a", "b"))
        text = os.urandom(60_000)
        a.sendto(text, b.getsockname())
        assert b.recv(1 << 16) == text


async def test_an_unknown_link_is_refused(two: Topology) -> None:
    async with Tun().open(two, Path()) as network:
        with pytest.raises(UsageError, match="no link from 'a' to 'x'"):
            await network.set_link("a", "x", Shape())
        await network.set_link("a", "b", Shape(latency=0.1))


async def test_a_switch_that_ended_is_noticed(two: Topology) -> None:
    async with Tun().open(two, Path()) as network:
        network._process.kill()
        with pytest.raises(UsageError, match="has ended"):
            await network.stats()


async def test_a_device_that_cannot_be_made_leaves_nothing(two: Topology) -> None:
    before = set(FOLDER.iterdir())
    with pytest.raises(UsageError, match="mtu"):
        async with Tun(mtu=1).open(two, Path()):
            pass
    assert set(FOLDER.iterdir()) == before


OWNER = """
import asyncio
from pathlib import Path
from nomad import topology
from nomad.bench.netns.tun import Tun

async def main():
    async with Tun().open(topology.from_names(["a", "b"]), Path()) as network:
        print(*(seat.prefix[1].rpartition("/")[2] for seat in network.seats.values()), network._process.pid, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda n: n.name)
def test_everything_vanishes_with_its_owner(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as owner:
        assert owner.stdout is not None
        *names, switch = owner.stdout.readline().decode().split()
        assert all((FOLDER / name).exists() for name in names)
        owner.send_signal(number)
    until(lambda: not any((FOLDER / name).exists() for name in names) and not psutil.pid_exists(int(switch)))
