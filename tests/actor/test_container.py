"""A pod in a container, as far as that shows without one: what it is told, what it tells, and process 1."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from nomad import pipeline
from nomad.actor.host import boot_from
from nomad.control import assignment_from, peer_from
from tests.actor.pods import Master, assignment, master
from tests.ports import free_port


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Master]:
    async with master(tmp_path) as made:
        yield made


def endless() -> Iterator[int]:
    number = 0
    while True:
        yield number
        number += 1
        time.sleep(0.01)


def test_what_a_process_is_told_isnt_inherited(tmp_path: Path) -> None:
    file = tmp_path / "boot"
    file.write_text(json.dumps({"pod": "from the file"}))
    environ = {"NOMAD_BOOT": str(file), "NOMAD_POD": "{}", "PATH": "kept"}
    assert boot_from(environ) == {"pod": "from the file"}
    assert environ == {"PATH": "kept"}
    environ = {"NOMAD_POD": json.dumps({"pod": "from the variable"})}
    assert boot_from(environ) == {"pod": "from the variable"}
    assert not environ


async def test_a_process_that_waits_becomes_an_operator(here: Master) -> None:
    """It dials in under its own name and with no epoch; an assignment makes it what it is, variables included."""

    def tells(x: int) -> str:
        return os.environ["GREETING"] + str(sorted(name for name in os.environ if name in ("NOMAD_BOOT", "NOMAD_POD")))

    greeting = pipeline.operator(environment={"GREETING": "hello "})(tells)
    built = pipeline.build([endless, greeting, print])
    port = free_port()
    folder = here.folder / "kept"
    folder.mkdir()
    pod = here.start(
        "nomad-warm-edge-1", epoch=0, as_file=True,
        NOMAD_POD_IP="127.0.0.1", NOMAD_READY_PORT=str(port), NOMAD_WORK=str(folder),
    )  # fmt: skip
    await pod.until(lambda: pod.conn, "it dials in")
    assert pod.hello["epoch"] == 0
    assert not pod.hello["assigned"]
    assert not answers(port)
    assert not (folder / "serving").exists()

    told = assignment(built, 1, epoch=7, listen="tcp://0.0.0.0:0")
    pod.tell(told)
    ready = await pod.says("ready")
    assert ready["address"].startswith("tcp://127.0.0.1:"), "the address that others reach it by"
    await pod.until(lambda: answers(port), "the probe is answered")
    assert (folder / "serving").exists()

    pod.process.send_signal(signal.SIGUSR1)
    await pod.says("leaving")
    pod.conn.abort()  # type: ignore[union-attr]
    await pod.says("leaving", times=2)
    assert pod.hello["epoch"] == 7
    assert pod.hello["assigned"]
    assert (folder / "serving").exists(), "it goes on until it is told to stop"
    pod.tell({"type": "stop", "drain": False, "grace": 1.0})
    assert await pod.ended() == 0
    assert not (folder / "serving").exists()


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def test_a_newer_master_may_say_more() -> None:
    """What a version doesn't know yet it leaves aside."""
    built = pipeline.build([endless, print])
    told = {**assignment(built, 0), "unheard_of": 1}
    told["links"][0] |= {"new": True}
    told["links"][0]["shape"] |= {"colour": "red"}
    assert assignment_from(told).links[0] == peer_from(told["links"][0])


# Process 1


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root, for a PID namespace of its own"
)
class TestProcessOne:
    """What the first process of a container has to do."""

    def start(self, program: str) -> subprocess.Popen[str]:
        code = f"from nomad.actor import init\ninit.stand_aside()\nimport os, signal, sys, time\n{program}"
        return subprocess.Popen(
            ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable, "-uc", code],
            stdout=subprocess.PIPE,
            text=True,
        )

    def end(self, process: subprocess.Popen[str]) -> int:
        with process:
            return process.wait(20)

    def test_the_exit_code_is_the_pods(self) -> None:
        assert self.end(self.start("sys.exit(4)")) == 4

    def test_a_signal_that_ended_the_pod_shows(self) -> None:
        assert self.end(self.start("os.kill(os.getpid(), signal.SIGKILL)")) == 128 + signal.SIGKILL

    def test_orphans_are_buried(self) -> None:
        """A process whose parent has ended is gone once it has ended itself, and not a zombie."""
        process = self.start(
            "if os.fork() == 0:\n"
            "    if os.fork() == 0: time.sleep(0.05)\n"
            "    os._exit(0)\n"
            "os.wait()\n"
            "end = time.monotonic() + 10\n"
            "there = lambda: sorted(int(name) for name in os.listdir('/proc') if name.isdigit())\n"
            "while len(there()) > 2 and time.monotonic() < end: time.sleep(0.01)\n"
            "print(there())"
        )
        assert process.stdout is not None
        assert process.stdout.read() == "[1, 2]\n"
        assert self.end(process) == 0

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
    def test_signals_reach_the_pod(self, number: int) -> None:
        # Not signal.pause(): a signal that comes right before it would be looked at after the next one only.
        process = self.start(
            f"signal.signal({number}, lambda *_: sys.exit(7))\nprint('here')\nwhile True: time.sleep(0.01)"
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        (first,) = children(process.pid)
        os.kill(first, number)
        assert self.end(process) == 7


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
