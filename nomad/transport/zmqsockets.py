"""Sockets of ZeroMQ in the event loop: what arrives is handed to a callback, sending never blocks, closing has an end.

Used by `nomad.transport.zmq` only; knows nothing of connections. On aiozmq where it can be imported, else
(Python 3.14) on pyzmq's own asyncio sockets. High-water marks are off: a ROUTER would throw away what is
above them; who sends has to bound what is on the way.
"""

from __future__ import annotations

import asyncio
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from nomad.transport.base import MAX_FRAME_BYTES, Buffer

try:
    import aiozmq
except ImportError:  # Python 3.14 has removed what aiozmq 1.0 imports
    aiozmq = None

Message = Sequence[Any]
"""What arrives: a `zmq.Frame` per part."""

OPTIONS = {
    zmq.SNDHWM: 0,
    zmq.RCVHWM: 0,
    zmq.MAXMSGSIZE: MAX_FRAME_BYTES,
    zmq.RECONNECT_IVL: -1,  # a connection that broke stays broken
    zmq.HEARTBEAT_IVL: 5_000,  # ms: peers that vanished are noticed ...
    zmq.HEARTBEAT_TIMEOUT: 15_000,  # ... after this long
    zmq.LINGER: 0,
}
AT_ONCE = 64
"""Messages handled per wake-up, before others get their turn."""
OPENED = zmq.EVENT_ACCEPTED
ENDED = zmq.EVENT_DISCONNECTED
UNBOUND = zmq.EVENT_CLOSED | zmq.EVENT_CLOSE_FAILED
REFUSED = (
    zmq.EVENT_CLOSED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)

_numbers = itertools.count(1)


class _Socket(zmq.Socket[bytes]):
    """Copies no large payload.

    It is sent from where it is, which a thread of pyzmq's keeps alive until then, and received as a `zmq.Frame`,
    which owns it, and knows whence it came.
    """

    def recv_multipart(self, flags: int = 0, copy: bool = True, track: bool = False) -> Any:
        return super().recv_multipart(flags, copy=False, track=track)

    def send_multipart(
        self, msg_parts: Sequence[Any], flags: int = 0, copy: bool = True, track: bool = False, **options: Any
    ) -> Any:
        return super().send_multipart(msg_parts, flags, copy=False, track=track, **options)


class _Port(ABC):
    """A socket whose messages are handed to `on_message` by the event loop."""

    def __init__(self, sock: _Socket, on_message: Callable[[Message], None], on_closed: Callable[[], None]) -> None:
        self.sock = sock
        self._on_message = on_message
        self._on_closed = on_closed
        self._opened = False
        self._closing = False

    @abstractmethod
    async def open(self) -> None:
        """Begin to receive."""

    def send(self, parts: Sequence[Buffer]) -> None:
        """Hand one message to ZeroMQ; never blocks. Forgotten when the socket isn't open."""
        if self._opened and not self._closing:
            self._send(parts)

    def close(self, linger: int = 0) -> None:
        """Close the socket, which has `linger` ms to send the rest; `on_closed` is called when that is done."""
        if not self._closing:
            self._closing = True
            self.sock.linger = linger
            if self._opened:
                self._close()
            else:
                self._ended()

    @abstractmethod
    def _send(self, parts: Sequence[Buffer]) -> None: ...

    @abstractmethod
    def _close(self) -> None:
        """Stop receiving, then call `_ended`."""

    def _ended(self) -> None:
        self.sock.close()
        self._on_closed()

    def drain(self, limit: int | None = None) -> None:
        """Handle what has arrived, at most `limit` messages of it."""
        for _ in range(limit) if limit is not None else itertools.repeat(None):
            if self._closing:
                return
            try:
                message = self.sock.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._on_message(message)


class _AiozmqPort(_Port):
    async def open(self) -> None:
        opening = asyncio.ensure_future(
            aiozmq.create_zmq_connection(
                lambda: self, self.sock.type, zmq_sock=self.sock, loop=asyncio.get_running_loop()
            )
        )
        try:
            await asyncio.shield(opening)
        except asyncio.CancelledError:
            await opening  # a moment; aiozmq can't be interrupted there
            raise

    def _send(self, parts: Sequence[Buffer]) -> None:
        self._transport.write(parts)

    def _close(self) -> None:
        self._transport.abort()

    # aiozmq.ZmqProtocol

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._opened = True

    def msg_received(self, message: Message) -> None:
        if not self._closing:
            self._on_message(message)
            self.drain(AT_ONCE)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._closing = True
        self._ended()

    def pause_writing(self) -> None:
        """Never matters: without a high-water mark ZeroMQ takes all."""

    def resume_writing(self) -> None:
        """See `pause_writing`."""


class _PyzmqPort(_Port):
    async def open(self) -> None:
        self._asyncio = zmq.asyncio.Socket.from_socket(self.sock)
        self._reading = asyncio.get_running_loop().create_task(self._read(), name="zmq port")
        self._reading.add_done_callback(self._done)
        self._opened = True

    def _send(self, parts: Sequence[Buffer]) -> None:
        sent: Any = self._asyncio.send_multipart(parts, flags=zmq.NOBLOCK)  # done when it returns
        sent.exception()  # that of a peer that is gone, which the monitor tells too

    def _close(self) -> None:
        self._reading.cancel()

    async def _read(self) -> None:
        while True:
            # Not recv: a message in its future would be overtaken by what `drain` finds.
            await self._asyncio.poll(zmq.POLLIN)
            self.drain(AT_ONCE)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._asyncio.close()
        self._ended()


class Sockets:
    """A socket and its monitor, opened and closed together."""

    def __init__(
        self,
        kind: int,
        *,
        on_message: Callable[[Message], None],
        on_event: Callable[[int, int], None],
        on_closed: Callable[[], None],
    ) -> None:
        """`on_event` gets the event and its value: a descriptor or an error number."""
        context: zmq.Context[Any] = zmq.Context.instance()
        port = _PyzmqPort if aiozmq is None else _AiozmqPort
        self.sock = _Socket(context, kind)
        for option, value in OPTIONS.items():
            self.sock.set(option, value)
        self._open = 2
        self._on_event = on_event
        self._on_closed = on_closed
        self._main = port(self.sock, on_message, self._one_closed)
        self._monitor = port(_Socket(context, zmq.PAIR), self._event, self._one_closed)

    async def open(self) -> None:
        name = f"inproc://nomad-monitor-{next(_numbers)}"
        self._monitor.sock.connect(name)  # before the other end binds, or its event loop misses messages
        await self._monitor.open()
        await self._main.open()
        self.sock.monitor(name, OPENED | ENDED | UNBOUND | REFUSED)

    def send(self, parts: Sequence[Buffer]) -> None:
        self._main.send(parts)

    def drain(self) -> None:
        """Handle all messages that have arrived."""
        self._main.drain()

    def drain_events(self) -> None:
        """Handle all events until now."""
        self._monitor.drain()

    def close(self, linger: int = 0) -> None:
        """Close both, the main socket after at most `linger` ms for what it has still to send."""
        if not self.sock.closed:
            self.sock.disable_monitor()
        self._main.close(linger)
        self._monitor.close()

    def _event(self, message: Message) -> None:
        event = parse_monitor_message([part.bytes for part in message])
        self._on_event(event["event"], event["value"])

    def _one_closed(self) -> None:
        self._open -= 1
        if not self._open:
            self._on_closed()
