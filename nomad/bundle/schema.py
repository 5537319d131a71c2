"""What a valid manifest looks like. Imported by `read` alone: pods get manifests that were checked here."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nomad import needs
from nomad.bundle.manifest import FORMAT
from nomad.errors import BundleError, PipelineError
from nomad.pipeline import CODECS, OPERATOR_NAME, PROFILE_FIELDS, Kind, OnError

_SOURCES = {Kind.PERIODIC, Kind.ASYNC_PERIODIC, Kind.SOURCE_GENERATOR, Kind.ASYNC_SOURCE_GENERATOR}
_PERIODIC = {Kind.PERIODIC, Kind.ASYNC_PERIODIC}

Name = Annotated[str, Field(pattern=f"^{OPERATOR_NAME.pattern}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Text = Annotated[str, Field(max_length=1000)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Operator(_Strict):
    name: Name
    kind: Kind
    interval: Positive | None
    memory_mb: Positive
    requires: list[Text]
    on_error: OnError
    retries: Annotated[int, Field(ge=0)]
    copy_outputs: bool
    image: Text
    pin: Text | None = None
    requirements: list[Text] = []
    environment: dict[str, str] = {}
    secrets: dict[str, str] = {}
    devices: dict[str, int] = {}
    sha256: Sha256

    @model_validator(mode="after")
    def _interval_if_periodic(self) -> _Operator:
        if (self.interval is not None) != (self.kind in _PERIODIC):
            raise ValueError("an interval belongs to a periodic source, and only there")
        return self

    @model_validator(mode="after")
    def _needs(self) -> _Operator:
        try:
            for check in (needs.requirements, needs.environment, needs.secrets, needs.devices):
                if check(given := getattr(self, check.__name__)) != (
                    tuple(given) if isinstance(given, list) else given
                ):
                    raise ValueError(f"{check.__name__} aren't in their normal form")
            needs.check_apart(self.environment, self.secrets)
        except PipelineError as exc:
            raise ValueError(str(exc)) from None
        return self


class _Manifest(_Strict):
    format: Literal[1]
    nomad: Text
    python: Annotated[str, Field(pattern=r"^\d+\.\d+$")]
    packages: dict[Text, Text]
    imports: dict[Text, list[Text]]
    codec: str
    operators: Annotated[list[_Operator], Field(min_length=2, max_length=1000)]
    edges: list[tuple[Name, Name]]
    types_sha256: Sha256
    profile: list[dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]]

    @model_validator(mode="after")
    def _consistent(self) -> _Manifest:
        names = [op.name for op in self.operators]
        if len(set(names)) != len(names):
            raise ValueError("two operators have the same name")
        if [op.kind in _SOURCES for op in self.operators] != [True] + [False] * (len(names) - 1):
            raise ValueError("the first operator must be a source, and only the first")
        if self.edges != list(zip(names, names[1:], strict=False)):
            raise ValueError("the edges must lead from each operator to the next")
        if self.codec not in CODECS:
            raise ValueError(f"codec {self.codec!r} is unknown")
        if self.profile and len(self.profile) != len(names):
            raise ValueError("the profile must have one entry for each operator")
        if any(key not in PROFILE_FIELDS for entry in self.profile for key in entry):
            raise ValueError(f"the profile's entries have the fields {', '.join(PROFILE_FIELDS)}")
        return self


def check(data: bytes) -> dict[str, Any]:
    """The manifest in `data`. Raises `BundleError` that names the first field which isn't valid."""
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise BundleError(f"the bundle's manifest is not JSON: {exc}") from exc
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if isinstance(version, int) and version > FORMAT:
        raise BundleError(
            f"the bundle's manifest has format {version}, made by a newer Nomad ({manifest.get('nomad', 'unknown')}): "
            f"this one reads format {FORMAT}. Upgrade the cluster, or make the bundle with the Nomad that runs there"
        )
    try:
        _Manifest.model_validate_json(data)
    except ValidationError as exc:
        first = exc.errors(include_url=False)[0]
        path = ".".join(str(part) for part in first["loc"]) or "the whole"
        if first["type"] == "extra_forbidden":
            raise BundleError(f"the bundle's manifest has an unknown field {path!r}") from None
        raise BundleError(f"the bundle's manifest is not valid: {path}: {first['msg']}") from None
    assert isinstance(manifest, dict)
    return manifest
