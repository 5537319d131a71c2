from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from nomad.credentials import CredentialsWarning
from nomad.errors import StateError
from nomad.master import secret
from nomad.master.sqlite import _SCHEMA, DATABASE, VERSION, SqliteStore
from nomad.master.store import StoredOperator
from nomad.master.views import PlacementView
from nomad.pipeline import PipelineSpec
from tests.contract.store import CHECKS
from tests.master.worlds import wanted


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_contract(check: Callable[[Any], Awaitable[None]], folder: Path) -> None:
    await check(lambda: SqliteStore.open(folder))


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


async def test_a_folder_that_others_can_look_into_is_told(folder: Path) -> None:
    os.mkdir(folder)
    os.chmod(folder, 0o777)
    said = f"^{folder} can be changed by other users of this machine: run `chmod 700 {folder}`$"
    with pytest.warns(CredentialsWarning, match=said):
        await (await SqliteStore.open(folder)).close()
    os.chmod(folder, 0o700)
    await (await SqliteStore.open(folder)).close()


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
