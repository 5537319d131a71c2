"""A hop between a client and an API server whose connections a test can cut, refuse and silence."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import yaml


class Proxy:
    """Carries bytes to `target` (a URL). `async with`; `url` is where clients go."""

    def __init__(self, target: str) -> None:
        self.turn(target)
        self._pipes: set[asyncio.Task[Any]] = set()
        self._server: asyncio.Server | None = None
        self.refusing = False
        """New connections are closed at once."""
        self.mute = False
        """What the target answers is lost."""
        self.connections = 0
        """How many were made so far."""
        self.answers: dict[int, int] = {}
        """Of each that stands, by its number: how often the target has said something."""
        self.url = ""

    def turn(self, target: str) -> None:
        """Carry the bytes of new connections elsewhere; the others stay."""
        parts = urlsplit(target)
        self._target = (parts.hostname, parts.port)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"https://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        await self.cut()

    async def cut(self) -> None:
        """End all connections."""
        pipes = list(self._pipes)
        for pipe in pipes:
            pipe.cancel()
        await asyncio.gather(*pipes, return_exceptions=True)

    def kubeconfig(self, original: Path, path: Path) -> Path:
        """`original` through this hop."""
        content = yaml.safe_load(original.read_text())
        content["clusters"][0]["cluster"]["server"] = self.url
        path.write_text(yaml.safe_dump(content))
        return path

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._pipes.add(task)
        self.connections += 1
        number = self.connections
        try:
            if self.refusing:
                return
            far_reader, far_writer = await asyncio.open_connection(*self._target)
            self.answers[number] = 0
            try:
                both = [
                    asyncio.create_task(self._copy(reader, far_writer)),
                    asyncio.create_task(self._copy(far_reader, writer, answers=number)),
                ]
                try:
                    await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for one in both:
                        one.cancel()
                    await asyncio.wait(both)
            finally:
                far_writer.transport.abort()
        except asyncio.CancelledError:
            pass  # cut
        finally:
            writer.transport.abort()
            self._pipes.discard(task)
            self.answers.pop(number, None)

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: int = 0) -> None:
        try:
            while data := await reader.read(65536):
                if answers in self.answers:
                    self.answers[answers] += 1
                if not (answers and self.mute):
                    writer.write(data)
                    await writer.drain()
        except OSError:
            pass  # either side has gone
