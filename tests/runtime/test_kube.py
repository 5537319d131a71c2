"""What is made of the nodes and pods that a cluster shows."""

from __future__ import annotations

from typing import Any

import pytest

from nomad.kubernetes import names
from nomad.master.pace import STEPS, Pace
from nomad.runtime import kubenodes, kubepods
from nomad.runtime.base import PodPhase
from nomad.runtime.kubenodes import Nodes, quantity
from nomad.settings import Heartbeats
from tests.clock import VirtualClock


def node(name: str = "edge-1", *, ready: str = "True", spec: Any = None, **labels: str) -> dict[str, Any]:
    return {
        "metadata": {
            "name": name,
            "labels": {key.replace("__", "/").replace("_", "."): v for key, v in labels.items()},
        },
        "spec": spec or {},
        "status": {
            "allocatable": {
                "cpu": "1900m",
                "memory": "4Gi",
                "pods": "110",
                "nvidia.com/gpu": "1",
                "nomad.dev/cam": "2",
            },
            "conditions": [{"type": "MemoryPressure", "status": "False"}, {"type": "Ready", "status": ready}],
            "nodeInfo": {"architecture": "arm64"},
        },
    }


def pod(status: dict[str, Any], **metadata: Any) -> kubepods.KubePod:
    labels = {names.NODE_LABEL: "edge", names.STATE_LABEL: names.TAKEN}
    return kubepods.take(
        {
            "metadata": {
                "name": "test-square-e3",
                "uid": "u",
                "labels": labels,
                "annotations": {names.POD_ANNOTATION: "test.square-e3"},
                **metadata,
            },
            "spec": {"containers": [{"name": "operator", "image": "operator:1"}]},
            "status": status,
        }
    )


def container(**state: Any) -> list[dict[str, Any]]:
    return [{"name": "operator", "state": state}]


def test_a_node_is_what_can_be_allocated_on_it() -> None:
    item = node(nomad_dev__tier="edge")
    item["metadata"]["labels"]["topology.kubernetes.io/zone"] = "north"
    info = kubenodes.take(item, ()).info
    assert (info.id, info.cores, info.memory_mb, info.arch, info.zone) == ("edge-1", 1.9, 4096.0, "aarch64", "north")
    assert {"edge", "nomad.dev/tier", "nomad.dev/tier=edge"} <= info.labels
    assert info.devices == {"nvidia.com/gpu": 1, "nomad.dev/cam": 2, "cam": 2}
    assert (info.ready, info.schedulable, info.reachable) == (True, True, True)


def test_a_node_may_be_called_otherwise_and_dial_out_only() -> None:
    found = kubenodes.take(node(nomad_dev__name="fog", nomad_dev__reachable="false"), ())
    assert (found.host, found.info.id, found.info.reachable) == ("edge-1", "fog", False)


@pytest.mark.parametrize(
    ("taint", "tolerations", "schedulable"),
    [
        ({"key": "gpu", "value": "yes", "effect": "NoSchedule"}, (), False),
        ({"key": "gpu", "value": "yes", "effect": "PreferNoSchedule"}, (), True),
        ({"key": "gpu", "value": "yes", "effect": "NoSchedule"}, ({"key": "gpu", "operator": "Exists"},), True),
        ({"key": "gpu", "value": "yes", "effect": "NoSchedule"}, ({"key": "gpu", "value": "yes"},), True),
        ({"key": "gpu", "value": "yes", "effect": "NoSchedule"}, ({"key": "gpu", "value": "no"},), False),
        ({"key": "gpu", "effect": "NoExecute"}, ({"operator": "Exists"},), True),
        ({"key": "gpu", "effect": "NoExecute"}, ({"operator": "Exists", "effect": "NoSchedule"},), False),
        ({"key": "node.kubernetes.io/unreachable", "effect": "NoExecute"}, (), True),
        ({"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"}, (), False),
    ],
)
def test_taints_keep_pods_away_that_do_not_tolerate_them(taint: Any, tolerations: Any, schedulable: bool) -> None:
    assert kubenodes.take(node(spec={"taints": [taint]}), tolerations).info.schedulable is schedulable


