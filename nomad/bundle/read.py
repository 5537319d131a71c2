"""Bundles as they come in: taken apart and verified, never unpickled. Called by the master."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgpack

from nomad.bundle import manifest as manifests
from nomad.bundle import signing
from nomad.errors import BundleError, BundleTampered
from nomad.pipeline import OperatorSpec, PipelineSpec, check_id

MAX_BUNDLE = 64 << 20
"""Bytes."""
MAX_MANIFEST = 1 << 20
MEDIA_TYPE = "application/vnd.nomad.bundle"
ENVELOPE = 1

_FIELDS: dict[str, type] = {"nomad": int, "manifest": bytes, "signature": bytes, "code": dict, "types": bytes}


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle whose signature and hashes have been verified."""

    manifest_bytes: bytes = field(repr=False)
    signature: bytes = field(repr=False)
    code: dict[str, bytes] = field(repr=False)
    """Operator name -> pickle."""
    types: bytes = field(repr=False)
    nomad: str
    """The version of Nomad that made it."""
    python: str
    """`3.11`-style."""
    packages: dict[str, str]
    """Distribution -> version, of what the code imports."""
    imports: dict[str, tuple[str, ...]]
    """Distribution -> the top-level modules that the code imports from it."""
    codec: str
    operators: tuple[OperatorSpec, ...]
    edges: tuple[tuple[str, str], ...]
    profile: tuple[dict[str, float], ...]

    @property
    def digest(self) -> str:
        """What this bundle is known by: the SHA-256 of its manifest, which holds the hashes of all the rest."""
        return signing.digest(self.manifest_bytes)

    def spec(self, id: str, start: str, end: str) -> PipelineSpec:
        """The pipeline as data. Raises `PipelineError` when `id` can't be one."""
        return PipelineSpec(check_id(id), self.operators, self.edges, start, end, self.codec, self.profile)


def read(data: bytes, verify_key: bytes) -> Bundle:
    """The bundle in `data`.

    Raises `BundleError` when `data` is too large or malformed, `BundleTampered` when the signature isn't by the owner
    of `verify_key` or a hash differs. Nothing of an unverified manifest is looked at.
    """
    envelope = _envelope(data)
    code, types = envelope["code"], envelope["types"]
    signing.verify(envelope["manifest"], envelope["signature"], verify_key)
    from nomad.bundle import schema  # pydantic: pods do without

    manifest = schema.check(envelope["manifest"])
    hashes = {entry["name"]: entry["sha256"] for entry in manifest["operators"]}
    if code.keys() != hashes.keys():
        names = ", ".join(sorted(code.keys() ^ hashes.keys()))
        raise BundleTampered(f"the code in the bundle isn't what was signed: it differs in {names}")
    for name, expected in hashes.items():
        signing.verify_hash(code[name], expected, f"the code of operator {name!r}")
    signing.verify_hash(types, manifest["types_sha256"], "the part with the types")
    return Bundle(
        manifest_bytes=envelope["manifest"],
        signature=envelope["signature"],
        code=code,
        types=types,
        nomad=manifest["nomad"],
        python=manifest["python"],
        packages=manifest["packages"],
        imports={dist: tuple(modules) for dist, modules in manifest["imports"].items()},
        codec=manifest["codec"],
        operators=tuple(manifests.operator_spec(entry) for entry in manifest["operators"]),
        edges=tuple((source, target) for source, target in manifest["edges"]),
        profile=tuple(manifest["profile"]),
    )


def _envelope(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_BUNDLE:
        raise BundleError(f"the bundle has {len(data) >> 20} MiB; {MAX_BUNDLE >> 20} MiB is the limit")
    try:
        envelope = msgpack.unpackb(data, max_map_len=10_000, max_array_len=0, max_ext_len=0)
    except (ValueError, msgpack.UnpackException) as exc:
        raise BundleError(
            "this is not a Nomad bundle (`nomad bundle` makes them; a file with Python code ends in .py), "
            f"or not all of it: {exc}"
        ) from exc
    if not isinstance(envelope, dict) or "nomad" not in envelope:
        raise BundleError("this is not a Nomad bundle: make one with `nomad bundle FILE` or nomad.bundle.make")
    version = envelope["nomad"]
    if isinstance(version, int) and version > ENVELOPE:
        raise BundleError(f"the bundle has version {version}, made by a newer Nomad; this one reads {ENVELOPE}")
    if version != ENVELOPE or envelope.keys() != _FIELDS.keys():
        raise BundleError(f"the bundle is malformed: it must hold {', '.join(_FIELDS)} and nothing else")
    for name, cls in _FIELDS.items():
        if type(envelope[name]) is not cls:
            found = type(envelope[name]).__name__
            raise BundleError(f"the bundle is malformed: {name!r} is of type {found}, not {cls.__name__}")
    if not all(isinstance(k, str) and isinstance(v, bytes) for k, v in envelope["code"].items()):
        raise BundleError("the bundle is malformed: 'code' must map names to bytes")
    if len(envelope["manifest"]) > MAX_MANIFEST:
        raise BundleError(f"the bundle's manifest is over {MAX_MANIFEST >> 20} MiB")
    return envelope
