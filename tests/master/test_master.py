from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest

from nomad import bundle, pipeline
from nomad.control import Shape
from nomad.delivery.driver import shake_dialer
from nomad.errors import (
    BundleError,
    BundleTampered,
    ConflictError,
    HandshakeError,
    InvalidRequestError,
    NotFoundError,
    PipelineError,
    RequestError,
    StateError,
)
from nomad.master.sqlite import SqliteStore
from nomad.runtime.base import LinkInfo, NodeInfo
from nomad.topology import Topology
from nomad.transport import registry
from tests.master.fakepods import NODES, OPERATORS, Cluster

NAMES = ("source", "square", "sink")


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    cluster = Cluster(tmp_path / "state")
    yield cluster
    await cluster.runtime.shutdown()


@pytest.fixture
async def working(cluster: Cluster) -> AsyncIterator[Cluster]:
    """A master with the pipeline `p` at work."""
    async with cluster.run():
        await cluster.submit_and_run()
        yield cluster


# Submitting


async def test_a_submitted_pipeline_comes_to_work(cluster: Cluster) -> None:
    async with cluster.run() as master:
        view = await cluster.submit()
        assert (view.id, view.start, view.end, view.codec) == ("p", "edge", "cloud", "data")
        assert view.phase in ("pending", "starting")
        await cluster.until(lambda: cluster.phase() == "running")
        assert [op.state for op in master.pipeline("p").operators] == ["running"] * 3
        assert [(op.id, op.pod, op.epoch, op.pid) for op in master.pipeline("p").operators] == [
            (f"p.{name}", f"p.{name}-e1", 1, 4711) for name in NAMES
        ]
        assert cluster.operator("source").placement.summary == "it is pinned to edge"
        await cluster.until(lambda: cluster.pods["p.source-e1"].links["p:source>square"].address)
        link = cluster.pods["p.source-e1"].links["p:source>square"]
        assert (link.address, link.peer_epoch) == ("inproc:p.square-e1", 1)
        assert cluster.pods["p.source-e1"].assignment is not None
        loaded = cluster.pods["p.square-e1"].assignment
        assert loaded is not None
        code = bundle.load_operator(
            loaded.manifest,
            loaded.signature,
            bundle.public_key(master.signing_key),
            "square",
            loaded.code,
            loaded.types,
        )
        assert code.function(7) == 49
        assert len({pod.spec.key for pod in cluster.pods.all.values()}) == 3
        nodes = {node.id: node for node in master.nodes()}
        assert sorted(op for node in nodes.values() for op in node.operators) == ["p.sink", "p.source", "p.square"]
        assert sum(node.memory_used_mb for node in nodes.values()) == 3 * 64


async def test_what_happened_has_causes(working: Cluster) -> None:
    working.runtime.kill("p.square-e1")
    await working.until(lambda: working.kinds().count("operator.ready") == 4, passing=0.1)
    events = {event.id: event for event in working.master.events()}
    story = []
    event = next(event for event in reversed(events.values()) if event.kind == "operator.ready")
    while event.cause_id is not None:
        story.append(event.kind)
        event = events[event.cause_id]
    assert story == [
        "operator.ready",
        "operator.restarting",
        "operator.failed",
        "operator.ready",
        "operator.starting",
    ]
    assert event.kind == "pipeline.submitted"


async def test_an_id_is_made_when_none_is_given(cluster: Cluster) -> None:
    async with cluster.run() as master:
        first, second = await cluster.submit(None), await cluster.submit(None)
        assert first.id != second.id
        assert {view.id for view in master.pipelines()} == {first.id, second.id}


async def bad_submit(cluster: Cluster, **changes: Any) -> Any:
    data = bundle.make(pipeline.build(OPERATORS), cluster.master.signing_key)
    return await cluster.master.submit(**{"data": data, "id": "q", "start": "edge", "end": "cloud", **changes})


async def test_what_cannot_run_is_refused_and_nothing_is_left_of_it(working: Cluster) -> None:
    master = working.master
    key = master.signing_key
    good = bundle.make(pipeline.build(OPERATORS), key)
    envelope = msgpack.unpackb(good)
    envelope["code"]["square"] = b"evil"
    needy = [pipeline.operator(op, requires={"fpga"}) if op.__name__ == "square" else op for op in OPERATORS]
    camera = [pipeline.operator(OPERATORS[0], requires={"camera"}), *OPERATORS[1:]]
    large = [pipeline.operator(op, memory="1Ti") if op.__name__ == "square" else op for op in OPERATORS]
    for changes, error, said in [
        ({"id": "p"}, ConflictError, "there is a pipeline 'p' already"),
        ({"id": "no good"}, PipelineError, "can't be the id"),
        ({"start": "edgy"}, InvalidRequestError, "start node 'edgy' is unknown; known nodes: edge, cloud"),
        ({"end": "moon"}, InvalidRequestError, "end node 'moon' is unknown"),
        ({"data": b"rubbish"}, BundleError, "not a Nomad bundle"),
        ({"data": good[:-10]}, BundleError, "not a Nomad bundle"),
        ({"data": msgpack.packb(envelope)}, BundleTampered, "operator 'square'"),
        ({"data": bundle.make(pipeline.build(OPERATORS), bytes(32))}, BundleTampered, "signature"),
        ({"data": bundle.make(pipeline.build(needy), key)}, InvalidRequestError, "'square' requires.*fpga.*label fpga"),
        (
            {"data": bundle.make(pipeline.build(camera), key)},
            InvalidRequestError,
            r"requires camera, which its node 'edge' \(the pipeline's start\) doesn't have; no node does",
        ),
        ({"data": bundle.make(pipeline.build(large), key)}, InvalidRequestError, "needs 1.*MiB.*cloud lacks"),
        ({"profile": [{"cloud_execution_time": 1.0}]}, PipelineError, "1 entries for 3 operators"),
    ]:
        with pytest.raises(error, match=said):
            await bad_submit(working, **changes)
    assert [view.id for view in master.pipelines()] == ["p"]
    assert len(working.runtime.started) == 3
    assert "q" not in {event.pipeline for event in master.events()}


