"""Links whose receivers can't be dialled: they dial their senders, or both a relay; and what a relay lets pass."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import pytest

from nomad.clock import SystemClock
from nomad.control import Shape
from nomad.delivery import driver, meeting, outlink
from nomad.delivery.inlink import InLink, InPort
from nomad.delivery.meeting import Arriving, Call, Place, Relayed
from nomad.delivery.outlink import OutLink
from nomad.delivery.receiver import Receiver
from nomad.delivery.relay import KEY_VARIABLE, LISTEN_VARIABLE, MOST_WAITING, Relay, key_of
from nomad.delivery.sender import GIVE_UP, Sender
from nomad.errors import ConnectionBroken, HandshakeError, TransportError
from nomad.transport import registry, tls
from nomad.transport.base import Connection
from tests.certificates import authority, put
from tests.clock import VirtualClock, settle
from tests.contract.transport import clog, plain, some_bytes, soon, take, take_all, until
from tests.delivery.wire import LINK, submit, work

KEY, RELAY_KEY = bytes(range(32)), b"r" * 32
PLAIN = Shape()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (outlink, meeting):
        monkeypatch.setattr(module, "BACKOFF_FIRST", 0.001)


class World:
    """Senders and receivers of one link, and what is between them."""

    def __init__(self, way: str, relay: Relay, address: str) -> None:
        self.way = way
        self.relay = relay
        self.address = address
        self.tasks: list[asyncio.Task[None]] = []
        self.ports: list[InPort] = []
        self.senders: dict[int, tuple[InPort, str]] = {}

    async def sender(self, epoch: int = 1, *, quiet: bool = False) -> OutLink:
        port = InPort({})
        port.sends(LINK, KEY)
        self.ports.append(port)
        self.senders[epoch] = port, await port.listen("tcp://127.0.0.1:0")
        link = OutLink(Sender(LINK, epoch, quiet=quiet), KEY, SystemClock())
        self.tasks.append(asyncio.create_task(link.run()))
        return link

    def receiver(self, epoch: int = 1) -> tuple[InLink, InPort]:
        link = InLink(Receiver(LINK, epoch, window_messages=64, window_bytes=1 << 20), KEY, SystemClock())
        port = InPort({LINK: link})
        self.ports.append(port)
        return link, port

    def place(self, sender: int, receiver: int) -> Place:
        """Where the sender finds the receiver."""
        if self.way == "arriving":
            return Arriving(self.senders[sender][0].arrivals, LINK, receiver)
        return self.relayed(sender, receiver)

    def call(self, sender: int, receiver: int) -> Call | Relayed:
        """Where the receiver finds the sender."""
        if self.way == "arriving":
            return Call(self.senders[sender][1], KEY, LINK, receiver)
        return self.relayed(sender, receiver)

    async def waits(self, end: str, epoch: int) -> None:
        """Until this end of the link, and no other one, is where they meet."""
        if self.way != "arriving":
            await until(lambda: (LINK, epoch, epoch) in self.relay._ends)
        elif end == "receiver":
            await until(lambda: (LINK, epoch) in self.senders[epoch][0].arrivals._waiting)
        else:
            await settle()  # it asks nobody else

    def relayed(self, sender: int = 1, receiver: int = 1, link: str = LINK) -> Relayed:
        return Relayed(self.address, key_of(RELAY_KEY, LINK), link, sender, receiver)


@asynccontextmanager
async def made(way: str, folder: Path) -> AsyncIterator[World]:
    relay = Relay(RELAY_KEY)
    address = await relay.listen(f"unix:{folder}/relay" if way == "relay-unix" else "tcp://127.0.0.1:0")
    if way == "relay-tls":
        tls.use(put(folder / "tls", authority()))
        address = address.replace("tcp:", "tls:")
    world = World(way, relay, address)
    try:
        yield world
    finally:
        for task in world.tasks:
            task.cancel()
        await asyncio.gather(*world.tasks, return_exceptions=True)
        for port in world.ports:
            await port.close()
        await relay.close()
        tls.use(None)


@pytest.fixture(params=["arriving", "relay", "relay-unix", "relay-tls"])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    async with made(request.param, tmp_path) as world:
        yield world
    left = {task for task in asyncio.all_tasks() if "link" in task.get_name()}
    assert not left


@pytest.fixture
async def relayed(tmp_path: Path) -> AsyncIterator[World]:
    async with made("relay", tmp_path) as world:
        yield world


async def test_messages_flow_however_often_it_is_cut(world: World) -> None:
    out = await world.sender()
    inbound, port = world.receiver()
    out.set_peer(world.place(1, 1), 1, PLAIN)
    await asyncio.sleep(0)
    port.call(LINK, [world.call(1, 1)])
    for number in range(20):
        await until(lambda: out.connected)
        submit(out.sender, [number, some_bytes(40_000)])
        out.flush()
        if number % 2:
            await until(lambda count=number: inbound.receiver.accepted > 2 * count)  # type: ignore[misc]
            inbound.cut()
        else:
            out.cut()
        await until(lambda count=number: out.reconnects == count + 1)  # type: ignore[misc]
    await until(lambda: out.connected)
    await until(lambda: inbound.receiver.accepted == 40)
    assert [value for value in work(inbound.receiver) if isinstance(value, int)] == list(range(20))


async def test_either_end_may_come_first(world: World) -> None:
    for first in ("sender", "receiver"):
        epoch = 1 if first == "sender" else 2
        out = await world.sender(epoch)
        inbound, port = world.receiver(epoch)
        if first == "sender":
            out.set_peer(world.place(epoch, epoch), epoch, PLAIN)
            await world.waits(first, epoch)
            port.call(LINK, [world.call(epoch, epoch)])
        else:
            port.call(LINK, [world.call(epoch, epoch)])
            await world.waits(first, epoch)
            out.set_peer(world.place(epoch, epoch), epoch, PLAIN)
        submit(out.sender, ["there"])
        out.flush()
        await until(lambda link=inbound: link.receiver.accepted == 1)  # type: ignore[misc]


async def test_a_receiver_that_moves(world: World) -> None:
    """The next instance is greeted beforehand, and gets all that the one before hasn't settled."""
    out = await world.sender()
    (before, here), (after, there) = world.receiver(1), world.receiver(2)
    here.call(LINK, [world.call(1, 1)])
    there.call(LINK, [world.call(1, 2)])
    out.set_peer(world.place(1, 1), 1, PLAIN)
    out.set_standby(world.place(1, 2), 2, PLAIN)
    submit(out.sender, [1])
    out.flush()
    await until(lambda: out.peers == (1, 2) and bool(before.receiver.accepted))
    out.set_peer(world.place(1, 2), 2, PLAIN)
    assert out.peers == (2, 0), "the connection that stood by wasn't used"
    submit(out.sender, [2])
    out.flush()
    await until(lambda: after.receiver.accepted == 2)
    assert work(after.receiver) == [1, 2]


