"""The short private folder where a master and its local pods have their unix sockets.

Paths of unix sockets are limited to about 100 bytes, so they can't live in the state folder. The folder's
name is random and written down by the master: its pods must find it again after the master was restarted.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from nomad.errors import StateError

MAX_FOLDER = 64
"""Bytes; leaves room for names in it."""


def open_folder(recorded: str | None) -> Path:
    """`recorded`, made again if it is gone; or a new folder if there is none, or if it isn't ours alone any more.

    Raises `StateError` when none can be made.
    """
    if recorded is not None:
        try:
            os.mkdir(recorded, 0o700)
        except FileExistsError:
            if _is_ours(recorded):
                return Path(recorded)
        except OSError:
            pass  # its parent is gone, say
        else:
            return Path(recorded)
    try:
        return Path(tempfile.mkdtemp(prefix="nomad-", dir=_parent()))
    except OSError as exc:
        raise StateError(f"no folder for sockets can be made in {_parent()}: {exc.strerror}") from exc


def remove_folder(folder: Path) -> None:
    """Remove the folder if nothing is in it."""
    try:
        folder.rmdir()
    except OSError:
        pass


def _is_ours(folder: str) -> bool:
    """In a shared place like /tmp anyone may have put something there under this name since."""
    found = os.lstat(folder)
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and stat.S_IMODE(found.st_mode) == 0o700


def _parent() -> str:
    chosen = os.environ.get("XDG_RUNTIME_DIR", "")
    return chosen if chosen and len(os.fsencode(chosen)) <= MAX_FOLDER - 16 and os.access(chosen, os.W_OK) else "/tmp"
