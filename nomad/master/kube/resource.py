"""Pipelines as objects of Kubernetes (images/k8s/crd.yaml), and back: pure mapping.

Used by `store`, `pipelines` (which watches them) and `nomad export`. `spec` is what is wanted, as users may write
it; `status` what a master has made of it and must not forget. Fields have the names that the records have, in
camelCase; what is at its default isn't written. Past moves and counters are elsewhere, see `store`.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic.alias_generators import to_camel, to_snake

from nomad.errors import InvalidRequestError
from nomad.kubernetes.names import API_VERSION, APP, BUNDLE_LABEL, FINALIZER, GROUP, KIND, MANAGED_BY, NOMAD
from nomad.master.state import DesiredPipeline, Goal, Outcome
from nomad.master.store import StoredOperator
from nomad.master.views import MoveView, PlacementView
from nomad.pipeline import OperatorSpec, PipelineSpec, check_id

Json = dict[str, Any]
T = TypeVar("T")

CHUNK = 180 << 10
"""Bytes of a bundle in one Secret. Kubernetes takes 1 MiB, but `kubectl apply` notes what it applied, in base64, in an
annotation of 256 KiB at most.
"""

DIGEST_ANNOTATION = f"{GROUP}/digest"
"""On a Secret of a bundle: all of its hash."""
CHUNKS_ANNOTATION = f"{GROUP}/chunks"
"""In how many Secrets the bundle is."""
SHA256_ANNOTATION = f"{GROUP}/sha256"
"""The hash of the whole bundle's bytes, its signature included."""
CHUNK_KEY = "bundle"

SUBMITTED_ANNOTATION = f"{GROUP}/submitted-by"
"""On a Pipeline that a master made: which one."""

LABELS = {APP: NOMAD, MANAGED_BY: NOMAD}

_OPERATOR = TypeAdapter(OperatorSpec)
_PLACEMENT = TypeAdapter(PlacementView)
_MOVE = TypeAdapter(MoveView)
_PROFILE = TypeAdapter(dict[str, float])
_PINS = TypeAdapter(dict[str, str])
_WARNINGS = TypeAdapter(tuple[str, ...])
_FLAG, _NUMBER, _COUNT, _TEXT = TypeAdapter(bool), TypeAdapter(float), TypeAdapter(int), TypeAdapter(str)

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,48}[a-z0-9])?")


def object_name(id: str) -> str:
    """What the object of a pipeline is called: its id, unless that can't be a name in Kubernetes, or is long."""
    if _NAME.fullmatch(id):
        return id
    readable = re.sub(r"[^a-z0-9-]", "-", id.lower())[:40].strip("-")
    return f"{readable}-{hashlib.sha256(id.encode()).hexdigest()[:8]}".lstrip("-")


def pipeline_id(found: Json) -> str:
    """What Nomad calls the pipeline of an object."""
    return str(found.get("spec", {}).get("id") or found["metadata"]["name"])


def manifest(
    spec: PipelineSpec, bundle: str, *, moves: bool = True, pins: Mapping[str, str] | None = None, goal: Goal = Goal.RUN
) -> Json:
    """The object of a pipeline, without a namespace and a status."""
    name = object_name(spec.id)
    content: Json = {
        "bundle": bundle,
        "goal": "Run" if goal is Goal.RUN else "Stop",
        "start": spec.start,
        "end": spec.end,
        "codec": spec.codec,
        "moves": moves,
        "operators": [operator(op) for op in spec.operators],
        "edges": [{"source": source, "target": target} for source, target in spec.edges],
    }
    if name != spec.id:
        content["id"] = spec.id
    if spec.profile:
        content["profile"] = profile(spec)
    if pins:
        content["pins"] = dict(pins)
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": name, "labels": dict(LABELS), "finalizers": [FINALIZER]},
        "spec": content,
    }


def with_profile(spec: PipelineSpec, profile: Iterable[Mapping[str, float]]) -> PipelineSpec:
    """With what is expected of its operators now; fields that aren't known are left out."""
    entries = tuple({key: value for key, value in entry.items() if value is not None} for entry in profile)
    return replace(spec, profile=entries)


def profile(spec: PipelineSpec) -> list[Json]:
    """What is expected of its operators, as it stands in an object."""
    return [{to_camel(key): value for key, value in entry.items()} for entry in spec.profile]