async def test_pods_are_asked_for_with_what_operators_need(cluster: Cluster) -> None:
    runtime = cluster.runtime
    runtime._nodes = [NodeInfo("edge", devices={"camera": 1}), NodeInfo("cloud", devices={"screen": 1})]
    source = pipeline.operator(OPERATORS[0], devices={"camera"}, image="my/own", memory="100Mi")
    sink = pipeline.operator(OPERATORS[2], devices={"screen"}, environment={"A": "b"}, secrets={"P": "db/password"})
    async with cluster.run() as master:
        data = bundle.make(pipeline.build([source, OPERATORS[1], sink]), master.signing_key)
        with pytest.raises(InvalidRequestError, match="there is no secret db/password"):
            await bad_submit(cluster, data=data)
        runtime.secrets = {"db/password"}
        with pytest.raises(
            InvalidRequestError, match="requires device screen, which its node 'edge'.*nodes that do: cloud"
        ):
            await bad_submit(cluster, data=data, end="edge")
        view = await bad_submit(cluster, data=data)
        first, _, last = view.operators
        assert (first.image, first.devices) == ("my/own", {"camera": 1})
        assert (last.environment, last.secrets) == ({"A": "b"}, {"P": "db/password"})
        await cluster.until(lambda: cluster.phase("q") == "running")
        specs = {pod.spec.operator: pod.spec for pod in runtime.pods.values()}
        assert (specs[first.name].image, specs[first.name].memory_mb) == ("my/own", 100)
        assert specs[first.name].python == f"{sys.version_info.major}.{sys.version_info.minor}"
        assert specs[last.name].secrets == {"P": "db/password"}
        both = [source, pipeline.operator(OPERATORS[1], devices={"screen"}), sink]
        data = bundle.make(pipeline.build(both), master.signing_key)
        await master.remove("q")
        await cluster.until(lambda: not master.pipelines())
        with pytest.raises(
            InvalidRequestError, match="'square', 'sink' need 2 of the device screen together, and cloud"
        ):
            await bad_submit(cluster, data=data, id="r")
        data = bundle.make(pipeline.build([source, OPERATORS[1], sink]), master.signing_key)
        await bad_submit(cluster, data=data)
        # Its camera is taken now, and the others are in use as well.
        with pytest.raises(InvalidRequestError, match="requires device camera, which its node 'edge'.*no node does"):
            await bad_submit(cluster, data=data, id="r")
        needy = [OPERATORS[0], pipeline.operator(OPERATORS[1], devices={"nvidia.com/gpu": 2}), OPERATORS[2]]
        data = bundle.make(pipeline.build(needy), master.signing_key)
        with pytest.raises(InvalidRequestError, match=r"2 devices nvidia.com/gpu \(.*edge lacks"):
            await bad_submit(cluster, data=data, id="r")


async def test_the_second_of_two_equal_submissions_at_once_is_refused(cluster: Cluster) -> None:
    async with cluster.run():
        results = await asyncio.gather(cluster.submit(), cluster.submit(), return_exceptions=True)
        assert sorted(type(result).__name__ for result in results) == ["ConflictError", "PipelineView"]


async def test_memory_that_is_promised_is_not_given_twice(cluster: Cluster) -> None:
    async with cluster.run() as master:
        half = [pipeline.operator(op, memory="600Mi") if op.__name__ == "sink" else op for op in OPERATORS]
        data = bundle.make(pipeline.build(half), master.signing_key)
        results = await asyncio.gather(
            *(master.submit(data, id=id, start="edge", end="cloud") for id in ("a", "b")), return_exceptions=True
        )
        assert sorted(type(result).__name__ for result in results) == ["InvalidRequestError", "PipelineView"]


