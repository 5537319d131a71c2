"""Buffers for large payloads that are received in place.

Used by `nomad.transport.framing`. The pages of a fresh buffer cost several times what the copy into it
does, so buffers are used again. Nobody returns them: a bytearray can't change its size while a view of
it lives, which tells whether it is in use.
"""

from __future__ import annotations

import mmap
from collections import deque

POOL_BYTES = 24 << 20
"""The most that a pool keeps: what a link's window and a connection's receive limit let live at once."""
SPARE_BYTES = 8 << 20
"""The most that a pool keeps unused, for a burst."""
LAZY_BYTES = 8 << 20
"""A buffer over this size gets its memory as it is filled, lest a peer takes it by announcing a payload."""
PAGE_OFFSET = 64
"""Copies are several times slower on common processors when destination and source differ by 8 to
16 modulo the page size, which is what a large allocation against a page of the kernel gives."""


def fresh(size: int) -> memoryview:
    """A writable buffer of `size` bytes, at a good offset within its page."""
    return memoryview(bytearray(PAGE_OFFSET + size))[PAGE_OFFSET:]


class Pool:
    """Lends buffers, and lends them again once the last view of them is gone, arrays over it included."""

    def __init__(self, limit: int = POOL_BYTES) -> None:
        """Knows of at most `limit` bytes; what is lent beyond that is its users' alone."""
        self._limit = limit
        self._lent: deque[bytearray] = deque()  # the one that was lent longest ago first
        self._free: deque[bytearray] = deque()  # the one that was used last, and is in the caches, last
        self.kept = 0
        """Bytes of all buffers that it knows of."""
        self._free_bytes = 0

    def take(self, size: int) -> memoryview:
        """A writable buffer of `size` bytes with any content, at a good offset within its page."""
        if size > LAZY_BYTES:
            return memoryview(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        need = PAGE_OFFSET + size
        while self._lent and _unused(self._lent[0]):
            self._free.append(self._lent.popleft())
            self._free_bytes += len(self._free[-1])
        buffer = None
        if self._free:
            buffer = self._free.pop()
            self._free_bytes -= len(buffer)
            if not need <= len(buffer) <= 2 * need:  # what comes now is of another size
                self.kept -= len(buffer)
                buffer = None
        if buffer is None:
            buffer = bytearray(need)
            self.kept += need
        self._lent.append(buffer)
        while self._free and (self._free_bytes > SPARE_BYTES or self.kept > self._limit):
            dropped = self._free.popleft()
            self._free_bytes -= len(dropped)
            self.kept -= len(dropped)
        while self.kept > self._limit:
            self.kept -= len(self._lent.popleft())
        return memoryview(buffer)[PAGE_OFFSET:need]


def _unused(buffer: bytearray) -> bool:
    """Whether no view of `buffer` lives: only then can its size be changed."""
    try:
        buffer.pop()
    except BufferError:
        return False
    buffer.append(0)
    return True
