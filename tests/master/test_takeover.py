"""What a master that dies leaves to the next one: scripted pods, virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nomad.errors import StateError
from nomad.master.sqlite import SqliteStore
from nomad.settings import Backoff
from tests.master.fakepods import Cluster


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    cluster = Cluster(tmp_path / "state")
    yield cluster
    await cluster.runtime.shutdown()


def since(cluster: Cluster) -> list[str]:
    """Kinds of the events since the last master has started."""
    kinds = cluster.kinds()
    return kinds[len(kinds) - kinds[::-1].index("master.started") :]


async def test_a_pipeline_that_works_on_is_not_said_to_work_again(cluster: Cluster) -> None:
    async with cluster.run(killed=True):
        await cluster.submit_and_run()
    async with cluster.run():
        await cluster.until(lambda: cluster.phase() == "running")
        await cluster.until(lambda: since(cluster).count("operator.adopted") == 3)
        assert "pipeline.running" not in since(cluster)


@pytest.mark.parametrize("paused", [False, True])
async def test_a_degraded_pipeline_is_degraded_for_the_next_master_too(cluster: Cluster, paused: bool) -> None:
    """Also while one of its operators waits for its next pod."""
    cluster.settings = replace(cluster.settings, reconcile=replace(cluster.settings.reconcile, backoff=Backoff(60.0)))
    async with cluster.run(killed=True) as master:
        await cluster.submit_and_run()
        if paused:
            cluster.runtime.kill("p.square-e1")
            await cluster.until(lambda: "operator.failed" in cluster.kinds() and not master._parts.loop._lanes)
    cluster.pods.become_ready = False
    cluster.runtime.kill("p.square-e1" if not paused else "p.sink-e1")
    async with cluster.run(killed=True):
        await cluster.until(lambda: cluster.operator("source").state == "running")
        assert cluster.phase() == "degraded"


async def test_pods_of_a_pipeline_that_cant_be_read_wait_for_a_master_that_can(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster.run(killed=True):
        await cluster.submit_and_run()

    async def none(store: SqliteStore) -> list[Any]:
        return []

    with monkeypatch.context() as patched:
        patched.setattr(SqliteStore, "pipelines", none)
        patched.setattr(SqliteStore, "unread", {"p"})
        async with cluster.run(killed=True) as master:
            await cluster.until(lambda: len(master._parts.observed.pods) == 3)
            await cluster.clock.advance(60.0)
            assert not master._parts.loop.requested.strays
    async with cluster.run():
        await cluster.until(lambda: since(cluster).count("operator.adopted") == 3)


async def test_a_pipeline_that_was_ended_with_its_master_starts(cluster: Cluster) -> None:
    async with cluster.run():
        await cluster.submit_and_run()
    async with cluster.run():
        assert cluster.phase() == "starting"
        await cluster.until(lambda: "pipeline.running" in since(cluster))


def stops(cluster: Cluster) -> list[str]:
    """Pods that were asked to end."""
    return [id for id, pod in cluster.pods.all.items() if any(said["type"] == "stop" for said in pod.heard)]


async def test_a_completed_pipeline_never_runs_again(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pods are there until the store has it: a master that died before has a next one that finds them."""
    tried: list[str] = []

    async def away(store: SqliteStore, pipeline: str, *args: Any) -> None:
        tried.append(pipeline)
        raise StateError("the disk is full")

    async with cluster.run(killed=True):
        await cluster.submit_and_run()
        with monkeypatch.context() as patch:
            patch.setattr(SqliteStore, "set_outcome", away)
            cluster.pods["p.source-e1"].say({"type": "finished"})
            await cluster.until(lambda: len(tried) > 3, passing=0.1)
            assert cluster.phase() == "completed"
            assert stops(cluster) == []
    assert len(cluster.runtime.running()) == 3
    async with cluster.run():
        await cluster.until(lambda: cluster.phase() == "running")
        cluster.pods["p.source-e1"].say({"type": "finished"})  # as pods do each time they are back
        await cluster.until(lambda: not cluster.runtime.running(), passing=0.1)
        assert cluster.phase() == "completed"
    async with cluster.run():
        await cluster.clock.advance(100.0)
        assert cluster.phase() == "completed"
        assert len(cluster.runtime.started) == 3


async def test_a_pipeline_whose_end_can_not_be_stored_can_be_removed(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(store: SqliteStore, *args: Any) -> None:
        raise StateError("the disk is full")

    monkeypatch.setattr(SqliteStore, "set_outcome", away)
    async with cluster.run() as master:
        await cluster.submit_and_run()
        cluster.pods["p.source-e1"].say({"type": "finished"})
        await cluster.until(lambda: cluster.phase() == "completed")
        removing = cluster.until(lambda: not master.pipelines(), passing=0.1)
        await asyncio.gather(master.remove("p"), removing)
        assert cluster.runtime.running() == []
