"""How far the last operator of a pipeline has come, in a file that survives the kill of its process.

A final operator acts on the world, so nobody downstream recognises a double. After each call it notes the position of
the message in a memory-mapped page: a store, not a system call, and the page outlives the process. An instance that
starts anew goes on behind the noted position. What remains is the message whose call was interrupted: nobody can know
whether it took effect, and it is run again. The page is not forced to disk: a power failure can lose the note, a kill
can't.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping

from nomad.delivery.frames import LANES, MOST_PATH, NOWHERE, Position

_MAGIC = 0x324C4E524A_4D4E
_SLOT = 16 + MOST_PATH
_LANE = 256
_WORD = 8


class Journal:
    """A block of 256 bytes for each lane: which of two slots is valid, and the slots.

    A slot is an origin, the length of the path, and the path. The first word of the block after the last lane is a
    magic number.
    """

    def __init__(self, path: str):
        size = (LANES + 1) * _LANE
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, size)
            self._map = mmap.mmap(fd, size)
        finally:
            os.close(fd)
        self._bytes = memoryview(self._map)
        self.words = self._bytes.cast("Q")
        self.slots: dict[int, int] = {}
        """By lane, the number of the word where one store of its origin marks a message whose path is empty.

        Of the lanes that `slot` was asked for since the last `mark`.
        """
        if self.words[LANES * _LANE // _WORD] != _MAGIC:
            self._bytes[:] = bytes(size)
            self.words[LANES * _LANE // _WORD] = _MAGIC

    def positions(self) -> dict[int, Position]:
        """The last message that was done with, of each lane."""
        positions = {}
        for lane in range(LANES):
            at = self._valid(lane)
            length = self.words[at // _WORD + 1]
            position = Position(self.words[at // _WORD], bytes(self._bytes[at + 16 : at + 16 + length]))
            if position > NOWHERE:
                positions[lane] = position
        return positions

    def advance(self, positions: Mapping[int, Position]) -> None:
        """Another instance was done with these; what is noted already and ahead of them stays."""
        known = self.positions()
        for lane, position in positions.items():
            if position > known.get(lane, NOWHERE):
                self.mark(lane, position)

    def mark(self, lane: int, position: Position) -> None:
        """`position` is done with. Written beside the valid slot, then made valid by one store."""
        self.slots.pop(lane, None)
        block = lane * _LANE
        spare = 1 - (self.words[block // _WORD] & 1)
        at = block + _WORD + spare * _SLOT
        origin, path = position
        self._bytes[at + 16 : at + 16 + len(path)] = path
        self.words[at // _WORD], self.words[at // _WORD + 1] = origin, len(path)
        self.words[block // _WORD] = spare

    def slot(self, lane: int) -> tuple[memoryview, int] | None:
        """Where one store of its origin marks a message whose path is empty. None when `mark` is needed."""
        word = self._valid(lane) // _WORD
        if self.words[word + 1]:
            return None
        self.slots[lane] = word
        return self.words, word

    def close(self) -> None:
        """Unmap."""
        self.words.release()
        self._bytes.release()
        self._map.close()

    def _valid(self, lane: int) -> int:
        block = lane * _LANE
        return block + _WORD + (self.words[block // _WORD] & 1) * _SLOT
