"""How the application is served: what has to be said to aiohttp's server, in one place.

Used by `nomad.master.serve`, and by tests in its stead.
"""

from __future__ import annotations

from aiohttp import web

SHUTDOWN = 2.0
"""Seconds that requests under way get to finish when the interface closes."""


def runner(app: web.Application) -> web.AppRunner:
    """The server of `app`, which listens nowhere yet.

    Bodies are handed on as they came: the server would inflate them before anybody has looked at the token.
    """
    return web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN, auto_decompress=False)