async def test_what_cannot_be_stored_is_not_run(working: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(*args: Any) -> None:
        raise StateError("the disk is full")

    monkeypatch.setattr(SqliteStore, "add_pipeline", full)
    with pytest.raises(StateError, match="disk is full"):
        await working.submit("q")
    assert [view.id for view in working.master.pipelines()] == ["p"]


# Failing


async def test_a_crash_is_mended_and_shown(working: Cluster) -> None:
    working.pods["p.square-e1"].beat(processed=10, last_output=b"x")
    await working.until(lambda: working.operator("square").stats.processed == 10)
    working.runtime.pods["p.square-e1"].lines += [f"line {n}" for n in range(30)]
    working.runtime.kill("p.square-e1", -11)
    await working.until(lambda: working.phase() == "degraded")
    square = working.operator("square")
    assert square.state == "restarting"
    assert "was killed by SIGSEGV; restarted in" in working.master.pipeline("p").reason
    await working.until(lambda: working.operator("square").state == "running", passing=0.1)
    assert working.phase() == "running"
    square = working.operator("square")
    assert (square.pod, square.epoch, square.restarts, square.stats.processed) == ("p.square-e2", 2, 1, 10)
    assert working.master.last_output("p", "square") == b"x"
    assert square.last_failure is not None
    assert square.last_failure.exit_code == -11
    assert square.last_failure.log == [f"line {n}" for n in range(10, 30)]
    working.pods["p.square-e2"].beat(processed=5)
    await working.until(lambda: working.operator("square").stats.processed == 15)
    assert working.runtime.started.count("p.sink-e1") == 1


async def test_a_permanent_failure_ends_the_pipeline_with_its_traceback(working: Cluster) -> None:
    square = working.pods["p.square-e1"]
    error = {"type": "ModuleNotFoundError", "message": "no module named x", "traceback": "Traceback ..."}
    square.say({"type": "failed", "error": error, "fatal": True})
    square.end(3)
    await working.until(lambda: working.master._parts.loop.is_over("p"))
    view = working.master.pipeline("p")
    assert (view.phase, view.reason) == ("failed", "operator square: ModuleNotFoundError: no module named x")
    assert [op.state for op in view.operators] == ["stopped", "failed", "stopped"]
    failure = working.operator("square").last_failure
    assert failure is not None
    assert (failure.type, failure.traceback, failure.exit_code) == ("ModuleNotFoundError", "Traceback ...", 3)
    assert not any(node.operators for node in working.master.nodes())


async def test_a_pod_that_cannot_be_started_is_tried_again(cluster: Cluster) -> None:
    async with cluster.run():
        cluster.runtime.fail_starts = ["no memory left"]
        await cluster.submit()
        await cluster.until(lambda: "operator.failed" in cluster.kinds())
        assert "no memory left" in cluster.master.pipeline("p").reason
        await cluster.until(lambda: cluster.phase() == "running", passing=0.1)


async def test_a_pod_whose_bundle_cannot_be_read_is_tried_again(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def damaged(store: SqliteStore, digest: str) -> bytes:
        return b"not what was stored"

    async with cluster.run():
        with monkeypatch.context() as patch:
            patch.setattr(SqliteStore, "bundle", damaged)
            await cluster.submit()
            await cluster.until(lambda: "operator.failed" in cluster.kinds())
        assert "not a Nomad bundle" in cluster.master.pipeline("p").reason
        await cluster.until(lambda: cluster.phase() == "running", passing=0.1)
        await cluster.until(lambda: len(cluster.runtime.running()) == 3, passing=1.0)  # none is left of the first


async def test_an_error_of_a_message_is_shown_and_ends_nothing(working: Cluster) -> None:
    error = {"type": "ValueError", "message": "no good", "traceback": "Traceback ..."}
    working.pods["p.square-e1"].beat(error, failed=1, set_aside=1)
    await working.until(lambda: working.operator("square").last_failure)
    square = working.operator("square")
    assert square.last_failure is not None
    assert (square.last_failure.message, square.stats.set_aside, square.state) == ("no good", 1, "running")
    working.pods["p.square-e1"].beat(error | {"message": "worse"}, failed=2, set_aside=2)
    await working.until(lambda: working.operator("square").stats.failed == 2)
    (event,) = [event for event in working.master.events() if event.kind == "operator.failing"]
    assert event.message == "square has its first message that failed: ValueError: no good"


async def test_equal_errors_of_messages_have_the_time_of_the_last(working: Cluster) -> None:
    pod, begin = working.pods["p.square-e1"], working.clock.wall()
    error = {"type": "ValueError", "message": "no good", "traceback": "Traceback ..."}
    times = []
    for processed, failed in enumerate((0, 1, 1, 2), 1):
        pod.beat(error if failed else None, processed=processed, failed=failed)
        await working.until(lambda n=processed: working.operator("square").stats.processed == n)
        failure = working.operator("square").last_failure
        times.append(failure and failure.time - begin)
        await working.clock.advance(1.0)
    assert times == [None, 1.0, 1.0, 3.0], "heart-beats repeat what failed last"


async def test_silence_is_shown_and_nothing_is_killed_for_it(working: Cluster) -> None:
    await working.clock.advance(60.0)
    await working.until(lambda: working.operator("square").state == "unresponsive")
    assert working.kinds().count("operator.unresponsive") == 3
    assert working.phase() == "running"
    working.pods["p.square-e1"].beat()
    await working.until(lambda: working.operator("square").state == "running")
    assert len(working.runtime.started) == 3


async def test_of_many_pods_silence_is_shown_later(cluster: Cluster) -> None:
    """Three are many for a master that wants a heart-beat each other second at the most."""
    cluster.settings = replace(cluster.settings, heartbeats=replace(cluster.settings.heartbeats, most=0.5))
    async with cluster.run():
        await cluster.submit_and_run()
        square = cluster.pods["p.square-e1"]
        await cluster.until(lambda: {"type": "pace", "seconds": 8.0} in square.heard)
        await cluster.clock.advance(2.5 * 8 - 1)
        square.beat()
        await cluster.until(lambda: cluster.operator("square").heartbeat_age == 0.0)
        await cluster.clock.advance(2.5 * 8 - 1)
        await cluster.until(lambda: cluster.operator("sink").state == "unresponsive")
        assert cluster.operator("square").state == "running"


async def test_while_all_are_heard_nothing_is_looked_at(working: Cluster) -> None:
    rounds = 0

    def stepped(seconds: float) -> None:
        nonlocal rounds
        rounds += 1

    async def beats(seconds: int, *names: str) -> None:
        for _ in range(seconds):
            await working.clock.advance(1)
            for name in names:
                working.pods[f"p.{name}-e1"].beat()
            for name in names:
                await working.until(lambda name=name: working.operator(name).heartbeat_age == 0.0)  # type: ignore[misc]

    await beats(3, "source", "square", "sink")
    working.master._parts.loop.stepped = stepped
    await beats(60, "source", "square", "sink")
    assert rounds == 0
    await beats(10, "source", "sink")
    assert working.operator("square").state == "unresponsive"
    assert rounds == 2, "one that notes it, and one when that is done"
    await beats(30, "source", "sink")
    assert rounds == 2


async def test_a_lost_control_connection_is_no_failure(working: Cluster) -> None:
    square = working.pods["p.square-e1"]
    said = len(square.heard)
    square.disconnect()
    await working.until(lambda: len(square.heard) > said)
    assert square.heard[-1]["type"] == "peers"
    assert len(working.runtime.started) == 3


# Ending


async def test_a_finite_pipeline_completes_and_its_last_words_stay(working: Cluster) -> None:
    def last_words(pod: Any) -> None:
        pod.beat(processed=100, last_output=pod.spec.operator.encode())

    working.pods.before_end = last_words
    working.pods["p.source-e1"].say({"type": "finished"})
    await working.until(lambda: not working.runtime.running())
    await working.until(lambda: "operator.stopped" in working.kinds())
    await working.until(lambda: all(op.state == "finished" for op in working.master.pipeline("p").operators))
    assert working.phase() == "completed"
    assert [op.stats.processed for op in working.master.pipeline("p").operators] == [100, 100, 100]
    assert working.master.last_output("p", "sink") == b"sink"
    assert await working.master.stop("p") == working.master.pipeline("p")  # nothing to stop
    assert working.phase() == "completed"


async def test_stopping_ends_the_source_first(working: Cluster) -> None:
    ended: list[str] = []
    working.pods.before_end = lambda pod: ended.append(pod.spec.operator)
    view = await working.master.stop("p")
    assert view.phase == "stopping"
    await working.until(lambda: working.phase() == "stopped")
    assert ended[0] == "source"
    assert sorted(ended) == ["sink", "source", "square"]
    stop = next(message for message in working.pods["p.source-e1"].heard if message["type"] == "stop")
    assert stop["drain"] is True
    assert (await working.master.stop("p")).phase == "stopped"


async def test_what_does_not_end_is_ended_by_force(working: Cluster) -> None:
    working.pods.obey = False
    await working.master.stop("p")
    await working.until(lambda: working.phase() == "stopped", passing=1.0)
    assert working.runtime.running() == []
    assert working.kinds().count("pod.killed") == 3


async def test_a_removed_pipeline_leaves_nothing_and_its_id_is_free(working: Cluster) -> None:
    await working.master.remove("p")
    assert working.runtime.running() == []
    assert working.runtime.forgotten == ["p"]
    assert working.master.pipelines() == []
    with pytest.raises(NotFoundError):
        working.master.pipeline("p")
    await working.submit_and_run()
    assert [op.epoch for op in working.master.pipeline("p").operators] == [2, 2, 2]
    assert working.operator("square").stats.processed == 0


async def test_a_removal_that_cannot_be_stored_is_tried_again(
    working: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove, failures = SqliteStore.remove_pipeline, ["the disk is full", "still"]

    async def full_at_first(store: SqliteStore, *args: Any) -> None:
        if failures:
            raise StateError(failures.pop())
        await remove(store, *args)

    monkeypatch.setattr(SqliteStore, "remove_pipeline", full_at_first)
    removing = asyncio.create_task(working.master.remove("p"))
    await working.until(removing.done, passing=0.5)
    await removing
    assert working.master.pipelines() == []


async def test_removing_twice_at_once_is_removing_once(working: Cluster) -> None:
    await asyncio.gather(working.master.remove("p"), working.master.remove("p"))
    assert working.master.pipelines() == []
    with pytest.raises(NotFoundError):
        await working.master.remove("p")


# Restarts of the master


async def test_a_killed_masters_pods_are_adopted_and_none_is_restarted(cluster: Cluster) -> None:
    async with cluster.run(killed=True):
        await cluster.submit_and_run()
        cluster.pods["p.square-e1"].beat(processed=10)
        await cluster.until(lambda: cluster.operator("square").stats.processed == 10)
    assert len(cluster.runtime.running()) == 3
    async with cluster.run() as master:
        assert [view.id for view in master.pipelines()] == ["p"]
        await cluster.until(lambda: cluster.phase() == "running")
        await cluster.clock.advance(cluster.settings.reconcile.adopt_grace * 2)
        assert cluster.kinds().count("operator.adopted") == 3
        assert len(cluster.runtime.started) == 3
        assert [op.restarts for op in master.pipeline("p").operators] == [0, 0, 0]
        assert not any(message["type"] == "stop" for pod in cluster.pods.all.values() for message in pod.heard)
        cluster.pods["p.square-e1"].beat(processed=12)
        await cluster.until(lambda: cluster.operator("square").stats.processed == 12)
    assert cluster.runtime.running() == []


async def test_an_adopted_pod_that_does_not_report_is_replaced(cluster: Cluster) -> None:
    async with cluster.run(killed=True):
        await cluster.submit_and_run()
    cluster.pods["p.square-e1"].disconnect(stay=True)
    async with cluster.run():
        await cluster.until(lambda: cluster.operator("sink").state == "running")
        assert len(cluster.runtime.started) == 3
        await cluster.until(lambda: cluster.operator("square").epoch == 2, passing=1.0)
        await cluster.until(lambda: cluster.phase() == "running")
        assert cluster.runtime.started[3:] == ["p.square-e2"]


async def test_what_died_with_the_master_is_started_again(cluster: Cluster) -> None:
    async with cluster.run(killed=True):
        await cluster.submit_and_run()
    cluster.runtime.kill("p.square-e1")
    del cluster.runtime.pods["p.sink-e1"]  # asked for by a master that died before it was started
    async with cluster.run():
        await cluster.until(lambda: cluster.phase() == "running", passing=0.1)
        assert cluster.runtime.started[3:] == ["p.square-e2", "p.sink-e2"]


async def test_pods_of_a_pipeline_that_was_removed_meanwhile_are_ended(cluster: Cluster) -> None:
    async with cluster.run(killed=True):
        await cluster.submit_and_run()
    store = await SqliteStore.open(cluster.settings.state)
    await store.remove_pipeline("p", 1)
    await store.close()
    async with cluster.run():
        await cluster.until(lambda: not cluster.runtime.running(), passing=0.1)


async def test_a_new_master_can_end_at_once_what_it_has_just_found(cluster: Cluster) -> None:
    async with cluster.run(killed=True):
        await cluster.submit_and_run()
    for pod in cluster.pods.all.values():
        pod.disconnect(stay=True)
    async with cluster.run() as master:
        await master.remove("p")
        assert cluster.runtime.running() == []
        assert master.pipelines() == []


async def test_a_normal_end_stops_the_pods_and_the_next_master_goes_on(cluster: Cluster) -> None:
    async with cluster.run():
        await cluster.submit_and_run()
    assert cluster.runtime.running() == []
    async with cluster.run() as master:
        await cluster.until(lambda: cluster.phase() == "running", passing=0.1)
        assert [op.epoch for op in master.pipeline("p").operators] == [2, 2, 2]


async def test_what_is_over_stays_over(cluster: Cluster) -> None:
    async with cluster.run():
        await cluster.submit_and_run()
        cluster.pods["p.sink-e1"].beat(processed=7, last_output=b"last")
        await cluster.until(lambda: cluster.operator("sink").stats.processed == 7)
        await cluster.master.stop("p")
        await cluster.until(lambda: cluster.phase() == "stopped")
    async with cluster.run() as master:
        await cluster.clock.advance(100.0)
        assert cluster.phase() == "stopped"
        assert cluster.operator("sink").stats.processed == 7
        assert master.last_output("p", "sink") == b"last"
        assert len(cluster.runtime.started) == 3
        assert [item async for item in master.tail("p", "sink")] == []
        assert [line async for line in master.follow_logs("p")] == []


async def test_token_and_key_stay_the_same(cluster: Cluster) -> None:
    async with cluster.run() as master:
        before = (master.token, master.signing_key)
        assert master.ready
    async with cluster.run() as master:
        assert (master.token, master.signing_key) == before
    assert not master.ready
    with pytest.raises(RequestError, match="isn't running"):
        master.pipelines()


async def test_pods_that_do_not_end_are_left_to_the_next_master(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    quick = replace(cluster.settings.reconcile, drain_grace=0.01, stop_grace=0.01, retry=0.01)
    cluster.settings = replace(cluster.settings, reconcile=quick)
    cluster.pods.obey = False
    async with cluster.run():
        await cluster.submit_and_run()
    assert "not all pods have ended" in caplog.text
    assert len(cluster.runtime.running()) == 3


async def test_a_master_whose_loop_fails_ends_and_says_why(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    async def use() -> None:
        async with cluster.run() as master:
            monkeypatch.setattr("nomad.master.reconcile.step", lambda *args, **more: 1 / 0)
            await cluster.submit()
            await asyncio.wait_for(master.remove("p"), 30)

    with pytest.raises(ZeroDivisionError):
        await use()


# Links and nodes


async def test_a_link_is_changed_while_it_is_used(working: Cluster) -> None:
    view = await working.master.set_link("edge", "cloud", latency=0.08, bandwidth=1e6)
    assert (view.latency, view.bandwidth, view.loss) == (0.08, 1e6, 0.0)
    source = working.pods["p.source-e1"]
    await working.until(lambda: source.links["p:source>square"].shape.latency == 0.08)
    view = await working.master.set_link("edge", "cloud", loss=0.5, unlimited=True)
    assert (view.latency, view.bandwidth, view.loss) == (0.08, None, 0.5)
    back = next(view for view in working.master.links() if (view.source, view.target) == ("cloud", "edge"))
    assert back.latency == 0.0
    assert "link.changed" in working.kinds()


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        ({"source": "edge", "target": "moon"}, NotFoundError, "no node 'moon'"),
        ({"source": "edge", "target": "edge"}, InvalidRequestError, "from one node to another"),
        ({"latency": -1.0}, InvalidRequestError, "latency can't be -1"),
        ({"latency": float("nan")}, InvalidRequestError, "latency can't be nan"),
        ({"jitter": 1.0}, InvalidRequestError, "jitter"),
        ({"bandwidth": 0.0}, InvalidRequestError, "bandwidth"),
        ({"loss": 1.0}, InvalidRequestError, "loss must be"),
    ],
)
async def test_links_that_cannot_be(cluster: Cluster, call: Any, error: type[Exception], said: str) -> None:
    async with cluster.run() as master:
        before = master.links()
        with pytest.raises(error, match=said):
            await master.set_link(**{"source": "edge", "target": "cloud", **call})
        assert master.links() == before


async def test_changed_links_and_nodes_outlive_the_master_until_the_topology_is_edited(cluster: Cluster) -> None:
    async with cluster.run() as master:
        await master.set_link("edge", "cloud", latency=0.08)
        assert (await master.update_node("edge", speed=0.5)).speed == 0.5
    async with cluster.run() as master:
        assert master.links()[0].latency == 0.08
        assert master.node("edge").speed == 0.5
    cluster.topology = Topology(NODES, (LinkInfo("cloud", "edge", Shape(latency=0.01)),))
    async with cluster.run() as master:
        assert [link.latency for link in master.links()] == [0.0, 0.01]
        assert master.node("edge").speed == 1.0


async def test_what_cannot_be_stored_is_not_changed(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(*args: Any) -> None:
        raise StateError("the disk is full")

    async with cluster.run() as master:
        monkeypatch.setattr(SqliteStore, "set_meta", full)
        with pytest.raises(StateError):
            await master.set_link("edge", "cloud", latency=0.08)
        with pytest.raises(StateError):
            await master.update_node("edge", speed=0.5)
        assert master.links()[0].latency == 0.0
        assert master.node("edge").speed == 1.0


async def test_a_changed_speed_reaches_the_pods(working: Cluster) -> None:
    await working.master.update_node("edge", speed=0.25)
    await working.until(lambda: working.pods["p.source-e1"].speed == 0.25)
    with pytest.raises(InvalidRequestError, match="above 0"):
        await working.master.update_node("edge", speed=0.0)
    with pytest.raises(NotFoundError):
        await working.master.update_node("moon", speed=1.0)


async def test_round_trips_are_shown_by_pair_of_nodes(working: Cluster) -> None:
    link = {"link": "p:source>square", "direction": "out", "state": "open", "connected": True, "rtt": 0.04}
    working.pods["p.source-e1"].beat(links=[link])
    await working.until(lambda: any(view.rtt for view in working.master.links()))
    assert {(view.source, view.target): view.rtt for view in working.master.links() if view.rtt} == {
        ("edge", "cloud"): 0.04
    }


# Profiles


async def test_a_profile_is_kept(cluster: Cluster) -> None:
    async with cluster.run() as master:
        await cluster.submit(profile=[{"cloud_execution_time": 0.5}, {"output_msg_size": 10.0}, {}])
        assert master.pipeline("p").profile == [{"cloud_execution_time": 0.5}, {"output_msg_size": 10.0}, {}]
        with pytest.raises(PipelineError, match="2 entries for 3"):
            await master.update_profile("p", [{}, {}])
        await master.update_profile("p", [{}, {}, {"cloud_execution_time": 1.0}])
    async with cluster.run() as master:
        assert master.pipeline("p").profile == [{}, {}, {"cloud_execution_time": 1.0}]
        assert (await master.update_profile("p", [])).profile == []


# Talking with pods


async def test_outputs_are_tapped_once_for_all_readers(working: Cluster) -> None:
    square = working.pods["p.square-e1"]

    def taps() -> list[bool]:
        return [message["args"]["on"] for message in square.heard if message["type"] == "request"]

    first, second = working.master.tail("p", "square"), working.master.tail("p", "square")
    await working.until(taps)
    square.say({"type": "outputs", "items": [b"1", b"2"], "skipped": 3})
    square.say({"type": "outputs", "items": [b"3"], "skipped": 0})
    for reader in (first, second):
        assert [tuple(await anext(reader)) for _ in range(3)] == [(b"1", 0), (b"2", 0), (b"3", 3)]
    await first.aclose()
    assert taps() == [True]
    await second.aclose()
    await working.until(lambda: taps() == [True, False])


async def test_a_slow_reader_loses_the_oldest_and_is_told(cluster: Cluster) -> None:
    cluster.settings = replace(cluster.settings, history=replace(cluster.settings.history, tail_queue=2))
    async with cluster.run() as master:
        await cluster.submit_and_run()
        slow, last = master.tail("p", "square"), master.tail("p", "sink")
        for name in ("square", "sink"):
            cluster.pods[f"p.{name}-e1"].say({"type": "outputs", "items": [b"%d" % n for n in range(5)], "skipped": 0})
        await anext(last)
        assert tuple(await anext(slow)) == (b"3", 3)
        await slow.aclose()
        await last.aclose()


async def test_a_reader_goes_on_over_a_restart_and_ends_with_the_pipeline(working: Cluster) -> None:
    reader = working.master.tail("p", "square")
    working.runtime.kill("p.square-e1")
    await working.until(lambda: working.operator("square").epoch == 2, passing=0.1)
    await working.until(lambda: working.operator("square").state == "running")
    square = working.pods["p.square-e2"]
    await working.until(lambda: any(message.get("method") == "tap" for message in square.heard))
    square.say({"type": "outputs", "items": [b"again"], "skipped": 0})
    assert (await anext(reader)).value == b"again"
    working.pods.before_end = lambda pod: pod.say({"type": "outputs", "items": [b"last"], "skipped": 0})
    await working.master.stop("p")
    async with asyncio.timeout(30):
        assert [item.value async for item in reader] == [b"last"]


async def test_messages_that_were_set_aside(working: Cluster) -> None:
    error = {"type": "ValueError", "message": "no", "traceback": "T"}
    working.pods.answers = {
        "set_aside": lambda args: {
            "ok": True,
            "value": [{"id": 1, "time": 2.0, "error": error, "attempts": 1, "value": b"v"}],
        },
        "rerun": lambda args: {"ok": True, "value": {"ran": len(args["ids"] or [0] * 9), "failed": 0}},
        "drop": lambda args: {"ok": False, "error": {"type": "X", "message": "can't be dropped now"}},
    }
    (record,) = await working.master.set_aside("p", "square")
    assert (record.id, record.value, record.error) == ("1", b"v", error)
    assert await working.master.rerun("p", "square", ["1", "2"]) == {"ran": 2, "failed": 0}
    assert await working.master.rerun("p", "square") == {"ran": 9, "failed": 0}
    with pytest.raises(ConflictError, match="can't be dropped now"):
        await working.master.drop("p", "square")
    with pytest.raises(InvalidRequestError, match="'x' is no id"):
        await working.master.rerun("p", "square", ["x"])
    with pytest.raises(NotFoundError, match="has no operator 'cube'; it has source, square, sink"):
        await working.master.set_aside("p", "cube")

    def paged(args: dict[str, Any]) -> dict[str, Any]:
        first = int(args["after"]) + 1
        ids = range(first, min(first + 2, 6))
        value = [{"id": id, "time": 2.0, "error": error, "attempts": 1, "value": b"v"} for id in ids]
        return {"ok": True, "value": value}

    working.pods.answers["set_aside"] = paged
    assert [record.id for record in await working.master.set_aside("p", "square")] == ["1", "2", "3", "4", "5"]
    working.pods.answers["set_aside"] = lambda args: {"ok": True, "value": [{"id": []}]}
    with pytest.raises(RequestError, match="isn't valid"):
        await working.master.set_aside("p", "square")


async def test_requests_to_pods_that_do_not_answer(cluster: Cluster) -> None:
    cluster.settings = replace(cluster.settings, heartbeats=replace(cluster.settings.heartbeats, request_timeout=0.05))
    async with cluster.run() as master:
        await cluster.submit_and_run()
        with pytest.raises(RequestError, match="hasn't answered"):
            await master.set_aside("p", "square")
        square = cluster.pods["p.square-e1"]
        cluster.pods.answers = {"set_aside": lambda args: square.disconnect(stay=True) or {}}
        with pytest.raises(RequestError, match=r"gone away|isn't connected|just gone"):
            await master.set_aside("p", "square")
        await cluster.until(lambda: cluster.master._parts.observed.pods["p.square-e1"].connection is None)
        with pytest.raises(RequestError, match="isn't connected"):
            await master.set_aside("p", "square")
        await master.stop("p")
        await cluster.until(lambda: cluster.phase() == "stopped", passing=1.0)
        with pytest.raises(ConflictError, match="doesn't run now|has ended: submit it again"):
            await master.set_aside("p", "square")


@pytest.mark.parametrize(
    "message",
    [
        {"type": "ready", "address": 7, "pid": 1},
        {"type": "ready", "address": None, "pid": "x"},
        {"type": "heartbeat", "stats": {"processed": "many"}},
        {"type": "heartbeat", "stats": {"processed": "9" * 400}},
        {"type": "heartbeat", "stats": {"cpu": math.inf}},
        {"type": "heartbeat", "stats": {"busy_seconds": math.nan}},
        {"type": "heartbeat", "stats": {"links": [{"link": 3}]}},
        {"type": "heartbeat", "stats": {"links": [{"link": "l", "direction": "in", "unsettled_bytes": "9" * 400}]}},
        {"type": "heartbeat"},
        {"type": "failed", "error": "no map"},
        {"type": "outputs", "items": 3, "skipped": 0},
        {"type": "outputs", "items": [3], "skipped": 0},
        {"type": "outputs", "items": [], "skipped": None},
        {"type": "dance"},
        {"no": "type"},
    ],
)
async def test_a_pod_that_says_what_is_not_valid_is_cut_off_and_harms_nobody(
    working: Cluster, message: dict[str, Any]
) -> None:
    square = working.pods["p.square-e1"]
    square.disconnect(stay=True)
    square.reconnect()
    said = len(square.heard)
    await working.until(lambda: len(square.heard) > said)
    said = len(square.heard)
    square.say(message)
    await working.until(lambda: len(square.heard) > said)  # it was cut off, dialed again, and was told its peers
    assert working.phase() == "running"
    assert working.master.pipeline("p").operators[1].stats.processed == 0


async def test_who_cannot_prove_to_be_a_wanted_pod_is_turned_away(working: Cluster) -> None:
    for identity, key in [("p.square-e1", b"x" * 32), ("p.square-e2", b"x" * 32), ("nonsense", b"x" * 32)]:
        conn = await registry.connect(working.settings.control)
        with pytest.raises(HandshakeError):
            await shake_dialer(conn, key, identity, {})
        conn.abort()
    assert working.operator("square").state == "running"


# Lines, events, metrics


async def test_lines_of_all_pods_that_are_kept(working: Cluster) -> None:
    working.runtime.pods["p.square-e1"].lines += ["a", "b"]
    working.runtime.pods["p.sink-e1"].lines += ["c"]
    working.runtime.kill("p.square-e1")
    await working.until(lambda: working.operator("square").epoch == 2, passing=0.1)
    await working.until(lambda: "p.square-e2" in working.runtime.pods)
    working.runtime.pods["p.square-e2"].lines += ["d"]
    lines = [(line.operator, line.pod, line.line) for line in await working.master.logs("p")]
    assert lines == [
        ("square", "p.square-e1", "a"),
        ("square", "p.square-e1", "b"),
        ("square", "p.square-e2", "d"),
        ("sink", "p.sink-e1", "c"),
    ]
    assert [line.line for line in await working.master.logs("p", "square", 2)] == ["b", "d"]
    assert await working.master.logs("p", "square", 0) == []
    with pytest.raises(NotFoundError):
        await working.master.logs("p", "cube")


async def test_lines_are_followed_over_a_restart_until_the_end(working: Cluster) -> None:
    follower = working.master.follow_logs("p", "square")
    working.runtime.say("p.square-e1", "first")
    assert (await anext(follower)).line == "first"
    following = asyncio.create_task(anext(follower))
    working.runtime.kill("p.square-e1")
    await working.until(
        lambda: working.operator("square").state == "running" and working.operator("square").epoch == 2, passing=0.1
    )
    await working.until(lambda: len(working.runtime.pods["p.square-e2"].printed))
    working.runtime.say("p.square-e2", "second")
    line = await following
    assert (line.pod, line.line) == ("p.square-e2", "second")
    await working.master.stop("p")
    async with asyncio.timeout(30):
        assert [line async for line in follower] == []


async def test_a_follower_who_leaves_leaves_nothing(working: Cluster) -> None:
    follower = working.master.follow_logs("p")
    working.runtime.say("p.square-e1", "first")
    assert (await anext(follower)).line == "first"
    await follower.aclose()


async def test_events_are_kept_and_followed(cluster: Cluster) -> None:
    async with cluster.run() as master:
        live = master.subscribe_events()
        await cluster.submit_and_run()
        assert (await anext(live)).kind == "pipeline.submitted"
        kept = master.events("p")
        assert {event.pipeline for event in kept} == {"p"}
        assert master.events("p", after=kept[-1].id) == []
        assert master.events(limit=1)[0].id == master.events()[-1].id
    assert [event async for event in live][-1].kind == "operator.stopped"
    async with cluster.run() as master:
        assert "pipeline.submitted" in cluster.kinds()
        assert [event.id for event in master.events()] == sorted({event.id for event in master.events()})


async def test_metrics(working: Cluster) -> None:
    working.pods["p.square-e1"].beat(processed=5, latency_p50=0.25, service_time=0.5, rss=1000)
    await working.until(lambda: working.operator("square").stats.processed == 5)
    node = working.operator("square").node
    lines = (await working.master.metrics()).decode().splitlines()
    labels = f'node="{node}",operator="square",pipeline="p"'
    for expected in [
        'nomad_pipelines{phase="running"} 1.0',
        'nomad_pipelines{phase="failed"} 0.0',
        "nomad_nodes 2.0",
        'nomad_pods_connected{way="direct"} 3.0',
        f"nomad_operator_processed_total{{{labels}}} 5.0",
        f"nomad_operator_service_seconds{{{labels}}} 0.5",
        f"nomad_operator_restarts_total{{{labels}}} 0.0",
        f"nomad_operator_resident_memory_bytes{{{labels}}} 1000.0",
        f"nomad_operator_up{{{labels}}} 1.0",
        f'nomad_operator_latency_seconds{{{labels},quantile="0.5"}} 0.25',
    ]:
        assert expected in lines, expected
