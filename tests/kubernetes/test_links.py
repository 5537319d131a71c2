"""The lines between the nodes of the real cluster: by the subnets that a packet comes from and goes to."""

from __future__ import annotations

import time
from ipaddress import IPv4Address

import pytest

from tests.kubernetes.cluster.links import Lines

SUBNETS = {"edge": "10.244.1.0/24", "fog": "10.244.2.0/24"}


def packet(source: str, target: str) -> bytes:
    return bytes([0x45]) + bytes(11) + IPv4Address(source).packed + IPv4Address(target).packed


@pytest.fixture
def lines() -> Lines:
    lines = Lines()
    lines.configure({"subnets": SUBNETS, "shapes": [["edge", "fog", {"latency": 5.0}]]})
    return lines


def test_a_packet_is_held_as_long_as_the_line_of_its_nodes_says(lines: Lines) -> None:
    sent, now = packet("10.244.1.7", "10.244.2.9"), time.monotonic() + 1
    assert lines.packet(sent, now)
    assert lines.wait(now) == pytest.approx(5.0)
    assert lines.arrived(now + 4.9) == []
    assert lines.arrived(now + 5.1) == [sent]
    assert lines.wait(now + 5.1) is None


def test_what_has_no_line_is_given_back(lines: Lines) -> None:
    assert not lines.packet(packet("10.244.2.9", "10.244.1.7"), 0.0)
    assert not lines.packet(bytes([0x60]) + bytes(39), 0.0)


def test_a_change_holds_for_the_next_packet_and_loses_none(lines: Lines) -> None:
    first, now = packet("10.244.1.7", "10.244.2.9"), time.monotonic()
    assert lines.packet(first, now)
    lines.configure({"subnets": SUBNETS, "shapes": []})
    later = now + 10
    assert lines.arrived(later) == [first]
    second = packet("10.244.1.8", "10.244.2.9")
    assert lines.packet(second, later)
    assert lines.wait(later) == 0.0
    assert lines.arrived(later) == [second]
