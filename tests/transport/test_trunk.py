"""Connections over one another: what travels over a trunk is held to the contract of transports, and its own rules."""

from __future__ import annotations

import asyncio

import pytest

from nomad import control
from nomad.errors import ConnectionBroken, TransportError
from nomad.tasks import Tasks
from nomad.transport import base
from nomad.transport.base import Capabilities, Connection, Frame, Listener, OnConnection
from nomad.transport.listening import Handlers
from nomad.transport.messages import BYE, FRAME, HELLO, RESET, MessageConnection
from nomad.transport.registry import transport_for
from nomad.transport.trunk import MOST, Trunk, carries
from tests.contract.transport import CHECKS, Check, pair, soon, take

PREFIX = "trunk:"


class TrunkTransport:
    """`trunk:` and a TCP address; each connection that is dialled has a trunk of its own. `close` last."""

    scheme = "trunk"
    capabilities = Capabilities(cross_host=True, cross_process=True)

    def __init__(self) -> None:
        self._below = transport_for("tcp://127.0.0.1:0")
        self._tasks = Tasks()

    async def connect(self, address: str, *, timeout: float = 10.0) -> Connection:
        try:
            below = await self._below.connect(_plain(address), timeout=timeout)
        except ConnectionBroken as exc:
            raise ConnectionBroken(PREFIX + str(exc)) from exc
        trunk = Trunk(below)
        made = trunk.open()
        self._tasks.start(_read(below, trunk), name="a trunk")
        assert isinstance(made, MessageConnection)
        self._tasks.start(_until_gone(made, below), name="a trunk's end")
        return made

    async def listen(self, address: str, on_connection: OnConnection, *, advertise: str | None = None) -> Listener:
        handlers = Handlers(on_connection, address)

        async def serve(below: Connection) -> None:
            await _read(below, Trunk(below, handlers.start))

        below = await self._below.listen(_plain(address), serve, advertise=advertise)
        return TrunkListener(below, handlers)

    async def close(self) -> None:
        await self._tasks.close()


class TrunkListener:
    def __init__(self, below: Listener, handlers: Handlers) -> None:
        self._below = below
        self._handlers = handlers

    @property
    def bound(self) -> str:
        return PREFIX + self._below.bound

    @property
    def reachable(self) -> str:
        return PREFIX + self._below.reachable

    async def close(self) -> None:
        await self._handlers.close()
        await self._below.close()


def _plain(address: str) -> str:
    return address.removeprefix(PREFIX)


async def _read(below: Connection, trunk: Trunk) -> None:
    try:
        while True:
            for frame in await below.recv():
                assert carries(frame)
                trunk.received(frame)
    except TransportError as exc:
        trunk.lost(str(exc))


async def _until_gone(made: MessageConnection, below: Connection) -> None:
    await made.gone.wait()
    await below.close()


@pytest.mark.parametrize(
    "check", [check for check in CHECKS if check.__name__ != "check_names"], ids=lambda check: check.__name__
)
async def test_contract(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    if "clogged" in check.__name__:
        monkeypatch.setattr(base, "CLOSE_SECONDS", 0.05)
    transport = TrunkTransport()
    await check(transport, "trunk:tcp://127.0.0.1:0")
    await soon(transport.close())


class Both:
    """Two ends of a trunk over a connection of this process, and what else came over that."""

    def __init__(self, near: Connection, far: Connection) -> None:
        self.accepted: list[Connection] = []
        self.near, self.far = Trunk(near), Trunk(far, self.accepted.append)
        self.below = near
        self.others: list[Frame] = []
        for conn, trunk in ((near, self.near), (far, self.far)):
            conn.notify(lambda conn=conn, trunk=trunk: self._read(conn, trunk))  # type: ignore[misc]

    def _read(self, conn: Connection, trunk: Trunk) -> None:
        try:
            for frame in conn.poll():
                if carries(frame):
                    trunk.received(frame)
                else:
                    self.others.append(frame)
        except TransportError as exc:
            trunk.lost(str(exc))

    async def opened(self) -> tuple[Connection, Connection]:
        one, count = self.near.open(), len(self.accepted)
        async with asyncio.timeout(30):
            while len(self.accepted) == count:
                await asyncio.sleep(0)
        return one, self.accepted[-1]


async def test_connections_and_other_frames_share_one() -> None:
    async with pair(transport_for("inproc:"), "inproc:") as (near, far):
        both = Both(near, far)
        (a, b), (c, d) = [await both.opened() for _ in range(2)]
        a.write([(b"first", b"with", b"parts")])
        near.write([(control.pack({"type": "heartbeat"}),)])
        c.write([(b"second",)])
        d.write([(b"back",)])
        assert [tuple(map(bytes, frame)) for frame in await take(b, 1)] == [(b"first", b"with", b"parts")]
        assert [bytes(frame[0]) for frame in await take(d, 1) + await take(c, 1)] == [b"second", b"back"]
        assert [control.unpack(bytes(frame[0]))["type"] for frame in both.others] == ["heartbeat"]
        await soon(a.close())
        with pytest.raises(ConnectionBroken):
            await soon(b.recv())
        assert not d.closed
        near.abort()
        for conn in (c, d):
            with pytest.raises(ConnectionBroken):
                await soon(conn.recv())
        assert both.near.open().closed, "there is nothing below any more"


def head(kind: bytes, number: int) -> bytes:
    return kind + number.to_bytes(4, "little")


async def test_the_rules_are_kept() -> None:
    """By the other end, too: it may be anybody's."""
    sent: list[Frame] = []
    async with pair(transport_for("inproc:"), "inproc:") as (near, far):
        accepted: list[Connection] = []
        trunk = Trunk(near, accepted.append)
        for number in range(1, MOST + 1):
            trunk.received((head(HELLO, number),))
        assert len(accepted) == MOST
        trunk.received((head(HELLO, MOST + 1),))
        sent = await take(far, 1)
        assert bytes(sent[0][0]) == head(RESET, MOST + 1), "one more would be too many"
        trunk.received((head(FRAME, MOST + 1), b"to a connection that isn't there"))
        for number in (1, MOST + 1):
            with pytest.raises(ValueError, match="may not"):
                trunk.received((head(HELLO, number),))
        trunk.received((head(BYE, 1),))
        trunk.received((head(HELLO, MOST + 2),))
        assert len(accepted) == MOST + 1
        with pytest.raises(ValueError, match="may not"):
            Trunk(far).received((head(HELLO, 1),))
        trunk.lost("enough")
        assert all(conn.closed for conn in accepted)


@pytest.mark.parametrize("message", [{"type": "ready"}, {f"key{number}": number for number in range(20)}])
def test_control_messages_are_told_from_what_a_trunk_carries(message: dict[str, object]) -> None:
    assert not carries((control.pack(message),))
    assert carries((head(FRAME, 7), b"anything"))
