"""`zmq+tcp://host:port` and `zmq+ipc:/path`: connections over ZeroMQ.

Found by `nomad.transport.registry`. The only file that imports a ZeroMQ library: aiozmq where it can
be imported, else (Python 3.14) pyzmq's own asyncio sockets. A listener is a ROUTER socket, each
dialer a DEALER of its own; the conversation between them is `nomad.transport.messages`. Peers that go
without a word are noticed by the monitors of the sockets. High-water marks are off: a ROUTER would
throw away what is above them, and the windows of the connections bound what is on the way.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from nomad.errors import ConnectionBroken
from nomad.transport.address import format_host_port, parse_host_port, parse_path, reachable
from nomad.transport.base import MAX_FRAME_BYTES, Buffer, Capabilities, Connection, Listener, OnConnection
from nomad.transport.framing import IN_PLACE_BYTES
from nomad.transport.listening import Handlers
from nomad.transport.mapping import cannot_listen, dialling
from nomad.transport.messages import HELLO, RESET, VERSION, WELCOME, MessageConnection
from nomad.transport.unixfiles import SocketFile

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
LINGER = 1_000
"""Milliseconds for the last word of a dialer that closes in peace; spent by ZeroMQ's own thread."""
UNBIND_SECONDS = 1.0
"""How long a listener waits for ZeroMQ's thread to close its socket."""
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


# Sockets in an event loop


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


class _Sockets:
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


# Connections


class _Dialer:
    """The DEALER socket of one connection."""

    def __init__(self, address: str, endpoint: str) -> None:
        self._endpoint = endpoint
        self._address = address
        self._sockets = _Sockets(zmq.DEALER, on_message=self._message, on_event=self._event, on_closed=self._closed)
        local = f"{address}#{next(_numbers)}"
        self.connection = MessageConnection(local, address, self._sockets.send, self._release)
        self._welcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def open(self) -> None:
        """Raises `ConnectionBroken` when nobody answers as a listener does."""
        await self._sockets.open()
        if self._endpoint.startswith("tcp://["):
            self._sockets.sock.set(zmq.IPV6, 1)
        self._sockets.sock.connect(self._endpoint)
        self._sockets.send([HELLO, VERSION])
        await self._welcome

    def _message(self, message: Message) -> None:
        kind, *parts = message
        if self._welcome.done():
            self.connection.message(kind.bytes, [_owned(part) for part in parts])
        elif kind.bytes == WELCOME:
            self._welcome.set_result(None)
        else:
            self._refuse(f"{self._address} refused the connection")

    def _event(self, event: int, value: int) -> None:
        if event & REFUSED:
            self._refuse(f"{self._address} can't be reached: nobody answers there")
        if event & (ENDED | REFUSED):
            asyncio.get_running_loop().call_soon(self._lost)

    def _refuse(self, reason: str) -> None:
        if not self._welcome.done():
            self._welcome.set_exception(ConnectionBroken(reason))
            self._welcome.exception()  # perhaps nobody waits for it any more

    def _lost(self) -> None:
        self._sockets.drain()  # what had arrived before
        self._refuse(f"{self._address} closed the connection at once")
        self.connection.lost("it closed the connection")

    def _release(self, gracefully: bool) -> None:
        self._sockets.close(LINGER if gracefully else 0)

    def _closed(self) -> None:
        self.connection.gone.set()


