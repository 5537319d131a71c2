"""Messages whose function raised, kept with their tracebacks in a file of the operator's own.

Written by the operator's actor; read by the master too, once the operator has ended. While the operator moves, two
processes have the file open, of which one at a time writes. Messages are kept before their input is acknowledged, so
that a kill loses none; visible and runnable again until dropped. What comes of a message that is run again stays here
until the next operators have it. When the store is full the operator fails instead of forgetting a message.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from nomad.delivery.frames import NOWHERE, Position
from nomad.errors import NomadError

MOST_MESSAGES = 10_000
MOST_BYTES = 256 << 20

_SCHEMA = """
CREATE TABLE IF NOT EXISTS message (
    id INTEGER PRIMARY KEY AUTOINCREMENT, lane INTEGER NOT NULL, origin INTEGER NOT NULL, path BLOB NOT NULL,
    time REAL NOT NULL, type TEXT NOT NULL, message TEXT NOT NULL, traceback TEXT NOT NULL, attempts INTEGER NOT NULL,
    sent INTEGER NOT NULL, value BLOB NOT NULL, gone INTEGER NOT NULL DEFAULT 0, UNIQUE (lane, origin, path)
);
CREATE TABLE IF NOT EXISTS rerun (number INTEGER PRIMARY KEY, results BLOB NOT NULL);
"""


FILE = "set-aside.db"
"""In the operator's own folder."""


class StoreFull(NomadError):
    """An operator has set aside as many messages as it may."""


