from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from nomad.clock import Clock, SystemClock
from nomad.control import Shape
from nomad.delivery import driver, frames, inlink, outlink
from nomad.delivery.inlink import InLink, InPort
from nomad.delivery.outlink import OutLink
from nomad.delivery.receiver import Receiver
from nomad.delivery.sender import GIVE_UP, SILENCE, Sender
from nomad.delivery.states import State
from nomad.errors import HandshakeError, TransportError
from nomad.transport import registry
from nomad.transport.base import Connection
from tests.clock import VirtualClock
from tests.delivery.wire import LINK, submit, work

KEY = bytes(range(32))
PLAIN = Shape()


async def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "it doesn't happen"
        await asyncio.sleep(0.001)


class Ends:
    """Both ends of a link, each with its driver, and more of either when asked for."""

    def __init__(self) -> None:
        self.ports: list[InPort] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def receiver(self, epoch: int = 1, key: bytes = KEY) -> tuple[InLink, str]:
        link = InLink(Receiver(LINK, epoch, window_messages=64, window_bytes=1 << 20), key, SystemClock())
        port = InPort({LINK: link})
        self.ports.append(port)
        return link, await port.listen("inproc:")

    def sender(self, epoch: int = 1, clock: Clock | None = None, key: bytes = KEY, *, quiet: bool = False) -> OutLink:
        link = OutLink(Sender(LINK, epoch, quiet=quiet), key, clock or SystemClock())
        self.tasks.append(asyncio.create_task(link.run()))
        return link

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        ended = await asyncio.gather(*self.tasks, return_exceptions=True)
        assert all(isinstance(error, asyncio.CancelledError) for error in ended), ended
        for port in self.ports:
            await port.close()


@asynccontextmanager
async def ends() -> AsyncIterator[Ends]:
    made = Ends()
    try:
        yield made
    finally:
        await made.close()


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outlink, "BACKOFF_FIRST", 0.001)


async def test_it_dials_and_comes_back_after_every_cut() -> None:
    async with ends() as made:
        inbound, address = await made.receiver()
        out = made.sender()
        out.set_peer(address, 1, PLAIN)
        for number in range(20):
            await until(lambda: out.sender.machine.state is State.OPEN)
            submit(out.sender, [number])
            out.flush()
            if number % 2:
                await until(lambda count=number: inbound.receiver.accepted > count)  # it is the present connection's
                inbound.cut()
            else:
                out.cut()
            await until(lambda count=number: out.reconnects == count + 1)
        await until(lambda: out.sender.machine.state is State.OPEN)
        submit(out.sender, [20])
        out.flush()
        await until(lambda: inbound.receiver.accepted == 21)
        assert work(inbound.receiver) == list(range(21))
        assert inbound.connected


async def test_a_peer_that_was_not_there_yet_is_found() -> None:
    async with ends() as made:
        out = made.sender()
        out.set_peer("inproc:later", 0, PLAIN)
        await until(lambda: out.last_error)
        assert "later" in str(out.last_error)
        link = InLink(Receiver(LINK, 1, window_messages=4, window_bytes=100), KEY, SystemClock())
        port = InPort({LINK: link})
        made.ports.append(port)
        await port.listen("inproc:later")
        await until(lambda: out.connected)
        assert out.last_error is None


async def test_a_peer_that_moves_is_dialed_at_once_whatever_is_under_way() -> None:
    """Even while a handshake with the old one hangs, and would for seconds."""
    silent: list[Connection] = []
    gone = asyncio.Event()

    async def say_nothing(conn: Connection) -> None:
        silent.append(conn)
        await gone.wait()

    listener = await registry.listen("inproc:", say_nothing)
    try:
        async with ends() as made:
            inbound, address = await made.receiver(epoch=2)
            out = made.sender()
            out.set_peer(listener.reachable, 1, PLAIN)
            await until(lambda: silent)
            started = time.monotonic()
            out.set_peer(None, 1, PLAIN)
            out.set_peer(address, 2, PLAIN)
            await until(lambda: out.connected)
            assert time.monotonic() - started < driver.HANDSHAKE_TIMEOUT
            assert silent[0].closed
            assert inbound.reconnects == 0
    finally:
        gone.set()
        await listener.close()


