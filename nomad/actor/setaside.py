"""Messages whose function raised, kept with their tracebacks in a file of the operator's own.

They are kept before their input is acknowledged, so that a kill loses none; visible and runnable again until dropped.
When the store is full the operator fails instead of forgetting one.
"""

from __future__ import annotations

import os
import sqlite3
import time
from dataclasses import dataclass
from typing import Any

from nomad.delivery.frames import Position
from nomad.errors import NomadError

MOST_MESSAGES = 10_000
MOST_BYTES = 256 << 20

_SCHEMA = """
CREATE TABLE IF NOT EXISTS message (
    id INTEGER PRIMARY KEY AUTOINCREMENT, origin INTEGER NOT NULL, idx INTEGER NOT NULL, time REAL NOT NULL,
    type TEXT NOT NULL, message TEXT NOT NULL, traceback TEXT NOT NULL, attempts INTEGER NOT NULL, value BLOB NOT NULL,
    UNIQUE (origin, idx))
"""


class StoreFull(NomadError):
    """An operator has set aside as many messages as it may."""


@dataclass(frozen=True, slots=True)
class Record:
    """One message set aside."""

    id: int
    position: Position
    time: float
    """Seconds since the epoch of the last attempt."""
    error: dict[str, str]
    attempts: int
    value: bytes
    """The input, encoded alone."""

    def as_data(self) -> dict[str, Any]:
        """As the control channel carries it."""
        return {
            "id": self.id,
            "time": self.time,
            "error": self.error,
            "attempts": self.attempts,
            "value": self.value,
        }


class SetAside:
    """The store. `path` None keeps it in memory (a runtime without a folder that survives)."""

    def __init__(self, path: str | None):
        self._path = path
        self._db: sqlite3.Connection | None = None
        self.count = 0
        self._bytes = 0
        self._kept: set[Position] = set()
        self._newest_kept = 0
        if path is not None and os.path.exists(path):
            self._open()

    @property
    def kept(self) -> bool:
        """Whether an earlier instance left any: else `covers` and `holds` needn't be asked."""
        return self._newest_kept > 0

    def holds(self, position: Position) -> bool:
        """Whether an earlier instance set this message aside already."""
        return position.origin <= self._newest_kept and position in self._kept

    def covers(self, origin: int) -> bool:
        """Whether an earlier instance kept a message of this origin or a later one."""
        return origin <= self._newest_kept

    def add(self, position: Position, value: bytes, error: dict[str, str], attempts: int) -> None:
        """Keep a message. Raises `StoreFull`."""
        if self.count >= MOST_MESSAGES or self._bytes + len(value) > MOST_BYTES:
            raise StoreFull(
                f"{self.count} messages are set aside ({self._bytes} bytes), which is the most that is kept; run them "
                "again or drop them, or give the operator on_error='fail' or a function that handles the error"
            )
        with self._open() as db:
            cursor = db.execute(
                "INSERT OR IGNORE INTO message (origin, idx, time, type, message, traceback, attempts, value) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (*position, time.time(), error["type"], error["message"], error["traceback"], attempts, value),
            )
        if cursor.rowcount:
            self.count += 1
            self._bytes += len(value)

    def records(self, ids: list[int] | None = None) -> list[Record]:
        """All records, or those with these ids, oldest first."""
        if self._db is None:
            return []
        rows = self._db.execute(
            "SELECT id, origin, idx, time, type, message, traceback, attempts, value FROM message ORDER BY id"
        )
        wanted = None if ids is None else set(ids)
        return [
            Record(i, Position(o, x), t, {"type": k, "message": m, "traceback": b}, n, v)
            for i, o, x, t, k, m, b, n, v in rows
            if wanted is None or i in wanted
        ]

    def failed_again(self, record: Record, error: dict[str, str]) -> None:
        """A run of it failed once more."""
        with self._open() as db:
            db.execute(
                "UPDATE message SET time = ?, type = ?, message = ?, traceback = ?, attempts = attempts + 1 WHERE id = ?",
                (time.time(), error["type"], error["message"], error["traceback"], record.id),
            )

    def remove(self, ids: list[int] | None) -> int:
        """Drop records; how many there were."""
        gone = self.records(ids)
        if gone:
            with self._open() as db:
                db.executemany("DELETE FROM message WHERE id = ?", [(r.id,) for r in gone])
            self.count -= len(gone)
            self._bytes -= sum(len(r.value) for r in gone)
        return len(gone)

    def close(self) -> None:
        """Close the file."""
        if self._db is not None:
            self._db.close()
            self._db = None

    def _open(self) -> sqlite3.Connection:
        if self._db is None:
            self._db = sqlite3.connect(self._path or ":memory:", check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=OFF")  # survives a kill; only power loss can lose the newest
            self._db.execute(_SCHEMA)
            rows = self._db.execute("SELECT origin, idx, length(value) FROM message").fetchall()
            self._kept = {Position(o, x) for o, x, _ in rows}
            self._newest_kept = max((o for o, _, _ in rows), default=0)
            self.count, self._bytes = len(rows), sum(n for _, _, n in rows)
        return self._db
