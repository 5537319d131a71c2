"""Kubernetes' API, as plain JSON objects.

    async with Api.open() as api:
        node = await api.get(paths.nodes("edge"))

Used by the runtime, the store and the leader's lease. `login` has the ways to a cluster: service account, or
kubeconfig with all its kinds of credentials. All errors are `ApiError`s. What the API asks to send again later (429,
and 503 with Retry-After) is sent again here, a few times; all other failures are the caller's to judge.
"""

from __future__ import annotations

import asyncio
import codecs
import gc
import logging
import random
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import aiohttp
from pydantic_core import from_json

from nomad.clock import Clock, SystemClock
from nomad.errors import ApiCrowded, ApiError, ApiGone, ApiNotFound, ApiUnauthorized, ApiUnavailable
from nomad.kubernetes import answers
from nomad.kubernetes.login import Login
from nomad.kubernetes.names import FIELD_MANAGER

log = logging.getLogger(__name__)

Json = dict[str, Any]
Items = list[Json]
T = TypeVar("T")

REQUEST = aiohttp.ClientTimeout(total=30.0, sock_connect=5.0)
"""Of a plain request, in seconds."""

SILENCE = 150.0
"""Seconds without a byte after which a watch is taken for dead: bookmarks come about every minute."""

ATTEMPTS = 5  # how often what the API asks to send again later is sent
LONGEST_PAUSE = 10.0  # seconds; an API that wants more patience than that is unavailable

PIECE = 1 << 16  # bytes of a text's line that are given out without its end

WAIT = 15.0
"""Seconds that a watch or a log may wait for one of `login.CONNECTIONS`, and for the API to take it."""

FOLLOWED = 24  # of those may be logs that are followed: there are always some left for what the master itself asks
PAGE = 500  # objects of a list: some megabytes

_CONTENT = {
    "apply": "application/apply-patch+yaml",  # JSON is YAML
    "merge": "application/merge-patch+json",
    "json": "application/json-patch+json",
    "strategic": "application/strategic-merge-patch+json",
}


