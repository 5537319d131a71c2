"""Typed handlers: their annotations say what a request must hold and what the answer is.

    @routes("GET", "/links/{source}/{target}", raises=(404,))
    def show_link(master: Master, source: str, target: str) -> LinkView:
        "One link."

The first parameter is what `Routes.bind` was given: the application's one dependency. Of the others, those
named in the path come from the path, one called `body` is the request's body (JSON, or bytes as they are), and
the rest is the query. pydantic validates them, `openapi` derives the document from the same `Operation`s.
What is returned is serialised by its annotation; None is 204, an async iterator is a stream of server-sent
events. An `Iterable` is answered as a list, whose items are made and serialised with the event loop in between: there
may be thousands. A request is held to exactly what is declared: an unknown query parameter is refused too.
"""

from __future__ import annotations

import asyncio
import gzip
import inspect
import re
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from aiohttp import web
from pydantic import TypeAdapter, ValidationError

from nomad.master.rest.http import problems, sse
from nomad.master.rest.http.problems import InvalidInput
from nomad.tasks import Turns

JSON = "application/json"
LARGE = 1 << 18
"""Bytes from which on an answer is sent as gzip to who takes that: a thread needs 3 ms for each million, and leaves 5
to 10 % of JSON and of metrics.
"""
Function = Callable[..., Any]
F = TypeVar("F", bound=Function)


@dataclass(frozen=True)
class Typed:
    """A type that is validated or serialised. What pydantic needs for it is made at first use: starting is quick."""

    kind: Any

    @cached_property
    def adapter(self) -> TypeAdapter[Any]:
        """pydantic's view of the type."""
        return TypeAdapter(self.kind)


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of the path or the query."""

    name: str
    place: str
    """"path" or "query"."""
    type: Typed
    required: bool
    many: bool
    """A list: the name may come several times."""

    @property
    def location(self) -> str:
        """How problems name it: `query.limit`."""
        return f"{self.place}.{self.name}"

    def read(self, request: web.Request) -> Any:
        """The value in `request`. Raises `KeyError` when it isn't there, `InvalidInput` when it isn't valid."""
        if self.place == "path":
            given: Any = request.match_info[self.name]
        else:
            given = request.query.getall(self.name)
            if not self.many:
                if len(given) > 1:
                    raise InvalidInput.at({self.location: "given more than once"})
                given = given[0]
        try:
            adapter = self.type.adapter
            return adapter.validate_python(given) if self.many else adapter.validate_strings(given)
        except ValidationError as exc:
            raise problems.from_validation(exc, self.location) from exc


@dataclass(frozen=True, slots=True)
class Body:
    """What a request's body must be."""

    media_types: tuple[str, ...]
    type: Typed | None
    """None: bytes, handed on as they are."""

    async def read(self, request: web.Request) -> Any:
        """The body of `request`; its media type and announced size are looked at before anything is received."""
        if request.content_type not in self.media_types:
            wanted = " or ".join(self.media_types)
            raise InvalidInput(f"The body must be {wanted}, not {request.content_type}.", status=415)
        if (coding := request.headers.get("Content-Encoding", "identity")).lower() != "identity":
            raise InvalidInput(f"The body must be sent as it is, without the Content-Encoding {coding}.", status=415)
        if (request.content_length or 0) > request.client_max_size:
            raise web.HTTPRequestEntityTooLarge(request.client_max_size, request.content_length or 0)
        data = await request.read()
        if self.type is None:
            return data
        try:
            return self.type.adapter.validate_json(data, strict=True)
        except ValidationError as exc:
            raise problems.from_validation(exc, "body") from exc


