"""The store of a master with a state folder: a SQLite database in it, files for the secrets, and the folder's lock.

Opened by `assembly`, called through `store.Store`. All SQL runs in one thread of the store's own, in the order of the
calls, so the event loop never waits for a disk and a later write is never overtaken. The schema's version stands in
`PRAGMA user_version`; a newer one is refused, not guessed. Every failure is a `StateError`.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import sqlite3
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import TypeAdapter

from nomad import credentials
from nomad.control import PodStats
from nomad.errors import StateError
from nomad.master import secret
from nomad.master.state import DesiredPipeline, Goal, Outcome
from nomad.master.store import StoredOperator, StoredPipeline
from nomad.master.views import EventView, FailureView, MoveView, PlacementView
from nomad.pipeline import PipelineSpec

T = TypeVar("T")

VERSION = 2
DATABASE = "nomad.db"
LOCK = "lock"

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE bundles (digest TEXT PRIMARY KEY, data BLOB NOT NULL);
CREATE TABLE pipelines (
    id TEXT PRIMARY KEY, bundle TEXT NOT NULL REFERENCES bundles (digest), spec TEXT NOT NULL, goal TEXT NOT NULL,
    link_key BLOB NOT NULL, created REAL NOT NULL, placement TEXT NOT NULL, warnings TEXT NOT NULL,
    epoch_floor INTEGER NOT NULL, outcome TEXT, reason TEXT NOT NULL DEFAULT ''
) WITHOUT ROWID;
CREATE TABLE operators (
    pipeline TEXT NOT NULL REFERENCES pipelines (id) ON DELETE CASCADE, name TEXT NOT NULL,
    epoch INTEGER NOT NULL, pod TEXT, last_pod TEXT NOT NULL, restarts INTEGER NOT NULL,
    totals TEXT NOT NULL, last_output BLOB, failure TEXT,
    PRIMARY KEY (pipeline, name)
) WITHOUT ROWID;
CREATE TABLE events (
    id INTEGER PRIMARY KEY, time REAL NOT NULL, kind TEXT NOT NULL, message TEXT NOT NULL,
    pipeline TEXT, operator TEXT, cause_id INTEGER, data TEXT NOT NULL
);
"""

_UPGRADES = {
    1: """
ALTER TABLE pipelines ADD COLUMN moves INTEGER NOT NULL DEFAULT 1;
ALTER TABLE pipelines ADD COLUMN pins TEXT NOT NULL DEFAULT '{}';
ALTER TABLE operators ADD COLUMN highest INTEGER NOT NULL DEFAULT 0;
UPDATE operators SET highest = epoch;
CREATE TABLE moves (
    id TEXT PRIMARY KEY, pipeline TEXT NOT NULL REFERENCES pipelines (id) ON DELETE CASCADE,
    asked REAL NOT NULL, view TEXT NOT NULL
) WITHOUT ROWID;
""",
}
"""Version -> what makes the next one of it. A new folder is made with the first version and goes the same way."""

_SPEC = TypeAdapter(PipelineSpec)
_PLACEMENT = TypeAdapter(dict[str, PlacementView])
_WARNINGS = TypeAdapter(tuple[str, ...])
_TOTALS = TypeAdapter(PodStats)
_FAILURE = TypeAdapter(FailureView)
_DATA = TypeAdapter(dict[str, Any])
_PINS = TypeAdapter(dict[str, str])
_MOVE = TypeAdapter(MoveView)


