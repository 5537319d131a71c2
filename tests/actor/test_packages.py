"""What operators require is there when their code is loaded, in pods that are real processes; what can't be is said."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nomad import pipeline
from nomad.actor.host import Exit
from nomad.clock import SystemClock
from nomad.handout import Counter, key_of
from nomad.measure.agent import Agent
from nomad.packages import Cache
from tests.actor.pods import Master, Pod, assignment, master
from tests.wheels import variables, wheel

pytestmark = pytest.mark.slow

KEY = bytes(32)


def endless():
    while True:
        yield 1


def needy(x: int) -> str:
    import small_one

    return small_one.VALUE


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Master]:
    async with master(tmp_path) as made:
        yield made


@pytest.fixture
def index(tmp_path: Path) -> Path:
    wheel(tmp_path / "index", "small_one", "1.0", "VALUE = 'one'\n")
    wheel(tmp_path / "index", "msgpack", "99.0", "raise RuntimeError('never loaded')\n")
    return tmp_path / "index"


def built(*requirements: str) -> pipeline.Pipeline:
    return pipeline.build([endless, pipeline.operator(requirements=requirements)(needy), print])


def begun(folder: Path) -> list[Path]:
    return list(folder.glob("shared/*.new"))


async def fails(pod: Pod) -> tuple[str, bool, int]:
    said = await pod.says("failed")
    return said["error"]["message"], said["fatal"], await pod.ended()


async def test_processes_of_a_node_share_what_they_require(here: Master, index: Path, tmp_path: Path) -> None:
    told = {"packages": str(tmp_path / "shared"), "packages_bytes": 1 << 30}
    for number in (1, 2):
        pod = here.start(f"p.needy-e{number}", **variables(index))
        await pod.until(lambda pod=pod: pod.conn, "it dials in")
        pod.tell(assignment(built("small-one==1.0", "msgpack"), 1, **told))
        await pod.says("ready")
        assert "installed, in" in here.log(pod.name)
        assert "nomad: msgpack was loaded before it was installed" in here.log(pod.name)
        (index / "small_one-1.0-py3-none-any.whl").unlink(missing_ok=True)  # installed once


async def test_a_pod_without_such_a_folder_asks_the_agent(
    here: Master, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables(index).items():
        monkeypatch.setenv(name, value)
    agent = Agent("edge", KEY, SystemClock(), visits=(Counter(KEY, Cache(tmp_path / "node")),))
    try:
        told = {"agent": await agent.listen("tcp://127.0.0.1:0"), "agent_key": key_of(KEY, "warm-1")}
        pod = here.start("warm-1", epoch=0, PIP_NO_INDEX="1", PIP_FIND_LINKS="/nowhere")
        await pod.until(lambda: pod.conn, "it dials in")
        pod.tell(assignment(built("small-one==1.0"), 1, workdir=tmp_path / "work", **told))
        await pod.says("ready")
        assert len(list((tmp_path / "work" / "packages").glob("*/small_one.py"))) == 1
    finally:
        await agent.close()


async def test_what_there_is_not_ends_the_pipeline(here: Master, index: Path, tmp_path: Path) -> None:
    pod = here.start("p.needy-e1", **variables(index))
    await pod.until(lambda: pod.conn, "it dials in")
    pod.tell(assignment(built("small-one==2.0"), 1, packages=str(tmp_path / "shared"), packages_bytes=1))
    message, fatal, code = await fails(pod)
    assert message.startswith("small-one==2.0 can't be installed: pip says: Could not find a version")
    assert (fatal, code) == (True, Exit.CODE)


async def test_an_index_that_is_away_is_tried_again(here: Master, tmp_path: Path) -> None:
    pod = here.start("p.needy-e1", PIP_CONFIG_FILE="/dev/null", PIP_INDEX_URL="http://127.0.0.1:1/simple")
    await pod.until(lambda: pod.conn, "it dials in")
    pod.tell(assignment(built("small-one==1.0"), 1, packages=str(tmp_path / "shared"), packages_bytes=1))
    message, fatal, code = await fails(pod)
    assert "the index isn't reachable" in message
    assert (fatal, code) == (False, Exit.CRASHED)


async def test_a_pod_that_is_to_stop_does_not_wait_for_pip(here: Master, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # an index that never answers
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/simple"
        pod = here.start("p.needy-e1", PIP_CONFIG_FILE="/dev/null", PIP_INDEX_URL=address)
        await pod.until(lambda: pod.conn, "it dials in")
        pod.tell(assignment(built("small-one==1.0"), 1, packages=str(tmp_path / "shared"), packages_bytes=1))
        await pod.until(lambda: begun(tmp_path), "pip is at work")
        pod.tell({"type": "stop", "drain": False, "grace": 1.0})
        assert await pod.ended() == Exit.STOPPED
        assert not begun(tmp_path)
