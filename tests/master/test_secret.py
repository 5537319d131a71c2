"""Secrets in files."""

from __future__ import annotations

from pathlib import Path

import pytest

from nomad.credentials import CredentialsWarning
from nomad.errors import StateError
from nomad.master import secret


def test_made_once_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "token"
    assert secret.kept(path, lambda: "first") == "first"
    assert secret.kept(path, lambda: "second") == "first"
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", [b"", b" \n"])
def test_an_empty_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "token"
    path.write_bytes(content)
    with pytest.raises(StateError, match="token is empty; delete it"):
        secret.kept(path, lambda: "another")


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(StateError, match="can't be read"):
        secret.kept(path, lambda: "another")


@pytest.mark.parametrize(("mode", "what"), [(0o640, "read"), (0o604, "read"), (0o666, "changed")])
def test_one_that_others_can_read_is_told(tmp_path: Path, mode: int, what: str) -> None:
    path = tmp_path / "token"
    path.write_text("kept")
    path.chmod(mode)
    with pytest.warns(CredentialsWarning) as told:
        assert secret.kept(path, lambda: "another") == "kept"
    assert [str(warning.message) for warning in told] == [
        f"{path} can be {what} by other users of this machine: run `chmod 600 {path}`"
    ]
