"""`tcp://host:port` and `unix:/path`: the stream transports.

Found by `nomad.transport.registry`; `nomad.transport.tls` builds on them. Sockets are made and bound here,
everything else is in `nomad.transport.stream`. A unix socket is for its owner alone (mode 0600), and is removed when
its listener closes.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from nomad.transport.address import format_host_port, parse_host_port, parse_path, reachable, scheme_of
from nomad.transport.base import Capabilities, Connection, Listener, OnConnection
from nomad.transport.listening import Handlers
from nomad.transport.mapping import cannot_listen, dialling
from nomad.transport.stream import StreamConnection
from nomad.transport.unixfiles import SocketFile

BACKLOG = 128
UNIX_BUFFER_BYTES = 1 << 19
"""Kernel buffers of unix sockets, which the kernel doubles. Its usual 208 KiB cost four switches between the processes
per frame of 900 KB, and a fifth to a third of the throughput where both have a core; above 1 MiB what is under way
falls out of the processor's caches, which costs CPU."""
KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
"""Half a minute until a peer that vanished without a word is noticed on an idle connection."""


class TcpTransport:
    scheme = "tcp"
    capabilities = Capabilities(cross_host=True, cross_process=True)

    async def connect(self, address: str, *, timeout: float = 10.0) -> Connection:
        host, port = parse_host_port(address)
        async with dialling(address, timeout):
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: StreamConnection(set_up_tcp), host, port
            )
        return connection

    async def listen(self, address: str, on_connection: OnConnection, *, advertise: str | None = None) -> Listener:
        sock, bound, dialled = await bound_for(address, advertise)
        handlers = Handlers(on_connection, bound)
        server = await asyncio.get_running_loop().create_server(
            lambda: StreamConnection(set_up_tcp, handlers.start), sock=sock, backlog=BACKLOG
        )
        return StreamListener(server, handlers, bound, dialled)


class UnixTransport:
    scheme = "unix"
    capabilities = Capabilities(cross_host=False, cross_process=True)

    async def connect(self, address: str, *, timeout: float = 10.0) -> Connection:
        path = parse_path(address)
        async with dialling(address, timeout):
            _, connection = await asyncio.get_running_loop().create_unix_connection(
                lambda: StreamConnection(_set_up_unix), path
            )
        return connection

    async def listen(self, address: str, on_connection: OnConnection, *, advertise: str | None = None) -> Listener:
        """`advertise` has no meaning for a path and is ignored."""
        path = parse_path(address, listening=True)
        file = SocketFile(path)
        bound = f"{self.scheme}:{file.path}"
        try:
            sock = _bound_socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, file.path)
        except OSError as exc:
            file.remove()
            raise cannot_listen(bound, exc) from exc
        file.bound()  # nobody can connect before the socket listens
        handlers = Handlers(on_connection, bound)
        server = await asyncio.get_running_loop().create_unix_server(
            lambda: StreamConnection(_set_up_unix, handlers.start), sock=sock, backlog=BACKLOG
        )
        return StreamListener(server, handlers, bound, bound, file.remove)


class StreamListener:
    """`nomad.transport.base.Listener` around a server of the event loop."""

    def __init__(
        self,
        server: asyncio.AbstractServer,
        handlers: Handlers,
        bound: str,
        reachable: str,
        clean_up: Callable[[], None] = lambda: None,
    ) -> None:
        self._server = server
        self._handlers = handlers
        self._bound = bound
        self._reachable = reachable
        self._clean_up = clean_up

    @property
    def bound(self) -> str:
        return self._bound

    @property
    def reachable(self) -> str:
        return self._reachable

    async def close(self) -> None:
        self._server.close()  # not wait_closed: it waits for the connection of a handler that closes its listener
        self._clean_up()
        await self._handlers.close()


async def bound_for(address: str, advertise: str | None) -> tuple[socket.socket, str, str]:
    """A socket bound to `scheme://host:port`, the address that this is, and the one that peers should dial.

    Raises `TransportError` or `AddressError`.
    """
    scheme = scheme_of(address)
    host, port = parse_host_port(address, listening=True)
    reachable(scheme, host, port, advertise)  # refuses a bad name before anything is bound
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, proto, _, sockaddr = found[0]
        sock = _bound_socket(family, kind, proto, sockaddr)
    except OSError as exc:
        raise cannot_listen(address, exc) from exc
    host, port = sock.getsockname()[:2]
    return sock, format_host_port(scheme, host, port), reachable(scheme, host, port, advertise)


def _bound_socket(family: int, kind: int, proto: int, sockaddr: object) -> socket.socket:
    sock = socket.socket(family, kind, proto)
    try:
        if family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(sockaddr)  # type: ignore[arg-type]
    except BaseException:
        sock.close()
        raise
    return sock


def set_up_tcp(transport: asyncio.Transport, scheme: str = "tcp") -> tuple[str, str]:
    """Set the options of a new stream's socket; its local and peer address."""
    sock = transport.get_extra_info("socket")
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    names = [transport.get_extra_info(end) for end in ("sockname", "peername")]
    gone = f"{scheme}:"
    local, peer = [format_host_port(scheme, *name[:2]) if name else gone for name in names]
    return local, peer


def break_unanswered(connection: Connection, seconds: float) -> None:
    """Have a connection break when what was sent over it isn't acknowledged for so long, where the kernel can do that.

    TCP itself tries for a quarter of an hour, and keep-alive doesn't help: it waits while something is on its way. Not
    for connections whose other end may leave what comes unread for as long (RFC 5482, and Linux counts that, too).
    """
    if isinstance(connection, StreamConnection) and hasattr(socket, "TCP_USER_TIMEOUT"):
        connection.set_option(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(seconds * 1e3))


def arriving(connection: Connection) -> int:
    """Another number than a moment ago while a large frame is coming; 0 where that can't be told."""
    return connection.unread if isinstance(connection, StreamConnection) else 0


def _set_up_unix(transport: asyncio.Transport) -> tuple[str, str]:
    sock = transport.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNIX_BUFFER_BYTES)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, UNIX_BUFFER_BYTES)
    local, peer = transport.get_extra_info("sockname"), transport.get_extra_info("peername")
    return f"unix:{local or ''}", f"unix:{peer or ''}"
