"""docs/interfaces.md says what there is: no endpoint and no exit code more or fewer."""

from __future__ import annotations

import re
from pathlib import Path

from nomad.cli.main import EXIT_CODES
from nomad.master.rest import api

TEXT = (Path(__file__).parents[2] / "docs" / "interfaces.md").read_text()


def test_endpoints() -> None:
    rows = re.findall(r"^\| ((?:`[A-Z]+` ?)+)\| `([^`]+)` \|", TEXT, re.MULTILINE)
    described = {(method, path) for methods, path in rows for method in re.findall("[A-Z]+", methods)}
    known = {(operation.method, operation.path) for operation in api.api.operations + api.health.operations}
    assert described == known | {("GET", "/openapi.json")}


def test_exit_codes() -> None:
    assert EXIT_CODES.removeprefix("\b\n").strip() in TEXT
