"""The way to a cluster: where it is, who asks, and the HTTP session. Used by `nomad.kubernetes.api` alone.

In a pod, its service account says all of that: a token, which is replaced now and then, and a CA. Elsewhere a
kubeconfig does, see `nomad.kubernetes.kubeconfig`.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import ssl
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import aiohttp
from aiohttp.connector import Connection

from nomad.errors import ApiUnauthorized, UsageError
from nomad.kubernetes import kubeconfig
from nomad.kubernetes.kubeconfig import Access
from nomad.kubernetes.names import FIELD_MANAGER

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where a pod finds what its service account has."""

TOKEN_SECONDS = 60.0
"""A service account's token is read again after so long: it is replaced some time before it runs out."""

CONNECTIONS = 48
"""At a time; a watch has one of them. Each takes about 60 KB, most of it TLS's."""

BUFFER = 1 << 21
"""Bytes of an answer that are received ahead of who reads it."""


class Login:
    """One way to a cluster. Made by `open`."""

    def __init__(self, access: Access, read: Callable[[], Awaitable[Access]], lasts: float) -> None:
        """`read`: finds out again what `access` is; to be asked after so many seconds."""
        self._access = access
        self._read = read
        self._lasts = lasts
        self._loop = asyncio.get_running_loop()
        self._read_at = self._loop.time()
        self._reading = asyncio.Lock()
        self._session = _Session(access)
        self._former: list[_Session] = []  # with earlier certificates; what is under way there goes on

    @classmethod
    async def open(cls, file: str | Path | None, context: str | None) -> Login:
        """By the service account of this process when it has one and nothing else is asked for; else by a kubeconfig:
        `file`, or $KUBECONFIG, or ~/.kube/config. Raises `UsageError`.
        """

        async def account() -> Access:
            return service_account(ACCOUNT)

        async def config() -> Access:
            return await kubeconfig.read(_named(file), context)

        inside = file is None and context is None and (ACCOUNT / "token").exists()
        read = account if inside else config
        try:
            return cls(await read(), read, TOKEN_SECONDS if inside else float("inf"))
        except UsageError:  # a ValueError, that says it already
            raise
        except (OSError, ValueError) as exc:  # ssl.SSLError is one of them
            raise UsageError(f"there is no Kubernetes cluster to be reached: {exc}") from exc

    @property
    def server(self) -> str:
        return self._access.server

    @property
    def access(self) -> Access:
        """What requests prove themselves by now."""
        return self._access

    async def renew(self, refused: Access | None = None) -> None:
        """Read the credentials again, or have them made again, unless that was done since they were `refused`.

        Raises `ApiUnauthorized`.
        """
        async with self._reading:
            before = self._access
            if refused is not None and refused is not before:
                return
            try:
                found = await self._read()
                if replace(found, authorization="") != replace(before, authorization=""):
                    await self._leave(_Session(found))
            except (UsageError, OSError, ValueError) as exc:
                raise ApiUnauthorized(f"the credentials for {self.server} can't be renewed: {exc}", status=401) from exc
            self._access, self._read_at = found, self._loop.time()

    async def request(
        self, method: str, path: str, query: list[tuple[str, str]], body: Any, content: str, timeout: Any
    ) -> aiohttp.ClientResponse:
        """An answer, of which nothing has been read yet. `body`: what is sent as JSON, None for nothing."""
        if self._loop.time() - self._read_at >= self._lasts:
            await self.renew()
        access = self._access
        headers = {"Accept": "application/json", "Content-Type": content, "User-Agent": FIELD_MANAGER}
        if access.authorization:
            headers["Authorization"] = access.authorization
        return await self._session.request(
            method,
            f"{access.server}{path}" + (f"?{urlencode(query)}" if query else ""),
            data=None if body is None else json.dumps(body),
            headers=headers,
            timeout=timeout,
            proxy=access.proxy,
            server_hostname=access.server_name,
        )

    async def close(self) -> None:
        """Close all connections, those too that are given up and still say goodbye to the server."""
        for session in (self._session, *self._former):
            await session.end()

    async def _leave(self, session: _Session) -> None:
        """Connect anew from now on."""
        former, self._former, self._session = self._former, [self._session], session
        for session in former:
            await session.end()


class _Session:
    """Connections that trust the same CA and show the same certificate."""

    def __init__(self, access: Access) -> None:
        tls = _tls(access) if access.server.startswith("https") else True
        self._connector = _Connector(limit=CONNECTIONS, ssl=tls)
        self._http = aiohttp.ClientSession(connector=self._connector, trust_env=True, read_bufsize=BUFFER)
        self.request = self._http.request

    async def end(self) -> None:
        await self._http.close()
        await self._connector.end()


class _Connector(aiohttp.TCPConnector):
    """aiohttp forgets a connection that it closes while a request is under way, as a watch always is; with TLS its
    socket is open until the server has answered, which may be longer than the event loop runs.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._made: set[asyncio.Transport] = set()  # that aren't closed yet; uvloop's can't be referred to weakly

    async def connect(self, *args: Any, **options: Any) -> Connection:
        """As in the base class."""
        connection = await super().connect(*args, **options)
        transport, closed = connection.transport, getattr(connection.protocol, "closed", None)  # from aiohttp 3.12 on
        if transport is not None and closed is not None and transport not in self._made:
            self._made.add(transport)
            closed.add_done_callback(functools.partial(self._closed_one, transport))
        return connection

    def _closed_one(self, transport: asyncio.Transport, closed: asyncio.Future[None]) -> None:
        self._made.discard(transport)
        if not closed.cancelled():
            closed.exception()  # whoever used it was told

    async def end(self) -> None:
        """Have no socket of them left. Call it after `close`."""
        for transport in list(self._made):
            transport.abort()
        for _ in range(2):  # the event loop closes them in its next rounds
            await asyncio.sleep(0)


def service_account(folder: Path) -> Access:
    """Of the pod that this process is in. Raises `UsageError` and `OSError`."""
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT")
    if not host or not port:
        raise UsageError(
            "there is no Kubernetes cluster to be reached: a service account is there, but KUBERNETES_SERVICE_HOST and "
            "KUBERNETES_SERVICE_PORT aren't"
        )
    token, authority = (folder / "token").read_text().strip(), (folder / "ca.crt").read_text()
    if not token or not authority.strip():
        raise UsageError(f"there is no Kubernetes cluster to be reached: token or CA in {folder} is empty")
    server = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
    return Access(server, authority=authority, authorization=f"Bearer {token}")


def _tls(access: Access) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=_ascii(access.authority) if access.authority else None)
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # Python 3.13 asks more of a CA than kubectl does
    if not access.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if access.certificate:
        with tempfile.NamedTemporaryFile("w", prefix="nomad-") as file:  # Python takes it from one only
            file.write(f"{access.key}\n{access.certificate}")
            file.flush()
            context.load_cert_chain(file.name)
    return context


def _ascii(pem: str) -> str:
    """What stands between its blocks may be in any language."""
    return pem.encode("ascii", "ignore").decode()


def _named(given: str | Path | None) -> str:
    """The file that says where the cluster is, or several. Raises `UsageError`."""
    found = str(given or os.environ.get("KUBECONFIG") or Path("~/.kube/config").expanduser())
    if not any(Path(name).is_file() for name in found.split(os.pathsep)):
        raise UsageError(
            f"there is no Kubernetes cluster to be reached: there is no file {found}; name one with --kubeconfig or "
            "KUBECONFIG"
        )
    return found
