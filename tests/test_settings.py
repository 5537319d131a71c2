from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nomad.errors import UsageError
from nomad.settings import Backoff, Reconcile, Settings, state_dir


def test_the_environment_changes_the_defaults(tmp_path: Path) -> None:
    env = {"NOMAD_STATE_DIR": str(tmp_path), "NOMAD_TRANSPORT": "tcp", "NOMAD_MASTER_TIMEOUT": "60"}
    settings = Settings.from_environment(env)
    assert settings.state == tmp_path
    assert (settings.pods.transport, settings.pods.master_timeout) == ("tcp", 60.0)
    assert Settings.from_environment(env, state=tmp_path / "other").state == tmp_path / "other"


def test_without_an_environment_there_are_defaults() -> None:
    settings = Settings.from_environment({})
    assert settings.state == state_dir({})
    assert settings.state.name == "nomad"
    assert settings.pods.master_timeout == 3600.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NOMAD_TRANSPORT", "pigeon"),
        ("NOMAD_MASTER_TIMEOUT", "soon"),
        ("NOMAD_MASTER_TIMEOUT", "-1"),
        ("NOMAD_MASTER_TIMEOUT", "inf"),
        ("NOMAD_MASTER_TIMEOUT", "nan"),
    ],
)
def test_what_is_wrong_is_named(name: str, value: str) -> None:
    with pytest.raises(UsageError, match=name):
        Settings.from_environment({name: value})


@given(st.integers(0, 10**9))
def test_pauses_are_bounded_and_never_shrink(failures: int) -> None:
    backoff = Backoff(first=0.2, factor=2.0, limit=30.0)
    assert 0.0 <= backoff.delay(failures) <= backoff.delay(failures + 1) <= 30.0


def test_a_relative_state_folder_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Settings.from_environment({}, state=Path("here")).state == tmp_path / "here"
    assert Settings.from_environment({"NOMAD_STATE_DIR": "there"}).state == tmp_path / "there"


def test_a_move_gives_an_instance_the_time_that_every_start_has() -> None:
    assert Reconcile().moving.start == Reconcile().start_timeout
