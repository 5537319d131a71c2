"""Unix sockets as files: where to put them, and who may remove them.

Used by the transports whose addresses are paths.
"""

from __future__ import annotations

import os
import socket
import stat
import tempfile
from contextlib import suppress

from nomad.transport.address import MAX_UNIX_PATH


class SocketFile:
    """The path of a listener's socket: free to bind once this exists, removed by `remove`."""

    def __init__(self, path: str) -> None:
        """`path` may be empty, for a new one in a folder of its own. Removes a socket that nobody listens at."""
        self._folder = None if path else _private_folder()
        self.path = path or f"{self._folder}/s"
        self._inode: int | None = None
        _remove_stale(self.path)

    def taken(self) -> bool:
        """Whether there is something at the path that isn't ours to remove."""
        return os.path.lexists(self.path)

    def bound(self) -> None:
        """The socket is there: make it its owner's alone."""
        os.chmod(self.path, 0o600)
        self._inode = os.stat(self.path).st_ino

    def remove(self) -> None:
        """Remove the socket, unless somebody else has put another in its place, and a folder that was made for it."""
        with suppress(FileNotFoundError):
            if os.stat(self.path).st_ino == self._inode:
                os.unlink(self.path)
        if self._folder is not None:
            with suppress(OSError):
                os.rmdir(self._folder)


def _private_folder() -> str:
    """A new folder for one socket, with a path short enough for the kernel."""
    for parent in (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir()):
        if parent and len(os.fsencode(parent)) + 32 <= MAX_UNIX_PATH and os.access(parent, os.W_OK | os.X_OK):
            return tempfile.mkdtemp(prefix="nomad-", dir=parent)
    return tempfile.mkdtemp(prefix="nomad-", dir="/tmp")


def _remove_stale(path: str) -> None:
    """Remove a socket of ours that no process listens at any more; leaves everything else alone."""
    try:
        found = os.stat(path)
    except OSError:  # not there, or binding says what is wrong with it
        return
    if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.geteuid():
        return
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(0)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except OSError:  # it listens and its queue is full, or is of another kind
            pass
