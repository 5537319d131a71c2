"""Packages that operators require, installed once per node: one folder of them for each *lock*.

A lock is what is asked for (requirements in their normal form), for which Python and platform. Processes of one node
that share a cache folder install a lock once: the first does, the others wait. Called by pods (`nomad.actor`), with
the cache that their node has, and by a node's agent (`nomad.measure.node`) where pods share no folder.

    <folder>/<lock>/          packages, as `pip install --target` leaves them; complete, as it is renamed last
    <folder>/<lock>.lock      held shared by whoever uses the packages, exclusively by who installs or removes them
    <folder>/<lock>.new/      being installed; .tmp/ is pip's own, .old/ being removed

Where packages come from is pip's configuration in the process that installs. What nobody uses goes, the least recently
used first, when the cache is over its size. Nothing here verifies what is asked for: the caller has.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import importlib
import importlib.util
import json
import logging
import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from nomad.errors import PackagesError

log = logging.getLogger(__name__)

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
PLATFORM = f"{sysconfig.get_platform()}-{platform.libc_ver()[0] or 'libc'}"

CACHE_BYTES = 4 << 30
"""Of a node's packages, unless a setting says otherwise."""

INSTALL_SECONDS = 1800.0
"""So long an installation may take."""

AT_ONCE = 2
"""Installations of one process: each takes 55 MB and more, and a node's agent has 512 MiB unless told otherwise."""

WAIT_SECONDS = 0.1
"""Between two looks at whether somebody else is done."""

SAID_LINES = 5
"""Of pip's last lines that reach the user."""

_AWAY = (
    "Retrying (Retry(",
    "Could not fetch URL",
    "connection broken",
    "Connection to ",
    "ReadTimeoutError",
    "HTTP error 5",
)
"""What pip says when an index can't be reached. It goes on to say that there is no such package, which nobody knows."""

_FINAL = (
    "No matching distribution found",
    "Could not find a version that satisfies",
    "ResolutionImpossible",
    "conflicting dependencies",
    "Invalid requirement",
    "requires a different Python",
    "Failed to build",
    "metadata-generation-failed",
)
"""What it says when it would say the same the next time."""


def lock_of(requirements: Iterable[str], python: str = PYTHON, platform: str = PLATFORM) -> str:
    """The name of what is to be installed: 32 hex digits."""
    content = json.dumps([sorted(set(requirements)), python, platform])
    return hashlib.sha256(content.encode()).hexdigest()[:32]


class Maker(Protocol):
    """Fills an empty folder."""

    def __call__(self, folder: Path, /) -> Awaitable[None]: ...


