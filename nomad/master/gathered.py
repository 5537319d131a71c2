"""Control channels that come by way of agents: those of a node over one connection, its agent's (`nomad.gateway`).

Used by the control port. From so many pods on that the memory for their TLS matters, pods are told to come so. A pod
that can't comes as before, and is asked again after a while; in between nothing is lost that isn't said again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from nomad.transport.base import Connection, Frame, OnConnection
from nomad.transport.listening import Handlers
from nomad.transport.trunk import Trunk

STEER_SECONDS = 2.0
"""Between two looks at who still comes directly."""

AT_ONCE = 200
"""Pods that are told in one look: each dials anew."""

AGAIN_SECONDS, AGAIN_MOST = 60.0, 1800.0
"""Until a pod that was told and comes directly is told once more, doubled from the first to the most."""


@dataclass(frozen=True, slots=True)
class Way:
    """By which agent a process can come."""

    address: str
    key: bytes
    """With which it proves itself there."""


class Comes(Protocol):
    """The control channel of a process, as far as it matters here."""

    name: str
    pod: str
    direct: bool
    """Not by way of an agent."""

    def tell(self, message: dict[str, Any]) -> bool: ...


class Gathered:
    """`close` last."""

    def __init__(self, serve: OnConnection, name: str) -> None:
        """`serve` runs with each connection that comes by way of an agent."""
        self._handlers = Handlers(serve, name)
        self._trunks: dict[Connection, Trunk] = {}
        self._told: dict[str, tuple[float, float]] = {}
        """Until when processes that were told aren't told again, by name, and after how long they were."""

    def received(self, below: Connection, frame: Frame) -> None:
        """A trunk's frame came from an agent. Raises `ValueError`."""
        trunk = self._trunks.get(below)
        if trunk is None:
            trunk = self._trunks[below] = Trunk(below, self._handlers.start)
        trunk.received(frame)

    def ended(self, below: Connection) -> None:
        """The connection of an agent is over, and so are those that came by it."""
        if trunk := self._trunks.pop(below, None):
            trunk.lost("the agent of its node is gone")

    def steer(self, channels: Iterable[Comes], way: Callable[[str, str], Way | None], now: float) -> None:
        """Tell some of those that come directly by which agent they can; `way` of a pod, and of its process's name."""
        self._told = {name: told for name, told in self._told.items() if now < told[0] + AGAIN_MOST}
        left = AT_ONCE
        for channel in channels:
            until, pause = self._told.get(channel.name, (now, AGAIN_SECONDS / 2))
            if channel.direct and now >= until and (found := way(channel.pod, channel.name)):
                channel.tell({"type": "via", "address": found.address, "key": found.key})
                pause = min(2 * pause, AGAIN_MOST)
                self._told[channel.name] = now + pause, pause
                left -= 1
                if not left:
                    return

    async def close(self) -> None:
        await self._handlers.close()
