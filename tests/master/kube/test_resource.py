"""Pipelines survive the way into an object of Kubernetes and back."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic.alias_generators import to_camel

from nomad.errors import InvalidRequestError
from nomad.kubernetes import names
from nomad.master.kube import resource
from nomad.master.state import DesiredPipeline, Goal
from nomad.master.store import StoredOperator
from nomad.master.views import MovePhase, MoveState, MoveView, PlacementView
from nomad.pipeline import OPERATOR_NAME, PIPELINE_ID, Kind, OnError, OperatorSpec, PipelineSpec
from tests.master.worlds import wanted

CRD = yaml.safe_load((Path(__file__).parents[3] / "images/k8s/crd.yaml").read_text())
SCHEMA = CRD["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]

text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
number = st.floats(0, 1e9, allow_nan=False)
words = st.text("abcdefghij-", min_size=1, max_size=10)
name = st.from_regex(OPERATOR_NAME, fullmatch=True)
operators = st.builds(
    OperatorSpec,
    name=name,
    kind=st.sampled_from(Kind),
    interval=st.none() | st.floats(0.001, 100),
    memory_mb=st.floats(1, 1e5),
    requires=st.frozensets(words, max_size=3),
    on_error=st.sampled_from(OnError),
    retries=st.integers(0, 10),
    copy_outputs=st.booleans(),
    image=words | st.just(""),
    pin=st.none() | words,
    requirements=st.lists(words, max_size=3, unique=True).map(tuple),
    environment=st.dictionaries(words, text, max_size=2),
    secrets=st.dictionaries(words, words, max_size=2),
    devices=st.dictionaries(words, st.integers(1, 9), max_size=2),
)
placements = st.builds(
    PlacementView,
    node=words,
    summary=text,
    cost=st.dictionaries(words, number, max_size=3),
    runner_up=st.none() | words,
    why_not=text,
)


@st.composite
def pipelines(draw: st.DrawFn) -> DesiredPipeline:
    ops = draw(st.lists(operators, min_size=2, max_size=4, unique_by=lambda op: op.name))
    called = [op.name for op in ops]
    profile = {"cloud_execution_time": draw(number), "output_msg_size": draw(number)}
    return DesiredPipeline(
        spec=PipelineSpec(
            id=draw(st.from_regex(PIPELINE_ID, fullmatch=True)),
            operators=tuple(ops),
            edges=tuple(zip(called, called[1:], strict=False)),
            start=draw(words),
            end=draw(words),
            codec=draw(st.sampled_from(["data", "pickle"])),
            profile=draw(st.sampled_from([(), (profile, *({} for _ in ops[1:]))])),
        ),
        bundle=draw(st.text("0123456789abcdef", min_size=64, max_size=64)),
        link_key=b"k" * 32,
        created=draw(number),
        placement={op: draw(placements) for op in called},
        warnings=tuple(draw(st.lists(text, max_size=2))),
        goal=draw(st.sampled_from([Goal.RUN, Goal.STOP])),
        epoch_floor=draw(st.integers(0, 2**40)),
        moves=draw(st.booleans()),
        pins=draw(st.dictionaries(st.sampled_from(called), words, max_size=2)),
    )


def through_json(value: Any) -> Any:
    return json.loads(json.dumps(value, allow_nan=False))


@given(pipelines())
def test_a_pipeline_there_and_back(pipeline: DesiredPipeline) -> None:
    found = resource.manifest(
        pipeline.spec, pipeline.bundle, moves=pipeline.moves, pins=pipeline.pins, goal=pipeline.goal
    )
    found["status"] = resource.accepted(pipeline)
    assert resource.desired(through_json(found), pipeline.link_key) == pipeline
    assert resource.stored_operators(found) == []


views = st.builds(
    MoveView,
    id=words,
    pipeline=st.just("p"),
    operator=name,
    source=words,
    target=words,
    cause=words,
    reason=text,
    state=st.sampled_from(MoveState),
    asked=number,
    started=st.none() | number,
    finished=st.none() | number,
    phases=st.lists(st.builds(MovePhase, words, number), max_size=2),
    predicted_latency_before=st.none() | number,
    predicted_latency_after=st.none() | number,
    predicted_gain=st.none() | number,
    pause=st.none() | number,
    lost=st.none() | st.integers(0, 9),
    doubled=st.none() | st.integers(0, 9),
    epoch=st.integers(0, 99),
    error=text,
)


@given(
    st.lists(views, max_size=3),
    st.lists(
        st.builds(
            StoredOperator,
            name=name,
            epoch=st.integers(0, 9),
            pod=st.none() | words,
            last_pod=words | st.just(""),
            restarts=st.integers(0, 9),
            highest=st.integers(0, 9),
        ),
        max_size=3,
    ),
)
def test_what_was_asked_for_there_and_back(moves: list[MoveView], ops: list[StoredOperator]) -> None:
    status = {
        "openMoves": [resource.move(view) for view in moves],
        "operators": [resource.stored_operator(op, "edge") for op in ops],
    }
    found = through_json({"metadata": {"name": "p"}, "spec": {}, "status": status})
    assert resource.open_moves(found) == moves
    assert resource.stored_operators(found) == ops


@given(st.from_regex(PIPELINE_ID, fullmatch=True))
def test_every_id_has_a_name(id: str) -> None:
    called = resource.object_name(id)
    assert len(called) <= 50
    assert called == id or called.endswith(called[-8:])
    assert re.fullmatch("[a-z0-9]([a-z0-9-]*[a-z0-9])?", called)


def test_names_of_ids_that_look_alike_differ() -> None:
    assert len({resource.object_name(id) for id in ("test", "Test", "TEST", "te_st", "te-st", "a" * 60, "a" * 61)}) == 7
    assert resource.object_name("face-recognition") == "face-recognition"


@given(st.dictionaries(words, st.integers() | st.dictionaries(words, st.integers())), st.data())
def test_a_merge_patch_makes_one_of_the_other(before: dict[str, Any], data: st.DataObject) -> None:
    after = data.draw(
        st.dictionaries(words | st.sampled_from(sorted(before) or ["a"]), st.integers() | st.just({"b": 1}))
    )
    assert _merged(before, resource.merge_patch(before, after)) == after
    assert resource.merge_patch(before, before) == {}


def _merged(target: Any, patch: Any) -> Any:
    """RFC 7396, chapter 2."""
    if not isinstance(patch, dict):
        return patch
    target = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            target.pop(key, None)
        else:
            target[key] = _merged(target.get(key), value)
    return target


def test_the_definition_knows_every_field() -> None:
    """A field that the schema doesn't have is cut off by the API server."""
    operator = SCHEMA["spec"]["properties"]["operators"]["items"]["properties"]
    assert {to_camel(field.name) for field in fields(OperatorSpec)} == set(operator)
    assert set(operator["kind"]["enum"]) == set(Kind)
    assert set(operator["onError"]["enum"]) == set(OnError)
    move = SCHEMA["status"]["properties"]["openMoves"]["items"]["properties"]
    assert {to_camel(field.name) for field in fields(MoveView)} - {"pipeline"} == set(move)
    view = SCHEMA["status"]["properties"]["placement"]["additionalProperties"]["properties"]
    assert {to_camel(field.name) for field in fields(PlacementView)} == set(view)
    stored = SCHEMA["status"]["properties"]["operators"]["items"]["properties"]
    assert set(resource.stored_operator(StoredOperator("a", 1, "p", "p", 0), "edge")) == set(stored)
    accepted = resource.accepted(wanted())
    assert set(accepted) <= set(SCHEMA["status"]["properties"])
    assert set(resource.manifest(wanted().spec, "d", pins={"square": "cloud"})["spec"]) <= set(
        SCHEMA["spec"]["properties"]
    )


def test_the_definition_has_the_names_that_are_used() -> None:
    assert CRD["metadata"]["name"] == f"{names.PLURAL}.{names.GROUP}"
    assert CRD["spec"]["group"] == names.GROUP
    assert CRD["spec"]["names"]["kind"] == names.KIND
    assert CRD["spec"]["versions"][0]["name"] == names.VERSION


def test_what_is_not_valid_is_named() -> None:
    found = resource.manifest(wanted().spec, "d")
    found["spec"]["operators"][1]["kind"] = "magic"
    with pytest.raises(InvalidRequestError, match=r"spec\.operators\.kind"):
        resource.spec(found)
    with pytest.raises(InvalidRequestError, match=r"spec\.pins\.square"):
        resource.pins({"spec": {"pins": {"square": 1}}})
