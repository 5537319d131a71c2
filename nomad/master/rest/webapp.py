"""The REST interface as an application of aiohttp: what `nomad up` and `nomad master` serve, and tests drive.

The endpoints are those of `api`. Everything needs the token but the two health checks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from dataclasses import is_dataclass

from aiohttp import web
from pydantic import ConfigDict, with_config

from nomad import __version__
from nomad.errors import RequestError
from nomad.master import views
from nomad.master.app import Master
from nomad.master.rest import api, forms
from nomad.master.rest.http import guard, problems, sse

OPEN_PATHS = frozenset({"/healthz", "/readyz"})
MAX_BODY = 64 << 20
"""Bytes."""


def application(
    master: Master,
    *,
    token: str,
    hosts: Collection[str] | None = None,
    max_body: int = MAX_BODY,
    other_tokens: Callable[[str], Awaitable[bool]] | None = None,
) -> web.Application:
    """The aiohttp application. `hosts`: names that the Host header may have; None allows any. `other_tokens`: whether a
    token that isn't the master's will do, too.
    """
    middlewares = [problems.middleware, guard.require_token(token, open_paths=OPEN_PATHS, also=other_tokens)]
    if hosts is not None:
        middlewares.insert(1, guard.require_host(hosts))
    app = web.Application(middlewares=middlewares, client_max_size=max_body)
    app.on_response_prepare.append(_say_less)
    sse.setup(app)
    for routes in (api.api, api.health):
        routes.bind(app, master)
    app.router.add_get("/openapi.json", _openapi, allow_head=False)
    return app


def standby() -> web.Application:
    """The application of a master that waits for another one to end: healthy, ready to take over, and no more."""
    app = web.Application(middlewares=[problems.middleware])
    app.on_response_prepare.append(_say_less)

    async def well(request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def wait(request: web.Request) -> web.Response:
        raise RequestError("This master stands by for another one, or is about to lead; try again.", status=503)

    for path in OPEN_PATHS:
        app.router.add_get(path, well)
    app.router.add_route("*", "/{any:.*}", wait)
    return app


async def _say_less(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["Server"] = "nomad"  # and not the versions of Python and aiohttp, which aiohttp would tell


async def _openapi(request: web.Request) -> web.Response:
    return web.Response(body=await asyncio.to_thread(openapi_document), content_type="application/json")


def openapi_document() -> bytes:
    """The OpenAPI document of this interface, as JSON."""
    from nomad.master.rest.http import openapi

    for view in (*vars(views).values(), *vars(forms).values()):  # the docstrings of their fields are the descriptions
        if isinstance(view, type) and is_dataclass(view):
            with_config(ConfigDict(use_attribute_docstrings=True))(view)
    return openapi.document(
        [*api.api.operations, *api.health.operations],
        title="Nomad",
        version=__version__,
        description="Pipelines of asyncio actors over edge, fog and cloud.",
        open_paths=OPEN_PATHS,
    )
