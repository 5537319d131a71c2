from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from nomad.errors import PodStartError, StateError
from nomad.runtime import local, process
from nomad.runtime.base import NodeInfo, ObservedPod, PodPhase
from nomad.runtime.local import LocalRuntime
from nomad.settings import Pods, Seat
from tests.contract import runtime as contract
from tests.contract.runtime import seen, spec, until

ARGV = (sys.executable, "-u", str(Path(__file__).with_name("standin.py")))


class LocalHarness:
    def __init__(self, state: Path, sockets: Path) -> None:
        self.state = state
        self.sockets = sockets
        self.settings = Pods(log_bytes=4096)
        self._opened: list[LocalRuntime] = []

    async def open(self) -> LocalRuntime:
        runtime = await LocalRuntime.open([NodeInfo("here")], self.state, self.sockets, self.settings, argv=ARGV)
        self._opened.append(runtime)
        return runtime

    def kill(self, pod: ObservedPod) -> None:
        assert pod.pid is not None
        os.kill(pod.pid, signal.SIGKILL)

    async def close(self) -> None:
        for runtime in self._opened:
            await runtime.close()
        last = await self.open()
        for pod in await last.list():
            await last.stop(pod.id, grace=0.0)

        async def all_ended() -> bool:
            return all(pod.phase is PodPhase.EXITED for pod in await last.list())

        await until(all_ended)
        await last.close()
        reap()


def reap() -> None:
    """Children that an earlier runtime of this process started, and a later one adopted."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


@pytest.fixture
def sockets() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="nomad-") as folder:
        yield Path(folder)


@pytest.fixture
async def harness(tmp_path: Path, sockets: Path) -> AsyncIterator[LocalHarness]:
    harness = LocalHarness(tmp_path / "state", sockets)
    yield harness
    await harness.close()


@pytest.mark.parametrize("watched_by", ["pidfd", "polling"])
@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
async def test_contract(check, watched_by: str, harness: LocalHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    if watched_by == "polling":
        monkeypatch.delattr(os, "pidfd_open")
        monkeypatch.setattr(process, "POLL_SECONDS", 0.01)
    await check(harness)


async def test_secrets_stay_with_the_master(harness: LocalHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOMAD_TOKEN", "a token that is secret")
    monkeypatch.setenv("NOMAD_SIGNING_KEY", "a key that is secret")
    monkeypatch.setenv("USERS_OWN", "kept")
    runtime = await harness.open()
    await runtime.start(spec("environment"))

    async def printed() -> bool:
        return bool(await runtime.logs("p.environment-e1"))

    await until(printed)
    text = "\n".join(await runtime.logs("p.environment-e1"))
    assert "that is secret" not in text
    seen_there = json.loads(text)
    assert seen_there["USERS_OWN"] == "kept"
    assert json.loads(seen_there["NOMAD_POD"]) == {
        "pod": "p.environment-e1",
        "epoch": 1,
        "control": "unix:/nowhere",
        "key": (b"k" * 32).hex(),
        "verify_key": (b"v" * 32).hex(),
        "master_timeout": 60.0,
    }


async def test_a_pod_has_its_variables_and_secrets(harness: LocalHarness) -> None:
    runtime = await harness.open()
    file = harness.state / "secrets" / "db" / "password"
    (missing,) = await runtime.missing_secrets(["db/password"])
    assert missing == f"there is no secret db/password: put it into the file {file}, with mode 600"
    file.parent.mkdir(parents=True)
    file.write_text("hidden\n")
    file.chmod(0o644)
    (missing,) = await runtime.missing_secrets(["db/password", "db/password"])
    assert missing == f"the secret db/password can be read by others: chmod 600 {file}"
    asked = replace(spec("environment"), environment={"MODE": "fast"}, secrets={"PASSWORD": "db/password"})
    with pytest.raises(PodStartError, match="chmod 600"):
        await runtime.start(asked)
    file.chmod(0o600)
    assert await runtime.missing_secrets(["db/password"]) == []
    await runtime.start(asked)

    async def printed() -> bool:
        return bool(await runtime.logs("p.environment-e1"))

    await until(printed)
    seen_there = json.loads("\n".join(await runtime.logs("p.environment-e1")))
    assert (seen_there["MODE"], seen_there["PASSWORD"]) == ("fast", "hidden")


async def test_a_pod_runs_and_listens_where_its_node_has_its_seat(harness: LocalHarness) -> None:
    harness.settings = Pods(transport="tcp", seats={"here": Seat(("env", "SEAT=taken"), "10.77.0.9")})
    runtime = await harness.open()
    changes = runtime.watch()
    await runtime.start(spec("environment"))
    pod = await seen(changes, "p.environment-e1", PodPhase.RUNNING)

    async def printed() -> bool:
        return bool(await runtime.logs(pod.id))

    await until(printed)
    assert json.loads("\n".join(await runtime.logs(pod.id)))["SEAT"] == "taken"
    assert runtime.listen_address(pod.id) == "tcp://10.77.0.9:0"
    harness.kill(pod)
    assert (await seen(changes, pod.id, PodPhase.EXITED)).exit_code == -signal.SIGKILL  # it is the pod, not a parent


async def test_what_a_pod_started_ends_with_it(harness: LocalHarness) -> None:
    runtime = await harness.open()
    changes = runtime.watch()
    await runtime.start(spec("parent"))
    pod = await seen(changes, "p.parent-e1", PodPhase.RUNNING)

    async def printed() -> bool:
        return bool(await runtime.logs(pod.id))

    await until(printed)
    grandchild = int((await runtime.logs(pod.id))[0])
    harness.kill(pod)
    await seen(changes, pod.id, PodPhase.EXITED)

    async def gone() -> bool:
        return not psutil.pid_exists(grandchild) or psutil.Process(grandchild).status() == psutil.STATUS_ZOMBIE

    await until(gone)


MASTER = """
import asyncio, sys
from pathlib import Path
from nomad.runtime.base import NodeInfo
from nomad.runtime.local import LocalRuntime
from tests.contract.runtime import spec

