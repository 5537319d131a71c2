"""What Kubernetes' API answers, as errors and lines. Pure; called by `nomad.kubernetes.api`."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import AsyncIterator
from typing import Any, NoReturn

from nomad.errors import (
    ApiConflict,
    ApiError,
    ApiExists,
    ApiForbidden,
    ApiGone,
    ApiInvalid,
    ApiNotFound,
    ApiUnauthorized,
    ApiUnavailable,
)

Json = dict[str, Any]

NEWLINE = re.compile(rb"\n")
ANY_END = re.compile(rb"[\r\n]")
"""Of a line, or of what is printed over in the same one: a bar that shows progress."""

SHORT = 100
"""Characters of a string that others may have, too."""

_ERRORS: dict[int, type[ApiError]] = {
    400: ApiInvalid,
    401: ApiUnauthorized,
    403: ApiForbidden,
    404: ApiNotFound,
    409: ApiConflict,
    410: ApiGone,
    422: ApiInvalid,
}


def status(text: str) -> Json:
    """Kubernetes' own description of an error; a proxy before it answers with anything."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"message": text[:1000].strip()}


def shared(value: Any) -> Any:
    """The same JSON, with strings that other objects have, too (names of fields, mostly), kept once for all of them.

    For what is kept for long: it takes as long again as reading the JSON, and of a Pipeline's memory is 40 % less.
    """
    if isinstance(value, dict):
        return {sys.intern(key): shared(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [shared(inner) for inner in value]
    return sys.intern(value) if isinstance(value, str) and len(value) <= SHORT else value


def fail(code: int, said: Json, retry_after: str | None) -> NoReturn:
    """The error that an answer means."""
    message = str(said.get("message") or f"HTTP status {code}")
    reason, details = str(said.get("reason") or ""), said.get("details") or {}
    if reason == "Expired":
        code = 410
    if code == 429 or code >= 500 or not code:
        wait = retry_after or details.get("retryAfterSeconds")
        try:
            seconds = float(wait) if wait is not None else (1.0 if code == 429 else None)
        except ValueError:
            seconds = 1.0
        raise ApiUnavailable(message, status=code, reason=reason, details=details, retry_after=seconds)
    kind = ApiExists if reason == "AlreadyExists" else _ERRORS.get(code, ApiError)
    raise kind(message, status=code, reason=reason, details=details)


async def lines(
    chunks: AsyncIterator[bytes], *, ends: re.Pattern[bytes] = NEWLINE, longest: float = math.inf
) -> AsyncIterator[bytes]:
    """Lines, each with its end, as they come; one of more than `longest` bytes in pieces, the last with the end."""
    kept: list[bytes] = []
    size = 0
    async for chunk in chunks:
        begin = 0
        for end in ends.finditer(chunk):
            yield b"".join([*kept, chunk[begin : end.end()]])
            kept, size, begin = [], 0, end.end()
        if begin < len(chunk):
            kept.append(chunk[begin:])
            size += len(kept[-1])
        if size >= longest:
            yield b"".join(kept)
            kept, size = [], 0
    if kept:
        yield b"".join(kept)
