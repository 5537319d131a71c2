"""`nomad profile`, and `nomad submit --profile`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
from click.testing import CliRunner

from nomad.cli.main import cli
from tests.cli.conftest import Nomad

PROGRAM = """
def numbers():
    for number in range(100):
        yield number

def square(x):
    print("squaring")
    return x * x

def show(x):
    pass

operators = [numbers, square, show]
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def run(*args: str | Path) -> str:
    result = CliRunner().invoke(cli, ["profile", *map(str, args)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_table_for_people(program: Path) -> None:
    text = run(program, "--messages", "5")
    assert [line.split()[0] for line in text.splitlines()[:4]] == ["OPERATOR", "numbers", "square", "show"]
    assert "reference-seconds of work per second" in text
    assert "squaring" not in text, "what operators print is no part of the result"


def test_json_is_what_submit_takes(program: Path) -> None:
    found = json.loads(run(program, "--json"))
    assert [sorted(entry) for entry in found] == [
        ["output_msg_size"],
        ["cloud_execution_time", "output_msg_size"],
        ["cloud_execution_time"],
    ]


def test_samples(program: Path, tmp_path: Path) -> None:
    (tmp_path / "many.json").write_text("[1, 2, 3]")
    (tmp_path / "one.json").write_text("4")
    numpy.save(tmp_path / "array.npy", numpy.arange(1000.0))
    text = run(program, "--input", tmp_path / "many.json", "--input", tmp_path / "one.json")
    assert text.splitlines()[2].split()[:2] == ["square", "20"]
    assert "7.8 KiB" in run(program, "--input", tmp_path / "array.npy").splitlines()[2]


@pytest.mark.parametrize(("name", "content"), [("a.json", "{"), ("a.json", "[]"), ("a.npy", "no array")])
def test_a_sample_that_can_not_be_read(program: Path, tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    result = CliRunner().invoke(cli, ["profile", str(program), "--input", str(tmp_path / name)])
    assert result.exit_code == 2
    assert name in result.stderr


def test_submit_takes_a_profile(nomad: Nomad, program: Path, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps([{}, {"cloud_execution_time": 0.25}, {}]))
    view = nomad.json("submit", str(program), "--start", "edge", "--end", "cloud", "--profile", str(path))
    assert view["profile"] == [{}, {"cloud_execution_time": 0.25}, {}]


def test_submit_refuses_what_is_no_profile(nomad: Nomad, program: Path, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    for content in ("{", '{"a": 1}', "[1, 2, 3]"):
        path.write_text(content)
        said = nomad.error("submit", program, "--start", "edge", "--end", "cloud", "--profile", path, code=2)
        assert "profile.json" in said