async def main():
    state, sockets, *argv = sys.argv[1:]
    runtime = await LocalRuntime.open([NodeInfo("here")], Path(state), Path(sockets), argv=argv)
    await runtime.start(spec("quiet"))
    print("started", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture
def killed_master(harness: LocalHarness) -> None:
    """A process that started a pod over the harness's folders and then met kill -9."""
    command = [sys.executable, "-c", MASTER, str(harness.state), str(harness.sockets), *ARGV]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as master:
        assert master.stdout is not None
        assert master.stdout.readline() == b"started\n"
        master.kill()


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process that no runtime started."""
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as process:
        yield process
        process.kill()


@pytest.mark.usefixtures("killed_master")
async def test_a_pod_is_found_again_after_its_master_was_killed(harness: LocalHarness) -> None:
    runtime = await harness.open()
    changes = runtime.watch()
    (pod,) = await runtime.list()
    assert (pod.id, pod.phase, pod.node) == ("p.quiet-e1", PodPhase.RUNNING, "here")
    assert pod.pid is not None
    assert psutil.pid_exists(pod.pid)
    await runtime.stop(pod.id, grace=contract.DEADLINE)
    ended = await seen(changes, pod.id, PodPhase.EXITED)
    assert ended.exit_code is None  # only a parent is told
    assert ended.reason == "ended while nobody watched it"


async def test_a_recycled_pid_is_not_taken_for_the_pod(
    harness: LocalHarness, stranger: subprocess.Popen[bytes]
) -> None:
    (harness.state / "run").mkdir(parents=True)
    record = local._Record("p.quiet-e1", "p", "quiet", 1, "here", stranger.pid, "another boot 123")
    (harness.state / "run" / "p.quiet-e1.json").write_text(json.dumps(asdict(record)))
    runtime = await harness.open()

    async def ended() -> bool:
        await runtime.stop("p.quiet-e1", grace=0.0)
        return [pod.phase for pod in await runtime.list()] == [PodPhase.EXITED]

    await until(ended)
    assert stranger.poll() is None


async def test_a_process_runs_nothing_before_its_starter_has_written_it_down(tmp_path: Path) -> None:
    done = tmp_path / "done"
    started = process.Gated(["touch", str(done)], dict(os.environ), tmp_path / "log")
    assert process.birth(started.pid)
    started.give_up()
    assert process.birth(started.pid) is None
    assert not done.exists()


async def test_a_pod_that_cannot_be_written_down_is_not_started(
    harness: LocalHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = await harness.open()

    def full(self: LocalRuntime, record: local._Record) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(LocalRuntime, "_write", full)
    with pytest.raises(PodStartError, match="no space left"):
        await runtime.start(spec("quiet"))
    assert list(await runtime.list()) == []


async def test_a_log_is_kept_small(harness: LocalHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "ROTATE_SECONDS", 0.02)
    runtime = await harness.open()
    await runtime.start(spec("flood"))
    follower = runtime.follow("p.flood-e1")
    folder = harness.state / "logs" / "p"

    async def rotated() -> bool:
        return (folder / "p.flood-e1.log.1").exists()

    await until(rotated)
    numbers = []
    for _ in range(50):
        number, rest = (await anext(follower)).split()
        numbers.append(int(number))
        assert rest == "x" * 100  # lines may be left out, parts of lines aren't
    assert numbers == sorted(numbers)
    assert (folder / "p.flood-e1.log.1").stat().st_size == 4096
    await runtime.stop("p.flood-e1", grace=0.0)
    async with asyncio.timeout(contract.DEADLINE):
        assert [line async for line in follower]  # the rest, and then the end
    kept = await runtime.logs("p.flood-e1")
    assert len(kept) >= 4096 // 110


async def test_only_the_last_ended_pods_of_an_operator_are_kept(harness: LocalHarness) -> None:
    harness.settings = replace(harness.settings, keep_ended=2)
    runtime = await harness.open()
    changes = runtime.watch()
    for epoch in range(1, 6):
        await runtime.start(spec("exit3", epoch))
        await seen(changes, f"p.exit3-e{epoch}", PodPhase.EXITED)
    assert [pod.epoch for pod in await runtime.list()] == [3, 4, 5]
    assert sorted(path.name for path in (harness.state / "logs" / "p").iterdir()) == [
        f"p.exit3-e{epoch}.log" for epoch in (3, 4, 5)
    ]


async def test_addresses_are_short_and_their_own(harness: LocalHarness) -> None:
    runtime = await harness.open()
    long = runtime.listen_address("x" * 200)
    assert long.startswith(f"unix:{harness.sockets}/")
    assert len(long) < 90
    assert runtime.listen_address("y") != long
    harness.settings = replace(harness.settings, transport="tcp")
    assert (await harness.open()).listen_address("x") == "tcp://127.0.0.1:0"
    harness.settings = replace(harness.settings, transport="zmq+ipc")
    assert (await harness.open()).listen_address("x").startswith(f"zmq+ipc:{harness.sockets}/")


async def test_a_pod_that_was_killed_leaves_no_socket(harness: LocalHarness) -> None:
    runtime = await harness.open()
    changes = runtime.watch()
    await runtime.start(spec("quiet"))
    (harness.sockets / Path(runtime.listen_address("p.quiet-e1")).name).touch()
    assert list(harness.sockets.iterdir())
    harness.kill(await seen(changes, "p.quiet-e1", PodPhase.RUNNING))
    await seen(changes, "p.quiet-e1", PodPhase.EXITED)
    assert not list(harness.sockets.iterdir())


async def test_work_folders_survive_pods_and_go_with_the_pipeline(harness: LocalHarness) -> None:
    runtime = await harness.open()
    folder = Path(runtime.workdir("p", "square"))
    (folder / "journal").write_text("kept")
    assert runtime.workdir("p", "square") == str(folder)
    assert (folder / "journal").read_text() == "kept"
    await runtime.forget("p")
    assert not (harness.state / "pods" / "p").exists()


async def test_records_that_cannot_be_read_are_left_alone(harness: LocalHarness) -> None:
    (harness.state / "run").mkdir(parents=True)
    broken = harness.state / "run" / "p.broken-e1.json"
    broken.write_text("{")
    runtime = await harness.open()
    assert list(await runtime.list()) == []
    assert broken.exists()


async def test_a_state_folder_that_is_a_file(tmp_path: Path, sockets: Path) -> None:
    (tmp_path / "state").write_text("")
    with pytest.raises(StateError, match="can't be used: Not a directory"):
        await LocalRuntime.open([NodeInfo("here")], tmp_path / "state", sockets)
