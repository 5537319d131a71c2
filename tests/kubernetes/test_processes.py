"""Processes that a test cluster starts are found and ended by whoever opens its file."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kubernetes.cluster.processes import ClusterError, Processes

SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    known = Processes(tmp_path / "processes.json", tmp_path / "logs")
    yield known
    known.stop_all(signal.SIGKILL)


def test_another_one_with_the_same_file_sees_and_ends_them(processes: Processes, tmp_path: Path) -> None:
    processes.start("sleeper", SLEEP)
    processes.wait("sleeper", lambda: "up" in processes.log("sleeper").read_text(), "until it is up")
    other = Processes(tmp_path / "processes.json", tmp_path / "logs")
    assert other.running("sleeper")
    other.stop_all()
    assert not processes.running("sleeper")
    assert processes.names() == []


def test_what_ends_too_early_is_reported_with_its_last_words(processes: Processes) -> None:
    processes.start("failing", [sys.executable, "-c", "print('no such thing')"])
    with pytest.raises(ClusterError, match="ended .*(?s:.*)no such thing"):
        processes.wait("failing", lambda: False, "until it answers")


def test_a_pid_that_was_given_out_again_is_left_alone(processes: Processes, tmp_path: Path) -> None:
    processes.start("sleeper", SLEEP)
    pid = processes.pid("sleeper")
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"sleeper": {"pid": pid, "started": 1.0}}))
    stale = Processes(other, tmp_path / "logs")
    assert not stale.running("sleeper")
    stale.stop_all(signal.SIGKILL)
    assert processes.running("sleeper")
