"""How a cluster is found and who asks: kubeconfigs, service accounts, and what is left of connections at the end."""

from __future__ import annotations

import asyncio
import json
import ssl
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from aiohttp import web

from nomad.actor.threads import new_loop
from nomad.errors import ApiUnauthorized, ApiUnavailable, UsageError
from nomad.kubernetes import kubeconfig, login
from nomad.kubernetes.api import Api
from nomad.kubernetes.kubeconfig import PACKAGE, Access
from tests.kubernetes.cluster.envtest import write_kubeconfig
from tests.kubernetes.cluster.pki import Authority


class Server:
    """An HTTPS server that tells who has asked, and lets only those in that have one of `tokens`."""

    def __init__(self, authority: Authority, folder: Path) -> None:
        self.tokens = {"Bearer right"}
        self.refused: set[str] = set()
        self.asked: list[dict[str, Any]] = []
        self.port = 0
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(authority.certificate))
        self._context.verify_mode = ssl.CERT_OPTIONAL
        self._context.load_cert_chain(*authority.issue("server", "server", addresses=["127.0.0.1", "elsewhere"]))
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Server:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=self._context).start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        assert request.transport is not None
        shown = request.transport.get_extra_info("peercert")
        by = {key: value for part in (shown or {}).get("subject", ()) for key, value in part}.get("commonName")
        token = request.headers.get("Authorization", "")
        self.asked.append({"by": by, "token": token, "query": dict(request.query)})
        if (token not in self.tokens and by is None) or by in self.refused:
            return web.json_response({"message": "who are you?"}, status=401)
        return web.json_response({"by": by, "body": await request.text()})


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "pki")


