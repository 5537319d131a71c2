"""Handshakes on real connections, for data links (`outlink`, `inlink`) and control channels, and what both ends share.

With those two, the only files of delivery that await. Everything of one operator's links happens in one event loop.
Nothing here runs per message: the unit is the batch.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from nomad.clock import Clock
from nomad.control import MOST_SAID, Shape
from nomad.delivery import handshake
from nomad.errors import Fenced, HandshakeError
from nomad.transport.base import Connection, Frame
from nomad.transport.shaping import ShapedConnection

HANDSHAKE_TIMEOUT = 10.0
"""Seconds for all messages of a handshake."""


async def shake_dialer(
    conn: Connection,
    key: bytes,
    identity: str,
    hello: dict[str, Any],
    timeout: float = HANDSHAKE_TIMEOUT,
    *,
    most: int = MOST_SAID,
) -> dict[str, Any]:
    """Prove `identity` on a new connection; the listener's welcome.

    `most`: bytes of a frame that the listener may send from then on, as it has proved itself, too.
    Raises `HandshakeError`, `Fenced` or `TransportError`.
    """
    conn.limit(handshake.MAX_BYTES)
    dialer = handshake.Dialer(key, identity, hello)
    async with _deadline(timeout):
        conn.write([dialer.start()])
        confirm, welcome = dialer.receive(await _one(conn))
        conn.limit(most)
        conn.write([confirm])
    return welcome


async def shake_listener(
    conn: Connection,
    key_for: Callable[[str], bytes | None],
    welcome: Callable[[str, dict[str, Any]], dict[str, Any]],
    timeout: float = HANDSHAKE_TIMEOUT,
    *,
    patient: bool = False,
    most: int = MOST_SAID,
) -> tuple[str, dict[str, Any], list[Frame]]:
    """Greet a dialer: its proven identity, its hello, and frames that came right behind the handshake.

    `patient`: its first word may take for ever. `most`: bytes of a frame that it may send once it has proved itself.
    `key_for` gives the key of an identity or None; `welcome` what to answer, and may raise `Fenced`.
    Raises `HandshakeError`, `Fenced` or `TransportError` after it told the dialer.
    """
    conn.limit(handshake.MAX_BYTES)
    listener = handshake.Listener()
    first = await _one(conn) if patient else None
    async with _deadline(timeout):
        try:
            identity, hello = listener.identify(first or await _one(conn))
            key = key_for(identity)
            if key is None:
                raise HandshakeError("the listener doesn't know this identity or key")
            conn.write([listener.welcome(key, welcome(identity, hello))])
            confirm, *rest = await conn.recv()
            listener.confirm(confirm)
            conn.limit(most)  # at once: a larger frame may wait already
        except (HandshakeError, Fenced) as exc:
            conn.write([handshake.refusal(str(exc), fenced=isinstance(exc, Fenced))])
            await conn.close()
            raise
    return identity, hello, rest


def nothing() -> None:
    """What is called when nobody wants to know."""


def shaped(conn: Connection, shape: Shape, clock: Clock) -> Connection:
    """What to write to: `conn` itself until an emulated link is asked for, which then stays around it."""
    if isinstance(conn, ShapedConnection):
        conn.set_shape(shape)
        return conn
    return conn if shape == Shape() else ShapedConnection(conn, shape, clock=clock)


async def _one(conn: Connection) -> Frame:
    frames = await conn.recv()
    if len(frames) != 1:
        raise HandshakeError("the peer talks before the handshake is over")
    return frames[0]


async def first_of(*jobs: Awaitable[object]) -> None:
    """Run jobs until the first ends or fails; cancel the others and wait for them; raise the first failure."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


@contextlib.asynccontextmanager
async def _deadline(seconds: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as exc:
        raise HandshakeError(f"no handshake within {seconds} s") from exc