class Api:
    """A cluster's API. Made by `open`."""

    def __init__(self, login: Login, clock: Clock, rng: random.Random) -> None:
        self._login = login
        self._clock = clock
        self._rng = rng
        self._followed = 0
        self.requests = 0
        """How many were sent so far, watches included."""
        self.may_write: Callable[[], bool] = lambda: True
        """Asked before everything but a GET is sent: a process that was stopped for a while may have lost its say."""

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        kubeconfig: str | Path | None = None,
        context: str | None = None,
        *,
        clock: Clock | None = None,
        rng: random.Random | None = None,
    ) -> AsyncIterator[Api]:
        """The cluster that this process runs in when it has a service account, else that of the kubeconfig: the file
        given, or $KUBECONFIG, or ~/.kube/config. Raises `UsageError` when there is none. Asks the API nothing yet.
        """
        login = await Login.open(kubeconfig, context)
        try:
            yield cls(login, clock or SystemClock(), rng or random.Random())
        finally:
            await login.close()

    @property
    def server(self) -> str:
        """The API's URL, for messages."""
        return self._login.server

    async def get(self, path: str, params: Mapping[str, Any] | None = None) -> Json:
        """An object, or whatever JSON is there."""
        return await self._request("GET", path, params)

    async def create(self, path: str, body: Json, params: Mapping[str, Any] | None = None) -> Json:
        """Into the collection `path`. Raises `ApiExists`, unless it has a `generateName`."""
        return await self._request("POST", path, params, body)

    async def apply(self, path: str, body: Json, *, force: bool = True, manager: str = FIELD_MANAGER) -> Json:
        """Server-side apply of the object at `path`: it is made, or the fields in `body` are set and owned.

        Raises `ApiConflict` when another owns a field, unless `force`.
        """
        params = {"fieldManager": manager, "force": force}
        return await self._request("PATCH", path, params, body, content=_CONTENT["apply"])

    async def patch(
        self,
        path: str,
        body: Json | Items,
        *,
        kind: Literal["merge", "json", "strategic"] = "merge",
        manager: str = FIELD_MANAGER,
    ) -> Json:
        """With `metadata.resourceVersion` in a merge patch: raises `ApiConflict` when the object was changed since."""
        return await self._request("PATCH", path, {"fieldManager": manager}, body, content=_CONTENT[kind])

    async def replace(self, path: str, body: Json, *, manager: str = FIELD_MANAGER) -> Json:
        """Raises `ApiConflict` when the object isn't any more at the `resourceVersion` in `body`."""
        return await self._request("PUT", path, {"fieldManager": manager}, body)

    async def delete(
        self,
        path: str,
        *,
        grace: int | None = None,
        uid: str | None = None,
        version: str | None = None,
        propagation: Literal["Background", "Foreground", "Orphan"] | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> bool:
        """False: there is none. With `params` (a `labelSelector`) and the path of a collection: all that match.

        `grace` in seconds. `uid`, `version`: raises `ApiConflict` when there is another object of that name by now, or
        it was changed since.
        """
        body: Json = {"kind": "DeleteOptions", "apiVersion": "v1"}
        if grace is not None:
            body["gracePeriodSeconds"] = grace
        expected = {"uid": uid, "resourceVersion": version}
        if preconditions := {key: value for key, value in expected.items() if value is not None}:
            body["preconditions"] = preconditions
        if propagation is not None:
            body["propagationPolicy"] = propagation
        try:
            await self._request("DELETE", path, params, body)
        except ApiNotFound:
            return False
        return True

    async def pages(
        self, path: str, params: Mapping[str, Any] | None = None, *, limit: int = PAGE
    ) -> AsyncIterator[Json]:
        """A list, page by page (`items`, `metadata.resourceVersion`). Raises `ApiGone` when it took too long.

        The next page is on its way while one is looked at.
        """
        query = {**(params or {}), "limit": limit}
        asked = asyncio.create_task(self._request("GET", path, query), name=f"list {path}")
        try:
            while True:
                page = await asked
                more = page["metadata"].get("continue")
                if not more:
                    yield page
                    return
                request = self._request("GET", path, {**query, "continue": more})
                asked = asyncio.create_task(request, name=f"list {path}")
                yield page
        finally:
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)

    async def collect(
        self, path: str, take: Callable[[Json], T], params: Mapping[str, Any] | None = None, *, limit: int = PAGE
    ) -> tuple[list[T], str]:
        """`take` of each object of a list, and the list's resource version; only one page is held at a time.

        A list whose next page is too old is begun again, as a single page, which can't grow too old.
        """
        for most in (limit, 0):
            found: list[T] = []
            version = ""
            try:
                async with aclosing(self.pages(path, params, limit=most)) as pages:  # type: ignore[type-var]
                    async for page in pages:
                        found += [take(item) for item in page.get("items") or ()]
                        version = page["metadata"]["resourceVersion"]
            except ApiGone:
                if most:
                    continue
                raise
            return found, version
        raise AssertionError("unreachable")

    async def list(self, path: str, params: Mapping[str, Any] | None = None) -> tuple[Items, str]:
        """All objects of a list, and its resource version."""
        return await self.collect(path, lambda item: item, params)

    async def watch(
        self,
        path: str,
        params: Mapping[str, Any] | None,
        resource_version: str,
        *,
        seconds: int = 300,
        opened: Callable[[], None] = lambda: None,
    ) -> AsyncIterator[Json]:
        """Events (`type`: ADDED, MODIFIED, DELETED or BOOKMARK, and `object`) after `resource_version`.

        `opened` is called once the API has taken the request. Ends when the API ends it, which is after `seconds`.
        Raises `ApiGone` when the version is too old, and `ApiUnavailable` when there is no connection for it, or that
        breaks or falls silent.
        """
        query = {
            **(params or {}),
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": resource_version,
            "timeoutSeconds": seconds,
        }
        timeout = aiohttp.ClientTimeout(connect=WAIT, sock_connect=REQUEST.sock_connect, sock_read=SILENCE)
        async with self._stream(path, query, timeout) as response:
            opened()
            async for line in answers.lines(response.content.iter_any()):
                event = _event(line)
                if event["type"] == "ERROR":
                    answers.fail(event["object"].get("code", 0), event["object"], None)
                yield event

    async def lines(self, path: str, params: Mapping[str, Any] | None = None) -> AsyncIterator[str]:
        """What a path gives as text, as it comes (`pods/log`); it may be silent for long.

        Lines with their ends, and pieces of lines: what a carriage return ends, and of a long line each `PIECE` bytes.
        With `follow`, raises `ApiCrowded` at once when `FOLLOWED` others are followed already.
        """
        follows = bool(params and params.get("follow"))
        if follows and self._followed >= FOLLOWED:
            raise ApiCrowded(f"too many logs are followed: {FOLLOWED} at a time")
        timeout = aiohttp.ClientTimeout(connect=WAIT, sock_connect=REQUEST.sock_connect)
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._followed += follows
        try:
            async with self._stream(path, params, timeout) as response:
                chunks = response.content.iter_any()
                async for piece in answers.lines(chunks, ends=answers.ANY_END, longest=PIECE):
                    yield decode(piece, piece.endswith(b"\n"))
        finally:
            self._followed -= follows

    # Inside

    async def _request(
        self,
        method: str,
        path: str,
        params: Mapping[str, Any] | None,
        body: Json | Items | None = None,
        *,
        content: str = "application/json",
    ) -> Json:
        pause = 0.1
        renewed = False
        for attempt in range(1, ATTEMPTS + 1):
            shown = self._login.access
            if method != "GET" and not self.may_write():  # each time: it may have waited for long in between
                raise ApiUnavailable(f"this process may change nothing in the cluster any more: {method} {path}")
            try:
                async with self._send(method, path, params, body, content, REQUEST) as response:
                    return await _json(response)
            except ApiUnauthorized:
                if renewed:
                    raise
                renewed = True
                await self._login.renew(shown)  # its token may have run out
            except ApiUnavailable as exc:
                if exc.retry_after is None or exc.retry_after > LONGEST_PAUSE or attempt == ATTEMPTS:
                    raise
                # A little more than was asked for, and not all of those who wait at the same time.
                await self._clock.sleep(max(exc.retry_after, pause) * self._rng.uniform(1.0, 1.5))
                pause *= 2
        raise AssertionError("unreachable")

    @asynccontextmanager
    async def _stream(
        self, path: str, params: Mapping[str, Any] | None, timeout: aiohttp.ClientTimeout
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        shown = self._login.access
        try:
            async with self._send("GET", path, params, None, "application/json", timeout) as response:
                _keep_alive(response)
                yield response
        except ApiUnauthorized:
            await self._login.renew(shown)  # for the next try, which is the caller's
            raise

    @asynccontextmanager
    async def _send(
        self,
        method: str,
        path: str,
        params: Mapping[str, Any] | None,
        body: Json | Items | None,
        content: str,
        timeout: aiohttp.ClientTimeout,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """An answer that isn't an error. Failures of the network, also while it is read, are `ApiUnavailable`."""
        self.requests += 1
        query = [(name, _text(value)) for name, value in (params or {}).items() if value is not None]
        try:
            response = await self._login.request(method, path, query, body, content, timeout)
            try:
                if response.status >= 400:
                    text = await response.text()
                    answers.fail(response.status, answers.status(text), response.headers.get("Retry-After"))
                yield response
            finally:
                response.close() if not response.content.at_eof() else response.release()
        except aiohttp.ConnectionTimeoutError as exc:
            raise ApiUnavailable(f"there is no connection to {self.server} in time: {method} {path}") from exc
        except TimeoutError as exc:
            raise ApiUnavailable(f"{self.server} hasn't answered in time: {method} {path}") from exc
        except (aiohttp.ClientError, OSError) as exc:
            if isinstance(exc, ApiError):
                raise
            raise ApiUnavailable(f"{self.server} can't be reached: {exc}") from exc


def _parsed(data: bytes) -> Any:
    """JSON as objects, by pydantic's parser, which takes three quarters of the time of Python's. A page of a list makes
    a hundred thousand of them, and none is garbage yet: looking for that in between would take as long again.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        return from_json(data)
    finally:
        if collects:
            gc.enable()


async def _json(response: aiohttp.ClientResponse) -> Json:
    try:
        found = _parsed(await response.read())
    except ValueError as exc:
        raise ApiUnavailable(f"{response.url.path} isn't answered with JSON: {exc}", status=response.status) from exc
    return found if isinstance(found, dict) else {"value": found}


def _event(line: bytes) -> Json:
    try:
        found: Json = from_json(line)
    except ValueError as exc:
        raise ApiUnavailable(f"a watch broke off in the middle of an event: {exc}") from exc
    return found


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _keep_alive(response: aiohttp.ClientResponse) -> None:
    """A peer that has vanished without a word is noticed after half a minute, however little it had to say."""
    connection = response.connection
    sock = connection.transport.get_extra_info("socket") if connection and connection.transport else None
    if sock is not None and hasattr(socket, "TCP_KEEPIDLE"):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
