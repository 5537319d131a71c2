"""The namespace's certificates in Secrets, kept up to date by the master that leads.

    certificates = Certificates(api, namespace)
    await certificates.renew()            # before anything listens or is started
    certificates.put(folder)              # this process's own, for `nomad.transport.tls.use(folder)`
    ...
    await certificates.keep(folder)       # until cancelled

What is due is decided by `nomad.kubernetes.certs`. A look takes three requests, one each hour. Secrets: `nomad-ca` (the
CA with its key and successor; only masters read it), `nomad-master-tls`, and `nomad-pod-tls`, which pods, agents and
relays mount: they see a new one within a minute or two.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nomad.clock import Clock, SystemClock
from nomad.errors import ApiConflict, ApiError, ApiNotFound
from nomad.kubernetes import paths
from nomad.kubernetes.api import Api
from nomad.kubernetes.certs import Authority, Former, Held, Leaf, Pair, renewed
from nomad.kubernetes.names import (
    APP,
    CA_SECRET,
    COMPONENT,
    MANAGED_BY,
    MASTER_TLS_SECRET,
    NOMAD,
    POD_TLS_SECRET,
)
from nomad.kubernetes.names import MASTER as MASTER_COMPONENT
from nomad.transport.certificates import AUTHORITIES, CERTIFICATE, KEY, MASTER, POD

log = logging.getLogger(__name__)

SECRETS = {MASTER: MASTER_TLS_SECRET, POD: POD_TLS_SECRET}
"""Where the certificate of a role is."""
ROTATION = "rotation.json"
"""In the CA's Secret: its successor, and those before it."""
EVERY = 3600.0
"""Seconds between looks; all that is due may wait for longer than that."""
AGAIN = 60.0
"""Seconds until the next attempt when the API couldn't be asked."""
ATTEMPTS = 5
"""How often a look begins anew because somebody else changed a Secret meanwhile."""


class Certificates:
    """Looks after the three Secrets."""

    def __init__(self, api: Api, namespace: str, clock: Clock | None = None) -> None:
        self._api = api
        self._namespace = namespace
        self._clock = clock or SystemClock()
        self._leaves: Mapping[str, Leaf] = {}

    async def renew(self) -> None:
        """Make or renew what is due. Raises `ApiError`."""
        for attempt in range(ATTEMPTS):
            try:
                await self._renew()
                return
            except ApiConflict:  # another master was at it: look at what it made
                if attempt == ATTEMPTS - 1:
                    raise

    def put(self, folder: str | os.PathLike[str], role: str = MASTER) -> None:
        """Write the files of a role to `folder`, which is made if need be. After `renew`."""
        leaf, folder = self._leaves[role], Path(folder)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        files = {CERTIFICATE: leaf.own.certificate, KEY: leaf.own.key, AUTHORITIES: leaf.authorities}
        for name, content in files.items():
            if (folder / name).exists() and (folder / name).read_bytes() == content:
                continue
            with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:  # mode 0600
                file.write(content)
            os.replace(file.name, folder / name)

    async def keep(self, folder: str | os.PathLike[str] | None = None) -> None:
        """Look after them, and write the master's own to `folder`, until cancelled."""
        pause = EVERY
        while True:
            await self._clock.sleep(pause)
            try:
                await self.renew()
            except ApiError as exc:
                log.warning("certificates couldn't be looked after: %s", exc)
                pause = AGAIN
                continue
            pause = EVERY
            if folder is not None:
                self.put(folder)

    # Inside

    async def _renew(self) -> None:
        kept = {name: await self._read(name) for name in (CA_SECRET, *SECRETS.values())}
        found = Held(
            _authority(_data(kept[CA_SECRET])),
            {role: leaf for role, name in SECRETS.items() if (leaf := _leaf(_data(kept[name])))},
        )
        now = datetime.fromtimestamp(self._clock.wall(), UTC)
        wanted = renewed(found, self._namespace, list(SECRETS), now)
        authority = wanted.authority
        assert authority is not None
        # The authority first: whoever goes on after a crash must know what the leaves were told.
        if authority != found.authority:
            kept[CA_SECRET] = await self._write(CA_SECRET, _authority_data(authority), kept[CA_SECRET])
            log.info("the certificate authority was renewed, or its successor made")
        for role, leaf in wanted.leaves.items():
            if leaf != found.leaves.get(role):
                await self._write(SECRETS[role], _leaf_data(leaf), kept[SECRETS[role]])
                log.info("the certificates in %s were renewed", SECRETS[role])
        if authority.next is not None and authority.published is None:
            published = Authority(authority.signing, authority.next, now, authority.former)
            await self._write(CA_SECRET, _authority_data(published), kept[CA_SECRET])
        self._leaves = wanted.leaves

    async def _read(self, name: str) -> dict[str, Any] | None:
        try:
            return await self._api.get(paths.secrets(self._namespace, name))
        except ApiNotFound:
            return None

    async def _write(self, name: str, data: Mapping[str, bytes], before: dict[str, Any] | None) -> dict[str, Any]:
        """Raises `ApiConflict` when it isn't any more as it was read."""
        encoded = {key: base64.b64encode(value).decode() for key, value in data.items()}
        if before is not None:
            metadata = {"resourceVersion": before["metadata"]["resourceVersion"]}
            changed = {"metadata": metadata, "data": encoded}
            return await self._api.patch(paths.secrets(self._namespace, name), changed)
        labels = {APP: NOMAD, MANAGED_BY: NOMAD, COMPONENT: MASTER_COMPONENT}
        body: dict[str, Any] = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": name, "labels": labels},
            "type": "Opaque" if name == CA_SECRET else "kubernetes.io/tls",
            "data": encoded,
        }
        return await self._api.create(paths.secrets(self._namespace), body)


