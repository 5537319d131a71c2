"""`nomad up`: a cluster on this machine, until Ctrl-C."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nomad.cli.cluster import show_event
from nomad.cli.common import Out, json_option
from nomad.credentials import DEFAULT_MASTER, LOOPBACK_NAMES

if TYPE_CHECKING:
    from nomad.master.serve import Served
    from nomad.master.views import EventView
    from nomad.settings import Settings
    from nomad.topology import Topology

TRANSPORTS = ("unix", "tcp", "zmq+ipc", "zmq+tcp")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StateFolder(click.Path):
    """A folder with a name: an empty one, from a variable that isn't set, would be the present folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path."""
        if value == "":
            self.fail("the name of the folder is empty", param, ctx)
        return super().convert(value, param, ctx)


@click.command(short_help="Run a cluster on this machine.")
@click.option("--node", "names", metavar="NAME", multiple=True, help="A node of the cluster; can be repeated.")
@click.option(
    "--topology",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Nodes with speed, cores, memory and labels, and the links between them, in YAML.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen.")
@click.option("--port", type=click.IntRange(0, 65535), default=30_000, show_default=True, help="0 takes any free one.")
@click.option(
    "--state",
    metavar="DIR",
    type=StateFolder(file_okay=False, path_type=Path),
    help="Where pipelines are kept.  [default: NOMAD_STATE_DIR, else the user's state folder]",
)
@click.option("--transport", type=click.Choice(TRANSPORTS), help="How operators talk to each other.  [default: unix]")
@click.option("-q", "--quiet", is_flag=True, help="Don't show what happens.")
@json_option
def up(
    names: tuple[str, ...],
    topology: Path | None,
    host: str,
    port: int,
    state: Path | None,
    transport: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Run a cluster on this machine until Ctrl-C: a master, and nodes whose speed and links are emulated.

    \b
    nomad up --node edge --node cloud
    nomad up --topology cluster.yaml

    Pipelines are kept in the state folder, and run again with the next `nomad up`. With --json one line of JSON says
    that the cluster is ready, and each line after it is an event.
    """
    from nomad import topology as topologies
    from nomad.settings import Settings

    if names and topology is not None:
        raise click.UsageError("--node and --topology exclude each other")
    cluster = topologies.from_names(names) if topology is None else topologies.load(topology)
    settings = Settings.from_environment(state=state)
    settings = replace(settings, rest=replace(settings.rest, host=host, port=port))
    if transport is not None:
        settings = replace(settings, pods=replace(settings.pods, transport=transport))
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")

    from nomad.actor.threads import new_loop

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(_run(settings, cluster, Out(as_json), quiet=quiet))


async def _run(settings: Settings, topology: Topology, out: Out, *, quiet: bool) -> None:
    from nomad import credentials
    from nomad.master.serve import serve

    over = asyncio.Event()
    loop = asyncio.get_running_loop()
    # nohup means its ignored SIGHUP; a shell that starts a job with `&` doesn't mean its ignored SIGINT for ever.
    heard = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]
    for number in heard:
        loop.add_signal_handler(number, over.set)
    async with serve(settings, topology) as served:
        credentials.save(credentials.master_url(served.url), served.token, served.signing_key)
        happened = served.master.subscribe_events()
        _announce(served, settings, topology, out)
        printer = asyncio.create_task(_print_events(happened, out, quiet=quiet), name="print events")
        await over.wait()
        for number in heard:
            loop.remove_signal_handler(number)  # a second Ctrl-C doesn't wait for anything
        printer.cancel()
        await asyncio.wait([printer])
        out.note("Stopping ...")
    out.note(f"Stopped. Pipelines are kept in {settings.state} and run again with the next `nomad up`.")


def _announce(served: Served, settings: Settings, topology: Topology, out: Out) -> None:
    names = [node.id for node in topology.nodes]
    if settings.rest.host not in LOOPBACK_NAMES:
        click.echo(
            f"{click.style('Warning:', fg='yellow')} this listens on {settings.rest.host}: who reaches the port and "
            "has the token can run code on this machine, and the token travels unencrypted",
            err=True,
        )
    master = "" if served.url == DEFAULT_MASTER else f" --master {served.url}"
    out.item(
        {"url": served.url, "nodes": names, "state": str(settings.state)},
        f"Nomad is ready at {served.url}\n"
        f"  nodes: {', '.join(names)}\n"
        f"  state: {settings.state}\n"
        f"  try:   nomad submit FILE --start {names[0]} --end {names[-1]}{master}\n"
        "  Ctrl-C stops it.",
    )


async def _print_events(happened: AsyncIterator[EventView], out: Out, *, quiet: bool) -> None:
    async for event in happened:
        if not quiet:
            try:
                show_event(out, event)
            except OSError:  # nobody reads any more, or the disk is full; the cluster goes on
                return
