"""What the benchmarks share: the machine described, medians, a table, results as JSON.

Wall figures on a shared machine move several times over within minutes. So what is to be compared is
run in turns (A, B, A, B, ...) and compared by the median of its runs; CPU time per message, over all
processes, decides when wall figures disagree.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nomad.bench import machine


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one workload."""

    messages: int
    seconds: float
    """From the source's first message to the sink's last."""
    cpu: float
    """Seconds of CPU, over all processes, in that time."""
    latency: float | None = None
    """Median seconds from source to sink, where that is the question."""

    @property
    def rate(self) -> float:
        """Messages per second."""
        return self.messages / self.seconds

    @property
    def cpu_us(self) -> float:
        """Microseconds of CPU per message."""
        return self.cpu / self.messages * 1e6


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """Medians, and every run."""
    latencies = [run.latency for run in runs if run.latency is not None]
    return {
        "messages": runs[0].messages,
        "rate": statistics.median(run.rate for run in runs),
        "cpu_us": statistics.median(run.cpu_us for run in runs),
        "latency_p50": statistics.median(latencies) if latencies else None,
        "runs": [asdict(run) for run in runs],
    }


def arguments(description: str | None, **extra: Mapping[str, Any]) -> argparse.Namespace:
    """`--quick` and `--json OUT`, and a benchmark's own options: `name={argparse's keywords}`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help="fewer and shorter runs: whether it works, not how fast")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the results there")
    for name, keywords in extra.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **keywords)
    return parser.parse_args()


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: the first column to the left, the others to the right."""
    widths = [max(len(str(row[i])) for row in [columns, *rows]) for i in range(len(columns))]
    print(f"\n{title}")
    for row in [columns, ["-" * width for width in widths], *rows]:
        print(
            "  ".join(
                str(cell).ljust(w) if i == 0 else str(cell).rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
        )


def write(out: Path | None, results: Mapping[str, Any]) -> None:
    """The results with the machine, as JSON."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"machine": machine.describe(), **results}, indent=2) + "\n")
        print(f"\nwritten to {out}", file=sys.stderr)
