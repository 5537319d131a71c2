"""A pod's log file: written by the pod itself, kept small and read by the local runtime.

The pod holds the file open for appending, so that it goes on printing while the master is away; the
runtime copies the newest part aside and truncates in place. What is printed in the instant between
the two is lost, which is the price of a pod that needs nobody to print. While no master runs, nobody
truncates.
"""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path


class LogFile:
    """The file at `path` and, once it was rotated, the older part beside it (`path` + ".1").

    All calls are short blocking reads or writes of at most `limit` bytes.
    """

    def __init__(self, path: Path, limit: int) -> None:
        self.path = path
        self.older = path.with_name(path.name + ".1")
        self._limit = limit
        self.rotations = 0
        self._cut = 0  # how long the file was when it was last truncated

    def rotate(self) -> bool:
        """Keep the newest `limit` bytes aside and begin again, if the file has grown past the limit."""
        try:
            with self.path.open("r+b") as file:
                size = os.fstat(file.fileno()).st_size
                if size <= self._limit:
                    return False
                file.seek(size - self._limit)
                kept = file.read(self._limit)
                self.older.write_bytes(kept)
                file.truncate(0)
        except FileNotFoundError:
            return False
        self.rotations += 1
        self._cut = size
        return True

    def tail(self, lines: int | None = None) -> list[str]:
        """The last `lines` lines, or all that are kept; oldest first."""
        older = _read(self.older, self._limit)
        older = older[older.find(b"\n") + 1 :]  # it was cut somewhere in a line
        text = (older + _read(self.path, self._limit)).decode(errors="replace")
        return list(deque(text.splitlines(), lines))

    def reader(self) -> LogReader:
        """Lines from now on."""
        return LogReader(self)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.older.unlink(missing_ok=True)

    def position(self) -> int:
        """The present length in bytes."""
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0

    def read_from(self, rotations: int, offset: int) -> tuple[bytes, bool, int, int]:
        """What came after `offset` of the file as it was at rotation `rotations`.

        With it: whether that is all of it, and rotations and offset to go on with.
        """
        missed, complete = b"", True
        if rotations != self.rotations:
            unread = self._cut - offset
            complete = rotations + 1 == self.rotations and unread <= self._limit
            missed = _read(self.older, unread) if complete else b""
            offset = 0
        try:
            with self.path.open("rb") as file:
                file.seek(offset)
                new = file.read(self._limit)
        except FileNotFoundError:
            new = b""
        return missed + new, complete, self.rotations, offset + len(new)


class LogReader:
    """Follows one log file. Where it is written faster than read, lines are left out, never parts of them."""

    def __init__(self, file: LogFile) -> None:
        self._file = file
        self._rotations, self._offset = file.rotations, file.position()
        self._rest = b""
        self._in_line = self._offset > 0 and _read(file.path, 1) != b"\n"

    def lines(self, *, last: bool = False) -> list[str]:
        """Whole lines since the last call; with `last` also one that isn't ended."""
        new, complete, self._rotations, self._offset = self._file.read_from(self._rotations, self._offset)
        if not complete:
            self._rest, self._in_line = b"", True
        *whole, self._rest = (self._rest + new).split(b"\n")
        if self._in_line and whole:
            del whole[0]
            self._in_line = False
        if last and self._rest and not self._in_line:
            whole.append(self._rest)
            self._rest = b""
        return [line.decode(errors="replace") for line in whole]


def _read(path: Path, limit: int) -> bytes:
    """The last `limit` bytes of a file, nothing if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - limit))
            return file.read(limit)
    except FileNotFoundError:
        return b""
