"""What every transport must do, as checks that any transport's own tests can run.

    import pytest
    from tests.contract.transport import CHECKS

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    async def test_contract(check):
        await check(MyTransport(), "mine://127.0.0.1:0")

Each check takes a transport and an address that picks a free place to listen at, and raises
`AssertionError` when the contract of `nomad.transport.base` isn't kept. None of them sleeps to let
something happen: they wait for what must happen, `PATIENCE` seconds at most.
"""

from __future__ import annotations

import array
import asyncio
import mmap
import random
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import pytest

from nomad.errors import ConnectionBroken, ConnectionClosed, FrameTooLarge, TransportError
from nomad.transport.base import MAX_FRAME_BYTES, MAX_PARTS, Connection, Frame, Listener, Transport

PATIENCE = 30.0
"""Seconds until a check gives up on something that must happen."""
CLOGGED_BYTES = 48 << 20
"""What a connection may take at most, at both ends and in between, while nobody reads."""

STILL = 0.03
"""Seconds without progress after which a writer is taken to wait for its reader. A slow machine may be wrong about
that, which makes a check weaker but doesn't fail it."""

T = TypeVar("T")
Check = Callable[[Transport, str], Awaitable[None]]
CHECKS: list[Check] = []


def contract(check: Check) -> Check:
    CHECKS.append(check)
    return check


# Helpers


@asynccontextmanager
async def listening(
    transport: Transport, address: str, **options: Any
) -> AsyncIterator[tuple[Listener, asyncio.Queue[Connection]]]:
    """A listener, and the connections that it accepts; their handlers end with the context."""
    accepted: asyncio.Queue[Connection] = asyncio.Queue()

    async def handle(connection: Connection) -> None:
        accepted.put_nowait(connection)
        await asyncio.Event().wait()

    listener = await transport.listen(address, handle, **options)
    try:
        yield listener, accepted
    finally:
        await listener.close()


@asynccontextmanager
async def pair(transport: Transport, address: str) -> AsyncIterator[tuple[Connection, Connection]]:
    """Both ends of a new connection: the dialer's, the acceptor's."""
    async with listening(transport, address) as (listener, accepted):
        dialer = await transport.connect(listener.reachable)
        try:
            yield dialer, await soon(accepted.get())
        finally:
            await dropped(dialer)


async def dropped(connection: Connection) -> None:
    connection.abort()
    await connection.close()


async def soon(awaitable: Awaitable[T]) -> T:
    """The result of something that must happen."""
    async with asyncio.timeout(PATIENCE):
        return await awaitable


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a state that must come about."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it didn't happen"
        await asyncio.sleep(0.001)


async def take(connection: Connection, count: int) -> list[Frame]:
    """The next `count` frames."""
    frames: list[Frame] = []
    async with asyncio.timeout(PATIENCE):
        while len(frames) < count:
            got = await connection.recv()
            assert got, "recv returned no frame"
            frames += got
    assert len(frames) == count, "there were more frames than were sent"
    return frames


async def take_all(connection: Connection) -> list[Frame]:
    """All frames until the far side is gone."""
    frames: list[Frame] = []
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                frames += await connection.recv()
            except ConnectionBroken:
                return frames


async def cancelled(task: asyncio.Task[Any]) -> bool:
    """Cancel `task` and wait for it: whether that ended it, and not a result."""
    task.cancel()
    await asyncio.wait([task])
    return task.cancelled()


def plain(frames: list[Frame]) -> list[tuple[bytes, ...]]:
    """Frames to compare; looks at the types of their buffers on the way."""
    for frame in frames:
        for buffer in frame:
            assert isinstance(buffer, bytes | memoryview), f"a frame holds a {type(buffer).__name__}"
            assert isinstance(buffer, bytes) or buffer.readonly, "a received memoryview can be written"
    return [tuple(bytes(buffer) for buffer in frame) for frame in frames]


def numbered(count: int) -> list[tuple[bytes, ...]]:
    return [(b"%d" % number,) for number in range(count)]


