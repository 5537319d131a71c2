"""Secrets in files."""

from __future__ import annotations

from pathlib import Path

import pytest

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
