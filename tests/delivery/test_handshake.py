from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nomad import control
from nomad.actor.instance import PART
from nomad.actor.reports import TAP_BYTES
from nomad.bundle.read import MAX_BUNDLE, MAX_MANIFEST
from nomad.delivery import driver, handshake
from nomad.delivery.handshake import MAX_BYTES, VERSION, Dialer, Listener, refusal
from nomad.errors import ConnectionBroken, Fenced, HandshakeError, TransportError
from nomad.transport import registry
from nomad.transport.base import Connection, Frame

KEY, OTHER = bytes(range(32)), bytes(32)
HELLO, WELCOME = {"epoch": 3}, {"room": 5, "received": [[0, 1, b""]]}


def run(dialer_key: bytes = KEY, listener_key: bytes = KEY, spoil: Callable[[int, Frame], Frame] | None = None) -> Any:
    """All three messages, each of which `spoil` may change on its way; what each side learned."""
    on_the_way = spoil or (lambda number, frame: frame)
    dialer, listener = Dialer(dialer_key, "p:a>b", HELLO), Listener()
    identity, hello = listener.identify(on_the_way(0, dialer.start()))
    confirm, welcome = dialer.receive(on_the_way(1, listener.welcome(listener_key, WELCOME)))
    listener.confirm(on_the_way(2, confirm))
    return identity, hello, welcome


def test_both_learn_what_the_other_says() -> None:
    assert run() == ("p:a>b", HELLO, WELCOME)


@pytest.mark.parametrize("keys", [(OTHER, KEY), (KEY, OTHER)], ids=["dialer", "listener"])
def test_a_wrong_key_is_refused(keys: tuple[bytes, bytes]) -> None:
    with pytest.raises(HandshakeError, match="doesn't hold this pipeline's key"):
        run(*keys)


def test_a_dialer_without_the_key_does_not_get_in() -> None:
    """It may ignore the listener's proof, but can't make one."""
    listener = Listener()
    listener.identify(Dialer(OTHER, "p:a>b", HELLO).start())
    listener.welcome(KEY, WELCOME)
    forged = Dialer(OTHER, "p:a>b", HELLO)
    forger = Listener()
    forger.identify(forged.start())
    confirm, _ = forged.receive(forger.welcome(OTHER, WELCOME))
    with pytest.raises(HandshakeError, match="the dialer doesn't hold the key"):
        listener.confirm(confirm)


def test_a_reflected_proof_is_refused() -> None:
    """The listener's own MAC, sent back, isn't the dialer's."""
    listener = Listener()
    listener.identify(Dialer(KEY, "p:a>b", HELLO).start())
    welcome = msgpack.unpackb(bytes(listener.welcome(KEY, WELCOME)[0]))
    with pytest.raises(HandshakeError, match="the dialer doesn't hold the key"):
        listener.confirm((msgpack.packb({"type": "confirm", "mac": welcome["mac"]}),))


def test_a_reflected_hello_is_refused() -> None:
    dialer = Dialer(KEY, "p:a>b", HELLO)
    with pytest.raises(HandshakeError, match="expected a welcome"):
        dialer.receive(dialer.start())


def test_replayed_messages_are_refused() -> None:
    recorded: list[Frame] = []

    def record(number: int, frame: Frame) -> Frame:
        recorded.append(frame)
        return frame

    run(spoil=record)
    hello, welcome, confirm = recorded
    listener = Listener()
    listener.identify(hello)
    listener.welcome(KEY, WELCOME)
    with pytest.raises(HandshakeError, match="the dialer doesn't hold the key"):
        listener.confirm(confirm)
    with pytest.raises(HandshakeError, match="doesn't hold this pipeline's key"):
        Dialer(KEY, "p:a>b", HELLO).receive(welcome)


@settings(max_examples=300)
@given(st.integers(0, 2), st.data())
def test_any_altered_byte_is_refused(number: int, choose: st.DataObject) -> None:
    def spoil(current: int, frame: Frame) -> Frame:
        if current != number:
            return frame
        raw = bytearray(frame[0])
        raw[choose.draw(st.integers(0, len(raw) - 1))] ^= choose.draw(st.integers(1, 255))
        return (bytes(raw),)

    with pytest.raises(HandshakeError):
        run(spoil=spoil)


@given(st.integers(0, 2), st.data())
def test_a_cut_message_is_refused(number: int, choose: st.DataObject) -> None:
    def spoil(current: int, frame: Frame) -> Frame:
        return (frame[0][: choose.draw(st.integers(0, len(frame[0]) - 1))],) if current == number else frame

    with pytest.raises(HandshakeError):
        run(spoil=spoil)


