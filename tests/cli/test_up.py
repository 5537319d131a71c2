"""`nomad up` as a process: what it says, what it refuses before anything is started, and how it ends."""

from __future__ import annotations

import json
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner

import nomad
from nomad.cli.main import cli
from nomad.cli.up import TRANSPORTS
from nomad.errors import MasterUnreachable
from nomad.settings import POD_TRANSPORTS

NOMAD = (sys.executable, "-P", "-m", "nomad")
PROGRAM = """
import nomad
NOMAD_MASTER = {master!r}
def write_to_file(x):
    with open({output!r}, 'a') as f:
        f.write(str(x) + "\\n")
def square(x):
    return x*x
def source():
    import random
    return random.randint(0,10)
operators = [source, square, write_to_file]
start_node = "my_edge_device"
end_node = "my_cloud_VM"
pipeline_id = 'test'
nomad.submit_pipeline(operators, start_node, end_node, pipeline_id, connection_str = NOMAD_MASTER)
"""
TWO_NODES = ("--node", "my_edge_device", "--node", "my_cloud_VM")


@contextmanager
def up(*args: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A cluster, and what it said when it was ready. Ended with SIGINT unless the block did."""
    command = (*NOMAD, "up", "--port", "0", "--json", *(args or TWO_NODES))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            yield process, json.loads(line)
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=30)


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it didn't happen"
        time.sleep(0.02)


# -- as a process


def test_the_program_of_the_readme_now_and_after_a_restart(state: Path, own_credentials: Path, tmp_path: Path) -> None:
    """The program is unmodified but for the port and the file, and runs in a process of its own."""
    output, program = tmp_path / "output.txt", tmp_path / "program.py"
    with up() as (process, ready):
        assert ready["nodes"] == ["my_edge_device", "my_cloud_VM"]
        program.write_text(PROGRAM.format(master=ready["url"], output=str(output)))
        subprocess.run([sys.executable, str(program)], check=True, timeout=30)
        until(lambda: output.exists() and len(output.read_text().splitlines()) >= 2)
        assert {int(line) for line in output.read_text().splitlines()} <= {n * n for n in range(11)}
        until(lambda: nomad.get_last_output("test.square", ready["url"]) is not None)
        pods = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        assert len(pods) >= 3
        assert state.stat().st_mode & 0o077 == 0
        assert own_credentials.stat().st_mode & 0o777 == 0o600
    assert process.returncode == 0
    assert not [pid for pid in pods if psutil.pid_exists(pid)]
    with pytest.raises(MasterUnreachable):
        nomad.get_nodes(ready["url"])
    output.unlink()
    with up() as (_, ready):
        until(output.exists)
        assert nomad.get_pipeline_profiling("test", ready["url"])
        error = refused("--port", "0", *TWO_NODES)
        assert str(state) in error
        assert "another master" in error


def test_files_beside_it_are_no_modules_of_operators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`nomad up` in a folder with a queue.py: operators' processes take the standard library's."""
    output, folder = tmp_path / "output.txt", tmp_path / "folder"
    folder.mkdir()
    (folder / "queue.py").write_text("raise SystemExit('this is no queue')\n")
    monkeypatch.chdir(folder)
    with up() as (_, ready):
        program = tmp_path / "program.py"
        program.write_text(PROGRAM.format(master=ready["url"], output=str(output)))
        subprocess.run([sys.executable, str(program)], check=True, timeout=30)
        until(output.exists)


def test_what_people_see(tmp_path: Path) -> None:
    """With a topology, and on all interfaces."""
    file = tmp_path / "cluster.yaml"
    file.write_text("nodes: {edge: {speed: 0.5}, cloud: {}}\nlinks: [{from: edge, to: cloud, latency: 20ms}]\n")
    command = (*NOMAD, "up", "--port", "0", "--host", "0.0.0.0", "--topology", str(file))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(5)]
        url = lines[0].split()[-1]
        assert url.startswith("http://127.0.0.1:")
        assert lines[1].split() == ["nodes:", "edge,", "cloud"]
        assert lines[3].split("nomad", 1)[1] == f" submit FILE --start edge --end cloud --master {url}\n"
        links = {(link["from"], link["to"]): link["latency"] for link in nomad.get_network_profiling(url)}
        assert links == {("edge", "cloud"): 0.02, ("cloud", "edge"): 0.02}
        process.send_signal(signal.SIGTERM)
        rest, error = process.communicate(timeout=30)
    assert rest.splitlines()[-1].startswith("Stopped. Pipelines are kept in ")
    assert process.returncode == 0
    assert error.startswith("Warning: this listens on 0.0.0.0: who reaches the port and has the token can run code")