def operator(op: OperatorSpec) -> Json:
    """An operator, as it stands in an object; what the API server would fill in is always written."""
    content = _camel(_OPERATOR, op)
    content["requires"] = sorted(op.requires)
    return {
        "memoryMb": op.memory_mb,
        "onError": str(op.on_error),
        "retries": op.retries,
        "copyOutputs": op.copy_outputs,
    } | {key: value for key, value in content.items() if value not in ([], {})}


def spec(found: Json) -> PipelineSpec:
    """What an object says that is to run. Raises `InvalidRequestError` that names the field."""
    content = found.get("spec", {})
    try:
        return PipelineSpec(
            id=check_id(pipeline_id(found)),
            operators=tuple(_uncamel(_OPERATOR, op, "spec.operators") for op in content.get("operators") or ()),
            edges=tuple((edge["source"], edge["target"]) for edge in content.get("edges") or ()),
            start=_TEXT.validate_python(content.get("start")),
            end=_TEXT.validate_python(content.get("end")),
            codec=_TEXT.validate_python(content.get("codec", "data")),
            profile=tuple(_PROFILE.validate_python(_snake(entry)) for entry in content.get("profile") or ()),
        )
    except ValidationError as exc:
        raise _invalid("spec", exc) from None


def goal(found: Json) -> Goal:
    """What is wanted of the pipeline of an object."""
    if found["metadata"].get("deletionTimestamp"):
        return Goal.REMOVE
    return Goal.STOP if found.get("spec", {}).get("goal") == "Stop" else Goal.RUN


def moves(found: Json) -> bool:
    return found.get("spec", {}).get("moves", True) is not False


def pins(found: Json) -> dict[str, str]:
    """As they are wanted. Raises `InvalidRequestError`."""
    return _checked(_PINS, found.get("spec", {}).get("pins") or {}, "spec.pins")


def is_accepted(found: Json) -> bool:
    """A master has taken it on."""
    return "created" in (found.get("status") or {})


def accepted(wanted: DesiredPipeline) -> Json:
    """The status of a pipeline that was just taken on."""
    return {
        "phase": "Pending",
        "created": wanted.created,
        "epochFloor": wanted.epoch_floor,
        "warnings": list(wanted.warnings),
        "placement": placement(wanted.placement),
        **({"pins": dict(wanted.pins)} if wanted.pins else {}),
        "operators": [{"name": op.name, "node": wanted.node_of(op.name)} for op in wanted.spec.operators],
        "ready": f"0/{len(wanted.spec.operators)}",
        "moves": 0,
    }


def desired(found: Json, link_key: bytes) -> DesiredPipeline:
    """A pipeline that a master has taken on. Raises `InvalidRequestError`."""
    status = found.get("status") or {}
    return DesiredPipeline(
        spec=spec(found),
        bundle=_checked(_TEXT, found["spec"].get("bundle"), "spec.bundle"),
        link_key=link_key,
        created=_checked(_NUMBER, status.get("created"), "status.created"),
        placement={
            name: _uncamel(_PLACEMENT, {"summary": "", **view}, "status.placement")
            for name, view in (status.get("placement") or {}).items()
        },
        warnings=_checked(_WARNINGS, status.get("warnings") or (), "status.warnings"),
        goal=goal(found),
        epoch_floor=_checked(_COUNT, status.get("epochFloor", 0), "status.epochFloor"),
        moves=moves(found),
        pins=_checked(_PINS, status.get("pins") or {}, "status.pins"),
    )


def outcome(found: Json) -> tuple[Outcome | None, str]:
    """How a pipeline ended, and why. Raises `InvalidRequestError`."""
    status = found.get("status") or {}
    text = status.get("outcome")
    if not text:
        return None, ""
    try:
        return Outcome(text), str(status.get("reason", ""))
    except ValueError:
        raise InvalidRequestError(f"status.outcome: {text!r} is unknown", status=422) from None


def placement(views: Mapping[str, PlacementView]) -> Json:
    """Where operators are and why, as it stands in a status; terms that JSON has no number for are left out."""
    return {
        name: {"node": view.node, "summary": view.summary}
        | _camel(_PLACEMENT, replace(view, cost={k: v for k, v in view.cost.items() if math.isfinite(v)}))
        for name, view in views.items()
    }


def stored_operator(op: StoredOperator, node: str) -> Json:
    """What is asked for an operator, as it stands in a status."""
    entry: Json = {"name": op.name, "node": node, "epoch": op.epoch, "highest": op.highest, "restarts": op.restarts}
    if op.pod is not None:
        entry["pod"] = op.pod
    if op.last_pod:
        entry["lastPod"] = op.last_pod
    return entry


