from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from nomad.clock import SystemClock
from nomad.control import PodStats
from nomad.errors import StateError
from nomad.master import secret
from nomad.master.events import EventLog
from nomad.master.sqlite import _SCHEMA, DATABASE, VERSION, SqliteStore
from nomad.master.state import Goal, Outcome
from nomad.master.store import StoredOperator
from nomad.master.views import EventView, FailureView, MovePhase, MoveState, MoveView, PlacementView
from nomad.pipeline import PipelineSpec
from tests.master.worlds import wanted


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "state"


async def test_everything_is_there_after_a_restart(folder: Path) -> None:
    store = await SqliteStore.open(folder)
    pipeline = wanted()
    pipeline.warnings = ("other numpy",)
    failure = FailureView(1.0, "boom", "ValueError", "Traceback", 1, ["a", "b"])
    square = StoredOperator(
        "square", 3, "p.square-e3", "p.square-e3", 2, PodStats(processed=7, last_output=b"\x00\xff"), failure
    )
    await store.set_meta("sockets", b"/tmp/x")
    await store.add_pipeline(pipeline, b"the bundle")
    await store.save_operator("p", square)
    await store.set_goal("p", Goal.STOP)
    await store.set_outcome("p", Outcome.FAILED, "because")
    spec = replace(pipeline.spec, profile=({"cloud_execution_time": 0.5}, {}, {}))
    await store.set_spec(spec)
    await store.close()

    again = await SqliteStore.open(folder)
    (found,) = await again.pipelines()
    assert found.wanted == replace(pipeline, goal=Goal.STOP, spec=spec)
    assert (found.outcome, found.reason) == (Outcome.FAILED, "because")
    assert found.operators == [square]
    assert await again.bundle("digest") == b"the bundle"
    assert (await again.meta())["sockets"] == b"/tmp/x"
    await again.close()


async def test_a_pipeline_and_its_bundle_are_stored_together_or_not_at_all(folder: Path) -> None:
    store = await SqliteStore.open(folder)
    await store.add_pipeline(wanted(), b"the bundle")
    with pytest.raises(StateError, match="can't be used: UNIQUE"):
        await store.add_pipeline(replace(wanted(), bundle="other"), b"another")
    with pytest.raises(StateError, match="is missing"):
        await store.bundle("other")
    assert len(await store.pipelines()) == 1
    await store.close()


async def test_a_bundle_goes_with_the_last_pipeline_that_has_it(folder: Path) -> None:
    store = await SqliteStore.open(folder)
    for id in ("p", "q"):
        await store.add_pipeline(wanted(id), b"the bundle")
        await store.save_operator(id, StoredOperator("square", 1, None, "", 0))
    await store.remove_pipeline("p", 4)
    assert await store.bundle("digest") == b"the bundle"
    assert [found.wanted.spec.id for found in await store.pipelines()] == ["q"]
    await store.remove_pipeline("q", 9)
    with pytest.raises(StateError, match="is missing"):
        await store.bundle("digest")
    assert (await store.meta())["epoch_floor"] == b"9"
    await store.save_operator("q", StoredOperator("square", 2, None, "", 0))  # too late: without effect
    assert await store.pipelines() == []
    await store.close()


async def test_events_are_bounded_and_keep_their_numbers(folder: Path) -> None:
    store = await SqliteStore.open(folder)
    log = EventLog(store, SystemClock(), [], 3)
    live = log.subscribe()
    first = log.add("a", "first")
    for n in range(4):
        log.add("b", f"number {n}", pipeline="p", operator="square", cause=first, data={"n": n})
    await log.flush()
    log.close()
    assert [event.id async for event in live] == [3, 4, 5]  # the reader was slow; it keeps as many as the log does
    kept = await store.events(100)
    assert [event.id for event in kept] == [3, 4, 5]
    assert kept[-1] == EventView(5, kept[-1].time, "b", "number 3", "p", "square", first, {"n": 3})
    await store.close()

    store = await SqliteStore.open(folder)
    log = EventLog(store, SystemClock(), await store.events(3), 3)
    assert log.add("c", "after a restart") == 6
    assert [event.id for event in log.list(None, 4, 10)] == [5, 6]
    assert [event.id for event in log.list("p", 0, 1)] == [5]
    assert log.list(None, 0, 0) == []
    await log.flush()
    await store.close()


async def test_only_one_master_at_a_time(folder: Path) -> None:
    store = await SqliteStore.open(folder)
    with pytest.raises(StateError, match=rf"in use by another master \(pid {os.getpid()}\)"):
        await SqliteStore.open(folder)
    await store.close()
    await (await SqliteStore.open(folder)).close()


HOLDER = """
import asyncio, sys
from pathlib import Path
from nomad.master.sqlite import SqliteStore
async def main():
    await SqliteStore.open(Path(sys.argv[1]))
    print("open", flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


@pytest.fixture
def killed_holder(folder: Path) -> int:
    """A process that had the store open when it met kill -9."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"open\n"
        holder.kill()
    return holder.pid


