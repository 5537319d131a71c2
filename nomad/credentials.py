"""Where tokens and signing keys are kept, and how a client finds the ones of its master.

`nomad up` writes the entry of its own URL; the client and the command line look it up by
themselves, so that a user's program names no secret. The file is `credentials.json` in
`config_dir()`, mode 0600, replaced as a whole and never edited in place:

    {"masters": {"http://127.0.0.1:30000": {"token": "...", "signing_key": "<64 hex digits>"}}}

NOMAD_TOKEN and NOMAD_SIGNING_KEY override the file, NOMAD_MASTER names the default master. Only
this module reads these three. Nothing here talks to a master.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from nomad.errors import StateError, UsageError

DEFAULT_MASTER = "http://127.0.0.1:30000"

MOST_TOKEN = 8_000
"""No token is longer (in characters)."""
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
"""What this machine calls itself; whoever listens there isn't reached from outside."""


class CredentialsWarning(UserWarning):
    """A file of secrets, or a folder of them, is open to other users of the machine."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a client needs to speak to one master. Never printed: repr hides both."""

    token: str | None = field(default=None, repr=False)
    signing_key: bytes | None = field(default=None, repr=False)
    """Ed25519 seed, 32 bytes; signs the operator code that this user submits."""


def new_token() -> str:
    """A fresh bearer token: 256 bits, safe in URLs and headers."""
    return secrets.token_urlsafe(32)


def config_dir() -> Path:
    """The folder of the credentials file: NOMAD_CONFIG_DIR, or the user's own configuration folder."""
    if chosen := os.environ.get("NOMAD_CONFIG_DIR"):
        return Path(chosen)
    import platformdirs

    return Path(platformdirs.user_config_dir("nomad"))


def credentials_path() -> Path:
    """The credentials file, whether it exists or not."""
    return config_dir() / "credentials.json"


def master_url(url: str | None = None) -> str:
    """`url`, else NOMAD_MASTER, else `DEFAULT_MASTER`, in the form that the credentials file has.

    All names of the loopback interface are the same master, so they become `127.0.0.1`.
    Raises `UsageError` for anything but an http(s) URL with a host.
    """
    given = url if url is not None else os.environ.get("NOMAD_MASTER") or DEFAULT_MASTER
    problem = f"the master's address must look like {DEFAULT_MASTER}, not {given!r}"
    try:
        parts = urlsplit(given.strip())
        host, port = parts.hostname, parts.port
    except ValueError as exc:
        raise UsageError(f"{problem} ({exc})") from None
    if parts.scheme not in ("http", "https") or not host:
        raise UsageError(problem)
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UsageError(f"{problem}: only scheme, host, port and path belong in it")
    if host in LOOPBACK_NAMES:
        host = "127.0.0.1"
    elif ":" in host:
        host = f"[{host}]"
    return f"{parts.scheme}://{host}{f':{port}' if port is not None else ''}{parts.path.rstrip('/')}"


def find(url: str) -> Credentials:
    """The credentials for the master at `url` (as `master_url` gives it); fields are None where nothing is known."""
    entry = _read(credentials_path())["masters"].get(url, {})
    token = _token(os.environ.get("NOMAD_TOKEN")) or entry.get("token")
    key = os.environ.get("NOMAD_SIGNING_KEY")
    if key:
        return Credentials(token, _key(key, "NOMAD_SIGNING_KEY"))
    key = entry.get("signing_key")
    return Credentials(token, _key(key, f"signing_key of {url} in {credentials_path()}") if key else None)


def save(url: str, token: str, signing_key: bytes) -> None:
    """Write or replace the entry of `url`. Raises `StateError` when the file can't be written."""

    def enter(masters: dict[str, Any]) -> None:
        masters[url] = {"token": token, "signing_key": signing_key.hex()}

    _change(enter)


def where_looked(what: str, variable: str, url: str) -> str:
    """A sentence for errors: where a token or key for the master at `url` is looked for, and who writes it there."""
    login = "nomad login --kubernetes" + ("" if url == DEFAULT_MASTER else f" --url {url}")
    return (
        f"{what} is looked for in {variable}, then in {credentials_path()} "
        f"(`nomad up` writes it there; for a master on Kubernetes, `{login}`)."
    )


def warn_if_open(path: Path, mode: int) -> None:
    """Warn when the mode of a file of secrets, or of a folder of them, lets other users of the machine in."""
    if mode & 0o077:
        warnings.warn(
            f"{path} can be {'changed' if mode & 0o022 else 'read'} by other users of this machine: "
            f"run `chmod {'700' if stat.S_ISDIR(mode) else '600'} {path}`",
            CredentialsWarning,
            stacklevel=4,
        )


def _token(text: str | None) -> str | None:
    """What stands in NOMAD_TOKEN, without the end of line that it often has when it was read from a file."""
    token = (text or "").strip()
    if not (token.isascii() and token.isprintable()) or len(token) > MOST_TOKEN:
        raise UsageError("NOMAD_TOKEN is no token: it must be what stands in the file `token` of the state folder")
    return token or None


def _key(text: str, source: str) -> bytes:
    try:
        key = bytes.fromhex(text)
    except (ValueError, TypeError):
        key = b""
    if len(key) != 32:
        raise UsageError(f"{source} must be 64 hex digits (an Ed25519 seed)")
    return key


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = json.load(file)
    except FileNotFoundError:
        return {"masters": {}}
    except OSError as exc:
        raise StateError(f"can't read the credentials file {path}: {exc.strerror}") from exc
    except ValueError as exc:
        raise StateError(f"the credentials file {path} isn't JSON ({exc}); delete it and run `nomad up` again") from exc
    if not isinstance(content, dict) or not isinstance(content.get("masters"), dict):
        raise StateError(f'the credentials file {path} has no "masters" map; delete it and run `nomad up` again')
    warn_if_open(path, mode)
    return content


def _change(change: Callable[[dict[str, Any]], None]) -> None:
    path = credentials_path()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(path.parent):
            content = _read(path)
            change(content["masters"])
            _replace(path, json.dumps(content, indent=2) + "\n")
    except OSError as exc:
        raise StateError(f"can't write the credentials file {path}: {exc.strerror}") from exc


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Two `nomad up` at once must not lose each other's entry. The folder itself is the lock: no file is left over."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _replace(path: Path, text: str) -> None:
    """Write beside, then rename: a reader sees the old file or the new one. mkstemp's files are 0600 from birth."""
    fd, temporary = tempfile.mkstemp(prefix=".credentials-", dir=path.parent)
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
