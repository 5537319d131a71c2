"""The transport's shaping against real packets: one scenario file, run with both. As root only."""

from __future__ import annotations

from pathlib import Path

import pytest

from nomad.bench import scenario
from nomad.bench.runner import Plan, run_all

SCENARIO = Path(__file__).parents[3] / "benchmarks/scenarios/real_packets.yaml"
LATENCIES = (0.025, 0.085, 0.025)
"""Of the two links together, in the scenario's phases."""


async def medians(links: str) -> list[float]:
    """Per phase what the sink saw, in seconds."""
    form = (loaded := scenario.load(SCENARIO)).form
    results = await run_all(Plan(loaded, form.policies, repeats=1, seeds=[1], duration=form.duration, links=links))
    (run,) = results.runs
    assert not run.error
    assert run.outcome is not None
    assert (run.outcome.lost, run.outcome.doubled, run.outcome.disorder) == (0, 0, 0)
    return [figures.p50 for figures in results.figures(run) if figures.p50 is not None]


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_medians_are_the_same(host: None) -> None:
    """Within 10 %, before and after each of the scenario's changes of a link.

    They take turns, and of each phase the run counts that other things on the machine disturbed least.
    """
    found: dict[str, list[list[float]]] = {"tun": [], "shaping": []}
    for _ in range(2):
        for links, runs in found.items():
            runs.append(await medians(links))
    real, shaped = ([min(phase) for phase in zip(*runs, strict=True)] for runs in found.values())
    for latency, theirs, ours in zip(LATENCIES, real, shaped, strict=True):
        assert min(ours, theirs) >= latency
        assert ours == pytest.approx(theirs, rel=0.1)
