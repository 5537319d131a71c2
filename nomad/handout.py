"""Installed packages on their way from a node's agent to a pod of that node which shares no folder with it: both ends.

    pod -> agent    packages   requirements, python, platform
    agent -> pod    failed     message, final                  or
                    part       with bytes of an uncompressed tar behind the head, until
                    end        sha256 of all of it (hex)

Control messages (`nomad.control`) as heads of frames, after the handshake of data links. A pod has the agent's address
and a key of its own from the master: `key_of`. The agent installs (`nomad.packages`) what is asked for by name, whoever
asks: a pod is an operator's code, and pip builds, so runs, what it is given by address. The pod verifies and unpacks.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from nomad import control, needs
from nomad.delivery.driver import shake_dialer
from nomad.errors import DeliveryError, PackagesError, PipelineError, TransportError
from nomad.packages import PLATFORM, PYTHON, Cache, Packages, lock_of
from nomad.transport import registry
from nomad.transport.base import Connection, Frame

PREFIX = "pod:"
"""Of what pods call themselves towards agents."""

PART_BYTES = 512 * 1024


def key_of(agents: bytes, pod: str) -> bytes:
    """The key with which a pod asks agents; `agents` is theirs."""
    return hmac.new(agents, f"{PREFIX}{pod}".encode(), hashlib.sha256).digest()


async def fetched(cache: Cache, requirements: tuple[str, ...], address: str, pod: str, key: bytes) -> Packages:
    """The packages that fulfil `requirements`, by the node's agent. Raises `PackagesError`."""

    async def fetch(folder: Path) -> None:
        try:
            conn = await registry.connect(address)
            try:
                await shake_dialer(conn, key, f"{PREFIX}{pod}", {})
                asked = {"requirements": list(requirements), "python": PYTHON, "platform": PLATFORM}
                conn.write([(control.pack({"type": "packages", **asked}),)])
                with _scratch(folder) as file:
                    await _receive(conn, file)
                    await asyncio.to_thread(_unpack, file, folder)
            finally:
                conn.abort()
        except (TransportError, DeliveryError, tarfile.TarError, ValueError, KeyError) as exc:
            raise PackagesError(f"the node's agent at {address} can't be asked for packages: {exc}") from exc

    return await cache.made(lock_of(requirements), fetch)


class Counter:
    """The agent's end, as `nomad.measure.agent.Visits`."""

    prefix = PREFIX

    def __init__(self, key: bytes, cache: Cache) -> None:
        """`key`: the agents' own."""
        self._key = key
        self._cache = cache

    def key_for(self, name: str) -> bytes:
        return key_of(self._key, name.removeprefix(PREFIX))

    async def visited(self, name: str, conn: Connection, frames: list[Frame]) -> None:
        await hand_out(conn, frames, self._cache)


async def hand_out(conn: Connection, frames: list[Frame], cache: Cache) -> None:
    """The agent's end: answer one pod that has proved itself. Raises `TransportError`, `ValueError`."""
    for frame in frames or await conn.recv():
        asked = control.unpack(bytes(frame[0]))
        try:
            packages = await _installed(asked, cache)
        except PackagesError as exc:
            conn.write([(control.pack({"type": "failed", "message": str(exc), "final": exc.final}),)])
        else:
            with packages:
                await _send(conn, packages.path)
        await conn.close()
        return


async def _installed(asked: dict[str, Any], cache: Cache) -> Packages:
    requirements, python, platform = asked.get("requirements"), asked.get("python"), asked.get("platform")
    if asked["type"] != "packages" or not isinstance(requirements, list) or not isinstance(python, str):
        raise ValueError("not a request for packages")
    if platform != PLATFORM:
        raise PackagesError(
            f"packages are installed for {PLATFORM} here, and the operator's image is {platform}: "
            "put what it requires into the image",
            final=True,
        )
    if python != PYTHON:  # pip would choose what packages need by the Python that it runs with
        raise PackagesError(
            f"packages are installed for Python {PYTHON} here, as that is the agent's, and the operator's is {python}: "
            f"put what it requires into its image, submit with Python {PYTHON}, or give agents an image with {python}",
            final=True,
        )
    try:
        wanted = needs.requirements(requirements)
    except PipelineError as exc:
        raise PackagesError(f"the node's agent installs packages by name only: {exc}", final=True) from exc
    return await cache.installed(wanted)


async def _send(conn: Connection, folder: Path) -> None:
    total, blocks = hashlib.sha256(), _tar(folder)
    while (block := await asyncio.to_thread(next, blocks, None)) is not None:
        total.update(block)
        conn.write([(control.pack({"type": "part"}), block)])
        await conn.drain()
    conn.write([(control.pack({"type": "end", "sha256": total.hexdigest()}),)])


async def _receive(conn: Connection, file: IO[bytes]) -> None:
    total = hashlib.sha256()
    while True:
        for frame in await conn.recv():
            message = control.unpack(bytes(frame[0]))
            match message["type"]:
                case "part":
                    total.update(frame[1])
                    file.write(frame[1])
                case "end" if message["sha256"] == total.hexdigest():
                    return
                case "failed":
                    raise PackagesError(str(message["message"]), final=message["final"] is True)
                case _:
                    raise ValueError("what came isn't what was sent")


def _tar(folder: Path) -> Iterator[bytes]:
    """A tar of the regular files in a folder, in large pieces."""
    gathered = bytearray()
    for root, _, names in os.walk(folder):
        for path in (Path(root, name) for name in sorted(names)):
            if path.is_symlink() or not path.is_file():
                continue
            status = path.stat()
            head = tarfile.TarInfo(str(path.relative_to(folder)))
            head.size, head.mtime, head.mode = status.st_size, int(status.st_mtime), status.st_mode & 0o777
            gathered += head.tobuf(tarfile.PAX_FORMAT)
            with path.open("rb") as file:
                left = head.size
                while left:
                    data = file.read(min(left, PART_BYTES))
                    if not data:
                        raise OSError(f"{path} is shorter than it was")
                    left -= len(data)
                    gathered += data
                    if len(gathered) >= PART_BYTES:
                        yield bytes(gathered)
                        gathered.clear()
            gathered += bytes(-head.size % tarfile.BLOCKSIZE)
    yield bytes(gathered) + bytes(2 * tarfile.BLOCKSIZE)


def _scratch(folder: Path) -> IO[bytes]:
    """A file without a name, on the same disk."""
    return tempfile.TemporaryFile(dir=folder.parent)


def _unpack(file: IO[bytes], folder: Path) -> None:
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        tar.extractall(folder, filter="data")