def some_bytes(size: int) -> bytes:
    return random.Random(size).randbytes(size)


async def clog(connection: Connection, frame: Frame) -> int:
    """Write as an obedient writer does, until it must wait for long; how many frames it wrote."""
    size = sum(map(len, frame))
    count = 0
    while True:
        connection.write([frame])
        count += 1
        assert count * size <= CLOGGED_BYTES, "nobody reads, and still more was taken"
        if not connection.writable:
            waiting = asyncio.ensure_future(connection.drain())
            done, _ = await asyncio.wait([waiting], timeout=STILL)
            if not done:
                await cancelled(waiting)
                return count
            await waiting


# Frames


@contract
async def check_frames_arrive_as_they_were_sent(transport: Transport, address: str) -> None:
    sizes = [0, 1, 7, 1024, 16_383, 16_384, 65_535, 65_536, 65_537, 262_144, 300_000]
    frames: list[tuple[bytes, ...]] = [(some_bytes(size),) for size in sizes]
    frames += [(b"head", some_bytes(size), b"", b"x") for size in sizes]
    frames += [(b"", *[b""] * 100), (some_bytes(70_000), b"", some_bytes(70_000), some_bytes(70_000))]
    async with pair(transport, address) as (dialer, acceptor):
        for one, other in [(dialer, acceptor), (acceptor, dialer)]:
            one.write(frames)
            assert plain(await take(other, len(frames))) == frames


@contract
async def check_large_frames(transport: Transport, address: str) -> None:
    frames: list[tuple[bytes, ...]] = [
        (b"one part", some_bytes(20_000_000)),
        (b"many parts", some_bytes(5_000_000), b"", some_bytes(100), some_bytes(3_000_001), b"end"),
        (b"small",),
    ]
    async with pair(transport, address) as (dialer, acceptor):
        taking = asyncio.ensure_future(take(acceptor, len(frames)))
        for frame in frames:
            dialer.write([frame])
            await soon(dialer.drain())
        assert plain(await taking) == frames


@contract
async def check_many_small_frames_stay_in_order(transport: Transport, address: str) -> None:
    frames = numbered(5_000)
    async with pair(transport, address) as (dialer, acceptor):
        taking = asyncio.ensure_future(take(acceptor, len(frames)))
        for start in range(0, len(frames), 250):
            dialer.write(frames[start : start + 250])
            await soon(dialer.drain())
        assert plain(await taking) == frames


@contract
async def check_any_buffer_can_be_sent(transport: Transport, address: str) -> None:
    numbers = array.array("d", range(20_000))
    table = memoryview(bytes(range(24))).cast("B", (2, 3, 4))
    frame: Frame = (bytearray(b"head"), memoryview(numbers), memoryview(numbers)[:3], table, memoryview(b"")[:0])
    async with pair(transport, address) as (dialer, acceptor):
        dialer.write([frame])
        expected = (b"head", numbers.tobytes(), numbers[:3].tobytes(), bytes(range(24)), b"")
        assert plain(await take(acceptor, 1)) == [expected]


@contract
async def check_both_directions_at_once(transport: Transport, address: str) -> None:
    frames: list[tuple[bytes, ...]] = [(b"%d" % number, some_bytes(100_000)) for number in range(60)]

    async def send(connection: Connection) -> None:
        for frame in frames:
            connection.write([frame])
            await connection.drain()

    async with pair(transport, address) as (dialer, acceptor):
        got, other, *_ = await soon(
            asyncio.gather(take(dialer, len(frames)), take(acceptor, len(frames)), send(dialer), send(acceptor))
        )
        assert plain(got) == plain(other) == frames


@contract
async def check_question_and_answer(transport: Transport, address: str) -> None:
    async with pair(transport, address) as (dialer, acceptor):
        for number in range(10):
            dialer.write([(b"%d" % number,)])
            acceptor.write(await take(acceptor, 1))
            assert plain(await take(dialer, 1)) == [(b"%d" % number,)]


