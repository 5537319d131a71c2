"""`nomad bench`: runs a scenario under several policies and compares them. Needs no master: each run has its own."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nomad import units
from nomad.cli.common import Out, Quantity, duration, json_option

if TYPE_CHECKING:
    from nomad.bench.results import Results
    from nomad.bench.runner import Plan

LINKS = ("shaping", "netem", "tun")


@click.command(short_help="Compare policies on an edge-cloud scenario.")
@click.argument("scenario", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--policy", "only", metavar="NAME", multiple=True, help="This policy of the scenario alone; repeatable.")
@click.option("--repeat", "repeats", type=click.IntRange(min=1), help="Runs of each policy.  [default: the scenario's]")
@click.option("--seed", "seeds", type=int, multiple=True, help="Instead of the scenario's seeds; repeatable.")
@click.option("--duration", "length", type=Quantity("DURATION", units.seconds), help="Shorter, or longer, runs.")
@click.option(
    "--out",
    "folder",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where results.json and the plots go.  [default: bench-NAME]",
)
@click.option(
    "--links",
    type=click.Choice(LINKS),
    default="shaping",
    show_default=True,
    help="How links are made slow: by the transport, or with real packets between network namespaces (as root).",
)
@click.option("--format", "form", type=click.Choice(["svg", "png"]), default="svg", show_default=True, help="Of plots.")
@json_option
def bench(
    scenario: Path,
    only: tuple[str, ...],
    repeats: int | None,
    seeds: tuple[int, ...],
    length: float | None,
    folder: Path | None,
    links: str,
    form: str,
    as_json: bool,
) -> None:
    """Run the scenario in the file SCENARIO under each of its policies, and compare their latencies.

    A scenario is a topology, a pipeline, and what happens to them when: links that become slow, nodes that are lost,
    load that grows. Each run has a cluster of its own on this machine, one after the other. Prints a table, and writes
    DIR/results.json and DIR/latency.svg (which needs `pip install ".[bench]"`). docs/bench.md has the form.
    """
    from nomad.bench import plots, results

    plan = _plan(scenario, only, repeats, seeds, length, links)
    folder = folder or Path(f"bench-{plan.scenario.name}")
    out = Out(as_json)
    found = _run(plan, quiet=as_json)
    results.write(found, folder / "results.json")
    written = [folder / "results.json", *(plots.draw(found, folder, form=form) if plots.available() else [])]
    if as_json:
        out.document(results.document(found))
    else:
        _show(out, found)
        out.note(f"\nwritten: {', '.join(map(str, written))}")
        if not plots.available():
            out.note('No plots without matplotlib: pip install ".[bench]"')
    if any(run.error for run in found.runs):
        raise click.exceptions.Exit(8)


def _plan(
    path: Path, only: tuple[str, ...], repeats: int | None, seeds: tuple[int, ...], length: float | None, links: str
) -> Plan:
    from nomad.bench import scenario
    from nomad.bench.runner import Plan
    from nomad.yamlfile import suggestion

    found = scenario.load(path)
    form = found.form
    names = [policy.name for policy in form.policies]
    for name in only:
        if name not in names:
            raise click.UsageError(f"the scenario has no policy {name!r}; {suggestion(name, names, 'it has')}")
    if length is not None and not 0 < length < float("inf"):
        raise click.UsageError("--duration must be above 0")
    return Plan(
        scenario=found,
        policies=[policy for policy in form.policies if not only or policy.name in only],
        repeats=repeats or form.repeats,
        seeds=seeds or form.seeds,
        duration=length or form.duration,
        links=links,
    )


def _run(plan: Plan, *, quiet: bool) -> Results:
    from nomad.actor.threads import new_loop
    from nomad.bench.runner import run_all

    async def run() -> Results:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await run_all(plan, lambda text: None if quiet else click.echo(text, err=True))

    try:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            return runner.run(run())
    except asyncio.CancelledError:  # SIGTERM; Ctrl-C is a KeyboardInterrupt
        sys.exit(128 + signal.SIGTERM)


def _show(out: Out, found: Results) -> None:
    from nomad.bench import results

    out.table(
        ("PHASE", "POLICY", "MESSAGES", "MEDIAN", "90 %", "99 %", "MOVES", "LOST", "DOUBLED", "DISORDER"),
        (
            (
                row.phase,
                row.policy,
                row.count,
                *(None if value is None else duration(value) for value in (row.p50, row.p90, row.p99)),
                row.moves,
                row.lost,
                row.doubled,
                row.disorder,
            )
            for row in results.rows(found)
        ),
    )
    for run in found.runs:
        if run.error:
            out.note(f"\n{run.policy} was not run to its end: {run.error}")


COMMANDS = (bench,)
