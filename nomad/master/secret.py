"""Secrets in files: made once, mode 0600 from birth, whole or not there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from nomad import credentials
from nomad.errors import StateError


def kept(path: Path, make: Callable[[], str]) -> str:
    """The text in `path`, which is made when it isn't there yet. Raises `StateError`.

    Warns of one that other users of the machine can read.
    """
    try:
        with path.open(encoding="ascii") as file:
            mode, text = os.fstat(file.fileno()).st_mode, file.read().strip()
        if not text:
            raise StateError(f"{path} is empty; delete it to have a new one made")
        credentials.warn_if_open(path, mode)
        return text
    except FileNotFoundError:
        pass
    except (OSError, UnicodeDecodeError) as exc:
        raise StateError(f"{path} can't be read: {exc}; delete it to have a new one made") from exc
    text = make()
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as exc:
        raise StateError(f"{path} can't be written: {exc.strerror}") from exc
    return text
