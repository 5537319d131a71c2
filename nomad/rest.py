"""The client's half of HTTP: requests, problems as errors, server-sent events, JSON as views.

`nomad.client` is the only caller. Nothing of aiohttp gets past this module: whatever can go wrong with
the network is `MasterUnreachable`, and what the master refuses is a `RequestError` with the master's own words.
"""

from __future__ import annotations

import dataclasses
import enum
import io
import json
import os
import typing
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import cache
from http import HTTPStatus
from types import NoneType
from typing import Any, NamedTuple, Self, TypeVar
from urllib.parse import quote, urlsplit

import aiohttp
import yarl

from nomad import __version__, credentials
from nomad.errors import (
    AuthenticationError,
    ConflictError,
    InvalidRequestError,
    MasterUnreachable,
    NotFoundError,
    RequestError,
)

API = "/api/v1"
CONNECT = 10.0
"""Seconds until a connection must stand."""
QUIET = 30.0
"""Seconds without a byte after which a stream counts as broken; the master writes at least every 5."""
MAX_EVENT = 256 << 20
"""Bytes of one event; a stream with a larger one is given up before it fills the memory."""

T = TypeVar("T")
Query = Mapping[str, "str | int | list[str] | None"]

_ERRORS: Mapping[int, type[RequestError]] = {
    400: InvalidRequestError,
    401: AuthenticationError,
    404: NotFoundError,
    409: ConflictError,
    413: InvalidRequestError,
    415: InvalidRequestError,
    422: InvalidRequestError,
}


