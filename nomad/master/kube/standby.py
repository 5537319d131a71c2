"""Calls between the master that leads and those that wait to: both ends.

    leader -> standby    request   id, "lead" with holder: what the leader calls itself in the lease
    standby -> leader    reply     id, ok

A standby dials where pods dial, calls itself `master:<what it is in the lease>`, and has the key of `master`; the
control port hands it to `Door`. It is called each second, and answers. What follows from calls and answers, and from
their absence, is `election`'s. No call is a request to the cluster. Used by `leader`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from nomad import control
from nomad.clock import Clock
from nomad.errors import ApiError, CertificateError, ConflictError, DeliveryError, RequestError, TransportError
from nomad.master.kube.election import RETRY, SILENCE, Election
from nomad.settings import Backoff
from nomad.tasks import Tasks
from nomad.transport.base import Connection

log = logging.getLogger(__name__)

EVERY = 1.0
"""Seconds from one call to the next."""

PATIENCE = 2.5
"""Seconds in which a call is to be answered; whoever takes longer is struck off."""

BACKOFF = Backoff(first=0.5, factor=2.0, limit=30.0)
"""Until a standby dials again; each attempt may ask the cluster for what it needs."""

METHOD = "lead"

Reach = Callable[[str], AbstractAsyncContextManager[Connection]]
"""Makes a connection with the leader, by what the standby is in the lease: dialled, and both have proved themselves.

Raises `TransportError`, `CertificateError`, `DeliveryError` and `ApiError`.
"""


class Channel(Protocol):
    """What the control port has for each connection; see `nomad.master.pods.Channel`."""

    async def ask(self, method: str, args: dict[str, Any], timeout: float) -> Any:
        """Raises `RequestError` and `ConflictError`."""
        ...

    def end(self) -> None: ...


class Door:
    """Where standbys come to a master that leads, as `nomad.master.pods.Guests`. `close` it."""

    def __init__(self, election: Election, clock: Clock, changed: Callable[[], None]) -> None:
        """`changed` is called when one has come or gone."""
        self._election = election
        self._clock = clock
        self._changed = changed
        self._tasks = Tasks()
        self._calling: dict[str, asyncio.Task[None]] = {}

    def connected(self, name: str, hello: dict[str, Any], channel: Channel) -> None:
        self._calling[name] = self._tasks.start(self._call(name, channel), name=f"calls to {name}")

    def said(self, name: str, message: dict[str, Any]) -> None:
        raise ValueError("a master that waits answers, and says nothing by itself")

    def disconnected(self, name: str, channel: Channel) -> None:
        if (task := self._calling.pop(name, None)) is not None:
            task.cancel()
        self._left(name)

    async def close(self) -> None:
        await self._tasks.close()

    async def _call(self, name: str, channel: Channel) -> None:
        try:
            while True:
                called = self._clock.now()
                await channel.ask(METHOD, {"holder": self._election.identity}, PATIENCE)
                now = self._clock.now()
                if self._election.answered(name, called, now):
                    log.info("%s is ready to take over", name)
                    self._changed()
                await self._clock.sleep(max(0.0, called + EVERY - now))
        except (RequestError, ConflictError) as exc:
            log.info("%s doesn't answer: %s", name, exc)
            self._left(name)
            channel.end()

    def _left(self, name: str) -> None:
        self._election.left(name)
        self._changed()


async def attend(election: Election, reach: Reach, clock: Clock) -> None:
    """Stay connected with whoever leads, and answer, until cancelled."""
    failures = 0
    while True:
        if not election.follows:
            await clock.sleep(RETRY)
            continue
        try:
            async with reach(election.identity) as conn:
                while True:
                    await _answer(election, conn, clock)
                    failures = 0
        except (TransportError, CertificateError, DeliveryError, ApiError, TimeoutError) as exc:
            log.info("the master that leads can't be heard: %s", str(exc) or "it says nothing")
        except (ValueError, KeyError, TypeError) as exc:
            log.warning("the master that leads said what this one doesn't understand: %r", exc)
        failures += 1
        await clock.sleep(BACKOFF.delay(failures))


async def _answer(election: Election, conn: Connection, clock: Clock) -> None:
    """Hear what comes next."""
    async with asyncio.timeout(SILENCE):
        frames = await conn.recv()
    for frame in frames:
        message = control.unpack(bytes(frame[0]))
        if message["type"] != "request" or message["method"] != METHOD:
            raise ValueError(f"not a call: {message['type']}")
        election.heard(str(message["args"]["holder"]), clock.now())
        conn.write([(control.pack({"type": "reply", "id": message["id"], "ok": True, "value": None}),)])
