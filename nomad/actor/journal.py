"""How far the last operator of a pipeline has come, in a file that survives the kill of its process.

A final operator acts on the world, so nobody downstream recognises a double. After each call it notes the position of the
message in a memory-mapped page: a store, not a system call, and the page outlives the process. An instance that starts
anew goes on behind the noted position. What remains is the message whose call was interrupted: nobody can know
whether it took effect, and it is run again. The page is not forced to disk: a power failure can lose the note, a kill can't.
"""

from __future__ import annotations

import mmap
import os

from nomad.delivery.frames import NOWHERE, Position

_MAGIC = 0x314C4E524A_4D4E
_SLOTS = 6
_ACTIVE = 1


class Journal:
    """The page: a magic number, which of two slots is valid, and the two slots (origin, index)."""

    def __init__(self, path: str):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, mmap.PAGESIZE)
            self._map = mmap.mmap(fd, mmap.PAGESIZE)
        finally:
            os.close(fd)
        self._view = memoryview(self._map)
        self._page = self._view[: _SLOTS * 8].cast("Q")
        if self._page[0] != _MAGIC:
            self._page[_ACTIVE] = 0
            self._page[2], self._page[3] = NOWHERE
            self._page[0] = _MAGIC

    @property
    def position(self) -> Position:
        """The last message that was done with."""
        at = 2 + 2 * (self._page[_ACTIVE] & 1)
        return Position(self._page[at], self._page[at + 1])

    def mark(self, position: Position) -> None:
        """`position` is done with. Written beside the valid slot, then made valid by one store."""
        spare = 1 - (self._page[_ACTIVE] & 1)
        self._page[2 + 2 * spare], self._page[3 + 2 * spare] = position
        self._page[_ACTIVE] = spare

    def slot(self) -> tuple[memoryview, int] | None:
        """For a run of messages whose index is 0: where one store of the origin marks a message. None when `mark` is needed."""
        at = 2 + 2 * (self._page[_ACTIVE] & 1)
        return (self._page, at) if self._page[at + 1] == 0 else None

    def close(self) -> None:
        """Unmap."""
        self._page.release()
        self._view.release()
        self._map.close()
