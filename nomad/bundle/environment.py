"""Where modules come from, and whether what a bundle needs is here.

`make` asks which distribution a module belongs to; the master calls `check_environment` at submit, so that
a missing package is not found out at run time.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import site
import sys
import sysconfig
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from nomad.errors import EnvironmentMismatch

if TYPE_CHECKING:
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
        file = _file(top)
        if file is None and top in sys.stdlib_module_names:
            return Found(Origin.EVERYWHERE)
        if top not in sys.stdlib_module_names or not _under(file, _stdlib()) or _under(file, _site_packages()):
            owners = [dist for dist in self._owners.get(top, ()) if file is None or _holds(dist, file)]
            if (
                not owners and file is not None and _under(file, _site_packages())
            ):  # its distribution lists its modules wrongly
                owners = _listing(file)
            if len(owners) > 1:  # a namespace package, or two distributions of the same library
                own_file = _file(name)
                owners = [dist for dist in owners if own_file is not None and _lists(dist, own_file)] or owners
            if owners or _under(file, _site_packages()):
                from importlib.metadata import version

                return Found(Origin.INSTALLED, tuple(sorted((dist, version(dist)) for dist in owners)))
        if file is None:
            return Found(Origin.UNKNOWN)
        if _under(file, _stdlib()):
            return Found(Origin.EVERYWHERE)
        own_file = _file(name)
        if own_file is None:
            return Found(Origin.UNKNOWN)
        return Found(Origin.LOCAL if own_file.suffix == ".py" or own_file.is_dir() else Origin.EXTENSION)

    @functools.cached_property
    def _owners(self) -> dict[str, list[str]]:
        from importlib.metadata import packages_distributions

        return {top: sorted(set(dists)) for top, dists in packages_distributions().items()}


def check_environment(bundle: Bundle) -> list[str]:
    """Sentences about packages whose version differs here from the one that the bundle was made with.

    Raises `EnvironmentMismatch` when the Python version differs or a package is missing, with what to do about it.
    """
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if bundle.python != here:
        raise EnvironmentMismatch(
            f"the bundle was made with Python {bundle.python}, but the operators run on Python {here}, and compiled "
            f"functions only run on the version that made them: submit with Python {here}, "
            f"or start the cluster with Python {bundle.python}"
        )
    from importlib.metadata import PackageNotFoundError, packages_distributions, version

    missing, warnings = [], []
    for dist, wanted in sorted(bundle.packages.items()):
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
    if missing:
        are = "is" if len(missing) == 1 else "are"
        install = " ".join(f"'{item.replace(' (', '==').rstrip(')')}'" for item in missing)
        raise EnvironmentMismatch(
            f"the bundle needs {', '.join(missing)}, which {are} not installed where the operators run: "
            f"pip install {install} there, and submit again"
        )
    return warnings


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
    return Path(place).resolve() if place is not None else None


def _under(file: Path | None, folders: tuple[Path, ...]) -> bool:
    return file is not None and any(file.is_relative_to(folder) for folder in folders)


@functools.cache
def _stdlib() -> tuple[Path, ...]:
    return tuple({Path(sysconfig.get_path(key)).resolve() for key in ("stdlib", "platstdlib")})


@functools.cache
def _site_packages() -> tuple[Path, ...]:
    places = {*site.getsitepackages(), site.getusersitepackages()}
    places |= {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    return tuple(Path(place).resolve() for place in sorted(places))


def _holds(dist: str, file: Path) -> bool:
    """Whether `file` lies where `dist` is installed, or `dist` is installed in place ("editable")."""
    from importlib.metadata import distribution

    found = distribution(dist)
    if _under(file, (Path(str(found.locate_file(""))).resolve(),)):
        return True
    direct_url = json.loads(found.read_text("direct_url.json") or "{}")
    return bool(direct_url.get("dir_info", {}).get("editable"))


def _lists(dist: str, file: Path) -> bool:
    from importlib.metadata import files

    return any(Path(str(entry.locate())).resolve() == file for entry in files(dist) or ())


def _listing(file: Path) -> list[str]:
    """The distributions that `file` was installed by, from the files that they list. Slow: tens of milliseconds."""
    from importlib.metadata import distributions

    name = file.name
    return sorted(
        {
            dist.metadata["Name"]
            for dist in distributions()
            for entry in dist.files or ()
            if entry.name == name and Path(str(entry.locate())).resolve() == file
        }
    )