@contract
async def check_polling_when_told(transport: Transport, address: str) -> None:
    """A reader without a task: it is told of frames and of the end, and polls."""
    frames = numbered(300)
    async with pair(transport, address) as (dialer, acceptor):
        got: list[Frame] = []
        ended: list[Exception] = []

        def arrived() -> None:
            try:
                got.extend(dialer.poll())
            except TransportError as exc:
                ended.append(exc)

        assert dialer.poll() == []
        dialer.notify(arrived)
        for start in range(0, len(frames), 30):
            acceptor.write(frames[start : start + 30])
            await until(lambda goal=start + 30: len(got) == goal)  # type: ignore[misc]
        assert plain(got) == frames
        assert ended == []
        await soon(acceptor.close())
        await until(lambda: bool(ended))
        assert all(isinstance(exc, ConnectionBroken) for exc in ended)
        with pytest.raises(ConnectionBroken):
            dialer.poll()
        await soon(dialer.close())
        with pytest.raises(ConnectionClosed):
            dialer.poll()


@contract
async def check_a_frame_that_comes_alone(transport: Transport, address: str) -> None:
    """Whoever would take it is asked where the backend can tell; no frame is told twice, none left out of turn."""
    rng = random.Random(7)
    frames = [(some_bytes(rng.choice([0, 1, 30, 3000, 5000, 100_000])),) for _ in range(200)]
    async with pair(transport, address) as (dialer, acceptor):
        got: list[Frame] = []

        def one(head: bytes) -> bool:
            assert type(head) is bytes
            if rng.random() < 0.5:
                return False
            got.append((head,))
            return True

        acceptor.notify(lambda: got.extend(acceptor.poll()), one)
        sent = 0
        while sent < len(frames):
            count = rng.choice([1, 1, 1, 2, 7])
            dialer.write(frames[sent : sent + count])
            sent = min(len(frames), sent + count)
            if rng.random() < 0.8:
                await until(lambda goal=sent: len(got) == goal)  # type: ignore[misc]
        await until(lambda: len(got) == len(frames))
        assert plain(got) == frames


@contract
async def check_writing_from_another_thread(transport: Transport, address: str) -> None:
    """Where a backend has a way for that, what goes by it and what goes the usual way stay in order, also when the
    socket takes no more; after the end it does nothing."""
    frames = [(b"%d %s" % (number, bytes(3000)),) for number in range(1500)]
    async with pair(transport, address) as (dialer, acceptor):
        writer = dialer.direct()
        if writer is None:
            return
        lock, rng = threading.Lock(), random.Random(11)
        sent = 0

        def some(write: Callable[[list[Frame]], None]) -> bool:
            nonlocal sent
            with lock:
                count = rng.choice([1, 1, 2, 40])
                write(frames[sent : sent + count])
                sent = min(len(frames), sent + count)
                return sent < len(frames)

        def thread() -> None:
            while some(writer.write):
                pass

        working = asyncio.create_task(asyncio.to_thread(thread))
        while not working.done() and some(dialer.write):
            await asyncio.sleep(0)
        await soon(working)
        assert plain(await take(acceptor, len(frames))) == frames
        await dropped(dialer)
        writer.write([(b"too late",)])


@contract
async def check_an_end_right_behind_frames_is_told(transport: Transport, address: str) -> None:
    """Whoever polls once when told gets the frames, and hears of the end, whenever it began to be told."""
    for early in (True, False):
        async with pair(transport, address) as (dialer, acceptor):
            got: list[Frame] = []
            ended: list[TransportError] = []

            def arrived(
                connection: Connection = dialer,
                got: list[Frame] = got,
                ended: list[TransportError] = ended,
            ) -> None:
                try:
                    got += connection.poll()
                except TransportError as exc:
                    ended.append(exc)

            if early:
                dialer.notify(arrived)
            acceptor.write([(b"last",)])
            await soon(acceptor.close())
            if not early:
                await until(lambda connection=dialer: connection.closed)  # type: ignore[misc]
                dialer.notify(arrived)
                arrived()
            await until(lambda ended=ended: bool(ended))  # type: ignore[misc]
            assert plain(got) == [(b"last",)]