class SqliteStore:
    """An open state folder. Made by `open`; one at a time, over all processes."""

    unread: AbstractSet[str] = frozenset()
    """None: a folder is read whole, or not at all."""

    def __init__(self, folder: Path, lock: int, database: sqlite3.Connection, thread: ThreadPoolExecutor) -> None:
        self.folder = folder
        self._lock = lock
        self._database = database
        self._thread = thread

    @classmethod
    async def open(cls, folder: Path) -> Self:
        """Make the folder if need be, lock it and open the database. Warns of a folder that others can look into.

        Raises `StateError` when another master uses it, when it can't be written, is damaged or newer than this.
        """
        lock = _lock(folder)
        thread = ThreadPoolExecutor(1, thread_name_prefix="nomad store")
        try:
            database = await asyncio.get_running_loop().run_in_executor(thread, _connect, folder / DATABASE)
        except BaseException:
            thread.shutdown()
            os.close(lock)
            raise
        return cls(folder, lock, database, thread)

    async def close(self) -> None:
        """Finish what was asked for and let the folder go."""
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._database.close)
        finally:
            self._thread.shutdown()
            os.close(self._lock)

    async def secret(self, name: str, make: Callable[[], str]) -> str:
        """The text in the folder's file of that name, which is made when it isn't there yet."""
        return await asyncio.to_thread(secret.kept, self.folder / name, make)

    def where(self, name: str) -> str:
        """The path of that file."""
        return str(self.folder / name)

    async def meta(self) -> dict[str, bytes]:
        """The small facts by name."""
        return await self._run(lambda database: dict(database.execute("SELECT key, value FROM meta")))

    async def set_meta(self, key: str, value: bytes) -> None:
        await self._run(lambda database: _set_meta(database, key, value))

    async def bundle(self, digest: str) -> bytes:
        """The bundle's bytes. Raises `StateError` when it isn't there."""
        row = await self._run(
            lambda database: database.execute("SELECT data FROM bundles WHERE digest = ?", [digest]).fetchone()
        )
        if row is None:
            raise StateError(f"bundle {digest} is missing in {self.folder / DATABASE}")
        data: bytes = row[0]
        return data

    async def pipelines(self) -> list[StoredPipeline]:
        """All of them, oldest first."""
        return await self._run(_load)

    async def add_pipeline(self, wanted: DesiredPipeline, bundle: bytes) -> None:
        """A new pipeline and its bundle, both or neither."""

        def add(database: sqlite3.Connection) -> None:
            database.execute("INSERT OR IGNORE INTO bundles VALUES (?, ?)", [wanted.bundle, bundle])
            database.execute(
                "INSERT INTO pipelines VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, NULL, '', ?, ?)",
                [
                    wanted.spec.id,
                    wanted.bundle,
                    _SPEC.dump_json(wanted.spec),
                    wanted.goal,
                    wanted.link_key,
                    wanted.created,
                    _PLACEMENT.dump_json(wanted.placement),
                    _WARNINGS.dump_json(wanted.warnings),
                    wanted.epoch_floor,
                    wanted.moves,
                    _PINS.dump_json(wanted.pins),
                ],
            )

        await self._run(add)

    async def set_goal(self, pipeline: str, goal: Goal) -> None:
        await self._execute("UPDATE pipelines SET goal = ? WHERE id = ?", goal, pipeline)

    async def set_spec(self, spec: PipelineSpec) -> None:
        await self._execute("UPDATE pipelines SET spec = ? WHERE id = ?", _SPEC.dump_json(spec), spec.id)

    async def set_placing(self, pipeline: str, *, moves: bool, pins: dict[str, str]) -> None:
        """What Nomad may do with the pipeline's operators by itself."""
        await self._execute(
            "UPDATE pipelines SET moves = ?, pins = ? WHERE id = ?", moves, _PINS.dump_json(pins), pipeline
        )

    async def set_placement(self, pipeline: str, placement: dict[str, PlacementView]) -> None:
        """Where the next pods go."""
        await self._execute(
            "UPDATE pipelines SET placement = ? WHERE id = ?", _PLACEMENT.dump_json(placement), pipeline
        )

    async def set_outcome(self, pipeline: str, outcome: Outcome, reason: str) -> None:
        await self._execute("UPDATE pipelines SET outcome = ?, reason = ? WHERE id = ?", outcome, reason, pipeline)

    async def save_operator(self, pipeline: str, operator: StoredOperator) -> None:
        """Write or replace; without effect when the pipeline has been removed."""
        await self._run(lambda database: _save_operator(database, pipeline, operator))

    async def save_switch(
        self, pipeline: str, operator: StoredOperator, placement: dict[str, PlacementView], move: MoveView
    ) -> None:
        """A move's point of no return, all or nothing: another pod, on another node, is the present one."""

        def save(database: sqlite3.Connection) -> None:
            _save_operator(database, pipeline, operator)
            database.execute(
                "UPDATE pipelines SET placement = ? WHERE id = ?", [_PLACEMENT.dump_json(placement), pipeline]
            )
            _save_move(database, move)

        await self._run(save)

    async def save_moves(self, moves: Sequence[MoveView], keep: int) -> None:
        """Write or replace; of each pipeline all but the last `keep` are dropped."""

        def save(database: sqlite3.Connection) -> None:
            for move in moves:
                _save_move(database, move)
            for pipeline in {move.pipeline for move in moves}:
                database.execute(
                    "DELETE FROM moves WHERE pipeline = ? AND id NOT IN "
                    "(SELECT id FROM moves WHERE pipeline = ? ORDER BY asked DESC, id DESC LIMIT ?)",
                    [pipeline, pipeline, keep],
                )

        await self._run(save)

    async def order_move(self, move: MoveView, keep: int) -> None:
        """A new one that a user waits for."""
        await self.save_moves([move], keep)

    async def remove_pipeline(self, pipeline: str, epoch_floor: int) -> None:
        """Delete a pipeline, its bundle if no other has it, and remember which epochs were used."""

        def remove(database: sqlite3.Connection) -> None:
            database.execute("DELETE FROM pipelines WHERE id = ?", [pipeline])
            database.execute("DELETE FROM bundles WHERE digest NOT IN (SELECT bundle FROM pipelines)")
            _set_meta(database, "epoch_floor", str(epoch_floor).encode())

        await self._run(remove)

    async def events(self, limit: int) -> list[EventView]:
        """The last `limit`, oldest first."""

        def load(database: sqlite3.Connection) -> list[EventView]:
            rows = database.execute(
                "SELECT id, time, kind, message, pipeline, operator, cause_id, data FROM events "
                "ORDER BY id DESC LIMIT ?",
                [limit],
            ).fetchall()
            return [
                EventView(id, time, kind, message, pipeline, operator, cause, _DATA.validate_json(data))
                for id, time, kind, message, pipeline, operator, cause, data in reversed(rows)
            ]

        return await self._run(load)

    @property
    def event_gap(self) -> int:
        """Events are written down as they come."""
        return 0

    async def add_events(self, events: Sequence[EventView], keep: int) -> None:
        """Append, and drop all but the last `keep`."""

        def add(database: sqlite3.Connection) -> None:
            database.executemany(
                "INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (e.id, e.time, e.kind, e.message, e.pipeline, e.operator, e.cause_id, _DATA.dump_json(e.data))
                    for e in events
                ],
            )
            database.execute("DELETE FROM events WHERE id <= ?", [events[-1].id - keep])

        await self._run(add)

    async def _execute(self, sql: str, *values: Any) -> None:
        await self._run(lambda database: database.execute(sql, values))

    async def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run `work` in the store's thread, as one transaction."""

        def transaction() -> T:
            with self._database:
                return work(self._database)

        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, transaction)
        except sqlite3.Error as exc:
            raise StateError(f"the database {self.folder / DATABASE} can't be used: {exc}") from exc


