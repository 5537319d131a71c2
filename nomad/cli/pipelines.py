"""`nomad ls`, `show`, `logs`, `tail`, `set-aside`, `move`, `moves`, `stop`, `rm`: pipelines that were submitted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

import click

from nomad import units
from nomad.cli.common import (
    MoveFailed,
    Out,
    clock,
    duration,
    estimate,
    operator_argument,
    pipeline_argument,
    size,
    with_cluster,
)

if TYPE_CHECKING:
    from nomad.client import Cluster
    from nomad.master.views import LogLine, MoveView, OperatorView, PipelineView

QUIET_SECONDS = 5.0
"""When `tail` says that nothing has come: a last operator that returns nothing puts out nothing."""


@click.command("ls")
@with_cluster
async def list_pipelines(cluster: Cluster, out: Out) -> None:
    """List the pipelines."""
    found = await cluster.pipelines()
    out.document(found)
    if not out.json:
        out.table(
            ("PIPELINE", "PHASE", "OPERATORS", "SUBMITTED", "RESTARTS", "SET ASIDE"),
            (
                (
                    view.id,
                    view.phase,
                    " -> ".join(f"{operator.name}@{operator.node}" for operator in view.operators),
                    clock(view.created),
                    sum(operator.restarts for operator in view.operators),
                    sum(operator.stats.set_aside for operator in view.operators),
                )
                for view in found
            ),
        )


@click.command(short_help="Show one pipeline in detail.")
@pipeline_argument
@with_cluster
async def show(cluster: Cluster, out: Out, pipeline: str) -> None:
    """Show where PIPELINE stands: its operators, their counters, and what went wrong."""
    view = (await cluster.pipeline(pipeline)).last_status
    out.document(view)
    if out.json:
        return
    out.note(f"{view.id}: {view.phase}{f' ({view.reason})' if view.reason else ''}, submitted {clock(view.created)}")
    for warning in view.warnings:
        out.note(f"Warning: {warning}")
    out.note("")
    out.table(
        (
            "OPERATOR",
            "NODE",
            "STATE",
            "RATE",
            "TIME",
            "LATENCY",
            "QUEUE",
            "MEMORY",
            "DONE",
            "FAILED",
            "ASIDE",
            "RESTARTS",
        ),
        (
            (
                operator.name,
                operator.node,
                operator.state,
                None if operator.stats.rate is None else _per_second(operator.stats.rate),
                duration(operator.stats.service_time),
                duration(operator.stats.latency_p50),
                operator.stats.queue_messages,
                size(operator.stats.rss or None),
                operator.stats.processed,
                operator.stats.failed,
                operator.stats.set_aside,
                operator.restarts,
            )
            for operator in view.operators
        ),
    )
    out.note("")
    _show_estimates(out, view)
    out.note("")
    for operator in view.operators:
        out.note(f"{operator.name} is on {operator.node}: {operator.placement.summary}")
        if asked := _asked(operator):
            out.note(f"  it asks for {asked}")
        if operator.moving_to:
            here = operator.moving_to == operator.node
            out.note("  it is being replaced there" if here else f"  it is being moved to {operator.moving_to}")
        if operator.reason:
            out.note(f"  {operator.state}: {operator.reason}")
    for operator in view.operators:
        _show_failure(out, view, operator)


def _asked(operator: OperatorView) -> str:
    """What it needs beside its code, in words; values of variables aren't shown."""
    parts = [
        (f"the image {operator.image}",) if operator.image else (),
        operator.requirements,
        (f"{name} set" for name in operator.environment),
        (f"{name} from the secret {reference}" for name, reference in operator.secrets.items()),
        (name if count == 1 else f"{count} {name}" for name, count in operator.devices.items()),
    ]
    return ", ".join(text for part in parts for text in part)


def _show_estimates(out: Out, view: PipelineView) -> None:
    """What is measured of the operators, in reference-seconds and per message."""
    out.table(
        ("OPERATOR", "WORK", "OUTPUT", "OUT PER IN", "ARRIVING", "DEPARTING", "QUEUE", "BUSY", "SETTLED"),
        (
            (
                operator.name,
                estimate(known.work, duration),
                estimate(known.output_bytes, size),
                estimate(known.selectivity, units.number),
                estimate(known.arrival, _per_second),
                estimate(known.departure, _per_second),
                estimate(known.queue, units.number),
                estimate(known.busy, "{:.0%}".format),
                "yes" if known.settled else "no",
            )
            for operator in view.operators
            for known in (operator.estimates,)
        ),
    )


