"""Emulated links, on a clock that the test moves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nomad.control import Shape
from nomad.errors import ConnectionBroken, ConnectionClosed, TransportError
from nomad.transport.base import HIGH_WATER, Connection
from nomad.transport.inproc import InprocTransport
from nomad.transport.shaping import FLIGHT_BYTES, LEAST_RETRANSMISSION, ShapedConnection
from tests.clock import VirtualClock, settle
from tests.contract.transport import cancelled, pair, plain, soon, take

OVERHEAD = 8


class Link:
    """A shaped connection to a far end that notes when each frame arrives."""

    def __init__(self, near: Connection, far: Connection) -> None:
        self.clock = VirtualClock()
        self.began = self.clock.now()
        self.inner = near
        self.near = ShapedConnection(near, clock=self.clock, random=Random(1))
        self.far = far
        self.arrived: list[tuple[bytes, float]] = []
        self._reading = asyncio.ensure_future(self._read())

    async def _read(self) -> None:
        try:
            while True:
                for frame in await self.far.recv():
                    self.arrived.append((bytes(frame[0]), round(self.clock.now() - self.began, 6)))
        except TransportError:
            pass

    async def end(self) -> None:
        self.near.abort()
        await self.near.close()
        await self._reading

    def times(self) -> list[float]:
        return [when for _, when in self.arrived]


@pytest.fixture
async def link() -> AsyncIterator[Link]:
    async with pair(InprocTransport(), "inproc:") as (dialer, acceptor):
        link = Link(dialer, acceptor)
        yield link
        await link.end()


async def test_the_default_shape_passes_straight_through(link: Link) -> None:
    tasks = asyncio.all_tasks()
    link.near.write([(b"a",), (b"b",)])
    assert link.near.writable
    await link.near.drain()
    assert asyncio.all_tasks() == tasks
    await settle()
    assert link.arrived == [(b"a", 0), (b"b", 0)]


async def test_latency(link: Link) -> None:
    link.near.set_shape(Shape(latency=0.1))
    link.near.write([(b"a",)])
    await link.clock.advance(0.04)
    link.near.write([(b"b",), (b"c",)])
    await link.clock.advance(0.0599)
    assert link.arrived == []
    await link.clock.advance(1)
    assert link.arrived == [(b"a", 0.1), (b"b", 0.14), (b"c", 0.14)]


async def test_no_task_lives_while_nothing_is_held(link: Link) -> None:
    tasks = asyncio.all_tasks()
    link.near.set_shape(Shape(latency=0.1))
    assert asyncio.all_tasks() == tasks
    for _ in range(3):
        link.near.write([(b"a",)] * 10)
        await settle()
        assert len(asyncio.all_tasks() - tasks) == 1
        await link.clock.advance(0.1)
        assert asyncio.all_tasks() == tasks


async def test_jitter_spreads_and_keeps_order(link: Link) -> None:
    link.near.set_shape(Shape(latency=0.1, jitter=0.02))
    for number in range(200):
        link.near.write([(b"%d" % number,)])
        await link.clock.advance(0.05)
    await link.clock.advance(1)
    assert [name for name, _ in link.arrived] == [b"%d" % number for number in range(200)]
    delays = [when - 0.05 * number for number, when in enumerate(link.times())]
    assert min(delays) >= 0.08 - 1e-6
    assert max(delays) <= 0.12 + 1e-6
    assert min(delays) < 0.083
    assert max(delays) > 0.117


async def test_jitter_over_the_latency_never_goes_back_in_time(link: Link) -> None:
    link.near.set_shape(Shape(latency=0.001, jitter=0.1))
    for _ in range(50):
        link.near.write([(b"x",)])
        await link.clock.advance(1)
    assert len(link.arrived) == 50


async def test_bandwidth_is_shared_in_order(link: Link) -> None:
    link.near.set_shape(Shape(bandwidth=1000, latency=0.5))
    link.near.write([(bytes(1000 - OVERHEAD),), (bytes(2000 - OVERHEAD),)])
    await link.clock.advance(2)
    link.near.write([(bytes(500 - OVERHEAD),)])
    await link.clock.advance(10)
    assert link.times() == [1.5, 3.5, 4.0]


async def test_throughput_of_a_long_link_is_its_bandwidth(link: Link) -> None:
    """What is under way on a long link doesn't count as the writer's backlog."""
    link.near.set_shape(Shape(bandwidth=10e6, latency=0.4))

    async def write() -> None:
        while True:
            link.near.write([(bytes(100_000),)])
            await link.near.drain()

    writing = asyncio.ensure_future(write())
    await link.clock.advance(2.4)
    assert await cancelled(writing)
    received = sum(100_000 for when in link.times() if when <= 2.4)
    assert received == pytest.approx(2.0 * 10e6, rel=0.02)


async def test_a_lost_frame_comes_one_time_out_later_and_holds_up_what_follows(link: Link) -> None:
    link.near.set_shape(Shape(latency=0.01, loss=0.25))
    for number in range(400):
        link.near.write([(b"%d" % number,)])
        await link.clock.advance(1)
    late = [when - number for number, when in enumerate(link.times()) if when - number > 0.1]
    assert 70 < len(late) < 130
    assert all(delay == pytest.approx(0.01 + LEAST_RETRANSMISSION) for delay in late)
    link.arrived.clear()
    link.near.write([(b"%d" % number,) for number in range(100)])
    await link.clock.advance(1)
    assert [name for name, _ in link.arrived] == [b"%d" % number for number in range(100)]


async def test_the_retransmission_time_out_grows_with_the_latency(link: Link) -> None:
    link.near.set_shape(Shape(latency=0.3, loss=0.999999))
    link.near.write([(b"x",)])
    await link.clock.advance(5)
    assert link.times() == [0.9]


async def test_a_faster_shape_helps_what_still_waits(link: Link) -> None:
    link.near.set_shape(Shape(bandwidth=1000))
    link.near.write([(bytes(1000 - OVERHEAD),)] * 500)
    await link.clock.advance(10.5)
    assert len(link.arrived) == 10
    link.near.set_shape(Shape(bandwidth=100_000))
    await link.clock.advance(0.1)
    assert link.times()[10] == pytest.approx(10.5 + 0.005)
    await link.clock.advance(10)
    assert len(link.arrived) == 500
    assert link.times()[-1] == pytest.approx(10.5 + 0.005 + 489 * 0.01)


async def test_what_is_under_way_arrives_as_it_would_have(link: Link) -> None:
    link.near.set_shape(Shape(latency=1))
    link.near.write([(b"a",)])
    await link.clock.advance(0.5)
    link.near.set_shape(Shape(latency=3))
    link.near.write([(b"b",)])
    link.near.set_shape(Shape())
    link.near.write([(b"c",)])
    await link.clock.advance(5)
    assert link.arrived == [(b"a", 1.0), (b"b", 3.5), (b"c", 3.5)]
    link.near.write([(b"d",)])
    await settle()
    assert link.arrived[-1] == (b"d", 5.5)


async def test_held_bytes_count_as_backlog(link: Link) -> None:
    link.near.set_shape(Shape(bandwidth=100_000))
    link.near.write([(bytes(HIGH_WATER + 50_000),)])
    assert not link.near.writable
    draining = asyncio.ensure_future(link.near.drain())
    await link.clock.advance(5)
    assert not draining.done()
    await link.clock.advance(20)
    await soon(draining)
    assert link.near.writable


async def test_what_a_link_without_a_bandwidth_holds_is_bounded(link: Link) -> None:
    link.near.set_shape(Shape(latency=1))
    written = 0
    while link.near.writable:
        link.near.write([(bytes(1_000_000),)])
        written += 1_000_000
    assert written <= FLIGHT_BYTES + HIGH_WATER + 1_000_000


async def test_close_flushes(link: Link) -> None:
    link.near.set_shape(Shape(latency=1))
    link.near.write([(b"a",), (b"b",)])
    closing = asyncio.ensure_future(link.near.close())
    await settle()
    with pytest.raises(ConnectionClosed):
        link.near.write([(b"c",)])
    assert link.near.closed
    await link.clock.advance(1)
    await soon(closing)
    assert link.arrived == [(b"a", 1), (b"b", 1)]
    assert link.inner.closed


async def test_abort_drops(link: Link) -> None:
    link.near.set_shape(Shape(latency=1))
    link.near.write([(b"a",)])
    link.near.abort()
    await link.clock.advance(2)
    assert link.arrived == []
    await soon(link.near.close())


async def test_a_cancelled_close_aborts(link: Link) -> None:
    link.near.set_shape(Shape(latency=1))
    link.near.write([(b"a",)])
    closing = asyncio.ensure_future(link.near.close())
    await settle()
    assert await cancelled(closing)
    assert link.inner.closed
    assert link.clock.sleeping == 0


async def test_the_far_side_closes_while_frames_are_held(link: Link) -> None:
    link.near.set_shape(Shape(latency=1))
    link.near.write([(bytes(20 << 20),)])
    draining = asyncio.ensure_future(link.near.drain())
    await settle()
    link.far.abort()
    await link.clock.advance(2)
    with pytest.raises(ConnectionBroken):
        await soon(draining)
    with pytest.raises(ConnectionBroken):
        link.near.write([(b"b",)])


async def test_reading_is_not_delayed(link: Link) -> None:
    link.near.set_shape(Shape(latency=1))
    link.far.write([(b"now",)])
    assert plain(await take(link.near, 1)) == [(b"now",)]


@pytest.mark.parametrize(
    "shape",
    [Shape(latency=-1), Shape(jitter=-1), Shape(bandwidth=0), Shape(bandwidth=-5), Shape(loss=1), Shape(loss=-0.1)],
)
async def test_a_shape_no_link_can_have(link: Link, shape: Shape) -> None:
    with pytest.raises(ValueError, match="a link can't have"):
        link.near.set_shape(shape)


shapes = st.builds(
    Shape,
    latency=st.floats(0, 2),
    jitter=st.floats(0, 1),
    bandwidth=st.none() | st.floats(10, 1e6),
    loss=st.floats(0, 0.9),
)
steps = st.one_of(shapes, st.lists(st.integers(0, 2000), max_size=5), st.floats(0, 3))


@given(st.lists(steps, max_size=12))
def test_whatever_happens_to_the_link_frames_arrive_once_and_in_order(script: list[object]) -> None:
    async def run() -> None:
        async with pair(InprocTransport(), "inproc:") as (dialer, acceptor):
            link = Link(dialer, acceptor)
            written = []
            for step in script:
                if isinstance(step, Shape):
                    link.near.set_shape(step)
                elif isinstance(step, list):
                    frames = [(b"%d:" % (len(written) + at) + bytes(size),) for at, size in enumerate(step)]
                    written += [frame[0] for frame in frames]
                    link.near.write(frames)
                else:
                    await link.clock.advance(float(step))
            await link.clock.advance(20_000)
            assert [name for name, _ in link.arrived] == written
            assert link.times() == sorted(link.times())
            await link.end()

    asyncio.run(run())
