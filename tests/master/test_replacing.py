"""Instances that take another's place where it is, and pods that have to go: scripted pods, virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from nomad.errors import ConflictError, InvalidRequestError
from nomad.master.views import MoveState, MoveView
from tests.master.fakepods import Cluster
from tests.master.test_moves import PHASES, THREE, begin, other_node, settled

NAMES = ("source", "square", "sink")


@pytest.fixture(params=[False, True], ids=["common", "apart"])
async def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Cluster]:
    """`apart`: each pod has a folder of its own."""
    cluster = Cluster(tmp_path / "state", THREE)
    cluster.runtime.folders_follow = not request.param
    numbers = {"epoch": 1, "received": 10, "settled": 10, "disorder": 0, "first": 10}
    ends: list[dict[str, Any]] = [
        {"link": "p:source>square", "direction": "in", **numbers},
        {"link": "p:square>sink", "direction": "in", **numbers},
        {"link": "p:source>square", "direction": "out", "numbered": 10, "settled": 10},
    ]
    cluster.pods.answers = {
        "numbers": lambda args: {"ok": True, "value": {"links": ends}},
        "samples": lambda args: {"ok": True, "value": [[cluster.clock.wall() - n * 0.005, 0.02] for n in range(400)]},
        "export": lambda args: {"ok": True, "value": {"data": b"x" * 10, "more": args["offset"] < 20}},
        "import": lambda args: {"ok": True, "value": None},
    }
    yield cluster
    await cluster.runtime.shutdown()


def last(cluster: Cluster) -> MoveView:
    return cluster.master.moves("p")[-1]


async def until_over(cluster: Cluster, moves: int = 1) -> MoveView:
    def is_over() -> bool:
        return len(cluster.master.moves("p")) >= moves and all(move.state.final for move in cluster.master.moves("p"))

    await cluster.until(is_over, passing=0.05)
    return last(cluster)


def phases(cluster: Cluster, name: str) -> list[MoveState]:
    """The states that a replacement goes through."""
    carrying = [MoveState.CARRYING] if not cluster.runtime.folders_follow and name != "source" else []
    return [*list(PHASES)[:2], *carrying, *list(PHASES)[2:]]


@pytest.mark.parametrize("name", NAMES)
async def test_a_user_has_an_operator_replaced(cluster: Cluster, name: str) -> None:
    async with cluster.run() as master:
        await begin(cluster)
        before = cluster.operator(name)
        view = await master.move("p", name, None)
        assert (view.cause, view.source, view.target) == ("user", before.node, before.node)
        view = await until_over(cluster)
        assert (view.state, view.error, view.lost, view.doubled, view.epoch) == ("done", "", 0, 0, 2)
        assert [phase.name for phase in view.phases] == ["planned", *phases(cluster, name)]
        await settled(cluster)
        after = cluster.operator(name)
        assert (after.node, after.pod, after.restarts) == (before.node, f"p.{name}-e2", 0)
        assert after.placement == before.placement
        assert all(op.restarts == 0 for op in master.pipeline("p").operators)
        done = next(event for event in master.events("p") if event.kind == "move.done")
        assert f"{name} was replaced on {before.node}" in done.message


async def test_nodes_count_both_instances_meanwhile(cluster: Cluster) -> None:
    async with cluster.run() as master:
        await begin(cluster)
        cluster.pods.holds = {"standby"}
        node = cluster.operator("square").node
        before = master.node(node)
        await master.move("p", "square", None)
        await cluster.until(lambda: last(cluster).state is MoveState.CONNECTING)
        assert master.node(node).memory_used_mb == before.memory_used_mb + 64
        assert master.node(node).operators == before.operators
        cluster.pods.release()
        await until_over(cluster)
        await settled(cluster)
        assert master.node(node).memory_used_mb == before.memory_used_mb


async def test_what_can_not_be_replaced_is_refused(cluster: Cluster) -> None:
    async with cluster.run() as master:
        await begin(cluster)
        node = cluster.operator("square").node
        with pytest.raises(InvalidRequestError, match=r"is on \w+ already; for a new instance .* --replace"):
            await master.move("p", "square", node)
        cluster.runtime.cordon(node)
        await cluster.until(lambda: not master.node(node).schedulable, passing=0.1)
        with pytest.raises(InvalidRequestError, match="takes no new operators"):
            await master.move("p", "square", None)
        cluster.runtime.cordon(node, on=False)
        await cluster.until(lambda: master.node(node).schedulable, passing=0.1)
        await master.move("p", "square", None)
        with pytest.raises(ConflictError, match="under way"):
            await master.move("p", "square", None)
        await until_over(cluster)


# Pods that have to go


@pytest.mark.parametrize("says", [True, False], ids=["pod", "runtime"])
@pytest.mark.parametrize("name", NAMES)
async def test_a_pod_that_is_to_end_is_replaced(cluster: Cluster, name: str, says: bool) -> None:
    async with cluster.run() as master:
        await begin(cluster)
        if says:
            cluster.pods[f"p.{name}-e1"].say({"type": "leaving"})
        else:
            cluster.runtime.mark(f"p.{name}-e1", leaving=True)
        view = await until_over(cluster)
        assert (view.state, view.cause, view.reason) == ("done", "replace", "its pod is to end")
        await settled(cluster)
        assert [op.restarts for op in master.pipeline("p").operators] == [0, 0, 0]
        assert len(master.moves("p")) == 1
        kinds = [event.kind for event in master.events("p")]
        assert kinds.count("operator.leaving") == kinds.count("move.ordered") == 1


async def test_a_drained_node_is_left(cluster: Cluster) -> None:
    """But by those that are bound to it: they end there, and wait for it."""
    async with cluster.run() as master:
        await begin(cluster)
        if cluster.operator("square").node != "cloud":
            await master.move("p", "square", "cloud")
            await until_over(cluster)
            await settled(cluster)
        ordered = len(master.moves("p"))
        cluster.runtime.cordon("cloud")
        await cluster.until(lambda: not master.node("cloud").schedulable, passing=0.1)
        square = cluster.operator("square")
        cluster.runtime.mark(square.pod, leaving=True)
        cluster.runtime.mark("p.sink-e1", leaving=True)
        view = await until_over(cluster, moves=ordered + 1)
        assert (view.operator, view.state, view.cause) == ("square", "done", "drain")
        assert view.target != "cloud"
        assert view.reason == "its pod is to end, and cloud takes no new ones"
        assert cluster.operator("sink").epoch == 1
        cluster.runtime.kill("p.sink-e1", 0)
        await cluster.until(lambda: cluster.phase() == "degraded", passing=0.1)
        assert (
            master.pipeline("p").reason == "operator sink: its node cloud takes no new operators, and it is bound to it"
        )
        for _ in range(20):
            await cluster.clock.advance(1.0)
        assert not [pod for pod in cluster.runtime.running() if "sink" in pod]
        cluster.runtime.cordon("cloud", on=False)
        await settled(cluster)
        assert cluster.operator("sink").epoch == 2


async def test_a_node_that_is_cordoned_keeps_what_it_has_and_gets_nothing_new(cluster: Cluster) -> None:
    async with cluster.run() as master:
        await begin(cluster)
        cluster.runtime.cordon("cloud")
        await cluster.until(lambda: not master.node("cloud").schedulable, passing=0.1)
        for _ in range(5):
            await cluster.clock.advance(1.0)
        assert master.moves("p") == []
        with pytest.raises(
            InvalidRequestError, match="'sink' can't be placed: its node 'cloud' takes no new operators"
        ):
            await cluster.submit("q")
        cluster.runtime.cordon("cloud", on=False)
        cluster.runtime.cordon("fog")
        await cluster.until(
            lambda: not master.node("fog").schedulable and master.node("cloud").schedulable, passing=0.1
        )
        await cluster.submit("q")
        assert "fog" not in {op.node for op in master.pipeline("q").operators}
        if cluster.operator("square").node != "fog":
            with pytest.raises(InvalidRequestError, match="takes no new operators"):
                await master.move("p", "square", "fog")


async def test_a_crash_on_a_cordoned_node_leads_elsewhere(cluster: Cluster) -> None:
    async with cluster.run() as master:
        await begin(cluster)
        node = cluster.operator("square").node
        cluster.runtime.cordon(node)
        await cluster.until(lambda: not master.node(node).schedulable, passing=0.1)
        cluster.runtime.kill("p.square-e1")
        await settled(cluster)
        assert cluster.operator("square").node != node


async def test_nowhere_to_go_is_said_and_mended(cluster: Cluster) -> None:
    async with cluster.run() as master:
        await begin(cluster)
        for node in THREE:
            cluster.runtime.cordon(node.id)
        await cluster.until(lambda: not any(node.schedulable for node in master.nodes()), passing=0.1)
        cluster.runtime.mark("p.square-e1", leaving=True)
        for _ in range(5):
            await cluster.clock.advance(1.0)
        assert master.moves("p") == []
        cluster.runtime.kill("p.square-e1", 0)
        await cluster.until(lambda: "takes no new operators; " in master.pipeline("p").reason, passing=0.1)
        for node in THREE:
            cluster.runtime.cordon(node.id, on=False)
        await settled(cluster)


async def test_a_pod_that_ends_before_it_could_be_replaced_is_restarted(cluster: Cluster) -> None:
    async with cluster.run() as master:
        await begin(cluster)
        cluster.pods.holds = {"ready"}
        cluster.pods["p.square-e1"].say({"type": "leaving"})
        await cluster.until(lambda: "p.square-e2" in cluster.runtime.running(), passing=0.05)
        cluster.pods["p.square-e1"].end(0)
        view = await until_over(cluster)
        assert view.state == "rolled_back"
        cluster.pods.release()
        await settled(cluster)
        square = cluster.operator("square")
        assert square.restarts == 1
        assert square.last_failure is not None
        assert "asked to end by somebody else" in square.last_failure.message
        assert len(master.moves("p")) == 1


async def test_what_could_not_be_replaced_is_tried_again(cluster: Cluster) -> None:
    async with cluster.run() as master:
        await begin(cluster)
        cluster.runtime.fail_starts = ["no memory left"]
        cluster.runtime.mark("p.sink-e1", leaving=True)
        await until_over(cluster, moves=2)
        assert [move.state for move in master.moves("p")] == ["rolled_back", "done"]
        assert [event.kind for event in master.events("p")].count("operator.leaving") == 1
        await settled(cluster)


async def test_what_can_not_wait_goes_first(cluster: Cluster) -> None:
    async with cluster.run() as master:
        await begin(cluster)
        cluster.pods.holds = {"greeted"}
        await master.move("p", "source", None)
        await cluster.until(lambda: last(cluster).state is MoveState.CONNECTING)
        wanted = master._parts.desired.pipelines["p"]
        await master._parts.moves.order(wanted, "square", other_node(cluster), cause="drift", reason="it pays")
        cluster.runtime.mark("p.sink-e1", leaving=True)
        await cluster.until(lambda: len(wanted.orders) == 3)
        cluster.pods.release()
        await until_over(cluster, moves=3)
        assert {move.state for move in master.moves("p")} == {MoveState.DONE}
        began = {move.operator: move.started or 0.0 for move in master.moves("p")}
        assert began["source"] < began["sink"] < began["square"]


async def test_all_is_brought_up_to_date_one_by_one(cluster: Cluster) -> None:
    async with cluster.run() as master:
        await begin(cluster)
        for id in ("q", "r"):
            await cluster.submit_and_run(id)
        most: list[int] = []
        for pod in list(cluster.runtime.running()):
            cluster.runtime.mark(pod, outdated=True)

        def all_new() -> bool:
            orders = {id: len(wanted.orders) for id, wanted in master._parts.desired.pipelines.items()}
            assert max(orders.values()) <= 1
            most.append(sum(orders.values()))
            return all(op.epoch > 1 for id in ("p", "q", "r") for op in master.pipeline(id).operators) and not most[-1]

        await cluster.until(all_new, passing=0.05)
        assert max(most) == 2
        assert {move.cause for id in ("p", "q", "r") for move in master.moves(id)} == {"upgrade"}
        assert [len(master.moves(id)) for id in ("p", "q", "r")] == [3, 3, 3]
        assert all(op.restarts == 0 for id in ("p", "q", "r") for op in master.pipeline(id).operators)


# What goes wrong


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("state", [*PHASES, MoveState.CARRYING])
async def test_the_master_is_killed_in_the_middle(cluster: Cluster, name: str, state: MoveState) -> None:
    if state not in phases(cluster, name):
        pytest.skip("it isn't carried over")
    async with cluster.run(killed=True):
        await begin(cluster)
        hold(cluster, name, state)
        await cluster.master.move("p", name, None)
        await cluster.until(lambda: last(cluster).state is state)
        if state in (MoveState.SWITCHING, MoveState.STOPPING):
            await cluster.until(lambda: cluster.operator(name).epoch == 2)
        await cluster.until(lambda: not cluster.master._parts.loop._lanes or state is MoveState.CARRYING)
    cluster.pods.release()
    async with cluster.run():
        await settled(cluster)
        view = await until_over(cluster)
        switched = state in (MoveState.SWITCHING, MoveState.STOPPING)
        assert view.state == ("done" if switched else "rolled_back")
        assert cluster.operator(name).epoch == (2 if switched else 1)
        assert cluster.operator(name).restarts == 0
        assert cluster.pods[cluster.operator(name).pod].status is not None


def hold(cluster: Cluster, name: str, state: MoveState) -> None:
    """Keep pods from what would lead a replacement on from a state."""
    match state:
        case MoveState.CARRYING:
            del cluster.pods.answers["export"]
        case MoveState.HANDING_OVER:
            cluster.pods.holds = {"halted" if name != "square" else "retired"}
            if name == "square" and not cluster.runtime.folders_follow:
                cluster.pods.holds = {"active"}
        case MoveState.CONNECTING:
            cluster.pods.holds = {"standby", "greeted"}
        case MoveState.SWITCHING:
            cluster.pods.holds = {"turned", "heard"}
        case _:
            cluster.pods.holds = {PHASES[state]}


async def test_what_can_not_be_carried_over_stays(tmp_path: Path, cluster: Cluster) -> None:
    if cluster.runtime.folders_follow:
        pytest.skip("it isn't carried over")
    async with cluster.run():
        await begin(cluster)
        cluster.pods.answers["import"] = lambda args: {"ok": False, "error": {"message": "the disk is full"}}
        await cluster.master.move("p", "square", None)
        view = await until_over(cluster)
        assert (view.state, view.error) == (
            "rolled_back",
            "what is set aside couldn't be carried over: the disk is full",
        )
        await settled(cluster)
        assert cluster.operator("square").epoch == 1


async def test_all_of_it_is_carried_over_in_order(cluster: Cluster) -> None:
    if cluster.runtime.folders_follow:
        pytest.skip("it isn't carried over")
    parts: list[tuple[int, bool]] = []

    def take(args: dict[str, Any]) -> dict[str, Any]:
        parts.append((args["offset"], args["last"]))
        return {"ok": True, "value": None}

    async with cluster.run():
        await begin(cluster)
        cluster.pods.answers["import"] = take
        await cluster.master.move("p", "sink", None)
        assert (await until_over(cluster)).state == "done"
    assert parts == [(0, False), (10, False), (20, True)]


async def test_an_idle_pipeline_is_not_waited_for(cluster: Cluster) -> None:
    cluster.pods.answers["samples"] = lambda args: {"ok": True, "value": []}
    async with cluster.run():
        await begin(cluster)
        await cluster.master.move("p", "square", None)
        view = await until_over(cluster)
        assert (view.state, view.pause) == ("done", None)
        assert next(phase.seconds for phase in view.phases if phase.name == "stopping") < 3.0


async def test_no_order_outlives_its_pipeline(cluster: Cluster) -> None:
    async with cluster.run() as master:
        await begin(cluster)
        wanted = master._parts.desired.pipelines["p"]
        removing = asyncio.create_task(master.remove("p"))
        await cluster.until(removing.done, passing=0.1)
        await removing
        with pytest.raises(ConflictError, match="is being removed"):
            await master._parts.moves.order(wanted, "square", "fog", cause="drift", reason="it pays")
        assert master._parts.moves.list("p") == []