async def test_a_sender_that_moves(world: World) -> None:
    """The receiver has a connection with either instance, and hears the next one from its first word on."""
    old, new = await world.sender(1), await world.sender(2, quiet=True)
    inbound, port = world.receiver()
    port.call(LINK, [world.call(1, 1), world.call(2, 1)])
    for epoch, out in ((1, old), (2, new)):
        out.set_peer(world.place(epoch, 1), 1, PLAIN)
    inbound.set_standby(2, PLAIN)
    submit(old.sender, ["old"])
    old.flush()
    await until(lambda: inbound.peers == (1, 2))
    inbound.set_peer(2, PLAIN)
    port.call(LINK, [world.call(2, 1)])
    await until(lambda: not old.connected)
    assert old.peers[0] == 0


async def test_a_newer_connection_takes_the_place_of_one_that_died_without_a_sign(world: World) -> None:
    """As when a NAT has forgotten a connection: the one end doesn't know of it, the other dials again."""
    out = await world.sender()
    out.set_peer(world.place(1, 1), 1, PLAIN)
    _, port = world.receiver()

    async def once() -> None:
        await port._serve(LINK, await world.call(1, 1).wait())

    world.tasks.append(asyncio.create_task(once()))
    await until(lambda: out.connected)
    second, other = world.receiver()
    other.call(LINK, [world.call(1, 1)])
    await until(lambda: second.waiting or second.connected)
    await until(lambda: out.connected and out.reconnects == 1)
    submit(out.sender, ["there"])
    out.flush()
    await until(lambda: second.receiver.accepted == 1)