def _per_second(rate: float) -> str:
    return f"{units.number(rate)}/s"


def _show_failure(out: Out, view: PipelineView, operator: OperatorView) -> None:
    failure = operator.last_failure
    if failure is not None:
        out.note(f"\nLast failure of {operator.name}, at {clock(failure.time)}: {failure}")
        for line in (failure.traceback.rstrip() or "\n".join(failure.log)).splitlines():
            out.note(f"  {line}")
    if operator.stats.set_aside:
        out.note(
            f"\n{operator.stats.set_aside} messages of {operator.name} are set aside: "
            f"`nomad set-aside {view.id} {operator.name}`"
        )


@click.command(short_help="Show what a pipeline printed.")
@pipeline_argument
@operator_argument(required=False)
@click.option("-f", "--follow", is_flag=True, help="Go on with lines as they are printed.")
@click.option(
    "-n", "--lines", type=click.IntRange(0, 100_000), default=100, show_default=True, help="How many to show."
)
@with_cluster
async def logs(cluster: Cluster, out: Out, pipeline: str, operator: str | None, follow: bool, lines: int) -> None:
    """Show what PIPELINE, or one OPERATOR of it, printed. With --json one line of JSON per line."""

    def show_line(line: LogLine) -> None:
        out.item(line, line.line if operator else f"{line.operator:<{width}} | {line.line}")

    handle = await cluster.pipeline(pipeline)
    width = max(map(len, handle.operators))
    if not follow:
        for line in await handle.logs(operator, tail=lines):
            show_line(line)
        return
    async with aclosing(handle.follow_logs(operator, tail=lines)) as printed:
        async for line in printed:
            show_line(line)


@click.command(short_help="Show the outputs of an operator live.")
@pipeline_argument
@operator_argument(required=True)
@click.option("-n", "--limit", type=click.IntRange(1), help="End after this many.")
@with_cluster
async def tail(cluster: Cluster, out: Out, pipeline: str, operator: str, limit: int | None) -> None:
    """Show the outputs of OPERATOR live, until PIPELINE is over. One value a line, as JSON."""
    handle = await cluster.pipeline(pipeline)
    count = skipped = 0
    quiet = f"({operator} has put out nothing yet. What it prints is in `nomad logs {pipeline} {operator}`.)"
    async with handle.outputs(operator, decode=False) as outputs, _unless_done(QUIET_SECONDS, quiet) as heard:
        async for value in outputs:
            heard()
            if outputs.skipped > skipped:
                click.echo(f"({outputs.skipped - skipped} left out: this reader is slower than the operator)", err=True)
                skipped = outputs.skipped
            out.item(value, json.dumps(value, ensure_ascii=False))
            count += 1
            if count == limit:
                break


@asynccontextmanager
async def _unless_done(seconds: float, text: str) -> AsyncIterator[Callable[[], None]]:
    """Say `text` once the block has taken so long, unless it has called what it gets, or is over."""
    timer = asyncio.get_running_loop().call_later(seconds, partial(click.echo, text, err=True))
    try:
        yield timer.cancel
    finally:
        timer.cancel()


@click.command("set-aside", short_help="Show messages that failed; rerun or drop them.")
@pipeline_argument
@operator_argument(required=True)
@click.option("--rerun", is_flag=True, help="Run them again.")
@click.option("--drop", is_flag=True, help="Drop them for good.")
@click.option("--message", "ids", multiple=True, metavar="ID", help="Only this one; can be repeated.")
@click.option("--traceback", is_flag=True, help="Show tracebacks whole.")
@with_cluster
async def set_aside(
    cluster: Cluster,
    out: Out,
    pipeline: str,
    operator: str,
    rerun: bool,
    drop: bool,
    ids: tuple[str, ...],
    traceback: bool,
) -> None:
    """List the messages of OPERATOR whose function raised; run them again, or drop them."""
    if rerun and drop:
        raise click.UsageError("--rerun and --drop exclude each other")
    handle = await cluster.pipeline(pipeline)
    if rerun:
        ran, failed = await handle.rerun(operator, list(ids) or None)
        out.document({"ran": ran, "failed": failed}, text=f"{ran} run again, {failed} of them failed again")
        return
    if drop:
        dropped = await handle.drop(operator, list(ids) or None)
        out.document({"dropped": dropped}, text=f"{dropped} dropped")
        return
    records = [record for record in await handle.set_aside(operator, decode=False) if not ids or record.id in ids]
    out.document(records)
    if out.json:
        return
    if not records:
        out.note(f"No message of {operator} is set aside.")
    for record in records:
        value = json.dumps(record.value, ensure_ascii=False)
        out.note(f"{record.id}  {clock(record.time)}  {record.error['type']}: {record.error['message']}")
        out.note(f"    {value if len(value) <= 200 else value[:200] + ' ...'}")
        if traceback:
            out.note("".join(f"    {line}\n" for line in record.error["traceback"].splitlines()))


