"""Every command, its two kinds of output, and its exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

import nomad as package
from nomad import credentials
from nomad.cli import common
from nomad.cli.main import cli
from nomad.master.views import MoveState, Phase
from tests.cli.conftest import Nomad, until
from tests.master.facade import FakeMaster

PROGRAM = """
def numbers():
    return 4

def square(x):
    return x * x

operators = [numbers, square]
"""


@pytest.fixture
def test_pipeline(nomad: Nomad) -> Nomad:
    """The pipeline `test` is there."""
    nomad("submit", nomad.file(PROGRAM), "--start", "edge", "--end", "cloud", "--id", "test")
    return nomad


# -- what needs no master


def test_version() -> None:
    runner = CliRunner()
    assert runner.invoke(cli, ["version"]).stdout.startswith(f"nomad {package.__version__} (Python 3.")
    assert runner.invoke(cli, ["--version"]).stdout.strip() == package.__version__
    assert json.loads(runner.invoke(cli, ["version", "--json"]).stdout)["nomad"] == package.__version__


def test_help_tells_the_exit_codes() -> None:
    text = CliRunner().invoke(cli, ["--help"]).stdout
    for line in ("0  done", "2  wrong usage", "3  no master answers", "8  the pipeline failed"):
        assert line in text


@pytest.mark.parametrize("command", [["version"], ["--help"], ["nodes"], ["ls", "--json"]], ids=" ".join)
def test_nobody_takes_the_output(nomad: Nomad, command: list[str]) -> None:
    """The reader of a pipe that has gone is no news, a full disk is."""
    reader, writer = os.pipe()
    os.close(reader)
    for output, said in ((writer, ""), (os.open("/dev/full", os.O_WRONLY), "the output can't be written: No space")):
        result = subprocess.run(
            [sys.executable, "-m", "nomad", *command],
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": ""},
            check=False,
        )
        os.close(output)
        assert result.returncode == 1
        assert said in result.stderr
        assert len(result.stderr.splitlines()) == bool(said)


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_command_has_help_and_takes_json(name: str) -> None:
    command = cli.commands[name]
    result = CliRunner().invoke(cli, [name, "--help"])
    assert result.exit_code == 0
    assert len(command.get_short_help_str(limit=60)) > 10
    assert not command.get_short_help_str(limit=60).endswith("...")
    if name not in ("completion", "link", "node"):
        assert "--json" in result.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    assert "_NOMAD_COMPLETE" in CliRunner().invoke(cli, ["completion", shell]).stdout


def test_completion_knows_pipelines_and_operators(test_pipeline: Nomad) -> None:
    def complete(words: str, word: int) -> list[str]:
        environment = {"_NOMAD_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(word)}
        output = CliRunner().invoke(cli, [], prog_name="nomad", env=environment).stdout
        return [line.partition(",")[2] for line in output.split()]

    assert complete("nomad show te", 2) == ["test"]
    assert complete("nomad tail test ", 3) == ["numbers", "square"]
    assert complete("nomad tail other ", 3) == []
    assert "submit" in complete("nomad su", 1)


def test_completion_without_a_master_is_empty() -> None:
    environment = {"_NOMAD_COMPLETE": "bash_complete", "COMP_WORDS": "nomad show ", "COMP_CWORD": "2"}
    result = CliRunner().invoke(cli, [], prog_name="nomad", env=environment | {"NOMAD_MASTER": "http://127.0.0.1:9"})
    assert result.stdout.strip() == ""


def test_the_console_script_imports_little() -> None:
    code = "import sys, nomad.cli; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"aiohttp", "pydantic", "rich", "msgpack", "cloudpickle", "yaml", "cryptography"} & set(loaded)


def test_python_m_nomad() -> None:
    result = subprocess.run([sys.executable, "-m", "nomad", "version"], capture_output=True, text=True, check=True)
    assert package.__version__ in result.stdout


# -- exit codes


def test_no_master(nomad: Nomad) -> None:
    error = nomad.error("ls", "--master", "http://127.0.0.1:9", code=3)
    assert error.startswith("Error: No master answers at http://127.0.0.1:9 (")
    assert "`nomad up --node edge --node cloud --port 9`" in error
    assert len(error.splitlines()) == 1


def test_submitting_without_a_master_and_without_credentials(nomad: Nomad) -> None:
    target = nomad.file(PROGRAM)
    nomad.error("submit", target, "--start", "a", "--end", "b", "--master", "http://127.0.0.1:9", code=3)


def test_a_wrong_token(nomad: Nomad, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOMAD_TOKEN", "wrong")
    error = nomad.error("ls", code=4)
    assert error.startswith("Error: The token is not this master's. A token is looked for in NOMAD_TOKEN, then in ")


def test_nothing_there(nomad: Nomad) -> None:
    for command in (
        ("show", "x"),
        ("stop", "x"),
        ("rm", "x"),
        ("logs", "x"),
        ("tail", "x", "y"),
        ("set-aside", "x", "y"),
    ):
        assert nomad.error(*command, code=5) == "Error: there is no pipeline 'x'"
    assert "there is no link" in nomad.error("link", "set", "edge", "moon", "--latency", "1s", code=5)


def test_an_unknown_operator(test_pipeline: Nomad) -> None:
    for command in ("tail", "set-aside"):
        error = test_pipeline.error(command, "test", "nope", code=5)
        assert error == "Error: pipeline 'test' has no operator 'nope'; it has numbers, square"


def test_a_duplicate_id(test_pipeline: Nomad) -> None:
    target = test_pipeline.folder / "program.py"
    error = test_pipeline.error("submit", target, "--start", "edge", "--end", "cloud", "--id", "test", code=6)
    assert error.startswith("Error: a pipeline 'test' exists already")


def test_what_is_refused(nomad: Nomad) -> None:
    target = nomad.file(PROGRAM)
    assert "'moon' is unknown" in nomad.error("submit", target, "--start", "edge", "--end", "moon", code=7)
    assert "can't be the id" in nomad.error("submit", target, "--start", "a", "--end", "b", "--id", "a b", code=7)
    empty = nomad.file("operators = []", "empty.py")
    assert "the list of operators is empty" in nomad.error("submit", empty, "--start", "a", "--end", "b", code=7)
    broken = nomad.file("not a bundle", "some.bundle")
    assert "Error:" in nomad.error("submit", broken, "--start", "edge", "--end", "cloud", code=7)
    assert nomad.master.pipelines() == []


def test_the_empty_id_is_refused_as_any_that_isnt_valid(nomad: Nomad) -> None:
    submit = ("submit", nomad.file(PROGRAM), "--start", "edge", "--end", "cloud", "--id")
    said = nomad.error(*submit, "a/b", code=7).replace("'a/b'", "''")
    assert said.startswith("Error: '' can't be the id of a pipeline: it takes 1 to 63 letters")
    for command in (
        submit,
        ("show",),
        ("stop",),
        ("rm",),
        ("logs",),
        ("moves",),
        ("explain",),
        ("export",),
    ):
        assert nomad.error(*command, "", code=7) == said
    for command in (("tail", "", "square"), ("set-aside", "", "square"), ("move", "", "square", "edge")):
        assert nomad.error(*command, code=7) == said
    assert nomad.master.pipelines() == []


def test_wrong_usage(nomad: Nomad) -> None:
    target = nomad.file(PROGRAM)
    assert "--start and --end NODE" in nomad.error("submit", target, code=2)
    assert "--end NODE" in nomad.error("submit", target, "--start", "edge", code=2)
    assert "say what to change" in nomad.error("link", "set", "edge", "cloud", code=2)
    assert "'80lightyears' must be a number of seconds" in nomad.error(
        "link", "set", "edge", "cloud", "--latency", "80lightyears", code=2
    )
    assert "exclude each other" in nomad.error("set-aside", "x", "y", "--rerun", "--drop", code=2)
    assert "No such command" in nomad.error("launch", code=2)
    assert "must look like http" in nomad.error("ls", "--master", "localhost:1", code=2)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--latency", "-5ms", "must be from 0 to 1h"),
        ("--latency", "61m", "must be from 0 to 1h"),
        ("--latency", "5parsecs", "must be a number of seconds"),
        ("--jitter", "-1", "must be from 0 to 1h"),
        ("--bandwidth", "0", "must be at least 8bit (a byte a second) and at most 8000Tbit, or `unlimited`"),
        ("--bandwidth", "8001Tbit", "must be at least 8bit"),
        ("--bandwidth", "5MBit/h", "must be a number of bytes per second"),
        ("--loss", "1", "must be a share from 0 to below 1, e.g. 0.01"),
        ("--loss", "120%", "must be a share from 0 to below 1, e.g. 0.01"),
        ("--loss", "-0.1", "must be a share from 0 to below 1, e.g. 0.01"),
        ("--loss", "nan", "must be a share from 0 to below 1, e.g. 0.01"),
    ],
)
def test_what_a_link_cant_be(nomad: Nomad, option: str, value: str, said: str) -> None:
    error = nomad.error("link", "set", "edge", "cloud", option, value, code=2)
    assert f"Error: Invalid value for '{option}': {value!r} {said}" in error


@pytest.mark.parametrize("value", ["8bit", "8000Tbit", "unlimited"])
def test_bounds_of_a_link_are_those_of_rest(nomad: Nomad, value: str) -> None:
    for delay in ("0", "1h"):
        nomad("link", "set", "edge", "cloud", "--latency", delay, "--jitter", "0", "--bandwidth", value, "--loss", "0")


def test_warnings_are_one_line(nomad: Nomad, own_credentials: Path) -> None:
    own_credentials.chmod(0o644)
    result = nomad("ls")
    assert result.stderr == f"Warning: {own_credentials} can be read by other users of this machine: " + (
        f"run `chmod 600 {own_credentials}`\n"
    )


# -- submit, bundle


def test_submit(nomad: Nomad) -> None:
    target = nomad.file(PROGRAM)
    text = nomad.out("submit", target, "--start", "edge", "--end", "cloud", "--id", "test")
    assert text.splitlines()[0] == "Pipeline test: numbers@edge -> square@cloud"
    assert "nomad show test" in text
    made = nomad.json("submit", target, "--start", "edge", "--end", "cloud")
    assert made["id"] != "test"
    assert made["operators"][0]["name"] == "numbers"


def test_submit_and_watch(nomad: Nomad) -> None:
    nomad.master.happen("pipeline.submitted", "an earlier pipeline of this name", "test")

    async def run(master: FakeMaster) -> None:
        await until(lambda: bool(master.pipelines()) and len(master._happened) == 1)
        master.happen("operator.restarting", "square died", "test")
        master.finish("test", *outcome)

    target = nomad.file(PROGRAM)
    watch = ("submit", target, "--start", "edge", "--end", "cloud", "--id", "test", "--watch")
    outcome: tuple[Phase, str] = (Phase.COMPLETED, "")
    with nomad.meanwhile(run):
        lines = nomad.out(*watch).splitlines()
    assert lines[0].startswith("Pipeline test: ")
    assert lines[-1] == "Pipeline test is completed"
    assert any(line.endswith("square died") for line in lines)
    assert not any("earlier" in line for line in lines)
    nomad("rm", "test")
    outcome = (Phase.FAILED, "square kept dying")
    with nomad.meanwhile(run):
        result = nomad(*watch, "--json", code=8)
    assert result.stderr == "Error: pipeline test failed: square kept dying\n"
    documents = [json.loads(line) for line in result.stdout.splitlines()]
    assert (documents[0]["phase"], documents[-1]["phase"]) == ("running", "failed")
    assert all("kind" in event for event in documents[1:-1])


def test_bundle(nomad: Nomad) -> None:
    target, made = nomad.file(PROGRAM), nomad.folder / "program.bundle"
    text = nomad.out("bundle", target, "-o", made)
    assert text.startswith(f"{made}: {made.stat().st_size} bytes\n")
    assert f"POST {nomad.url}/api/v1/pipelines" in text
    assert nomad.json("bundle", target, "-o", made) == {"file": str(made), "bytes": made.stat().st_size}
    assert CliRunner().invoke(cli, ["bundle", str(target), "-o", "-"]).stdout_bytes == made.read_bytes()
    assert nomad.json("submit", made, "--start", "edge", "--end", "fog", "--id", "b")["id"] == "b"


def test_a_bundle_that_cant_be_written(nomad: Nomad) -> None:
    error = nomad.error("bundle", nomad.file(PROGRAM), "-o", nomad.folder / "no" / "folder", code=2)
    assert error == f"Error: can't write {nomad.folder / 'no' / 'folder'}: No such file or directory"


def test_a_bundle_needs_the_signing_key(nomad: Nomad) -> None:
    credentials.credentials_path().unlink()
    error = nomad.error("bundle", nomad.file(PROGRAM), "-o", nomad.folder / "x", code=4)
    assert "NOMAD_SIGNING_KEY" in error


# -- what runs


def test_ls(test_pipeline: Nomad) -> None:
    lines = test_pipeline.out("ls").splitlines()
    assert lines[0].split()[:3] == ["PIPELINE", "PHASE", "OPERATORS"]
    assert "numbers@edge -> square@cloud" in lines[1]
    assert [view["id"] for view in test_pipeline.json("ls")] == ["test"]


def test_show(test_pipeline: Nomad) -> None:
    text = test_pipeline.out("show", "test")
    assert text.startswith("test: running, submitted ")
    assert "square is on cloud: it was asked for" in text
    assert test_pipeline.json("show", "test")["phase"] == "running"


def test_nodes_and_links(nomad: Nomad) -> None:
    assert "edge" in nomad.out("nodes")
    assert [node["id"] for node in nomad.json("nodes")] == ["edge", "fog", "cloud"]
    text = nomad.out("link", "set", "edge", "cloud", "--latency", "80ms", "--bandwidth", "10Mbit", "--loss", "0.01")
    assert text.splitlines()[1].split() == ["edge", "cloud", "80", "ms", "0", "10", "Mbit/s", "0.01", "-", "-"]
    changed = nomad.json("link", "set", "edge", "cloud", "--jitter", "5ms", "--bandwidth", "unlimited", "--both")
    assert [(link["source"], link["jitter"], link["bandwidth"]) for link in changed] == [
        ("edge", 0.005, None),
        ("cloud", 0.005, None),
    ]
    assert changed[0]["latency"] == 0.08
    assert len(nomad.json("links")) == 6


def test_events(test_pipeline: Nomad) -> None:
    test_pipeline.master.happen("link.changed", "edge to cloud")
    assert "pipeline test was submitted" in test_pipeline.out("events")
    assert "edge to cloud" not in test_pipeline.out("events", "test")
    lines = test_pipeline("events", "--json").stdout.splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["pipeline.submitted", "link.changed"]
    assert "link.changed" in test_pipeline.out("events", "-n", "1")


def test_events_of_operators_say_whose_where_several_pipelines_are_shown(test_pipeline: Nomad) -> None:
    test_pipeline.master.happen("operator.ready", "square is at work", "test", "square")
    assert test_pipeline.out("events", "-n", "1").endswith("operator.ready           test: square is at work\n")
    assert test_pipeline.out("events", "test", "-n", "1").endswith("operator.ready           square is at work\n")


def test_logs(test_pipeline: Nomad) -> None:
    test_pipeline.master.print("test", "numbers", "hello")
    test_pipeline.master.print("test", "square", "world")
    assert test_pipeline.out("logs", "test") == "numbers | hello\nsquare  | world\n"
    assert test_pipeline.out("logs", "test", "square") == "world\n"
    lines = test_pipeline("logs", "test", "-n", "1", "--json").stdout.splitlines()
    assert [json.loads(line)["line"] for line in lines] == ["world"]


def test_logs_are_followed(test_pipeline: Nomad) -> None:
    test_pipeline.master.print("test", "square", "before")

    async def go_on(master: FakeMaster) -> None:
        await until(lambda: len(master._follow["test"]) == 1)
        master.print("test", "square", "after")
        master.finish("test")

    with test_pipeline.meanwhile(go_on):
        assert test_pipeline.out("logs", "test", "square", "-f") == "before\nafter\n"


def test_tail(test_pipeline: Nomad) -> None:
    async def put_out(master: FakeMaster) -> None:
        await until(lambda: master.readers("test", "square") == 1)
        master.emit("test", "square", {"name": "Jürgen", "data": b"x"})
        master.emit("test", "square", 16, skipped=2)
        master.finish("test")

    with test_pipeline.meanwhile(put_out):
        result = test_pipeline("tail", "test", "square")
    assert result.stdout == '{"name": "Jürgen", "data": {"$bytes": "eA=="}}\n16\n'
    assert result.stderr.startswith("(2 left out")


def test_tail_of_a_silent_operator_says_so(test_pipeline: Nomad, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    echo = click.echo

    def noted(text: str, **options: Any) -> None:
        said.append(text)
        echo(text, **options)

    async def put_out(master: FakeMaster) -> None:
        await until(lambda: bool(said))
        master.emit("test", "square", 4)
        master.finish("test")

    monkeypatch.setattr("nomad.cli.pipelines.QUIET_SECONDS", 0.0)
    monkeypatch.setattr(click, "echo", noted)
    with test_pipeline.meanwhile(put_out):
        result = test_pipeline("tail", "test", "square")
    assert result.stderr == "(square has put out nothing yet. What it prints is in `nomad logs test square`.)\n"
    assert result.stdout == "4\n"


def test_tail_ends_after_as_many_as_asked(test_pipeline: Nomad) -> None:
    async def put_out(master: FakeMaster) -> None:
        await until(lambda: master.readers("test", "square") == 1)
        for n in range(5):
            master.emit("test", "square", n)

    with test_pipeline.meanwhile(put_out):
        assert test_pipeline.out("tail", "test", "square", "-n", "2", "--json") == "0\n1\n"


def test_set_aside(test_pipeline: Nomad) -> None:
    assert "No message" in test_pipeline.out("set-aside", "test", "square")
    numbers = [test_pipeline.master.put_aside("test", "square", n) for n in range(3)]
    text = test_pipeline.out("set-aside", "test", "square", "--traceback")
    assert "ValueError: no good" in text
    assert "Traceback ..." in text
    assert [record["value"] for record in test_pipeline.json("set-aside", "test", "square")] == [0, 1, 2]
    one = ("set-aside", "test", "square", "--message", numbers[0])
    assert [record["value"] for record in test_pipeline.json(*one)] == [0]
    assert test_pipeline.out(*one, "--rerun") == "1 run again, 0 of them failed again\n"
    assert test_pipeline.json("set-aside", "test", "square", "--drop") == {"dropped": 2}


def test_move(test_pipeline: Nomad) -> None:
    async def end(master: FakeMaster) -> None:
        await until(lambda: len(master._happened) == 1 and len(master.moves("test")) == count)
        master.end_move("test", *outcome)

    count, outcome = 1, (MoveState.DONE, "")
    with test_pipeline.meanwhile(end):
        text = test_pipeline.out("move", "test", "square", "fog")
    assert text == "square: cloud -> fog, done; pause 12 ms, 0 lost, 0 doubled\n"
    assert "nomad moves test" in test_pipeline.out("move", "test", "square", "edge", "--no-wait")
    count, outcome = 3, (MoveState.ROLLED_BACK, "the target is lost")
    with test_pipeline.meanwhile(end):
        result = test_pipeline("move", "test", "square", "fog", code=8)
    assert result.stderr == "Error: square stays on cloud: the target is lost\n"
    table = test_pipeline.out("moves", "test")
    assert [line.split()[3] for line in table.splitlines()[1:]] == ["done", "planned", "rolled_back"]
    assert [move["pause"] for move in test_pipeline.json("moves", "test")] == [0.012, None, None]
    assert "no operator 'cube'" in test_pipeline.error("move", "test", "cube", "fog", code=5)


def test_replace(test_pipeline: Nomad) -> None:
    async def end(master: FakeMaster) -> None:
        await until(lambda: len(master.moves("test")) == count)
        master.end_move("test", *outcome)

    count, outcome = 1, (MoveState.DONE, "")
    with test_pipeline.meanwhile(end):
        text = test_pipeline.out("move", "test", "square", "--replace")
    assert text == "square: replaced on cloud, done; pause 12 ms, 0 lost, 0 doubled\n"
    count, outcome = 2, (MoveState.ROLLED_BACK, "the target is lost")
    with test_pipeline.meanwhile(end):
        result = test_pipeline("move", "test", "square", "--replace", code=8)
    assert result.stderr == "Error: square stays the instance that it was: the target is lost\n"
    for words in (("square",), ("square", "fog", "--replace")):
        assert "Say either where it is to go, or --replace" in test_pipeline.error("move", "test", *words, code=2)


def test_pins_and_no_moves(nomad: Nomad) -> None:
    target = nomad.file(PROGRAM)
    ends = ("--start", "edge", "--end", "cloud")
    made = nomad.json("submit", target, *ends, "--no-moves", "--pin", "square=cloud")
    assert not made["moves"]
    assert made["operators"][1]["pin"] == "cloud"
    for pins, said in (
        (("--pin", "square"), "'square' is not OPERATOR=NODE"),
        (("--pin", "square=edge", "--pin", "square=fog"), "'square' can't be on edge and on fog"),
    ):
        assert said in nomad("submit", target, *ends, *pins, code=2).stderr


def test_nodes_are_lost_and_restored(nomad: Nomad) -> None:
    assert "fails" in nomad.out("node", "lose", "fog")
    assert [line.split()[1] for line in nomad.out("nodes").splitlines()[1:]] == ["ready", "lost", "ready"]
    assert nomad.json("node", "restore", "fog")["ready"]


def test_stop_and_rm(test_pipeline: Nomad) -> None:
    assert test_pipeline.out("stop", "test") == "Pipeline test is stopped.\n"
    assert test_pipeline.out("rm", "test") == "Pipeline test is removed.\n"
    assert test_pipeline.json("ls") == []


def test_ctrl_c_ends_what_follows_quietly(test_pipeline: Nomad) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "nomad", "events", "-f"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert "submitted" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (130, "")


# -- numbers for people


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (common.duration(None), "-"),
        (common.duration(0.0), "0"),
        (common.duration(1.5e-6), "1.5 µs"),
        (common.duration(0.08), "80 ms"),
        (common.duration(1234.5), "1234 s"),
        (common.duration(12.34), "12.3 s"),
        (common.size(None), "-"),
        (common.size(12), "12 B"),
        (common.size(12 << 20), "12.0 MiB"),
        (common.size(3 << 40), "3072.0 GiB"),
        (common.rate(None), "unlimited"),
        (common.rate(1.25e6), "10 Mbit/s"),
        (common.rate(1.25e9), "10 Gbit/s"),
        (common.rate(10), "80 bit/s"),
    ],
)
def test_numbers_for_people(shown: str, text: str) -> None:
    assert shown == text
