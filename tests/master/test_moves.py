"""Live moves, as the master leads them: scripted pods, virtual time, and everything that can go wrong in each phase."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nomad import bundle, pipeline
from nomad.errors import ConflictError, InvalidRequestError, NotFoundError, StateError
from nomad.master.sqlite import SqliteStore
from nomad.master.views import MoveState, MoveView
from nomad.runtime.base import NodeInfo
from tests.master.fakepods import OPERATORS, Cluster

THREE = (NodeInfo("edge", memory_mb=1024), NodeInfo("fog", memory_mb=1024), NodeInfo("cloud", memory_mb=1024))


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    cluster = Cluster(tmp_path / "state", THREE)
    numbers = {"epoch": 1, "received": 10, "settled": 10, "disorder": 0, "first": 10}
    links = [{"link": "p:source>square", "direction": "in", **numbers}, {"link": "p:square>sink", "direction": "in"}]
    cluster.pods.answers = {
        "numbers": lambda args: {"ok": True, "value": {"links": [links[0], {**links[1], "disorder": 0}]}},
        "samples": lambda args: {"ok": True, "value": [[cluster.clock.wall() - n * 0.005, 0.02] for n in range(400)]},
    }
    yield cluster
    await cluster.runtime.shutdown()


async def begin(cluster: Cluster) -> None:
    """The pipeline `p` at work; square is where it was placed first, and is to move to another node."""
    await cluster.submit_and_run()
    await settled(cluster)


async def settled(cluster: Cluster) -> None:
    """Every pod is connected with the present instances of its neighbours, and with nobody else."""

    def is_settled() -> bool:
        view = cluster.master.pipeline("p")
        if view.phase != "running" or sorted(op.pod for op in view.operators) != sorted(cluster.runtime.running()):
            return False
        epochs = {op.name: op.epoch for op in view.operators}
        pods = [cluster.pods[op.pod] for op in view.operators]
        return all(
            pod.status is not None
            and pod.status["role"] == "active"
            and all(
                link.peer_epoch == epochs[link.peer_operator]
                and link.standby_epoch == 0
                and cluster.pods.end(pod, link.link, link.direction).epoch == epochs[link.peer_operator]
                for link in pod.links.values()
            )
            for pod in pods
        )

    await cluster.until(is_settled, passing=0.05)


def other_node(cluster: Cluster) -> str:
    """Where square isn't, nor any other operator."""
    return next(node.id for node in THREE if node.id not in {op.node for op in cluster.master.pipeline("p").operators})


def status(cluster: Cluster) -> MoveView:
    return cluster.master.moves("p")[-1]


async def until_over(cluster: Cluster) -> MoveView:
    await cluster.until(lambda: status(cluster).state.final, passing=0.05)
    return status(cluster)


PHASES = {
    MoveState.STARTING: "ready",
    MoveState.CONNECTING: "standby",
    MoveState.HANDING_OVER: "retired",
    MoveState.SWITCHING: "turned",
    MoveState.STOPPING: "stop",
}
"""State -> what pods are kept from so that the move stays in it."""


async def held_in(cluster: Cluster, state: MoveState, hold: str = "") -> MoveView:
    """A move of square that goes no further than `state`."""
    cluster.pods.holds = {hold or PHASES[state]}
    await cluster.master.move("p", "square", other_node(cluster))
    await cluster.until(lambda: status(cluster).state is state and "p.square-e2" in cluster.runtime.running())
    if state is MoveState.SWITCHING:  # which begins with a write to the store
        await cluster.until(lambda: cluster.operator("square").epoch == 2)
    return status(cluster)


# As it should be


