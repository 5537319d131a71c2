"""The rules by which a move is decided, one by one; `tests/sim` has them all together."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace
from typing import Any

import pytest

from nomad.scheduler import drift
from nomad.scheduler.drift import History, Settings, Situation, Watch, decide, falls_behind, time_to_full
from nomad.scheduler.moves import Outlook
from tests.scheduler.problems import link, node


def problem(near: float = 0.005, *, rate: float = 10.0, work: float = 0.02, **operator: Any) -> dict[str, Any]:
    """From edge and back to it: `detect` takes 2 x `near` + work / 2 on fog, and 2 x 20 ms + work / 4 on cloud."""
    nodes = [node("edge", 0.1, 4, 1e3), node("fog", 2.0, 4, 1e3), node("cloud", 4.0, 4, 1e3)]
    ways = {("edge", "fog"): near, ("cloud", "edge"): 0.02, ("cloud", "fog"): 0.02}
    links = [link(x, y, seconds, 1e12) for (a, b), seconds in ways.items() for x, y in ((a, b), (b, a))]
    operators = [
        {"id": "source", "pin": "edge"},
        {"id": "detect", "work": work, "serial": True, **operator},
        {"id": "sink", "pin": "edge"},
    ]
    edges = [["source", "detect"], ["detect", "sink"]]
    return {
        "nodes": nodes,
        "links": links,
        "pipeline": {"id": "p", "rate": rate, "operators": operators, "edges": edges},
    }


def on(where: str) -> dict[str, str]:
    return {"source": "edge", "detect": where, "sink": "edge"}


def test_a_move_that_pays() -> None:
    decision = decide(Situation(problem(0.1), on("fog"), changes=["the latency changed"]), History(), 0.0)
    order = decision.order
    assert order is not None
    assert (order.operator, order.node, dict(order.target)) == ("detect", "cloud", on("cloud"))
    assert (order.before, order.after) == (pytest.approx(0.21), pytest.approx(0.045))
    assert order.reason == "210 ms per message become 45 ms; the latency changed"
    assert decision.text.startswith("moving detect to cloud: ")
    assert decision.latency == pytest.approx(0.21)


def test_nothing_better() -> None:
    decision = decide(Situation(problem(), on("fog")), History(), 0.0)
    assert decision.order is None
    assert decision.text == "no move leads to less than the 20 ms of now"
    alone = problem(pin="fog")
    assert decide(Situation(alone, on("fog")), History(), 0.0).text == "there is no other node for any operator"


def test_hysteresis() -> None:
    # cloud 45 ms, fog 10 + 2 near
    assert decide(Situation(problem(0.0182), on("fog")), History(), 0.0).order is None  # 1.4 ms
    assert decide(Situation(problem(0.0186), on("fog")), History(), 0.0).order is not None  # 2.2 ms
    assert decide(Situation(problem(0.0186), on("fog")), History(), 0.0, Settings(relative=0.1)).order is None
    assert decide(Situation(problem(0.0186), on("fog")), History(), 0.0, Settings(absolute=0.01)).order is None


def test_errors_of_the_estimates_make_it_careful() -> None:
    signal = ("latency", ("edge", "fog"))
    assert decide(Situation(problem(0.03), on("fog"), {signal: 0.001}), History(), 0.0).order is not None  # 25 ms
    decision = decide(Situation(problem(0.03), on("fog"), {signal: 0.006}), History(), 0.0)
    assert decision.order is None  # it is crossed twice, and two errors are allowed for
    assert "may be off by 24 ms" in decision.text
    elsewhere = ("latency", ("cloud", "fog"))
    assert decide(Situation(problem(0.03), on("fog"), {elsewhere: 1.0}), History(), 0.0).order is not None
    work = ("work", ("p", "detect"))
    assert decide(Situation(problem(0.03), on("fog"), {work: 0.06}), History(), 0.0).order is None


def test_a_gain_must_pay_for_the_move() -> None:
    seldom = problem(0.02, rate=0.01)  # 5 ms
    decision = decide(Situation(seldom, on("fog")), History(), 0.0)
    assert decision.order is None
    assert "less over 120 s than it costs" in decision.text
    queued = Situation(problem(0.02), on("fog"), queued={"detect": 5000})
    assert decide(queued, History(), 0.0).order is None  # all of them are worked on again


def test_dwell_and_budget() -> None:
    situation = Situation(problem(0.1), on("fog"))
    history = History(deque([100.0]))
    decision = decide(situation, history, 104.0)
    assert decision.order is None
    assert "next in 6 s" in decision.text
    assert decide(situation, history, 110.0).order is not None
    soon_full = Situation(problem(0.1), on("fog"), overloaded={"detect": 5.0})
    assert decide(soon_full, history, 104.0).order is not None
    begun = History(deque([100.0]), on("cloud"))
    assert decide(situation, begun, 101.0).order is not None  # what was begun is finished
    many = History(deque(float(at) for at in range(100, 1300, 100)))
    assert many.left(1300.0, drift.DEFAULT) == 0
    assert "12 moves per hour" in decide(situation, many, 1300.0).text
    assert many.left(3701.0, drift.DEFAULT) == 1
    history.finished(120.0)
    assert list(history.moved_at) == [120.0]


def test_where_heart_beats_are_rare_estimates_get_longer_to_settle() -> None:
    assert drift.DEFAULT.at_pace(0.5) == drift.DEFAULT.at_pace(2.0) == drift.DEFAULT
    assert drift.DEFAULT.at_pace(8.0) == replace(drift.DEFAULT, dwell=32.0, watch=32.0)


def test_an_operator_that_cannot_keep_up_moves_at_once() -> None:
    heavy = problem(0.001, rate=100.0, work=0.03)  # 3 reference-seconds per second: 1.5 times fog, 0.75 of cloud
    calm = decide(Situation(heavy, on("fog")), History(), 0.0)
    assert calm.order is None  # the model says so, but nothing that was seen confirms it
    assert calm.queueing == 0.0
    decision = decide(Situation(heavy, on("fog"), overloaded={"detect": 30.0}), History(), 0.0)
    assert decision.order is not None
    assert decision.order.node == "cloud"
    assert decision.queueing == pytest.approx(0.5 * drift.DEFAULT.horizon / 2)
    assert "detect can't keep up (its queue is full in 30 s)" in decision.order.reason


def test_several_moves_to_one_end() -> None:
    """Two operators with much between them: either alone across the slow link would be worse."""
    nodes = [node("a", 1.0, 8, 1e3), node("b", 4.0, 8, 1e3)]
    links = [link("a", "b", 0.01, 1e7), link("b", "a", 0.01, 1e7)]
    operators = [
        {"id": "source", "pin": "a"},
        {"id": "x", "work": 0.05, "output_bytes": 1e6},
        {"id": "y", "work": 0.05, "output_bytes": 10},
        {"id": "sink", "pin": "a"},
    ]
    edges = [["source", "x"], ["x", "y"], ["y", "sink"]]
    form = {
        "nodes": nodes,
        "links": links,
        "pipeline": {"id": "p", "rate": 5.0, "operators": operators, "edges": edges},
    }
    now = {"source": "a", "x": "a", "y": "a", "sink": "a"}
    outlook = Outlook(form, now, horizon=120.0)
    assert outlook.singles()[0].worth.total > outlook.now.total
    decision = decide(Situation(form, now), History(), 0.0)
    assert decision.order is not None
    assert dict(decision.order.target) == {**now, "x": "b", "y": "b"}
    assert decision.order.after == pytest.approx(0.045, rel=1e-3)
    assert f"once {({'x', 'y'} - {decision.order.operator}).pop()} is on b" in decision.order.reason


def test_memory_is_a_limit_that_no_move_breaks() -> None:
    form = problem(0.1, memory_mb=512)
    form["nodes"][2]["memory_mb"] = 256
    decision = decide(Situation(form, on("fog")), History(), 0.0)
    assert decision.order is None
    form["nodes"][1]["memory_mb"] = 256  # too full already; away from there is allowed
    form["nodes"][2]["memory_mb"] = 512
    assert decide(Situation(form, on("fog")), History(), 0.0).order is not None


def test_a_placement_that_is_not_possible_is_left() -> None:
    form = problem()
    form["links"] = [way for way in form["links"] if {way["from"], way["to"]} != {"edge", "fog"}]
    decision = decide(Situation(form, on("fog")), History(), 0.0)
    assert decision.order is not None
    assert (decision.order.node, decision.order.before, decision.latency) == ("cloud", None, None)


def test_when_to_look() -> None:
    watch, nodes = Watch(), frozenset({"a", "b"})

    def cause(now: float, **given: Any) -> str | None:
        seen = {"changed": False, "overloaded": False, "settled": True, "nodes": nodes, **given}
        return watch.cause(now, drift.DEFAULT, **seen)

    assert cause(0.0, settled=False, changed=True) is None  # too little is known
    assert cause(0.0, settled=False, overloaded=True) == "overload"
    assert cause(0.0) == "settled"
    watch.looked(0.0, settled=True, nodes=nodes)
    assert cause(1.0) is None
    assert cause(1.0, settled=False, changed=True) == "change"
    assert cause(1.0, overloaded=True) is None
    assert cause(2.0, overloaded=True) == "overload"
    assert cause(1.0, nodes=nodes | {"c"}) == "node-new"
    assert cause(1.0, nodes=frozenset({"a"})) is None
    assert cause(30.0) == "interval"


def test_queues() -> None:
    assert time_to_full(100.0, 10.0, 600.0) == 50.0
    assert time_to_full(700.0, 10.0, 600.0) == 0.0
    assert time_to_full(100.0, -1.0, 600.0) == math.inf
    assert falls_behind(1.0, 100.0, 50.0, 100.0)
    assert not falls_behind(0.5, 100.0, 50.0, 100.0)  # it has time left
    assert not falls_behind(1.0, 100.0, 150.0, 100.0)  # it catches up
    assert not falls_behind(1.0, 100.0, 100.0, 10.0)  # a tenth of a second behind