async def test_an_address_may_be_taken_away() -> None:
    async with ends() as made:
        inbound, address = await made.receiver()
        out = made.sender()
        out.set_peer(address, 1, PLAIN)
        await until(lambda: out.connected and inbound.connected)
        out.set_peer(None, 1, PLAIN)
        await until(lambda: not out.connected and not inbound.connected)
        out.set_peer(address, 1, PLAIN)
        await until(lambda: out.connected and inbound.connected)
        assert inbound.reconnects == 1


async def test_the_same_peer_told_again_changes_nothing() -> None:
    async with ends() as made:
        inbound, address = await made.receiver()
        out = made.sender()
        for _ in range(3):
            out.set_peer(address, 1, PLAIN)
            inbound.set_peer(1, PLAIN)
            await until(lambda: out.connected and inbound.connected)
        assert out.reconnects == inbound.reconnects == 0


async def test_a_newer_sender_takes_over_and_the_old_one_is_not_heard_again() -> None:
    async with ends() as made:
        inbound, address = await made.receiver()
        old, new = made.sender(epoch=1), made.sender(epoch=2)
        old.set_peer(address, 1, PLAIN)
        await until(lambda: inbound.connected)
        new.set_peer(address, 1, PLAIN)
        await until(lambda: inbound.receiver.peer_epoch == 2)
        await until(lambda: old.fenced > 1 and inbound.fenced > 1)
        submit(old.sender, ["old"], first=1)
        submit(new.sender, ["new"], first=1)
        old.flush()
        new.flush()
        await until(lambda: inbound.receiver.accepted)
        assert work(inbound.receiver) == ["new"]
        assert "Fenced" in str(old.last_error)


async def test_a_sender_is_cut_off_when_a_newer_one_is_announced() -> None:
    async with ends() as made:
        inbound, address = await made.receiver()
        out = made.sender(epoch=1)
        out.set_peer(address, 1, PLAIN)
        await until(lambda: inbound.connected)
        inbound.set_peer(2, PLAIN)
        await until(lambda: out.fenced > 0)
        assert not inbound.connected


async def test_a_receiver_that_was_replaced_is_not_heard() -> None:
    async with ends() as made:
        _, address = await made.receiver(epoch=1)
        out = made.sender()
        out.set_peer(address, 2, PLAIN)
        await until(lambda: out.fenced > 1)
        assert "the receiver is of epoch 1, 2 has been heard" in str(out.last_error)


async def test_only_who_holds_the_key_gets_in() -> None:
    async with ends() as made:
        inbound, address = await made.receiver()
        stranger = made.sender(key=bytes(32))
        stranger.set_peer(address, 1, PLAIN)
        await until(lambda: stranger.last_error)
        assert "HandshakeError" in str(stranger.last_error)
        assert not inbound.connected
        raw = await registry.connect(address)
        with pytest.raises(HandshakeError, match="doesn't know this identity"):
            await driver.shake_dialer(raw, KEY, "p:a>other", {"epoch": 1})
        raw.abort()


@pytest.mark.parametrize("epoch", [None, float("inf"), "1", [1]])
async def test_a_hello_without_an_epoch_is_refused_before_any_proof(epoch: object) -> None:
    async with ends() as made:
        _, address = await made.receiver()
        raw = await registry.connect(address)
        with pytest.raises(HandshakeError, match="a hello with epoch"):
            await driver.shake_dialer(raw, KEY, LINK, {"epoch": epoch})
        raw.abort()


async def test_garbage_ends_its_connection_and_nothing_else() -> None:
    async with ends() as made:
        inbound, address = await made.receiver()
        out = made.sender()
        out.set_peer(address, 1, PLAIN)
        await until(lambda: inbound.connected)
        for frames in ([(b"garbage",)], [(b"",)], [(b"a", b"b")], [(b"a",)] * 3):
            raw = await registry.connect(address)
            raw.write(frames)
            await raw_ended(raw)
            raw.abort()
        assert inbound.connected
        assert inbound.reconnects == 0