@dataclass(frozen=True, slots=True)
class Record:
    """One message set aside."""

    id: int
    lane: int
    position: Position
    time: float
    """Seconds since the epoch of the last attempt."""
    error: dict[str, str]
    attempts: int
    sent: int
    """So many of its results, in the order of the function that raised after them, have been sent already."""
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
    """The store. `path` None keeps it in memory (a runtime without a folder that survives).

    A record that is dropped or run again leaves its position, until it is settled: an instance that starts anew
    and gets the message once more must know it.
    """

    def __init__(self, path: str | None):
        self._path = path
        self._db: sqlite3.Connection | None = None
        self.count = 0
        self._bytes = 0
        self.kept: set[tuple[int, Position]] = set()
        """What had been set aside when the file was read: lane and position.

        While it is empty, `covers` and `holds` needn't be asked.
        """
        self._newest_kept: dict[int, int] = {}
        self.reload()

    def reload(self) -> None:
        """Read what another process may have written."""
        if self._db is not None:
            self._read(self._db)
        elif self._path is not None and os.path.exists(self._path):
            self._open()

    def holds(self, lane: int, position: Position) -> bool:
        """Whether an earlier instance set this message aside already."""
        return (lane, position) in self.kept

    def covers(self, lane: int, origin: int) -> bool:
        """Whether an earlier instance kept a message of this origin or a later one."""
        return origin <= self._newest_kept.get(lane, -1)

    def add(
        self, lane: int, position: Position, value: bytes, error: dict[str, str], attempts: int, sent: int = 0
    ) -> None:
        """Keep a message. Raises `StoreFull`."""
        if self.count >= MOST_MESSAGES or self._bytes + len(value) > MOST_BYTES:
            raise StoreFull(
                f"{self.count} messages are set aside ({self._bytes} bytes), which is the most that is kept; run them "
                "again or drop them, or give the operator on_error='fail' or a function that handles the error"
            )
        with self._open() as db:
            cursor = db.execute(
                "INSERT OR IGNORE INTO message "
                "(lane, origin, path, time, type, message, traceback, attempts, sent, value) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (lane, *position, time.time(), *_parts(error), attempts, sent, value),
            )
        if cursor.rowcount:
            self.count += 1
            self._bytes += len(value)

    def records(self, ids: list[int] | None = None) -> list[Record]:
        """All records, or those with these ids, oldest first."""
        wanted = None if ids is None else set(ids)
        return [record for record in self._rows() if wanted is None or record.id in wanted]

    def page(self, after: int, most: int) -> list[Record]:
        """Records with ids above `after`, oldest first: one, and more until they have `most` bytes together."""
        found: list[Record] = []
        for record in self._rows(after):
            found.append(record)
            most -= len(record.value) + sum(map(len, record.error.values()))
            if most <= 0:
                break
        return found

    def _rows(self, after: int = 0) -> Iterator[Record]:
        if self._db is None:
            return
        for i, lane, o, p, t, k, m, b, n, s, v in self._db.execute(
            "SELECT id, lane, origin, path, time, type, message, traceback, attempts, sent, value "
            "FROM message WHERE NOT gone AND id > ? ORDER BY id",
            (after,),
        ):
            yield Record(i, lane, Position(o, p), t, {"type": k, "message": m, "traceback": b}, n, s, v)

    def failed_again(self, record: Record, error: dict[str, str]) -> None:
        """A run of it failed once more."""
        with self._open() as db:
            db.execute(
                "UPDATE message SET time = ?, type = ?, message = ?, traceback = ?, attempts = attempts + 1 "
                "WHERE id = ?",
                (time.time(), *_parts(error), record.id),
            )

    def remove(self, ids: list[int] | None, settled: Mapping[int, Position]) -> int:
        """Drop records; how many there were. `settled`: the last position of each lane that won't come again."""
        gone = self.records(ids)
        if gone:
            with self._open() as db:
                self._remove(db, gone, settled)
        return len(gone)

    def ran(self, record: Record, number: int, results: bytes, settled: Mapping[int, Position]) -> None:
        """A record was run again: keep its results, as run `number`, in its place."""
        with self._open() as db:
            db.execute("INSERT INTO rerun VALUES (?, ?)", (number, results))
            self._remove(db, [record], settled)

    def reruns(self) -> list[tuple[int, bytes]]:
        """The results of runs that the next operators may not have, with their numbers, in order."""
        if self._db is None:
            return []
        return self._db.execute("SELECT number, results FROM rerun ORDER BY number").fetchall()

    def delivered(self, number: int) -> None:
        """The next operators have the results of runs up to this one."""
        with self._open() as db:
            db.execute("DELETE FROM rerun WHERE number <= ?", (number,))

    def part(self, offset: int, most: int) -> tuple[bytes, bool]:
        """Up to `most` bytes of the file from `offset` on, and whether there are more. Nothing may change meanwhile."""
        if self._path is None or self._db is None:
            return b"", False
        if not offset:
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        with open(self._path, "rb") as file:
            file.seek(offset)
            data = file.read(most)
            return data, file.seek(0, os.SEEK_END) > offset + len(data)

    def take(self, offset: int, data: bytes, *, last: bool) -> None:
        """A part of another store's file, which is this one's after the last. Raises `NomadError`."""
        if self._path is None:
            if data:
                raise NomadError("there is no folder to keep messages in that were set aside")
            return
        beside = f"{self._path}.new"
        try:
            with open(beside, "r+b" if offset else "wb") as file:
                if file.seek(0, os.SEEK_END) != offset:
                    raise NomadError(f"a part is missing before byte {offset} of what was set aside")
                file.write(data)
            if not last:
                return
            self.close()
            for suffix in ("-wal", "-shm"):
                with suppress(FileNotFoundError):
                    os.unlink(self._path + suffix)
            if offset or data:
                os.replace(beside, self._path)
            else:
                os.unlink(beside)
        except OSError as exc:
            raise NomadError(f"what was set aside can't be kept: {exc}") from exc
        self.reload()

    def close(self) -> None:
        """Close the file."""
        if self._db is not None:
            self._db.close()
            self._db = None

    def _remove(self, db: sqlite3.Connection, records: list[Record], settled: Mapping[int, Position]) -> None:
        db.executemany("UPDATE message SET gone = 1, value = x'' WHERE id = ?", [(r.id,) for r in records])
        db.executemany(
            "DELETE FROM message WHERE gone AND lane = ? AND (origin, path) <= (?, ?)",
            [(lane, *position) for lane, position in settled.items()],
        )
        self.count -= len(records)
        self._bytes -= sum(len(r.value) for r in records)

    def _open(self) -> sqlite3.Connection:
        if self._db is None:
            self._db = sqlite3.connect(self._path or ":memory:", check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=OFF")  # survives a kill; only power loss can lose the newest
            self._db.executescript(_SCHEMA)
            self._read(self._db)
        return self._db

    def _read(self, db: sqlite3.Connection) -> None:
        rows = db.execute("SELECT lane, origin, path, gone, length(value) FROM message").fetchall()
        self.kept = {(lane, Position(origin, path)) for lane, origin, path, _, _ in rows}
        self._newest_kept = {}
        for lane, position in self.kept:
            self._newest_kept[lane] = max(self._newest_kept.get(lane, NOWHERE.origin), position.origin)
        self.count, self._bytes = sum(not gone for *_, gone, _ in rows), sum(size for *_, size in rows)


def _parts(error: dict[str, str]) -> tuple[str, str, str]:
    return error["type"], error["message"], error["traceback"]
