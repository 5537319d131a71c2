"""What the master does so that a large cluster doesn't cost it more than it must."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nomad.master import show
from nomad.master.problem import MOST_NODES, Knowledge, Placed, build
from nomad.master.replan import BURST, SHARE, Allowance
from nomad.master.state import Desired, Observed
from nomad.measure.book import Book
from nomad.pipeline import Kind, OperatorSpec, PipelineSpec
from nomad.runtime.base import NodeInfo
from tests.clock import VirtualClock

NODES = [NodeInfo(id=f"n{number}", cores=4, memory_mb=4096.0, labels=frozenset({"edge"})) for number in range(300)]


def spec(**options: Any) -> PipelineSpec:
    plain = OperatorSpec(name="source", kind=Kind.PERIODIC, interval=1.0)
    work = replace(OperatorSpec(name="work", kind=Kind.FUNCTION), **options)
    sink = OperatorSpec(name="sink", kind=Kind.FUNCTION)
    return PipelineSpec("p", (plain, work, sink), (("source", "work"), ("work", "sink")), "n0", "n299")


def problem(
    wanted: PipelineSpec, nodes: list[NodeInfo], book: Book | None = None, others: Sequence[Placed] = ()
) -> set[str]:
    pins = {"source": "n0", "sink": "n299"}
    made = build(wanted, Knowledge(book or Book()), nodes, pins=pins, others=others)
    assert len(made["links"]) == len(made["nodes"]) * (len(made["nodes"]) - 1)
    return {node["id"] for node in made["nodes"]}


def test_a_problem_has_some_of_many_nodes() -> None:
    found = problem(spec(), NODES)
    assert MOST_NODES <= len(found) <= MOST_NODES + 3
    assert {"n0", "n299"} <= found


def test_those_that_have_what_is_required_are_among_them() -> None:
    nodes = [replace(node, labels=frozenset({"gpu"})) if node.id in ("n150", "n250") else node for node in NODES]
    assert {"n150", "n250"} <= problem(spec(requires=frozenset({"gpu"})), nodes)


def test_those_that_are_near_the_ends_are_among_them() -> None:
    book = Book()
    for node in NODES:
        for end in ("n0", "n299"):
            book.declare_link(end, node.id, 0.0, latency=0.001 if node.id == "n200" else 0.05)
    assert "n200" in problem(spec(), NODES, book)


def test_those_that_are_full_are_left_out() -> None:
    other = replace(spec(memory_mb=4000.0), id="q")
    placed = [
        Placed(replace(other, id=f"q{n}"), {"source": "n0", "work": f"n{n}", "sink": "n299"}) for n in range(1, 200)
    ]
    found = problem(spec(memory_mb=512.0), NODES, others=placed)
    assert found - {"n0", "n299"} <= {f"n{number}" for number in range(200, 300)}


def test_of_many_links_those_that_are_known_are_shown() -> None:
    observed, book = Observed(), Book()
    observed.nodes = {node.id: node for node in NODES}
    book.link_sample("n1", "n2", 1.0, round_trip=0.01)
    book.link_sample("n3", "gone", 1.0, round_trip=0.01)
    shown = {(link.source, link.target) for link in show.links(Desired(), observed, book, 2.0)}
    assert shown == {("n1", "n2"), ("n2", "n1")}


def test_looking_at_pipelines_keeps_to_its_share() -> None:
    clock = VirtualClock()
    allowance = Allowance(clock)
    allowance.take(BURST - 0.1)
    assert not allowance.pause()
    allowance.take(0.2)
    assert abs(allowance.pause() - 0.1 / SHARE) < 1e-9
