"""`inproc:name`: connections within one event loop, for tests, simulation and operators of one process.

Found by `nomad.transport.registry`. A frame is handed over as references: nothing is copied or
encoded, so a buffer that was written must be left alone, as with every transport. It behaves like a
socket in all else: bounded, ordered, and a peer that closed is found out after its last frame.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable
from weakref import WeakKeyDictionary

from nomad.errors import ConnectionBroken, TransportError
from nomad.transport.address import parse_name
from nomad.transport.base import HIGH_WATER, Buffer, Capabilities, Connection, Frame, Listener, OnConnection
from nomad.transport.endpoint import Endpoint
from nomad.transport.framing import FRAME_OVERHEAD, check, cost_of
from nomad.transport.listening import Handlers

_listeners: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, InprocListener]] = WeakKeyDictionary()
_numbers = itertools.count(1)


class InprocTransport:
    scheme = "inproc"
    capabilities = Capabilities(cross_host=False, cross_process=False)

    async def connect(self, address: str, *, timeout: float = 10.0) -> Connection:
        name = parse_name(address)
        listener = _listeners.get(asyncio.get_running_loop(), {}).get(name)
        if listener is None:
            raise ConnectionBroken(f"{address} can't be reached: nothing in this event loop listens there")
        dialer = InprocConnection(f"{address}#{next(_numbers)}", address)
        acceptor = InprocConnection(address, dialer.local)
        dialer.far, acceptor.far = acceptor, dialer
        listener.handlers.start(acceptor)
        return dialer

    async def listen(self, address: str, on_connection: OnConnection, *, advertise: str | None = None) -> Listener:
        """`advertise` has no meaning for a name and is ignored."""
        names = _listeners.setdefault(asyncio.get_running_loop(), {})
        name = parse_name(address, listening=True) or f"listener-{next(_numbers)}"
        if name in names:
            raise TransportError(f"{address} is taken by another listener; an empty name picks a free one")
        listener = InprocListener(f"{self.scheme}:{name}", on_connection)
        names[name] = listener
        return listener


class InprocListener:
    def __init__(self, bound: str, on_connection: OnConnection) -> None:
        self._bound = bound
        self._names = _listeners[asyncio.get_running_loop()]
        self.handlers = Handlers(on_connection, bound)

    @property
    def bound(self) -> str:
        return self._bound

    @property
    def reachable(self) -> str:
        return self._bound

    async def close(self) -> None:
        name = parse_name(self._bound)
        if self._names.get(name) is self:
            del self._names[name]
        await self.handlers.close()


class InprocConnection(Endpoint):
    """One end; writing puts frames where the other receives."""

    far: InprocConnection

    def __init__(self, local: str, peer: str) -> None:
        super().__init__(local, peer)
        self._received_bytes = 0

    @property
    def writable(self) -> bool:
        return self.far._received_bytes < HIGH_WATER

    def write(self, frames: Iterable[Frame]) -> None:
        if self.closed:
            raise self._error()
        checked = [check(frame) for frame in frames]
        for buffers in checked:
            self.far._received.append(tuple(map(_read_only, buffers)))
            self.far._received_bytes += FRAME_OVERHEAD + sum(map(len, buffers))
        if checked:
            self.far._reader.wake()

    def poll(self) -> list[Frame]:
        if self._closed or (not self._received and self._broken is not None):
            raise self._error()
        if not self._received:
            return []
        frames = self._take()
        self._received_bytes = cost_of(self._received) if self._received else 0
        if not frames:
            self._received, self._received_bytes = [], 0
            self._break(f"{self._peer} sent a frame over the limit of {self._most} bytes")
            self.far._break(f"{self.far._peer} closed the connection")
            raise self._error()
        self.far._drainer.wake()
        if self.closed:
            self._reader.wake()
        return frames

    async def close(self) -> None:
        self.abort()  # what was written is with the peer already

    def abort(self) -> None:
        self._end()
        self._received_bytes = 0
        self.far._break(f"{self.far._peer} closed the connection")


def _read_only(buffer: Buffer) -> Buffer:
    return buffer if isinstance(buffer, bytes) else memoryview(buffer).toreadonly()
