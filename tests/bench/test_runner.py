"""Short real runs: a cluster, pods, shaped links, and the file and the plot that come of it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from nomad.bench import runner, scenario
from nomad.bench.results import Results
from nomad.bench.runner import Plan
from nomad.cli.main import cli

pytestmark = pytest.mark.slow

SCENARIO = """\
about: a link steps, a node gets slow, the load grows, and an operator is moved
topology:
  nodes: {edge: {}, fog: {}, cloud: {}}
  links:
    - {from: edge, to: cloud, latency: 10ms}
    - {from: edge, to: fog, latency: 1ms}
    - {from: fog, to: cloud, latency: 10ms}
pipeline:
  start: edge
  end: cloud
  rate: 100
  operators: [{name: work, work: 1ms}]
duration: 3s
settle: 300ms
policies:
  - all-edge
  - {name: planned, pins: {}, moves: false}
events:
  - {at: 1.5s, link: edge->cloud, latency: 60ms}
  - {at: 1.5s, operator: work, work: 2ms}
  - {at: 1.5s, rate: 150}
  - {at: 1.5s, node: fog, speed: 0.5}
  - {at: 1.6s, move: work, to: [fog]}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "short.yaml"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Both policies, once."""
    plan = scenario.load(write(tmp_path_factory.mktemp("runs"), SCENARIO))
    return asyncio.run(
        runner.run_all(Plan(plan, plan.form.policies, repeats=1, seeds=[1], duration=plan.form.duration))
    )


def test_each_policy_is_run_and_loses_nothing(found: Results) -> None:
    assert [(run.policy, run.error) for run in found.runs] == [("all-edge", ""), ("planned", "")]
    for run in found.runs:
        assert run.outcome is not None
        assert run.outcome.arrived == run.outcome.sent > 300
        assert (run.outcome.lost, run.outcome.doubled, run.outcome.disorder) == (0, 0, 0)
    assert found.runs[0].placement == {"source": "edge", "work": "edge", "sink": "cloud"}


def test_latencies_follow_the_timeline(found: Results) -> None:
    run = found.runs[0]
    before, *_, after = found.figures(run)
    assert before.p50 is not None
    assert after.p50 is not None
    assert 0.011 <= before.p50 < 0.05
    assert after.p50 > before.p50 + 0.045
    steps = [item.message for item in run.happened if item.kind == "step"]
    assert steps[:2] == ["edge <-> cloud 60 ms"] * 2
    assert set(steps) == {"edge <-> cloud 60 ms", "work takes 2 ms", "150 messages/s", "fog speed 0.5"}
    assert any(item.kind == "pipeline.running" for item in run.happened)
    assert run.samples[-1].nodes == run.placement


def test_a_planned_move_is_made_and_its_gap_measured(found: Results) -> None:
    move = next(move for move in found.runs[1].moves if move.cause == "user")
    assert (move.operator, move.target, move.state) == ("work", "fog", "done")
    assert move.finished is not None
    assert move.asked >= 1.6
    assert found.runs[1].placement_after["work"] == "fog"
    assert not found.runs[0].moves  # what a policy binds to a node stays there


def test_what_can_not_be_placed_is_said_and_the_others_run(tmp_path: Path) -> None:
    text = SCENARIO[: SCENARIO.index("policies:")] + "policies: [all-edge, all-cloud]\n"
    text = text.replace("edge: {}", "edge: {memory: 200Mi}").replace("work: 1ms", "work: 1ms, memory: 1Gi")
    outcome = CliRunner().invoke(
        cli, ["bench", str(write(tmp_path, text)), "--duration", "500ms", "--out", str(tmp_path / "out")]
    )
    assert outcome.exit_code == 8, outcome.output
    assert "all-edge was not run to its end:" in outcome.stdout
    assert "all-cloud" in outcome.stdout.splitlines()[1]
    data = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [bool(run["error"]) for run in data["runs"]] == [True, False]
    assert (tmp_path / "out" / "latency.svg").exists()


def test_usage(tmp_path: Path) -> None:
    path = str(write(tmp_path, SCENARIO))
    wrong = CliRunner().invoke(cli, ["bench", path, "--policy", "al-edge"])
    assert wrong.exit_code == 2
    assert "did you mean 'all-edge'?" in wrong.stderr
    missing = CliRunner().invoke(cli, ["bench", str(tmp_path / "none.yaml")])
    assert missing.exit_code == 7
    assert "can't read the scenario file" in missing.stderr


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_interrupted_it_leaves_nothing_behind(tmp_path: Path, number: signal.Signals, code: int) -> None:
    path = write(tmp_path, SCENARIO.replace("duration: 3s", "duration: 60s"))
    command = [sys.executable, "-m", "nomad", "bench", str(path), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, env={**os.environ, "TMPDIR": str(tmp_path)}, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while not list(tmp_path.glob("nomad-bench-*/arrived")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
        pods = psutil.Process(process.pid).children(recursive=True)
        assert pods
        process.send_signal(number)
        assert process.wait(30) == code
    finally:
        process.kill()
        process.wait()
    assert not psutil.wait_procs(pods, timeout=30)[1]
    assert not list(tmp_path.glob("nomad-bench-*"))
    assert not (tmp_path / "out").exists()
