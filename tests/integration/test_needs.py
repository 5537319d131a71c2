"""What operators need, from the decorator to the process: packages, variables, secrets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nomad import bundle, pipeline
from nomad.master.app import Master
from nomad.settings import Settings
from nomad.topology import parse
from tests.wheels import variables, wheel

pytestmark = pytest.mark.slow

DEADLINE = 40.0

NODES = parse("nodes: {edge: {devices: {camera: 1}}, cloud: {}}")


def endless() -> Any:
    import time

    while True:
        yield 1
        time.sleep(0.02)


def tells(x: int) -> str:
    import os

    import small_one

    return f"{small_one.VALUE} {os.environ['MODE']} {os.environ['PASSWORD']}"


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not condition():
            await asyncio.sleep(0.05)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel(tmp_path / "index", "small_one", "1.0", "VALUE = 'one'\n")
    for name, value in variables(tmp_path / "index").items():
        monkeypatch.setenv(name, value)
    secret = tmp_path / "state" / "secrets" / "db" / "password"
    (tmp_path / "state").mkdir(mode=0o700)
    secret.parent.mkdir(parents=True)
    secret.touch(mode=0o600)
    secret.write_text("hidden\n")


def made(master: Master, requirement: str) -> bytes:
    needy = pipeline.operator(
        requirements=[requirement], environment={"MODE": "fast"}, secrets={"PASSWORD": "db/password"}
    )(tells)
    source = pipeline.operator(devices={"camera"})(endless)
    return bundle.make(pipeline.build([source, needy, print]), master.signing_key)


@pytest.mark.usefixtures("index")
async def test_an_operator_has_what_it_asks_for(tmp_path: Path) -> None:
    async with Master(Settings(state=tmp_path / "state"), NODES) as master:
        await master.submit(made(master, "small-one==1.0"), id="p", start="edge", end="cloud")
        await until(lambda: master.last_output("p", "tells") is not None)
        data = master.last_output("p", "tells")
        assert data is not None
        assert b"one fast hidden" in data
        assert len(list((tmp_path / "state" / "packages").glob("*/small_one.py"))) == 1


@pytest.mark.usefixtures("index")
async def test_a_package_that_there_is_not_fails_the_pipeline_with_what_pip_says(tmp_path: Path) -> None:
    async with Master(Settings(state=tmp_path / "state"), NODES) as master:
        await master.submit(made(master, "small-one==2.0"), id="p", start="edge", end="cloud")
        await until(lambda: master.pipeline("p").phase == "failed")
        failure = master.pipeline("p").operators[1].last_failure
        assert failure is not None
        assert "small-one==2.0 can't be installed: pip says: Could not find a version" in failure.message