@contract
async def check_closing_when_told(transport: Transport, address: str) -> None:
    """Whoever is told of frames may close the connection there and then."""
    for end in ("abort", "close"):
        async with pair(transport, address) as (dialer, acceptor):
            closing: list[asyncio.Future[None]] = []

            def arrived(connection: Connection = acceptor, closing: list[asyncio.Future[None]] = closing) -> None:
                if not closing:
                    connection.abort()
                    closing.append(asyncio.ensure_future(connection.close()))

            acceptor.notify(arrived)
            dialer.write([(b"go",), (b"large", some_bytes(300_000))])
            if end == "close":
                await soon(dialer.close())
            assert await take_all(dialer) == [] if end == "abort" else True
            await until(lambda closing=closing: bool(closing))  # type: ignore[misc]
            await soon(closing[0])
            await assert_closed(acceptor)


@contract
async def check_writing_nothing(transport: Transport, address: str) -> None:
    async with pair(transport, address) as (dialer, acceptor):
        dialer.write([])
        dialer.write([(b"after",)])
        assert plain(await take(acceptor, 1)) == [(b"after",)]


@contract
async def check_a_frame_too_large_is_refused_whole(transport: Transport, address: str) -> None:
    with mmap.mmap(-1, MAX_FRAME_BYTES) as space, memoryview(space) as huge:  # no memory until it is touched
        async with pair(transport, address) as (dialer, acceptor):
            for frame in [(b"x", huge), (b"", *[b""] * (MAX_PARTS + 1))]:
                with pytest.raises(FrameTooLarge):
                    dialer.write([(b"before",), frame, (b"after",)])
            with pytest.raises(ValueError, match="head"):
                dialer.write([(b"before",), ()])
            dialer.write([(b"fine",)])
            assert plain(await take(acceptor, 1)) == [(b"fine",)], "part of a refused write was sent"


LIMIT = 5_000
WITHIN = (b"head", bytes(LIMIT - 4))
OVER = (b"head", bytes(LIMIT - 4), b"x")


@contract
async def check_a_frame_over_the_receivers_limit_breaks_the_connection(transport: Transport, address: str) -> None:
    for side in (0, 1):
        for before in ([], [WITHIN, WITHIN]):
            async with pair(transport, address) as ends:
                near, far = ends[side], ends[1 - side]
                near.limit(LIMIT)
                far.write([*before, OVER, (b"after",)])
                assert plain(await take_all(near)) == before
                await assert_broken(near)
                with pytest.raises(ConnectionBroken):
                    await soon(far.recv())


@contract
async def check_a_limit_counts_when_a_frame_is_next(transport: Transport, address: str) -> None:
    """Whoever takes what tells that more may come raises the limit before what is behind it is judged."""
    large = [OVER, (b"in place", some_bytes(300_000)), (b"many", *[b"part"] * 20_000), (b"last",)]
    async with pair(transport, address) as (dialer, acceptor):
        for near, far in [(acceptor, dialer), (dialer, acceptor)]:
            near.limit(LIMIT)
            far.write([(b"more comes",), *large])
            assert plain(await soon(near.recv())) == [(b"more comes",)]
            near.limit(MAX_FRAME_BYTES)
            assert plain(await take(near, len(large))) == large


@contract
async def check_a_reader_that_polls_is_told_of_a_frame_over_its_limit(transport: Transport, address: str) -> None:
    async with pair(transport, address) as (dialer, acceptor):
        got: list[Frame] = []
        ended: list[TransportError] = []

        def arrived() -> None:
            try:
                got.extend(acceptor.poll())
            except TransportError as exc:
                ended.append(exc)

        acceptor.notify(arrived)
        acceptor.limit(LIMIT)
        dialer.write([WITHIN, OVER])
        await until(lambda: bool(ended))
        assert plain(got) == [WITHIN]


