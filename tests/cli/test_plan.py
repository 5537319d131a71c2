"""`nomad plan`: needs a file, and no master."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from nomad import scheduler
from nomad.cli.main import cli
from tests.scheduler.test_plan import small_problem


@pytest.fixture
def problem(tmp_path: Path) -> Path:
    """A file with the example of docs/placement.md."""
    file = tmp_path / "problem.json"
    file.write_text(json.dumps(small_problem()))
    return file


def run(*args: str, code: int = 0, stdin: str | None = None) -> Result:
    result = CliRunner().invoke(cli, ["plan", *args], input=stdin)
    assert result.exit_code == code, result.output
    return result


def test_for_programs(problem: Path) -> None:
    answer = json.loads(run(str(problem), "--json").stdout)
    assert answer == scheduler.plan(small_problem())
    assert json.loads(run("-", "--json", stdin=problem.read_text()).stdout) == answer


def test_for_people(problem: Path) -> None:
    lines = run(str(problem)).stdout.splitlines()
    assert lines[0].split() == ["OPERATOR", "NODE", "TRANSFER", "PROCESSING", "QUEUEING", "FINISH", "WHY"]
    assert lines[2].split()[:4] == ["detect", "fog", "45", "ms"]
    assert lines[-1] == "Latency 129 ms, the least possible."


def test_that_there_is_no_placement_is_an_answer(problem: Path) -> None:
    data = small_problem()
    data["pipeline"]["operators"][1]["requires"] = ["tpu"]
    problem.write_text(json.dumps(data))
    text = run(str(problem)).stdout
    assert "There is no placement (requires): no node has all the labels that operator 'detect' requires: tpu." in text
    assert "cloud lacks label tpu" in text
    assert json.loads(run(str(problem), "--json").stdout)["feasible"] is False


def test_what_is_not_a_problem_is_refused(problem: Path) -> None:
    assert "is not JSON" in run("-", code=7, stdin="{").stderr
    assert "nodes: is missing" in run("-", code=7, stdin="{}").stderr
    assert "No such file" in run(str(problem.with_name("none.json")), code=2).stderr