async def test_a_move_makes_before_it_breaks(cluster: Cluster) -> None:
    async with cluster.run() as master:
        await begin(cluster)
        source, target = cluster.operator("square").node, other_node(cluster)
        ordered = await master.move("p", "square", target)
        assert (ordered.state, ordered.source, ordered.target, ordered.cause) == ("planned", source, target, "user")
        view = await until_over(cluster)
        assert (view.state, view.error, view.epoch) == ("done", "", 2)
        assert [phase.name for phase in view.phases] == [
            "planned",
            "starting",
            "connecting",
            "handing_over",
            "switching",
            "stopping",
        ]
        assert (view.lost, view.doubled) == (0, 0)
        assert view.predicted_latency_before is not None
        assert view.predicted_latency_after is not None
        assert view.predicted_gain == view.predicted_latency_before - view.predicted_latency_after
        assert view.pause == pytest.approx(0.0, abs=1e-6)
        assert view.started is not None
        assert view.finished is not None
        await settled(cluster)
        square = cluster.operator("square")
        assert (square.node, square.pod, square.epoch, square.restarts) == (target, "p.square-e2", 2, 0)
        assert square.placement.node == target
        assert cluster.pods["p.square-e2"].spec.node == target
        old, new = cluster.pods["p.square-e1"], cluster.pods["p.square-e2"]
        assert new.assignment is not None
        assert new.assignment.role == "standby"
        assert [message["role"] for message in old.heard if message["type"] == "peers"][-1] == "retired"
        assert old.heard[-1]["type"] == "stop"
        assert master.pipeline("p").phase == "running"
        assert cluster.master._parts.desired.pipelines["p"].orders == []
        assert not cluster.master._parts.observed.tallies


async def test_neighbours_are_told_in_the_right_order(cluster: Cluster) -> None:
    async with cluster.run():
        await begin(cluster)
        before = {name: len(cluster.pods[f"p.{name}-e1"].heard) for name in ("source", "sink")}
        await cluster.master.move("p", "square", other_node(cluster))
        await until_over(cluster)
        await settled(cluster)
        told = {
            name: [message["links"][0] for message in pod.heard[before[name] :] if message["type"] == "peers"]
            for name, pod in ((name, cluster.pods[f"p.{name}-e1"]) for name in before)
        }
        assert [(link["address"], link["peer_epoch"], link["standby_epoch"]) for link in told["source"]] == [
            ("inproc:p.square-e1", 1, 2),
            ("inproc:p.square-e2", 2, 0),
        ]
        # Who hears the old instance does so until the new one is heard.
        assert [(link["peer_epoch"], link["standby_epoch"]) for link in told["sink"]] == [(1, 2), (2, 0)]


async def test_a_move_is_told_as_a_story_with_causes(cluster: Cluster) -> None:
    async with cluster.run() as master:
        await begin(cluster)
        await master.move("p", "square", other_node(cluster), reason="it is cooler there")
        await until_over(cluster)
        events = {event.id: event for event in master.events("p")}
        done = next(event for event in events.values() if event.kind == "move.done")
        assert "0 lost, 0 doubled" in done.message
        assert done.data["phases"]["starting"] >= 0
        kinds, event = [], done
        while event.cause_id is not None:
            event = events[event.cause_id]
            kinds.append(event.kind)
        assert kinds[-1] == "move.ordered"
        assert {"move.starting", "move.connecting", "move.handing_over", "move.switching", "move.stopping"} <= set(
            kinds
        )
        assert "it is cooler there" in event.message


async def test_shapes_of_links_follow_the_operator(cluster: Cluster) -> None:
    async with cluster.run() as master:
        await begin(cluster)
        target = other_node(cluster)
        await master.set_link("edge", target, latency=0.07)
        await held_in(cluster, MoveState.HANDING_OVER)
        link = cluster.pods["p.source-e1"].links["p:source>square"]
        assert (link.shape.latency, link.standby_shape.latency) == (0.0, 0.07)
        cluster.pods.release()
        await until_over(cluster)
        await settled(cluster)
        assert cluster.pods["p.source-e1"].links["p:source>square"].shape.latency == 0.07


