"""`nomad plan`: where a pipeline should be placed, asked by hand. Needs no master."""

from __future__ import annotations

import json
from typing import Any, TextIO

import click

from nomad import scheduler
from nomad.cli.common import Out, duration, json_option
from nomad.errors import PlacementError


@click.command(short_help="Place the operators of a problem in a file.")
@click.argument("problem", type=click.File(encoding="utf-8"))
@json_option
def plan(problem: TextIO, as_json: bool) -> None:
    """Place the operators that the file PROBLEM describes, and say why each is where it is.

    PROBLEM is JSON, `-` reads standard input: nodes, links, and one pipeline or several; docs/placement.md has the
    form. That there is no placement is an answer too, with the constraint that can't be met.
    """
    try:
        data = json.load(problem)
    except ValueError as exc:
        raise PlacementError(f"{problem.name} is not JSON: {exc}") from exc
    answer = scheduler.plan(data)
    out = Out(as_json)
    out.document(answer)
    if not as_json:
        _show(out, answer)


def _show(out: Out, answer: dict[str, Any]) -> None:
    reasons = answer["reasons"]
    if not answer["feasible"]:
        out.note(f"There is no placement ({reasons['constraint']}): {reasons['text']}.")
        for near in reasons["nearest"]:
            out.note(f"  {near['node']} lacks {near['lacks']}")
        return
    out.table(
        ("OPERATOR", "NODE", "TRANSFER", "PROCESSING", "QUEUEING", "FINISH", "WHY"),
        (
            (
                operator,
                reason["node"],
                *(duration(reason["terms"][term]) for term in ("transfer", "processing", "queueing")),
                duration(reason["finish"]),
                reason["text"],
            )
            for operator, reason in reasons.items()
        ),
    )
    best = "the least possible" if answer["proven"] else "the least that was found"
    out.note(f"Latency {duration(answer['latency'])}, {best}.")


COMMANDS = (plan,)
