"""Plots of a benchmark: latency over time per policy, with the scenario's events and the moves marked.

Needs matplotlib, the extra `bench`; nothing else of the harness does. One figure per repeat: each line is one run.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nomad.bench.results import Moved, Results, Run
from nomad.errors import ScenarioError

POINTS = 240
"""Along the time axis: each point is the median of the messages in its stretch, the band reaches from 10 to 90 %."""
COLOURS = {
    "nomad": "#0b6e4f",
    "all-edge": "#c8553d",
    "all-cloud": "#3d6fb5",
    "static-best": "#8a6fb0",
    "static-best-after": "#b09a6f",
}
OTHERS = ("#444444", "#d17a00", "#00838f", "#ad1457")


def available() -> bool:
    """Whether matplotlib is there."""
    try:
        import matplotlib as _  # noqa: F401 - whether it can be imported is the question
    except ModuleNotFoundError:
        return False
    return True


def draw(results: Results, folder: Path, *, form: str = "svg") -> list[Path]:
    """Write `latency.svg` (or .png), for further repeats `latency-2.svg` and so on; the files.

    Raises `ScenarioError` where matplotlib is missing.
    """
    try:
        import matplotlib as mpl
    except ModuleNotFoundError as exc:
        raise ScenarioError("plots need matplotlib: pip install '.[bench]'") from exc
    mpl.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    rounds = list(dict.fromkeys((run.repeat, run.seed) for run in results.runs))
    written = []
    for number, which in enumerate(rounds, 1):
        runs = [run for run in results.runs if (run.repeat, run.seed) == which and run.latencies]
        if runs:
            path = folder / (f"latency.{form}" if number == 1 else f"latency-{number}.{form}")
            _draw(results, runs, path)
            written.append(path)
    return written


def _draw(results: Results, runs: Sequence[Run], path: Path) -> None:
    import matplotlib as mpl
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    with mpl.rc_context({"svg.hashsalt": results.sha256, "font.size": 9, "svg.fonttype": "none"}):
        figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
        spare = iter(OTHERS)
        for run in runs:
            _line(axes, run, COLOURS.get(run.policy) or next(spare, "#777777"), results.duration)
        _events(axes, runs[0])
        _moves(axes, runs)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(0, results.duration)
        axes.set_xlabel("seconds")
        axes.set_ylabel("latency, ms (median; 10 to 90 %)")
        axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside upper left", frameon=False, ncols=len(runs))
        axes.set_title(results.about or results.scenario, loc="left", fontsize=9, color="#555555")
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)
        plt.close(figure)


def _line(axes: Any, run: Run, colour: str, duration: float) -> None:
    width = duration / POINTS
    stretches: dict[int, list[float]] = {}
    for at, latency in zip(run.times, run.latencies, strict=True):
        if 0 <= at < duration:
            stretches.setdefault(int(at / width), []).append(latency * 1e3)
    kept = sorted(stretches.items())
    x = [(number + 0.5) * width for number, _ in kept]
    axes.fill_between(
        x, [_share(v, 0.1) for _, v in kept], [_share(v, 0.9) for _, v in kept], color=colour, alpha=0.15, linewidth=0
    )
    emphasis = 1.8 if run.policy == "nomad" else 1.2
    axes.plot(x, [statistics.median(v) for _, v in kept], color=colour, linewidth=emphasis, label=run.policy)


def _share(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _events(axes: Any, run: Run) -> None:
    """A line where each of the scenario's events began."""
    seen: set[int] = set()
    last_at, level = float("-inf"), 0
    for item in run.happened:
        event = item.data.get("event")
        if item.kind != "step" or event is None or event in seen:
            continue
        seen.add(event)
        level = level + 1 if item.at - last_at < 0.5 else 0
        axes.axvline(item.at, color="#999999", linewidth=0.8, linestyle="--", zorder=1)
        axes.annotate(
            item.message,
            (item.at, 0.02 + 0.05 * level),
            xycoords=("data", "axes fraction"),
            xytext=(3, 0),
            textcoords="offset points",
            color="#555555",
            fontsize=8,
        )
        last_at = item.at


MANY_MOVES = 12
"""From so many on, moves get a mark without words."""


def _moves(axes: Any, runs: Sequence[Run]) -> None:
    """A triangle at the top where each move switched, in the policy's colour."""
    spare = iter(OTHERS)
    for run in runs:
        colour = COLOURS.get(run.policy) or next(spare, "#777777")
        done = [move for move in run.moves if move.finished is not None and move.state == "done"]
        for number, move in enumerate(done):
            axes.plot(
                [move.switched], [0.97], marker="v", color=colour, transform=axes.get_xaxis_transform(), clip_on=False
            )
            if len(done) < MANY_MOVES:
                _name(axes, move, colour, 0.955 - 0.05 * (number % 3))


def _name(axes: Any, move: Moved, colour: str, height: float) -> None:
    axes.annotate(
        f"{move.operator} to {move.target}",
        (move.switched, height),
        xycoords=("data", "axes fraction"),
        xytext=(6, 0),
        textcoords="offset points",
        color=colour,
        fontsize=8,
    )