# Ends


@contract
async def check_far_side_closes(transport: Transport, address: str) -> None:
    frames: list[tuple[bytes, ...]] = [*numbered(100), (b"large", some_bytes(2_000_000)), (b"last",)]
    for side in (0, 1):
        async with pair(transport, address) as ends:
            near, far = ends[side], ends[1 - side]
            far.write(frames)
            await soon(far.close())
            assert plain(await take_all(near)) == frames
            await assert_broken(near)


@contract
async def check_close_loses_nothing_to_unread_frames(transport: Transport, address: str) -> None:
    """A socket that is closed while it holds unread bytes resets the connection, unless care is taken."""
    frames: list[tuple[bytes, ...]] = [(b"%d" % number, some_bytes(10_000)) for number in range(150)]
    for side in (0, 1):
        async with pair(transport, address) as ends:
            near, far = ends[side], ends[1 - side]
            near.write([(b"never read", some_bytes(500_000))])
            far.write(frames)
            closing = asyncio.ensure_future(far.close())
            assert plain(await take_all(near)) == frames
            await soon(closing)


@contract
async def check_far_side_aborts(transport: Transport, address: str) -> None:
    for side in (0, 1):
        async with pair(transport, address) as ends:
            near, far = ends[side], ends[1 - side]
            receiving = asyncio.ensure_future(near.recv())
            await asyncio.sleep(0)
            far.abort()
            with pytest.raises(ConnectionBroken):
                await soon(receiving)
            await assert_broken(near)


async def assert_broken(connection: Connection) -> None:
    """`connection` knows that its far side is gone, and says so until it is closed."""
    assert connection.closed
    with pytest.raises(ConnectionBroken):
        await soon(connection.recv())
    with pytest.raises(ConnectionBroken):
        connection.write([(b"x",)])
    with pytest.raises(ConnectionBroken):
        await soon(connection.drain())
    await soon(connection.close())
    await assert_closed(connection)


async def assert_closed(connection: Connection) -> None:
    assert connection.closed
    with pytest.raises(ConnectionClosed):
        await soon(connection.recv())
    with pytest.raises(ConnectionClosed):
        connection.write([(b"x",)])
    with pytest.raises(ConnectionClosed):
        connection.write([])
    with pytest.raises(ConnectionClosed):
        await soon(connection.drain())


@contract
async def check_closed_by_us(transport: Transport, address: str) -> None:
    for side in (0, 1):
        async with pair(transport, address) as ends:
            near, far = ends[side], ends[1 - side]
            far.write([(b"thrown away",)])
            receiving = asyncio.ensure_future(near.recv()) if side else None
            await asyncio.sleep(0)
            await soon(asyncio.gather(near.close(), near.close()))
            await assert_closed(near)
            if receiving is not None:
                try:
                    assert plain(await soon(receiving)) == [(b"thrown away",)]
                except ConnectionClosed:
                    pass
            near.abort()
            await soon(near.close())


@contract
async def check_aborted_by_us(transport: Transport, address: str) -> None:
    for side in (0, 1):
        async with pair(transport, address) as ends:
            near = ends[side]
            receiving = asyncio.ensure_future(near.recv())
            await asyncio.sleep(0)
            near.write([(b"perhaps", some_bytes(3_000_000))])
            near.abort()
            near.abort()
            with pytest.raises(ConnectionClosed):
                await soon(receiving)
            await assert_closed(near)
            await soon(near.close())
            await take_all(ends[1 - side])


@contract
async def check_both_sides_close(transport: Transport, address: str) -> None:
    async with pair(transport, address) as (dialer, acceptor):
        await soon(asyncio.gather(dialer.close(), acceptor.close()))
        await assert_closed(dialer)
        await assert_closed(acceptor)


# Cancelling