async def test_memory_counts_on_both_nodes_meanwhile(cluster: Cluster) -> None:
    async with cluster.run() as master:
        await begin(cluster)
        source, target = cluster.operator("square").node, other_node(cluster)
        before = {node.id: node.memory_used_mb for node in master.nodes()}
        await held_in(cluster, MoveState.CONNECTING)
        used = {node.id: node.memory_used_mb for node in master.nodes()}
        assert used[target] == before[target] + 64
        assert used[source] == before[source]
        assert cluster.operator("square").moving_to == target
        cluster.pods.release()
        await until_over(cluster)
        await settled(cluster)
        after = {node.id: node.memory_used_mb for node in master.nodes()}
        assert (after[source], after[target]) == (before[source] - 64, before[target] + 64)


async def test_counters_go_on_over_a_move(cluster: Cluster) -> None:
    async with cluster.run():
        await begin(cluster)
        cluster.pods["p.square-e1"].beat(processed=100)
        await cluster.until(lambda: cluster.operator("square").stats.processed == 100)
        await held_in(cluster, MoveState.STOPPING)
        assert cluster.operator("square").stats.processed == 100
        cluster.pods["p.square-e2"].beat(processed=7)
        await cluster.until(lambda: cluster.operator("square").stats.processed == 107)
        cluster.pods.release()
        cluster.pods["p.square-e1"].end(0)
        await until_over(cluster)
        await settled(cluster)
        assert cluster.operator("square").stats.processed == 107


async def test_orders_are_carried_out_one_by_one(cluster: Cluster) -> None:
    four = [OPERATORS[0], OPERATORS[1], pipeline.operator(OPERATORS[1], name="cube"), OPERATORS[2]]
    async with cluster.run() as master:
        await master.submit(bundle.make(pipeline.build(four), master.signing_key), id="p", start="edge", end="cloud")
        await cluster.until(lambda: cluster.phase() == "running")
        targets = {
            name: next(node.id for node in THREE if node.id != cluster.operator(name).node)
            for name in ("square", "cube")
        }
        for name, target in targets.items():
            await master.move("p", name, target)
        await cluster.until(lambda: all(move.state.final for move in master.moves("p")), passing=0.05)
        first, second = master.moves("p")
        assert [first.state, second.state] == ["done", "done"]
        assert second.started is not None
        assert first.finished is not None
        assert second.started >= first.finished
        assert {name: cluster.operator(name).node for name in targets} == targets


async def test_metrics_of_moves(cluster: Cluster) -> None:
    async with cluster.run() as master:
        await begin(cluster)
        await master.move("p", "square", other_node(cluster))
        await until_over(cluster)
        lines = (await master.metrics()).decode().splitlines()
        for expected in (
            'nomad_moves_total{cause="user",outcome="done"} 1.0',
            "nomad_move_lost_messages_total 0.0",
            "nomad_move_doubled_messages_total 0.0",
            "nomad_move_pause_seconds_count 1.0",
            'nomad_move_phase_seconds_count{phase="starting"} 1.0',
        ):
            assert expected in lines, expected


async def test_what_is_not_known_of_the_cost_is_not_made_up(cluster: Cluster) -> None:
    cluster.pods.answers = {
        "numbers": lambda args: {"ok": True, "value": "nonsense"},
        "samples": lambda args: {"ok": False, "error": {"message": "no"}},
    }
    async with cluster.run() as master:
        await begin(cluster)
        await master.move("p", "square", other_node(cluster))
        view = await until_over(cluster)
        assert (view.state, view.pause, view.lost, view.doubled) == ("done", None, None, None)


async def test_latencies_of_the_last_operator(cluster: Cluster) -> None:
    async with cluster.run() as master:
        await begin(cluster)
        cluster.pods.answers["samples"] = lambda args: {"ok": True, "value": [[args["after"] + 1, 0.25]]}
        (sample,) = await master.latencies("p", 41.0)
        assert (sample.time, sample.latency) == (42.0, 0.25)