@dataclass(frozen=True, slots=True)
class Operation:
    """One method on one path."""

    method: str
    path: str
    handler: Function
    parameters: tuple[Parameter, ...]
    body: Body | None
    status: int
    media_type: str | None
    """Of the plain answer; None when there is none (204, or only a stream)."""
    result: Typed | None
    """Type of a JSON answer."""
    each: Typed | None
    """Type of its items, if it is made one by one."""
    stream: Function | None
    """Gives the stream of events; the handler itself when there is no plain answer."""
    item: Typed | None
    """Type of one event's data."""
    raises: tuple[int, ...]
    """Statuses of this operation's own errors; those that any request may meet are understood."""
    tag: str
    location: str
    """Path of what was made, as a format string over the answer ("{0.id}"); "" for none."""

    async def respond(self, dependency: Any, request: web.Request) -> web.StreamResponse:
        """Read the request, call the function, send what it gives."""
        arguments = await self._arguments(request)
        if self.stream is not None and self.item is not None and (self.media_type is None or sse.wanted(request)):
            items = self.stream(dependency, **arguments)
            return await sse.respond(request, items, self.item.adapter.dump_json)
        result = self.handler(dependency, **arguments)
        if inspect.isawaitable(result):
            result = await result
        if self.media_type is None:
            return web.Response(status=self.status)
        if self.each is not None:
            content = await _listed(result, self.each.adapter)
        else:
            content = self.result.adapter.dump_json(result) if self.result is not None else result
        # Not by aiohttp's own argument, which can't hold a media type with parameters.
        headers = {"Content-Type": self.media_type}
        if len(content) >= LARGE:
            headers["Vary"] = "Accept-Encoding"
            if _takes_gzip(request):
                content = await asyncio.to_thread(gzip.compress, content, 1)
                headers["Content-Encoding"] = "gzip"
        if self.location:
            headers["Location"] = self.location.format(result)
        return web.Response(body=content, status=self.status, headers=headers)

    async def _arguments(self, request: web.Request) -> dict[str, Any]:
        known = {parameter.name for parameter in self.parameters if parameter.place == "query"}
        if unknown := sorted(set(request.query) - known):
            raise InvalidInput.at({f"query.{name}": "there is no such parameter" for name in unknown})
        values: dict[str, Any] = {}
        for parameter in self.parameters:
            try:
                values[parameter.name] = parameter.read(request)
            except KeyError:
                if parameter.required:
                    raise InvalidInput.at({parameter.location: "it is missing"}) from None
        if self.body is not None:
            values["body"] = await self.body.read(request)
        return values


class Routes:
    """A table of operations, filled by decorating handlers and bound to an application once."""

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix
        self.operations: list[Operation] = []

    def __call__(
        self,
        method: str,
        path: str,
        *,
        tag: str,
        status: int = 200,
        raises: tuple[int, ...] = (),
        media_type: str = JSON,
        body_types: tuple[str, ...] = (JSON,),
        stream: Function | None = None,
        location: str = "",
    ) -> Callable[[F], F]:
        """Add the decorated function as an operation.

        `stream` is a second function with the same parameters, for readers that ask for events by Accept.
        With another `media_type` than JSON the handler returns the bytes to send.
        """

        def add(handler: F) -> F:
            where = self.prefix + path
            in_path = set(re.findall(r"{(\w+)}", where))
            hints = get_type_hints(handler, include_extras=True)
            answer = hints.pop("return")
            parameters, body = [], None
            for name, spec in list(inspect.signature(handler).parameters.items())[1:]:
                kind = hints[name]
                if name == "body":
                    body = Body(body_types, None if kind is bytes else Typed(kind))
                else:
                    place = "path" if name in in_path else "query"
                    many = any(get_origin(part) is list for part in (kind, *get_args(kind)))
                    parameters.append(Parameter(name, place, Typed(kind), spec.default is spec.empty, many))
            streams = handler if get_origin(answer) is AsyncIterator else stream
            item = get_args(get_type_hints(streams, include_extras=True)["return"])[0] if streams is not None else None
            each = None
            if get_origin(answer) is Iterable:
                (each,) = get_args(answer)
                answer = list[each]  # type: ignore[valid-type]
            plain = answer is not type(None) and streams is not handler
            self.operations.append(
                Operation(
                    method=method,
                    path=where,
                    handler=handler,
                    parameters=tuple(parameters),
                    body=body,
                    status=status if plain or streams is handler else 204,
                    media_type=media_type if plain else None,
                    result=Typed(answer) if plain and media_type == JSON else None,
                    each=None if each is None else Typed(each),
                    stream=streams,
                    item=None if item is None else Typed(item),
                    raises=raises,
                    tag=tag,
                    location=location and self.prefix + location,
                )
            )
            return handler

        return add

    def bind(self, app: web.Application, dependency: Any) -> None:
        """Make every operation a route of `app`; handlers get `dependency` as their first argument."""
        for operation in self.operations:
            app.router.add_route(operation.method, operation.path, _handler(operation, dependency))
            if operation.method == "GET":
                app.router.add_route("HEAD", operation.path, _handler(operation, dependency))


def _takes_gzip(request: web.Request) -> bool:
    codings = request.headers.get("Accept-Encoding", "").lower().replace(" ", "").split(",")
    return any(re.fullmatch(r"gzip(;q=(1.*|0\.0*[1-9].*))?", coding) for coding in codings)


async def _listed(items: Iterable[Any], adapter: TypeAdapter[Any]) -> bytes:
    turns, parts = Turns(), []
    for item in items:
        parts.append(adapter.dump_json(item))
        await turns.give()
    return b"[" + b",".join(parts) + b"]"


def _handler(operation: Operation, dependency: Any) -> Callable[[web.Request], Any]:
    async def handle(request: web.Request) -> web.StreamResponse:
        return await operation.respond(dependency, request)

    return handle
