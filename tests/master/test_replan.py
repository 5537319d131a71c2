"""A master that hears what is measured moves an operator when that pays, and says why."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nomad import scheduler
from nomad.errors import InvalidRequestError
from nomad.master.judge import Judge
from nomad.master.views import MoveState, MoveView
from nomad.measure.book import Book
from nomad.runtime.base import NodeInfo
from nomad.scheduler.drift import Decision
from nomad.settings import Windows
from tests.master.fakepods import Cluster

SPEEDS = {"edge": 0.2, "fog": 4.0, "cloud": 8.0}
PROFILE = [
    {"cloud_execution_time": work, "output_msg_size": 100.0} for work in (0.0001, 0.01, 0.0001)
]  # fmt: skip


def node(id: str, **other: float) -> NodeInfo:
    values = {"speed": SPEEDS[id], "cores": 4.0, "memory_mb": 1024.0} | other
    return NodeInfo(id, values["speed"], values["cores"], values["memory_mb"], "x86_64", frozenset(), "3.11")


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    cluster = Cluster(tmp_path / "state", [node(id) for id in SPEEDS])
    yield cluster
    await cluster.runtime.shutdown()


class Life:
    """Heart-beats of a pipeline that works off 50 messages a second, and round trips of all links."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.done = 0
        self.latency = {("edge", "cloud"): 0.005, ("edge", "fog"): 0.005, ("fog", "cloud"): 0.005}

    async def on(self, seconds: float) -> None:
        """Let it go on."""
        cluster, master = self.cluster, self.cluster.master
        for _ in range(int(seconds * 2)):
            self.done += 25
            for op, work in zip(master.pipeline("p").operators, (0.0001, 0.01, 0.0001), strict=True):
                received = 0 if op.name == "source" else self.done
                busy = self.done * work / SPEEDS[op.node]
                counts = {"received": received, "processed": self.done, "emitted": self.done, "latency_p50": 0.0125}
                cluster.pods[op.pod].beat(**counts, busy_seconds=busy, sent_bytes=self.done * 100)
            for (a, b), latency in self.latency.items():
                master._parts.book.link_sample(a, b, cluster.clock.now(), round_trip=2 * latency)
            await cluster.clock.advance(0.5)
            await cluster.until(lambda: not master._parts.observer.heard.is_set(), passing=0.05)


async def submitted(cluster: Cluster, **options: object) -> Life:
    await cluster.submit(profile=PROFILE, **options)
    await cluster.until(lambda: cluster.phase() == "running")
    return Life(cluster)


async def test_a_step_moves_an_operator_and_explain_says_why(cluster: Cluster) -> None:
    async with cluster.run() as master:
        life = await submitted(cluster)
        assert cluster.operator("square").node == "cloud"
        await life.on(20)
        assert master.moves("p") == []
        life.latency["edge", "cloud"] = 0.1
        while not master.moves("p"):
            await life.on(0.5)
        (move,) = master.moves("p")
        assert (move.operator, move.source, move.target, move.cause) == ("square", "cloud", "fog", "drift")
        assert "the latency between cloud and edge went from 5" in move.reason
        assert move.predicted_latency_before == pytest.approx(0.1018, abs=1e-3)
        assert move.predicted_latency_after == pytest.approx(0.0130, abs=1e-3)
        ordered = next(event for event in master.events("p") if event.kind == "move.ordered")
        assert set(ordered.data["terms"]) == {"input", "transfer", "processing", "queueing"}
        assert ordered.data["runner_up"] == "cloud"
        await cluster.until(lambda: cluster.operator("square").node == "fog", passing=0.1)

        view = await master.explain("p")
        square = view.operators[1]
        assert (square.node, square.runner_up, square.pinned) == ("fog", "cloud", False)
        assert square.finish == pytest.approx(sum(square.terms.values()))
        assert "on cloud the latency would be" in square.why_not
        assert (view.predicted, view.measured) == (pytest.approx(0.0130, abs=1e-3), 0.0125)
        assert view.considered is not None
        assert view.considered.move == "square to fog"
        assert (view.moves, view.moves_left) == (True, 11)


async def test_moves_count_for_the_next_master_too(cluster: Cluster) -> None:
    async with cluster.run(killed=True) as master:
        life = await submitted(cluster)
        await life.on(20)
        life.latency["edge", "cloud"] = 0.1
        while not master.moves("p"):
            await life.on(0.5)
        await cluster.until(lambda: master.moves("p")[0].state.final, passing=0.1)
        (move,) = master.moves("p")
        await master._parts.moves.save(move.id)  # it is written down by now, or soon
        assert move.finished is not None
        finished = move.finished + cluster.clock.now() - cluster.clock.wall()
    async with cluster.run() as master:
        await cluster.until(lambda: cluster.phase() == "running")
        assert (await master.explain("p")).moves_left == 11
        history = master._parts.replanner._judge.case("p").history
        assert list(history.moved_at) == pytest.approx([finished], abs=1e-3)


def test_of_earlier_moves_those_of_the_last_hour_count_that_were_not_asked_for() -> None:
    def moved(cause: str, asked: float, finished: float | None) -> MoveView:
        return MoveView("m", "p", "square", "a", "b", cause, "", MoveState.DONE, asked, finished=finished)

    judge = Judge(Book(), Windows())
    moves = [
        moved("drift", 1000.0, 1010.0),
        moved("settled", 5000.0, 5010.0),
        moved("user", 5100.0, 5110.0),
        moved("drain", 5200.0, 5210.0),
        moved("drift", 5300.0, None),  # it is under way
        moved("drift", 5400.0, 9000.0),  # by the clock of another machine
    ]
    judge.restore("p", moves, now=100.0, wall=5500.0)
    history = judge.case("p").history
    assert list(history.moved_at) == [-390.0, -100.0, 100.0]
    assert history.left(100.0, judge.settings) == judge.settings.budget - 3


