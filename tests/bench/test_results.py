"""Percentiles, gaps, what a sink's numbers say, the table, and the plots."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nomad.bench import plots, results, synthetic
from nomad.bench.results import Happened, Moved, Results, Run
from nomad.bench.synthetic import Outcome, judge
from nomad.bench.timeline import Phase
from nomad.errors import ScenarioError

values = st.lists(st.floats(0, 1e3), min_size=1, max_size=200)


@given(values, st.floats(0.01, 1))
def test_a_percentile_is_a_value_that_at_least_so_many_are_not_above(found: list[float], share: float) -> None:
    limit = results.percentile(found, share)
    assert limit in found
    assert sum(value <= limit for value in found) >= share * len(found)
    assert sum(value < limit for value in found) < share * len(found)


def test_nothing_has_no_percentile() -> None:
    assert results.percentile([], 0.5) is None
    assert results.figures(Run("p", 0, 1), Phase("all", 0, 9)) == results.Figures("all", 0)


def test_figures_are_of_one_phase() -> None:
    run = Run("p", 0, 1, times=[1, 2, 3, 4], latencies=[10, 0.1, 0.3, 20])
    found = results.figures(run, Phase("middle", 2, 4))
    assert (found.count, found.mean, found.p50, found.p99, found.max) == (2, 0.2, 0.1, 0.3, 0.3)


@given(st.floats(0.001, 0.01), st.floats(0.0, 0.5))
def test_a_gap_is_what_exceeds_the_usual_one(usual: float, extra: float) -> None:
    before = [2 - k * usual for k in range(1, 100)][::-1]
    after = [2 + extra + k * usual for k in range(100)]
    assert results.gap(before + after, 2.0, 3.0) == pytest.approx(extra, abs=1e-9)


def test_a_gap_of_too_little_is_unknown() -> None:
    assert results.gap([], 1, 2) is None
    assert results.gap([0.5, 0.6], 1, 2) is None


@given(st.lists(st.integers(0, 60), max_size=80), st.integers(0, 60))
def test_numbers_are_judged(numbers: list[int], sent: int) -> None:
    found = judge(numbers, sent)
    expected = set(range(max([sent, *(number + 1 for number in numbers)])))
    assert found.arrived == len(numbers)
    assert found.lost == len(expected - set(numbers))
    assert found.doubled == len(numbers) - len(set(numbers))


@pytest.mark.parametrize(
    ("numbers", "sent", "lost", "doubled", "disorder"),
    [
        ([0, 1, 2], 3, 0, 0, 0),
        ([0, 1, 2], 4, 1, 0, 0),
        ([0, 2, 1, 3], 4, 0, 0, 1),
        ([0, 1, 1, 0, 2], 3, 0, 2, 0),
        ([], 0, 0, 0, 0),
        ([], 2, 2, 0, 0),
    ],
)
def test_cases_of_numbers(numbers: list[int], sent: int, lost: int, doubled: int, disorder: int) -> None:
    assert judge(numbers, sent) == Outcome(sent, len(numbers), lost, doubled, disorder)


def test_knobs_change_what_is_given(tmp_path: Path) -> None:
    synthetic.turn(tmp_path, rate=5.0, work={"x": 1.0, "y": 2.0})
    knobs = synthetic.Knobs(tmp_path)
    assert knobs.read() == {"rate": 5.0, "work": {"x": 1.0, "y": 2.0}}
    synthetic.turn(tmp_path, work={"y": 3.0})
    assert synthetic.Knobs(tmp_path).read() == {"rate": 5.0, "work": {"x": 1.0, "y": 3.0}}


def test_the_synthetic_operators_keep_numbers_and_sizes(tmp_path: Path) -> None:
    synthetic.turn(tmp_path, rate=1e6, work={"x": 0.001})
    source = synthetic.Source(tmp_path, 100)()
    work = synthetic.Work(tmp_path, "x", 50)
    sink = synthetic.Sink(tmp_path)
    for message in [next(source) for _ in range(3)]:
        assert len(message) == 100
        result = work(message)
        assert len(result) == 50
        sink(result)
    assert [arrival.number for arrival in synthetic.arrivals(tmp_path)] == [0, 1, 2]
    assert all(arrival.arrived - arrival.made >= 0.001 for arrival in synthetic.arrivals(tmp_path))
    assert synthetic.outcome(tmp_path) == Outcome(3, 3, 0, 0, 0)
    next(source)  # sent, and under way for ever
    assert synthetic.outcome(tmp_path).lost == 1
    assert synthetic.outcome(tmp_path, drained=False).lost == 0
    source.close()


def test_a_seed_makes_the_same_random_arrivals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synthetic.turn(tmp_path, rate=1000.0)
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(synthetic.time, "monotonic", lambda: now)
    monkeypatch.setattr(synthetic.time, "sleep", sleep)

    def gaps(seed: int | None) -> list[float]:
        source, found = synthetic.Source(tmp_path, 24, seed)(), []
        next(source)
        for _ in range(500):
            before = now
            next(source)
            found.append(round(now - before, 9))
        source.close()
        return found

    assert set(gaps(None)) == {0.001}
    first = gaps(1)
    assert sum(first) == pytest.approx(0.5, rel=0.2)
    assert first == pytest.approx(gaps(1), abs=1e-8)
    assert first != pytest.approx(gaps(2), abs=1e-8)


def some_results() -> Results:
    move = Moved(
        "x", "a", "b", "drift", "it pays", "done", 4.0, 5.0, [{"name": "starting", "seconds": 1.0}], 0.01, 0, 0
    )
    times = [k / 10 for k in range(100)]
    step = Happened(3.0, "step", "a <-> b 50 ms", data={"event": 0})
    runs = [
        Run(policy, repeat, 1, times=times, latencies=[0.01 * (1 + repeat)] * 100, happened=[step],
            moves=[move] if policy == "nomad" else [], outcome=Outcome(100, 100, 0, 0, 0))
        for repeat in range(2) for policy in ("all-edge", "nomad")
    ]  # fmt: skip
    runs.append(Run("all-cloud", 0, 1, error="there is no placement"))
    phases = [Phase("before", 1, 3), Phase("after", 5, 10)]
    return Results("s", "0" * 64, "about", "shaping", 10.0, phases, {"cpu": "c"}, runs)


def test_the_table() -> None:
    rows = list(results.rows(some_results()))
    assert [(row.phase, row.policy, row.count) for row in rows] == [
        ("before", "all-edge", 40), ("before", "nomad", 40), ("after", "all-edge", 100), ("after", "nomad", 100),
    ]  # fmt: skip
    assert rows[0].p50 == pytest.approx(0.015)
    assert (rows[0].moves, rows[2].moves, rows[3].moves, rows[3].lost) == (None, 0, 2, 0)


def test_the_file(tmp_path: Path) -> None:
    results.write(some_results(), tmp_path / "new" / "results.json")
    data = json.loads((tmp_path / "new" / "results.json").read_text())
    assert data["scenario"]["name"] == "s"
    assert data["machine"] == {"cpu": "c"}
    nomad = data["runs"][1]
    assert nomad["moves"][0]["phases"] == [{"name": "starting", "seconds": 1.0}]
    assert [item["count"] for item in nomad["figures"]] == [20, 50]
    assert not any(math.isnan(value) for value in nomad["latencies"])


def test_plots(tmp_path: Path) -> None:
    first, second = plots.draw(some_results(), tmp_path)
    assert (first.name, second.name) == ("latency.svg", "latency-2.svg")
    text = "".join(ElementTree.parse(first).getroot().itertext())
    for words in ("nomad", "all-edge", "a <-> b 50 ms", "x to b", "seconds"):
        assert words in text
    (png, _) = plots.draw(some_results(), tmp_path, form="png")
    assert png.read_bytes().startswith(b"\x89PNG")


def test_plots_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import builtins

    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert not plots.available()
    with pytest.raises(ScenarioError, match="pip install '\\.\\[bench\\]'"):
        plots.draw(some_results(), tmp_path)