def test_another_version_is_named() -> None:
    hello = msgpack.unpackb(bytes(Dialer(KEY, "p:a>b", HELLO).start()[0]))
    hello["version"] = VERSION + 1
    with pytest.raises(HandshakeError, match=f"speaks protocol {VERSION + 1}, this side {VERSION}"):
        Listener().identify((msgpack.packb(hello),))


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
TYPES = st.sampled_from(["hello", "welcome", "confirm", "refused"]) | JUNK
FIELDS = ("version", "identity", "nonce", "body", "content", "mac", "reason", "fenced")


@settings(max_examples=300)
@given(
    st.binary(max_size=50)
    | st.fixed_dictionaries({"type": TYPES}, optional=dict.fromkeys(FIELDS, JUNK)).map(msgpack.packb)
)
def test_garbage_is_a_handshake_error(raw: bytes) -> None:
    waiting = Listener()
    waiting.identify(Dialer(KEY, "p:a>b", HELLO).start())
    waiting.welcome(KEY, WELCOME)
    readers: list[Callable[[Frame], Any]] = [
        Dialer(KEY, "p:a>b", HELLO).receive,
        Listener().identify,
        waiting.confirm,
    ]
    for read in readers:
        try:
            read((raw,))
        except (HandshakeError, Fenced):
            continue
        assert read == readers[1], "only a hello needs no proof"


@pytest.mark.parametrize("frame", [(b"",), (b"a", b"b"), (bytes(MAX_BYTES + 1),)], ids=["empty", "parts", "large"])
def test_what_is_not_even_looked_at(frame: Frame) -> None:
    with pytest.raises(HandshakeError, match="not a handshake message"):
        Listener().identify(frame)


def test_a_welcome_of_another_shape_from_one_who_holds_the_key() -> None:
    dialer = Dialer(KEY, "p:a>b", HELLO)
    for content in (b"", msgpack.packb([1]), msgpack.packb({"body": 1})):
        mac = handshake._mac(KEY, b"listener", bytes(dialer.start()[0]) + content)
        with pytest.raises(HandshakeError):
            dialer.receive((msgpack.packb({"type": "welcome", "content": content, "mac": mac}),))


def test_a_refusal_carries_its_reason() -> None:
    with pytest.raises(HandshakeError, match="go away"):
        Dialer(KEY, "p:a>b", HELLO).receive(refusal("go away"))
    with pytest.raises(Fenced, match="too old"):
        Dialer(KEY, "p:a>b", HELLO).receive(refusal("too old", fenced=True))


# Over a connection


@pytest.fixture(params=["inproc:", "tcp://127.0.0.1:0"])
async def connected(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Connection, Connection]]:
    """Both ends of a connection: dialer's, listener's."""
    accepted: asyncio.Queue[Connection] = asyncio.Queue()
    done = asyncio.Event()

    async def handle(conn: Connection) -> None:
        accepted.put_nowait(conn)
        await done.wait()

    listener = await registry.listen(request.param, handle)
    dialer = await registry.connect(listener.reachable)
    yield dialer, await accepted.get()
    done.set()
    dialer.abort()
    await listener.close()


async def test_the_handshake_over_a_connection(connected: tuple[Connection, Connection]) -> None:
    a, b = connected
    listening = asyncio.create_task(driver.shake_listener(b, {"p:a>b": KEY}.get, lambda identity, hello: WELCOME))
    assert await driver.shake_dialer(a, KEY, "p:a>b", HELLO) == WELCOME
    assert await listening == ("p:a>b", HELLO, [])


async def test_frames_right_behind_the_handshake_are_kept(connected: tuple[Connection, Connection]) -> None:
    a, b = connected
    dialer = Dialer(KEY, "p:a>b", HELLO)
    listening = asyncio.create_task(driver.shake_listener(b, {"p:a>b": KEY}.get, lambda identity, hello: WELCOME))
    a.write([dialer.start()])
    (welcome,) = await a.recv()
    confirm, _ = dialer.receive(welcome)
    a.write([confirm, (b"first",), (b"second", b"part")])
    _, _, rest = await listening
    assert rest == [(b"first",), (b"second", b"part")]


async def test_nothing_large_is_taken_before_the_peer_has_proved_itself(
    connected: tuple[Connection, Connection],
) -> None:
    a, b = connected
    a.write([(bytes(MAX_BYTES + 1),)])
    with pytest.raises(ConnectionBroken, match="limit"):
        await driver.shake_listener(b, {"p:a>b": KEY}.get, lambda identity, hello: WELCOME)


