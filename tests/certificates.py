"""Certificates for tests, in folders as processes find them."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

from nomad.kubernetes.certs import LEAF_LIFE, Pair, new_ca, new_leaf
from nomad.transport.certificates import AUTHORITIES, CERTIFICATE, KEY, POD, Identity

NAMESPACE = "test"


def now() -> datetime:
    return datetime.now(UTC)


def authority(at: datetime | None = None) -> Pair:
    return new_ca(NAMESPACE, at or now())


def put(
    folder: Path,
    ca: Pair,
    role: str = POD,
    *,
    namespace: str = NAMESPACE,
    trusted: bytes | None = None,
    at: datetime | None = None,
    life: timedelta = LEAF_LIFE,
) -> Path:
    """A new certificate in `folder`, in place of what was there, as Kubernetes does it: by swapping a symlink."""
    made = new_leaf(ca, Identity(namespace, role), at or now(), life)
    folder.mkdir(parents=True, exist_ok=True)
    version = folder / f"..{len(list(folder.iterdir()))}"
    version.mkdir()
    files = {CERTIFICATE: made.certificate, KEY: made.key, AUTHORITIES: trusted or ca.certificate}
    for name, content in files.items():
        (version / name).write_bytes(content)
    link = folder / "..new"
    link.symlink_to(version.name)
    os.replace(link, folder / "..data")
    for name in files:
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"..data/{name}")
    return folder
