"""Which of the secrets that operators name they can be given. Called by `nomad.runtime.kubernetes`, for a submit."""

from __future__ import annotations

from collections.abc import Collection

from nomad.errors import ApiForbidden, ApiNotFound
from nomad.kubernetes import names, paths
from nomad.kubernetes.api import Api


async def missing(api: Api, namespace: str, references: Collection[str]) -> list[str]:
    """A sentence for each of the `name/key`s that an operator can't have. Raises `ApiError`."""
    wanted: dict[str, set[str]] = {}
    for reference in references:
        name, _, key = reference.partition("/")
        wanted.setdefault(name, set()).add(key)
    found: list[str] = []
    for name, keys in sorted(wanted.items()):
        try:
            secret = await api.get(paths.secrets(namespace, name))
        except ApiNotFound:
            literals = " ".join(f"--from-literal={key}=..." for key in sorted(keys))
            how = f"kubectl --namespace {namespace} create secret generic {name} {literals}"
            found.append(f"there is no secret {name} in the namespace {namespace}: {how}")
            continue
        except ApiForbidden as exc:
            found.append(f"the secret {name} can't be read in the namespace {namespace}: {exc}")
            continue
        if (secret["metadata"].get("labels") or {}).get(names.APP) == names.NOMAD:
            found.append(f"the secret {name} is Nomad's own, and no operator's")
            continue
        there = secret.get("data") or {}
        found += [f"the secret {name} has no key {key}" for key in sorted(keys - set(there))]
    return found
