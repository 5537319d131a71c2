from __future__ import annotations

import ipaddress

import pytest

from nomad.errors import AddressError
from nomad.transport.address import (
    format_host_port,
    parse_host_port,
    parse_name,
    parse_path,
    reachable,
    scheme_of,
)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("tcp://host:7000", ("host", 7000)),
        ("tcp://127.0.0.1:1", ("127.0.0.1", 1)),
        ("tcp://[::1]:7000", ("::1", 7000)),
        ("tcp://:7000", ("127.0.0.1", 7000)),
        ("zmq+tcp://host:7000", ("host", 7000)),
    ],
)
def test_host_and_port(address: str, expected: tuple[str, int]) -> None:
    assert parse_host_port(address) == expected


def test_port_0_is_for_listening() -> None:
    assert parse_host_port("tcp://0.0.0.0:0", listening=True) == ("0.0.0.0", 0)
    with pytest.raises(AddressError, match="the address that the listener reports"):
        parse_host_port("tcp://host:0")


@pytest.mark.parametrize(
    ("address", "way_out"),
    [
        ("host:7000", "not of the form host://host:port"),
        ("tcp://host", "write tcp://host:port; port 0 picks a free one"),
        ("tcp://host:http", "write tcp://host:port"),
        ("tcp://host:70000", "write tcp://host:port"),
        ("tcp://host:-1", "write tcp://host:port"),
        ("tcp:host:1", "not of the form tcp://host:port"),
        ("tcp://host:1/path", "not of the form"),
        ("tcp://host:1?a=b", "not of the form"),
        ("tcp://me@host:1", "not of the form"),
        ("tcp://[::1:1", "write tcp://host:port"),
    ],
)
def test_bad_host_or_port(address: str, way_out: str) -> None:
    with pytest.raises(AddressError) as raised:
        parse_host_port(address, listening=True)
    assert way_out in str(raised.value)
    assert address in str(raised.value)


@pytest.mark.parametrize("address", ["", "host", "/path", "TCP://host:1", "://x"])
def test_no_scheme(address: str) -> None:
    with pytest.raises(AddressError, match="no scheme; write e.g. tcp://"):
        scheme_of(address)


def test_formatting_is_the_inverse_of_parsing() -> None:
    for host in ("host", "10.0.0.1", "::1"):
        assert parse_host_port(format_host_port("tcp", host, 5)) == (host, 5)


def test_paths() -> None:
    assert parse_path("unix:/run/a b.sock") == "/run/a b.sock"
    assert parse_path("zmq+ipc:/run/x") == "/run/x"
    assert parse_path("unix:", listening=True) == ""


@pytest.mark.parametrize(
    ("address", "way_out"),
    [
        ("unix:", "write unix:/path"),
        ("unix:relative", "must be absolute"),
        ("unix://run/x", "one slash"),
        ("unix:/a\0b", "zero byte"),
        ("unix:/" + "x" * 107, "has 108 bytes and the kernel takes 107; use a shorter folder"),
    ],
)
def test_bad_paths(address: str, way_out: str) -> None:
    with pytest.raises(AddressError, match=way_out):
        parse_path(address)


def test_names() -> None:
    assert parse_name("inproc:a/b") == "a/b"
    assert parse_name("inproc:", listening=True) == ""
    with pytest.raises(AddressError, match="write inproc:name"):
        parse_name("inproc:")


@pytest.mark.parametrize(
    ("host", "advertise", "expected"),
    [
        ("10.1.2.3", None, "tcp://10.1.2.3:5"),
        ("10.1.2.3", "pod.example", "tcp://pod.example:5"),
        ("0.0.0.0", "10.9.9.9", "tcp://10.9.9.9:5"),
        ("::", "::1", "tcp://[::1]:5"),
        ("::", "[::1]", "tcp://[::1]:5"),
    ],
)
def test_what_peers_dial(host: str, advertise: str | None, expected: str) -> None:
    assert reachable("tcp", host, 5, advertise) == expected


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_all_interfaces_are_reached_at_an_address_of_this_machine(host: str) -> None:
    found, port = parse_host_port(reachable("tcp", host, 5, None))
    assert port == 5
    assert not ipaddress.ip_address(found).is_unspecified


@pytest.mark.parametrize("advertise", ["", "host:80", "tcp://host", "a/b"])
def test_bad_advertise(advertise: str) -> None:
    with pytest.raises(AddressError, match="without a port"):
        reachable("tcp", "10.0.0.1", 5, advertise)