class ZmqListener:
    """The ROUTER socket of all connections that a listener accepts."""

    def __init__(self, scheme: str, on_connection: OnConnection) -> None:
        self._scheme = scheme
        self._on_connection = on_connection
        self._bound = self._reachable = self._endpoint = ""
        self._file: SocketFile | None = None
        self._handlers: Handlers
        self._sockets = _Sockets(zmq.ROUTER, on_message=self._message, on_event=self._event, on_closed=self._closed)
        self._connections: dict[bytes, MessageConnection] = {}
        self._by_descriptor: dict[int, MessageConnection] = {}
        self._alive: set[int] = set()  # descriptors of sockets that are connected
        self._dead: list[MessageConnection] = []  # to be told so after the last of their messages
        self._closing = False
        self._unbound = asyncio.Event()
        self._gone = asyncio.Event()

    @property
    def bound(self) -> str:
        return self._bound

    @property
    def reachable(self) -> str:
        return self._reachable

    async def open_tcp(self, host: str, port: int, advertise: str | None) -> None:
        host = await _resolved(host, port)
        await self._sockets.open()
        if ":" in host:
            self._sockets.sock.set(zmq.IPV6, 1)
        self._bind(_endpoint(host, port or "*"))
        host, port = parse_host_port(self._endpoint)
        self._bound = format_host_port(self._scheme, host, port)
        self._reachable = reachable(self._scheme, host, port, advertise)
        self._handlers = Handlers(self._on_connection, self._bound)

    async def open_ipc(self, path: str) -> None:
        await self._sockets.open()
        self._file = SocketFile(path)
        if self._file.taken():  # ZeroMQ would replace it
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        self._bind(f"ipc://{self._file.path}")
        self._file.bound()
        self._bound = self._reachable = f"{self._scheme}:{self._file.path}"
        self._handlers = Handlers(self._on_connection, self._bound)

    async def close(self) -> None:
        if not self._closing:
            self._closing = True
            if self._endpoint:
                self._sockets.sock.unbind(self._endpoint)
            else:
                self._unbound.set()
        try:
            async with asyncio.timeout(UNBIND_SECONDS):
                await self._unbound.wait()  # ZeroMQ's own thread closes the socket, and removes its file
        except TimeoutError:
            pass
        if self._endpoint:
            await self._handlers.close()
        self._sockets.close()
        await self._gone.wait()
        if self._file is not None:
            self._file.remove()

    def _bind(self, endpoint: str) -> None:
        try:
            self._sockets.sock.bind(endpoint)
        except zmq.ZMQError as exc:
            raise OSError(exc.errno, exc.strerror) from exc
        last: Any = self._sockets.sock.last_endpoint
        self._endpoint = last.decode()

    def _message(self, message: Message) -> None:
        identity, kind, *parts = message
        connection = self._connections.get(identity.bytes)
        if connection is not None:
            connection.message(kind.bytes, [_owned(part) for part in parts])
        elif kind.bytes == HELLO:
            self._accept(identity.bytes, kind, [part.bytes for part in parts])

    def _accept(self, identity: bytes, hello: zmq.Frame, parts: list[bytes]) -> None:
        if self._closing or parts != [VERSION]:
            self._sockets.send([identity, RESET])
            return
        self._sockets.drain_events()  # all that happened before the dialer said hello
        descriptor = int(hello.get(zmq.SRCFD))
        connection = MessageConnection(
            self._bound,
            f"{self._scheme}:{_peer_host(hello)}#{next(_numbers)}",
            lambda parts: self._sockets.send([identity, *parts]),
            lambda gracefully: self._forget(identity, descriptor),
        )
        self._connections[identity] = connection
        if descriptor in self._by_descriptor:  # the dialer before it had the same one, so is gone
            self._bury(self._by_descriptor.pop(descriptor))
        if descriptor in self._alive:
            self._by_descriptor[descriptor] = connection
        else:
            self._bury(connection)
        self._sockets.send([identity, WELCOME])
        self._handlers.start(connection)

    def _event(self, event: int, descriptor: int) -> None:
        if event & OPENED:
            self._alive.add(descriptor)
        elif event & ENDED:
            self._alive.discard(descriptor)
            connection = self._by_descriptor.pop(descriptor, None)
            if connection is not None:
                self._bury(connection)
        elif event & UNBOUND:
            self._unbound.set()

    def _bury(self, connection: MessageConnection) -> None:
        self._dead.append(connection)
        asyncio.get_running_loop().call_soon(self._bury_dead)

    def _bury_dead(self) -> None:
        dead, self._dead = self._dead, []
        self._sockets.drain()  # what had arrived before
        for connection in dead:
            connection.lost("it closed the connection")

    def _forget(self, identity: bytes, descriptor: int) -> None:
        connection = self._connections.pop(identity)
        if self._by_descriptor.get(descriptor) is connection:
            del self._by_descriptor[descriptor]
        connection.gone.set()

    def _closed(self) -> None:
        self._gone.set()


# Transports


class ZmqTcpTransport:
    scheme = "zmq+tcp"
    capabilities = Capabilities(cross_host=True, cross_process=True)

    async def connect(self, address: str, *, timeout: float = 10.0) -> Connection:
        host, port = parse_host_port(address)
        async with dialling(address, timeout):
            return await _dial(address, _endpoint(await _resolved(host, port), port))

    async def listen(self, address: str, on_connection: OnConnection, *, advertise: str | None = None) -> Listener:
        host, port = parse_host_port(address, listening=True)
        reachable(self.scheme, host, port, advertise)  # refuses a bad name before anything is bound
        listener = ZmqListener(self.scheme, on_connection)
        return await _opened(listener, address, listener.open_tcp(host, port, advertise))


class ZmqIpcTransport:
    scheme = "zmq+ipc"
    capabilities = Capabilities(cross_host=False, cross_process=True)

    async def connect(self, address: str, *, timeout: float = 10.0) -> Connection:
        path = parse_path(address)
        async with dialling(address, timeout):
            return await _dial(address, f"ipc://{path}")

    async def listen(self, address: str, on_connection: OnConnection, *, advertise: str | None = None) -> Listener:
        """`advertise` has no meaning for a path and is ignored."""
        path = parse_path(address, listening=True)
        listener = ZmqListener(self.scheme, on_connection)
        return await _opened(listener, address, listener.open_ipc(path))


async def _dial(address: str, endpoint: str) -> MessageConnection:
    dialer = _Dialer(address, endpoint)
    try:
        await dialer.open()
    except BaseException:
        dialer.connection.abort()
        await dialer.connection.close()
        raise
    return dialer.connection


async def _opened(listener: ZmqListener, address: str, opening: Awaitable[None]) -> ZmqListener:
    try:
        await opening
    except OSError as exc:
        await listener.close()
        raise cannot_listen(address, exc) from exc
    except BaseException:
        await listener.close()
        raise
    return listener


async def _resolved(host: str, port: int) -> str:
    """The IP address of `host`; ZeroMQ would look it up in the thread that carries all connections."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return str(found[0][4][0])


def _endpoint(host: str, port: int | str) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _peer_host(frame: zmq.Frame) -> str:
    try:
        return str(frame.get("Peer-Address"))
    except zmq.ZMQError:  # a unix socket has none
        return ""


def _owned(part: zmq.Frame) -> Buffer:
    """The bytes of a received part: copied when small, else the memory that ZeroMQ received it in."""
    return part.buffer.toreadonly() if len(part) >= IN_PLACE_BYTES else part.bytes