@contract
async def check_cancelled_recv_loses_nothing(transport: Transport, address: str) -> None:
    rng = random.Random(7)
    frames = numbered(60)
    async with pair(transport, address) as (dialer, acceptor):
        got: list[Frame] = []
        for frame in frames:
            receiving = asyncio.ensure_future(acceptor.recv())
            await asyncio.sleep(0)
            dialer.write([frame])
            for _ in range(rng.randrange(8)):
                await asyncio.sleep(0)
            if not await cancelled(receiving):
                got += receiving.result()
        async with asyncio.timeout(PATIENCE):
            while len(got) < len(frames):
                got += await acceptor.recv()
        assert plain(got) == frames


@contract
async def check_cancelled_drain_leaves_the_connection_usable(transport: Transport, address: str) -> None:
    async with pair(transport, address) as (dialer, acceptor):
        frame = (b"frame", some_bytes(300_000))
        count = await clog(dialer, frame)
        for _ in range(3):
            draining = asyncio.ensure_future(dialer.drain())
            await asyncio.sleep(0)
            await cancelled(draining)
        draining = asyncio.ensure_future(dialer.drain())
        assert plain(await take(acceptor, count)) == [frame] * count
        await soon(draining)
        assert dialer.writable


# Back-pressure


@contract
async def check_a_clogged_peer(transport: Transport, address: str) -> None:
    """While nobody reads, a bounded amount is taken, `drain` waits, and nothing is lost of it."""
    for side in (0, 1):
        async with pair(transport, address) as ends:
            near, far = ends[side], ends[1 - side]
            frame = (b"frame", some_bytes(200_000))
            count = await clog(near, frame)
            draining = asyncio.ensure_future(near.drain())
            assert plain(await take(far, count)) == [frame] * count
            await soon(draining)
            near.write([(b"goes on",)])
            assert plain(await take(far, 1)) == [(b"goes on",)]


@contract
async def check_closing_towards_a_clogged_peer_is_bounded(transport: Transport, address: str) -> None:
    for side in (0, 1):
        async with pair(transport, address) as ends:
            near = ends[side]
            await clog(near, (some_bytes(1_000_000),))
            await soon(near.close())
            await assert_closed(near)


@contract
async def check_a_clogged_connection_wakes_up_when_it_breaks(transport: Transport, address: str) -> None:
    for side in (0, 1):
        async with pair(transport, address) as ends:
            near, far = ends[side], ends[1 - side]
            await clog(near, (some_bytes(1_000_000),))
            draining = asyncio.ensure_future(near.drain())
            await asyncio.sleep(0)
            far.abort()
            with pytest.raises(ConnectionBroken):
                await soon(write_on(near, draining))


async def write_on(connection: Connection, draining: asyncio.Future[None]) -> None:
    """Write whenever `drain` lets us, for ever."""
    await draining
    while True:
        connection.write([(b"x",)])
        await connection.drain()
        await asyncio.sleep(0)


@contract
async def check_a_clogged_connection_leaves_others_alone(transport: Transport, address: str) -> None:
    async with listening(transport, address) as (listener, accepted):
        clogged = await transport.connect(listener.reachable)
        clogged_far = await soon(accepted.get())
        other = await transport.connect(listener.reachable)
        other_far = await soon(accepted.get())
        for one in (clogged, clogged_far):
            await clog(one, (some_bytes(500_000),))
        for one, far in [(other, other_far), (other_far, other)]:
            one.write([(b"through",)])
            assert plain(await take(far, 1)) == [(b"through",)]
        await dropped(clogged)
        await dropped(other)


# Listeners


@contract
async def check_many_connections(transport: Transport, address: str) -> None:
    async def echo(connection: Connection) -> None:
        while True:
            connection.write(await connection.recv())

    listener = await transport.listen(address, echo)

    async def talk(number: int) -> None:
        connection = await transport.connect(listener.reachable)
        for word in (b"first %d" % number, b"second %d" % number):
            connection.write([(word,)])
            assert plain(await take(connection, 1)) == [(word,)]
        await connection.close()

    await soon(asyncio.gather(*[talk(number) for number in range(15)]))
    await soon(listener.close())


