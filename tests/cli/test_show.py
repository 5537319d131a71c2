"""What `nomad show` says of what an operator asks for, and how it writes numbers."""

from __future__ import annotations

from dataclasses import replace

from nomad.master.views import EstimateView, OperatorEstimatesView, OperatorView, StatsView
from tests.cli.conftest import Nomad

PROGRAM = "operators = [dict, print]"


def asking(operator: OperatorView) -> OperatorView:
    return replace(
        operator,
        image="my/own",
        requirements=["numpy==2.1"],
        environment={"MODE": "hidden"},
        secrets={"PASSWORD": "db/password"},
        devices={"camera": 1, "nvidia.com/gpu": 2},
    )


def test_what_an_operator_asks_for(nomad: Nomad) -> None:
    nomad("submit", nomad.file(PROGRAM), "--start", "edge", "--end", "cloud", "--id", "test")
    assert "asks for" not in nomad.out("show", "test")
    pipelines = nomad.master._pipelines
    pipelines["test"] = replace(pipelines["test"], operators=[asking(view) for view in pipelines["test"].operators])
    text = nomad.out("show", "test")
    assert (
        "it asks for the image my/own, numpy==2.1, MODE set, PASSWORD from the secret db/password, camera, 2 " in text
    )
    assert "hidden" not in text


def test_numbers_have_no_exponents(nomad: Nomad) -> None:
    nomad("submit", nomad.file(PROGRAM), "--start", "edge", "--end", "cloud", "--id", "test")
    pipelines = nomad.master._pipelines
    many = EstimateView(2588.3, 12.34, 0.0, 5, True)
    known = OperatorEstimatesView(arrival=many, departure=many, queue=many, selectivity=many)
    pipelines["test"] = replace(
        pipelines["test"],
        operators=[
            replace(view, stats=StatsView(rate=2588.3), estimates=known) for view in pipelines["test"].operators
        ],
    )
    text = nomad.out("show", "test")
    assert text.count(" 2588/s ") == 2 + 4
    assert text.count(" 2588/s ± 12.3/s ") == 4
    assert text.count(" 2588 ± 12.3 ") == 4
    assert "e+" not in text
