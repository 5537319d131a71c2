"""The switch between ports, without devices and in time that the test passes in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nomad.bench.netns.switch import Switch
from nomad.control import Shape

NODES = ("a", "b", "c")
ADDRESSES = {node: bytes((10, 77, 0, number)) for number, node in enumerate(NODES)}


def packet(target: str, text: bytes = b"", version: int = 4) -> bytes:
    """As much of an IP packet as the switch looks at."""
    return bytes([version << 4]) + bytes(15) + ADDRESSES.get(target, b"\x08\x08\x08\x08") + text


@pytest.fixture
def switch() -> Switch:
    switch = Switch(1)
    switch.add_ports(list(ADDRESSES.items()))
    return switch


def test_packets_go_to_the_node_of_their_address(switch: Switch) -> None:
    switch.packet(0, packet("b"), 1.0)
    switch.packet(0, packet("c"), 1.0)
    assert sorted(switch.arrived(1.0)) == [(1, packet("b")), (2, packet("c"))]


@pytest.mark.parametrize("stray", [packet("nowhere"), packet("b", version=6), packet("a"), b"\x45", b""])
def test_what_leads_nowhere_is_dropped(switch: Switch, stray: bytes) -> None:
    switch.packet(0, stray, 1.0)
    assert switch.arrived(float("inf")) == []


def test_each_direction_has_a_shape_of_its_own(switch: Switch) -> None:
    switch.set_shape("a", "b", Shape(latency=0.1), 1.0)
    switch.set_shape("b", "a", Shape(latency=0.03), 1.0)
    switch.packet(0, packet("b"), 1.0)
    assert switch.next == pytest.approx(1.1)
    switch.packet(1, packet("a"), 1.0)
    assert switch.next == pytest.approx(1.03)
    assert switch.arrived(1.05) == [(0, packet("a"))]
    assert switch.arrived(1.11) == [(1, packet("b"))]
    assert switch.next == float("inf")


def test_a_shorter_link_brings_forward_what_waited(switch: Switch) -> None:
    switch.set_shape("a", "b", Shape(bandwidth=10.0), 1.0)
    switch.packet(0, packet("b"), 1.0)
    assert switch.next == pytest.approx(3.0)
    switch.set_shape("a", "b", Shape(), 2.0)
    assert switch.next == pytest.approx(2.0)
    assert switch.arrived(2.0) == [(1, packet("b"))]


def test_an_unknown_pair_has_no_link(switch: Switch) -> None:
    with pytest.raises(KeyError):
        switch.set_shape("a", "a", Shape(), 1.0)


def test_counters(switch: Switch) -> None:
    switch.packet(0, packet("b", b"text"), 1.0)
    switch.arrived(1.5)
    stats = switch.stats()
    line = next(line for line in stats["lines"] if (line["source"], line["target"]) == ("a", "b"))
    assert line == {"source": "a", "target": "b", "packets": 1, "bytes": 24, "lost": 0, "dropped": 0}
    assert stats["late_most"] == stats["late_mean"] == 0.5


@given(
    st.lists(
        st.tuples(
            st.sampled_from(NODES), st.sampled_from(NODES), st.none() | st.sampled_from([0.0, 0.01, 0.1]), st.booleans()
        ),
        max_size=80,
    )
)
def test_everything_arrives_once_in_the_order_of_its_link(steps) -> None:
    switch = Switch(1)
    switch.add_ports(list(ADDRESSES.items()))
    now, sent, arrived = 1.0, [], []
    for number, (source, target, latency, give) in enumerate(steps):
        now += 0.005
        if source == target:
            continue
        if latency is not None:
            switch.set_shape(source, target, Shape(latency=latency), now)
        text = f"{source}{target}{number:04}".encode()
        switch.packet(NODES.index(source), packet(target, text), now)
        sent.append((NODES.index(target), text))
        if give:
            arrived += switch.arrived(now)
    while switch.next != float("inf"):
        arrived += switch.arrived(switch.next)
    found = [(port, data[20:]) for port, data in arrived]
    assert sorted(found) == sorted(sent)
    for pair in {text[:2] for _, text in sent}:
        assert [text for _, text in found if text[:2] == pair] == [text for _, text in sent if text[:2] == pair]
