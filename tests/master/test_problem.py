"""What the master counts on when it makes a problem."""

from __future__ import annotations

from nomad.master.placing import place
from nomad.master.problem import Knowledge, build
from nomad.measure.book import Book
from nomad.runtime.base import NodeInfo
from nomad.scheduler.drift import Signal
from tests.master.worlds import wanted


def test_a_bandwidth_counts_once_several_samples_agree() -> None:
    book = Book()
    book.declare_link("a", "b", 0.0, latency=0.01, bandwidth=1e7)
    levels: dict[Signal, float] = {("bandwidth", (source, "b")): 2e6 for source in "ac"}
    knowledge = Knowledge(book, lambda signal: levels.get(signal))
    for k in range(3):
        for source in "ac":
            book.link_sample(source, "b", float(k), bandwidth=1e6)
    assert knowledge.link("a", "b") == (0.01, 1e7), "as declared"
    assert knowledge.link("c", "b") == (0.0, None), "not known to be limited"
    for source in "ac":
        book.link_sample(source, "b", 3.0, bandwidth=1e6)
    assert knowledge.link("a", "b") == (0.01, 2e6), "what drift counts on"
    assert knowledge.link("c", "b") == (0.0, 2e6)
    assert Knowledge(book).link("a", "b") == (0.01, 1e6), "what was measured"


def test_a_node_that_takes_no_new_operators_keeps_those_that_it_has() -> None:
    spec = wanted().spec
    closed = [NodeInfo(name, schedulable=False) for name in ("fog", "shut")]
    nodes = [NodeInfo("edge"), NodeInfo("cloud"), *closed]
    pins = {"source": "edge", "sink": "cloud"}

    def placed(**now: str) -> str:
        problem = build(spec, Knowledge(Book()), nodes, pins=pins, now=now)
        assert "shut" not in {node["id"] for node in problem["nodes"]}
        return place(problem).nodes["square"]

    assert placed() in ("edge", "cloud")
    known = Book()
    for end in ("edge", "cloud"):
        known.declare_link(end, "fog", 0.0, latency=0.0, bandwidth=None)
        known.declare_link("fog", end, 0.0, latency=0.0, bandwidth=None)
    known.declare_node("fog", 0.0, speed=1000.0)
    known.declare_operator("p", "square", 0.0, work=0.1, output_bytes=1.0)
    here = build(spec, Knowledge(known), nodes, pins=pins, now={"square": "fog"})
    assert place(here).nodes["square"] == "fog"
    other = build(spec, Knowledge(known), nodes, pins=pins, now={"source": "edge", "square": "cloud", "sink": "fog"})
    assert place(other).nodes["square"] != "fog"
    anywhere = build(spec, Knowledge(known), [NodeInfo(node.id) for node in nodes], pins=pins)
    assert not any("schedulable" in node["labels"] for node in anywhere["nodes"])
    assert place(anywhere).nodes["square"] == "fog"