def _lock(folder: Path) -> int:
    """The descriptor that holds the folder's lock; the kernel lets it go when this process ends, however it ends."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise StateError(
            f"the state folder {folder} can't be used: {exc.strerror}; choose another with `--state DIR`"
        ) from exc
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(lock)
        raise StateError(
            f"the state folder {folder} is in use by another master (pid {holder}); "
            "end that one, or choose another folder with `--state DIR`"
        ) from None
    try:
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    except OSError as exc:
        os.close(lock)
        raise StateError(f"the state folder {folder} can't be written: {exc.strerror}") from exc
    credentials.warn_if_open(folder, folder.stat().st_mode)
    return lock


def _connect(path: Path) -> sqlite3.Connection:
    try:
        path.touch(mode=0o600)  # it holds keys; SQLite gives its other files the same mode
        database = sqlite3.connect(path)
    except (OSError, sqlite3.Error) as exc:
        raise StateError(f"the database {path} can't be opened: {exc}") from exc
    try:
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version > VERSION:
            raise StateError(
                f"the state folder {path.parent} was written by a newer Nomad (its version is {version}, this one "
                f"knows {VERSION}); upgrade Nomad, or choose another folder with `--state DIR`"
            )
        database.execute("PRAGMA journal_mode = WAL")
        # An epoch must never be given twice, not even after a power failure: pods may be on other machines.
        database.execute("PRAGMA synchronous = FULL")
        database.execute("PRAGMA foreign_keys = ON")
        if version == 0:
            database.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = 1; COMMIT;")
        for before in range(max(version, 1), VERSION):
            database.executescript(f"BEGIN; {_UPGRADES[before]} PRAGMA user_version = {before + 1}; COMMIT;")
    except sqlite3.Error as exc:
        database.close()
        raise StateError(f"the database {path} can't be used: {exc}; choose another folder with `--state DIR`") from exc
    except StateError:
        database.close()
        raise
    return database


def _save_operator(database: sqlite3.Connection, pipeline: str, operator: StoredOperator) -> None:
    totals = _TOTALS.dump_json(operator.totals, exclude={"last_output"})
    failure = None if operator.failure is None else _FAILURE.dump_json(operator.failure)
    row = [operator.epoch, operator.pod, operator.last_pod, operator.restarts, totals, operator.totals.last_output]
    database.execute(
        "INSERT OR REPLACE INTO operators SELECT id, ?, ?, ?, ?, ?, ?, ?, ?, ? FROM pipelines WHERE id = ?",
        [operator.name, *row, failure, operator.highest, pipeline],
    )


def _save_move(database: sqlite3.Connection, move: MoveView) -> None:
    """Without effect when the pipeline has been removed."""
    database.execute(
        "INSERT OR REPLACE INTO moves SELECT ?, id, ?, ? FROM pipelines WHERE id = ?",
        [move.id, move.asked, _MOVE.dump_json(move), move.pipeline],
    )


def _set_meta(database: sqlite3.Connection, key: str, value: bytes) -> None:
    database.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", [key, value])


def _load(database: sqlite3.Connection) -> list[StoredPipeline]:
    operators: dict[str, list[StoredOperator]] = {}
    for pipeline, name, epoch, pod, last_pod, restarts, totals, last_output, failure, highest in database.execute(
        "SELECT pipeline, name, epoch, pod, last_pod, restarts, totals, last_output, failure, highest FROM operators"
    ):
        kept = _TOTALS.validate_json(totals)
        kept.last_output = last_output
        error = None if failure is None else _FAILURE.validate_json(failure)
        operators.setdefault(pipeline, []).append(
            StoredOperator(name, epoch, pod, last_pod, restarts, kept, error, highest)
        )
    past: dict[str, list[MoveView]] = {}
    for pipeline, view in database.execute("SELECT pipeline, view FROM moves ORDER BY asked, id"):
        past.setdefault(pipeline, []).append(_MOVE.validate_json(view))
    found = []
    for (
        id,
        bundle,
        spec,
        goal,
        link_key,
        created,
        placement,
        warnings,
        floor,
        outcome,
        reason,
        moves,
        pins,
    ) in database.execute(
        "SELECT id, bundle, spec, goal, link_key, created, placement, warnings, epoch_floor, outcome, reason, "
        "moves, pins FROM pipelines ORDER BY created, id"
    ):
        wanted = DesiredPipeline(
            spec=_SPEC.validate_json(spec),
            bundle=bundle,
            link_key=link_key,
            created=created,
            placement=_PLACEMENT.validate_json(placement),
            warnings=_WARNINGS.validate_json(warnings),
            goal=Goal(goal),
            epoch_floor=floor,
            moves=bool(moves),
            pins=_PINS.validate_json(pins),
        )
        over = Outcome(outcome) if outcome else None
        found.append(StoredPipeline(wanted, over, reason, operators.get(id, []), past.get(id, [])))
    return found