def _data(secret: dict[str, Any] | None) -> dict[str, bytes]:
    return {key: base64.b64decode(value) for key, value in ((secret or {}).get("data") or {}).items()}


def _leaf(data: Mapping[str, bytes]) -> Leaf | None:
    if not {CERTIFICATE, KEY, AUTHORITIES} <= data.keys():
        return None
    return Leaf(Pair(data[CERTIFICATE], data[KEY]), data[AUTHORITIES])


def _leaf_data(leaf: Leaf) -> dict[str, bytes]:
    return {CERTIFICATE: leaf.own.certificate, KEY: leaf.own.key, AUTHORITIES: leaf.authorities}


def _authority(data: Mapping[str, bytes]) -> Authority | None:
    """None when there is none, or none that can be read: it is made anew then."""
    if not {CERTIFICATE, KEY} <= data.keys():
        return None
    try:
        rest = json.loads(data.get(ROTATION, b"{}"))
        after, published = rest.get("next"), rest.get("published")
        return Authority(
            Pair(data[CERTIFICATE], data[KEY]),
            Pair(after["certificate"].encode(), after["key"].encode()) if after else None,
            datetime.fromisoformat(published) if published else None,
            tuple(
                Former(former["certificate"].encode(), datetime.fromisoformat(former["until"]))
                for former in rest.get("former", ())
            ),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        log.warning("%s in the Secret %s can't be read, so a new CA is made: %r", ROTATION, CA_SECRET, exc)
        return None


def _authority_data(authority: Authority) -> dict[str, bytes]:
    after = authority.next
    rest = {
        "next": {"certificate": after.certificate.decode(), "key": after.key.decode()} if after else None,
        "published": authority.published.isoformat() if authority.published else None,
        "former": [
            {"certificate": former.certificate.decode(), "until": former.until.isoformat()}
            for former in authority.former
        ],
    }
    return {CERTIFICATE: authority.signing.certificate, KEY: authority.signing.key, ROTATION: json.dumps(rest).encode()}
