"""Where modules come from, and whether what a bundle needs is where it runs.

`make` asks which distribution a module belongs to; the master calls `check_environment` at submit, so that
a missing package is not found out at run time where that can be known before.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import site
import sys
import sysconfig
import urllib.parse
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from nomad.errors import EnvironmentMismatch

if TYPE_CHECKING:
    from importlib.metadata import Distribution

    from nomad.bundle.read import Bundle


class Origin(StrEnum):
    """Where a module comes from."""

    EVERYWHERE = "everywhere"
    """The standard library, or Nomad: every pod has it."""
    INSTALLED = "installed"
    """A distribution: pods need it as well."""
    LOCAL = "local"
    """The user's own source, beside the script: its code travels."""
    EXTENSION = "extension"
    """The user's own compiled module: it can't travel."""
    UNKNOWN = "unknown"
    """Not found, or made at run time."""


@dataclass(frozen=True, slots=True)
class Found:
    """A module's origin, and the distributions (name -> version) that it is part of when it is installed."""

    origin: Origin
    distributions: tuple[tuple[str, str], ...] = ()


class Modules:
    """Looks modules up. Made anew for each bundle, since packages come and go while a notebook runs."""

    def __init__(self) -> None:
        self._found: dict[str, Found] = {}

    def find(self, name: str) -> Found:
        """Where the module `name` comes from. Imports nothing but, for a submodule that isn't loaded, its parents."""
        if name not in self._found:
            self._found[name] = self._find(name)
        return self._found[name]

    def _find(self, name: str) -> Found:
        top = name.partition(".")[0]
        if top in ("__main__", "nomad", "cloudpickle") or top in sys.builtin_module_names:
            return Found(Origin.EVERYWHERE)
        file = _file(name)
        anchor = file or _file(top)  # `name` may be something else in a module
        if anchor is None:
            return Found(Origin.EVERYWHERE if top in sys.stdlib_module_names else Origin.UNKNOWN)
        owners = [dist for dist in self._installed if dist.owns(anchor, top)]
        if owners or _under(anchor, _site_packages()):
            return Found(Origin.INSTALLED, tuple(sorted({dist.name_and_version() for dist in owners})))
        if _under(anchor, _stdlib()):
            return Found(Origin.EVERYWHERE)
        if file is None:
            return Found(Origin.UNKNOWN)
        return Found(Origin.LOCAL if file.suffix == ".py" or file.is_dir() else Origin.EXTENSION)

    @functools.cached_property
    def _installed(self) -> list[_Installed]:
        from importlib.metadata import distributions

        return [_Installed(dist) for dist in distributions()]


class _Installed:
    """A distribution and the files that it says it consists of.

    Its record is searched as text: taking the records of a hundred distributions apart takes most of a second,
    and `packages_distributions` does that too.
    """

    def __init__(self, dist: Distribution) -> None:
        self._dist = dist
        self._root = Path(os.path.abspath(str(dist.locate_file(""))))
        record = dist.read_text("RECORD")
        self._record = None if record is None else f"\n{record}"

    def owns(self, file: Path, top: str) -> bool:
        """Whether `file`, of the top-level module `top`, is part of it."""
        if self._record is None:  # installed by something else than pip, or in place by an old setuptools
            return file.is_relative_to(self._root) and top in self._top_levels
        if file.is_relative_to(self._root) and f"\n{file.relative_to(self._root).as_posix()}," in self._record:
            return True
        return self._in_place is not None and file.is_relative_to(self._in_place) and top in self._top_levels

    def name_and_version(self) -> tuple[str, str]:
        return self._dist.metadata["Name"], self._dist.version

    @functools.cached_property
    def _top_levels(self) -> frozenset[str]:
        return frozenset((self._dist.read_text("top_level.txt") or "").split())

    @functools.cached_property
    def _in_place(self) -> Path | None:
        """The folder of its source, when it is installed in place ("editable")."""
        direct_url = json.loads(self._dist.read_text("direct_url.json") or "{}")
        if not direct_url.get("dir_info", {}).get("editable"):
            return None
        return Path(urllib.parse.unquote(urllib.parse.urlsplit(direct_url["url"]).path))