@contract
async def check_a_handler_that_returns_or_fails(transport: Transport, address: str) -> None:
    async def handle(connection: Connection) -> None:
        await connection.recv()
        raise ConnectionBroken("as handlers do")

    listener = await transport.listen(address, handle)
    for _ in range(2):  # the listener goes on
        connection = await transport.connect(listener.reachable)
        connection.write([(b"go",)])
        assert await take_all(connection) == []
        await connection.close()
    await soon(listener.close())


@contract
async def check_closing_a_listener(transport: Transport, address: str) -> None:
    tidied: list[bool] = []
    handled: list[Connection] = []

    async def handle(connection: Connection) -> None:
        handled.append(connection)
        try:
            await connection.recv()
        finally:
            await asyncio.sleep(0.01)
            tidied.append(True)

    listener = await transport.listen(address, handle)
    dialers = [await transport.connect(listener.reachable) for _ in range(3)]
    await until(lambda: len(handled) == 3)
    await soon(asyncio.gather(listener.close(), listener.close()))
    assert tidied == [True] * 3, "close didn't wait for the handlers"
    assert all(connection.closed for connection in handled)
    for dialer in dialers:
        assert await take_all(dialer) == []
        await dialer.close()
    await soon(listener.close())
    with pytest.raises(ConnectionBroken):
        await soon(transport.connect(listener.reachable))
    again = await transport.listen(listener.bound, handle)  # the place is free again
    assert again.bound == listener.bound
    await soon(again.close())


@contract
async def check_a_place_that_is_taken(transport: Transport, address: str) -> None:
    async with listening(transport, address) as (listener, accepted):
        with pytest.raises(TransportError, match="taken"):
            async with listening(transport, listener.bound):
                pass
        connection = await transport.connect(listener.reachable)  # the first one isn't disturbed
        await soon(accepted.get())
        await connection.close()


@contract
async def check_a_refused_connection(transport: Transport, address: str) -> None:
    async with listening(transport, address) as (listener, _):
        pass
    with pytest.raises(ConnectionBroken, match=r".*" + listener.reachable.partition(":")[0].replace("+", r"\+")):
        await soon(transport.connect(listener.reachable, timeout=10 * PATIENCE))  # it is noticed, not waited for


@contract
async def check_a_connect_that_is_cancelled(transport: Transport, address: str) -> None:
    """Cancelled anywhere, it leaves nothing behind, and the listener goes on."""
    async with listening(transport, address) as (listener, accepted):
        for steps in range(6):
            dialing = asyncio.ensure_future(transport.connect(listener.reachable))
            for _ in range(steps):
                await asyncio.sleep(0)
            if not await cancelled(dialing):
                await dropped(dialing.result())
        while not accepted.empty():
            assert await take_all(accepted.get_nowait()) == []
        connection = await transport.connect(listener.reachable)
        connection.write([(b"fine",)])
        while True:
            far = await soon(accepted.get())
            if (frames := await take_all_or_first(far)) is not None:
                assert plain(frames) == [(b"fine",)]
                break
        await dropped(connection)


async def take_all_or_first(connection: Connection) -> list[Frame] | None:
    """The frames that arrive first; None if the far side is gone instead."""
    try:
        return await soon(connection.recv())
    except ConnectionBroken:
        return None


@contract
async def check_names(transport: Transport, address: str) -> None:
    async with listening(transport, address) as (listener, accepted):
        for name in (listener.bound, listener.reachable):
            assert name.startswith(f"{transport.scheme}:")
        connection = await transport.connect(listener.reachable)
        far = await soon(accepted.get())
        assert connection.peer == listener.reachable
        assert all(isinstance(name, str) for name in (connection.local, far.local, far.peer))
        assert not connection.closed
        assert connection.writable
        await dropped(connection)
