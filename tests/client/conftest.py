"""A cluster to talk to: the REST interface over a facade in memory, and credentials of the test's own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from nomad import credentials
from nomad.client import Cluster, connect
from tests.master.facade import SIGNING_KEY, TOKEN, FakeMaster, serve


@pytest.fixture(autouse=True)
def own_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No test reads or writes the user's own."""
    for name in ("NOMAD_MASTER", "NOMAD_TOKEN", "NOMAD_SIGNING_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NOMAD_CONFIG_DIR", str(tmp_path / "config"))
    return tmp_path / "config" / "credentials.json"


@pytest.fixture
def master() -> FakeMaster:
    return FakeMaster()


@pytest_asyncio.fixture
async def url(master: FakeMaster) -> AsyncIterator[str]:
    """Where `master` is served; its credentials are where a client finds them."""
    async with serve(master) as address:
        credentials.save(address, TOKEN, SIGNING_KEY)
        yield address


@pytest_asyncio.fixture
async def cluster(url: str) -> AsyncIterator[Cluster]:
    async with connect(url) as connected:
        yield connected
