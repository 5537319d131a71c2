"""How fast messages go through Nomad's pods, as a ratio to blocking sockets without a runtime.

Three processes, source -> operator -> sink, over unix sockets, with acknowledgements, replay and removal of
doubles on, every message checked for loss, doubles and order. Runs take turns with the raw reference
(`raw.py`), which does the same work with none of these.

    python -m benchmarks.data_path [--quick] [--only WORKLOAD] [--json OUT]

Exit code 1 when a ratio misses its bar.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass

from benchmarks import harness, raw
from benchmarks.cluster import cluster, run
from benchmarks.workloads import WORKLOADS, Workload


@dataclass(frozen=True, slots=True)
class Bar:
    """What the ratio to raw must reach: at least for rates, at most for latencies."""

    value: float
    latency: bool = False

    def __str__(self) -> str:
        return f"{'<=' if self.latency else '>='} {self.value:g}"

    def met(self, ratio: float) -> bool:
        return ratio <= self.value if self.latency else ratio >= self.value


BARS = {
    "ints": Bar(0.4),
    "1 KiB": Bar(2.0),
    "frame 640x480x3": Bar(0.45),
    "int, 200/s": Bar(2.0, latency=True),
}


async def measure(workloads: list[Workload], *, quick: bool) -> dict[str, dict[str, object]]:
    """Per workload the summaries of both, and their ratio."""
    results: dict[str, dict[str, object]] = {}
    number = 0
    async with cluster() as master:
        for workload in workloads:
            count = workload.count // 10 if quick else workload.count
            runs: dict[str, list[harness.Run]] = {"raw": [], "nomad": []}
            for _ in range(2 if quick else 5):
                runs["raw"].append(await asyncio.to_thread(raw.run, workload, count))
                number += 1
                runs["nomad"].append(await run(master, workload, count, f"bench-{number}"))
            reference, ours = harness.summary(runs["raw"]), harness.summary(runs["nomad"])
            key = "latency_p50" if workload.name == "int, 200/s" else "rate"
            ratio = ours[key] / reference[key]
            bar = BARS.get(workload.name)
            results[workload.name] = {
                "raw": reference,
                "nomad": ours,
                "ratio": ratio,
                "cpu_ratio": ours["cpu_us"] / reference["cpu_us"],
                "bar": str(bar) if bar else None,
                "met": bar.met(ratio) if bar else None,
            }
            print(f"{workload.name}: {ratio:.2f}", file=sys.stderr, flush=True)
    return results


def main() -> None:
    names = [workload.name for workload in WORKLOADS]
    args = harness.arguments(__doc__, only={"choices": names, "help": "this workload alone"})
    chosen = [workload for workload in WORKLOADS if args.only in (None, workload.name)]
    results = asyncio.run(measure(chosen, quick=args.quick))
    rows = []
    for name, result in results.items():
        row = [name]
        for side in ("raw", "nomad"):
            figures = result[side]
            latency = figures["latency_p50"]
            row.append(f"p50 {latency * 1e6:.0f} us" if latency else f"{figures['rate']:,.0f}/s")
            row.append(f"{figures['cpu_us']:.2f}")
        verdict = {True: "met", False: "MISSED", None: ""}[result["met"]]
        rows.append([*row, f"{result['ratio']:.2f}", result["bar"] or "", verdict])
    harness.table(
        "Nomad's data path against raw sockets",
        ["workload", "raw", "CPU us", "nomad", "CPU us", "ratio", "bar", ""],
        rows,
    )
    harness.write(args.json, {"data_path": results})
    sys.exit(1 if any(result["met"] is False for result in results.values()) else 0)


if __name__ == "__main__":
    main()
