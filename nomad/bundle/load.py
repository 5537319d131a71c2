"""Operator code where it runs: verified first, unpickled then. Called by pods; imports little, for their memory."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from nomad.bundle import manifest as manifests
from nomad.bundle import signing
from nomad.delivery.codec import Registration
from nomad.errors import BundleError, BundleTampered
from nomad.pipeline import OperatorSpec


@dataclass(frozen=True, slots=True)
class LoadedOperator:
    """An operator that is ready to be called."""

    spec: OperatorSpec
    function: Callable[..., Any]
    types: dict[str, type | Registration]
    """What messages may carry by name."""
    codec: str
    number: int = 1
    """Which operator of its pipeline it is; the first, the source, is 0."""


def load_operator(
    manifest: bytes, signature: bytes, verify_key: bytes, name: str, code: bytes, types: bytes
) -> LoadedOperator:
    """The operator `name`, out of the parts of a bundle.

    Raises `BundleTampered` when the signature or a hash doesn't match; then nothing has been unpickled. Raises
    `BundleError`, with the cause, when the verified code can't be loaded here. The user's own modules that the code
    imports in function bodies are put into `sys.modules`.
    """
    content, number = _verified(manifest, signature, verify_key, name)
    entry = content["operators"][number]
    signing.verify_hash(code, entry["sha256"], f"the code of operator {name!r}")
    signing.verify_hash(types, content["types_sha256"], "the part with the types")
    function, modules = _unpickle(code, f"the code of operator {name!r}")
    sys.modules.update(modules)
    classes = _unpickle(types, "the part with the types")
    if content["codec"] == "pickle":
        _make_importable(classes)
    return LoadedOperator(manifests.operator_spec(entry), function, classes, content["codec"], number)


def verified_spec(manifest: bytes, signature: bytes, verify_key: bytes, name: str) -> OperatorSpec:
    """What the signed manifest says of an operator; its code isn't looked at. Raises `BundleTampered`."""
    content, number = _verified(manifest, signature, verify_key, name)
    return manifests.operator_spec(content["operators"][number])


def _verified(manifest: bytes, signature: bytes, verify_key: bytes, name: str) -> tuple[dict[str, Any], int]:
    """The manifest, and which of its operators is called `name`."""
    signing.verify(manifest, signature, verify_key)
    content: dict[str, Any] = json.loads(manifest)
    number = next((number for number, entry in enumerate(content["operators"]) if entry["name"] == name), None)
    if number is None:
        raise BundleTampered(f"operator {name!r} isn't in the signed manifest")
    return content, number


def _make_importable(classes: dict[str, type | Registration]) -> None:
    """Put classes that came by value where pickle looks for them: in the module that they say they are from."""
    for name, cls in classes.items():
        module_name, _, qualname = name.partition(":")
        if isinstance(cls, type) and "." not in qualname:
            module = sys.modules.setdefault(module_name, ModuleType(module_name))
            if not hasattr(module, qualname):
                setattr(module, qualname, cls)


def _unpickle(data: bytes, what: str) -> Any:
    try:
        return pickle.loads(data)  # noqa: S301 - verified above
    except Exception as exc:  # unpickling runs imports and the user's __setstate__, which may raise anything
        hint = ""
        if isinstance(exc, ModuleNotFoundError):
            hint = ". Name its package at the operator, requirements=[...], or install it where operators run"
        raise BundleError(f"{what} can't be loaded in this process: {type(exc).__name__}: {exc}{hint}") from exc
