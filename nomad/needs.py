"""What an operator's process needs beside its code: packages, variables, secrets and devices. Pure checks.

Called by `pipeline`, for what a user writes, and by `bundle.schema`, for what comes in. Each check takes what was given
and returns it in the one form in which it is kept, or raises `PipelineError` that says what would be valid. Whether
a cluster has what is needed isn't known here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from nomad.errors import PipelineError

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
RESERVED = ("NOMAD_", "PYTHON")
"""Beginnings of variables that an operator can't have: Nomad's own, and those that an interpreter reads when it starts,
which is before it is given to an operator.
"""

SECRET = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?/[A-Za-z0-9_-][A-Za-z0-9._-]{0,251}")
"""`name/key`, as Kubernetes has them; on one machine a file in a folder."""

DEVICE = re.compile(r"(?:[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
"""`nvidia.com/gpu`, or a plain name."""

MOST = 1000
"""Entries of each kind."""

_BY_NAME = re.compile(r"[a-z0-9-]+(?:\[[A-Za-z0-9._,-]+\])?[A-Za-z0-9<>=!~,.*+_-]*")
_ARCHIVES = (".bz2", ".gz", ".lz", ".lzma", ".tar", ".tbz", ".tgz", ".tlz", ".txz", ".whl", ".xz", ".zip")
"""What pip can't take for the path of a folder is of that form, and for that of a file doesn't end like these."""


def requirements(value: Any) -> tuple[str, ...]:
    """Packages as pip takes them, each in its normal form, sorted, each once; none that pip builds from a path."""
    from packaging.requirements import InvalidRequirement, Requirement  # only where it is used
    from packaging.utils import canonicalize_name

    found = set()
    for text in _listed("requirements", value, '["numpy==2.1"]'):
        try:
            requirement = Requirement(text)
        except InvalidRequirement as exc:
            reason = str(exc).partition("\n")[0]
            raise PipelineError(f"requirement {text!r} is not valid ({reason}): write it like 'numpy==2.1'") from None
        if requirement.url is not None:
            raise PipelineError(
                f"requirement {text!r} has an address, which isn't possible: name a package and its version; "
                "where packages come from is in pip's configuration on the nodes"
            )
        requirement.name = canonicalize_name(requirement.name)
        asked = str(requirement)
        plain = asked.partition(";")[0]
        if not _BY_NAME.fullmatch(plain) or plain.lower().endswith(_ARCHIVES):
            raise PipelineError(f"requirement {text!r} looks like a file: name a package and its version")
        found.add(asked)
    return tuple(sorted(found))


def environment(value: Any) -> dict[str, str]:
    """Variables and their values."""
    found = _mapped("environment", value, '{"MODE": "fast"}')
    for name, text in found.items():
        _check_variable("environment", name)
        if not isinstance(text, str) or "\0" in text:
            raise PipelineError(f"environment: the value of {name} is {text!r}, but must be text")
    return found


def secrets(value: Any) -> dict[str, str]:
    """Variables and the secrets that they get their values from: `{"DB_PASSWORD": "db/password"}`."""
    found = _mapped("secrets", value, '{"DB_PASSWORD": "db/password"}')
    for name, reference in found.items():
        _check_variable("secrets", name)
        if not isinstance(reference, str) or not SECRET.fullmatch(reference):
            raise PipelineError(
                f"secrets: {name} is {reference!r}, but must refer to a secret by its name and a key in it, "
                'like "db/password" (names are of lower-case letters, digits, "-" and ".")'
            )
    return found


def devices(value: Any) -> dict[str, int]:
    """Devices and how many of each; from a set of names: one of each."""
    example = '{"nvidia.com/gpu": 1} or {"camera"}'
    if isinstance(value, Mapping):
        found = _mapped("devices", value, example)
    else:
        found = dict.fromkeys(sorted(_listed("devices", value, example)), 1)
    for name, count in found.items():
        if not DEVICE.fullmatch(name):
            raise PipelineError(f"device {name!r} is not valid: give names like {example}")
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MOST:
            raise PipelineError(f"devices: {name} is {count!r}, but must be a whole number, 1 or more")
    return dict(sorted(found.items()))


def check_apart(environment: Mapping[str, str], secrets: Mapping[str, str]) -> None:
    """Raise `PipelineError` for a variable that stands in both."""
    if both := sorted(environment.keys() & secrets.keys()):
        raise PipelineError(f"{both[0]} stands in environment and in secrets: take it out of one")


def device_labels(wanted: Mapping[str, int]) -> frozenset[str]:
    """Devices as labels that a node must have, in words: "device camera", "2 devices nvidia.com/gpu"."""
    return frozenset(_words(name, count) for name, count in wanted.items())


def offered(wanted: Mapping[str, int], there: Mapping[str, int]) -> frozenset[str]:
    """Which of `device_labels(wanted)` a node has that has these devices left."""
    return frozenset(_words(name, count) for name, count in wanted.items() if there.get(name, 0) >= count)


def _words(name: str, count: int) -> str:
    return f"device {name}" if count == 1 else f"{count} devices {name}"


def _check_variable(option: str, name: Any) -> None:
    if not isinstance(name, str) or not VARIABLE.fullmatch(name):
        raise PipelineError(
            f"{option}: {name!r} can't be the name of a variable: it takes letters, digits and '_', the first no digit"
        )
    if name.upper().startswith(RESERVED):
        raise PipelineError(
            f"{option}: {name} can't be set: names that begin with {' or '.join(RESERVED)} belong to Nomad and to the "
            "interpreter, which has started already when an operator gets its process"
        )


def _listed(option: str, value: Any, example: str) -> list[str]:
    items: list[Any] = [value] if isinstance(value, str) else list(value) if isinstance(value, Iterable) else [None]
    if len(items) > MOST or not all(isinstance(item, str) for item in items):
        raise PipelineError(f"{option} {value!r} is not valid: give names, e.g. {example}")
    return items


def _mapped(option: str, value: Any, example: str) -> dict[Any, Any]:
    if not isinstance(value, Mapping) or len(value) > MOST:
        raise PipelineError(f"{option} {value!r} is not valid: give a map, e.g. {example}")
    return dict(value)
