"""`nomad submit` and `nomad bundle`: from a Python file to a pipeline."""

from __future__ import annotations

import json
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nomad.cli.cluster import show_event
from nomad.cli.common import Out, PipelineFailed, json_option, master_option, with_cluster
from nomad.errors import UsageError

if TYPE_CHECKING:
    from nomad.client import Cluster, PipelineHandle
    from nomad.master.views import PipelineView
    from nomad.program import Submission

ABOUT_FILE = """
FILE is a Python file with `operators = [source, ..., sink]`; FILE:NAME takes the list called NAME. The file is run
once, as a module: what stands under `if __name__ == "__main__":` isn't run, and a `nomad.submit_pipeline(...)` in it
submits nothing but says what to take where the command line doesn't.
"""
ABOUT_BUNDLE = """
A FILE that doesn't end in .py is sent as a bundle that `nomad bundle` made.
"""

codec_option = click.option(
    "--codec",
    type=click.Choice(["data", "pickle"]),
    default="data",
    show_default=True,
    help="How messages travel; with pickle they can be anything, and nodes must trust one another.",
)


@click.command(
    short_help="Run the pipeline that a file defines.",
    help=f"Run the pipeline that FILE defines.\n{ABOUT_FILE}{ABOUT_BUNDLE}",
)
@click.argument("target", metavar="FILE[:NAME]")
@click.option("--start", metavar="NODE", help="Node of the first operator.  [default: start_node in FILE]")
@click.option("--end", metavar="NODE", help="Node of the last operator.  [default: end_node in FILE]")
@click.option("--id", metavar="ID", help="Name of the pipeline.  [default: pipeline_id in FILE, else made up]")
@codec_option
@click.option(
    "--profile",
    metavar="PROFILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="What the operators are expected to cost, as `nomad profile FILE --json` says.  [default: profile in FILE]",
)
@click.option("--no-moves", is_flag=True, help="Nomad moves no operator by itself.")
@click.option(
    "--pin", "pins", metavar="OPERATOR=NODE", multiple=True, help="Bind an operator to a node; can be repeated."
)
@click.option("--watch", is_flag=True, help="Show what happens until the pipeline is over; exit with 8 if it fails.")
@with_cluster
async def submit(
    cluster: Cluster,
    out: Out,
    target: str,
    start: str | None,
    end: str | None,
    id: str | None,
    codec: str,
    profile: Path | None,
    no_moves: bool,
    pins: tuple[str, ...],
    watch: bool,
) -> None:
    """The command's help is `ABOUT_FILE`."""
    program = _load_any(target)
    start, end = start or program.start, end or program.end
    if start is None or end is None:
        missing = " and ".join(name for name, value in (("--start", start), ("--end", end)) if value is None)
        raise click.UsageError(f"say on which node: {missing} NODE (`nomad nodes` lists them)")
    before = await cluster.events(limit=1) if watch else []
    handle = await cluster.submit(
        program.operators,
        start=start,
        end=end,
        id=program.id if id is None else id,
        codec=codec,
        profile=program.profile if profile is None else _profile(profile),
        moves=not no_moves,
        pins=parse_pins(pins),
    )
    status = handle.last_status
    if watch:
        out.item(status, _accepted(status))
        await _watch(cluster, handle, out, after=before[-1].id if before else 0)
        return
    out.document(status, text=_accepted(status))
    out.note(f"Look at it: `nomad show {handle.id}`; at its outputs: `nomad tail {handle.id} {handle.operators[0]}`")


@click.command(
    short_help="Pack a pipeline for others to submit.",
    help=f"Pack the pipeline that FILE defines into a signed bundle, which any program can submit.\n{ABOUT_FILE}",
)
@click.argument("target", metavar="FILE[:NAME]")
@click.option(
    "-o",
    "--output",
    metavar="OUT",
    required=True,
    type=click.Path(dir_okay=False, allow_dash=True),
    help="Where to write it; - is standard output.",
)
@codec_option
@master_option
@json_option
def bundle(target: str, output: str, codec: str, master: str | None, as_json: bool) -> None:
    """The command's help is `ABOUT_FILE`."""
    from nomad.bundle import MEDIA_TYPE
    from nomad.client import connect
    from nomad.program import load

    program = load(target)
    cluster = connect(master)
    data = cluster.bundle(program.operators, codec=codec, profile=program.profile)
    try:
        with click.open_file(output, "wb") as file:
            file.write(data)
    except OSError as exc:
        raise UsageError(f"can't write {output}: {exc.strerror}") from exc
    if output == "-":
        return
    out = Out(as_json)
    out.document({"file": output, "bytes": len(data)}, text=f"{output}: {len(data)} bytes")
    out.note(
        f"Submit it: `nomad submit {output} --start NODE --end NODE`, or from any program as\n"
        f"POST {cluster.url}/api/v1/pipelines?start=NODE&end=NODE with Content-Type: {MEDIA_TYPE}"
    )


def _load_any(target: str) -> Submission:
    from nomad.program import Submission, load

    path = Path(target)
    return Submission(path.read_bytes()) if path.suffix != ".py" and path.is_file() else load(target)


def parse_pins(pins: tuple[str, ...]) -> dict[str, str]:
    """OPERATOR=NODE, as the command line has it."""
    parsed: dict[str, str] = {}
    for pin in pins:
        operator, _, node = pin.partition("=")
        if not operator or not node:
            raise click.BadParameter(f"{pin!r} is not OPERATOR=NODE", param_hint="--pin")
        if parsed.setdefault(operator, node) != node:
            raise click.BadParameter(f"{operator!r} can't be on {parsed[operator]} and on {node}", param_hint="--pin")
    return parsed


def _profile(path: Path) -> Any:
    """A list of maps; what is in them is checked where pipelines are built."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as exc:
        raise UsageError(f"{path} is not JSON: {exc}") from exc
    if not (isinstance(content, list) and all(isinstance(entry, dict) for entry in content)):
        raise UsageError(f"{path} is no profile: that is a list with a map for each operator")
    return content


def _accepted(status: PipelineView) -> str:
    chain = " -> ".join(f"{operator.name}@{operator.node}" for operator in status.operators)
    return f"Pipeline {status.id}: {chain}"


async def _watch(cluster: Cluster, handle: PipelineHandle, out: Out, *, after: int) -> None:
    """Events until the pipeline is over, then its last status; raises `PipelineFailed`."""
    from nomad.master.views import Phase

    events = cluster.follow_events(pipeline=handle.id, after=after)
    async with aclosing(events):
        status = await handle.status()
        while not status.phase.final:
            event = await anext(events)
            show_event(out, event, named=False)
            after = event.id
            status = await handle.status()
    for event in await cluster.events(pipeline=handle.id, after=after):  # what led there since the last look
        show_event(out, event, named=False)
    out.item(status, f"Pipeline {status.id} is {status.phase}{f': {status.reason}' if status.reason else ''}")
    if status.phase is Phase.FAILED:
        raise PipelineFailed(f"pipeline {status.id} failed: {status.reason}")


COMMANDS = (submit, bundle)