@click.command(short_help="Stop a pipeline.")
@pipeline_argument
@with_cluster
async def stop(cluster: Cluster, out: Out, pipeline: str) -> None:
    """Stop PIPELINE: its source at once, the others when they have settled what is under way."""
    view = await (await cluster.pipeline(pipeline)).stop()
    out.document(view, text=f"Pipeline {view.id} is {view.phase}.")


@click.command("rm", short_help="Stop a pipeline and forget it.")
@pipeline_argument
@with_cluster
async def remove(cluster: Cluster, out: Out, pipeline: str) -> None:
    """Stop PIPELINE if it runs, and forget it with all that it kept."""
    await (await cluster.pipeline(pipeline)).remove()
    out.document({"removed": pipeline}, text=f"Pipeline {pipeline} is removed.")


@click.command(short_help="Move an operator to another node.")
@pipeline_argument
@operator_argument(required=True)
@click.argument("node", metavar="[NODE]", required=False)
@click.option("--replace", is_flag=True, help="Keep it where it is, and put a new instance in its place there.")
@click.option("--wait/--no-wait", default=True, show_default=True, help="Wait until the move is over.")
@with_cluster
async def move(
    cluster: Cluster, out: Out, pipeline: str, operator: str, node: str | None, replace: bool, wait: bool
) -> None:
    """Move OPERATOR of PIPELINE to NODE, while the pipeline runs, or --replace it where it is. Exit with 8 if that is
    rolled back."""
    if (node is not None) == replace:
        raise click.UsageError("Say either where it is to go, or --replace.")
    handle = await cluster.pipeline(pipeline)
    view = await handle.move(operator, node)
    if wait:
        view = await handle.wait_for_move(view.id)
    out.document(view, text=_moved(view))
    if not wait:
        out.note(f"See what becomes of it: `nomad moves {pipeline}`")
    if view.state in ("rolled_back", "failed"):
        stays = "stays the instance that it was" if replace else f"stays on {view.source}"
        raise MoveFailed(f"{operator} {stays}: {view.error}")


@click.command(short_help="List the moves of a pipeline.")
@pipeline_argument
@with_cluster
async def moves(cluster: Cluster, out: Out, pipeline: str) -> None:
    """List the moves of PIPELINE: those under way, and what past ones cost."""
    found = await (await cluster.pipeline(pipeline)).moves()
    out.document(found)
    if out.json:
        return
    out.table(
        ("OPERATOR", "FROM", "TO", "STATE", "ORDERED", "TOOK", "PAUSE", "LOST", "DOUBLED", "CAUSE", "REASON"),
        (
            (
                view.operator,
                view.source,
                view.target,
                view.state,
                clock(view.asked),
                duration(sum(phase.seconds for phase in view.phases)) if view.state.final else None,
                duration(view.pause),
                view.lost,
                view.doubled,
                view.cause,
                view.error or view.reason,
            )
            for view in found
        ),
    )


def _moved(view: MoveView) -> str:
    where = f"replaced on {view.source}" if view.source == view.target else f"{view.source} -> {view.target}"
    way = f"{view.operator}: {where}, {view.state.replace('_', ' ')}"
    if view.state != "done":
        return way
    counts = ", ".join(
        f"{'?' if count is None else count} {what}" for count, what in ((view.lost, "lost"), (view.doubled, "doubled"))
    )
    return f"{way}; pause {duration(view.pause)}, {counts}"


COMMANDS = (list_pipelines, show, logs, tail, set_aside, move, moves, stop, remove)
