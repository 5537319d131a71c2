"""`nomad profile`: what the operators of a file cost, found out by running them in this process. Needs no master."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nomad.cli.common import Out, duration, json_option, size
from nomad.errors import UsageError

if TYPE_CHECKING:
    from nomad.measure.profiler import Profile


@click.command(short_help="Find out what the operators of a file cost.")
@click.argument("target", metavar="FILE[:NAME]")
@click.option(
    "--input",
    "samples",
    metavar="SAMPLE",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="What the second operator gets, instead of what the source makes; can be repeated.",
)
@click.option(
    "--messages", type=click.IntRange(1, 1_000_000), default=20, show_default=True, help="How many to run through."
)
@click.option(
    "--codec", type=click.Choice(["data", "pickle"]), default="data", show_default=True, help="As for `nomad submit`."
)
@json_option
def profile(target: str, samples: tuple[Path, ...], messages: int, codec: str, as_json: bool) -> None:
    """Run the operators that FILE defines in this process, one after the other, and say what each costs.

    A SAMPLE that ends in .json is a list of messages, or one; .npy is an array; any other file is a message of its
    bytes. Without one, the source makes the messages: it is called, or pulled, as often as --messages says.

    With --json what `nomad submit FILE --profile` takes: per operator the reference-seconds of a call and the bytes of
    a result. What the operators print goes to standard error.
    """
    from nomad.measure import profiler
    from nomad.pipeline import build
    from nomad.program import load

    inputs = [message for path in samples for message in _messages(path)]
    with contextlib.redirect_stdout(sys.stderr):
        pipeline = build(load(target).operators, codec=codec)
        found = profiler.profile(pipeline, inputs, messages)
    out = Out(as_json)
    out.document([operator.entry() for operator in found.operators])
    if not as_json:
        _show(out, found)


def _messages(path: Path) -> list[Any]:
    if path.suffix == ".json":
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as exc:
            raise UsageError(f"{path} is not JSON: {exc}") from exc
        messages = content if isinstance(content, list) else [content]
        if not messages:
            raise UsageError(f"{path} is an empty list: it needs a message")
        return messages
    if path.suffix == ".npy":
        import numpy

        try:
            return [numpy.load(path, allow_pickle=False)]
        except ValueError as exc:
            raise UsageError(f"{path} is no array: {exc}") from exc
    return [path.read_bytes()]


def _show(out: Out, found: Profile) -> None:
    out.table(
        ("OPERATOR", "CALLS", "TIME HERE", "WORK", "OUTPUT", "OUT PER IN"),
        (
            (
                operator.name,
                operator.calls,
                None
                if operator.seconds is None or operator.deviation is None
                else f"{duration(operator.seconds)} \u00b1 {duration(operator.deviation)}",
                duration(operator.work),
                size(operator.output_bytes),
                None if operator.selectivity is None else f"{operator.selectivity:.3g}",
            )
            for operator in found.operators
        ),
    )
    out.note(f"A core of this machine does {found.speed:.3g} reference-seconds of work per second.")


COMMANDS = (profile,)
