"""Errors as RFC 9457 problem documents: one table from Nomad's errors to HTTP, and the middleware that applies it.

Every answer with a status of 400 and above goes through here, the router's own 404 and 405 included.
The detail of an expected error is its message, written for the user who made the request. Of an
unexpected one the document says only where to look: its text may hold what the caller must not see.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Annotated, Self

from aiohttp import web
from aiohttp.typedefs import Handler
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from nomad import errors

MEDIA_TYPE = "application/problem+json"
_log = logging.getLogger(__name__)


class FieldError(BaseModel):
    """What is wrong with one part of the request."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    location: str
    """Where: `query.limit`, `body.latency`."""
    message: str


class Problem(BaseModel):
    """An error, as RFC 9457 has it."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    type: Annotated[str, Field(json_schema_extra={"format": "uri-reference"})] = "about:blank"
    """`urn:nomad:problem:<name>` says which of Nomad's errors it is; `about:blank` is the status' own meaning."""
    title: str
    status: Annotated[int, Field(ge=400, le=599)]
    detail: str
    """What went wrong this time and what to do, in words for the user."""
    errors: list[FieldError] | None = None
    """One entry per part of the request that isn't valid."""


class InvalidInput(errors.InvalidRequestError):
    """The request doesn't have the form that its operation asks for."""

    def __init__(self, message: str, *, status: int = 422, fields: Sequence[FieldError] = ()):
        super().__init__(message, status=status)
        self.fields = list(fields)

    @classmethod
    def at(cls, found: Mapping[str, str]) -> Self:
        """The error that lists what is wrong (values) and where (keys)."""
        fields = [FieldError(location=location, message=message) for location, message in found.items()]
        return cls("; ".join(f"{field.location}: {field.message}" for field in fields), fields=fields)


# Most particular first. Every NomadError has a place; what isn't one is a bug and becomes a 500.
STATUS: Mapping[type[errors.NomadError], int] = {
    errors.AuthenticationError: 401,
    errors.NotFoundError: 404,
    errors.ConflictError: 409,
    errors.InvalidRequestError: 422,
    errors.UsageError: 422,
    errors.StateError: 503,
    errors.ApiError: 503,
    errors.MasterUnreachable: 503,
    errors.TransportError: 503,
    errors.DeliveryError: 503,
}


def status_of(exc: errors.NomadError) -> int:
    """The HTTP status for an error; a `RequestError` may carry its own."""
    if isinstance(exc, errors.RequestError) and exc.status:
        return exc.status
    return next((status for kind, status in STATUS.items() if isinstance(exc, kind)), 500)


def from_error(exc: errors.NomadError) -> Problem:
    """The document for one of Nomad's errors."""
    status = status_of(exc)
    fields = exc.fields or None if isinstance(exc, InvalidInput) else None
    return Problem(type=type_of(type(exc)), title=_title(status), status=status, detail=str(exc), errors=fields)


def type_of(kind: type[errors.NomadError]) -> str:
    """`BundleTampered` -> `urn:nomad:problem:bundle-tampered`."""
    words = "".join(f"-{c.lower()}" if c.isupper() else c for c in kind.__name__).strip("-")
    return f"urn:nomad:problem:{words}"


def from_validation(exc: ValidationError, place: str) -> InvalidInput:
    """pydantic's findings about the part of the request at `place`, as our error."""
    found = exc.errors(include_url=False, include_input=False)
    return InvalidInput.at({".".join([place, *map(str, error["loc"])]): _sentence(error) for error in found})


def response(problem: Problem, headers: Mapping[str, str] | None = None) -> web.Response:
    """The answer that carries `problem`."""
    return web.Response(
        body=problem.model_dump_json(exclude_none=True).encode(),
        status=problem.status,
        content_type=MEDIA_TYPE,
        headers=headers,
    )


def describe(exc: Exception, request: web.Request) -> Problem:
    """The document for anything that a handler may raise. What nobody expected is logged here, whole."""
    if isinstance(exc, errors.NomadError):
        return from_error(exc)
    if isinstance(exc, web.HTTPException):
        return _from_http(request, exc)
    incident = secrets.token_hex(4)
    _log.error("incident %s: %s %s failed", incident, request.method, request.path, exc_info=exc)
    detail = f"The master failed on this request. Its log has the details under incident {incident}."
    return Problem(title=_title(500), status=500, detail=detail)


@web.middleware
async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Outermost of the application: turns every error into a problem document."""
    try:
        return await handler(request)
    except Exception as exc:
        if isinstance(exc, web.HTTPException) and exc.status < 400:
            raise
        problem = describe(exc, request)
        headers = {}
        if problem.status == 401:
            headers["WWW-Authenticate"] = 'Bearer realm="nomad"'
        if isinstance(exc, web.HTTPMethodNotAllowed):
            headers["Allow"] = exc.headers["Allow"]
        return response(problem, headers)


def _from_http(request: web.Request, exc: web.HTTPException) -> Problem:
    if exc.status == 404:
        detail = f"There is nothing at {request.path}."
    elif isinstance(exc, web.HTTPMethodNotAllowed):
        detail = f"{request.path} doesn't know {request.method}; it takes {', '.join(sorted(exc.allowed_methods))}."
    elif isinstance(exc, web.HTTPRequestEntityTooLarge):
        detail = f"The body is larger than {request.client_max_size >> 20} MiB, which is the limit."
    else:
        detail = exc.text or exc.reason
    return Problem(title=_title(exc.status), status=exc.status, detail=detail)


def _title(status: int) -> str:
    return HTTPStatus(status).phrase


def _sentence(error: ErrorDetails) -> str:
    if error["type"] == "value_error":  # from a check of our own, which words it itself
        return str(error["ctx"]["error"])
    return error["msg"][:1].lower() + error["msg"][1:]
