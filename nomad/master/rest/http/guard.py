"""Who may ask. Everything is refused but what is allowed here: a new route needs no line to be protected.

The token is compared in constant time. The Host header is checked where the master listens on
loopback only: a page in the user's browser whose name was rebound to 127.0.0.1 still sends its own
name. (Such a page has no token either; this is the second lock.)
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Collection
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from nomad.errors import AuthenticationError, InvalidRequestError

PROVEN: web.AppKey[set[web.RequestHandler]] = web.AppKey("proven")
"""Connections by which a good token came; where the application has such a set."""


def require_token(
    token: str, *, open_paths: Collection[str], also: Callable[[str], Awaitable[bool]] | None = None
) -> Middleware:
    """Refuse every request that lacks `Authorization: Bearer <token>`, but those to exactly `open_paths`.

    `also`: whether another token than the master's own will do.
    """
    if not token:
        raise ValueError("an empty token would protect nothing")
    expected = token.encode()

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path not in open_paths:
            scheme, _, given = request.headers.get("Authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not given.strip():
                raise AuthenticationError("This needs a token: send the header `Authorization: Bearer <token>`.")
            own = hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), expected)
            if not own and (also is None or not await also(given.strip())):
                whose = "is not this master's" if also is None else "gives no right to use this master"
                raise AuthenticationError(f"The token {whose}.")
            if (proven := request.app.get(PROVEN)) is not None:
                proven.add(request.protocol)
        return await handler(request)

    return check


def require_host(allowed: Collection[str]) -> Middleware:
    """Refuse requests whose Host header names none of `allowed` (hosts without port)."""

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            host = urlsplit(f"//{request.headers.get('Host', '')}").hostname
        except ValueError:
            host = None
        if host not in allowed:
            raise InvalidRequestError(
                "The Host header names another machine; this master answers to loopback names only.", status=421
            )
        return await handler(request)

    return check