@pytest.fixture
async def server(authority: Authority, tmp_path: Path) -> AsyncIterator[Server]:
    async with Server(authority, tmp_path) as server:
        yield server


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has imported Kubernetes' client in this process, as in a master's."""
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        monkeypatch.delitem(sys.modules, name)


def config(file: Path, cluster: dict[str, Any], user: dict[str, Any]) -> Path:
    """A kubeconfig with two contexts: this one, and `other`."""
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": cluster}, {"name": "o", "cluster": {"server": "https://other:1/"}}],
        "users": [{"name": "u", "user": user}, {"name": "n", "user": {}}],
        "contexts": [
            {"name": "this", "context": {"cluster": "c", "user": "u"}},
            {"name": "other", "context": {"cluster": "o", "user": "n"}},
        ],
        "current-context": "this",
    }
    file.write_text(yaml.safe_dump(content))
    return file


def plugin(file: Path, body: str) -> dict[str, Any]:
    """A user whose credentials a program makes."""
    file.write_text(body)
    found = {"apiVersion": "client.authentication.k8s.io/v1", "command": sys.executable, "args": [str(file)]}
    return {"exec": found}


TOKEN = """
import json, pathlib
file = pathlib.Path(__file__).with_suffix(".count")
count = int(file.read_text()) + 1 if file.exists() else 1
file.write_text(str(count))
status = {"token": "right" if count > 1 else "old"}
print(json.dumps({"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": status}))
"""


async def test_a_kubeconfig_is_read_without_the_clients_models(
    authority: Authority, tmp_path: Path, alone: None
) -> None:
    certificate, key = authority.issue("user", "somebody")
    cluster = {"server": "https://127.0.0.1:6443/", "certificate-authority": str(authority.certificate)}
    cluster |= {"tls-server-name": "elsewhere", "proxy-url": "http://proxy:1"}
    user = {"client-certificate": str(certificate), "client-key": str(key), "token": "t"}
    file = str(config(tmp_path / "config", cluster, user))
    found = await kubeconfig.read(file, None)
    other = await kubeconfig.read(file, "other")
    assert PACKAGE not in sys.modules
    assert found == Access(
        server="https://127.0.0.1:6443",
        authority=authority.certificate.read_text(),
        certificate=certificate.read_text(),
        key=key.read_text(),
        authorization="Bearer t",
        server_name="elsewhere",
        proxy="http://proxy:1",
    )
    assert other == Access(server="https://other:1")


async def test_who_has_the_client_reads_the_same(authority: Authority, tmp_path: Path) -> None:
    cluster = {"server": "https://127.0.0.1:6443", "insecure-skip-tls-verify": True}
    file = str(config(tmp_path / "config", cluster, {"username": "me", "password": "secret"}))
    found = await kubeconfig.read(file, None)
    assert found == Access("https://127.0.0.1:6443", authorization="Basic bWU6c2VjcmV0", verify=False)


@pytest.mark.parametrize("imported", [False, True])
async def test_what_is_wrong_with_a_kubeconfig_is_said(
    imported: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not imported:
        request.getfixturevalue("alone")
    file = config(
        tmp_path / "config", {"server": "https://x"}, plugin(tmp_path / "p.py", "raise SystemExit('no luck')")
    )
    with pytest.raises(UsageError, match=r"no Kubernetes cluster to be reached by .*config: .*no luck"):
        await kubeconfig.read(str(file), None)
    with pytest.raises(UsageError, match="nowhere"):
        await kubeconfig.read(str(file), "nowhere")


@pytest.mark.parametrize(
    "content", [b"hello", b"a: [1,", b"\xff\xfe", b"clusters: 3\ncontexts: 4\ncurrent-context: x\n"]
)
async def test_a_file_that_is_no_kubeconfig_is_said_to_be_none(tmp_path: Path, content: bytes, alone: None) -> None:
    (tmp_path / "config").write_bytes(content)
    with pytest.raises(UsageError, match=r"no Kubernetes cluster to be reached by .*config: it isn't a kubeconfig"):
        await kubeconfig.read(str(tmp_path / "config"), None)


async def test_credentials_of_a_plugin_are_made_again_once_for_all_that_were_refused(
    server: Server, authority: Authority, tmp_path: Path, alone: None
) -> None:
    cluster = {"server": server.url, "certificate-authority": str(authority.certificate)}
    file = config(tmp_path / "config", cluster, plugin(tmp_path / "plugin.py", TOKEN))
    async with Api.open(file) as api:
        await asyncio.gather(*(api.get("/thing") for _ in range(5)))
    assert (tmp_path / "plugin.count").read_text() == "2"
    assert {asked["token"] for asked in server.asked} == {"Bearer old", "Bearer right"}


async def test_a_certificate_proves_who_asks(server: Server, authority: Authority, tmp_path: Path) -> None:
    certificate, key = authority.issue("user", "somebody")
    user = {"client-certificate": str(certificate), "client-key": str(key)}
    write_kubeconfig(tmp_path / "config", server.url, authority.certificate, user)
    async with Api.open(tmp_path / "config") as api:
        found = await api.patch("/thing", {"a": 1})
    assert (found["by"], json.loads(found["body"])) == ("somebody", {"a": 1})


async def test_a_certificate_that_is_made_anew_is_shown_at_once_and_made_once_for_all(
    server: Server, authority: Authority, tmp_path: Path, alone: None
) -> None:
    made = {name: [str(path) for path in authority.issue(name, name)] for name in ("late", "somebody")}
    code = f"""
import json, pathlib
count = pathlib.Path({str(tmp_path / "count")!r})
number = int(count.read_text()) if count.exists() else 0
count.write_text(str(number + 1))
certificate, key = {list(made.values())!r}[min(number, 1)]
status = {{"clientCertificateData": open(certificate).read(), "clientKeyData": open(key).read()}}
print(json.dumps({{"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": status}}))
"""
    cluster = {"server": server.url, "certificate-authority": str(authority.certificate)}
    server.refused = {"late"}
    file = config(tmp_path / "config", cluster, plugin(tmp_path / "plugin.py", code))
    async with Api.open(file) as api:
        found = await asyncio.gather(*(api.get("/thing") for _ in range(5)))
    assert {one["by"] for one in found} == {"somebody"}
    assert (tmp_path / "count").read_text() == "2"


async def test_a_ca_may_have_remarks_in_any_language(server: Server, authority: Authority, tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_text("# Főtanúsítvány\n" + authority.certificate.read_text())
    write_kubeconfig(tmp_path / "config", server.url, tmp_path / "ca.crt", {"token": "right"})
    async with Api.open(tmp_path / "config") as api:
        await api.get("/thing")


@pytest.fixture
def account(server: Server, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of this process's service account."""
    folder = tmp_path / "account"
    folder.mkdir()
    (folder / "token").write_text("right\n")
    (folder / "ca.crt").write_bytes(authority.certificate.read_bytes())
    monkeypatch.setattr(login, "ACCOUNT", folder)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.port))
    return folder


