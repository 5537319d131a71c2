"""Namespaces and their end. As root only."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nomad.bench.netns import namespaces
from nomad.bench.netns.namespaces import FOLDER, Namespaces
from nomad.errors import UsageError

DEADLINE = 30.0

OWNER = """
import time
from nomad.bench.netns.namespaces import Namespaces
made = Namespaces.make(["a", "b"])
print(made["a"], made["b"], made._keeper.pid, flush=True)
time.sleep(600)
"""


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def exists(name: str) -> bool:
    return (FOLDER / name).exists()


def test_namespaces_are_made_and_removed(host: None) -> None:
    made = Namespaces.make(["edge", "cloud"])
    try:
        names = [made[node] for node in made]
        assert list(made) == ["edge", "cloud"]
        assert all(map(exists, names))
        seat = made.seats()["cloud"]
        assert seat.host == "10.77.0.2"
        links = subprocess.run([*seat.prefix, "ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
        assert [line.split(": ")[1] for line in links.splitlines()] == ["lo"]
        assert "UP" in links
    finally:
        made.close()
    assert not any(map(exists, names))
    made.close()


def test_what_runs_inside_ends_with_them(host: None) -> None:
    made = Namespaces.make(["a"])
    try:
        inside = subprocess.Popen([*made.seats()["a"].prefix, "sleep", "600"])
        until(lambda: str(inside.pid) in namespaces.run(["ip", "netns", "pids", made["a"]]).split())
    finally:
        made.close()
    assert inside.wait(DEADLINE) == -signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_they_vanish_with_their_owner(host: None, number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as owner:
        assert owner.stdout is not None
        *names, _ = owner.stdout.readline().decode().split()
        assert all(map(exists, names))
        owner.send_signal(number)
    until(lambda: not any(map(exists, names)))


def test_what_is_left_when_the_keeper_was_killed_too_is_removed_later(host: None) -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        *names, keeper = owner.stdout.readline().decode().split()
        os.kill(int(keeper), signal.SIGKILL)
        owner.kill()
    assert all(map(exists, names))
    assert set(namespaces.remove_stale()) >= set(names)
    assert not any(map(exists, names))


def test_those_of_a_process_that_lives_are_left_alone(host: None) -> None:
    made = Namespaces.make(["a"])
    try:
        assert made["a"] not in namespaces.remove_stale()
        assert exists(made["a"])
    finally:
        made.close()


def test_a_failure_halfway_leaves_nothing(host: None, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(FOLDER.iterdir())
    made: list[str] = []

    def fails_second(namespace: str, commands: list[str]) -> None:
        made.append(namespace)
        if len(made) == 2:
            raise UsageError("the second one")

    monkeypatch.setattr(namespaces, "ip", fails_second)
    with pytest.raises(UsageError, match="the second one"):
        Namespaces.make(["a", "b", "c"])
    assert set(FOLDER.iterdir()) == before


def test_without_root_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/proc/self/ns/net").exists():
        pytest.skip("namespaces are Linux's")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(UsageError, match=r"need root.*sudo.*'shaping'"):
        namespaces.check_host()


def test_a_missing_program_is_named(host: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "tc" else f"/sbin/{name}")
    namespaces.check_host()
    with pytest.raises(UsageError, match=r"'tc' isn't installed.*iproute2"):
        namespaces.check_host("tc")


def test_a_command_that_fails_is_shown_with_its_own_words() -> None:
    with pytest.raises(UsageError, match="`sh -c echo no >&2; exit 3` failed: no"):
        namespaces.run(["sh", "-c", "echo no >&2; exit 3"])
    with pytest.raises(UsageError, match="exit code 3"):
        namespaces.run(["sh", "-c", "exit 3"])
