"""The demo's bookkeeping, and that it leaves nothing running however it ends (`conftest.nothing_left` looks)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def demo() -> Any:
    sys.path.insert(0, str(EXAMPLES))
    try:
        import demo

        yield demo
    finally:
        sys.path.pop(0)
        sys.modules.pop("demo", None)


def record(frame: int, *names: str, truth: str = "nobody", seconds: float = 0.1) -> dict[str, Any]:
    return {"frame": frame, "names": list(names), "truth": truth, "seconds": seconds}


def test_tally_counts_answers_by_the_truth(demo: Any) -> None:
    tally = demo.Tally()
    tally.add(record(0, "A", truth="A"), now=0)
    tally.add(record(1, "B", truth="A"), now=0)
    tally.add(record(2, truth="nobody"), now=0)
    tally.add(record(3, "A", "B", truth="A"), now=0)
    assert (tally.records, tally.right) == (4, 2)
    assert tally.names == {"A": 2, "B": 2, "nobody": 1}


def test_tally_finds_what_is_lost_and_what_is_doubled(demo: Any) -> None:
    tally = demo.Tally()
    assert (tally.lost, tally.doubled) == (0, 0)
    for number in (3, 4, 4, 7, 7, 7, 8):  # those before the first that was seen don't count
        tally.add(record(number), now=0)
    assert (tally.lost, tally.doubled) == (2, 3)


def test_tally_tells_latency_and_rate(demo: Any) -> None:
    tally = demo.Tally()
    assert (tally.latency(0.5), tally.rate(0)) == (0, 0)
    for number in range(100):
        tally.add(record(number, seconds=(number + 1) / 100), now=number / 10)
    assert tally.latency(0.5) == pytest.approx(0.51)
    assert tally.latency(0.99) == pytest.approx(1.0)
    assert tally.latency(0.5, last=10) == pytest.approx(0.96)
    assert tally.rate(9.9) == pytest.approx(10)


def run_until(seen: str, then: Callable[[subprocess.Popen[str]], None]) -> tuple[int, str]:
    """Start the demo, do `then` when `seen` is in its output; how it ended, and the rest of its output."""
    pytest.importorskip("dlib", reason="needs what `pip install .[examples]` installs")
    command = [sys.executable, "demo.py", "--seconds", "60"]
    with subprocess.Popen(
        command, cwd=EXAMPLES, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        output = ""
        while seen not in output:
            line = process.stdout.readline()
            assert line, f"ended early:\n{output}"
            output += line
        then(process)
        rest, _ = process.communicate(timeout=30)
    return process.returncode, rest


@pytest.mark.slow
def test_ctrl_c_stops_it_and_all_it_started() -> None:
    code, rest = run_until("seen: Eileen Collins", lambda process: process.send_signal(signal.SIGINT))
    assert code == 130
    assert "nothing is left running" in rest
    assert "Traceback" not in rest


@pytest.mark.slow
@pytest.mark.parametrize("seen", ["", "edge (speed", "running"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_at_other_moments(seen: str, number: signal.Signals) -> None:
    code, _ = run_until(seen, lambda process: process.send_signal(number))
    assert code in (128 + number, -number)


@pytest.mark.slow
def test_what_it_started_follows_it_when_it_is_killed() -> None:
    code, _ = run_until("running", lambda process: process.kill())
    assert code == -signal.SIGKILL
    deadline = time.monotonic() + 15
    while pods_of_this_test() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not pods_of_this_test()


def pods_of_this_test() -> list[int]:
    import psutil

    mark = os.environ["NOMAD_TEST_RUN"]
    return [
        process.pid
        for process in psutil.process_iter(["environ"])
        if (environ := process.info["environ"]) and environ.get("NOMAD_TEST_RUN") == mark and "NOMAD_POD" in environ
    ]
