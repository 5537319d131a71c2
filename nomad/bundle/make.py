"""Packs a pipeline into a signed bundle. Called by clients, where the user's functions are."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Mapping
from typing import Any

import msgpack

from nomad.bundle import manifest as manifests
from nomad.bundle import signing
from nomad.bundle.environment import Modules
from nomad.bundle.pickling import culprit, recorded
from nomad.bundle.read import ENVELOPE, MAX_BUNDLE, read
from nomad.delivery import codec
from nomad.errors import BundleError
from nomad.pipeline import Pipeline


def make(pipeline: Pipeline, signing_key: bytes) -> bytes:
    """`pipeline` as a bundle, signed with `signing_key` (an Ed25519 seed, 32 bytes).

    Functions of `__main__` and of modules that aren't installed travel with their code; those of installed packages by
    name, and the package's version is noted. A module that a function imports in its body is imported here, if it is
    the user's own. Raises `BundleError`, which names the operator and the part of it that can't be packed.
    """
    packer = _Packer()
    code = {}
    for position, operator in enumerate(pipeline.operators, start=1):
        where = f"operator {operator.spec.name!r} (position {position} of {len(pipeline.operators)})"
        code[operator.spec.name] = packer.function(operator.function, where)
    types = packer.types([operator.function for operator in pipeline.operators], pipeline.codec)
    manifest = manifests.dump(
        {
            "format": manifests.FORMAT,
            "nomad": _version(),
            "python": f"{sys.version_info.major}.{sys.version_info.minor}",
            "packages": packer.packages,
            "imports": {dist: sorted(names) for dist, names in packer.imports.items()},
            "codec": pipeline.codec,
            "operators": [
                manifests.operator_entry(operator.spec, signing.digest(code[operator.spec.name]))
                for operator in pipeline.operators
            ],
            "edges": pipeline.edges,
            "types_sha256": signing.digest(types),
            "profile": pipeline.profile,
        }
    )
    envelope = {
        "nomad": ENVELOPE,
        "manifest": manifest,
        "signature": signing.sign(manifest, signing_key),
        "code": code,
        "types": types,
    }
    bundle: bytes = msgpack.packb(envelope)
    if len(bundle) > MAX_BUNDLE:
        name, largest = max(code.items(), key=lambda item: len(item[1]))
        raise BundleError(
            f"the bundle would have {len(bundle) >> 20} MiB, of which operator {name!r} takes {len(largest) >> 20}; "
            f"{MAX_BUNDLE >> 20} MiB is the limit. Load large data (a model, a table) from a file inside the function, "
            "on its first call, not in a global that the function uses"
        )
    return bundle


def sign_again(data: bytes, verify_key: bytes, signing_key: bytes) -> bytes:
    """A bundle that is signed by the owner of `verify_key`, signed by `signing_key` instead: for another cluster.

    Raises `BundleError` and `BundleTampered`.
    """
    read(data, verify_key)
    envelope = msgpack.unpackb(data)
    again: bytes = msgpack.packb(envelope | {"signature": signing.sign(envelope["manifest"], signing_key)})
    return again


class _Packer:
    """Pickles the parts of one bundle and gathers what they need."""

    def __init__(self) -> None:
        self.packages: dict[str, str] = {}
        self.imports: dict[str, set[str]] = {}
        self._modules = Modules()
        self._classes: dict[int, type] = {}
        self._namespaces: dict[int, Mapping[str, Any]] = {}

    def function(self, function: Any, where: str) -> bytes:
        """The pickle of `(function, {name: module})`, the modules being those that it imports in its body."""
        carried: dict[str, Any] = {}
        while True:
            data, body_imports = self._pickle((function, carried), f"{where} can't be packed: ")
            if body_imports.keys() <= carried.keys():
                return data
            carried = dict(sorted({**carried, **body_imports}.items()))

    def types(self, functions: list[Any], mode: str) -> bytes:
        """The pickle of `{name: class or codec}`, for the classes in reach of the functions.

        With the codec "pickle" all that travel by value are among them: pickle finds them by name only.
        """
        namespaces = [*self._namespaces.values(), *(_globals_of(function) for function in functions)]
        found = {id(cls): cls for namespace in namespaces for cls in namespace.values() if codec.is_plain_type(cls)}
        found.update({key: cls for key, cls in self._classes.items() if mode == "pickle" or codec.is_plain_type(cls)})
        types: dict[str, Any] = {
            codec.type_name(cls): cls for cls in found.values() if cls.__module__.partition(".")[0] not in _KNOWN
        }
        types.update(codec.registered())
        for name, cls in types.items():
            self._pickle(cls, f"messages of class {name.replace(':', '.')} can't travel: ")
        return self._pickle(dict(sorted(types.items())), "the classes of messages can't be packed: ")[0]

    def _pickle(self, obj: Any, failed: str) -> tuple[bytes, dict[str, Any]]:
        with recorded(self._modules) as dumps:
            try:
                data, recorder = dumps(obj)
            except BundleError as exc:
                raise BundleError(f"{failed}{exc}") from exc
            except Exception as exc:  # pickling runs the user's __reduce__, which may raise anything
                raise BundleError(failed + _explain(exc, *culprit(obj, dumps))) from exc
        self.packages.update(recorder.packages)
        for dist, names in recorder.imports.items():
            self.imports.setdefault(dist, set()).update(names)
        self._classes.update(recorder.classes)
        self._namespaces.update(recorder.namespaces)
        return data, recorder.body_imports


_KNOWN = frozenset(("enum", "nomad"))

MOST_STEPS = 8
"""A way to what can't be packed is abridged when it has more steps."""


def _explain(exc: Exception, path: list[str], part: Any) -> str:
    what = f"{type(part).__module__}.{type(part).__qualname__}".removeprefix("builtins.")
    if len(path) > MOST_STEPS:
        path = [*path[: MOST_STEPS // 2], "...", *path[-MOST_STEPS // 2 :]]
    place = f"its {' -> '.join(path)} is of type {what}, which" if path else f"its type, {what},"
    return (
        f"{place} can't travel to another process ({type(exc).__name__}: {exc}). Create it inside the function, "
        "on its first call if it is costly, instead of capturing it"
    )


def _globals_of(function: Any) -> Mapping[str, Any]:
    """The globals of the module where an operator's function, or class, is defined."""
    while isinstance(function, functools.partial):
        function = function.func
    if not (inspect.isroutine(function) or inspect.isclass(function)):
        function = type(function)
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    return vars(module) if module is not None and module.__name__ not in sys.stdlib_module_names else {}


def _version() -> str:
    from nomad import __version__

    return __version__
