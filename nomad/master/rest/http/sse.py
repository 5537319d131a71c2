"""Server-sent events: an async iterator as an answer that goes on.

Each item is one event with JSON as its data. After the last one comes an event named `end`, so that
a reader can tell a finished stream from a broken connection; an error on the way is an event
named `problem`. A comment goes out when nothing else did for `KEEP_ALIVE` seconds, which is also how
a reader that went away is noticed. What a slow reader makes of the iterator (skip, block) is
the iterator's business.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from aiohttp import web

from nomad.master.rest.http import problems

MEDIA_TYPE = "text/event-stream"
KEEP_ALIVE = 5.0
T = TypeVar("T")
_NEXT: web.AppKey[set[asyncio.Future[Any]]] = web.AppKey("streams_waiting", set)


def setup(app: web.Application) -> None:
    """End open streams when `app` shuts down; they would hold it back until its time-out."""
    app[_NEXT] = set()
    app.on_shutdown.append(_end_all)


def wanted(request: web.Request) -> bool:
    """Whether the request's Accept header asks for events by name."""
    parts = request.headers.get("Accept", "").split(",")
    return any(part.partition(";")[0].strip().lower() == MEDIA_TYPE for part in parts)


async def respond(
    request: web.Request, items: AsyncIterator[Any], encode: Callable[[Any], bytes]
) -> web.StreamResponse:
    """Send `items`, each as `encode` gives it (JSON on one line), until they end or the reader is gone."""
    async with ending(items):
        return await _send(request, items, encode)


async def _send(request: web.Request, items: AsyncIterator[Any], encode: Callable[[Any], bytes]) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": MEDIA_TYPE, "Cache-Control": "no-store"})
    waiting = request.app[_NEXT]
    upcoming = _upcoming(items)
    waiting.add(upcoming)
    try:
        await response.prepare(request)
        while True:
            done, _ = await asyncio.wait((upcoming,), timeout=KEEP_ALIVE)
            if not done:
                await response.write(b": still here\n\n")
                continue
            waiting.discard(upcoming)
            if upcoming.cancelled():  # the application shuts down; no `end`: the stream isn't over
                return response
            try:
                item = upcoming.result()
            except StopAsyncIteration:
                await response.write(b"event: end\ndata: {}\n\n")
                return response
            except Exception as exc:  # noqa: BLE001 - the status is sent already; the reader still gets to know
                problem = problems.describe(exc, request).model_dump_json(exclude_none=True).encode()
                await response.write(b"event: problem\ndata: " + problem + b"\n\n")
                return response
            await response.write(b"data: " + encode(item) + b"\n\n")
            upcoming = _upcoming(items)
            waiting.add(upcoming)
    except ConnectionResetError:  # the reader is gone
        return response
    finally:
        waiting.discard(upcoming)
        upcoming.cancel()
        await asyncio.gather(upcoming, return_exceptions=True)


@asynccontextmanager
async def ending(items: AsyncIterator[T]) -> AsyncIterator[AsyncIterator[T]]:
    """`items` for a block that may be left early: what they hold is let go of now, not when garbage is collected."""
    try:
        yield items
    finally:
        if close := getattr(items, "aclose", None):
            await close()


def _upcoming(items: AsyncIterator[Any]) -> asyncio.Future[Any]:
    # A task of its own, because waiting with a time-out must not cancel the iterator in mid-step.
    return asyncio.ensure_future(anext(items))


async def _end_all(app: web.Application) -> None:
    waiting = app[_NEXT]
    for future in list(waiting):
        future.cancel()