async def test_a_pod_has_a_service_account(server: Server, account: Path, alone: None) -> None:
    async with Api.open() as api:
        assert api.server == server.url
        await api.get("/things", {"labelSelector": "a=b,c in (d+e)", "limit": 5})
        (account / "token").write_text("newer")
        server.tokens = {"Bearer newer"}
        await api.get("/thing")
        (account / "token").unlink()
        server.tokens = {"Bearer newest"}
        with pytest.raises(ApiUnauthorized, match="can't be renewed"):
            await api.get("/thing")
    assert PACKAGE not in sys.modules
    tokens = [asked["token"] for asked in server.asked]
    assert tokens == ["Bearer right", "Bearer right", "Bearer newer", "Bearer newer"]
    assert server.asked[0]["query"] == {"labelSelector": "a=b,c in (d+e)", "limit": "5"}


async def test_a_token_is_replaced_before_it_runs_out(
    server: Server, account: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(login, "TOKEN_SECONDS", 0.0)
    server.tokens |= {"Bearer newer"}
    async with Api.open() as api:
        await api.get("/thing")
        (account / "token").write_text("newer")
        await api.get("/thing")
    assert [asked["token"] for asked in server.asked] == ["Bearer right", "Bearer newer"]


async def test_a_ca_that_is_replaced_is_trusted(
    server: Server, account: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(login, "TOKEN_SECONDS", 0.0)
    right = (account / "ca.crt").read_bytes()
    (account / "ca.crt").write_bytes(Authority(tmp_path / "another").certificate.read_bytes())
    async with Api.open() as api:
        with pytest.raises(ApiUnavailable, match="certificate"):
            await api.get("/thing")
        (account / "ca.crt").write_bytes(right)
        await api.get("/thing")


async def test_half_a_service_account_is_none(account: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (account / "ca.crt").write_text("\n")
    with pytest.raises(UsageError, match="token or CA in .* is empty"):
        async with Api.open():
            pass
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST")
    with pytest.raises(UsageError, match="KUBERNETES_SERVICE_HOST"):
        async with Api.open():
            pass


def test_a_server_may_have_an_address_of_the_newer_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("t")
    (tmp_path / "ca.crt").write_text("a CA")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "fd00::1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    found = login.service_account(tmp_path)
    assert found == Access("https://[fd00::1]:443", authority="a CA", authorization="Bearer t")


class Mute:
    """An HTTPS server that begins an answer, says no more, and doesn't listen any more."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        self._writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> Mute:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._context)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        await reader.readuntil(b"\r\n\r\n")
        event = b'{"type": "ADDED", "object": {}}\n'
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(event), event))
        writer.transport.pause_reading()  # type: ignore[attr-defined]


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, new_loop], ids=["asyncio", "as masters have it"])
def test_a_watch_that_is_given_up_leaves_no_socket(
    loop: Callable[[], asyncio.AbstractEventLoop], authority: Authority, tmp_path: Path
) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*authority.issue("server", "server", addresses=["127.0.0.1"]))

    async def give_up() -> None:
        async with Mute(context) as server:
            url = f"https://127.0.0.1:{server.port}"
            write_kubeconfig(tmp_path / "config", url, authority.certificate, {"token": "t"})
            async with Api.open(tmp_path / "config") as api:
                events = api.watch("/things", None, "1")
                assert (await anext(events))["type"] == "ADDED"
                assert len(sockets(server.port)) == 1
                await events.aclose()  # type: ignore[attr-defined]
            assert sockets(server.port) == []

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(give_up())


def sockets(port: int) -> list[Any]:
    """Of this process, that are connected to that port."""
    return [
        found
        for found in psutil.Process().net_connections("tcp")
        if found.raddr and found.raddr[1] == port and found.fd >= 0
    ]
