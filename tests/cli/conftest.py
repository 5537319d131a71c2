"""The command line against the REST interface of a facade in memory."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from nomad import credentials
from nomad.cli.main import cli
from tests.master.facade import SIGNING_KEY, TOKEN, FakeMaster, serve_in_thread


@pytest.fixture(autouse=True)
def own_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No test reads or writes the user's own."""
    for name in ("NOMAD_MASTER", "NOMAD_TOKEN", "NOMAD_SIGNING_KEY", "NOMAD_TRANSPORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NOMAD_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("NOMAD_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "config" / "credentials.json"


@dataclass
class Nomad:
    """The command `nomad`, as a user types it."""

    master: FakeMaster
    url: str
    folder: Path

    def __call__(self, *args: str | Path, code: int = 0) -> Result:
        """Run a command and check its exit code."""
        result = CliRunner().invoke(cli, [str(arg) for arg in args], prog_name="nomad")
        assert result.exit_code == code, (result.exit_code, result.output, result.exception)
        return result

    def out(self, *args: str | Path) -> str:
        """What a command prints."""
        return self(*args).stdout

    def json(self, *args: str | Path) -> Any:
        """The document that a command prints with --json."""
        return json.loads(self(*args, "--json").stdout)

    def error(self, *args: str | Path, code: int) -> str:
        """What a command that fails says, and that it says nothing else."""
        result = self(*args, code=code)
        assert result.stdout == ""
        assert "Traceback" not in result.stderr
        return result.stderr.strip()

    @contextmanager
    def meanwhile(self, happen: Callable[[FakeMaster], Coroutine[Any, Any, None]]) -> Iterator[None]:
        """Let something happen in the master while the block runs a command that waits for it."""
        assert self.master.loop is not None
        happening = asyncio.run_coroutine_threadsafe(happen(self.master), self.master.loop)
        yield
        happening.result(timeout=30)

    def file(self, text: str, name: str = "program.py") -> Path:
        """A file of the user's."""
        path = self.folder / name
        path.write_text(text)
        return path


@pytest.fixture
def nomad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nomad]:
    master = FakeMaster()
    with serve_in_thread(master) as url:
        credentials.save(url, TOKEN, SIGNING_KEY)
        monkeypatch.setenv("NOMAD_MASTER", url)
        yield Nomad(master, url, tmp_path)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for `condition`, at most 30 seconds."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)
