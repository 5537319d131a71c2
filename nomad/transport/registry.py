"""From an address to the transport that carries it.

Nomad's own transports are imported when first asked for, so that e.g. ZeroMQ is loaded by those who
use it. Any other package adds one by an entry point in the group `nomad.transports`, whose name is
the scheme and whose value is a `nomad.transport.base.Transport` or a class of one:

    [project.entry-points."nomad.transports"]
    quic = "my_package:QuicTransport"
"""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points

from nomad.errors import AddressError
from nomad.transport.address import scheme_of
from nomad.transport.base import Connection, Listener, OnConnection, Transport

GROUP = "nomad.transports"

_OWN = {
    "inproc": "nomad.transport.inproc:InprocTransport",
    "tcp": "nomad.transport.tcp:TcpTransport",
    "tls": "nomad.transport.tls:TlsTransport",
    "unix": "nomad.transport.tcp:UnixTransport",
    "zmq+ipc": "nomad.transport.zmq:ZmqIpcTransport",
    "zmq+tcp": "nomad.transport.zmq:ZmqTcpTransport",
}
_loaded: dict[str, Transport] = {}


def schemes() -> list[str]:
    """All schemes that can be used here, sorted."""
    return sorted({*_OWN, *entry_points(group=GROUP).names})


def transport_for(address: str) -> Transport:
    """The transport of `address`; raises `AddressError` when there is none."""
    scheme = scheme_of(address)
    if scheme not in _loaded:
        _loaded[scheme] = _load(scheme, address)
    return _loaded[scheme]


async def connect(address: str, *, timeout: float = 10.0) -> Connection:
    """Dial `address`; see `Transport.connect`."""
    return await transport_for(address).connect(address, timeout=timeout)


async def listen(address: str, on_connection: OnConnection, *, advertise: str | None = None) -> Listener:
    """Bind `address`; see `Transport.listen`."""
    return await transport_for(address).listen(address, on_connection, advertise=advertise)


def _load(scheme: str, address: str) -> Transport:
    if scheme in _OWN:
        module, _, name = _OWN[scheme].partition(":")
        found = getattr(importlib.import_module(module), name)
    else:
        found = _load_foreign(scheme, address)
    transport: Transport = found() if isinstance(found, type) else found
    return transport


def _load_foreign(scheme: str, address: str) -> object:
    for entry in entry_points(group=GROUP, name=scheme):
        try:
            return entry.load()
        except (ImportError, AttributeError) as exc:
            raise AddressError(f"{address!r}: the transport {scheme!r} ({entry.value}) can't be loaded: {exc}") from exc
    raise AddressError(
        f"{address!r}: no transport is called {scheme!r}; there are {', '.join(schemes())}; "
        f"packages add others by the entry-point group {GROUP!r}"
    )
