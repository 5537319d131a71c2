"""How the application is served: what has to be said to aiohttp's server, in one place.

Used by `nomad.master.serve`, and by tests in its stead.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from aiohttp import web

from nomad.master.rest.http.guard import PROVEN
from nomad.tasks import Tasks

SHUTDOWN = 2.0
"""Seconds that requests under way get to finish when the interface closes."""

STRANGER = 30.0
"""Seconds. A connection by which nobody has shown a good token for so long is cut, within as many more: half a request
would hold it for ever, and an empty one for an hour.
"""


def runner(app: web.Application) -> web.AppRunner:
    """The server of `app`, which listens nowhere yet.

    Bodies are handed on as they came: the server would inflate them before anybody has looked at the token.
    """
    made = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN, auto_decompress=False)
    proven = app[PROVEN] = set[web.RequestHandler]()

    async def look() -> None:
        before = set[web.RequestHandler]()
        while True:
            await asyncio.sleep(STRANGER)
            now = set(made.server.connections) if made.server is not None else set()
            proven.intersection_update(now)
            for connection in (before & now) - proven:
                connection.force_close()
            before = now

    async def looked_after(app: web.Application) -> AsyncIterator[None]:
        tasks = Tasks()
        tasks.start(look(), name="cut strangers off")
        yield
        await tasks.close()

    app.cleanup_ctx.append(looked_after)
    return made