def test_a_cordoned_node_takes_no_new_pods() -> None:
    info = kubenodes.take(node(spec={"unschedulable": True}), ()).info
    assert (info.ready, info.schedulable) == (True, False)


@pytest.mark.parametrize(("text", "value"), [("100m", 0.1), ("16Gi", 2**34), ("1e3", 1000), ("2", 2), ("5k", 5000)])
def test_quantities_are_numbers(text: str, value: float) -> None:
    assert float(quantity(text)) == value


async def test_a_node_that_the_cluster_lost_is_there_while_it_is_heard() -> None:
    clock = VirtualClock()
    nodes = Nodes(clock, 10.0)
    there = kubenodes.take(node(), ())
    assert nodes.changed(None, there) == {"edge-1"}
    shown = nodes.all()
    assert nodes.all() is shown
    gone = kubenodes.take(node(ready="Unknown"), ())
    nodes.changed(there, gone)
    assert [info.ready for info in nodes.all()] == [True]  # whoever lives there has just not had the time to say so
    await clock.advance(10.0)
    assert [info.ready for info in nodes.all()] == [False]
    nodes.heard("edge-1")
    assert [info.ready for info in nodes.all()] == [True]
    assert not nodes.usable("edge-1")
    await clock.advance(9.0)
    assert nodes.all() is nodes.all()
    assert [info.ready for info in nodes.all()] == [True]
    await clock.advance(1.0)
    assert [info.ready for info in nodes.all()] == [False]
    nodes.changed(gone, there)
    assert [info.ready for info in nodes.all()] == [True]
    nodes.changed(there, None)
    assert nodes.all() == ()


async def test_a_node_whose_pods_are_seldom_heard_has_longer() -> None:
    """Pods of a large cluster without agents: the cluster doesn't hear the node, and they are there."""
    clock = VirtualClock()
    pace = Pace(Heartbeats(), clock)
    nodes = Nodes(clock, 10.0)
    nodes.missed = lambda: pace.missed
    nodes.changed(None, kubenodes.take(node(ready="Unknown"), ()))
    pace.count(5000)
    for _ in range(5):
        nodes.heard("edge-1")
        await clock.advance(STEPS[-1])
        assert [info.ready for info in nodes.all()] == [True]
    await clock.advance(STEPS[-1])
    assert [info.ready for info in nodes.all()] == [True], "one heart-beat may be late"
    await clock.advance(8.0)
    assert [info.ready for info in nodes.all()] == [False]
    nodes.heard("edge-1")
    pace.count(0)
    await clock.advance(39.0)
    assert [info.ready for info in nodes.all()] == [True], "it was told the quicker pace just now"
    await clock.advance(1.0)
    assert [info.ready for info in nodes.all()] == [False]
    nodes.heard("edge-1")
    await clock.advance(10.0)
    assert [info.ready for info in nodes.all()] == [False]


async def test_a_node_that_is_given_another_name_is_another_node() -> None:
    nodes = Nodes(VirtualClock(), 10.0)
    before, after = kubenodes.take(node(), ()), kubenodes.take(node(nomad_dev__name="fog"), ())
    nodes.changed(None, before)
    assert nodes.at("edge-1") == "edge-1"
    assert nodes.changed(before, after) == {"edge-1", "fog"}
    assert nodes.at("edge-1") == "fog"
    assert nodes.at("fog") is None
    assert [info.id for info in nodes.all()] == ["fog"]