async def test_it_stays_where_it_is_when_moves_are_off(cluster: Cluster) -> None:
    async with cluster.run() as master:
        life = await submitted(cluster)
        await master.change("p", moves=False)
        await life.on(10)
        life.latency["edge", "cloud"] = 0.1
        await life.on(10)
        assert master.moves("p") == []
        view = await master.explain("p")
        assert (view.moves, view.considered) == (False, None)
        assert view.operators[1].runner_up_latency < view.predicted  # what it would gain is said all the same


async def test_nothing_is_done_while_nothing_is_heard(cluster: Cluster) -> None:
    async with cluster.run() as master:
        life = await submitted(cluster)
        await life.on(10)
        newest = master._parts.book.newest
        before = (await master.explain("p")).considered
        await cluster.clock.advance(100)
        assert master._parts.book.newest == newest
        assert (await master.explain("p")).considered == before


async def test_a_live_problem_can_be_planned_again(cluster: Cluster) -> None:
    async with cluster.run() as master:
        life = await submitted(cluster)
        await life.on(10)
        problem = master.problem("p")
        assert problem["pipeline"]["rate"] == pytest.approx(50, rel=0.1)
        works = {op["id"]: op["work"] for op in problem["pipeline"]["operators"]}
        assert works["square"] == pytest.approx(0.01, rel=0.02)
        link = next(way for way in problem["links"] if (way["from"], way["to"]) == ("edge", "fog"))
        assert link["latency"] == pytest.approx(0.005)
        answer = scheduler.plan(problem)
        assert answer["placement"] == {op.name: op.node for op in master.pipeline("p").operators}
        await cluster.submit("q", profile=PROFILE)
        taken = {each["id"]: each["used_cpu"] for each in master.problem("q")["nodes"]}
        assert taken["cloud"] == pytest.approx(0.505, rel=0.1)  # square and sink of p


async def test_changes_by_hand_are_not_known_before_they_are_measured(cluster: Cluster) -> None:
    async with cluster.run() as master:
        await submitted(cluster)
        await master.set_link("edge", "cloud", latency=0.5)
        await master.update_node("cloud", speed=0.01)
        problem = master.problem("p")
        assert next(way for way in problem["links"] if (way["from"], way["to"]) == ("edge", "cloud"))["latency"] == 0
        assert {each["id"]: each["speed"] for each in problem["nodes"]} == SPEEDS


async def test_what_is_refused_says_why_and_what_to_do(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "state", [node(id, memory_mb=100.0) for id in SPEEDS])
    async with cluster.run() as master:
        with pytest.raises(InvalidRequestError) as refused:
            await cluster.submit(pins={"square": "edge"})
        text = str(refused.value)
        assert "edge" in text
        assert "Stop another pipeline, ask for less with @operator(memory=...), or add a node" in text
        assert refused.value.problem["constraint"] == "memory"
        assert refused.value.problem["nearest"][0]["node"] == "edge"
        assert master.pipelines() == []


async def test_more_than_the_cluster_can_do_runs_under_back_pressure(cluster: Cluster) -> None:
    async with cluster.run():
        heavy = [{"cloud_execution_time": 0.0}, {"cloud_execution_time": 50.0}, {"cloud_execution_time": 0.0}]
        view = await cluster.submit(profile=heavy)
        assert cluster.operator("square").node == "cloud"
        assert any("back-pressure" in warning for warning in view.warnings)


async def test_another_pipeline_of_the_same_name_is_judged_by_itself(cluster: Cluster) -> None:
    async with cluster.run() as master:
        life = await submitted(cluster)
        await life.on(20)
        life.latency["edge", "cloud"] = 0.1
        while not master.moves("p"):
            await life.on(0.5)
        await cluster.until(lambda: cluster.operator("square").node == "fog", passing=0.1)
        await life.on(1)
        removal = asyncio.create_task(master.remove("p"))
        await cluster.until(removal.done, passing=0.1)
        await removal
        light = [{"cloud_execution_time": 0.001, "output_msg_size": 5.0} for _ in PROFILE]
        await cluster.submit(profile=light)
        problem = master.problem("p")
        assert [(op["work"], op["output_bytes"]) for op in problem["pipeline"]["operators"]] == [(0.001, 5.0)] * 3
        assert problem["pipeline"]["rate"] == 1.0
        view = await master.explain("p")
        assert (view.considered, view.moves_left) == (None, 12)


async def test_a_mistake_of_the_decision_ends_nothing_and_is_said_once(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with cluster.run() as master:
        life = await submitted(cluster)
        await life.on(20)
        decide = Judge.decide

        def mistaken(*args: object) -> Decision:
            raise ZeroDivisionError("of nothing")

        monkeypatch.setattr(Judge, "decide", mistaken)
        life.latency["edge", "cloud"] = 0.1
        await life.on(5)
        assert [r.message for r in caplog.records if "replanned" in r.message] == [
            "p isn't replanned: ZeroDivisionError: of nothing"
        ]
        monkeypatch.setattr(Judge, "decide", decide)
        while not master.moves("p"):
            await life.on(0.5)
