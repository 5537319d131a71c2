"""A cluster that isn't emulated: its runtime says which nodes there are, and they come and go while the master runs."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from nomad import bundle, pipeline
from nomad.errors import ConflictError, InvalidRequestError
from nomad.measure.remote import RemoteAgents
from nomad.runtime.base import NodeInfo
from tests.master.fakepods import OPERATORS, Cluster


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    cluster = Cluster(tmp_path / "state")
    cluster.topology = None
    images = {f"{sys.version_info.major}.{sys.version_info.minor}": "operator:1"}
    kubernetes = replace(cluster.settings.kubernetes, control=cluster.settings.control, images=images)
    cluster.settings = replace(cluster.settings, kubernetes=kubernetes)
    yield cluster
    await cluster.runtime.shutdown()


async def test_a_pipeline_runs(cluster: Cluster) -> None:
    async with cluster.run(killed=True):
        await cluster.submit_and_run()
    async with cluster.run():
        await cluster.until(lambda: cluster.phase() == "running", passing=0.1)
        assert cluster.operator("square").restarts == 0


async def test_nodes_come_change_and_go(cluster: Cluster) -> None:
    nodes, known = cluster.runtime._nodes, lambda: {view.id: view for view in cluster.master.nodes()}
    async with cluster.run() as master:
        nodes.append(NodeInfo("fog", labels=frozenset({"old"})))
        await cluster.until(lambda: "fog" in known(), passing=0.1)
        assert ("node.ready", "fog") in [(event.kind, event.data.get("node")) for event in master.events()]
        master._parts.book.link_sample("edge", "fog", cluster.clock.now(), round_trip=0.1)

        nodes[-1] = NodeInfo("fog", labels=frozenset({"new"}), schedulable=False)
        await cluster.until(lambda: known()["fog"].labels == ["new"], passing=0.1)
        assert not known()["fog"].schedulable

        del nodes[-1]
        await cluster.until(lambda: "fog" not in known(), passing=0.1)
        assert cluster.kinds()[-1] == "node.lost"
        assert master._parts.book.link("edge", "fog").latency is None, "another node of that name is another node"


async def test_nothing_can_be_set_by_hand(cluster: Cluster) -> None:
    async with cluster.run() as master:
        with pytest.raises(ConflictError, match="speed is measured"):
            await master.update_node("edge", speed=2.0)
        with pytest.raises(ConflictError, match="they are measured"):
            await master.set_link("edge", "cloud", latency=0.1)
        for change in (master.lose_node, master.restore_node):
            with pytest.raises(ConflictError, match="can't be made to fail"):
                await change("edge")
        assert "overrides" not in await master._parts.store.meta()


async def test_packages_that_no_agent_can_install_are_refused(cluster: Cluster) -> None:
    here = f"{sys.version_info.major}.{sys.version_info.minor}"

    def square(value: int) -> int:
        return value

    async with cluster.run() as master:
        agents = master._parts.agents = RemoteAgents(master._parts.book, cluster.clock)
        chain = pipeline.build([OPERATORS[0], pipeline.operator(requirements=["numpy==2.1"])(square), OPERATORS[-1]])
        data = bundle.make(chain, master.signing_key)
        agents.came("edge", {"address": "inproc:edge", "python": "2.7"}, None)
        with pytest.raises(
            InvalidRequestError, match=rf"Python 2\.7, and the pipeline was made with {here}"
        ) as refused:
            await master.submit(data, id="p", start="edge", end="cloud")
        assert "'square' require" in str(refused.value)
        assert not master.pipelines()
        await cluster.submit("bare")
        agents.came("cloud", {"address": "inproc:cloud", "python": here}, None)
        await master.submit(data, id="p", start="edge", end="cloud")