async def test_of_two_nodes_of_one_name_the_second_goes_by_its_host_name(caplog: pytest.LogCaptureFixture) -> None:
    nodes = Nodes(VirtualClock(), 10.0)
    first = kubenodes.take(node("one", nomad_dev__name="fog"), ())
    second = kubenodes.take(node("two", nomad_dev__name="fog"), ())
    assert nodes.changed(None, first) == {"fog"}
    assert nodes.changed(None, second) == {"two"}
    again = kubenodes.take(node("two", ready="False", nomad_dev__name="fog"), ())
    assert nodes.changed(second, again) == {"two"}
    assert {id: found.host for id in nodes.ids() if (found := nodes.get(id))} == {"fog": "one", "two": "two"}
    assert [info.id for info in nodes.all()] == ["fog", "two"]
    assert (nodes.at("one"), nodes.at("two"), nodes.named("fog")) == ("fog", "two", "fog")
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["two nodes want to be called fog"]
    assert nodes.changed(first, None) == {"fog"}
    assert nodes.changed(again, second) == {"two"}  # which has its pods by that name
    assert nodes.changed(second, kubenodes.take(node("two", nomad_dev__name="cloud"), ())) == {"two", "cloud"}
    assert nodes.ids() == ("cloud",)


async def test_a_node_whose_host_name_another_one_has_taken_is_there_too() -> None:
    nodes = Nodes(VirtualClock(), 10.0)
    nodes.changed(None, kubenodes.take(node("one", nomad_dev__name="two"), ()))
    assert nodes.changed(None, kubenodes.take(node("two"), ())) == {"two-2"}
    assert (nodes.at("one"), nodes.at("two")) == ("two", "two-2")


def test_a_pod_is_running_once_its_container_is() -> None:
    assert pod({"phase": "Pending"}).phase is PodPhase.STARTING
    waiting = pod({"phase": "Pending", "containerStatuses": container(waiting={"reason": "ContainerCreating"})})
    assert (waiting.phase, waiting.reason, waiting.stuck) == (PodPhase.STARTING, "", False)
    running = pod({"phase": "Running", "containerStatuses": container(running={"startedAt": "now"})})
    assert (running.phase, running.pipeline, running.operator, running.epoch) == (PodPhase.RUNNING, "test", "square", 3)
    assert running.alive
    assert not pod({"phase": "Running"}, deletionTimestamp="now").alive


@pytest.mark.parametrize(
    ("ended", "code", "reason"),
    [
        ({"exitCode": 0, "reason": "Completed"}, 0, "ended with exit code 0"),
        ({"exitCode": 3, "reason": "Error"}, 3, "ended with exit code 3"),
        ({"exitCode": 137, "reason": "Error"}, -9, "was killed by SIGKILL"),
        ({"exitCode": 0, "signal": 15}, -15, "was killed by SIGTERM"),
        (
            {"exitCode": 137, "reason": "OOMKilled"},
            -9,
            "was killed because it used more memory than it may (OOMKilled)",
        ),
    ],
)
def test_the_end_of_a_pod_is_told_as_everywhere(ended: Any, code: int, reason: str) -> None:
    found = pod({"phase": "Failed", "containerStatuses": container(terminated=ended)})
    assert (found.phase, found.exit_code, found.reason) == (PodPhase.EXITED, code, reason)


def test_an_evicted_pod_says_why() -> None:
    found = pod({"phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: memory."})
    assert (found.phase, found.exit_code) == (PodPhase.EXITED, None)
    assert found.reason == "Evicted: The node was low on resource: memory."


def test_what_keeps_a_pod_from_starting_is_told_in_the_clusters_own_words() -> None:
    said = "0/3 nodes are available: 1 Insufficient memory."
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": said}
    found = pod({"phase": "Pending", "conditions": [condition]})
    assert (found.reason, found.stuck, found.hopeless) == (f"Unschedulable: {said}", True, False)
    gated = {**condition, "reason": "SchedulingGated"}
    assert not pod({"phase": "Pending", "conditions": [gated]}).stuck
    waiting = {"reason": "CreateContainerConfigError", "message": 'secret "camera" not found'}
    found = pod({"phase": "Pending", "containerStatuses": container(waiting=waiting)})
    assert (found.reason, found.stuck) == ('CreateContainerConfigError: secret "camera" not found', True)
    hopeless = pod({"phase": "Pending", "containerStatuses": container(waiting={"reason": "InvalidImageName"})})
    assert hopeless.hopeless
