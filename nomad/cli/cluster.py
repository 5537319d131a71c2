"""`nomad nodes`, `nomad node`, `nomad links`, `nomad link set`, `nomad events`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from nomad import units
from nomad.cli.common import (
    Out,
    Quantity,
    clock,
    complete_pipelines,
    duration,
    estimate,
    rate,
    with_cluster,
)

if TYPE_CHECKING:
    from nomad.client import Cluster
    from nomad.master.views import EventView, LinkEstimatesView, LinkView


def _delay(value: object) -> float:
    seconds = units.seconds(value)
    if not 0 <= seconds <= units.LONGEST_DELAY:
        raise ValueError(f"{value!r} must be from 0 to 1h")
    return seconds


def _limit(value: object) -> float | str:
    if value == "unlimited":
        return "unlimited"
    limit = units.bytes_per_second(value)
    if not units.LEAST_BANDWIDTH <= limit <= units.MOST_BANDWIDTH:
        raise ValueError(f"{value!r} must be at least 8bit (a byte a second) and at most 8000Tbit, or `unlimited`")
    return limit


def _share(value: object) -> float:
    try:
        share = float(str(value))
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise ValueError(f"{value!r} must be a share from 0 to below 1, e.g. 0.01")
    return share


DELAY = Quantity("DURATION", _delay)
BANDWIDTH = Quantity("BANDWIDTH", _limit)
SHARE = Quantity("SHARE", _share)


@click.command()
@with_cluster
async def nodes(cluster: Cluster, out: Out) -> None:
    """List the nodes and what is placed on them."""
    found = await cluster.nodes()
    out.document(found)
    if not out.json:
        out.table(
            ("NODE", "STATE", "SPEED", "MEASURED", "CORES", "FREE", "MEMORY", "LABELS", "OPERATORS"),
            (
                (
                    node.id,
                    "ready" if node.ready else "lost",
                    f"{node.speed:g}",
                    estimate(node.estimates.speed, units.number),
                    f"{node.cores:g}",
                    estimate(node.estimates.cores_free, lambda cores: units.number(cores, 2)),
                    f"{node.memory_used_mb:.0f} of {node.memory_mb:.0f} MiB",
                    # Labels of Kubernetes' own have a domain; --json has them all.
                    ", ".join(label for label in node.labels if "/" not in label) or None,
                    ", ".join(node.operators) or None,
                )
                for node in found
            ),
        )


@click.group()
def node() -> None:
    """Let emulated nodes fail and come back."""


@node.command()
@click.argument("node", metavar="NODE")
@with_cluster
async def lose(cluster: Cluster, out: Out, node: str) -> None:
    """Let NODE fail: the processes on it are killed, and none is started there until it is restored."""
    view = await cluster.lose_node(node)
    out.document(view, text=f"Node {node} fails. Its operators are placed elsewhere, but those that are bound to it.")


@node.command()
@click.argument("node", metavar="NODE")
@with_cluster
async def restore(cluster: Cluster, out: Out, node: str) -> None:
    """Let NODE come back."""
    view = await cluster.restore_node(node)
    out.document(view, text=f"Node {node} comes back.")


@click.command(short_help="List the links between nodes.")
@with_cluster
async def links(cluster: Cluster, out: Out) -> None:
    """List the links between nodes: how they are emulated, and what is measured of them.

    What is only declared and hasn't been measured has a question mark.
    """
    _show_links(out, await cluster.links())


@click.group()
def link() -> None:
    """Change links between nodes."""


@link.command("set")
@click.argument("source", metavar="FROM")
@click.argument("target", metavar="TO")
@click.option("--latency", type=DELAY, help="One way, e.g. 80ms.")
@click.option("--jitter", type=DELAY, help="Around the latency, e.g. 5ms.")
@click.option("--bandwidth", type=BANDWIDTH, help="E.g. 10Mbit or 2MB/s, or `unlimited`.")
@click.option("--loss", type=SHARE, help="Share of frames that are lost and sent again, e.g. 0.01.")
@click.option("--both", is_flag=True, help="Set the way back as well.")
@with_cluster
async def link_set(
    cluster: Cluster,
    out: Out,
    source: str,
    target: str,
    latency: float | None,
    jitter: float | None,
    bandwidth: float | str | None,
    loss: float | None,
    both: bool,
) -> None:
    """Change how the link from node FROM to node TO is emulated, while pipelines run over it.

    What isn't given stays as it is. A link has a direction; the way back is a link of its own.
    """
    if all(value is None for value in (latency, jitter, bandwidth, loss)):
        raise click.UsageError("say what to change: --latency, --jitter, --bandwidth or --loss")
    ends = [(source, target), (target, source)] if both else [(source, target)]
    changed = [
        await cluster.set_link(a, b, latency=latency, jitter=jitter, bandwidth=bandwidth, loss=loss) for a, b in ends
    ]
    _show_links(out, changed)


@click.command(short_help="Show what happened.")
@click.argument("pipeline", required=False, shell_complete=complete_pipelines)
@click.option("-f", "--follow", is_flag=True, help="Go on with events as they happen.")
@click.option("-n", "--limit", type=click.IntRange(1, 10_000), default=50, show_default=True, help="How many to show.")
@with_cluster
async def events(cluster: Cluster, out: Out, pipeline: str | None, follow: bool, limit: int) -> None:
    """Show what happened, in the cluster or to one PIPELINE. With --json one event a line."""
    kept = await cluster.events(pipeline=pipeline, limit=limit)
    for event in kept:
        show_event(out, event, named=pipeline is None)
    if follow:
        async for event in cluster.follow_events(pipeline=pipeline, after=kept[-1].id if kept else 0):
            show_event(out, event, named=pipeline is None)


def show_event(out: Out, event: EventView, *, named: bool = True) -> None:
    """One event as a line. `named`: with the pipeline of an operator, where events of several are shown."""
    whose = f"{event.pipeline}: " if named and event.operator else ""
    out.item(event, f"{clock(event.time)}  {event.kind:<24} {whose}{event.message}")


def _show_links(out: Out, found: list[LinkView]) -> None:
    out.document(found)
    if not out.json:
        out.table(
            ("FROM", "TO", "LATENCY", "JITTER", "BANDWIDTH", "LOSS", "MEASURED LATENCY", "MEASURED BANDWIDTH"),
            (
                (
                    link.source,
                    link.target,
                    duration(link.latency),
                    duration(link.jitter),
                    rate(link.bandwidth),
                    f"{link.loss:g}",
                    _latency(link.estimates),
                    _bandwidth(link.estimates),
                )
                for link in found
            ),
        )


def _latency(known: LinkEstimatesView) -> str | None:
    shown = estimate(known.latency, duration)
    return f"{shown} (predicted)" if shown is not None and known.derived else shown


def _bandwidth(known: LinkEstimatesView) -> str | None:
    if known.bandwidth is None and known.reached is not None:
        return f"at least {rate(known.reached)}"
    return estimate(known.bandwidth, rate)


COMMANDS = (nodes, node, links, link, events)