# What can't be


async def test_moves_that_cannot_be(cluster: Cluster) -> None:
    needy = pipeline.operator(OPERATORS[1], name="needy", requires={"gpu"})
    large = pipeline.operator(OPERATORS[1], name="large", memory="600Mi")
    other = pipeline.operator(OPERATORS[1], name="other", memory="600Mi")
    bound = pipeline.operator(OPERATORS[1], name="bound", pin="fog")
    chain = [OPERATORS[0], needy, large, other, bound, OPERATORS[2]]
    nodes = (THREE[0], replace(THREE[1], labels=frozenset({"gpu"})), THREE[2])
    cluster.runtime._nodes = list(nodes)
    async with cluster.run() as master:
        await master.submit(bundle.make(pipeline.build(chain), master.signing_key), id="p", start="edge", end="cloud")
        with pytest.raises(ConflictError, match="isn't running"):
            await master.move("p", "needy", "edge")
        await cluster.until(lambda: cluster.phase() == "running")
        full = cluster.operator("other").node
        assert cluster.operator("large").node != full
        for operator, node, error, said in [
            ("nobody", "fog", NotFoundError, "has no operator 'nobody'; it has source"),
            ("large", "moon", InvalidRequestError, "node 'moon' is unknown; known nodes: edge, fog, cloud"),
            ("source", "fog", InvalidRequestError, "pinned to edge: it is the pipeline's start"),
            ("sink", "fog", InvalidRequestError, "pinned to cloud: it is the pipeline's end"),
            ("bound", "edge", InvalidRequestError, "pinned to fog: unpin it first"),
            ("needy", "edge", InvalidRequestError, "requires gpu, which edge doesn't have"),
            ("needy", "fog", InvalidRequestError, "is on fog already"),
            ("large", full, InvalidRequestError, f"needs 600 MiB, and {full} has .* MiB free"),
        ]:
            with pytest.raises(error, match=said):
                await master.move("p", operator, node)
        with pytest.raises(NotFoundError):
            await master.move("q", "square", "fog")
        with pytest.raises(NotFoundError, match="no move 'm1'"):
            master.move_status("p", "m1")
        assert master.moves("p") == []


async def test_a_second_move_of_the_same_operator_waits_for_the_first(cluster: Cluster) -> None:
    async with cluster.run() as master:
        await begin(cluster)
        target = other_node(cluster)
        await held_in(cluster, MoveState.STARTING)
        with pytest.raises(ConflictError, match="under way already"):
            await master.move("p", "square", target)
        cluster.pods.release()
        await until_over(cluster)
        with pytest.raises(InvalidRequestError, match="already"):
            await master.move("p", "square", target)


