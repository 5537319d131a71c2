"""Pipelines by kubectl: what users see, what they change, and what the API server refuses by itself."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from nomad import bundle
from nomad.errors import ConflictError, InvalidRequestError
from nomad.kubernetes.api import Api
from nomad.pipeline import build, operator
from tests.kubernetes.cluster.envtest import Envtest
from tests.kubernetes.cluster.processes import ClusterError
from tests.kubernetes.watched import Watched, define
from tests.master.fakepods import sink, source, square

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def defined(envtest: Envtest) -> Envtest:
    define(envtest)
    return envtest


@pytest.fixture
async def cluster(defined: Envtest, namespace: str, tmp_path: Path) -> AsyncIterator[Watched]:
    async with Api.open(defined.kubeconfig) as api:
        cluster = Watched(defined, namespace, api, tmp_path)
        yield cluster
        await cluster.runtime.shutdown()


async def test_what_kubectl_shows_of_a_pipeline(cluster: Watched) -> None:
    async with cluster.lead():
        await cluster.submit_and_run("p")
        await cluster.shows(".status.ready", "3/3")
        assert (await cluster.kubectl("get", "pipelines")).split("\n")[0].split() == [
            "NAME", "PHASE", "OPERATORS", "LATENCY", "MOVES", "AGE",
        ]  # fmt: skip
        assert (await cluster.kubectl("get", "npl", "--no-headers")).split()[:3] == ["p", "Running", "3/3"]
        assert (await cluster.kubectl("get", "nomad", "--no-headers")).split()[1:3] == ["Running", "3/3"]
        assert await cluster.column(".status.conditions[?(@.type=='Ready')].status") == "True"
        assert await cluster.column(".status.observedGeneration") == await cluster.column(".metadata.generation")
        for name in ("source", "square", "sink"):
            cluster.pods[f"p.{name}-e1"].beat(latency_p50=0.01234)
        await cluster.shows(".status.latency", "12 ms")
        await cluster.kubectl("wait", "--for=condition=Ready", "pipeline/p", "--timeout=10s")
        for reason in ("Submitted", "Running"):
            await _described(cluster, reason)
        assert "what a Pipeline" not in await cluster.kubectl("explain", "pipeline.spec.pins")
        assert "bound to" in await cluster.kubectl("explain", "pipeline.spec.pins")


async def _described(cluster: Watched, text: str, name: str = "p") -> None:
    async with asyncio.timeout(20):
        while text not in await cluster.kubectl("describe", "pipeline", name):
            await asyncio.sleep(0.05)


async def test_a_pipeline_that_fails_says_why(cluster: Watched) -> None:
    async with cluster.lead():
        await cluster.submit_and_run("p")
        error = {"type": "ValueError", "message": "boom", "traceback": "Traceback"}
        cluster.pods["p.square-e1"].say({"type": "failed", "error": error, "fatal": True})
        cluster.pods["p.square-e1"].end(3)
        await cluster.shows(".status.phase", "Failed")
        assert "boom" in await cluster.column(".status.reason")
        await _described(cluster, "boom")
    async with cluster.lead() as master:
        assert master.pipeline("p").phase == "failed"
        assert "boom" in master.pipeline("p").reason


async def test_kubectl_delete(cluster: Watched) -> None:
    async with cluster.lead() as master:
        await cluster.submit_and_run("p")
        await cluster.kubectl("delete", "pipeline", "p", "--wait=false")
        await cluster.gone()
        await cluster.until(lambda: master.pipelines() == [])
        assert all(pod.over for pod in cluster.pods.all.values())
        left = await cluster.kubectl("get", "secrets,configmaps", "-o", "name")
        assert "p-link" not in left
        assert "p-history" not in left
        assert "nomad-bundle-" in left  # for a day


async def test_kubectl_delete_while_no_master_runs(cluster: Watched) -> None:
    async with cluster.lead():
        await cluster.submit_and_run("p")
    await cluster.kubectl("delete", "pipeline", "p", "--wait=false")
    assert await cluster.column(".metadata.deletionTimestamp")
    async with cluster.lead() as master:
        await cluster.gone()
        await cluster.until(lambda: master.pipelines() == [])
        assert all(pod.over for pod in cluster.pods.all.values())


async def test_a_pipeline_whose_finalizer_is_taken_off_by_force(cluster: Watched) -> None:
    async with cluster.lead() as master:
        await cluster.submit_and_run("p")
        await cluster.kubectl("patch", "pipeline", "p", "--type=merge", "-p", '{"metadata": {"finalizers": null}}')
        await cluster.kubectl("delete", "pipeline", "p")
        await cluster.until(lambda: master.pipelines() == [])
        assert all(pod.over for pod in cluster.pods.all.values())


async def test_an_exported_pipeline_is_applied_again_after_it_was_deleted(cluster: Watched) -> None:
    async with cluster.lead() as master:
        exported = cluster.objects("Test_1")
        await cluster.apply(*exported)
        name = exported[-1]["metadata"]["name"]
        await cluster.shows(".status.phase", "Running", name)
        assert [view.id for view in master.pipelines()] == ["Test_1"]
        epochs = [op.epoch for op in master.pipeline("Test_1").operators]
        await cluster.apply(*exported)  # changes nothing
        assert [op.epoch for op in master.pipeline("Test_1").operators] == epochs
        await cluster.kubectl("delete", "pipeline", name)
        await cluster.apply(exported[-1])  # the code is still there
        await cluster.shows(".status.phase", "Running", name)
        assert min(op.epoch for op in master.pipeline("Test_1").operators) > max(epochs)


async def test_what_kubectl_gets_can_be_applied_again(cluster: Watched) -> None:
    async with cluster.lead():
        await cluster.submit_and_run("p")
        found = yaml.safe_load(await cluster.kubectl("get", "pipeline", "p", "-o", "yaml"))
        await cluster.kubectl("delete", "pipeline", "p")
        for field in ("uid", "resourceVersion"):
            del found["metadata"][field]
        await cluster.apply(found)
        await cluster.shows(".status.phase", "Running")


async def test_what_a_master_left_half_made_goes_again(cluster: Watched) -> None:
    async with cluster.lead():
        *secrets, pipeline = cluster.objects()
    pipeline["metadata"] |= {
        "annotations": {"nomad.dev/submitted-by": "1/master-a/gone"},
        "finalizers": ["nomad.dev/pods"],
    }
    await cluster.apply(pipeline)
    async with cluster.lead() as master:
        await cluster.gone()
        assert master.pipelines() == []
        await cluster.apply(*secrets, pipeline)  # which is a copy, then
        await cluster.shows(".status.phase", "Running")
        await cluster.shows(".metadata.annotations.nomad\\.dev/submitted-by", "")


async def test_more_than_an_object_can_hold_is_refused(cluster: Watched) -> None:
    async with cluster.lead() as master:
        names = [source, *(operator(square, name=f"square{n}", memory=1) for n in range(256)), sink]
        data = bundle.make(build(names), master.signing_key)
        with pytest.raises(InvalidRequestError, match="256"):
            await master.submit(data, id="p", start="edge", end="cloud")
        assert await cluster.column(".metadata.name") == ""


async def test_pipelines_that_are_applied_while_no_master_runs(cluster: Watched) -> None:
    async with cluster.lead():
        exported = cluster.objects()
    await cluster.apply(*exported)
    async with cluster.lead() as master:
        await cluster.shows(".status.phase", "Running")
        assert master.pipeline("p").moves


async def test_kubectl_patch_of_the_goal(cluster: Watched) -> None:
    async with cluster.lead() as master:
        await cluster.submit_and_run("p")
        await cluster.kubectl("patch", "pipeline", "p", "--type=merge", "-p", '{"spec": {"goal": "Stop"}}')
        await cluster.shows(".status.phase", "Stopped")
        assert master.pipeline("p").phase == "stopped"
        with pytest.raises(ClusterError, match="can't be run again"):
            await cluster.kubectl("patch", "pipeline", "p", "--type=merge", "-p", '{"spec": {"goal": "Run"}}')
    async with cluster.lead() as master:
        assert master.pipeline("p").phase == "stopped"
        await master.remove("p")
        await cluster.gone()


async def test_stopping_by_the_interface_shows_in_the_object(cluster: Watched) -> None:
    async with cluster.lead() as master:
        await cluster.submit_and_run("p")
        await master.stop("p")
        await cluster.shows(".status.phase", "Stopped")
        assert await cluster.column(".spec.goal") == "Stop"
        await master.remove("p")
        assert await cluster.column(".metadata.name") == ""


async def test_kubectl_patch_of_moves_and_pins(cluster: Watched) -> None:
    async with cluster.lead() as master:
        await cluster.submit_and_run("p")
        there = master.pipeline("p").operators[1].node
        other = {"edge": "cloud", "cloud": "edge"}[there]
        patch = f'{{"spec": {{"moves": false, "pins": {{"square": "{other}"}}}}}}'
        await cluster.kubectl("patch", "pipeline", "p", "--type=merge", "-p", patch)
        # It is elsewhere: it is moved there first.
        await cluster.shows(".status.pins.square", other)
        view = master.pipeline("p")
        assert (view.moves, view.operators[1].node, view.operators[1].pin) == (False, other, other)
        await cluster.shows(".status.moves", "1")
        await _described(cluster, "Moved")
        await cluster.kubectl("patch", "pipeline", "p", "--type=merge", "-p", '{"spec": {"pins": null, "moves": true}}')
        await cluster.shows(".status.pins", "")
        await cluster.until(lambda: master.pipeline("p").moves)
        assert master.pipeline("p").operators[1].pin is None
        await master.change("p", moves=False, pins={"square": other})
        assert await cluster.column(".spec.pins.square") == other
        assert await cluster.column(".spec.moves") == "false"
    async with cluster.lead() as master:
        view = master.pipeline("p")
        assert (view.moves, view.operators[1].pin, view.operators[1].node) == (False, other, other)
        assert [move.state for move in master.moves("p")] == ["done"]


async def test_a_pin_that_cannot_be_is_told_and_tried_again(cluster: Watched) -> None:
    async with cluster.lead() as master:
        await cluster.submit_and_run("p")
        await cluster.kubectl("patch", "pipeline", "p", "--type=merge", "-p", '{"spec": {"pins": {"square": "moon"}}}')
        await cluster.shows(".status.reason", lambda text: "moon" in text)
        assert await cluster.column(".status.phase") == "Running"
        await _described(cluster, "Refused")
        there = master.pipeline("p").operators[1].node
        patch = f'{{"spec": {{"pins": {{"square": "{there}"}}}}}}'
        await cluster.kubectl("patch", "pipeline", "p", "--type=merge", "-p", patch)
        await cluster.shows(".status.pins.square", there)
        await cluster.shows(".status.reason", "")


async def test_the_profile_can_be_changed(cluster: Watched) -> None:
    async with cluster.lead() as master:
        await cluster.submit_and_run("p")
        profile = '[{"cloudExecutionTime": 0.25}, {"outputMsgSize": 12}, {}]'
        await cluster.kubectl("patch", "pipeline", "p", "--type=merge", "-p", f'{{"spec": {{"profile": {profile}}}}}')
        await cluster.until(lambda: master.pipeline("p").profile[:1] == [{"cloud_execution_time": 0.25}])


async def test_a_bundle_that_comes_later(cluster: Watched) -> None:
    async with cluster.lead():
        *secrets, pipeline = cluster.objects()
        await cluster.apply(pipeline)
        await cluster.shows(".status.phase", "Pending")
        assert "missing" in await cluster.column(".status.reason")
        await _described(cluster, "NotSubmitted")
        await cluster.apply(*secrets)
        await cluster.shows(".status.phase", "Running")
        await cluster.shows(".status.reason", "")


def _other_data(objects: list[dict[str, Any]]) -> None:
    objects[0]["data"]["bundle"] = "AAAA"


def _other_operator(objects: list[dict[str, Any]]) -> None:
    objects[-1]["spec"]["operators"][1]["requires"] = ["gpu"]


def _other_digest(objects: list[dict[str, Any]]) -> None:
    old = objects[-1]["spec"]["bundle"]
    new = "fe" * 32
    objects[:] = yaml.safe_load(
        yaml.safe_dump(objects).replace(old, new).replace(old[:63], new[:63]).replace(old[:40], new[:40])
    )


@pytest.mark.parametrize(
    ("harm", "phase", "reason"),
    [
        (_other_data, "Pending", "damaged"),
        (_other_operator, "Failed", "spec.operators isn't what was signed"),
        (_other_digest, "Failed", "spec.bundle isn't what was signed"),
    ],
)
async def test_what_was_tampered_with(
    cluster: Watched, harm: Callable[[list[dict[str, Any]]], None], phase: str, reason: str
) -> None:
    async with cluster.lead() as master:
        objects = cluster.objects()
        harm(objects)
        await cluster.apply(*objects)
        await cluster.shows(".status.phase", phase)
        assert reason in await cluster.column(".status.reason")
        assert master.pipelines() == []
        await cluster.kubectl("delete", "pipeline", "p")


async def test_code_that_others_signed_is_refused(cluster: Watched) -> None:
    async with cluster.lead() as master:
        objects = cluster.objects()
    await cluster.kubectl("delete", "secret", "nomad-master")
    async with cluster.lead() as master:  # with another key
        await cluster.apply(*objects)
        await cluster.shows(".status.phase", "Failed")
        assert "signature" in await cluster.column(".status.reason")
        assert master.pipelines() == []


async def test_a_node_that_comes_back_later(cluster: Watched) -> None:
    async with cluster.lead() as master:
        await master.lose_node("edge")
        await cluster.until(lambda: not master.node("edge").ready, passing=0.5)
        await cluster.apply(*cluster.objects())
        await cluster.shows(".status.phase", "Pending")
        assert "edge" in await cluster.column(".status.reason")
        await master.restore_node("edge")
        await cluster.shows(".status.phase", "Running")


async def test_two_objects_for_the_same_id(cluster: Watched) -> None:
    async with cluster.lead() as master:
        await cluster.submit_and_run("p")
        other = cluster.objects()[-1]
        other["metadata"]["name"], other["spec"]["id"] = "q", "p"
        await cluster.apply(other)
        await cluster.shows(".status.phase", "Failed", "q")
        assert "there is a pipeline 'p' already" in await cluster.column(".status.reason", "q")
        assert master.pipeline("p").phase == "running"
        await cluster.kubectl("delete", "pipeline", "q")
        assert master.pipeline("p").phase == "running"
        with pytest.raises(ConflictError):
            await cluster.submit("p")


async def test_a_pipeline_that_is_to_stop_from_the_start_never_runs(cluster: Watched) -> None:
    async with cluster.lead() as master:
        *secrets, pipeline = cluster.objects()
        pipeline["spec"]["goal"] = "Stop"
        await cluster.apply(*secrets, pipeline)
        await cluster.shows(".status.phase", "Stopped")
        assert master.pipelines() == []
        await cluster.kubectl("delete", "pipeline", "p")


PLAIN: dict[str, Any] = {
    "apiVersion": "nomad.dev/v1alpha1",
    "kind": "Pipeline",
    "metadata": {"name": "plain"},
    "spec": {
        "bundle": "a" * 64,
        "start": "edge",
        "end": "cloud",
        "operators": [{"name": "source", "kind": "periodic", "interval": 1.0}, {"name": "sink", "kind": "function"}],
        "edges": [{"source": "source", "target": "sink"}],
    },
}

MISTAKES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no bundle": (lambda spec: spec.pop("bundle"), "spec.bundle: Required"),
    "no hash": (lambda spec: spec.update(bundle="latest"), "spec.bundle"),
    "one operator": (lambda spec: spec["operators"].pop(), "spec.operators"),
    "an unknown kind": (lambda spec: spec["operators"][1].update(kind="magic"), 'Unsupported value: "magic"'),
    "a name with a space": (lambda spec: spec["operators"][1].update(name="a b"), "operators\\[1\\].name"),
    "no memory": (lambda spec: spec["operators"][1].update(memoryMb=0), "memoryMb"),
    "an edge to nowhere": (lambda spec: spec["edges"][0].update(target="moon"), "an edge names an operator"),
    "a pin of nobody": (lambda spec: spec.update(pins={"moon": "edge"}), "a pin names an operator"),
    "an unknown goal": (lambda spec: spec.update(goal="Pause"), "spec.goal"),
    "an unknown codec": (lambda spec: spec.update(codec="xml"), "spec.codec"),
    "a short profile": (lambda spec: spec.update(profile=[{}]), "one entry for each operator"),
    "an unknown field": (lambda spec: spec.update(colour="red"), "unknown field"),
    "an id with a dot": (lambda spec: spec.update(id="a.b"), "spec.id"),
    "no device": (lambda spec: spec["operators"][1].update(devices={"camera": 0}), "devices"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_api_server_refuses(mistake: str, defined: Envtest, namespace: str) -> None:
    change, message = MISTAKES[mistake]
    pipeline = copy.deepcopy(PLAIN)
    change(pipeline["spec"])
    with pytest.raises(ClusterError, match=message):
        defined.kubectl("apply", "-n", namespace, "-f", "-", "--dry-run=server", input=yaml.safe_dump(pipeline))


def test_a_plain_one_is_valid_and_gets_defaults(defined: Envtest, namespace: str) -> None:
    defined.kubectl("apply", "-n", namespace, "-f", "-", input=yaml.safe_dump(PLAIN))
    spec = defined.get("pipeline", "plain", "-n", namespace)["spec"]
    assert (spec["goal"], spec["moves"], spec["codec"]) == ("Run", True, "data")
    assert (spec["operators"][1]["memoryMb"], spec["operators"][1]["onError"]) == (64, "set-aside")


@pytest.mark.parametrize(
    "patch",
    [
        '{"bundle": "%s"}' % ("b" * 64),
        '{"start": "fog"}',
        '{"end": "fog"}',
        '{"codec": "pickle"}',
        '{"id": "other"}',
        '{"operators": [{"name": "source", "kind": "periodic"}, {"name": "sink", "kind": "function"}]}',
    ],
)
def test_what_cannot_be_changed(patch: str, defined: Envtest, namespace: str) -> None:
    defined.kubectl("apply", "-n", namespace, "-f", "-", input=yaml.safe_dump(PLAIN))
    with pytest.raises(ClusterError, match="can't be changed"):
        defined.kubectl("patch", "pipeline", "plain", "-n", namespace, "--type=merge", "-p", f'{{"spec": {patch}}}')
