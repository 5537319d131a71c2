"""`nomad master` and `nomad login`, as far as they go without a cluster."""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from nomad import credentials
from nomad.cli.main import cli
from nomad.cli.master import _JsonLines
from nomad.master.kube.incluster import listens
from nomad.settings import Settings
from tests.cli.conftest import Nomad
from tests.master.facade import SIGNING_KEY, TOKEN


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No cluster, whatever the user has; what a process of its own may change is put back."""
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    handler, root = signal.getsignal(signal.SIGTERM), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    signal.signal(signal.SIGTERM, handler)
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "--images 3.11=IMAGE"),
        (["--images", "newest=image"], "isn't like 3.11="),
        (["--warm", "0", "--renew-seconds", "12.5"], "more than a second less"),
        (["--images", "3.11=operator:1", "--warm-python", "3.12"], "names those for 3.11"),
        (["--warm", "0", "--token-review"], "--allow-user"),
        (["--warm", "0", "--toleration", "everything"], "no JSON object"),
        (["--warm", "0", "--transport", "unix"], "'tls', 'tcp'"),
        (["--warm", "0", "--gather-from", "0"], "x>=1"),
        (["--warm", "0", "--storage-size", "abc"], "isn't like 1Gi"),
        (["--warm", "0", "--storage-size", "inf"], "isn't like 1Gi"),
        (["--warm", "0", "--pull-secret", "My_Secret"], "no name of a Secret"),
    ],
)
def test_what_cant_be_is_said(options: list[str], said: str) -> None:
    found = CliRunner().invoke(cli, ["master", *options])
    assert found.exit_code == 2
    assert said in found.output


@pytest.mark.parametrize(
    ("options", "variables"),
    [(["--pull-secret", "registry", "--pull-secret", "other"], {}), ([], {"NOMAD_PULL_SECRET": "registry other"})],
)
def test_secrets_for_registries(options: list[str], variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Settings] = []

    async def run(settings: Settings, *_: object) -> None:
        told.append(settings)

    monkeypatch.setattr("nomad.cli.master._run", run)
    found = CliRunner().invoke(cli, ["master", "--warm", "0", *options], env=variables)
    assert found.exit_code == 0, found.output
    assert told[0].kubernetes.pull_secrets == ("registry", "other")


@pytest.mark.parametrize("command", [["master", "--warm", "0", "--port", "0"], ["login", "--kubernetes"]])
def test_without_a_cluster(command: list[str]) -> None:
    found = CliRunner().invoke(cli, command)
    assert found.exit_code == 2
    assert found.output.count("there is no Kubernetes cluster to be reached") == 1


@pytest.mark.parametrize(("token", "code"), [(TOKEN, 0), ("another one's", 2)])
def test_a_login_at_another_master_keeps_what_is_known_of_it(
    nomad: Nomad, monkeypatch: pytest.MonkeyPatch, token: str, code: int
) -> None:
    """`nomad up` and a port-forward want the same port; the former's token isn't replaced by what it doesn't take."""

    async def secret(*_: object) -> tuple[str, bytes]:
        return token, bytes(32)

    monkeypatch.setattr("nomad.cli.master._secret", secret)
    said = nomad("login", "--kubernetes", "--url", nomad.url, code=code).output
    assert credentials.find(nomad.url).token == TOKEN
    if code:
        assert f"the master that answers at {nomad.url} is not the one in the namespace nomad" in said
        assert credentials.find(nomad.url).signing_key == SIGNING_KEY


def test_where_it_listens() -> None:
    assert listens("tls://nomad-master.nomad:30001") == "tls://0.0.0.0:30001"
    assert listens("tcp://10.0.0.1:4711") == "tcp://0.0.0.0:4711"


def test_a_log_for_programs() -> None:
    record = logging.makeLogRecord(
        {"name": "n", "levelname": "INFO", "msg": "it %s", "args": ("runs",), "created": 1.5}
    )
    assert json.loads(_JsonLines().format(record)) == {
        "time": 1.5,
        "level": "info",
        "logger": "n",
        "message": "it runs",
    }