async def raw_ended(raw: Connection) -> None:
    """Read a connection to its end."""
    try:
        while True:
            await raw.recv()
    except TransportError:
        pass


async def test_a_protocol_error_ends_the_connection_and_a_new_one_goes_on() -> None:
    async with ends() as made:
        inbound, address = await made.receiver()
        out = made.sender()
        out.set_peer(address, 1, PLAIN)
        await until(lambda: inbound.connected and out.sender.machine.state is State.OPEN)
        assert out._conn is not None
        out._conn.write([(b"\x09nonsense",)])
        await until(lambda: out.reconnects == 1 and inbound.connected)
        submit(out.sender, ["after"])
        out.flush()
        await until(lambda: inbound.receiver.accepted)


async def test_a_silent_peer_is_asked_and_then_dialed_anew() -> None:
    """Its acknowledgements are held for ever by an emulated link; the time is virtual."""
    clock = VirtualClock()
    async with ends() as made:
        link = InLink(Receiver(LINK, 1, window_messages=4, window_bytes=100), KEY, clock)
        port = InPort({LINK: link})
        made.ports.append(port)
        address = await port.listen("inproc:")
        link.set_peer(0, Shape(latency=1e6))
        out = made.sender(clock=clock)
        out.set_peer(address, 1, PLAIN)
        await until(lambda: out.connected)
        await clock.advance(SILENCE + 0.1)
        assert out.connected
        await clock.advance(GIVE_UP - SILENCE)
        await until(lambda: out.reconnects == 1)


async def test_an_emulated_link_is_set_and_changed_while_messages_flow() -> None:
    async with ends() as made:
        inbound, address = await made.receiver()
        out = made.sender()
        out.set_peer(address, 1, Shape(latency=0.005))
        await until(lambda: out.connected)
        for number, latency in enumerate((0.005, 0.0, 0.002)):
            out.set_peer(address, 1, Shape(latency=latency))
            inbound.set_peer(1, Shape(latency=latency))
            submit(out.sender, [number])
            out.flush()
            await until(lambda count=number: inbound.receiver.accepted == count + 1)
        assert work(inbound.receiver) == [0, 1, 2]
        assert out.reconnects == 0


async def test_a_replaced_connection_leaves_nothing_behind() -> None:
    """An emulated link holds what was written to it in a task of its own."""
    async with ends() as made:
        inbound, address = await made.receiver()
        first, second = made.sender(), made.sender(epoch=2)
        first.set_peer(address, 1, PLAIN)
        submit(first.sender, [1])
        await until(lambda: inbound.receiver.accepted)
        inbound.set_peer(0, Shape(latency=30.0))
        work(inbound.receiver)
        inbound.receiver.settle(0, now=0.0)
        inbound.flush()
        second.set_peer(address, 1, PLAIN)
        await until(lambda: inbound.receiver.peer_epoch == 2)


# A receiver that moves


async def test_a_receiver_that_was_greeted_beforehand_is_sent_to_at_once() -> None:
    async with ends() as made:
        (before, here), (after, there) = await made.receiver(1), await made.receiver(2)
        out = made.sender()
        met: list[tuple[int, int]] = []
        out.met = lambda: met.append(out.peers)
        out.set_peer(here, 1, PLAIN)
        out.set_standby(there, 2, PLAIN)
        submit(out.sender, [1])
        out.flush()
        await until(lambda: out.peers == (1, 2) and before.receiver.accepted)
        assert after.peers == (0, 1)
        out.set_peer(there, 2, PLAIN)
        assert out.peers == (2, 0)
        assert out.connected
        out.set_standby(None, 0, PLAIN)
        submit(out.sender, [2])
        out.flush()
        await until(lambda: after.receiver.accepted == 2)
        await until(lambda: before.receiver.accepted == 2)  # the one before goes on getting what is new
        assert work(after.receiver) == work(before.receiver) == [1, 2]
        assert after.peers == (1, 0)
        assert out.reconnects == 1
        assert met[-1] == (2, 0)
        before.cut()
        submit(out.sender, [3])
        out.flush()
        await until(lambda: after.receiver.accepted == 3)


