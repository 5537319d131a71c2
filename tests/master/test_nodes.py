"""Nodes that are lost and come back: what ran there runs elsewhere at once, what is bound to them waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from nomad import bundle, pipeline
from nomad.errors import ConflictError, InvalidRequestError, NotFoundError, StateError
from nomad.master.rehome import Homes
from nomad.master.sqlite import SqliteStore
from nomad.master.state import DesiredPipeline
from nomad.master.views import MoveState, PlacementView
from nomad.runtime.base import NodeInfo
from tests.master.fakepods import OPERATORS, Cluster
from tests.master.test_moves import THREE, settled

NOTICED = 1.0
"""Virtual seconds within which a lost node is noticed; the promise is 3."""


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    cluster = Cluster(tmp_path / "state", THREE)
    yield cluster
    await cluster.runtime.shutdown()


async def submit_in_the_middle(cluster: Cluster) -> None:
    """square alone on fog."""
    middle = [OPERATORS[0], pipeline.operator(OPERATORS[1], requires={"gpu"}), OPERATORS[2]]
    cluster.runtime._nodes = [THREE[0], NodeInfo("fog", labels=frozenset({"gpu"})), NodeInfo("cloud")]
    cluster.master._parts.observer.nodes(cluster.runtime.nodes)
    data = bundle.make(pipeline.build(middle), cluster.master.signing_key)
    await cluster.master.submit(data, id="p", start="edge", end="cloud")
    await cluster.until(lambda: cluster.phase() == "running")
    assert cluster.operator("square").node == "fog"
    cluster.runtime._nodes = [NodeInfo(id, labels=frozenset({"gpu"})) for id in ("edge", "fog", "cloud")]
    await cluster.clock.advance(NOTICED)


async def test_what_ran_on_a_lost_node_runs_elsewhere_at_once(cluster: Cluster) -> None:
    async with cluster.run() as master:
        await submit_in_the_middle(cluster)
        before = cluster.clock.now()
        view = await master.lose_node("fog")
        assert view.id == "fog"
        await cluster.until(lambda: cluster.operator("square").node != "fog", passing=0.05)
        await settled(cluster)
        assert cluster.clock.now() - before <= NOTICED + 2.0
        assert not master.node("fog").ready
        square = cluster.operator("square")
        assert cluster.pods[square.pod].spec.node == square.node == square.placement.node
        kinds = cluster.kinds()
        assert kinds.index("node.lost") < kinds.index("operator.rehomed")
        assert master.node("fog").operators == []


async def test_a_new_master_starts_it_where_it_went(cluster: Cluster) -> None:
    async with cluster.run(killed=True) as master:
        await submit_in_the_middle(cluster)
        await master.lose_node("fog")
        await cluster.until(lambda: cluster.operator("square").node != "fog", passing=0.05)
        await settled(cluster)
        node = cluster.operator("square").node
    async with cluster.run():
        await settled(cluster)
        assert cluster.operator("square").node == node


async def test_a_new_master_keeps_lost_what_was_lost(cluster: Cluster) -> None:
    for lost in (True, False):
        async with cluster.run() as master:
            await (master.lose_node if lost else master.restore_node)("fog")
        cluster.runtime.restore_node("fog")  # what pretends to be machines ends with the master
        async with cluster.run() as master:
            assert master.node("fog").ready is not lost
            assert master.node("edge").ready


async def test_a_loss_that_cannot_be_kept_does_not_happen(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(key: str, value: bytes) -> None:
        raise StateError("the disk is full")

    async with cluster.run() as master:
        with monkeypatch.context() as patch:
            patch.setattr(master._parts.store, "set_meta", full)
            with pytest.raises(StateError):
                await master.lose_node("fog")
        assert master.node("fog").ready
        assert not master._parts.desired.lost


async def test_what_is_bound_to_a_lost_node_waits_for_it(cluster: Cluster) -> None:
    async with cluster.run() as master:
        await cluster.submit_and_run()
        await master.lose_node("cloud")
        await cluster.until(
            lambda: "its node cloud is lost, and it is bound to it" in cluster.operator("sink").reason, passing=0.1
        )
        assert cluster.phase() == "degraded"
        assert "is lost" in master.pipeline("p").reason
        started = len([pod for pod in cluster.runtime.started if "sink" in pod])
        await cluster.clock.advance(60.0)
        assert len([pod for pod in cluster.runtime.started if "sink" in pod]) == started
        await master.restore_node("cloud")
        await cluster.until(lambda: cluster.phase() == "running", passing=0.1)
        assert master.node("cloud").ready
        assert "node.ready" in cluster.kinds()


async def test_where_there_is_no_other_node_it_waits_and_says_why(cluster: Cluster) -> None:
    async with cluster.run() as master:
        await submit_in_the_middle(cluster)
        cluster.runtime._nodes = [NodeInfo("edge"), NodeInfo("fog", labels=frozenset({"gpu"})), NodeInfo("cloud")]
        await master.lose_node("fog")
        await cluster.until(lambda: "gpu" in cluster.operator("square").reason, passing=0.1)
        assert "its node fog is lost" in cluster.operator("square").reason
        assert cluster.phase() == "degraded"
        await cluster.clock.advance(30.0)
        assert cluster.kinds().count("operator.rehomed") == 0
        await master.restore_node("fog")
        await cluster.until(lambda: cluster.phase() == "running", passing=0.1)
        assert cluster.operator("square").node == "fog"


async def test_a_node_is_chosen_for_an_operator_once_at_a_time(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    choosing = asyncio.Event()
    chosen: list[str] = []

    async def slowly(homes: Homes, wanted: DesiredPipeline, operator: str, avoid: str) -> PlacementView:
        chosen.append(operator)
        await choosing.wait()
        raise InvalidRequestError("there is none")

    async with cluster.run() as master:
        await submit_in_the_middle(cluster)
        monkeypatch.setattr(Homes, "__call__", slowly)
        cluster.runtime._lost.add("fog")
        await cluster.until(lambda: chosen, passing=0.1)
        await cluster.clock.advance(120.0)
        choosing.set()
        await cluster.until(lambda: "there is none" in cluster.operator("square").reason)
        assert chosen == ["square"]
        await cluster.clock.advance(60.0)
        await cluster.until(lambda: len(chosen) == 2)
        assert cluster.kinds().count("operator.homeless") == 1
        assert master.pipeline("p").phase == "degraded"


async def stored(cluster: Cluster) -> str:
    """Where the store has square."""
    (found,) = await cluster.master._parts.store.pipelines()
    return found.wanted.node_of("square")


@pytest.mark.parametrize("slow", ["choosing", "storing"])
async def test_what_is_back_before_another_node_is_found_stays(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    asked, go_on = asyncio.Event(), asyncio.Event()
    store = SqliteStore.set_placement

    async def choose(homes: Homes, wanted: DesiredPipeline, operator: str, avoid: str) -> PlacementView:
        if slow == "choosing":
            asked.set()
            await go_on.wait()
        return PlacementView("cloud", "it is free")

    async def set_placement(self: SqliteStore, *args: Any) -> None:
        if slow == "storing":
            asked.set()
            await go_on.wait()
        await store(self, *args)

    async with cluster.run() as master:
        await submit_in_the_middle(cluster)
        monkeypatch.setattr(Homes, "__call__", choose)
        monkeypatch.setattr(SqliteStore, "set_placement", set_placement)
        cluster.runtime._lost.add("fog")
        await cluster.until(asked.is_set, passing=0.1)
        cluster.runtime._lost.discard("fog")
        await cluster.until(lambda: cluster.phase() == "running", passing=0.1)
        go_on.set()
        await cluster.until(lambda: not master._parts.loop._lanes)
        await cluster.clock.advance(60.0)
        square = cluster.operator("square")
        assert (square.node, square.placement.node, square.epoch) == ("fog", "fog", 1)
        assert await stored(cluster) == "fog"
        assert "operator.rehomed" not in cluster.kinds()


@pytest.mark.parametrize("lost", [True, False])
async def test_a_master_that_died_after_it_had_chosen_another_node(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    """The next one starts the operator there, unless its pod works where it was."""
    async with cluster.run(killed=True) as master:
        await submit_in_the_middle(cluster)
        wanted = master._parts.desired.pipelines["p"]
        placement = {**wanted.placement, "square": PlacementView("cloud", "it is free")}
        await master._parts.store.set_placement("p", placement)
    stop = cluster.runtime.stop

    async def unheard(pod: str, *, grace: float) -> None:
        if pod != "p.square-e1" or not lost:
            await stop(pod, grace=grace)

    monkeypatch.setattr(cluster.runtime, "stop", unheard)
    if lost:
        cluster.runtime._lost.add("fog")
        cluster.pods["p.square-e1"].disconnect(stay=True)
    async with cluster.run(killed=True):
        await cluster.until(lambda: cluster.phase() == "running", passing=0.5)
        await cluster.clock.advance(60.0)
        square = cluster.operator("square")
        node = "cloud" if lost else "fog"
        assert (square.node, square.placement.node, square.epoch) == (node, node, 2 if lost else 1)
        assert await stored(cluster) == node


async def test_another_node_is_kept_that_was_chosen_during_the_switch_of_a_move(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = SqliteStore.save_switch

    async with cluster.run() as master:
        await submit_in_the_middle(cluster)
        wanted = master._parts.desired.pipelines["p"]

        async def meanwhile(store: SqliteStore, *args: Any) -> None:
            await save(store, *args)
            wanted.placement = {**wanted.placement, "sink": PlacementView("edge", "it is free")}

        monkeypatch.setattr(SqliteStore, "save_switch", meanwhile)
        await master.move("p", "square", "edge")
        await cluster.until(lambda: wanted.node_of("square") == "edge", passing=0.1)
        assert wanted.node_of("sink") == "edge"


async def test_what_can_not_be_written_down_of_a_pipeline_keeps_no_master_from_leading(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refused(store: SqliteStore, *args: Any) -> None:
        raise StateError("the disk is full")

    async with cluster.run(killed=True) as master:
        await submit_in_the_middle(cluster)
        wanted = master._parts.desired.pipelines["p"]
        placement = {**wanted.placement, "square": PlacementView("cloud", "it is free")}
        await master._parts.store.set_placement("p", placement)
        cluster.pods.holds = {"standby"}
        await master.move("p", "square", "edge")
        await cluster.until(lambda: master.moves("p")[0].state is MoveState.CONNECTING)
        await cluster.until(lambda: not master._parts.loop._lanes)
    monkeypatch.setattr(SqliteStore, "set_placement", refused)
    monkeypatch.setattr(SqliteStore, "save_moves", refused)
    async with cluster.run() as master:
        await cluster.until(lambda: cluster.phase() == "running", passing=0.5)
        assert cluster.operator("square").placement.node == "fog"
        assert master.moves("p")[0].state is MoveState.ROLLED_BACK


async def test_a_node_that_cannot_start_it_several_times_is_left(cluster: Cluster) -> None:
    async with cluster.run():
        await submit_in_the_middle(cluster)
        cluster.runtime.fail_starts = ["no memory left"] * 3
        cluster.runtime.kill("p.square-e1")
        await cluster.until(lambda: cluster.operator("square").node != "fog", passing=0.05)
        await settled(cluster)
        assert "no pod could be started there" in next(
            event.message for event in cluster.master.events() if event.kind == "operator.rehomed"
        )


async def test_pods_of_a_lost_node_that_are_seen_again_are_ended(cluster: Cluster) -> None:
    """As on a cluster where a node only couldn't be reached: its pods run on, and are nobody's."""
    async with cluster.run():
        await submit_in_the_middle(cluster)
        cluster.runtime._lost.add("fog")
        await cluster.until(lambda: cluster.operator("square").epoch == 2, passing=0.05)
        await settled(cluster)
        assert "p.square-e1" not in cluster.runtime.running()
        failure = cluster.operator("square").last_failure
        assert failure is not None
        assert failure.message == "its node fog is lost"


async def test_a_lost_node_is_nowhere_to_go(cluster: Cluster) -> None:
    async with cluster.run() as master:
        await cluster.submit_and_run()
        await master.lose_node("fog")
        await cluster.until(lambda: not master.node("fog").ready, passing=0.1)
        with pytest.raises(InvalidRequestError, match="'fog' is lost"):
            await master.move("p", "square", "fog")
        with pytest.raises(InvalidRequestError, match="'fog' is lost"):
            await cluster.submit("q", pins={"square": "fog"})
        await cluster.submit("q")
        assert all(op.node != "fog" for op in master.pipeline("q").operators)
        with pytest.raises(NotFoundError):
            await master.lose_node("moon")


async def test_real_nodes_cannot_be_made_to_fail(cluster: Cluster) -> None:
    class Real:
        def __getattr__(self, name: str) -> object:
            if name in ("lose_node", "restore_node"):
                raise AttributeError(name)
            return getattr(cluster.runtime, name)

    async with cluster.run() as master:
        emulation = master._parts.emulation
        assert emulation is not None
        emulation._runtime = Real()  # type: ignore[assignment]
        with pytest.raises(ConflictError, match="are real"):
            await master.lose_node("fog")


@pytest.mark.parametrize("operator", ["sink", "square"])
async def test_what_went_on_while_its_node_was_lost_is_found_again(cluster: Cluster, operator: str) -> None:
    """As on a cluster where a node couldn't be reached: what is bound to it, and what has no other place, isn't started
    anew when it is back; also not by another master.
    """
    async with cluster.run(killed=True):
        await submit_in_the_middle(cluster)
        cluster.runtime._nodes = [NodeInfo("edge"), NodeInfo("fog", labels=frozenset({"gpu"})), NodeInfo("cloud")]
        node, pod = cluster.operator(operator).node, cluster.pods[cluster.operator(operator).pod]
        cluster.runtime._lost.add(node)
        pod.disconnect(stay=True)
        await cluster.until(lambda: cluster.phase() == "degraded", passing=0.1)
        assert cluster.operator(operator).state == "unresponsive"
        assert f"its node {node} is lost" in cluster.operator(operator).reason
        await cluster.clock.advance(120.0)
        assert cluster.operator(operator).restarts == 0
        cluster.runtime._lost.discard(node)
        pod.reconnect()
        await cluster.until(lambda: cluster.phase() == "running", passing=0.1)
        assert (cluster.operator(operator).epoch, cluster.operator(operator).restarts) == (1, 0)
        cluster.runtime._lost.add(node)
        pod.disconnect(stay=True)
        await cluster.until(lambda: cluster.phase() == "degraded", passing=0.1)
    async with cluster.run():
        await cluster.clock.advance(120.0)
        assert cluster.operator(operator).epoch == 1
        cluster.runtime._lost.discard(node)
        await cluster.clock.advance(2.0)
        pod.reconnect()
        await cluster.until(lambda: cluster.phase() == "running", passing=0.1)
        assert (cluster.operator(operator).epoch, cluster.operator(operator).restarts) == (1, 0)
        assert "operator.failed" not in cluster.kinds()


async def test_what_ended_while_its_node_was_lost_is_started_again(cluster: Cluster) -> None:
    async with cluster.run():
        await cluster.submit_and_run()
        cluster.runtime._lost.add("cloud")
        await cluster.until(lambda: cluster.phase() == "degraded", passing=0.1)
        cluster.runtime.kill("p.sink-e1")
        await cluster.until(lambda: cluster.operator("sink").state == "restarting", passing=0.1)
        cluster.runtime._lost.discard("cloud")
        await cluster.until(lambda: cluster.phase() == "running", passing=0.1)
        assert cluster.operator("sink").epoch == 2
