"""What runs gave: per run the latencies, events and moves; percentiles per phase; the whole as JSON and as a table.

Times are seconds since the run's beginning, latencies seconds from the source to the end of the last operator.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from nomad.bench.synthetic import Outcome
from nomad.bench.timeline import Phase

SHARES = (0.5, 0.9, 0.99)
STORED = 100_000
"""Latencies that are written down per run: of more, every second, third and so on. Figures are of all of them."""


@dataclass(frozen=True, slots=True)
class Happened:
    """Something at a moment."""

    at: float
    kind: str
    """Of the master's event, or "step" for what the scenario did."""
    message: str
    operator: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Moved:
    """One move of one operator, as the master counted it, and the gap that the sink saw."""

    operator: str
    source: str
    target: str
    cause: str
    reason: str
    state: str
    asked: float
    finished: float | None
    phases: Sequence[Mapping[str, Any]]
    pause: float | None
    lost: int | None
    doubled: int | None
    error: str = ""
    gap: float | None = None
    """The longest time between two arrivals meanwhile, less the usual one; where each arrival is known."""

    @property
    def switched(self) -> float | None:
        """When messages had gone over to the new place; what follows is the old one's end."""
        after = sum(phase["seconds"] for phase in self.phases if phase["name"] == "stopping")
        return None if self.finished is None else self.finished - after


@dataclass(frozen=True, slots=True)
class Sample:
    """How the pipeline stood at a moment, per operator."""

    at: float
    nodes: Mapping[str, str]
    queues: Mapping[str, int]
    """Messages that wait."""
    paused: Sequence[str]
    """Operators that wait for credits."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one policy."""

    policy: str
    repeat: int
    seed: int
    pins: Mapping[str, str] = field(default_factory=dict)
    placement: Mapping[str, str] = field(default_factory=dict)
    """At the beginning."""
    placement_after: Mapping[str, str] = field(default_factory=dict)
    times: Sequence[float] = ()
    latencies: Sequence[float] = ()
    """Of the messages that arrived at `times`."""
    happened: Sequence[Happened] = ()
    moves: Sequence[Moved] = ()
    samples: Sequence[Sample] = ()
    outcome: Outcome | None = None
    """Of a synthetic pipeline."""
    error: str = ""
    """Why there is nothing, or not all, of this run."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Latencies over one phase of a run; None where nothing arrived."""

    phase: str
    count: int
    mean: float | None = None
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    max: float | None = None


@dataclass(frozen=True, slots=True)
class Results:
    """All runs of a scenario."""

    scenario: str
    sha256: str
    about: str
    links: str
    """The backend."""
    duration: float
    phases: Sequence[Phase]
    machine: Mapping[str, Any]
    runs: Sequence[Run]

    def figures(self, run: Run) -> list[Figures]:
        """One for each phase."""
        return [figures(run, phase) for phase in self.phases]

    def of(self, policy: str) -> list[Run]:
        """Runs of one policy that gave something."""
        return [run for run in self.runs if run.policy == policy and not run.error]

    @property
    def policies(self) -> list[str]:
        """In the order in which they ran."""
        return list(dict.fromkeys(run.policy for run in self.runs))


def percentile(values: Sequence[float], share: float) -> float | None:
    """The least value that at least `share` of all are not above (nearest rank); None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def figures(run: Run, phase: Phase) -> Figures:
    """The run's latencies of messages that arrived in the phase."""
    found = [latency for at, latency in zip(run.times, run.latencies, strict=True) if phase.start <= at < phase.end]
    if not found:
        return Figures(phase.name, 0)
    p50, p90, p99 = (percentile(found, share) for share in SHARES)
    return Figures(phase.name, len(found), statistics.fmean(found), p50, p90, p99, max(found))


def gap(arrivals: Sequence[float], start: float, end: float) -> float | None:
    """By how much the longest time between two arrivals in a window exceeds the usual one (the median before it).

    Arrivals in order of time. None when there is too little to say.
    """
    before = [at for at in arrivals if start - 2.0 <= at < start]
    during = [at for at in arrivals if start <= at <= end]
    if len(before) < 3 or not during:
        return None
    usual = statistics.median(later - earlier for earlier, later in zip(before, before[1:], strict=False))
    all_of_it = [before[-1], *during]
    return max(0.0, max(b - a for a, b in zip(all_of_it, all_of_it[1:], strict=False)) - usual)


def document(results: Results) -> dict[str, Any]:
    """As JSON takes it."""
    runs = []
    for run in results.runs:
        every = max(1, math.ceil(len(run.times) / STORED))
        data = asdict(replace(run, times=(), latencies=()))
        data["every"] = every
        data["times"] = [round(value, 4) for value in run.times[::every]]
        data["latencies"] = [round(value, 6) for value in run.latencies[::every]]
        data["figures"] = [asdict(item) for item in results.figures(run)]
        runs.append(data)
    return {
        "scenario": {"name": results.scenario, "sha256": results.sha256, "about": results.about},
        "links": results.links,
        "duration": results.duration,
        "machine": dict(results.machine),
        "phases": [asdict(phase) for phase in results.phases],
        "runs": runs,
    }


def write(results: Results, path: Path) -> None:
    """`results.json`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(document(results)) + "\n", encoding="utf-8")
    beside.replace(path)


@dataclass(frozen=True, slots=True)
class Row:
    """A policy in a phase: medians over its runs, and counts added up."""

    phase: str
    policy: str
    count: int
    """Messages."""
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    moves: int | None = None
    lost: int | None = None
    doubled: int | None = None
    disorder: int | None = None


def rows(results: Results) -> Iterable[Row]:
    """The table: each phase's policies side by side, but those that gave nothing.

    What is counted over whole runs stands with the last phase.
    """
    for number, phase in enumerate(results.phases):
        for policy in results.policies:
            runs = results.of(policy)
            if not runs:
                continue
            taken = [figures(run, phase) for run in runs]
            row = Row(
                phase.name,
                policy,
                sum(item.count for item in taken),
                _middle(item.p50 for item in taken),
                _middle(item.p90 for item in taken),
                _middle(item.p99 for item in taken),
            )
            yield _with_totals(row, runs) if number == len(results.phases) - 1 else row


def _middle(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _with_totals(row: Row, runs: Sequence[Run]) -> Row:
    row = replace(row, moves=sum(move.state == "done" for run in runs for move in run.moves))
    outcomes = [run.outcome for run in runs if run.outcome is not None]
    if not outcomes:
        return row
    return replace(
        row,
        lost=sum(outcome.lost for outcome in outcomes),
        doubled=sum(outcome.doubled for outcome in outcomes),
        disorder=sum(outcome.disorder for outcome in outcomes),
    )