async def test_a_sender_that_fell_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the receiver that has to make the next connection."""
    clock = VirtualClock()
    greeted = asyncio.Event()
    listening = InPort({})
    listening.sends(LINK, KEY)
    link = InLink(Receiver(LINK, 1, window_messages=4, window_bytes=100), KEY, clock)
    port = InPort({LINK: link}, None, clock)
    try:
        address = await listening.listen("tcp://127.0.0.1:0")
        port.call(LINK, [Call(address, KEY, LINK, 1)])
        raw = await soon(listening.arrivals.take(LINK, 1))
        await driver.shake_dialer(raw, KEY, LINK, Sender(LINK, 1).hello())
        await until(lambda: link.waiting)
        await clock.advance(GIVE_UP - 1)
        assert link.waiting
        assert not greeted.is_set()
        await clock.advance(1.1)
        await until(lambda: not link.waiting)
        await clock.advance(1)
        raw = await soon(listening.arrivals.take(LINK, 1))
        raw.abort()
    finally:
        await port.close()
        await listening.close()


# Who gets in


async def test_only_who_holds_the_links_key_calls(tmp_path: Path) -> None:
    port = InPort({})
    port.sends(LINK, KEY)
    try:
        address = await port.listen("tcp://127.0.0.1:0")
        for key, link in [(bytes(32), LINK), (KEY, "p:a>other")]:
            with pytest.raises(HandshakeError):
                await Call(address, key, link, 1).wait()
        raw = await registry.connect(address)
        with pytest.raises(HandshakeError, match="doesn't say which one"):
            await driver.shake_dialer(raw, KEY, meeting.CALL + LINK, {"receiver": "1"})
        raw.abort()
    finally:
        await port.close()


async def test_no_link_reaches_another_through_a_relay(relayed: World) -> None:
    with pytest.raises(HandshakeError):
        await relayed.relayed(link="p:x>y").wait()  # with the key of this one
    with pytest.raises(HandshakeError):
        await Relayed(relayed.address, KEY, LINK, 1, 1).connect()
    for hello in ({}, {"side": "both", "sender": 1, "receiver": 1}, {"side": "in", "sender": "1", "receiver": 1}):
        raw = await registry.connect(relayed.address)
        with pytest.raises(HandshakeError, match="doesn't say which one it is"):
            await driver.shake_dialer(raw, key_of(RELAY_KEY, LINK), meeting.MEET + LINK, hello)
        raw.abort()
    waiting = await relayed.relayed(1, 1).wait()
    others = [asyncio.ensure_future(relayed.relayed(*epochs).connect()) for epochs in [(1, 2), (2, 1)]]
    done, _ = await asyncio.wait(others, timeout=0.05)
    assert not done, "instances that don't mean each other were joined"
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    waiting.abort()


async def test_who_talks_too_early_is_hung_up_on(relayed: World) -> None:
    receiver = await relayed.relayed().wait()
    receiver.write([(b"early",)])
    with pytest.raises(ConnectionBroken):
        await soon(receiver.recv())
    receiver.abort()


async def test_ends_that_wait_for_nobody_are_bounded(relayed: World) -> None:
    waiting = [await relayed.relayed(1, number).wait() for number in range(MOST_WAITING + 3)]
    await until(lambda: sum(conn.closed for conn in waiting) == 3)
    assert [conn.closed for conn in waiting[:3]] == [True] * 3
    for conn in waiting:
        conn.abort()


# What it passes on


@asynccontextmanager
async def pair(world: World) -> AsyncIterator[tuple[Connection, Connection]]:
    """Both ends of a link that met at the relay: sender's, receiver's."""
    receiving = asyncio.ensure_future(world.relayed().wait())
    sender = await soon(world.relayed().connect())
    receiver = await soon(receiving)
    try:
        yield sender, receiver
    finally:
        for conn in (sender, receiver):
            conn.abort()
            await conn.close()


@pytest.fixture(params=["relay", "relay-tls"])
async def either(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    async with made(request.param, tmp_path) as world:
        yield world


async def test_frames_of_any_size_pass_both_ways(either: World) -> None:
    rng = Random(3)
    frames = [(b"%d" % number, rng.randbytes(rng.choice([0, 10, 1000, 100_000, 900_000]))) for number in range(60)]
    async with pair(either) as ends:
        assert either.relay.meetings == 1

        async def send(conn: Connection) -> None:
            for frame in frames:
                conn.write([frame])
                await conn.drain()

        takes = asyncio.gather(*(take(conn, len(frames)) for conn in ends))
        await soon(asyncio.gather(*(send(conn) for conn in ends)))
        one, other = await soon(takes)
        assert plain(one) == plain(other) == frames
    await until(lambda: either.relay.meetings == 0)


async def test_closing_loses_nothing(either: World) -> None:
    frames = [(b"%d" % number, some_bytes(10_000)) for number in range(150)]
    for side in (0, 1):
        async with pair(either) as ends:
            near, far = ends[side], ends[1 - side]
            near.write([(b"never read", some_bytes(300_000))])
            far.write(frames)
            closing = asyncio.ensure_future(far.close())
            assert plain(await take_all(near)) == frames
            await soon(closing)


async def test_a_slow_end_holds_the_other_up(either: World) -> None:
    """A relay holds a bounded amount for an end that doesn't read."""
    for side in (0, 1):
        async with pair(either) as ends:
            near, far = ends[side], ends[1 - side]
            frame = (b"frame", some_bytes(200_000))
            count = await clog(near, frame)
            draining = asyncio.ensure_future(near.drain())
            assert plain(await take(far, count)) == [frame] * count
            await soon(draining)


