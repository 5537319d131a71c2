"""What commands share: how they connect, how they print, and the parameters that people write by hand."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import click

from nomad.errors import NomadError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from nomad.client import Cluster
    from nomad.master.views import EstimateView

P = ParamSpec("P")
V = TypeVar("V")
Command = Callable[..., Any]
COMPLETION_TIMEOUT = 1.0
"""Seconds that a completion waits for the master; it isn't worth more."""


class PipelineFailed(NomadError):
    """A pipeline that a command waited for has failed."""


class MoveFailed(NomadError):
    """A move that a command waited for was rolled back, or never begun."""


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
master_option = click.option("--master", metavar="URL", help="Address of the master.")


class Out:
    """Where a command's results go: text for people, or JSON for programs, on standard output.

    One document per command, or one line of JSON per item of a stream.
    """

    def __init__(self, as_json: bool) -> None:
        self.json = as_json

    def document(self, data: Any, text: str | None = None) -> None:
        """The one result of a command; `text` is how people see it."""
        if self.json:
            click.echo(json.dumps(plain(data), indent=2))
        elif text is not None:
            click.echo(text)

    def item(self, data: Any, text: str) -> None:
        """One item of a stream."""
        click.echo(json.dumps(plain(data)) if self.json else text)

    def note(self, text: str) -> None:
        """For people only: what to try next."""
        if not self.json:
            click.echo(text)

    def table(self, headers: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """A table for people: cut to the width of the terminal, whole where there is none."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold")
        for header in headers:
            table.add_column(header, overflow="ellipsis", no_wrap=True, min_width=len(header))
        for row in rows:
            table.add_row(*(Text("-" if cell is None else str(cell)) for cell in row))
        console = Console(highlight=False, width=None if sys.stdout.isatty() else 10_000)
        with console.capture() as text:
            console.print(table)
        click.echo(text.get(), nl=False)


def plain(data: Any) -> Any:
    """`data` as JSON takes it: views as objects."""
    if isinstance(data, (list, tuple)):
        return [plain(item) for item in data]
    return dataclasses.asdict(data) if dataclasses.is_dataclass(data) and not isinstance(data, type) else data


def with_cluster(function: Callable[Concatenate[Cluster, Out, P], Coroutine[Any, Any, None]]) -> Command:
    """Make `function` a command's body: it gets a connected cluster, `Out`, and its own parameters."""

    @master_option
    @json_option
    @functools.wraps(function)
    def command(master: str | None, as_json: bool, *args: P.args, **kwargs: P.kwargs) -> None:
        from nomad.client import connect

        async def run() -> None:
            async with connect(master) as cluster:
                await function(cluster, Out(as_json), *args, **kwargs)

        asyncio.run(run())

    return command


class Quantity(click.ParamType[V]):
    """A number with a unit, such as 80ms or 10Mbit."""

    def __init__(self, name: str, parse: Callable[[object], V]) -> None:
        """`parse`: raises `ValueError` that says what would have been right."""
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> V:
        """The number in the dimension's own unit."""
        try:
            return self._parse(value)
        except ValueError as exc:
            self.fail(str(exc), param, ctx)


def complete_pipelines(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem | str]:
    """Ids of pipelines that begin like this; none when the master doesn't answer quickly."""
    return _completed(ctx, incomplete, lambda views: [view.id for view in views])


def complete_operators(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem | str]:
    """Names of the operators of the pipeline that is on the command line already."""
    pipeline = ctx.params.get("pipeline")
    return _completed(
        ctx, incomplete, lambda views: [op.name for view in views if view.id == pipeline for op in view.operators]
    )


def _completed(ctx: click.Context, incomplete: str, names: Callable[[Any], list[str]]) -> list[CompletionItem | str]:
    from nomad.client import connect

    try:
        found = names(asyncio.run(connect(ctx.params.get("master"), timeout=COMPLETION_TIMEOUT).pipelines()))
    except NomadError:
        return []
    return [name for name in found if name.startswith(incomplete)]


def pipeline_argument(function: Command) -> Command:
    """The argument PIPELINE, completed from what runs."""
    return click.argument("pipeline", shell_complete=complete_pipelines)(function)


def operator_argument(*, required: bool) -> Callable[[Command], Command]:
    """The argument OPERATOR, completed from the pipeline's operators."""
    return click.argument("operator", required=required, shell_complete=complete_operators)


def size(count: float | None) -> str:
    """Bytes for people: 12.3 MiB."""
    if count is None:
        return "-"
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def duration(seconds: float | None) -> str:
    """Seconds for people: 12.3 ms."""
    if seconds is None:
        return "-"
    if seconds == 0:
        return "0"
    for unit, factor in (("µs", 1e6), ("ms", 1e3)):
        if seconds * factor < 1000:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds < 999.5 else f"{seconds:.0f} s"


def rate(bytes_per_second: float | None) -> str:
    """Bandwidth for people, as links are declared: 10 Mbit/s."""
    if bytes_per_second is None:
        return "unlimited"
    bits = bytes_per_second * 8
    for unit in ("bit/s", "kbit/s", "Mbit/s"):
        if bits < 1000:
            return f"{bits:.3g} {unit}"
        bits /= 1000
    return f"{bits:.3g} Gbit/s"


def estimate(view: EstimateView | None, show: Callable[[float], str]) -> str | None:
    """What is measured, with its deviation; what is only declared or profiled has a question mark."""
    if view is None:
        return None
    return f"{show(view.value)} ± {show(view.deviation)}" if view.samples else f"{show(view.value)}?"


def clock(time: float) -> str:
    """A time of day, with the date when it isn't today's."""
    import datetime as dt

    moment = dt.datetime.fromtimestamp(time)
    today = moment.date() == dt.datetime.now().date()
    return moment.strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M:%S")
