"""What operators require, installed once per node: by real pip, from a folder."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from nomad import packages
from nomad.errors import PackagesError
from nomad.packages import AT_ONCE, Cache, lock_of
from tests.wheels import variables, wheel


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "index"
    wheel(folder, "lower", "1.0", "VALUE = 1\n")
    wheel(folder, "upper", "2.0", "import lower\nVALUE = 2\n", requires=("lower<2",))
    wheel(folder, "lower", "2.0", "VALUE = 4\n")
    for name, value in variables(folder).items():
        monkeypatch.setenv(name, value)
    return folder


def folders(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_dir()}


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_lock_is_what_is_asked_for_and_by_whom() -> None:
    assert lock_of(["a", "b"]) == lock_of(["b", "a", "a"])
    locks = {lock_of(["a"]), lock_of(["b"]), lock_of(["a"], python="3.99"), lock_of(["a"], platform="linux-arm")}
    assert len(locks) == 4


async def test_packages_are_installed_with_what_they_need(index: Path, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    with await cache.installed(["upper==2.0"]) as found:
        assert {"upper.py", "lower.py"} <= {path.name for path in found.path.iterdir()}
        assert found.path == tmp_path / "cache" / lock_of(["upper==2.0"])
    (index / "upper-2.0-py3-none-any.whl").unlink()
    with await cache.installed(["upper==2.0"]) as again:
        assert again.path == found.path
    assert {path.suffix for path in cache.folder.iterdir()} == {"", ".lock"}


async def test_whoever_comes_while_they_are_installed_waits(tmp_path: Path) -> None:
    made = []

    async def slowly(folder: Path) -> None:
        made.append(folder)
        await asyncio.sleep(0.3)

    one, other = Cache(tmp_path), Cache(tmp_path)
    first, second = await asyncio.gather(one.made("a", slowly), other.made("a", slowly))
    assert first.path == second.path
    assert len(made) == 1
    first.close()
    second.close()


async def test_few_are_installed_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip takes memory, and its agent hasn't much."""
    now, most, over = 0, 0, asyncio.Event()

    async def install(folder: Path, requirements: Sequence[str]) -> None:
        nonlocal now, most
        now, most = now + 1, max(most, now + 1)
        await over.wait()
        now -= 1

    monkeypatch.setattr(packages, "_install", install)
    cache = Cache(tmp_path)
    (cache.folder / lock_of(["there"])).mkdir()
    asked = [asyncio.create_task(cache.installed([f"package{number}"])) for number in range(5)]
    async with asyncio.timeout(20):
        while now < AT_ONCE:
            await asyncio.sleep(0.001)
        (await cache.installed(["there"])).close()  # which nobody has to wait for
    over.set()
    for found in await asyncio.gather(*asked):
        found.close()
    assert most == AT_ONCE


@pytest.mark.usefixtures("index")
async def test_what_there_is_not_is_final(tmp_path: Path) -> None:
    with pytest.raises(
        PackagesError, match="upper==9 can't be installed: pip says: .*No matching distribution"
    ) as caught:
        await Cache(tmp_path / "cache").installed(["upper==9"])
    assert caught.value.final
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    with pytest.raises(PackagesError, match="conflict") as caught:
        await Cache(tmp_path / "cache").installed(["lower>=2", "upper"])
    assert caught.value.final


async def test_an_index_that_is_away_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    with pytest.raises(PackagesError, match="the index isn't reachable") as caught:
        await Cache(tmp_path).installed(["upper==2.0"])
    assert not caught.value.final


async def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(PackagesError, match="can't be installed in") as caught:
        await Cache(tmp_path / "cache").installed(["upper"])
    assert not caught.value.final


async def test_what_nobody_uses_goes_first(tmp_path: Path) -> None:
    async def large(folder: Path) -> None:
        (folder / "data").write_bytes(bytes(1000))

    cache = Cache(tmp_path, limit=2500)
    used = await cache.made("used", large)
    (await cache.made("old", large)).close()
    for name, time in (("used", 1), ("old", 2)):
        os.utime(tmp_path / name, (time, time))
    (await cache.made("new", large)).close()
    assert folders(tmp_path) == {"used", "new"}
    used.close()
    os.utime(tmp_path / "used", (1, 1))
    (await cache.made("newer", large)).close()
    assert folders(tmp_path) == {"new", "newer"}


async def test_what_the_killed_left_is_removed(tmp_path: Path) -> None:
    begun, over = asyncio.Event(), asyncio.Event()

    async def slowly(folder: Path) -> None:
        begun.set()
        await over.wait()

    cache = Cache(tmp_path / "cache")
    cache.tidy()  # when nothing was ever installed
    task = asyncio.create_task(cache.made("busy", slowly))
    await begun.wait()
    for name in ("dead.new", "dead.tmp", "gone.old"):
        (cache.folder / name / "part").mkdir(parents=True)
    cache.tidy()
    assert folders(cache.folder) == {"busy.new"}
    (cache.folder / "dead.new").mkdir()
    over.set()
    (await task).close()
    assert folders(cache.folder) == {"busy"}


async def test_others_may_remove_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def large(folder: Path) -> None:
        (folder / "data").write_bytes(bytes(1000))

    def removed_meanwhile(folder: Path) -> int:
        for name in ("old", "older"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
        return size(folder)

    size = packages._size
    for name in ("older", "old"):
        (await Cache(tmp_path).made(name, large)).close()
    monkeypatch.setattr(packages, "_size", removed_meanwhile)
    (await Cache(tmp_path, limit=100).made("new", large)).close()
    assert folders(tmp_path) == {"new"}


async def test_what_cannot_be_removed_does_not_keep_from_installing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def nothing(folder: Path) -> None:
        return

    def fail(*_: object) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(Cache, "_shrink", fail)
    (await Cache(tmp_path).made("a", nothing)).close()
    assert folders(tmp_path) == {"a"}
    assert "can't be removed" in caplog.text


async def test_an_installation_that_is_given_up_leaves_nothing(tmp_path: Path) -> None:
    begun = asyncio.Event()

    async def forever(folder: Path) -> None:
        begun.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(Cache(tmp_path).made("a", forever))
    await begun.wait()
    task.cancel()
    await asyncio.wait([task])
    assert files(tmp_path) == {"a.lock"}


def test_what_is_loaded_already_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("pytest", "fresh_module"):
        (tmp_path / f"{name}.py").touch()
    assert packages.use(tmp_path) == ["pytest"]
    assert sys.path[0] == str(tmp_path)