def test_a_reader_that_goes_away_doesnt_end_it() -> None:
    with up() as (process, ready):
        assert process.stdout is not None
        process.stdout.close()
        for speed in (2.0, 3.0):
            nomad.update_node_profiling({"my_cloud_VM": {"C": speed}}, ready["url"])
        assert nomad.get_node_profiling(ready["url"])["my_cloud_VM"]["C"] == 3.0
        process.stdout = None


# -- what it refuses, before anything is started


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    path = tmp_path / "the state"
    monkeypatch.setenv("NOMAD_STATE_DIR", str(path))
    return path


def refused(*args: str, code: int = 7) -> str:
    """What `nomad up` says when it refuses to start."""
    result = CliRunner().invoke(cli, ["up", *args])
    assert (result.exit_code, result.stdout) == (code, ""), (result.output, result.exception)
    return result.stderr.strip()


def test_a_port_that_is_taken(state: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        error = refused("--port", port, *TWO_NODES, code=2)
    assert error == f"Error: port {port} of 127.0.0.1 is taken: is another `nomad up` running? " + (
        "Take another with --port (0 is any free one)"
    )
    assert not state.exists()


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "no.such.host.invalid"])
def test_a_host_that_isnt_here(state: Path, host: str) -> None:
    assert f"can't listen on '{host}': that is no address of this machine" in refused(
        "--host", host, *TWO_NODES, code=2
    )
    assert not state.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nodes: {a: {sped: 1}}", "line 1, nodes.a.sped: unknown key 'sped'; did you mean 'speed'?"),
        ("nodes: {a: {}, b: {}}\nlinks: [{from: a, to: b, latency: -1}]", "line 2, links.0.latency"),
        ("nodes: {a: {}}\nlinks: [{from: a, to: c}]", "leads to 'c', which is no node of this topology"),
        ("", 'must be a map with "nodes"'),
        ("nodes: [", "isn't valid YAML"),
    ],
)
def test_a_bad_topology(state: Path, tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    error = refused("--topology", str(file))
    assert error.startswith("Error: ")
    assert message in error
    assert not state.exists()


def test_no_topology_file(state: Path) -> None:
    assert "can't read the topology file nowhere.yaml" in refused("--topology", "nowhere.yaml")


@pytest.mark.parametrize(
    ("args", "message", "code"),
    [
        ((), "a cluster needs at least one node: `--node NAME` or `--topology FILE`", 7),
        (("--node", "a", "--node", "a"), "node 'a' is named twice", 7),
        (("--node", "a b"), "'a b' is no name for a node", 7),
        (("--node", "a", "--topology", "b"), "--node and --topology exclude each other", 2),
        (("--node", "a", "--port", "70000"), "70000 is not in the range 0<=x<=65535", 2),
        (("--node", "a", "--transport", "pigeon"), "'pigeon' is not one of", 2),
        (("--node", "a", "--state", ""), "Invalid value for '--state': the name of the folder is empty", 2),
    ],
)
def test_bad_options(state: Path, args: tuple[str, ...], message: str, code: int) -> None:
    assert message in refused(*args, code=code)
    assert not state.exists()


def test_the_options_know_all_transports() -> None:
    assert TRANSPORTS == POD_TRANSPORTS


def test_a_bad_environment(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOMAD_TRANSPORT", "pigeon")
    assert "NOMAD_TRANSPORT must be one of" in refused(*TWO_NODES, code=2)
    assert not state.exists()


def test_a_state_folder_that_cant_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    error = refused("--state", str(tmp_path / "file" / "state"), "--port", "0", *TWO_NODES)
    assert error.startswith("Error: ")
    assert str(tmp_path / "file" / "state") in error


def test_a_state_folder_from_a_newer_version(state: Path) -> None:
    state.mkdir(mode=0o700)
    with closing(sqlite3.connect(state / "nomad.db")) as database:
        database.execute("PRAGMA user_version = 9999")
    error = refused("--port", "0", *TWO_NODES)
    assert "newer" in error
    assert str(state) in error


def test_a_signing_key_that_is_none(state: Path) -> None:
    state.mkdir(mode=0o700)
    (state / "signing_key").write_text("no key")
    (state / "signing_key").chmod(0o640)
    warning, error = refused("--port", "0", *TWO_NODES).splitlines()
    path = state / "signing_key"
    assert warning == f"Warning: {path} can be read by other users of this machine: run `chmod 600 {path}`"
    assert error == f"Error: {path} must be 64 hex digits; delete it to have a new one made"


def test_ctrl_c_while_the_command_is_imported_shows_no_traceback() -> None:
    code = (
        "import builtins, os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from nomad.cli import main\n"
        "imported = builtins.__import__\n"
        "def interrupted(name, *args, **options):\n"
        "    if name == 'click':\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return imported(name, *args, **options)\n"
        "builtins.__import__ = interrupted\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == -signal.SIGINT
    assert done.stderr == ""
