"""What live moves cost, and when they are made: each row of the table is a scenario, run by the benchmark harness.

    python -m benchmarks.moves [--quick] [--only ROW] [--out DIR] [--json OUT] [--markdown FILE]

The scenarios are in benchmarks/scenarios/; `nomad bench` runs each of them alone. A run of all rows takes an hour, the
thousand moves under load most of it; `--quick` makes fewer moves and a shorter oscillation. Needs a machine with
two free cores: what else runs there is in the figures. Exit code 1 when a bar is missed.

A move is *done* when the old process has ended, about a second after the operator has *moved*: after messages went over
to the new process.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import harness
from nomad.actor.threads import new_loop
from nomad.bench import machine, plots, policies, results, runner, scenario, timeline
from nomad.bench.results import Moved, Results, Run
from nomad.bench.runner import Plan, Subject
from nomad.bench.scenario import Scenario
from nomad.errors import NomadError
from nomad.scheduler import drift

HERE = Path(__file__).resolve().parent
SCENARIOS = HERE / "scenarios"
PAYS_STEP = 0.1
"""Seconds: how finely the moment is looked for from which a move pays."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One row of the table."""

    what: str
    bar: str
    value: str
    met: bool


@dataclass(frozen=True, slots=True)
class Row:
    """A scenario, and what is read off its runs."""

    name: str
    scenario: str
    judge: Callable[[Scenario, Results], Iterable[Measured]]
    quick: float | None = None
    """Seconds of a quick run, where the whole is long."""


def ms(seconds: float | None) -> str:
    return "unknown" if seconds is None else f"{seconds * 1e3:.3g} ms"


def at_most(value: float | None, bar: float) -> bool:
    return value is not None and value <= bar


def the_run(found: Results, policy: str) -> Run:
    """The first run of a policy. Raises `NomadError` when it gave nothing."""
    for run in found.runs:
        if run.policy == policy and not run.error:
            return run
    raise NomadError("; ".join(f"{run.policy}: {run.error}" for run in found.runs if run.error))


def done(run: Run, *, since: float = 0.0, until: float = float("inf")) -> list[Moved]:
    """Moves that were asked for in a stretch of time, and made."""
    return [move for move in run.moves if move.state == "done" and since <= move.asked < until]


def counts(run: Run) -> str:
    assert run.outcome is not None
    return f"{run.outcome.lost}, {run.outcome.doubled}, {run.outcome.disorder}"


def planned(_: Scenario, found: Results) -> Iterable[Measured]:
    run = the_run(found, "planned")
    gaps = [move.gap for move in done(run) if move.gap is not None]
    what = f"planned move, 20 ms links: extra gap at the sink, {len(gaps)} moves"
    for share, bar in ((0.5, 0.025), (0.99, 0.1)):
        value = results.percentile(gaps, share)
        yield Measured(f"{what}, p{share * 100:g}", f"<= {ms(bar)}", ms(value), at_most(value, bar))


def under_load(_: Scenario, found: Results) -> Iterable[Measured]:
    run = the_run(found, "planned")
    assert run.outcome is not None
    moved, failed = len(done(run)), sum(move.state != "done" for move in run.moves)
    what = f"lost, doubled, out of order over {moved} moves ({failed} not done), {run.outcome.sent} messages at 500/s"
    yield Measured(what, "0, 0, 0", counts(run), counts(run) == "0, 0, 0" and moved > 0)


def step(found_in: Scenario, found: Results) -> Iterable[Measured]:
    run = the_run(found, "nomad")
    at = found_in.form.events[0].at
    moves = done(run, since=at)
    right = [move.target for move in moves] == ["far"]
    took = moves[0].finished - at if moves and moves[0].finished is not None else None
    yield Measured(
        f"link steps from 5 to 100 ms: the right single move is done ({', '.join(m.target for m in moves) or 'none'})",
        "<= 5 s",
        "never" if took is None else f"{took:.2f} s",
        right and at_most(took, 5.0),
    )
    phase = found.phases[-1]
    ours = results.figures(run, phase).p50
    best = results.figures(the_run(found, "static-best-after"), phase).p50
    ratio = None if ours is None or best is None else ours / best
    yield Measured(
        "latency after the moves, against the best static placement for the new conditions",
        "<= 1.1",
        "unknown" if ratio is None else f"{ratio:.2f} ({ms(ours)}, {ms(best)})",
        at_most(ratio, 1.1),
    )


