"""How good placements are, against proven optima, and how long they take.

    python -m benchmarks.placement [--quick] [--solver-seconds 20] [--json results.json]

The problems are those of tests/scheduler/problems.py, from seeds that the tests don't use. The optimum is proven by
HiGHS (tests/scheduler/oracle.py: a mixed-integer programme that shares no code with nomad.scheduler). Where it doesn't
finish in time, the gap is to the best that it or the planner found, and the problem counts as "open".
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nomad import scheduler
from nomad.bench import machine
from nomad.scheduler.planner import Planner
from tests.scheduler import oracle, problems

FIRST = 5000
"""The first seed."""


@dataclass(frozen=True, slots=True)
class Result:
    """One problem."""

    kind: str
    seed: int
    contention: str
    operators: int
    seconds: float
    cpu: float
    feasible: bool
    """A placement was found."""
    possible: bool | None
    """There is one; None: unknown."""
    gap: float | None
    proven: bool
    """The gap is to a proven optimum, or it is proven that there is no placement."""
    constraint: str = ""


def one(kind: str, seed: int, solver_seconds: float) -> Result:
    """Plan and compare."""
    problem = getattr(problems, kind)(seed)
    start, cpu = time.perf_counter(), time.process_time()
    answer = scheduler.plan(problem)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    pipelines = problem.get("pipelines") or [problem["pipeline"]]
    size = sum(len(pipeline["operators"]) for pipeline in pipelines)
    found = answer["latency"]
    common = (kind, seed, problem["contention"], size, seconds, cpu, answer["feasible"])
    if found is not None:
        model = oracle.Model(problem)
        its = answer.get("pipelines") or {pipelines[0]["id"]: answer}
        placement = {(p, op): at for p, each in its.items() for op, at in each["placement"].items()}
        assert not model.broken(placement), (kind, seed, model.broken(placement))
        assert abs(model.latency(placement) / found - 1) < 1e-9, (kind, seed)
    state, best, _ = oracle.milp(problem, solver_seconds, found)
    if found is None:
        possible = {"infeasible": False, "optimal": True}.get(state, True if best is not None else None)
        return Result(*common, possible, None, state != "unknown", answer["reasons"]["constraint"])
    gap = max(0.0, found / best - 1) if best is not None else 0.0
    return Result(*common, True, gap if gap > 1e-5 else 0.0, state != "unknown")


def row(name: str, results: Iterable[Result]) -> dict[str, Any]:
    """The figures of the table."""
    results = list(results)
    possible = [each for each in results if each.possible]
    gaps = [each.gap for each in possible if each.gap is not None]
    milliseconds = np.array([each.seconds * 1e3 for each in results])
    cpu = np.array([each.cpu * 1e3 for each in results])
    return {
        "problems": name,
        "n": len(possible),
        "open": sum(not each.proven for each in possible),
        "feasible found %": 100 * sum(each.feasible for each in possible) / max(1, len(possible)),
        "optimal %": 100 * sum(gap == 0 for gap in gaps) / max(1, len(gaps)),
        "mean gap %": 100 * float(np.mean(gaps)),
        "p95 gap %": 100 * float(np.percentile(gaps, 95)),
        "p99 gap %": 100 * float(np.percentile(gaps, 99)),
        "max gap %": 100 * max(gaps),
        "p50 ms": float(np.percentile(milliseconds, 50)),
        "p99 ms": float(np.percentile(milliseconds, 99)),
        "p99 cpu ms": float(np.percentile(cpu, 99)),
    }


def large(size: int, operators: int, seeds: Iterable[int]) -> dict[str, Any]:
    """Time alone."""
    taken = []
    for seed in seeds:
        problem = problems.large(seed, size, operators)
        start, cpu = time.perf_counter(), time.process_time()
        answer = scheduler.plan(problem)
        taken.append((time.perf_counter() - start, time.process_time() - cpu, answer["feasible"]))
    return {
        "problems": f"{size} nodes, {operators} operators",
        "n": len(taken),
        "feasible found %": 100 * sum(each[2] for each in taken) / len(taken),
        "p50 ms": 1e3 * float(np.median([each[0] for each in taken])),
        "p50 cpu ms": 1e3 * float(np.median([each[1] for each in taken])),
        "max ms": 1e3 * max(each[0] for each in taken),
    }


def again(changes: int) -> dict[str, Any]:
    """Planning anew after one link or one node of 100 has changed."""
    problem = copy.deepcopy(problems.large(1, 100, 10))
    planner = Planner(problem)
    planner.plan()
    taken = []
    for number in range(changes):
        link = problem["links"][number * 7 % len(problem["links"])]
        start, cpu = time.perf_counter(), time.process_time()
        if number % 2:
            planner.change_node(problem["nodes"][number % 100]["id"], speed=1.0 + number % 5)
        else:
            planner.change_link(link["from"], link["to"], latency=link["latency"] * (0.3 if number % 4 else 3.0))
        planner.plan()
        taken.append((time.perf_counter() - start, time.process_time() - cpu))
    return {
        "problems": "100 nodes, one change",
        "n": changes,
        "p50 ms": 1e3 * float(np.median([each[0] for each in taken])),
        "p50 cpu ms": 1e3 * float(np.median([each[1] for each in taken])),
        "max ms": 1e3 * max(each[0] for each in taken),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for each in rows:
        cells = (f"{each[name]:.3g}" if isinstance(each[name], float) else str(each[name]) for name in names)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the problems")
    parser.add_argument("--solver-seconds", type=float, default=20.0, metavar="S")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    share = 10 if options.quick else 1
    counts = {"small": 80, "general": 80, "tree": 60, "trap": 60, "packed": 60, "joint": 20}
    scheduler.plan(problems.small(0))  # what is loaded at first use is loaded
    results: list[Result] = []
    for kind, count in counts.items():
        for seed in range(FIRST, FIRST + max(2, count // share)):
            results.append(one(kind, seed, options.solver_seconds))
            print(f"\r{kind} {seed - FIRST + 1} of {count // share}   ", end="", file=sys.stderr, flush=True)
    chosen: list[tuple[str, Callable[[Result], bool]]] = [
        ("single pipelines, all", lambda each: each.kind != "joint"),
        ("chains and trees up to 8 operators", lambda each: each.kind == "small"),
        ("chains and DAGs of 4-16 operators", lambda each: each.kind == "general"),
        ("edge-fog-cloud", lambda each: each.kind == "tree"),
        ("traps", lambda each: each.kind == "trap"),
        ("tightly packed, 25-40 nodes", lambda each: each.kind == "packed"),
        ("5-20 pipelines jointly", lambda each: each.kind == "joint"),
    ]
    rows = [row(name, filter(which, results)) for name, which in chosen]
    sizes = [large(size, ops, range(5)) for size in (1000, 10_000) for ops in (10, 100)]
    refused = [each for each in results if each.possible is False]
    print("\r" + table(rows), table(sizes), table([again(40)]), sep="\n\n")
    print(f"\ninfeasible: {len(refused)}, all recognised: {not any(each.feasible for each in refused)}")
    if options.json:
        found = {"machine": machine.describe(), "command": sys.argv, "table": rows, "large": sizes}
        found["problems"] = [asdict(each) for each in results]
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
