"""The pod's end of its control channel: keeps a connection with the master, and passes on what either says.

The pod dials, by the way that `route` knows, and goes on without a master while that is away. What goes for every
message is done here: the master's requests are answered over the connection on which they came; where it wants to be
reached another way, the channel turns there; and one that hangs is dialled anew, as there may be another (`reach`).
What the messages mean, the `Side` knows, which is the `host`. Lives in the main thread's loop.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Protocol

from nomad import control
from nomad.actor.route import Route
from nomad.clock import Clock
from nomad.delivery.driver import shake_dialer
from nomad.errors import DeliveryError, TransportError, describe
from nomad.reach import Silence
from nomad.tasks import Tasks, alongside
from nomad.transport.base import Connection, Frame

TURN_SECONDS = 3.0
"""How long the master may take to answer over another way; meanwhile nothing is heard over the present one."""

BACKOFF_FIRST, BACKOFF_MOST = 0.05, 2.0
"""Seconds between attempts to reach the master, doubled from the first to the most."""

STEADY = 2.0
"""Seconds that a connection must have stood for the next attempt to be a first one again.

A master that answers, and hangs up, isn't asked on and on.
"""

log = logging.getLogger(__name__)


class Side(Protocol):
    """Whose words the channel carries."""

    @property
    def ending(self) -> bool:
        """Whether the pod is about to end: the connection is kept for what there is to say then."""
        ...

    def hello(self) -> dict[str, Any]:
        """What is said of the pod in a handshake."""
        ...

    def met(self) -> None:
        """There is a new connection, perhaps with another master: it has to be told how things stand."""
        ...

    def heard(self, message: dict[str, Any]) -> None:
        """What the master says. `ValueError`, `KeyError` and `TypeError` end the connection."""
        ...

    async def do(self, method: str, args: dict[str, Any]) -> Any:
        """What the master asks for: the answer. Whatever this raises is the answer, too."""
        ...

    def abandoned(self, seconds: float) -> None:
        """There was no master for so long, which is longer than agreed."""
        ...


class Channel:
    """`keep` it, then `close` it."""

    def __init__(self, address: str, name: str, key: bytes, patience: float, side: Side, clock: Clock) -> None:
        """`address`: the master's; `name`: what the process calls itself, and `key` what it proves that with;
        `patience`: seconds that there may be no master.
        """
        self._route = Route(address, name)
        self._name = name
        self._key = key
        self._patience = patience
        self._side = side
        self._clock = clock
        self._conn: Connection | None = None
        self._turned = False
        """The master wants to be reached another way."""
        self._silence = Silence(clock)
        self._requests = Tasks()

    @property
    def connected(self) -> bool:
        """Whether there is anybody to tell something."""
        return self._conn is not None

    @property
    def writable(self) -> bool:
        """Whether what is said goes out, and doesn't wait in this process behind what was said before."""
        return self._conn is not None and not self._conn.closed and self._conn.writable

    def say(self, message: dict[str, Any]) -> None:
        """Tell the master, if it is there. What comes again and again is only to be said while `writable`."""
        if self._conn is not None and not self._conn.closed:
            try:
                self._conn.write([(control.pack(message),)])
            except TransportError:
                return  # `keep` sees the same and dials again

    async def keep(self) -> None:
        """Have a connection with the master, for as long as it may be away, until cancelled."""
        try:
            async with alongside(self._silence.watch()):
                await self._keep()
        finally:
            await self._requests.close()

    async def close(self) -> None:
        """What was said last is sent before."""
        if self._conn is not None:
            await self._conn.close()

    # Inside

    async def _keep(self) -> None:
        backoff, alone_since = BACKOFF_FIRST, self._clock.now()
        while True:
            try:
                conn, patience = await self._route.dial(self._clock.now() - alone_since)
                met_at = math.inf
                try:
                    await self._meet(conn, patience)
                    met_at, self._turned = self._clock.now(), False
                    while True:
                        self._hear(conn, await conn.recv())
                        if self._turned:
                            self._turned = False
                            conn = await self._turn(conn)
                finally:
                    self._silence.end()
                    if self._conn is not conn:  # it wasn't met, or is what was turned away from
                        conn.abort()
                    if self._conn is not None:
                        alone_since = self._clock.now()
                        if alone_since - met_at >= STEADY:
                            backoff = BACKOFF_FIRST
                        if not self._side.ending:  # else there is something left to say over it
                            self._conn.abort()
                            self._conn = None
            except (TransportError, DeliveryError) as exc:
                log.debug("no master: %s", exc)
            except (ValueError, KeyError, TypeError) as exc:
                log.warning("the master said what this pod doesn't understand: %r", exc)
            if self._clock.now() - alone_since > self._patience:
                self._side.abandoned(self._patience)
            await self._clock.sleep(min(backoff, max(0.05, self._patience / 4)))
            backoff = min(BACKOFF_MOST, backoff * 2)

    async def _meet(self, conn: Connection, timeout: float) -> None:
        """Talk over a new connection from now on. Raises `TransportError` or `DeliveryError`."""
        await shake_dialer(conn, self._key, self._name, self._side.hello(), timeout, most=control.MOST_TOLD)
        self._conn = conn
        self._silence.begin(conn)
        self._side.met()

    async def _turn(self, conn: Connection) -> Connection:
        """Come the way that the master asks for: the new connection, or the present one if that leads nowhere.

        Whatever this raises, `_conn` is the one of them that is met.
        """
        fresh = None
        self._silence.end()  # it isn't listened to
        try:
            fresh = await self._route.by_agent()
            await self._meet(fresh, TURN_SECONDS)
        except (TransportError, DeliveryError) as exc:
            log.debug("no other way to the master: %s", exc)
            self._silence.resume(conn)
            return conn
        finally:
            if fresh is not None and fresh is not self._conn:
                fresh.abort()
        with suppress(TransportError):
            self._hear(conn, conn.poll())  # what it had said before
        await conn.close()
        return fresh

    def _hear(self, conn: Connection, frames: Iterable[Frame]) -> None:
        self._silence.heard()
        for frame in frames:
            message = control.unpack(bytes(frame[0]))
            if message["type"] == "via":
                self._route.turn(str(message["address"]), bytes(message["key"]))
                self._turned = True
            elif message["type"] == "word":
                self._silence.word(message)
            elif message["type"] == "request":
                self._requests.start(self._answer(message, conn), name="answer")
            else:
                self._side.heard(message)

    async def _answer(self, message: dict[str, Any], conn: Connection) -> None:
        try:
            value = await self._side.do(message["method"], message.get("args") or {})
            reply = {"type": "reply", "id": message["id"], "ok": True, "value": value}
        except Exception as exc:  # noqa: BLE001 - whatever it is, the one who asked is to get an answer
            reply = {"type": "reply", "id": message["id"], "ok": False, "error": describe(exc)}
        if conn is self._conn:  # else it would answer what somebody else has asked since, with the same number
            self.say(reply)