async def test_the_one_before_is_left_when_its_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outlink, "TAIL_SECONDS", 0.02)
    async with ends() as made:
        (before, here), (after, there) = await made.receiver(1), await made.receiver(2)
        out = made.sender()
        out.set_peer(here, 1, PLAIN)
        out.set_standby(there, 2, PLAIN)
        await until(lambda: out.peers == (1, 2) and before.connected)
        out.set_peer(there, 2, PLAIN)
        await until(lambda: not before.connected)
        submit(out.sender, [1])
        out.flush()
        await until(lambda: after.receiver.accepted)
        assert before.receiver.accepted == 0


async def test_what_was_on_the_way_to_the_one_before_arrives() -> None:
    async with ends() as made:
        (before, here), (_, there) = await made.receiver(1), await made.receiver(2)
        out = made.sender()
        out.set_peer(here, 1, Shape(latency=0.05))
        out.set_standby(there, 2, PLAIN)
        await until(lambda: out.peers == (1, 2))
        submit(out.sender, [1])
        out.flush()
        out.set_peer(there, 2, PLAIN)
        await until(lambda: before.receiver.accepted)


async def test_a_connection_that_stands_by_comes_back_after_every_cut() -> None:
    async with ends() as made:
        after, there = await made.receiver(2)
        out = made.sender()
        out.set_standby(there, 2, PLAIN)
        for _ in range(5):
            await until(lambda: out.peers == (0, 2) and after.peers == (0, 1))
            after.cut()
            await until(lambda: out.peers == (0, 0))
        await until(lambda: out.peers == (0, 2))
        out.set_standby(there, 2, Shape(latency=0.001))
        assert out.peers == (0, 2), "another shape alone changes nothing"
        out.set_standby(None, 0, PLAIN)
        assert out.peers == (0, 0)
        await until(lambda: after.peers == (0, 0))