async def test_an_end_that_is_gone_ends_the_other(either: World) -> None:
    for side in (0, 1):
        async with pair(either) as ends:
            ends[side].abort()
            with pytest.raises(TransportError):
                await soon(ends[1 - side].recv())
        await until(lambda: either.relay.meetings == 0)


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """All that goes through relays."""
    from nomad.delivery.relay import _Stream

    seen: list[bytes] = []
    real = _Stream.data_received

    def spy(self: _Stream, data: bytes) -> None:
        seen.append(bytes(data))
        real(self, data)

    monkeypatch.setattr(_Stream, "data_received", spy)
    return seen


async def test_a_relay_reads_nothing_of_what_is_encrypted(either: World, spied: list[bytes]) -> None:
    async with pair(either) as (sender, receiver):
        sender.write([(b"confidential",)])
        assert plain(await take(receiver, 1)) == [(b"confidential",)]
    assert (b"confidential" in b"".join(spied)) is (either.way == "relay")


async def test_another_pipelines_pod_is_no_peer_without_the_ca(tmp_path: Path) -> None:
    async with made("relay-tls", tmp_path) as world:
        receiving = asyncio.ensure_future(world.relayed().wait())
        await until(lambda: bool(world.relay._ends))
        tls.use(put(tmp_path / "stranger", authority()))
        with pytest.raises(ConnectionBroken, match="certificate is refused"):
            await soon(world.relayed().connect())
        with pytest.raises(TransportError):
            await soon(receiving)


async def test_the_program(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(RELAY_KEY.hex() + "\n")
    address = f"unix:{tmp_path}/relay"
    environment = {**os.environ, KEY_VARIABLE: str(tmp_path / "key"), LISTEN_VARIABLE: address}
    program = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "nomad.delivery.relay", env=environment, stderr=asyncio.subprocess.PIPE
    )
    try:
        assert program.stderr is not None
        said = await soon(program.stderr.readline())  # a socket that is there may not listen yet
        assert f"listening at {address}".encode() in said
        place = Relayed(address, key_of(RELAY_KEY, LINK), LINK, 1, 1)
        receiver = await soon(place.wait())
        sender = await soon(place.connect())
        sender.write([(b"through",)])
        assert plain(await take(receiver, 1)) == [(b"through",)]
        program.terminate()
        assert await soon(program.wait()) == 0
        for conn in (sender, receiver):
            conn.abort()
            await conn.close()
    finally:
        if program.returncode is None:
            program.kill()
            await program.wait()
    environment[KEY_VARIABLE] = str(tmp_path / "none")
    refused = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "nomad.delivery.relay", env=environment, stderr=asyncio.subprocess.PIPE
    )
    _, said = await soon(refused.communicate())
    assert refused.returncode == 1
    assert b"nomad relay: NOMAD_RELAY_KEY=" in said
