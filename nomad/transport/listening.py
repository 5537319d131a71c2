"""What every listener repeats: a task per accepted connection, owned, and ended in order.

Used by the listeners of the transports; knows nothing of sockets.
"""

from __future__ import annotations

import asyncio
import logging

from nomad.errors import TransportError
from nomad.transport.base import Connection, OnConnection

log = logging.getLogger(__name__)


class Handlers:
    """The handler tasks of one listener."""

    def __init__(self, on_connection: OnConnection, name: str) -> None:
        self._on_connection = on_connection
        self._name = name
        self._connections: dict[asyncio.Task[None], Connection] = {}
        self._closing = False

    def start(self, connection: Connection) -> None:
        """Run the handler for `connection`, which is aborted when the handler returns."""
        if self._closing:
            connection.abort()
            return
        task = asyncio.get_running_loop().create_task(
            self._handle(connection), name=f"{self._name} from {connection.peer}"
        )
        self._connections[task] = connection
        task.add_done_callback(self._done)

    async def close(self) -> None:
        """Cancel the handlers, abort their connections, wait for both. Idempotent.

        A handler that closes its own listener isn't cancelled: it ends by returning.
        """
        self._closing = True
        mine = asyncio.current_task()
        others = {task: connection for task, connection in self._connections.items() if task is not mine}
        for task, connection in others.items():
            task.cancel()
            connection.abort()
        if others:
            await asyncio.wait(others)
        for connection in others.values():
            await connection.close()

    async def _handle(self, connection: Connection) -> None:
        try:
            await self._on_connection(connection)
        except TransportError as exc:
            log.debug("%s: the connection from %s ended: %s", self._name, connection.peer, exc)
        except Exception:
            log.exception("%s: the handler of the connection from %s failed", self._name, connection.peer)
        finally:
            connection.abort()
            await connection.close()

    def _done(self, task: asyncio.Task[None]) -> None:
        self._connections.pop(task).abort()
