"""`nomad explain`: why a running pipeline is placed as it is."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from nomad import units
from nomad.cli.common import Out, clock, duration, pipeline_argument, with_cluster

if TYPE_CHECKING:
    from nomad.client import Cluster
    from nomad.master.views import ExplainView


@click.command(short_help="Say why a pipeline is placed as it is.")
@pipeline_argument
@click.option(
    "--problem", is_flag=True, help="Print its placement problem, as `nomad plan` takes it, and nothing else."
)
@with_cluster
async def explain(cluster: Cluster, out: Out, pipeline: str, problem: bool) -> None:
    """Say why each operator of PIPELINE is where it is, by what is measured now, and whether a move would pay."""
    handle = await cluster.pipeline(pipeline)
    if problem:
        click.echo(json.dumps(await handle.problem(), indent=2))
        return
    view = await handle.explain()
    out.document(view)
    if not out.json:
        _show(out, view)


def _show(out: Out, view: ExplainView) -> None:
    out.table(
        ("OPERATOR", "NODE", "TRANSFER", "PROCESSING", "QUEUEING", "FINISH", "MEASURED", "RUNNER-UP", "WHY NOT"),
        (
            (
                operator.name,
                operator.node,
                *(duration(operator.terms.get(term)) for term in ("transfer", "processing", "queueing")),
                duration(operator.finish),
                duration(operator.measured),
                operator.runner_up,
                "pinned" if operator.pinned else operator.why_not,
            )
            for operator in view.operators
        ),
    )
    out.note("")
    if view.predicted is None:
        out.note("As it is placed, not all operators can reach one another.")
    else:
        measured = "not measured yet" if view.measured is None else f"{duration(view.measured)} measured"
        pace = f"{units.number(view.rate, 4)} messages per second"
        out.note(f"Latency {duration(view.predicted)} predicted, {measured}, at {pace}.")
    if view.sustained < 1:
        out.note(f"By the model it keeps up with {view.sustained:.3g} of that rate only.")
    considered = view.considered
    if considered is not None:
        out.note(f"Looked at {clock(considered.time)} ({considered.cause}): {considered.text}.")
    out.note(
        f"{view.moves_left} moves left this hour." if view.moves else "Nomad moves none of its operators by itself."
    )


COMMANDS = (explain,)
