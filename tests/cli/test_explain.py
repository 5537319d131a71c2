"""`nomad explain` shows what the master says of a placement."""

from __future__ import annotations

import json

import pytest

from nomad import scheduler
from tests.cli.conftest import Nomad
from tests.cli.test_commands import PROGRAM


@pytest.fixture
def running(nomad: Nomad) -> Nomad:
    """With the pipeline `p`."""
    nomad("submit", nomad.file(PROGRAM), "--id", "p", "--start", "edge", "--end", "cloud")
    return nomad


def test_explain(running: Nomad) -> None:
    shown = running.out("explain", "p")
    assert "on cloud the latency would be 30 ms, 15 ms more" in shown
    assert "Latency 15 ms predicted, 20 ms measured, at 10 messages per second." in shown
    assert "it keeps up with 0.5 of that rate only" in shown
    assert "(interval): no move makes 15 ms less." in shown
    assert "12 moves left this hour." in shown
    assert running.json("explain", "p")["considered"]["move"] is None
    assert "there is no pipeline 'x'" in running.error("explain", "x", code=5)


def test_a_recorded_problem_can_be_planned(running: Nomad) -> None:
    assert scheduler.plan(json.loads(running.out("explain", "p", "--problem")))["feasible"]
