"""What the master does so that a large cluster doesn't cost it more than it must."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nomad.master import judge, replan, show
from nomad.master.judge import Judge, Scene
from nomad.master.loop import Loop
from nomad.master.moves import MoveLog
from nomad.master.problem import MOST_NODES, Claims, Knowledge, Placed, build, claims
from nomad.master.replan import BURST, ROUND, SHARE, Allowance, Replanner
from nomad.master.state import Desired, DesiredPipeline, Observed
from nomad.measure.book import Book
from nomad.pipeline import Kind, OperatorSpec, PipelineSpec
from nomad.runtime.base import NodeInfo
from nomad.settings import Windows
from tests.clock import VirtualClock
from tests.master.worlds import wanted as wanted_pipeline

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


def step(book: Book, one: str, other: str) -> None:
    """The latency between two nodes changes."""
    for number in range(20):
        book.link_sample(one, other, float(number), round_trip=0.01 if number < 15 else 0.1)


def test_of_many_nodes_a_change_concerns_those_who_are_there() -> None:
    book = Book()
    mine = Judge(book, Windows())
    step(book, "n3", "n4")
    found = mine.listen()
    assert found.concern("p", ["n7", "n4"])
    assert not found.concern("p", ["n7", "n8"])
    assert not mine.listen().nodes, "it is said once"
    for nodes, concerned in ((NODES, {"n3"}), (NODES[:20], {"n3", "n5"})):
        for node in ("n3", "n5"):
            scene = Scene(spec(), {"source": "n0", "work": node, "sink": "n0"}, {}, tuple(nodes))
            assert any(True for _ in mine._changed(scene, 20.0)) == (node in concerned)


def test_what_others_take_is_not_worked_out_at_every_look(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def noted(placed: Placed, knowledge: Knowledge) -> Claims:
        asked.append(placed.spec.id)
        return claims(placed, knowledge)

    monkeypatch.setattr(judge, "claims", noted)
    mine, book = Judge(Book(), Windows(), pace=lambda: 16.0), Book()
    at = {"source": "n0", "work": "n1", "sink": "n2"}
    others = {f"q{number}": Placed(replace(spec(memory_mb=100.0), id=f"q{number}"), dict(at)) for number in range(20)}

    def memory(now: float, node: str) -> float:
        scene = Scene(spec(), at, {}, tuple(NODES[:5]), tuple(others.values()))
        problem = mine.situation(scene, now).problem
        fresh = build(spec(), Knowledge(book), NODES[:5], pins={}, others=others.values(), now=at)
        assert problem["nodes"] == fresh["nodes"], "as if it were worked out now"
        return next(float(found["used_memory_mb"]) for found in problem["nodes"] if found["id"] == node)

    assert memory(0.0, "n1") == 2000.0
    assert memory(15.0, "n1") == 2000.0
    assert sorted(asked) == sorted(others)
    asked.clear()
    others["q3"] = Placed(others["q3"].spec, {**at, "work": "n3"})
    assert memory(15.0, "n1") == 1900.0
    assert asked == ["q3"], "it has moved"
    others["q4"] = Placed(replace(others["q4"].spec), at)
    asked.clear()
    memory(15.0, "n1")
    assert asked == ["q4"], "another one of the same name"
    asked.clear()
    memory(16.0, "n1")
    assert sorted(asked) == sorted(others.keys() - {"q3", "q4"}), "there may be news"


def planner(book: Book, desired: Desired, clock: VirtualClock | None = None) -> Replanner:
    return Replanner(
        Judge(book, Windows()), desired=desired, observed=Observed(), loop=cast(Loop, None), moves=cast(MoveLog, None),
        heard=asyncio.Event(), clock=clock or VirtualClock(),
    )  # fmt: skip


def test_pipelines_take_turns_and_where_something_changed_sooner() -> None:
    book, desired = Book(), Desired(pipelines={f"p{number}": wanted_pipeline(f"p{number}") for number in range(10)})
    replanner = planner(book, desired)

    def looked_at(count: int) -> list[str]:
        replanner._listen()
        return [id for (id, _), _ in zip(replanner._in_turn(), range(count), strict=False)]

    every = looked_at(10)
    assert sorted(every) == sorted(desired.pipelines)
    assert looked_at(11) == every, "each once"
    for number in range(20):
        book.node_sample("cloud", float(number), speed=1.0)
        for id in every[7:9]:
            value = 0.01 if number < 15 else 0.1
            book._note("work", (id, "square"), value, float(number))
    order = looked_at(4)
    assert set(every[7:9]) < set(order), "they are looked at sooner"
    assert set(every[:2]) < set(order), "and keep nobody from their turn"
    del desired.pipelines[every[9]]
    assert set(looked_at(9)) == set(every[:9])


async def test_however_long_listening_takes_there_are_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes more than the share of looking here, all the time."""
    clock = VirtualClock()
    replanner = planner(Book(), Desired(pipelines={"p": wanted_pipeline("p")}), clock)
    now, rounds, looks = 0.0, 0, 0

    def listen() -> None:
        nonlocal now, rounds
        now, rounds = now + 2 * SHARE * ROUND, rounds + 1
        replanner._turn.extend({"p"} - {*replanner._turn})
        replanner._heard.set()

    async def look(id: str, wanted: DesiredPipeline) -> bool:
        nonlocal now, looks
        with replanner._allowance.taken():
            now, looks = now + SHARE * ROUND, looks + 1
        return True

    monkeypatch.setattr(replan, "time", SimpleNamespace(thread_time=lambda: now))
    monkeypatch.setattr(replanner, "_listen", listen)
    monkeypatch.setattr(replanner, "_look", look)
    replanner._heard.set()
    running = asyncio.create_task(replanner.run())
    async with asyncio.timeout(30):
        while rounds < 2000:
            await clock.advance(ROUND)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert looks > 0.9 * rounds


async def test_what_changed_while_an_operator_started_is_looked_at_after_that(monkeypatch: pytest.MonkeyPatch) -> None:
    desired = Desired(pipelines={"p": wanted_pipeline("p"), "q": wanted_pipeline("q")})
    replanner = planner(Book(), desired)
    monkeypatch.setattr(replanner, "_runs", lambda id, wanted: False)
    replanner._listen()
    replanner._changed["p"] = None
    await replanner._look_at_all()
    assert not replanner._changed
    replanner._listen()
    assert list(replanner._changed) == ["p"], "it is still to be looked at, and what hasn't changed isn't"
