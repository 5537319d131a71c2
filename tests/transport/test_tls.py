"""What only TLS can get wrong: certificates that don't fit, are renewed or missing, and streams that end in between."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest

from nomad.errors import AddressError, CertificateError, ConnectionBroken
from nomad.transport import certificates, tls
from nomad.transport.base import Frame
from nomad.transport.certificates import MASTER, POD, Credentials, Identity
from nomad.transport.framing import END, encode
from nomad.transport.registry import connect
from nomad.transport.stream import StreamConnection
from nomad.transport.tcp import TcpTransport
from nomad.transport.tls import TlsTransport
from tests.certificates import authority, now, put
from tests.contract.transport import dropped, listening, plain, some_bytes, soon, take, take_all

HERE = "tls://127.0.0.1:0"


@pytest.fixture(autouse=True)
def own_choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(certificates.VARIABLE, raising=False)
    yield
    tls.use(None)


async def refusal(address: str) -> str:
    """Why a connection to `address` doesn't come about, or ends without a frame."""
    try:
        connection = await connect(address)
    except ConnectionBroken as exc:
        return str(exc)
    with pytest.raises(ConnectionBroken) as caught:
        await soon(connection.recv())
    await dropped(connection)
    return str(caught.value)


# Who is who


async def test_a_master_says_in_its_address_that_it_must_prove_to_be_one(tmp_path: Path) -> None:
    ca = authority()
    tls.use(put(tmp_path / "master", ca, MASTER))
    async with listening(TlsTransport(), HERE) as (listener, accepted):
        assert listener.reachable.startswith("tls://master@127.0.0.1:")
        assert listener.bound.startswith("tls://127.0.0.1:")
        tls.use(put(tmp_path / "pod", ca, POD))
        connection = await connect(listener.reachable)
        assert connection.peer == listener.reachable
        connection.write([(b"hello",)])
        assert plain(await take(await soon(accepted.get()), 1)) == [(b"hello",)]
        await dropped(connection)


async def test_a_pods_certificate_cannot_play_the_master(tmp_path: Path) -> None:
    tls.use(put(tmp_path, authority(), POD))
    async with listening(TlsTransport(), HERE) as (listener, _):
        address = listener.reachable.replace("tls://", "tls://master@")
        assert "that of a pod, not of a master" in await refusal(address)


async def test_another_ca_is_refused_by_either_side(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours, other = authority(), authority()
    tls.use(put(tmp_path / "ours", ours))
    async with listening(TlsTransport(), HERE) as (listener, accepted):
        tls.use(put(tmp_path / "stranger", other))
        assert "certificate is refused" in await refusal(listener.reachable)
        tls.use(put(tmp_path / "trusting", other, trusted=ours.certificate))
        assert "perhaps it refused this side's certificate" in await refusal(listener.reachable)
        assert accepted.empty(), "a stranger was handed on"
        assert "because of its certificate: self-signed certificate in" in caplog.text or "unable to get" in caplog.text


async def test_another_namespace_is_refused_by_either_side(tmp_path: Path) -> None:
    ca = authority()
    tls.use(put(tmp_path / "ours", ca))
    async with listening(TlsTransport(), HERE) as (listener, accepted):
        tls.use(put(tmp_path / "theirs", ca, namespace="theirs"))
        assert "of the namespace 'test', not of 'theirs'" in await refusal(listener.reachable)
        assert accepted.empty()


async def test_who_has_no_certificate_is_refused(tmp_path: Path) -> None:
    ca = authority()
    tls.use(put(tmp_path, ca))
    async with listening(TlsTransport(), HERE) as (listener, accepted):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.load_verify_locations(tmp_path / "ca.crt")
        reader, writer = await asyncio.open_connection("127.0.0.1", int(listener.bound.rpartition(":")[2]), ssl=context)
        assert await soon(reader.read()) == b""
        writer.transport.abort()
        assert accepted.empty()


async def test_older_tls_is_refused(tmp_path: Path) -> None:
    folder = put(tmp_path, authority())
    tls.use(folder)
    async with listening(TlsTransport(), HERE) as (listener, _):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.load_verify_locations(folder / "ca.crt")
        context.load_cert_chain(folder / "tls.crt", folder / "tls.key")
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises(ConnectionResetError):
            await asyncio.open_connection("127.0.0.1", int(listener.bound.rpartition(":")[2]), ssl=context)


async def test_who_speaks_no_tls_is_dropped(tmp_path: Path) -> None:
    tls.use(put(tmp_path, authority()))
    async with listening(TlsTransport(), HERE) as (listener, accepted):
        with closing(socket.create_connection(("127.0.0.1", int(listener.bound.rpartition(":")[2])))) as sock:
            sock.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(sock, b"".join(encode([(b"plain",)])))
            try:
                while await soon(loop.sock_recv(sock, 1000)):
                    pass
            except ConnectionResetError:
                pass
        assert accepted.empty()


async def test_a_listener_without_tls_is_not_talked_to(tmp_path: Path) -> None:
    tls.use(put(tmp_path, authority()))

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 hello\r\n")
        writer.close()

    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    assert "TLS failed" in await refusal(f"tls://127.0.0.1:{port}")
    server.close()


# Certificates as files


async def test_without_certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CertificateError, match="set NOMAD_TLS"):
        await connect("tls://127.0.0.1:1")
    monkeypatch.setenv(certificates.VARIABLE, str(tmp_path / "none"))
    with pytest.raises(CertificateError, match=r"there is no .*none/tls.crt"):
        await connect("tls://127.0.0.1:1")
    monkeypatch.setenv(certificates.VARIABLE, str(put(tmp_path / "some", authority())))
    async with listening(TlsTransport(), HERE) as (listener, _):
        await dropped(await connect(listener.reachable))


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    folder = put(tmp_path / "a", authority())
    key = folder / "tls.key"
    key.unlink()
    key.write_bytes((put(tmp_path / "b", authority()) / "tls.key").read_bytes())
    with pytest.raises(CertificateError, match="can't be used"):
        Credentials(folder).client()
    (folder / "tls.crt").unlink()
    (folder / "tls.crt").write_text("nonsense")
    with pytest.raises(CertificateError, match="can't be used"):
        Credentials(folder).client()