def check_environment(bundle: Bundle, pythons: Collection[str] | None = None) -> list[str]:
    """Sentences about what may run otherwise than where the bundle was made.

    Operators run as this process does: versions of packages are compared with those that are installed here, but for
    what operators have installed. Or, with `pythons`, in the images that there are for these versions of Python, or in
    one that they name: which packages these have isn't known here, and nothing is said of them.

    Raises `EnvironmentMismatch` when the Python version differs or a package is missing, with what to do about it.
    """
    if pythons is None:
        warnings = _compared_with_here(bundle)
    else:
        _check_images(bundle, pythons)
        warnings = []
    for text in sorted({text for op in bundle.operators for text in op.requirements if not _exact(text)}):
        warnings.append(f"the requirement {text} names no single version: nodes may install different ones")
    return warnings


def _check_images(bundle: Bundle, pythons: Collection[str]) -> None:
    if bundle.python in pythons or all(op.image for op in bundle.operators):
        return
    there = ", ".join(sorted(pythons, key=lambda version: [int(part) for part in version.split(".")]))
    raise EnvironmentMismatch(
        f"the bundle was made with Python {bundle.python}, and compiled functions only run on the version that "
        f"made them, but this cluster has images for Python {there or '(none)'}: submit with one of these, have an "
        f"image built for {bundle.python}, or name an image of your own for each operator with @operator(image=...)"
    )


def _compared_with_here(bundle: Bundle) -> list[str]:
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if bundle.python != here:
        raise EnvironmentMismatch(
            f"the bundle was made with Python {bundle.python}, but the operators run on Python {here}, and compiled "
            f"functions only run on the version that made them: submit with Python {here}, "
            f"or start the cluster with Python {bundle.python}"
        )
    from importlib.metadata import PackageNotFoundError, packages_distributions, version

    from packaging.utils import canonicalize_name

    missing, warnings = [], []
    brought = _brought(bundle)
    for dist, wanted in sorted(bundle.packages.items()):
        if canonicalize_name(dist) in brought:
            continue
        try:
            found = version(dist)
        except PackageNotFoundError:
            modules = bundle.imports.get(dist, ())
            others = sorted({other for module in modules for other in packages_distributions().get(module, ())})
            if modules and others and all(importlib.util.find_spec(module) is not None for module in modules):
                instead = ", ".join(others)
                warnings.append(
                    f"{dist} ({wanted}) is not installed where the operators run: {instead} is used instead"
                )
            else:
                missing.append(f"{dist} ({wanted})")
            continue
        if found != wanted:
            warnings.append(f"the bundle was made with {dist} {wanted}, but the operators run with {found}")
    if missing and brought:
        warnings += [
            f"the bundle needs {item}, which isn't installed here: operators have it only if a requirement brings it"
            for item in missing
        ]
    elif missing:
        are = "is" if len(missing) == 1 else "are"
        install = " ".join(f"'{item.replace(' (', '==').rstrip(')')}'" for item in missing)
        raise EnvironmentMismatch(
            f"the bundle needs {', '.join(missing)}, which {are} not installed where the operators run: "
            f"pip install {install} there, and submit again"
        )
    return warnings


def _exact(requirement: str) -> bool:
    from packaging.requirements import Requirement

    return any(
        part.operator in ("==", "===") and not part.version.endswith("*") for part in Requirement(requirement).specifier
    )


def _brought(bundle: Bundle) -> frozenset[str]:
    """The packages that operators have installed by name; what these need in turn isn't known before."""
    from packaging.requirements import Requirement

    return frozenset(Requirement(text).name for op in bundle.operators for text in op.requirements)


def _file(name: str) -> Path | None:
    """The file (of a namespace package: a folder) that the module is from; None when it has none."""
    module = sys.modules.get(name)
    if module is not None:
        places = [getattr(module, "__file__", None), *list(getattr(module, "__path__", []))[:1]]
    else:
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError, AttributeError):
            return None
        if spec is None:
            return None
        places = [spec.origin if spec.has_location else None, *list(spec.submodule_search_locations or [])[:1]]
    place = next((place for place in places if isinstance(place, str)), None)
    return Path(os.path.abspath(place)) if place is not None else None


def _under(file: Path, folders: tuple[Path, ...]) -> bool:
    return any(file.is_relative_to(folder) for folder in folders)


@functools.cache
def _stdlib() -> tuple[Path, ...]:
    return _both_forms({sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")})


@functools.cache
def _site_packages() -> tuple[Path, ...]:
    places = {*site.getsitepackages(), site.getusersitepackages()}
    return _both_forms(places | {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})


def _both_forms(places: set[str]) -> tuple[Path, ...]:
    """The folders as they are named, and where their links lead: modules know one or the other."""
    return tuple(sorted({form for place in places for form in (Path(os.path.abspath(place)), Path(place).resolve())}))
