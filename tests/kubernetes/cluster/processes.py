"""Processes that outlive the one that started them, and a file that says which they are.

What started them may be gone or have crashed: whoever opens the same file again can end them. A process is known by
its pid and the time of its start, so that a pid that was given out again is never taken for it.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

MARK = "NOMAD_TEST_CLUSTER"
"""In the environment of everything started here: the check for what a test left behind passes it over."""
END_SECONDS = 20.0


class ClusterError(Exception):
    """A test cluster can't be brought up or did not do what was asked; the text says why."""


class Processes:
    """The processes of one cluster. `path` is where they are written down."""

    def __init__(self, path: Path, logs: Path) -> None:
        self._path = path
        self._logs = logs

    def start(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """Start `command` in a session of its own, its output at the end of `<logs>/<name>.log`."""
        if self.running(name):
            raise ClusterError(f"{name} runs already")
        self._logs.mkdir(parents=True, exist_ok=True)
        inherited = {key: value for key, value in os.environ.items() if key != "NOMAD_TEST_RUN"}
        log = os.open(self.log(name), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            pid = os.posix_spawnp(
                command[0],
                list(command),
                {**inherited, MARK: "1", **(environment or {})},
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_DUP2, log, 1),
                    (os.POSIX_SPAWN_DUP2, log, 2),
                ],
                setsid=True,
            )
        finally:
            os.close(log)
        self._note(add={name: {"pid": pid, "started": psutil.Process(pid).create_time()}})

    def running(self, name: str) -> bool:
        process = self._process(name)
        return process is not None and process.status() != psutil.STATUS_ZOMBIE

    def names(self) -> list[str]:
        return list(self._known())

    def pid(self, name: str) -> int:
        return int(self._known()[name]["pid"])

    def log(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def wait(self, name: str, ready: Callable[[], bool], what: str, timeout: float = 60.0) -> None:
        """Until `ready()`. Raises `ClusterError` with the end of the log when the process ends or takes too long."""
        end = time.monotonic() + timeout
        while not ready():
            if not self.running(name) or time.monotonic() > end:
                state = "takes too long" if self.running(name) else "ended"
                tail = "\n  ".join(self.log(name).read_text(errors="replace").splitlines()[-15:])
                raise ClusterError(f"{name} {state} ({what}); {self.log(name)} ends with\n  {tail}")
            time.sleep(0.05)

    def send(self, name: str, number: int) -> None:
        if process := self._process(name):
            process.send_signal(number)

    def stop(self, *names: str, number: int = signal.SIGTERM) -> None:
        """End these processes and wait; what does not end is killed. Unknown names are passed over."""
        ending = {name: process for name in names if (process := self._process(name))}
        for process in ending.values():
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                pass
        for process in wait_gone(ending.values(), END_SECONDS):
            process.kill()
        if left := wait_gone(ending.values(), END_SECONDS):
            raise ClusterError(f"these processes can't be ended: {left}")
        self._note(drop=names)

    def stop_all(self, number: int = signal.SIGTERM) -> None:
        self.stop(*self.names(), number=number)

    def _process(self, name: str) -> psutil.Process | None:
        known = self._known().get(name)
        if known is None:
            return None
        try:
            process = psutil.Process(known["pid"])
            return process if abs(process.create_time() - known["started"]) < 0.5 else None
        except psutil.NoSuchProcess:
            return None

    def _known(self) -> dict[str, dict[str, Any]]:
        """What the file says now: others may have it open, too."""
        return dict(json.loads(self._path.read_text())) if self._path.exists() else {}

    def _note(self, add: Mapping[str, dict[str, Any]] | None = None, drop: Iterable[str] = ()) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            dropped = set(drop)
            known = {name: process for name, process in self._known().items() if name not in dropped}
            partial = self._path.with_suffix(".partial")
            partial.write_text(json.dumps({**known, **(add or {})}))
            partial.replace(self._path)


def wait_gone(processes: Iterable[psutil.Process], timeout: float) -> list[psutil.Process]:
    """Those that haven't ended after `timeout` seconds. What only waits for its parent to look at it has ended."""
    end = time.monotonic() + timeout
    while (left := [process for process in processes if not ended(process)]) and time.monotonic() < end:
        time.sleep(0.01)
    return left


def ended(process: psutil.Process) -> bool:
    try:
        if process.status() != psutil.STATUS_ZOMBIE:
            return False
        if process.ppid() == os.getpid():
            os.waitpid(process.pid, os.WNOHANG)
    except (psutil.NoSuchProcess, ChildProcessError):
        pass
    return True


def wait_until(ready: Callable[[], bool], what: str, timeout: float = 60.0) -> None:
    """Raises `ClusterError`, saying `what` was waited for."""
    end = time.monotonic() + timeout
    while not ready():
        if time.monotonic() > end:
            raise ClusterError(f"waited {timeout:.0f} s for {what}")
        time.sleep(0.1)
