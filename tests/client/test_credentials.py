"""The credentials file: who can read it, who can lose it, and what a broken one says."""

from __future__ import annotations

import json
import os
import stat
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from nomad import credentials
from nomad.credentials import Credentials, CredentialsWarning, find, master_url, save
from nomad.errors import StateError, UsageError

URL = "http://127.0.0.1:30000"
KEY = bytes(range(32))


def test_what_is_saved_is_found(own_credentials: Path) -> None:
    save(URL, "token", KEY)
    assert find(URL) == Credentials("token", KEY)
    assert find("http://127.0.0.1:1") == Credentials(None, None)
    assert json.loads(own_credentials.read_text()) == {"masters": {URL: {"token": "token", "signing_key": KEY.hex()}}}


def test_nobody_else_can_read_it(own_credentials: Path) -> None:
    old = os.umask(0)
    try:
        save(URL, "token", KEY)
    finally:
        os.umask(old)
    assert stat.S_IMODE(own_credentials.stat().st_mode) == 0o600
    assert stat.S_IMODE(own_credentials.parent.stat().st_mode) == 0o700
    assert [path.name for path in own_credentials.parent.iterdir()] == ["credentials.json"]


def test_saving_mends_the_mode(own_credentials: Path) -> None:
    save(URL, "old", KEY)
    own_credentials.chmod(0o644)
    with pytest.warns(CredentialsWarning, match="chmod 600"):
        save(URL, "new", KEY)
    assert stat.S_IMODE(own_credentials.stat().st_mode) == 0o600
    assert find(URL).token == "new"


def test_a_file_that_others_can_read_is_told(own_credentials: Path) -> None:
    save(URL, "token", KEY)
    own_credentials.chmod(0o640)
    with pytest.warns(CredentialsWarning, match=f"{own_credentials} can be read by other users"):
        assert find(URL).token == "token"


def test_secrets_arent_shown() -> None:
    assert repr(Credentials("token", KEY)) == "Credentials()"


def test_the_environment_comes_first(monkeypatch: pytest.MonkeyPatch, own_credentials: Path) -> None:
    save(URL, "token", KEY)
    monkeypatch.setenv("NOMAD_TOKEN", "other")
    assert find(URL) == Credentials("other", KEY)
    monkeypatch.setenv("NOMAD_SIGNING_KEY", bytes(32).hex())
    assert find(URL) == Credentials("other", bytes(32))


def test_a_token_read_from_a_file_may_end_with_a_newline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOMAD_TOKEN", "other\n")
    assert find(URL).token == "other"


@pytest.mark.parametrize("token", ["t\u00f6ken", "to\nken", "to\x1bken", "t" * 100_000])
def test_a_token_that_is_none(monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setenv("NOMAD_TOKEN", token)
    with pytest.raises(UsageError, match="NOMAD_TOKEN is no token"):
        find(URL)


@pytest.mark.parametrize("key", ["xyz", "00", "0" * 63, "ä" * 64])
def test_a_signing_key_that_is_none(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("NOMAD_SIGNING_KEY", key)
    with pytest.raises(UsageError, match="NOMAD_SIGNING_KEY must be 64 hex digits"):
        find(URL)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"masters": []}'])
def test_a_broken_file_says_what_to_do(own_credentials: Path, content: str) -> None:
    own_credentials.parent.mkdir()
    own_credentials.write_text(content)
    own_credentials.chmod(0o600)
    with pytest.raises(StateError, match=f"{own_credentials} .*delete it and run `nomad up` again"):
        find(URL)


def test_a_folder_that_cant_be_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NOMAD_CONFIG_DIR", str(tmp_path / "file" / "config"))
    with pytest.raises(StateError, match="can't write the credentials file"):
        save(URL, "token", KEY)


def _save(number: int) -> None:
    save(f"http://127.0.0.1:{number}", f"token-{number}", KEY)


def test_savers_at_once_lose_nothing(own_credentials: Path) -> None:
    with ProcessPoolExecutor(4, mp_context=get_context("fork")) as pool:
        list(pool.map(_save, range(1, 33)))
    assert len(json.loads(own_credentials.read_text())["masters"]) == 32


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://127.0.0.1:30000", URL),
        ("http://localhost:30000/", URL),
        ("http://LOCALHOST:30000", URL),
        ("http://[::1]:30000", URL),
        ("https://nomad.example", "https://nomad.example"),
        ("https://nomad.example:443/cluster/", "https://nomad.example:443/cluster"),
        ("http://[2001:db8::1]:80", "http://[2001:db8::1]:80"),
        (" http://10.0.0.1:1 ", "http://10.0.0.1:1"),
    ],
)
def test_names_of_one_master_are_one(given: str, url: str) -> None:
    assert master_url(given) == url


def test_the_default_master(monkeypatch: pytest.MonkeyPatch) -> None:
    assert master_url() == credentials.DEFAULT_MASTER
    monkeypatch.setenv("NOMAD_MASTER", "http://10.0.0.1:1")
    assert master_url() == "http://10.0.0.1:1"


def test_tokens_differ_and_are_long() -> None:
    assert len({credentials.new_token() for _ in range(100)}) == 100
    assert len(credentials.new_token()) >= 43
