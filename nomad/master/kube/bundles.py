"""Bundles in a cluster: Secrets of a known size, named by the hash of what they hold together.

Pipelines with the same code share them. A bundle that no pipeline has stays for a day, so that a pipeline that was
exported and deleted can be applied again; who applies the Secrets before the pipeline has as much time.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import logging
from collections.abc import Awaitable, Collection, Generator, Iterable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from nomad.clock import Clock
from nomad.errors import ApiConflict, ApiExists, ApiNotFound, StateError
from nomad.kubernetes import paths
from nomad.kubernetes.api import Api
from nomad.kubernetes.names import BUNDLE_LABEL, UNUSED_ANNOTATION
from nomad.master.kube import resource
from nomad.master.kube.resource import CHUNK_KEY, CHUNKS_ANNOTATION, DIGEST_ANNOTATION, SHA256_ANNOTATION, Json
from nomad.master.kube.writes import LOOP, Writes

log = logging.getLogger(__name__)

T = TypeVar("T")

KEPT = timedelta(days=1)
"""How long a bundle stays that no pipeline has."""

AT_ONCE = 8
"""Chunks that are on their way at the same time."""

_PAGE = 8
"""Chunks per page of a list: some megabytes."""

_MOST = 10_000
"""More chunks than any bundle has."""


class Bundles:
    """The bundles in one namespace."""

    def __init__(self, api: Api, namespace: str, writes: Writes, clock: Clock) -> None:
        self._api = api
        self._namespace = namespace
        self._writes = writes
        self._clock = clock

    async def add(self, digest: str, data: bytes, patience: float) -> None:
        """Have a bundle there, whole, and not counted as unused. Raises `StateError`."""
        secrets = await asyncio.to_thread(resource.bundle_secrets, digest, data)
        await _some_at_once(self._add(secret, patience) for secret in secrets)

    async def read(self, digest: str, patience: float) -> bytes:
        """Raises `StateError` when it isn't there, not all of it, or not as it was written."""
        first = await self._get(digest, 0, patience)
        marks = first["metadata"].get("annotations") or {}
        count = marks.get(CHUNKS_ANNOTATION, "")
        if marks.get(DIGEST_ANNOTATION) != digest or not count.isdecimal() or not 0 < int(count) < _MOST:
            raise _damaged(digest)
        rest = await _some_at_once(self._get(digest, number, patience) for number in range(1, int(count)))
        return await asyncio.to_thread(_whole, digest, [first, *rest], marks.get(SHA256_ANNOTATION))

    async def sweep(self, used: Collection[str]) -> float:
        """Mark those that no pipeline has, delete those that none has had for a day; seconds until the next is due.

        Raises `StateError`.
        """
        # Only what is said of them is kept: bundles are large.
        found, _ = await self._writes.patiently(
            lambda: self._api.collect(
                paths.secrets(self._namespace),
                lambda item: dict(item["metadata"]),
                {"labelSelector": BUNDLE_LABEL},
                limit=_PAGE,
            ),
            LOOP,
        )
        now, next_due = datetime.fromtimestamp(self._clock.wall(), UTC), KEPT
        for metadata in found:
            marks = metadata.get("annotations") or {}
            since = _time(marks.get(UNUSED_ANNOTATION))
            name = metadata["name"]
            if marks.get(DIGEST_ANNOTATION) in used:
                if UNUSED_ANNOTATION in marks:
                    await self._mark(name, None)
            elif since is None:
                await self._mark(name, now.isoformat(timespec="seconds"))
            elif now - since >= KEPT:
                log.info("Secret %s of a bundle has been unused for a day, and is deleted", name)
                await self._delete(metadata, LOOP)
            else:
                next_due = min(next_due, KEPT - (now - since))
        return next_due.total_seconds()

    async def _add(self, secret: Json, patience: float) -> None:
        path = paths.secrets(self._namespace)
        name, marks = secret["metadata"]["name"], secret["metadata"]["annotations"]
        for _ in range(3):
            try:
                await self._writes.patiently(lambda: self._api.create(path, secret), patience)
                return
            except ApiExists:
                pass
            there = await self._there(name, patience)
            if there is None:
                continue
            known = there["metadata"].get("annotations") or {}
            if there.get("data") == secret["data"] and marks.items() <= known.items():
                # That it is used is written onto it, so that a sweep which is about to delete it can't any more.
                if UNUSED_ANNOTATION not in known or await self._mark(name, None, patience):
                    return
                continue
            # The same code, signed with another key, or damaged. What is given has been verified.
            await self._delete(there["metadata"], patience)
        raise StateError(f"Secret {name}, a part of the bundle, can't be replaced: somebody else changes it, too")

    async def _delete(self, metadata: Json, patience: float) -> None:
        """Unless it has changed since."""
        path, version = paths.secrets(self._namespace, metadata["name"]), metadata["resourceVersion"]
        with suppress(ApiConflict):
            await self._writes.patiently(lambda: self._api.delete(path, version=version), patience)

    async def _get(self, digest: str, number: int, patience: float) -> Json:
        name = resource.bundle_name(digest, number)
        found = await self._there(name, patience)
        if found is None:
            raise StateError(
                f"the bundle {digest} is missing: there is no Secret {name} in {self._namespace}; apply the Secrets "
                "that `nomad export` wrote, or submit the pipeline with `nomad submit`"
            )
        return found

    async def _there(self, name: str, patience: float) -> Json | None:
        try:
            return await self._writes.patiently(lambda: self._api.get(paths.secrets(self._namespace, name)), patience)
        except ApiNotFound:
            return None

    async def _mark(self, name: str, since: str | None, patience: float = LOOP) -> bool:
        """False: it is gone."""
        patch: Json = {"metadata": {"annotations": {UNUSED_ANNOTATION: since}}}
        try:
            await self._writes.patiently(lambda: self._api.patch(paths.secrets(self._namespace, name), patch), patience)
            return True
        except ApiNotFound:
            log.info("Secret %s of a bundle is gone already", name)
            return False


async def _some_at_once(calls: Generator[Awaitable[T], None, None]) -> list[T]:
    """Results in order; each call is made when its turn comes. A failure is raised once those beside it have ended."""
    found: dict[int, T] = {}
    turns = enumerate(calls)

    async def take_turns() -> None:
        try:
            for number, call in turns:
                found[number] = await call
        except BaseException:
            calls.close()  # no more are begun
            raise

    for ended in await asyncio.gather(*(take_turns() for _ in range(AT_ONCE)), return_exceptions=True):
        if ended is not None:
            raise ended
    return [found[number] for number in range(len(found))]


def _whole(digest: str, chunks: Iterable[Json], sha256: str | None) -> bytes:
    """What the Secrets hold together. Raises `StateError`."""
    try:
        data = b"".join(base64.b64decode(chunk["data"][CHUNK_KEY], validate=True) for chunk in chunks)
    except (KeyError, TypeError, binascii.Error):
        raise _damaged(digest) from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise _damaged(digest)
    return data


def _time(text: str | None) -> datetime | None:
    """None for what is no time, which then begins anew."""
    try:
        found = datetime.fromisoformat(text or "")
    except ValueError:
        return None
    return found if found.tzinfo is not None else None


def _damaged(digest: str) -> StateError:
    return StateError(
        f"the bundle {digest} is damaged: its Secrets don't hold what was written to them; delete those with the label "
        f"{BUNDLE_LABEL}={digest[:63]}, then submit the pipeline again or apply the Secrets that `nomad export` wrote"
    )