class Rest:
    """Requests to one master. Inside `async with` they share connections; outside, each has its own."""

    def __init__(self, url: str, token: str | None, *, timeout: float) -> None:
        self.url = url
        self._headers = {"User-Agent": f"nomad/{__version__}"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self._timeout = timeout
        self._shared: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._shared = aiohttp.ClientSession()
        return self

    async def __aexit__(self, *exc: object) -> None:
        session, self._shared = self._shared, None
        if session is not None:
            await session.close()

    async def request(self, method: str, *path: str, query: Query | None = None, json: Any = None) -> Any:
        """The JSON that the master answers, None for none. `path` is in parts, below /api/v1 and unquoted.

        Raises `RequestError` and its kinds for what the master refuses, `MasterUnreachable` for what doesn't reach it.
        """
        return await self._send(method, path, query, json=json)

    async def upload(self, *path: str, query: Query, data: bytes, media_type: str) -> Any:
        """POST bytes; else like `request`."""
        # As a file: aiohttp writes large bytes in one go, which would hold the loop up.
        return await self._send("POST", path, query, data=io.BytesIO(data), headers={"Content-Type": media_type})

    @asynccontextmanager
    async def events(self, *path: str, query: Query | None = None) -> AsyncIterator[AsyncIterator[Any]]:
        """A stream of what the master sends, until it says that this is over. It stands once the block is entered."""
        headers = {"Accept": "text/event-stream"}
        async with self._answer("GET", path, query, QUIET, headers=headers) as response:
            yield self._items(response)

    async def _send(self, method: str, path: tuple[str, ...], query: Query | None, **content: Any) -> Any:
        async with self._answer(method, path, query, self._timeout, **content) as response:
            with self._network():
                body = await response.read()
            return self._json(response, body) if body else None

    async def _items(self, response: aiohttp.ClientResponse) -> AsyncIterator[Any]:
        decoder = EventDecoder()
        with self._network():
            async for chunk in response.content.iter_any():
                for event in decoder.feed(chunk):
                    if event.name == "end":
                        return
                    content = json.loads(event.data)
                    if event.name == "problem":
                        raise self._error(content["status"], content)
                    yield content
        raise MasterUnreachable(f"The stream from {self.url} broke off: the master ended or is being restarted.")

    @asynccontextmanager
    async def _answer(
        self, method: str, path: tuple[str, ...], query: Query | None, quiet: float, **content: Any
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """An answer that isn't an error; its body is still to be read."""
        url = yarl.URL("/".join([self.url + API, *(quote(part, safe="") for part in path)]), encoded=True)
        headers = self._headers | content.pop("headers", {})
        params = [(name, item) for name, value in (query or {}).items() for item in _texts(value)]
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT, sock_read=quiet)
        async with self._session() as session:
            with self._network():
                response = await session.request(
                    method, url, params=params, headers=headers, timeout=timeout, allow_redirects=False, **content
                )
            async with response:
                if response.status >= 300:
                    with self._network():
                        body = await response.read()
                    raise self._error(response.status, self._json(response, body))
                yield response

    @asynccontextmanager
    async def _session(self) -> AsyncIterator[aiohttp.ClientSession]:
        if self._shared is not None:
            yield self._shared
        else:
            async with aiohttp.ClientSession() as session:
                yield session

    def _json(self, response: aiohttp.ClientResponse, body: bytes) -> Any:
        if response.content_type in ("application/json", "application/problem+json"):
            with suppress(ValueError):
                return json.loads(body)
        raise MasterUnreachable(
            f"What answers at {self.url} is no Nomad master (status {response.status}, {response.content_type}). "
            f"{self._what_to_do()}"
        )

    def _error(self, status: int, problem: Any) -> RequestError:
        detail = str(problem.get("detail") or problem.get("title") or HTTPStatus(status).phrase)
        if status == 401:
            detail = f"{detail} {credentials.where_looked('A token', 'NOMAD_TOKEN', self.url)}"
        return _ERRORS.get(status, RequestError)(detail, status=status, problem=problem)

    @contextmanager
    def _network(self) -> Iterator[None]:
        """aiohttp's errors, as ours."""
        try:
            yield
        except aiohttp.ClientConnectorError as exc:
            raise MasterUnreachable(f"No master answers at {self.url} ({_reason(exc)}). {self._what_to_do()}") from exc
        except TimeoutError as exc:
            raise MasterUnreachable(f"The master at {self.url} is silent; it may be stuck or stopped.") from exc
        except (aiohttp.ClientError, ConnectionError) as exc:
            raise MasterUnreachable(f"The connection to the master at {self.url} broke ({_reason(exc)}).") from exc

    def _what_to_do(self) -> str:
        parts = urlsplit(self.url)
        if parts.hostname not in ("127.0.0.1", "localhost", "::1"):
            return (
                "Is that where it is (NOMAD_MASTER or --master), and can it be reached from here? "
                "On Kubernetes `kubectl --namespace nomad get pods` shows whether it runs."
            )
        port = parts.port or 80
        option = "" if self.url == credentials.DEFAULT_MASTER else f" --port {port}"
        return f"Start one with `nomad up --node edge --node cloud{option}`, or say where it is with NOMAD_MASTER."


class Event(NamedTuple):
    """One server-sent event."""

    name: str
    data: bytes


class EventDecoder:
    """Server-sent events out of chunks of bytes, however these are cut. Comments, ids and retry times are left out."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._searched = 0
        self._name = "message"
        self._data: list[bytes] = []
        self._size = 0

    def feed(self, chunk: bytes) -> Iterator[Event]:
        """The events that end in `chunk`. Raises `MasterUnreachable` for one that is larger than `MAX_EVENT`."""
        self._rest += chunk
        start = 0
        while (end := self._rest.find(b"\n", max(start, self._searched))) >= 0:
            line = bytes(self._rest[start:end]).removesuffix(b"\r")
            start = end + 1
            if line:
                self._field(line)
                continue
            if self._data:
                yield Event(self._name, b"\n".join(self._data))
            self._name, self._data, self._size = "message", [], 0
        del self._rest[:start]
        self._searched = len(self._rest)
        if self._size + self._searched > MAX_EVENT:
            raise MasterUnreachable(f"The master sent an event of more than {MAX_EVENT >> 20} MiB.")

    def _field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
            self._size += len(value)
        elif name == b"event":
            self._name = value.decode()


def view(kind: type[T], data: Any) -> T:
    """JSON as a view of `nomad.master.views`. Fields that a newer master adds are left out, enum values stay text."""
    return typing.cast(T, _converted(kind, data))


def _converted(kind: Any, data: Any) -> Any:
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = _hints(kind)
        return kind(**{name: _converted(hints[name], value) for name, value in data.items() if name in hints})
    arguments = typing.get_args(kind)
    match typing.get_origin(kind):
        case None:
            if isinstance(kind, type) and issubclass(kind, enum.Enum):
                return kind(data) if data in [member.value for member in kind] else data
            return data
        case origin if origin is list:
            return [_converted(arguments[0], item) for item in data]
        case origin if origin is tuple:
            return tuple(_converted(part, item) for part, item in zip(arguments, data, strict=True))
        case origin if origin is dict:
            return data
        case _:  # a union: a view or a plain type, and None
            chosen = next(part for part in arguments if part is not NoneType)
            return None if data is None else _converted(chosen, data)


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _texts(value: str | int | list[str] | None) -> list[str]:
    if value is None:
        return []
    return value if isinstance(value, list) else [str(value)]


def _reason(exc: BaseException) -> str:
    if isinstance(exc, aiohttp.ClientConnectorDNSError):
        return f"there is no address for the name {exc.host}"
    number = getattr(exc, "errno", None)
    if isinstance(number, int) and number > 0:  # asyncio's own text repeats the address
        return os.strerror(number).lower()
    return str(exc) or type(exc).__name__
