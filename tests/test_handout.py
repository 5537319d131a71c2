"""Packages from an agent to a pod: over real connections, installed by real pip."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nomad import handout
from nomad.clock import SystemClock
from nomad.errors import PackagesError
from nomad.handout import Counter, fetched, key_of
from nomad.measure.agent import Agent
from nomad.packages import PLATFORM, PYTHON, Cache
from tests.wheels import variables, wheel

KEY = bytes(32)


@pytest.fixture
async def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[str]:
    """The address of one whose cache is the folder `node`."""
    wheel(tmp_path / "index", "small", "1.0", "VALUE = 1\n")
    wheel(tmp_path / "index", "large", "1.0", f"VALUE = {'x' * 3_000_000!r}\n")
    for name, value in variables(tmp_path / "index").items():
        monkeypatch.setenv(name, value)
    made = Agent("edge", KEY, SystemClock(), visits=(Counter(KEY, Cache(tmp_path / "node")),))
    yield await made.listen("tcp://127.0.0.1:0")
    await made.close()


def content(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Times count, too: or compiled files would be taken for stale ones."""
    files = [Path(root, name) for root, _, names in os.walk(folder) for name in names]
    return {path.relative_to(folder): (int(path.stat().st_mtime), path.read_bytes()) for path in files}


async def test_a_pod_gets_a_copy(agent: str, tmp_path: Path) -> None:
    with await fetched(Cache(tmp_path / "pod"), ("large", "small"), agent, "p-1", key_of(KEY, "p-1")) as got:
        assert got.path.parent == tmp_path / "pod"
        assert content(got.path) == content(tmp_path / "node" / got.path.name)
        assert (got.path / "small.py").exists()
    (tmp_path / "index" / "small-1.0-py3-none-any.whl").unlink()
    with await fetched(Cache(tmp_path / "another"), ("large", "small"), agent, "p-2", key_of(KEY, "p-2")) as again:
        assert (again.path / "small.py").exists()


async def test_what_pip_says_reaches_the_pod(agent: str, tmp_path: Path) -> None:
    with pytest.raises(PackagesError, match=r"small==7 can't be installed: pip says: .*No matching") as caught:
        await fetched(Cache(tmp_path / "pod"), ("small==7",), agent, "p-1", key_of(KEY, "p-1"))
    assert caught.value.final


async def test_an_agent_runs_nothing_that_a_pod_names(
    agent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip builds what it is given by path or address, whatever it is told of wheels."""
    monkeypatch.setenv("PIP_ONLY_BINARY", ":all:")
    source, trace = tmp_path / "source", tmp_path / "trace"
    source.mkdir()
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    (source / "backend.py").write_text(f"open({str(trace)!r}, 'w').close()\n")
    up = "../" * len(Path.cwd().parts)
    for text in (str(source), f"x @ {source.as_uri()}", f"x===/{up}{source}", f"-e {source}"):
        with pytest.raises(PackagesError, match="installs packages by name only") as caught:
            await fetched(Cache(tmp_path / "pod"), (text,), agent, "p-1", key_of(KEY, "p-1"))
        assert caught.value.final
        assert not trace.exists()


async def test_another_platform_is_refused(agent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handout, "PLATFORM", "plan9-vax")
    sent = {"type": "packages", "requirements": ["small"], "python": PYTHON, "platform": "linux-x"}
    with pytest.raises(PackagesError, match="the operator's image is linux-x") as caught:
        await handout._installed(sent, Cache(tmp_path / "node"))
    assert caught.value.final


async def test_another_python_is_refused(agent: str, tmp_path: Path) -> None:
    """What packages need may depend on it, and pip goes by its own."""
    sent = {"type": "packages", "requirements": ["small"], "python": "3.99", "platform": PLATFORM}
    with pytest.raises(PackagesError, match=f"for Python {PYTHON} here, .* the operator's is 3.99: put") as caught:
        await handout._installed(sent, Cache(tmp_path / "node"))
    assert caught.value.final


async def test_only_pods_that_the_master_sends(agent: str, tmp_path: Path) -> None:
    for key in (KEY, key_of(KEY, "p-2")):
        with pytest.raises(PackagesError, match="can't be asked") as caught:
            await fetched(Cache(tmp_path / "pod"), ("small",), agent, "p-1", key)
        assert not caught.value.final


async def test_an_agent_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PackagesError, match="can't be asked") as caught:
        await fetched(Cache(tmp_path / "pod"), ("small",), "tcp://127.0.0.1:1", "p-1", key_of(KEY, "p-1"))
    assert not caught.value.final