class Packages:
    """Installed packages, which stay as long as this is open: `close` it, or leave its block."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    def touched(self) -> bool:
        """Whether they are there; they are noted as used just now."""
        try:
            os.utime(self.path)
        except FileNotFoundError:
            return False
        return True

    def close(self) -> None:
        """They may be removed from now on. Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class Cache:
    """The packages of one node, or of one pod that has its own copy. Any number of processes may use one folder."""

    def __init__(self, folder: Path, limit: int = CACHE_BYTES) -> None:
        """`limit`: bytes that are kept, beside what is in use."""
        self.folder = folder
        self._limit = limit
        self._turns = asyncio.Semaphore(AT_ONCE)

    async def installed(self, requirements: Sequence[str]) -> Packages:
        """The packages that fulfil `requirements` with this Python, installed if they aren't there.

        Raises `PackagesError`.
        """

        async def install(folder: Path) -> None:
            async with self._turns:
                await _install(folder, requirements)

        return await self.made(lock_of(requirements), install)

    async def made(self, lock: str, make: Maker) -> Packages:
        """The folder of a lock; `make` fills an empty one if it isn't there yet. Raises what that does."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            path = self.folder / lock
            while True:
                packages = await self._shared(path)
                if packages is not None:
                    return packages
                async with _held(path.with_suffix(".lock"), fcntl.LOCK_EX):
                    if not _there(path):  # nobody else has meanwhile
                        await self._make(path, make)
        except OSError as exc:
            raise PackagesError(f"packages can't be installed in {self.folder}: {exc}") from exc

    async def _shared(self, path: Path) -> Packages | None:
        """The folder, if it is there, held."""
        packages = Packages(path, await _locked(path.with_suffix(".lock"), fcntl.LOCK_SH))
        if packages.touched():
            return packages
        packages.close()
        return None

    async def _make(self, path: Path, make: Maker) -> None:
        new = path.with_suffix(".new")
        await asyncio.to_thread(shutil.rmtree, new, ignore_errors=True)
        new.mkdir(mode=0o700)
        try:
            await make(new)
            new.rename(path)
        except BaseException:
            await asyncio.to_thread(shutil.rmtree, new, ignore_errors=True)
            raise
        try:
            await asyncio.to_thread(self._shrink, path)
        except OSError as exc:  # whoever is next tries again
            log.warning("packages that nobody uses can't be removed from %s: %s", self.folder, exc)

    def tidy(self) -> None:
        """Remove what processes left that were killed while they installed or removed something. Blocks."""
        for path in self._folders():
            if path.suffix:
                with _free(path) as free:
                    if free:
                        shutil.rmtree(path, ignore_errors=True)

    def _shrink(self, but: Path) -> None:
        """Remove what nobody uses, least recently used first, until the rest is within the limit."""
        self.tidy()
        kept = []
        for path in self._folders():
            with contextlib.suppress(FileNotFoundError):  # others remove, too
                if not path.suffix:
                    kept.append((path.stat().st_mtime, path, _size(path)))
        total = sum(size for _, _, size in kept)
        for _, path, size in sorted(kept):
            if total <= self._limit:
                return
            if path != but and _remove(path):
                total -= size

    def _folders(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if path.is_dir()] if self.folder.exists() else []


def use(packages: Path) -> list[str]:
    """Have this process import from there first, from now on.

    Returns the names of modules in it that are loaded already, from elsewhere, and stay as they are.
    """
    sys.path.insert(0, str(packages))
    importlib.invalidate_caches()
    tops = {
        entry.name.partition(".")[0] for entry in packages.iterdir() if not entry.name.startswith((".", "_", "bin"))
    }
    return sorted(
        name
        for name in tops & sys.modules.keys()
        if not str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(packages))
    )


async def _install(folder: Path, requirements: Sequence[str]) -> None:
    if importlib.util.find_spec("pip") is None:
        raise PackagesError(f"packages can't be installed: {sys.executable} has no pip", final=True)
    scratch = folder.with_suffix(".tmp")
    scratch.mkdir(mode=0o700, exist_ok=True)
    command = [
        *(sys.executable, "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"),
        *("--progress-bar", "off", "--retries", "2", "--target", str(folder)),
        *("--", *requirements),
    ]
    # Beside the folder, which is on a disk with room; the system's may be a small one in memory.
    environment = {**os.environ, "TMPDIR": str(scratch), "PIP_ROOT_USER_ACTION": "ignore"}
    process = await asyncio.create_subprocess_exec(
        *command,
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(INSTALL_SECONDS):
            output, _ = await process.communicate()
    except TimeoutError:
        raise PackagesError(f"installing {', '.join(requirements)} took longer than {INSTALL_SECONDS:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await asyncio.to_thread(shutil.rmtree, scratch, ignore_errors=True)
    if process.returncode:
        raise _failed(requirements, output.decode(errors="replace"))


def _failed(requirements: Sequence[str], output: str) -> PackagesError:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("ERROR:")] or lines
    away = any(word in line for line in lines for word in _AWAY)
    final = not away and any(word in line for line in lines for word in _FINAL)
    why = "the index isn't reachable" if away else "pip says"
    text = " / ".join(line.removeprefix("ERROR:").strip() for line in said[-SAID_LINES:])
    return PackagesError(f"{', '.join(requirements)} can't be installed: {why}: {text}", final=final)


@contextlib.asynccontextmanager
async def _held(path: Path, how: int) -> AsyncIterator[None]:
    descriptor = await _locked(path, how)
    try:
        yield
    finally:
        os.close(descriptor)


async def _locked(path: Path, how: int) -> int:
    """A descriptor that holds the lock. Waits in a way that can be cancelled, as no thread can."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, how | fcntl.LOCK_NB)
                return descriptor
            await asyncio.sleep(WAIT_SECONDS)
    except BaseException:
        os.close(descriptor)
        raise


@contextlib.contextmanager
def _free(path: Path) -> Iterator[bool]:
    """Whether nobody has the lock of it; nobody gets it while the block runs."""
    descriptor = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        yield False
        return
    try:
        yield True
    finally:
        os.close(descriptor)


def _remove(path: Path) -> bool:
    """Whether nobody used it, and it is gone."""
    with _free(path) as free:
        if free:
            old = path.with_suffix(".old")
            shutil.rmtree(old, ignore_errors=True)
            with contextlib.suppress(FileNotFoundError):  # somebody else was faster
                path.rename(old)
            shutil.rmtree(old, ignore_errors=True)
        return free


def _there(path: Path) -> bool:
    return path.exists()


def _size(folder: Path) -> int:
    return sum(entry.lstat().st_size for entry in _files(folder))


def _files(folder: Path) -> Iterator[Path]:
    for root, _, names in os.walk(folder):
        yield from (Path(root, name) for name in names)
