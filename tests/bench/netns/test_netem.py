"""The netem backend: its commands everywhere, its mesh as root, its delays where the kernel has netem."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from nomad import topology
from nomad.bench.links import backend
from nomad.bench.netns import netem
from nomad.bench.netns.namespaces import Namespaces
from nomad.control import Shape
from nomad.errors import UsageError
from tests.bench.netns.conftest import SocketAt


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        (Shape(latency=0.02), "limit 44740 delay 20000us"),
        (Shape(latency=0.02, jitter=0.0015), "limit 44740 delay 20000us 1500us"),
        (Shape(loss=0.001), "limit 44740 delay 0us loss 0.100000%"),
        (Shape(latency=0.1, bandwidth=1.25e6), "limit 292 delay 100000us rate 10000000bit"),
        (
            Shape(latency=0.1, jitter=0.01, bandwidth=1e3, loss=0.5),
            "limit 175 delay 100000us 10000us loss 50.000000% rate 8000bit",
        ),
    ],
)
def test_parameters(shape: Shape, text: str) -> None:
    assert " ".join(netem.parameters(shape)) == text


def test_a_link_is_set_changed_and_taken_away() -> None:
    clear, slow = Shape(), Shape(latency=0.01)
    start = ["tc", "-n", "ns", "qdisc"]
    assert netem.change("ns", "to1", clear, clear) == []
    assert netem.change("ns", "to1", clear, slow) == [*start, "replace", "dev", "to1", "root", "netem"] + (
        ["limit", "44740", "delay", "10000us"]
    )
    assert netem.change("ns", "to1", slow, clear) == [*start, "delete", "dev", "to1", "root"]


def test_every_node_reaches_every_other(host: None, socket_at: SocketAt) -> None:
    namespaces = Namespaces.make(["a", "b", "c"])
    try:
        netem.mesh(namespaces)
        ends = [socket_at(seat) for seat in namespaces.seats().values()]
        for sender in ends:
            for receiver in ends:
                text = f"to {receiver.getsockname()}".encode()
                sender.sendto(text, receiver.getsockname())
                assert receiver.recvfrom(100) == (text, sender.getsockname())
    finally:
        namespaces.close()


async def test_a_kernel_without_it_is_told_what_to_take(host: None, monkeypatch: pytest.MonkeyPatch) -> None:
    run = netem.run

    def without(command: list[str], text: str = "") -> str:
        if "netem" in command:
            raise UsageError("Specified qdisc kind is unknown")
        return run(command, text)

    monkeypatch.setattr(netem, "run", without)
    with pytest.raises(UsageError, match=r"no netem \(module sch_netem\).*unknown.*'tun'"):
        async with backend("netem").open(topology.from_names(["a", "b"]), Path()):
            pass


async def test_each_link_is_the_queue_of_one_device(host: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands, without carrying them out."""
    run, asked = netem.run, []

    def noted(command: list[str], text: str = "") -> str:
        if "qdisc" not in command:
            return run(command, text)
        asked.append(" ".join(command[3:]))
        return ""

    monkeypatch.setattr(netem, "run", noted)
    text = "{nodes: {a: {}, b: {}, c: {}}, links: [{from: a, to: c, latency: 20ms}]}"
    async with backend("netem").open(topology.parse(text), Path()) as network:
        tried, asked[:] = asked[:2], asked[2:]
        assert [line.split()[1:4] for line in tried] == [["replace", "dev", "lo"], ["delete", "dev", "lo"]]
        network.attach(cluster=None)
        await network.set_link("a", "b", Shape())
        await network.set_link("c", "a", Shape(loss=0.01))
        await network.set_link("a", "c", Shape())
        with pytest.raises(UsageError, match="no link from 'a' to 'a'"):
            await network.set_link("a", "a", Shape())
        assert not network.shaped
        assert [seat.host for seat in network.seats.values()] == ["10.77.0.1", "10.77.0.2", "10.77.0.3"]
    assert asked == [
        "qdisc replace dev to2 root netem limit 44740 delay 20000us",
        "qdisc replace dev to0 root netem limit 44740 delay 20000us",
        "qdisc replace dev to0 root netem limit 44740 delay 0us loss 1.000000%",
        "qdisc delete dev to2 root",
    ]


async def test_delays(host: None, socket_at: SocketAt) -> None:
    probe = Namespaces.make(["probe"])
    try:
        netem.check_kernel(probe["probe"])
    except UsageError as exc:
        pytest.skip(str(exc))
    finally:
        probe.close()
    text = "{nodes: {a: {}, b: {}}, links: [{from: a, to: b, latency: 20ms, both: false}]}"
    async with backend("netem").open(topology.parse(text), Path()) as network:
        a, b = (socket_at(network.seats[node]) for node in ("a", "b"))
        for latency in (0.02, 0.05, 0.0):
            await network.set_link("a", "b", Shape(latency=latency))
            began = time.monotonic()
            a.sendto(b"text", b.getsockname())
            b.recv(100)
            assert latency <= time.monotonic() - began < latency + 0.01
        with pytest.raises(UsageError, match="no link from 'a' to 'x'"):
            await network.set_link("a", "x", Shape())
