"""A master with its REST interface, in this process: what `nomad up` runs and what programs embed.

    async with serve(settings, topology) as served:
        async with nomad.connect(served.url, served.token, signing_key=served.signing_key) as cluster:
            ...

The port is taken first: when it can't be, nothing else has been started. At the end the interface closes before
the master does, so that no request meets a master that is going down.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import web

from nomad.credentials import LOOPBACK_NAMES
from nomad.errors import UsageError
from nomad.master.app import Master
from nomad.master.rest import webapp
from nomad.master.rest.http import server
from nomad.master.store import Store
from nomad.runtime.base import Runtime
from nomad.settings import Rest, Settings
from nomad.topology import Topology

_ANY = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}


@dataclass(frozen=True, slots=True)
class Served:
    """A running master."""

    master: Master
    url: str
    """Where this machine reaches it."""
    token: str = field(repr=False)
    signing_key: bytes = field(repr=False)


@asynccontextmanager
async def serve(
    settings: Settings,
    topology: Topology | None,
    *,
    runtime: Runtime | None = None,
    store: Store | None = None,
    sock: socket.socket | None = None,
    other_tokens: Callable[[str], Awaitable[bool]] | None = None,
) -> AsyncIterator[Served]:
    """Run a master until the block ends, with its own `runtime` and `store` unless they are given.

    `sock`: what it listens on, if that is open already. `other_tokens`: see `webapp.application`. Raises `UsageError`
    when the port is taken or the host is none of this machine's, and what `Master` raises.
    """
    sock = sock or listen(settings.rest)
    try:
        async with Master(settings, topology, runtime=runtime, store=store) as master:
            loopback = settings.rest.host in LOOPBACK_NAMES
            app = webapp.application(
                master,
                token=master.token,
                hosts=LOOPBACK_NAMES if loopback else None,
                max_body=settings.rest.max_body,
                other_tokens=other_tokens,
            )
            async with answering(app, sock):
                host = _ANY.get(settings.rest.host, settings.rest.host)
                yield Served(master, f"http://{host}:{sock.getsockname()[1]}", master.token, master.signing_key)
    finally:
        sock.close()


@asynccontextmanager
async def answering(app: web.Application, sock: socket.socket) -> AsyncIterator[None]:
    """Have an application answer on a socket."""
    runner = server.runner(app)
    await runner.setup()
    try:
        await web.SockSite(runner, sock).start()
        yield
    finally:
        await runner.cleanup()


def listen(rest: Rest) -> socket.socket:
    """Where the REST interface is to be. Raises `UsageError`."""
    family = socket.AF_INET6 if ":" in rest.host else socket.AF_INET
    try:
        return socket.create_server((rest.host, rest.port), family=family)
    except OSError as exc:
        if exc.errno == errno.EACCES:
            raise UsageError(f"port {rest.port} may not be used here; take one above 1023, --port 30000") from exc
        if exc.errno != errno.EADDRINUSE:  # negative: the name couldn't be looked up
            raise UsageError(f"can't listen on {rest.host!r}: that is no address of this machine") from exc
        raise UsageError(
            f"port {rest.port} of {rest.host} is taken: is another `nomad up` running? "
            "Take another with --port (0 is any free one)"
        ) from exc