@pytest.mark.usefixtures("killed_holder")
async def test_the_lock_of_a_killed_master_is_free(folder: Path) -> None:
    await (await SqliteStore.open(folder)).close()


async def test_moves_pins_and_the_switch_are_kept(folder: Path) -> None:
    store = await SqliteStore.open(folder)
    pipeline = wanted()
    pipeline.pins, pipeline.moves = {"square": "cloud"}, False
    await store.add_pipeline(pipeline, b"the bundle")
    moves = [
        MoveView(f"m{n}", "p", "square", "cloud", "edge", "user", "because", MoveState.DONE, float(n)) for n in range(5)
    ]
    await store.save_moves(moves, 3)
    placement = {**pipeline.placement, "square": PlacementView("edge", "it was moved")}
    last = replace(moves[-1], state=MoveState.SWITCHING, epoch=2, phases=[MovePhase("starting", 0.5)])
    square = StoredOperator("square", 2, "p.square-e2", "p.square-e2", 0, highest=2)
    await store.save_switch("p", square, placement, last)
    await store.set_placing("p", moves=True, pins={})
    await store.close()

    again = await SqliteStore.open(folder)
    (found,) = await again.pipelines()
    assert found.moves == [*moves[2:4], last]
    assert found.operators == [square]
    assert found.wanted.placement == placement
    assert (found.wanted.moves, found.wanted.pins) == (True, {})
    await again.remove_pipeline("p", 2)
    await again.save_moves([last], 3)  # too late: without effect
    assert await again.pipelines() == []
    await again.close()


FIRST = """
INSERT INTO bundles VALUES ('digest', x'00');
INSERT INTO pipelines VALUES ('p', 'digest', ?, 'run', x'6b', 1.0, ?, '[]', 3, NULL, '');
INSERT INTO operators VALUES ('p', 'square', 7, 'p.square-e7', 'p.square-e7', 2, '{}', NULL, NULL);
"""


async def test_a_folder_of_the_first_version_is_taken_over(folder: Path) -> None:
    await (await SqliteStore.open(folder)).close()
    (folder / DATABASE).unlink()
    old = wanted()
    with sqlite3.connect(folder / DATABASE) as database:
        database.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = 1; COMMIT;")
        spec = TypeAdapter(PipelineSpec).dump_python(old.spec, mode="json")
        for op in spec["operators"]:
            del op["pin"]
        placement = TypeAdapter(dict[str, PlacementView]).dump_json(old.placement)
        bundle, pipeline, operator = FIRST.strip().splitlines()
        database.execute(bundle)
        database.execute(pipeline, [json.dumps(spec), placement])
        database.execute(operator)
    database.close()
    store = await SqliteStore.open(folder)
    (found,) = await store.pipelines()
    assert found.wanted.spec == old.spec
    assert (found.wanted.moves, found.wanted.pins, found.moves) == (True, {}, [])
    assert [(op.epoch, op.highest, op.restarts) for op in found.operators] == [(7, 7, 2)]
    await store.close()


async def test_a_newer_version_is_refused_and_left_as_it_is(folder: Path) -> None:
    await (await SqliteStore.open(folder)).close()
    with sqlite3.connect(folder / DATABASE) as database:
        database.execute(f"PRAGMA user_version = {VERSION + 1}")
    database.close()
    for _ in range(2):  # the lock is let go
        with pytest.raises(StateError, match="written by a newer Nomad"):
            await SqliteStore.open(folder)


async def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match=r"can't be used: (Not a directory|File exists).*--state"):
        await SqliteStore.open(tmp_path / "file")
    with pytest.raises(StateError, match="can't be used: Not a directory"):
        await SqliteStore.open(tmp_path / "file" / "below")
    (tmp_path / "state" / "lock").mkdir(parents=True)
    with pytest.raises(StateError, match="can't be used: Is a directory"):
        await SqliteStore.open(tmp_path / "state")


async def test_a_damaged_database(tmp_path: Path) -> None:
    (tmp_path / DATABASE).write_bytes(b"this is no database, but some text that is long enough" * 100)
    with pytest.raises(StateError, match="not a database"):
        await SqliteStore.open(tmp_path)


async def test_what_it_holds_is_nobody_elses(folder: Path) -> None:
    store = await SqliteStore.open(folder)
    await store.set_meta("pod_key", b"secret")
    assert [name for name in ("", *os.listdir(folder)) if os.stat(folder / name).st_mode & 0o077] == []
    await store.close()


def test_secrets_are_made_once(tmp_path: Path) -> None:
    path = tmp_path / "token"
    assert secret.kept(path, lambda: "made") == "made"
    assert secret.kept(path, lambda: "made again") == "made"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [found.name for found in tmp_path.iterdir()] == ["token"]


def test_secrets_that_cannot_be_kept(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="can't be written"):
        secret.kept(tmp_path / "nowhere" / "token", lambda: "made")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StateError, match="can't be read"):
        secret.kept(tmp_path / "folder", lambda: "made")
