"""One direction of a link, in time that the test passes in."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nomad.bench.netns.line import HELD_BYTES, QUEUE_BYTES, QUEUE_SECONDS, Line
from nomad.control import Shape

shapes = st.builds(
    Shape,
    latency=st.floats(0.01, 0.2),
    jitter=st.floats(0.0, 0.01),
    bandwidth=st.none() | st.floats(1e4, 1e8),
    loss=st.sampled_from([0.0, 0.3]),
)


def line(**shape: float) -> Line:
    return Line(Shape(**shape), Random(1))


def test_a_packet_arrives_after_the_latency_and_the_time_it_is_on_the_link() -> None:
    link = line(latency=0.02, bandwidth=1e6)
    link.send(bytes(1000), 5.0)
    link.send(bytes(1000), 5.0)
    assert link.due == pytest.approx(5.021)
    assert link.take(5.0209) == []
    assert link.take(5.0211) == [bytes(1000)]
    assert link.due == pytest.approx(5.022)


def test_a_line_without_a_shape_holds_nothing_up() -> None:
    link = line()
    link.send(b"packet", 5.0)
    assert link.due == 5.0
    assert link.take(5.0) == [b"packet"]
    assert link.due == float("inf")


def test_what_finds_the_queue_full_is_dropped() -> None:
    link = line(bandwidth=1e6)
    packets = 1000
    for _ in range(packets):
        link.send(bytes(1000), 5.0)
    kept = len(link.take(float("inf")))
    assert link.dropped == packets - kept
    assert kept * 1000 == pytest.approx(max(QUEUE_BYTES, QUEUE_SECONDS * 1e6), abs=2000)


def test_what_a_link_without_a_bandwidth_holds_has_an_end() -> None:
    link = line(latency=60.0)
    for _ in range(2 * HELD_BYTES // 65_000):
        link.send(bytes(65_000), 5.0)
    assert sum(map(len, link.take(float("inf")))) <= HELD_BYTES + 65_000


def test_as_many_packets_are_lost_as_the_shape_says() -> None:
    link = line(loss=0.1)
    for _ in range(10_000):
        link.send(b"packet", 5.0)
    assert link.lost == pytest.approx(1000, abs=150)
    assert len(link.take(5.0)) == 10_000 - link.lost


def test_a_change_counts_for_what_is_not_on_its_way_yet() -> None:
    link = line(latency=0.1, bandwidth=1e4)  # 0.1 s on the link for each
    for text in (b"on its way", b"half sent.", b"waiting..."):
        link.send(text * 100, 5.0)
    link.set_shape(Shape(latency=0.01, bandwidth=1e5), 5.15)
    assert link.due == pytest.approx(5.2)
    assert len(link.take(5.2000001)) == 3  # order is kept: none overtakes what was on its way

    link.send(b"later", 6.0)
    assert link.due == pytest.approx(6.01, abs=0.001)


@given(st.lists(st.tuples(st.floats(0, 0.01), st.integers(20, 9000), st.none() | shapes), max_size=60), shapes)
def test_order_is_kept_and_nothing_is_early_or_vanishes(steps, first: Shape) -> None:
    link, now, sent, arrived = Line(first, Random(1)), 100.0, 0, []
    least = first.latency - first.jitter
    for pause, size, change in steps:
        now += pause
        if change is not None:
            link.set_shape(change, now)
            least = min(least, change.latency - change.jitter)
        link.send(sent.to_bytes(4, "big") + now.hex().encode().ljust(max(0, size - 4)), now)
        sent += 1
    assert link.take(now + least - 0.02 - 0.6) == []
    while (due := link.due) != float("inf"):
        for packet in link.take(due):
            arrived.append(int.from_bytes(packet[:4], "big"))
            assert due - float.fromhex(packet[4:].decode().strip()) >= least - 1e-9
    assert arrived == sorted(arrived)
    assert len(arrived) + link.lost + link.dropped == sent == link.packets
