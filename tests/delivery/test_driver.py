from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from nomad.clock import Clock, SystemClock
from nomad.control import Shape
from nomad.delivery import driver, outlink
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

    def sender(self, epoch: int = 1, clock: Clock | None = None, key: bytes = KEY) -> OutLink:
        link = OutLink(Sender(LINK, epoch), key, clock or SystemClock())
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
            assert time.monotonic() - started < driver.HANDSHAKE_TIMEOUT / 2
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
        await until(lambda: out.connected)
        out.set_peer(None, 1, PLAIN)
        await until(lambda: not out.connected)
        out.set_peer(address, 1, PLAIN)
        await until(lambda: out.connected)
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
