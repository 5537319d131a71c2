"""How a pod reaches its master: directly, or by way of its node's agent once the master has asked for that.

Used by `host`. What the agent does with it, and why, is `nomad.gateway`'s.
"""

from __future__ import annotations

import logging

from nomad import reach
from nomad.control import MOST_TOLD, VIA
from nomad.delivery.driver import HANDSHAKE_TIMEOUT, shake_dialer
from nomad.errors import ConnectionBroken, DeliveryError, TransportError
from nomad.transport import registry
from nomad.transport.base import Connection

log = logging.getLogger(__name__)

DIAL_SECONDS = 3.0
"""Until an agent that doesn't answer isn't there: it is on the same node."""

PATIENCE = 20.0
"""Seconds without a master until it is looked for directly as well, although the agent is there."""


class Route:
    """The way that a process takes now."""

    def __init__(self, control: str, name: str) -> None:
        """`control`: the master's address; `name`: what the process calls itself."""
        self._control = control
        self._name = name
        self._agent: tuple[str, bytes] | None = None
        self._tries = 0

    def turn(self, address: str, key: bytes) -> None:
        """From now on by way of the agent at `address`, to which the process proves itself with `key`."""
        self._agent = address, key

    async def dial(self, alone: float = 0.0) -> tuple[Connection, float]:
        """A new connection to the master, to which nothing was said yet, and the seconds that it may take to answer.

        `alone`: seconds since the last one ended. Raises `TransportError`.
        """
        self._tries += 1
        if self._agent is not None and (alone < PATIENCE or self._tries % 2):
            try:
                return await self.by_agent(), HANDSHAKE_TIMEOUT  # the agent is there, and waits for the master, too
            except (TransportError, DeliveryError) as exc:
                log.debug("no way by the node's agent: %s", exc)
        seconds = reach.patience(alone)
        return await reach.dial(self._control, seconds), seconds

    async def by_agent(self) -> Connection:
        """A connection by way of the agent. One that can't be reached isn't tried again before the next `turn`.

        Raises `TransportError` or `DeliveryError`.
        """
        if self._agent is None:
            raise ConnectionBroken("no agent is known")
        (address, key), self._agent = self._agent, None
        conn = await registry.connect(address, timeout=DIAL_SECONDS)
        try:
            await shake_dialer(conn, key, f"{VIA}{self._name}", {}, DIAL_SECONDS, most=MOST_TOLD)
        except BaseException:
            conn.abort()
            raise
        self._agent = address, key
        return conn