def stored_operators(found: Json) -> list[StoredOperator]:
    """The inverse, of those that anything was asked for yet, without totals and failures."""
    return [
        StoredOperator(
            name=entry["name"],
            epoch=_checked(_COUNT, entry["epoch"], "status.operators.epoch"),
            pod=entry.get("pod"),
            last_pod=entry.get("lastPod", ""),
            restarts=_checked(_COUNT, entry.get("restarts", 0), "status.operators.restarts"),
            highest=_checked(_COUNT, entry.get("highest", 0), "status.operators.highest"),
        )
        for entry in (found.get("status") or {}).get("operators") or ()
        if "epoch" in entry
    ]


def move(view: MoveView) -> Json:
    """A move, as it stands in a status."""
    content = _camel(_MOVE, view)
    del content["pipeline"]
    return content


def open_moves(found: Json) -> list[MoveView]:
    """Those that hadn't ended. Raises `InvalidRequestError`."""
    entries = (found.get("status") or {}).get("openMoves") or ()
    return [_uncamel(_MOVE, {**entry, "pipeline": pipeline_id(found)}, "status.openMoves") for entry in entries]


def bundle_name(digest: str, number: int) -> str:
    """The Secret with one chunk of a bundle."""
    return f"nomad-bundle-{digest[:40]}-{number}"


def bundle_secrets(digest: str, data: bytes) -> Iterator[Json]:
    """The Secrets that a bundle lies in, without a namespace; each is made when its turn comes.

    The call itself hashes `data`, which takes a tenth of a second for the largest.
    """
    starts = range(0, len(data), CHUNK) or (0,)
    marks = {
        DIGEST_ANNOTATION: digest,
        CHUNKS_ANNOTATION: str(len(starts)),
        SHA256_ANNOTATION: hashlib.sha256(data).hexdigest(),
    }
    return (
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {
                "name": bundle_name(digest, number),
                "labels": {**LABELS, BUNDLE_LABEL: digest[:63]},
                "annotations": dict(marks),
            },
            "type": "Opaque",
            "immutable": True,
            "data": {CHUNK_KEY: base64.b64encode(data[start : start + CHUNK]).decode()},
        }
        for number, start in enumerate(starts)
    )


def exported(spec: PipelineSpec, digest: str, data: bytes, *, moves: bool, pins: Mapping[str, str]) -> list[Json]:
    """What `kubectl apply` makes the same pipeline of: the Secrets with its code, and the object."""
    found = manifest(spec, digest, moves=moves, pins=pins)
    del found["metadata"]["finalizers"]  # it can be deleted where no master looks after it
    return [*bundle_secrets(digest, data), found]


def merge_patch(before: Any, after: Any) -> Any:
    """The JSON merge patch (RFC 7396) that makes `after` of `before`, both objects; empty when they are the same."""
    patch: Json = {key: None for key in before if key not in after}
    for key, value in after.items():
        if key not in before:
            patch[key] = value
        elif isinstance(value, dict) and isinstance(before[key], dict):
            if inner := merge_patch(before[key], value):
                patch[key] = inner
        elif value != before[key]:
            patch[key] = value
    return patch


def condition(
    before: Iterable[Json],
    kind: str,
    status: Literal["True", "False"],
    reason: str,
    message: str,
    now: str,
    generation: int,
) -> list[Json]:
    """The conditions with one of them as it is now; its time is that of its last change of status."""
    kept = [entry for entry in before if entry.get("type") != kind]
    old = next((entry for entry in before if entry.get("type") == kind and entry.get("status") == status), None)
    since = now if old is None else old["lastTransitionTime"]
    new = {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": since}
    return [*kept, {**new, "observedGeneration": generation}]


def _camel(adapter: TypeAdapter[T], value: T) -> Json:
    return {to_camel(key): v for key, v in adapter.dump_python(value, mode="json", exclude_defaults=True).items()}


def _snake(content: Mapping[str, Any]) -> Json:
    return {to_snake(key): value for key, value in content.items()}


def _uncamel(adapter: TypeAdapter[T], content: Mapping[str, Any], where: str) -> T:
    return _checked(adapter, _snake(content), where)


def _checked(adapter: TypeAdapter[T], value: Any, where: str) -> T:
    try:
        return adapter.validate_python(value)
    except ValidationError as exc:
        raise _invalid(where, exc) from None


def _invalid(where: str, exc: ValidationError) -> InvalidRequestError:
    first = exc.errors(include_url=False)[0]
    path = ".".join([where, *(to_camel(str(part)) for part in first["loc"])])
    return InvalidRequestError(f"{path}: {first['msg']}", status=422)
