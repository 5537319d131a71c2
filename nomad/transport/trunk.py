"""Many connections over one: `Trunk` is one end of that, for a user who reads and writes the one below.

What is carried are the messages of `nomad.transport.messages`, each a frame whose head says its kind and the number of
its connection. The heads begin with a byte below 0x80, so frames that don't (msgpack maps, say) may travel between
them: `carries` tells. One side opens connections, the other one accepts them.

    OPEN  = HELLO of a number that wasn't used before       everything else as there; WELCOME isn't needed
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Sequence

from nomad.errors import FrameTooLarge, TransportError
from nomad.transport.base import Buffer, Connection, Frame
from nomad.transport.messages import HELLO, RESET, MessageConnection

MOST = 1024
"""Connections over one trunk: several times the pods that a node may have."""

_HEAD = struct.Struct("<cI")
HEAD_BYTES = _HEAD.size
"""That a frame is longer by on the trunk."""


def carries(frame: Frame) -> bool:
    """Whether a frame is one of a trunk's."""
    return len(frame[0]) == _HEAD.size and frame[0][0] < 0x80


class Trunk:
    """Tell it each frame that `carries` says is a trunk's, and at the end that it is `lost`."""

    def __init__(self, below: Connection, accept: Callable[[Connection], None] | None = None) -> None:
        """`below` is written to and never closed. `accept` is called with each connection that the other end opens;
        without it, it may open none.
        """
        self._below = below
        self._accept = accept
        self._connections: dict[int, MessageConnection] = {}
        self._numbers = itertools.count(1)
        self._highest = 0
        """Number of the last connection that the other end opened."""
        self._lost: str | None = None

    def open(self) -> Connection:
        """A new connection; it is broken when the other end doesn't want it."""
        number = next(self._numbers)
        connection = self._made(number)
        self._send(number, [HELLO])
        if self._lost is not None:
            connection.lost(self._lost)
        return connection

    def received(self, frame: Frame) -> None:
        """Raises `ValueError` when the other end doesn't keep to the rules."""
        kind, number = _HEAD.unpack(frame[0])
        connection = self._connections.get(number)
        if kind == HELLO:
            self._opened(number)
        elif connection is not None:
            connection.message(kind, frame[1:])

    def lost(self, reason: str) -> None:
        """The connection below is gone, and all over it are."""
        self._lost = reason
        for connection in list(self._connections.values()):
            connection.lost(reason)

    # Inside

    def _opened(self, number: int) -> None:
        if self._accept is None or number <= self._highest:
            raise ValueError("it opens what it may not")
        self._highest = number
        if len(self._connections) >= MOST:
            self._send(number, [RESET])
        else:
            self._accept(self._made(number))

    def _made(self, number: int) -> MessageConnection:
        connection = MessageConnection(
            self._below.local,
            f"{self._below.peer}#{number}",
            lambda parts: self._send(number, parts),
            lambda gracefully: self._released(number),
        )
        self._connections[number] = connection
        return connection

    def _released(self, number: int) -> None:
        self._connections.pop(number).gone.set()

    def _send(self, number: int, parts: Sequence[Buffer]) -> None:
        kind, *rest = parts
        try:
            self._below.write([(_HEAD.pack(bytes(kind), number), *rest)])
        except FrameTooLarge as exc:
            if connection := self._connections.get(number):
                connection.lost(str(exc))
        except TransportError:
            return  # whoever reads it sees the same, and says that it is lost
