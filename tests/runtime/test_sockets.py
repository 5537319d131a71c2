from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nomad.runtime import sockets


@pytest.fixture
def folder() -> Iterator[Path]:
    folder = sockets.open_folder(None)
    yield folder
    sockets.remove_folder(folder)


def test_a_new_folder_is_short_and_private(folder: Path) -> None:
    assert len(str(folder)) <= sockets.MAX_FOLDER
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_recorded_folder_is_taken_again_or_made_again(folder: Path) -> None:
    assert sockets.open_folder(str(folder)) == folder
    sockets.remove_folder(folder)
    assert not folder.exists()
    assert sockets.open_folder(str(folder)) == folder


def test_what_others_may_have_put_there_is_not_taken(folder: Path, tmp_path: Path) -> None:
    folder.chmod(0o755)
    other = sockets.open_folder(str(folder))
    assert other != folder
    sockets.remove_folder(other)
    link = tmp_path / "link"
    link.symlink_to(folder)
    other = sockets.open_folder(str(link))
    assert other != link
    sockets.remove_folder(other)


def test_a_folder_whose_parent_is_gone(tmp_path: Path) -> None:
    other = sockets.open_folder(str(tmp_path / "gone" / "nomad-x"))
    assert other.exists()
    sockets.remove_folder(other)


def test_a_folder_in_use_is_not_removed(folder: Path) -> None:
    (folder / "socket").touch()
    sockets.remove_folder(folder)
    assert folder.exists()
    (folder / "socket").unlink()


def test_the_users_runtime_folder_is_preferred_unless_it_is_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    folder = sockets.open_folder(None)
    assert (folder.parent == tmp_path) == (len(str(tmp_path)) <= sockets.MAX_FOLDER - 16)
    sockets.remove_folder(folder)
