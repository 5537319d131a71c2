"""Addresses of transports: parsing, formatting, and what peers should dial.

    tcp://host:port     tcp://[::1]:port     tcp://:port (loopback)     zmq+tcp://host:port
    unix:/path          unix: (a free one)   inproc:name                zmq+ipc:/path

A listener has two addresses: the *bound* one, and the *reachable* one that others dial; they differ
when it is bound to all interfaces, or behind a name (`advertise`). Everything here raises
`AddressError` with a sentence that names the way out. No I/O but asking the kernel for this
machine's own address.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from urllib.parse import urlsplit

from nomad.errors import AddressError

LOOPBACK = "127.0.0.1"
MAX_UNIX_PATH = 107
"""Bytes that the kernel keeps for the path of a unix socket."""

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):")


def scheme_of(address: str) -> str:
    """The scheme of `address`, e.g. `tcp`."""
    match = _SCHEME.match(address)
    if match is None:
        raise AddressError(f"{address!r} has no scheme; write e.g. tcp://host:port or unix:/path")
    return match[1]


def parse_host_port(address: str, *, listening: bool = False) -> tuple[str, int]:
    """Host and port of `scheme://host:port`; without a host, loopback. Port 0 is for listening only."""
    scheme = scheme_of(address)
    example = f"{scheme}://host:port"
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError as exc:
        raise AddressError(f"{address!r}: {exc}; write {example}") from exc
    if not address.startswith(f"{scheme}://") or parts.path or parts.query or parts.fragment or "@" in parts.netloc:
        raise AddressError(f"{address!r} is not of the form {example}")
    if port is None:
        hint = "; port 0 picks a free one" if listening else ""
        raise AddressError(f"{address!r} has no port; write {example}{hint}")
    if port == 0 and not listening:
        raise AddressError(f"{address!r}: port 0 can't be dialled; use the address that the listener reports")
    return host or LOOPBACK, port


def format_host_port(scheme: str, host: str, port: int) -> str:
    """The address of `host` and `port`, IPv6 hosts in brackets."""
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def parse_path(address: str, *, listening: bool = False) -> str:
    """The absolute path of `scheme:/path`; may be empty (pick a free one) for listening only."""
    scheme = scheme_of(address)
    path = address.removeprefix(f"{scheme}:")
    if path.startswith("//"):
        raise AddressError(f"{address!r}: write {scheme}:/path, with one slash")
    if not path:
        if listening:
            return ""
        raise AddressError(f"{address!r} has no path; write {scheme}:/path")
    if not path.startswith("/"):
        raise AddressError(f"{address!r}: the path must be absolute; write {scheme}:/path")
    if "\0" in path:
        raise AddressError(f"{address!r}: a path can't hold a zero byte")
    size = len(path.encode(errors="surrogateescape"))
    if size > MAX_UNIX_PATH:
        raise AddressError(
            f"the path of {address!r} has {size} bytes and the kernel takes {MAX_UNIX_PATH}; use a shorter folder"
        )
    return path


def parse_name(address: str, *, listening: bool = False) -> str:
    """The name of `scheme:name`; may be empty (pick a free one) for listening only."""
    scheme = scheme_of(address)
    name = address.removeprefix(f"{scheme}:")
    if not name and not listening:
        raise AddressError(f"{address!r} has no name; write {scheme}:name")
    return name


def reachable(scheme: str, host: str, port: int, advertise: str | None) -> str:
    """The address that peers should dial for a listener bound to `host` and `port`.

    `advertise`, a host name or IP address without a port, replaces the host. Without it a listener
    on all interfaces is dialled at this machine's own address.
    """
    if advertise is not None:
        bare = advertise.removeprefix("[").removesuffix("]")
        if not bare or "/" in bare or (":" in bare and not _is_ip(bare)):
            raise AddressError(f"advertise={advertise!r} must be a host name or an IP address, without a port")
        return format_host_port(scheme, bare, port)
    if _is_ip(host) and ipaddress.ip_address(host).is_unspecified:
        host = _own_address(socket.AF_INET6 if ":" in host else socket.AF_INET)
    return format_host_port(scheme, host, port)


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _own_address(family: socket.AddressFamily) -> str:
    """The address this machine would send from; nothing is sent. Loopback where there is no network."""
    v6 = family == socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("2001:db8::1" if v6 else "192.0.2.1", 9))  # addresses reserved for documentation
        except OSError:
            return "::1" if v6 else LOOPBACK
        return str(probe.getsockname()[0])