async def test_an_order_that_cannot_be_stored_is_none(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(*args: Any) -> None:
        raise StateError("the disk is full")

    async with cluster.run() as master:
        await begin(cluster)
        with monkeypatch.context() as patch:
            patch.setattr(SqliteStore, "save_moves", full)
            with pytest.raises(StateError):
                await master.move("p", "square", other_node(cluster))
        assert master.moves("p") == []
        await cluster.clock.advance(1.0)
        assert len(cluster.runtime.started) == 3


async def test_pins_and_moves_can_be_changed(cluster: Cluster) -> None:
    async with cluster.run() as master:
        await begin(cluster)
        node = cluster.operator("square").node
        view = await master.change("p", moves=False, pins={"square": node})
        assert not view.moves
        assert cluster.operator("square").pin == node
        with pytest.raises(InvalidRequestError, match="unpin it first"):
            await master.move("p", "square", other_node(cluster))
        for pins, said in [
            ({"square": other_node(cluster)}, f"is on {node}: move it before"),
            ({"cube": "fog"}, "no operator 'cube' to pin"),
            ({"source": "fog"}, "the pipeline's start, which is on edge"),
            ({"square": "moon"}, "'moon' is unknown"),
        ]:
            with pytest.raises(InvalidRequestError, match=said):
                await master.change("p", pins=pins)
        await master.change("p", pins={"square": None})
        assert cluster.operator("square").pin is None
        await master.move("p", "square", other_node(cluster))
        with pytest.raises(ConflictError, match="a move of operator .square. is under way"):
            await master.change("p", pins={"square": node})
        assert (await until_over(cluster)).state == "done"
    async with cluster.run() as master:
        assert not master.pipeline("p").moves


# What goes wrong


async def check_sound(cluster: Cluster, view: MoveView) -> None:
    """After whatever happened: one instance of each operator, where the record says, and no trace of another."""
    await settled(cluster)
    square = cluster.operator("square")
    assert square.node == (view.target if view.state is MoveState.DONE else view.source)
    assert cluster.pods[square.pod].spec.node == square.node
    assert cluster.master._parts.desired.pipelines["p"].orders == []
    requested = cluster.master._parts.loop.requested
    assert requested.pipelines["p"].move is None
    assert not requested.strays
    assert len({pod.spec.epoch for pod in cluster.pods.all.values() if pod.spec.operator == "square"}) == len(
        [pod for pod in cluster.pods.all.values() if pod.spec.operator == "square"]
    )


@pytest.mark.parametrize("state", PHASES)
async def test_the_target_dies(cluster: Cluster, state: MoveState) -> None:
    async with cluster.run():
        await begin(cluster)
        await held_in(cluster, state)
        cluster.runtime.kill("p.square-e2")
        cluster.pods.release()
        view = await until_over(cluster)
        switched = state in (MoveState.SWITCHING, MoveState.STOPPING)
        assert view.state == ("done" if switched else "rolled_back")
        assert view.error == ("" if switched else "the new instance was killed by SIGKILL")
        await check_sound(cluster, view)
        assert cluster.operator("square").epoch == (3 if switched else 1)
        assert cluster.operator("square").restarts == switched


@pytest.mark.parametrize("state", PHASES)
async def test_the_old_instance_dies(cluster: Cluster, state: MoveState) -> None:
    async with cluster.run():
        await begin(cluster)
        await held_in(cluster, state)
        cluster.runtime.kill("p.square-e1")
        if state is MoveState.STARTING:
            await cluster.until(lambda: status(cluster).state.final)
        cluster.pods.release()
        view = await until_over(cluster)
        assert view.state == ("rolled_back" if state is MoveState.STARTING else "done")
        await check_sound(cluster, view)
        # Where the new instance was ready, it took over at once; else the operator was restarted as ever.
        assert cluster.operator("square").epoch == (3 if state is MoveState.STARTING else 2)


@pytest.mark.parametrize("name", ["source", "sink"])
@pytest.mark.parametrize("state", PHASES)
async def test_a_neighbour_dies(cluster: Cluster, state: MoveState, name: str) -> None:
    async with cluster.run():
        await begin(cluster)
        await held_in(cluster, state)
        cluster.runtime.kill(f"p.{name}-e1")
        await cluster.until(lambda: cluster.operator(name).epoch == 2, passing=0.05)
        cluster.pods.release()
        view = await until_over(cluster)
        assert view.state == "done"
        await check_sound(cluster, view)
        assert cluster.operator("square").epoch == 2


@pytest.mark.parametrize("state", PHASES)
async def test_the_master_is_killed(cluster: Cluster, state: MoveState) -> None:
    async with cluster.run(killed=True):
        await begin(cluster)
        await held_in(cluster, state)
    cluster.pods.release()
    async with cluster.run():
        view = await until_over(cluster)
        switched = state in (MoveState.SWITCHING, MoveState.STOPPING)
        assert view.state == ("done" if switched else "rolled_back")
        await check_sound(cluster, view)
        assert cluster.operator("square").epoch == (2 if switched else 1)
        assert cluster.operator("square").restarts == 0
        assert [op.restarts for op in cluster.master.pipeline("p").operators] == [0, 0, 0]
        kinds = cluster.kinds()
        assert ("move.rolled_back" in kinds) != switched
    async with cluster.run():  # and what it left is what the next one finds
        assert status(cluster).state == view.state


async def test_a_roll_back_that_could_not_be_written_down_holds(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(*args: Any) -> None:
        raise StateError("the disk is full")

    async with cluster.run(killed=True) as master:
        await begin(cluster)
        await held_in(cluster, MoveState.CONNECTING)
        with monkeypatch.context() as patch:
            patch.setattr(SqliteStore, "save_moves", full)
            cluster.runtime.kill("p.square-e2")
            assert (await until_over(cluster)).state == "rolled_back"
            await cluster.until(lambda: not master._parts.loop._lanes)
        cluster.pods.release()
        cluster.runtime.kill("p.square-e1")
        await cluster.until(lambda: cluster.operator("square").epoch == 3, passing=0.05)
        await settled(cluster)
    async with cluster.run():
        view = await until_over(cluster)
        assert view.state == "rolled_back"
        await check_sound(cluster, view)
        assert cluster.operator("square").epoch == 3


async def test_an_order_that_was_not_begun_outlives_the_master(cluster: Cluster) -> None:
    async with cluster.run(killed=True):
        await begin(cluster)
        target = other_node(cluster)
        cluster.runtime.kill("p.sink-e1")
        await cluster.until(lambda: cluster.phase() == "degraded")
        wanted = cluster.master._parts.desired.pipelines["p"]
        await cluster.master._parts.moves.order(wanted, "square", target, cause="user", reason="before the end")
        await cluster.until(lambda: "move.ordered" in cluster.kinds())
    async with cluster.run():
        view = await until_over(cluster)
        assert (view.state, view.reason) == ("done", "before the end")
        await check_sound(cluster, view)


@pytest.mark.parametrize(
    ("state", "hold", "error"),
    [
        (MoveState.STARTING, "ready", "wasn't ready in time"),
        (MoveState.CONNECTING, "standby", "weren't connected with the new instance in time"),
        (MoveState.CONNECTING, "greeted", "weren't connected with the new instance in time"),
        (MoveState.HANDING_OVER, "retired", "didn't hand over in time"),
        (MoveState.HANDING_OVER, "active", "didn't hand over in time"),
    ],
)
async def test_a_deadline_passes_before_the_switch(cluster: Cluster, state: MoveState, hold: str, error: str) -> None:
    async with cluster.run():
        await begin(cluster)
        await held_in(cluster, state, hold)
        await cluster.until(lambda: status(cluster).state.final, passing=1.0)
        view = status(cluster)
        assert view.state == "rolled_back"
        assert error in view.error
        cluster.pods.release()
        await check_sound(cluster, view)
        assert cluster.operator("square").epoch == 1


@pytest.mark.parametrize("hold", ["turned", "heard", "stop"])
async def test_after_the_switch_a_deadline_leads_forward(cluster: Cluster, hold: str) -> None:
    async with cluster.run():
        await begin(cluster)
        cluster.pods.holds = {hold}
        await cluster.master.move("p", "square", other_node(cluster))
        await cluster.until(lambda: status(cluster).state.final, passing=0.5)
        view = status(cluster)
        assert view.state == "done"
        cluster.pods.release()
        await check_sound(cluster, view)


@pytest.mark.parametrize("state", PHASES)
async def test_the_pipeline_is_stopped(cluster: Cluster, state: MoveState) -> None:
    async with cluster.run() as master:
        await begin(cluster)
        await held_in(cluster, state)
        await master.stop("p")
        cluster.pods.release()
        await cluster.until(lambda: cluster.phase() == "stopped", passing=0.1)
        assert cluster.runtime.running() == []
        assert status(cluster).state == (
            "done" if state in (MoveState.SWITCHING, MoveState.STOPPING) else "rolled_back"
        )
        assert master._parts.desired.pipelines["p"].orders == []


@pytest.mark.parametrize("state", PHASES)
async def test_the_pipeline_is_removed(cluster: Cluster, state: MoveState) -> None:
    async with cluster.run() as master:
        await begin(cluster)
        await held_in(cluster, state)
        removing = asyncio.create_task(master.remove("p"))
        await cluster.until(removing.done, passing=0.1)
        await removing
        assert cluster.runtime.running() == []
        assert master.pipelines() == []
        cluster.pods.release()
        await begin(cluster)
        assert [op.epoch for op in master.pipeline("p").operators] == [3, 3, 3]
        assert master.moves("p") == []


@pytest.mark.parametrize("state", PHASES)
async def test_the_target_node_is_lost(cluster: Cluster, state: MoveState) -> None:
    async with cluster.run() as master:
        await begin(cluster)
        view = await held_in(cluster, state)
        await master.lose_node(view.target)
        cluster.pods.release()
        view = await until_over(cluster)
        switched = state in (MoveState.SWITCHING, MoveState.STOPPING)
        assert view.state == ("done" if switched else "rolled_back")
        await settled(cluster)
        assert cluster.operator("square").node != view.target
        assert (cluster.operator("square").epoch > 2) == switched


async def test_a_switch_that_cannot_be_stored_is_none(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(*args: Any) -> None:
        raise StateError("the disk is full")

    async with cluster.run():
        await begin(cluster)
        with monkeypatch.context() as patch:
            patch.setattr(SqliteStore, "save_switch", full)
            await cluster.master.move("p", "square", other_node(cluster))
            view = await until_over(cluster)
        assert view.state == "rolled_back"
        assert view.error == "the switch couldn't be written down: the disk is full"
        await check_sound(cluster, view)
        assert cluster.operator("square").epoch == 1


async def test_a_new_instance_that_cannot_be_started_leaves_the_old_one(cluster: Cluster) -> None:
    async with cluster.run():
        await begin(cluster)
        cluster.runtime.fail_starts = ["no memory left"]
        await cluster.master.move("p", "square", other_node(cluster))
        view = await until_over(cluster)
        assert (view.state, view.error) == ("rolled_back", "the new instance couldn't be started: no memory left")
        await check_sound(cluster, view)


async def test_a_new_instance_that_was_heard_too_early_leaves_a_fresh_one(cluster: Cluster) -> None:
    """Its peers won't listen to an older one again: the operator is restarted above it."""
    async with cluster.run():
        await begin(cluster)
        await held_in(cluster, MoveState.CONNECTING)
        sink = cluster.pods["p.sink-e1"]
        cluster.runtime.kill("p.square-e2")
        sink.heard_epochs["p:square>sink"] = 2
        sink.look()
        view = await until_over(cluster)
        assert view.state == "rolled_back"
        await cluster.until(lambda: cluster.operator("square").epoch == 3, passing=0.1)
        cluster.pods.release()
        await check_sound(cluster, view)


async def test_an_order_waits_for_its_pipeline_and_not_for_ever(cluster: Cluster) -> None:
    async with cluster.run() as master:
        await begin(cluster)
        target = other_node(cluster)
        cluster.pods.become_ready = False
        cluster.runtime.kill("p.sink-e1")
        await cluster.until(lambda: cluster.phase() == "degraded")
        wanted = master._parts.desired.pipelines["p"]
        await master._parts.moves.order(wanted, "square", target, cause="drift", reason="it pays")
        await cluster.until(lambda: status(cluster).state.final, passing=1.0)
        assert (status(cluster).state, status(cluster).error) == ("failed", "the pipeline wasn't at work in time")
        assert len([pod for pod in cluster.runtime.started if "square" in pod]) == 1
