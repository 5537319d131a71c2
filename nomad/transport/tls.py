"""`tls://host:port`: the stream transport over TLS 1.3, both ends proven by certificates.

Found by `nomad.transport.registry`. `tls://master@host:port` dials a peer that must prove the role `master`: what a
listener whose own role isn't the usual `pod` says of itself. A peer of another namespace is refused on both sides.
Whose certificates: `use(folder)`, else the environment variable NOMAD_TLS (`nomad.transport.certificates`).

In TLS 1.3 the dialer is done before the listener has looked at its certificate, and event loops hang up without a
word then. So a dialer that is refused finds its new connection broken; the listener's log says why.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nomad.errors import AddressError, ConnectionBroken
from nomad.transport.address import parse_host_port
from nomad.transport.base import Connection, Listener, OnConnection
from nomad.transport.certificates import POD, Identity, credentials, identity_of_peer, use
from nomad.transport.listening import Handlers
from nomad.transport.mapping import dialling
from nomad.transport.stream import StreamConnection
from nomad.transport.tcp import BACKLOG, StreamListener, TcpTransport, bound_for, set_up_tcp

__all__ = ["TlsTransport", "use"]

HANDSHAKE_SECONDS = 10.0
"""For so long an accepted connection may take to prove itself."""

TURN_SECONDS = 3600.0
"""For so long the one end of a stream may wait for the other one to begin with TLS."""

_ROLE = re.compile(r"tls://(?:(?P<role>[a-z]+)@)?(?P<rest>.*)", re.DOTALL)


class TlsTransport(TcpTransport):
    scheme = "tls"

    async def connect(self, address: str, *, timeout: float = 10.0) -> Connection:
        """Also raises `CertificateError` when this side has no certificates that can be used."""
        role, plain = _parts(address)
        host, port = parse_host_port(plain)
        own = credentials()
        with _explained(address):
            async with dialling(address, timeout):
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: TlsConnection(own.identity, role=role),
                    host,
                    port,
                    ssl=own.client(),
                    server_hostname="",
                    ssl_handshake_timeout=timeout,
                )
        if connection.refused is not None:
            connection.abort()
            await connection.close()
            raise ConnectionBroken(connection.refused)
        return connection

    async def listen(self, address: str, on_connection: OnConnection, *, advertise: str | None = None) -> Listener:
        """Also raises `CertificateError` when this side has no certificates that can be used."""
        own = credentials()
        context, identity = own.server(), own.identity
        sock, bound, reachable = await bound_for(_parts(address)[1], advertise)
        handlers = Handlers(on_connection, bound)
        server = await asyncio.get_running_loop().create_server(
            lambda: TlsConnection(own.identity, handlers.start),
            sock=sock,
            backlog=BACKLOG,
            ssl=context,
            ssl_handshake_timeout=HANDSHAKE_SECONDS,
        )
        return StreamListener(server, handlers, bound, _address(identity.role, reachable))


async def secured(connection: StreamConnection, *, server: bool) -> TlsConnection:
    """TLS over a stream that stands, whose other end does the same as the other side; `connection` is used up.

    It must be this side's turn to speak, or nobody's. As the `server` it waits for `TURN_SECONDS`. Raises
    `TransportError`, and `CertificateError`, which leaves `connection` as it was.
    """
    own = credentials()
    context = own.server_now() if server else own.client()
    made = TlsConnection(own.identity)
    transport = connection.release()
    made._transport = transport  # it may be lost before it is made
    try:
        with _explained(connection.peer):
            async with dialling(connection.peer, TURN_SECONDS if server else HANDSHAKE_SECONDS):
                inner = await asyncio.get_running_loop().start_tls(
                    transport,
                    made,
                    context,
                    server_side=server,
                    ssl_handshake_timeout=TURN_SECONDS if server else HANDSHAKE_SECONDS,
                )
    except BaseException:
        transport.abort()
        raise
    if inner is None:
        raise ConnectionBroken(f"{connection.peer} is gone")
    made.connection_made(inner)
    if made.refused is not None:
        raise ConnectionBroken(made.refused)
    return made


class TlsConnection(StreamConnection):
    """A stream whose peer has proven who it is."""

    def __init__(
        self, own: Identity, on_open: Callable[[StreamConnection], None] | None = None, *, role: str | None = None
    ) -> None:
        """`role`: the one that the peer must have, None for any."""
        super().__init__(lambda transport: set_up_tcp(transport, "tls"), on_open)
        self._own = own
        self._role = role
        self._heard = False
        """Whether anything came, so that it did accept this side's certificate."""
        self.refused: str | None = None
        """Why this peer isn't talked to."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        problem = self._problem(identity_of_peer(transport.get_extra_info("peercert")))
        if problem is not None:
            self._on_open = None
        super().connection_made(transport)
        self._peer = _address(self._role or POD, self._peer)
        if problem is not None:
            self.refused = f"{self._peer} can't be talked to: {problem}"
            self._break(self.refused)

    def connection_lost(self, exc: BaseException | None) -> None:
        if isinstance(exc, ssl.SSLError):
            exc = ConnectionError(_reason(exc))
        if not self._heard:
            exc = ConnectionError(f"{exc or 'it closed the connection'}; perhaps it refused this side's certificate")
        super().connection_lost(exc)

    def eof_received(self) -> None:
        if self._heard:  # else `connection_lost` follows, and says more
            super().eof_received()

    def buffer_updated(self, nbytes: int) -> None:
        self._heard = True
        super().buffer_updated(nbytes)

    def _problem(self, found: Identity | None) -> str | None:
        if found is None:
            return "its certificate doesn't say whose it is"
        if found.namespace != self._own.namespace:
            return f"its certificate is of the namespace {found.namespace!r}, not of {self._own.namespace!r}"
        if self._role not in (None, found.role):
            return f"its certificate is that of a {found.role}, not of a {self._role}"
        return None


def _parts(address: str) -> tuple[str | None, str]:
    """The role that is asked for, and the address without it."""
    match = _ROLE.fullmatch(address)
    if match is None:
        raise AddressError(f"{address!r} is not of the form tls://host:port or tls://role@host:port")
    return match["role"], f"tls://{match['rest']}"


def _address(role: str, plain: str) -> str:
    """`plain`, with the role unless it is the usual one."""
    return plain if role == POD else plain.replace("tls://", f"tls://{role}@", 1)


@contextmanager
def _explained(address: str) -> Iterator[None]:
    """TLS's errors in the block are raised as `ConnectionBroken` with a sentence."""
    try:
        yield
    except ConnectionBroken as exc:
        if isinstance(exc.__cause__, ssl.SSLError):
            raise ConnectionBroken(f"{address} can't be talked to: {_reason(exc.__cause__)}") from exc.__cause__
        raise


def _reason(exc: ssl.SSLError) -> str:
    """What went wrong, in words."""
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"its certificate is refused: {exc.verify_message}"
    if isinstance(exc, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return "it closed the connection"
    return f"TLS failed: {(exc.reason or str(exc)).replace('_', ' ').lower()}"