def oscillation(found_in: Scenario, found: Results) -> Iterable[Measured]:
    moves = done(the_run(found, "nomad"), since=found_in.form.events[0].at)
    seconds = found.duration - found_in.form.events[0].at
    yield Measured(
        f"link oscillates by 20 ms, 10 s period, {seconds:.0f} s: moves", "<= 1", str(len(moves)), len(moves) <= 1
    )


def pays_at(found_in: Scenario, run: Run) -> float:
    """When a move begins to pay, for one who knows all: the best placement gains what `drift` asks for."""
    subject = Subject.of(found_in)
    steps = timeline.steps(found_in)
    at = found_in.form.events[0].at
    while at < found_in.form.duration:
        now = timeline.conditions(found_in, steps, at)
        stay = policies.best(found_in, subject.shaped, now, fixed=dict(run.placement)).latency
        gain = stay - policies.best(found_in, subject.shaped, now).latency
        if gain >= drift.DEFAULT.absolute and gain >= drift.DEFAULT.relative * stay:
            return at
        at += PAYS_STEP
    raise NomadError(f"{found_in.name}: no move ever pays")


def ramp(found_in: Scenario, found: Results) -> Iterable[Measured]:
    run = the_run(found, "nomad")
    begin = found_in.form.events[0].at
    pays = pays_at(found_in, run)
    moves = done(run, since=begin)
    late = moves[0].switched - pays if moves and moves[0].switched is not None else None
    yield Measured(
        f"ramp from 5 to 100 ms in 60 s: moved after it pays ({pays - begin:.1f} s after the beginning)",
        "<= 5 s",
        "never" if late is None else f"{late:.2f} s",
        late is not None and abs(late) <= 5.0 and len(moves) == 1,
    )


def slow_operator(found_in: Scenario, found: Results) -> Iterable[Measured]:
    run = the_run(found, "nomad")
    at = found_in.form.events[0].at
    moves = done(run, since=at)
    moved = moves[0].switched if moves else None
    meanwhile = [sample for sample in run.samples if at <= sample.at and (moved is None or sample.at < moved)]
    stopped = next((sample.at for sample in meanwhile if sample.paused), None)
    longest = max((sample.queues["work"] for sample in meanwhile), default=0)
    met = moved is not None and stopped is None and moves[0].target == "far"
    value = f"{'never' if moved is None else f'after {moved - at:.2f} s'}, {longest} waiting"
    if stopped is not None:
        value += f", out of credits after {stopped - at:.2f} s"
    credits = found_in.form.pipeline.window_messages
    yield Measured(
        f"service time triples: moved to a faster node before {credits} credits run out", "before", value, met
    )


def node_loss(found_in: Scenario, found: Results) -> Iterable[Measured]:
    run = the_run(found, "nomad")
    at = next(item.at for item in run.happened if item.kind == "step")
    noticed = next((item.at for item in run.happened if item.at >= at - 0.1 and item.kind == "node.lost"), None)
    again = next(
        (
            item.at
            for item in run.happened
            if item.at > at and item.kind == "operator.ready" and item.operator == "work"
        ),
        None,
    )
    took = None if noticed is None else max(0.0, noticed - at)
    yield Measured("node loss: noticed", "<= 3 s", "never" if took is None else f"{took:.2f} s", at_most(took, 3.0))
    back = None if again is None or noticed is None else again - noticed
    yield Measured(
        f"node loss: its actors run elsewhere after that (lost, doubled, out of order: {counts(run)})",
        "<= 2 s",
        "never" if back is None else f"{back:.2f} s",
        at_most(back, 2.0),
    )


