"""The errors of the system as ours, for all transports that use its sockets."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from nomad.errors import ConnectionBroken, TransportError


@asynccontextmanager
async def dialling(address: str, timeout: float) -> AsyncIterator[None]:
    """What goes wrong in the block, or takes longer than `timeout` seconds, is raised as `ConnectionBroken`."""
    try:
        async with asyncio.timeout(timeout):
            yield
    except TimeoutError as exc:
        raise ConnectionBroken(f"{address} didn't answer within {timeout:g} s") from exc
    except TransportError:
        raise
    except OSError as exc:
        raise ConnectionBroken(f"{address} can't be reached: {exc.strerror or exc}") from exc


def cannot_listen(address: str, exc: OSError) -> TransportError:
    """The error of a listener that couldn't be bound."""
    if exc.errno == errno.EADDRINUSE:
        return TransportError(f"{address} is taken by another listener; port 0 or an empty path picks a free one")
    return TransportError(f"can't listen at {address}: {exc.strerror or exc}")