async def test_a_certificate_that_has_expired(tmp_path: Path) -> None:
    ca = authority()
    long_ago = now() - timedelta(days=30)
    tls.use(put(tmp_path / "expired", ca, at=long_ago))
    with pytest.raises(CertificateError, match=r"expired at \d{4}-"):
        await connect("tls://127.0.0.1:1")
    async with listening(TlsTransport(), HERE) as (listener, _):
        tls.use(put(tmp_path / "fine", ca))
        assert "certificate has expired" in await refusal(listener.reachable)


async def test_a_stream_that_cannot_be_secured_is_still_its_owners(tmp_path: Path) -> None:
    tls.use(put(tmp_path / "expired", authority(), at=now() - timedelta(days=30)))
    async with listening(TcpTransport(), "tcp://127.0.0.1:0") as (listener, accepted):
        connection = await connect(listener.reachable)
        other = await soon(accepted.get())
        assert isinstance(connection, StreamConnection)
        with pytest.raises(CertificateError, match="expired at"):
            await tls.secured(connection, server=False)
        connection.write([(b"hello",)])
        assert plain(await take(other, 1)) == [(b"hello",)]
        await dropped(connection)
        with pytest.raises(ConnectionBroken):
            await soon(other.recv())


async def test_renewed_without_a_restart(tmp_path: Path) -> None:
    """One CA takes over from another while a listener and a connection stand; both go on."""
    first, second = authority(), authority()
    both = first.certificate + second.certificate
    tls.use(put(tmp_path, first))
    async with listening(TlsTransport(), HERE) as (listener, accepted):
        old = await connect(listener.reachable)
        old_far = await soon(accepted.get())
        for trusted, ca in [(both, first), (both, second), (second.certificate, second)]:
            put(tmp_path, ca, trusted=trusted)
            connection = await connect(listener.reachable)
            connection.write([(b"new",)])
            assert plain(await take(await soon(accepted.get()), 1)) == [(b"new",)]
            await dropped(connection)
        old.write([(b"still here",)])
        assert plain(await take(old_far, 1)) == [(b"still here",)]
        tls.use(put(tmp_path / "late", first, trusted=both))
        assert "perhaps it refused" in await refusal(listener.reachable)
        await dropped(old)


async def test_half_written_files_leave_those_before_in_use(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tls.use(put(tmp_path, authority()))
    async with listening(TlsTransport(), HERE) as (listener, _):
        await dropped(await connect(listener.reachable))
        os.unlink(tmp_path / "tls.key")
        for _ in range(2):
            await dropped(await connect(listener.reachable))
        assert caplog.text.count("stay in use") == 1


def test_identities() -> None:
    assert Identity.of(Identity("edge-lab", "master").uri) == Identity("edge-lab", "master")
    for other in ("spiffe://other/x/y", "spiffe://nomad/x", "spiffe://nomad/x/y/z", "spiffe://nomad//y", "http://x"):
        assert Identity.of(other) is None


@pytest.mark.parametrize("address", ["tls://@host:1", "tls://a b@host:1", "tls://host", "tls://user:word@host:1"])
async def test_bad_addresses(address: str) -> None:
    with pytest.raises(AddressError):
        await connect(address)


# Streams


class Raw:
    """A TLS stream of bytes at one end, Nomad at the other."""

    def __init__(self, folder: Path) -> None:
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.context.check_hostname = False
        self.context.load_verify_locations(folder / "ca.crt")
        self.context.load_cert_chain(folder / "tls.crt", folder / "tls.key")

    async def dial(self, bound: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", int(bound.rpartition(":")[2]), ssl=self.context)


async def test_byte_by_byte_and_the_end(tmp_path: Path) -> None:
    folder = put(tmp_path, authority())
    tls.use(folder)
    frames: list[Frame] = [(b"a",), (b"head", b"", b"part"), (b"",), (b"large", some_bytes(70_000))]
    stream = b"".join(encode(frames))
    async with listening(TlsTransport(), HERE) as (listener, accepted):
        _, writer = await Raw(folder).dial(listener.bound)
        far = await soon(accepted.get())
        for byte in stream[:40]:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0)
        writer.write(stream[40:])
        for byte in END:
            writer.write(bytes([byte]))
            await writer.drain()
        assert plain(await take_all(far)) == frames
        with pytest.raises(ConnectionBroken, match="closed the connection$"):
            await far.recv()
        writer.transport.abort()


async def test_cut_off_in_the_middle_of_a_frame(tmp_path: Path) -> None:
    folder = put(tmp_path, authority())
    tls.use(folder)
    stream = b"".join(encode([(b"whole",), (b"half", some_bytes(1000))]))
    async with listening(TlsTransport(), HERE) as (listener, accepted):
        _, writer = await Raw(folder).dial(listener.bound)
        far = await soon(accepted.get())
        writer.write(stream[:-1])
        await writer.drain()
        assert plain(await take(far, 1)) == [(b"whole",)]
        writer.transport.abort()
        assert await take_all(far) == []