async def test_a_dial_that_comes_too_late_leaves_the_next_instance_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer moves just when its old address answers again."""
    dial = registry.connect
    async with ends() as made:
        inbound, address = await made.receiver()
        after, there = await made.receiver(2)
        out = made.sender()
        out.set_peer(address, 1, PLAIN)
        out.set_standby(there, 2, PLAIN)
        await until(lambda: out.peers == (1, 2))

        async def connect(to: str) -> Connection:
            conn = await dial(to)
            if to == address:
                out.set_peer(there, 2, PLAIN)
            return conn

        monkeypatch.setattr(registry, "connect", connect)
        out.cut()
        await until(lambda: out.peers == (2, 0))
        for number in range(20):
            submit(out.sender, [number])
            out.flush()
            await until(lambda count=number: after.receiver.accepted > count)
        assert (out.reconnects, out.sender.machine.state) == (1, State.OPEN)
        await until(lambda: not inbound.connected)


async def test_a_next_instance_that_is_too_old_is_refused() -> None:
    async with ends() as made:
        _, there = await made.receiver(2)
        out = made.sender()
        out.set_standby(there, 3, PLAIN)
        await until(lambda: out.fenced)
        assert "the next receiver is of epoch 2, not 3" in str(out.last_error)
        assert out.peers == (0, 0)


async def test_an_instance_that_is_the_peer_already_needs_no_standby() -> None:
    async with ends() as made:
        inbound, address = await made.receiver()
        out = made.sender()
        out.set_peer(address, 1, PLAIN)
        out.set_standby(address, 1, PLAIN)
        await until(lambda: inbound.connected)
        assert out.peers == (1, 0)


async def test_a_next_instance_that_falls_silent_is_dialed_anew() -> None:
    clock = VirtualClock()
    async with ends() as made:
        link = InLink(Receiver(LINK, 2, window_messages=4, window_bytes=100), KEY, clock)
        port = InPort({LINK: link})
        made.ports.append(port)
        there = await port.listen("inproc:")
        out = made.sender(clock=clock)
        met: list[tuple[int, int]] = []
        out.met = lambda: met.append(out.peers)
        out.set_standby(there, 2, PLAIN)
        await until(lambda: out.peers == (0, 2))
        await clock.advance(GIVE_UP * 3)
        assert met[-1] == (0, 2)
        assert met.count((0, 2)) == 1, "it answers"
        link.set_peer(0, Shape(latency=1e6))
        await clock.advance(GIVE_UP + SILENCE + 0.1)
        await until(lambda: met.count((0, 2)) == 2)


# A sender that moves


async def test_the_next_sender_waits_until_it_has_something_to_send() -> None:
    async with ends() as made:
        inbound, address = await made.receiver()
        old, new = made.sender(1), made.sender(2, quiet=True)
        old.set_peer(address, 1, PLAIN)
        await until(lambda: inbound.peers == (1, 0))
        new.set_peer(address, 1, PLAIN)
        await until(lambda: inbound.peers == (1, 2) and new.peers == (1, 0))
        submit(old.sender, ["old"], first=1)
        old.flush()
        await until(lambda: inbound.receiver.accepted == 1)
        old.cut()
        await until(lambda: old.reconnects == 1 and inbound.peers == (1, 2))
        assert new.reconnects == 0
        submit(new.sender, ["old", "new"], first=1)
        new.sender.release()
        new.flush()
        await until(lambda: inbound.peers == (2, 0))
        await until(lambda: inbound.receiver.accepted == 2)
        await until(lambda: old.fenced)
        assert work(inbound.receiver) == ["old", "new"]


async def test_the_next_sender_is_asked_when_nobody_is_heard() -> None:
    async with ends() as made:
        inbound, address = await made.receiver()
        old, new = made.sender(1), made.sender(2, quiet=True)
        old.set_peer(address, 1, PLAIN)
        await until(lambda: inbound.connected)
        new.set_peer(address, 1, PLAIN)
        submit(new.sender, ["new"], first=1)
        await until(lambda: inbound.peers == (1, 2))
        old.set_peer(None, 1, PLAIN)
        await until(lambda: inbound.receiver.accepted)
        assert inbound.peers == (2, 0)


async def test_acknowledgements_to_the_next_sender_have_a_shape_of_their_own() -> None:
    async with ends() as made:
        inbound, address = await made.receiver()
        inbound.set_peer(1, Shape(latency=1e6))
        inbound.set_standby(2, PLAIN)
        new = made.sender(2)
        new.set_peer(address, 1, PLAIN)
        submit(new.sender, [1])
        await until(lambda: inbound.receiver.accepted)
        work(inbound.receiver)
        inbound.receiver.settle(0, 0.0)
        inbound.flush()
        await until(lambda: new.sender.settled == 1)


async def test_only_so_many_connections_wait() -> None:
    async with ends() as made:
        inbound, address = await made.receiver()
        for epoch in (2, 3, 4, 5, 1, 1):
            made.sender(epoch, quiet=True).set_peer(address, 1, PLAIN)
            await until(lambda: inbound.peers[1])
        await until(lambda: inbound.peers == (0, 5))
        assert len(inbound._waiting) <= inlink.MOST_WAITING
        inbound.set_peer(6, PLAIN)
        await until(lambda: inbound.peers == (0, 0))


async def test_a_sender_that_waits_is_answered_and_may_send_nothing_else() -> None:
    async with ends() as made:
        inbound, address = await made.receiver()
        raw = await registry.connect(address)
        await driver.shake_dialer(raw, KEY, LINK, {"epoch": 1})
        raw.write([frames.Ping().pack(), frames.Pong().pack()])
        heard: list[frames.AnyFrame] = []
        while frames.Pong() not in heard:
            heard += map(frames.unpack, await raw.recv())
        assert inbound.peers == (0, 1)
        raw.write([frames.Ack(0, 0, 0, 0, 0.0).pack()])
        await raw_ended(raw)
        await until(lambda: inbound.peers == (0, 0))
        raw.abort()
