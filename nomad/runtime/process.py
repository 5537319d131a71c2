"""Processes that may outlive the one that started them: identity, end, signals. POSIX only.

Used by the local runtime. A pid alone says nothing once its process has ended: the kernel gives it to
another. So a process is known by its pid and its *birth*, and nothing is signalled whose birth differs.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

POLL_SECONDS = 0.2
"""How often a process is looked at where the system has no descriptors for processes."""

_HAS_PROC = Path("/proc/self/stat").exists()

_GATE = ("/bin/sh", "-c", 'read -r go && exec "$@" </dev/null', "sh")
"""Runs what follows once a line has come in. If its starter dies before that, it ends by itself."""


class Gated:
    """A new process in a session of its own that waits for `go` before it runs `argv`.

    The starter writes down pid and birth in between, so that at no instant a process runs that nobody
    would find again. Raises `OSError`. Takes about a millisecond.
    """

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], output: Path) -> None:
        gate, self._go = os.pipe()
        try:
            self.pid = os.posix_spawn(
                _GATE[0],
                [*_GATE, *argv],
                env,
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, gate, 0),
                    (os.POSIX_SPAWN_OPEN, 1, str(output), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600),
                    (os.POSIX_SPAWN_DUP2, 1, 2),
                ],
                setsid=True,
                setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],  # Python ignores them; programs expect the default
            )
        except BaseException:
            os.close(self._go)
            raise
        finally:
            os.close(gate)

    def go(self) -> None:
        os.write(self._go, b"\n")
        os.close(self._go)

    def give_up(self) -> None:
        """It ends at once, without having run anything."""
        os.close(self._go)
        os.waitpid(self.pid, 0)


def birth(pid: int) -> str | None:
    """What tells this process from an earlier or later one with the same pid; None when there is none.

    A zombie counts as gone.
    """
    if _HAS_PROC:
        try:
            # The name in parentheses may hold anything; the fields after it are plain: state is the
            # first, the start time in clock ticks since boot the twentieth (proc(5)).
            fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        except (FileNotFoundError, ProcessLookupError):
            return None
        return None if fields[0] in "ZX" else f"{boot} {fields[19]}"
    found = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


async def ended(pid: int, born: str, *, child: bool) -> int | None:
    """Wait until the process has ended, kill what is left of its group, and reap it if it is our child.

    Returns the exit code (negative: the signal), or None for a process that isn't a child.
    """
    if not hasattr(os, "pidfd_open"):
        return await _ended_by_polling(pid, born, child=child)
    if child or birth(pid) == born:
        await _gone(pid, born, child=child)
        # A child is a zombie now: its pid and so its group can't be someone else's yet.
        signal_group(pid, signal.SIGKILL)
    return _reap(pid, 0) if child else None


def signal_group(pid: int, number: signal.Signals) -> None:
    """Signal the session that `pid` leads; nothing happens if nobody is left."""
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):  # macOS says the latter of a group of zombies
        pass


async def _gone(pid: int, born: str, *, child: bool) -> None:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    loop.add_reader(descriptor, lambda: None if done.done() else done.set_result(None))
    try:
        if child or birth(pid) == born:  # looked at again: the descriptor now holds on to the right one
            await done
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


async def _ended_by_polling(pid: int, born: str, *, child: bool) -> int | None:
    alive, code = child or birth(pid) == born, None
    while alive:
        await asyncio.sleep(POLL_SECONDS)
        if child:
            code = _reap(pid, os.WNOHANG)
            alive = code is None and birth(pid) is not None
        else:
            alive = birth(pid) == born
        if not alive:
            signal_group(pid, signal.SIGKILL)
    return code


def _reap(pid: int, options: int) -> int | None:
    """The exit code of a child that has ended; None when it hasn't, or when it isn't ours to ask."""
    try:
        found, status = os.waitpid(pid, options)
    except ChildProcessError:
        return None
    return os.waitstatus_to_exitcode(status) if found else None
