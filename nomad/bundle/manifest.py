"""The manifest of a bundle: the part that is signed, as JSON.

Written by `make`, parsed by `read` and `load_operator`, both only after the signature has been verified.
`nomad.bundle.schema` says what is valid; `read` checks it there, so pods needn't.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from nomad.pipeline import Kind, OnError, OperatorSpec

FORMAT = 1

ADDED = frozenset(("pin", "requirements", "environment", "secrets", "devices"))
"""Fields of an operator that the first masters didn't know."""


def operator_entry(spec: OperatorSpec, sha256: str) -> dict[str, Any]:
    """An operator as it stands in the manifest."""
    entry = {**asdict(spec), "requires": sorted(spec.requires), "requirements": list(spec.requirements)}
    # What isn't asked for isn't in it: masters that don't know an option read manifests without it.
    return {key: value for key, value in entry.items() if value or key not in ADDED} | {"sha256": sha256}


def operator_spec(entry: dict[str, Any]) -> OperatorSpec:
    """The inverse of `operator_entry`; the hash is left out."""
    fields = {key: value for key, value in entry.items() if key != "sha256"}
    fields["kind"] = Kind(fields["kind"])
    fields["on_error"] = OnError(fields["on_error"])
    fields["requires"] = frozenset(fields["requires"])
    fields["requirements"] = tuple(fields.get("requirements", ()))
    return OperatorSpec(**fields)


def dump(manifest: dict[str, Any]) -> bytes:
    """The bytes that are signed: the same for the same manifest."""
    return json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