async def test_nothing_large_is_taken_from_a_listener_either(connected: tuple[Connection, Connection]) -> None:
    a, b = connected
    b.write([(bytes(MAX_BYTES), b"x")])
    with pytest.raises(ConnectionBroken, match="limit"):
        await driver.shake_dialer(a, KEY, "p:a>b", HELLO)


async def test_who_has_proved_itself_may_say_more_at_once_but_no_more_than_agreed(
    connected: tuple[Connection, Connection],
) -> None:
    a, b = connected
    dialer = Dialer(KEY, "p:a>b", HELLO)
    listening = asyncio.create_task(
        driver.shake_listener(b, {"p:a>b": KEY}.get, lambda identity, hello: WELCOME, most=100_000)
    )
    a.write([dialer.start()])
    (welcome,) = await a.recv()
    confirm, _ = dialer.receive(welcome)
    a.write([confirm, (b"first",), (bytes(100_000),), (bytes(100_001),)])
    _, _, rest = await listening
    while len(rest) < 2:
        rest += await b.recv()
    assert [len(frame[0]) for frame in rest] == [5, 100_000]
    with pytest.raises(ConnectionBroken, match="limit"):
        await b.recv()


async def test_a_listener_that_has_proved_itself_may_say_as_much_as_agreed(
    connected: tuple[Connection, Connection],
) -> None:
    a, b = connected
    listening = asyncio.create_task(driver.shake_listener(b, {"p:a>b": KEY}.get, lambda identity, hello: WELCOME))
    await driver.shake_dialer(a, KEY, "p:a>b", HELLO, most=100_000)
    await listening
    b.write([(bytes(100_000),)])
    assert [len(frame[0]) for frame in await a.recv()] == [100_000]
    b.write([(bytes(100_001),)])
    with pytest.raises(ConnectionBroken, match="limit"):
        await a.recv()


def test_control_messages_fit() -> None:
    assert control.MOST_TOLD >= MAX_BUNDLE + MAX_MANIFEST
    assert max(TAP_BYTES, PART) + control.MOST_SHOWN < control.MOST_SAID


@pytest.mark.parametrize("fenced", [False, True])
async def test_who_is_refused_is_told_why(connected: tuple[Connection, Connection], fenced: bool) -> None:
    a, b = connected

    def welcome(identity: str, hello: dict[str, Any]) -> dict[str, Any]:
        raise Fenced("you are old") if fenced else HandshakeError("no reason")

    listening = asyncio.create_task(driver.shake_listener(b, {"p:a>b": KEY}.get, welcome))
    with pytest.raises(Fenced if fenced else HandshakeError, match="you are old" if fenced else "no reason"):
        await driver.shake_dialer(a, KEY, "p:a>b", HELLO)
    with pytest.raises(Fenced if fenced else HandshakeError):
        await listening
    assert b.closed


async def test_an_unknown_identity_is_refused(connected: tuple[Connection, Connection]) -> None:
    a, b = connected
    listening = asyncio.create_task(driver.shake_listener(b, {}.get, lambda identity, hello: WELCOME))
    with pytest.raises(HandshakeError, match="doesn't know this identity or key"):
        await driver.shake_dialer(a, KEY, "p:a>b", HELLO)
    with pytest.raises(HandshakeError):
        await listening


@pytest.mark.parametrize("silent", ["dialer", "listener"])
async def test_a_silent_peer_is_given_up(connected: tuple[Connection, Connection], silent: str) -> None:
    a, b = connected
    if silent == "dialer":
        waiting: Any = driver.shake_listener(b, {"p:a>b": KEY}.get, lambda identity, hello: WELCOME, timeout=0.01)
    else:
        waiting = driver.shake_dialer(a, KEY, "p:a>b", HELLO, timeout=0.01)
    with pytest.raises(HandshakeError, match="no handshake within"):
        await waiting


async def test_a_peer_that_hangs_up_is_a_transport_error(connected: tuple[Connection, Connection]) -> None:
    a, b = connected
    a.abort()
    with pytest.raises(TransportError):
        await driver.shake_listener(b, {"p:a>b": KEY}.get, lambda identity, hello: WELCOME)


async def test_who_talks_too_early_is_refused(connected: tuple[Connection, Connection]) -> None:
    a, b = connected
    a.write([Dialer(KEY, "p:a>b", HELLO).start(), (b"data",)])
    with pytest.raises(HandshakeError, match="before the handshake is over"):
        await driver.shake_listener(b, {"p:a>b": KEY}.get, lambda identity, hello: WELCOME)
