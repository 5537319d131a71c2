"""`zmq+tcp://host:port` and `zmq+ipc:/path`: connections over ZeroMQ.

Found by `nomad.transport.registry`. A listener is a ROUTER socket, each dialer a DEALER of its own; the
conversation between them is `nomad.transport.messages`. Peers that go without a word are noticed by the
monitors of the sockets. Only this file and `zmqsockets` import a ZeroMQ library.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import socket
from collections.abc import Awaitable
from typing import Any

import zmq

from nomad.errors import ConnectionBroken
from nomad.transport.address import format_host_port, parse_host_port, parse_path, reachable
from nomad.transport.base import Buffer, Capabilities, Connection, Listener, OnConnection
from nomad.transport.framing import IN_PLACE_BYTES
from nomad.transport.listening import Handlers
from nomad.transport.mapping import cannot_listen, dialling
from nomad.transport.messages import HELLO, RESET, VERSION, WELCOME, MessageConnection
from nomad.transport.unixfiles import SocketFile
from nomad.transport.zmqsockets import ENDED, OPENED, REFUSED, UNBOUND, Message, Sockets

LINGER = 1_000
"""Milliseconds for the last word of a dialer that closes in peace; spent by ZeroMQ's own thread."""
UNBIND_SECONDS = 1.0
"""How long a listener waits for ZeroMQ's thread to close its socket."""

_numbers = itertools.count(1)


# Connections


class _Dialer:
    """The DEALER socket of one connection."""

    def __init__(self, address: str, endpoint: str) -> None:
        self._endpoint = endpoint
        self._address = address
        self._sockets = Sockets(zmq.DEALER, on_message=self._message, on_event=self._event, on_closed=self._closed)
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
        self._sockets = Sockets(zmq.ROUTER, on_message=self._message, on_event=self._event, on_closed=self._closed)
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