def after_failures(quick: bool) -> list[Measured]:
    """The row that is a matter of tests: what dies, and in which phase."""
    tests = sorted(path for path in (HERE.parent / "tests").rglob("test_moves*.py") if "bench" not in path.parts)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "dies or killed", *map(str, tests)]
    outcome = subprocess.run(
        [*command, *(["-m", "not slow"] if quick else [])], cwd=HERE.parent, capture_output=True, text=True, check=False
    )
    last = (outcome.stdout.strip().splitlines() or ["no tests"])[-1].strip("= ")
    return [
        Measured(
            "target dies, or the master is killed, in each phase of a move: completes or rolls back, 0 lost (tests)",
            "all pass",
            last,
            outcome.returncode == 0,
        )
    ]


ROWS = (
    Row("planned", "planned_moves", planned, quick=60.0),
    Row("load", "moves_under_load", under_load, quick=60.0),
    Row("step", "latency_step", step),
    Row("oscillation", "oscillation", oscillation, quick=75.0),
    Row("ramp", "ramp", ramp),
    Row("slow", "slow_operator", slow_operator),
    Row("loss", "node_loss", node_loss),
)


def measure(rows: Sequence[Row], *, quick: bool, out: Path | None) -> dict[str, list[Measured]]:
    """Per row what was measured. What can't be measured is missed, and says why."""
    found: dict[str, list[Measured]] = {}
    for row in rows:
        loaded = scenario.load(SCENARIOS / f"{row.scenario}.yaml")
        form = loaded.form
        length = row.quick if quick and row.quick is not None else form.duration
        plan = Plan(loaded, form.policies, repeats=1, seeds=form.seeds[:1], duration=length)
        with asyncio.Runner(loop_factory=new_loop) as loop:
            taken = loop.run(runner.run_all(plan, lambda text, name=row.name: note(f"{name}, {text}")))
        if out is not None:
            results.write(taken, out / row.scenario / "results.json")
            if plots.available():
                plots.draw(taken, out / row.scenario)
        try:
            found[row.name] = list(row.judge(loaded, taken))
        except NomadError as exc:
            found[row.name] = [Measured(row.scenario, "", str(exc), met=False)]
        for measured in found[row.name]:
            note(f"{measured.what}: {measured.value}")
    return found


def markdown(lines: Sequence[Measured], quick: bool) -> str:
    """The table for docs/, with the machine."""
    where = machine.describe()
    rows = [f"| {x.what} | {x.bar} | {x.value} | {'met' if x.met else '**missed**'} |" for x in lines]
    command = f"python -m benchmarks.moves{' --quick' if quick else ''} --markdown FILE"
    version = where["commit"] or where["packages"]["nomad"]
    return "\n".join(
        [
            "# Live moves, measured",
            "",
            f"Written by `{command}` at {where['time']}, version {version}, on {where['cores']} cores",
            f"of an {where['cpu']}, {where['system']}, Python {where['python']}; load at the end {where['load']:.1f}.",
            "One machine, emulated links, 200 messages a second of 1 KiB unless said. How each row is measured stands",
            "in `benchmarks/moves.py`, what happens in it in `benchmarks/scenarios/` ([bench.md](bench.md)).",
            "",
            "| what | bar | measured | |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    names = [row.name for row in ROWS]
    args: Any = harness.arguments(
        __doc__,
        only={"choices": [*names, "failures"], "action": "append", "help": "this row alone; repeatable"},
        markdown={"type": Path, "metavar": "FILE", "help": "write the table there, for docs/"},
        out={"type": Path, "metavar": "DIR", "help": "each scenario's results.json and plot go there"},
    )
    wanted = args.only or [*names, "failures"]
    found = measure([row for row in ROWS if row.name in wanted], quick=args.quick, out=args.out)
    if "failures" in wanted:
        found["failures"] = after_failures(args.quick)
    lines = [measured for row in found.values() for measured in row]
    harness.table(
        "Live moves, on one machine, with emulated links; 200 messages/s of 1 KiB unless said",
        ["what", "bar", "measured", ""],
        [[line.what, line.bar, line.value, "met" if line.met else "MISSED"] for line in lines],
    )
    harness.write(args.json, {"moves": [{"what": x.what, "bar": x.bar, "value": x.value, "met": x.met} for x in lines]})
    if args.markdown is not None:
        args.markdown.write_text(markdown(lines, args.quick), encoding="utf-8")
    sys.exit(0 if all(line.met for line in lines) else 1)


if __name__ == "__main__":
    main()
