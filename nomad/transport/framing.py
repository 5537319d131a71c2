"""Frames as bytes of a stream, and back: pure, no I/O, no asyncio.

    frame   = prefix, lengths, head, parts
    prefix  = u32 length of the head, u32 number of parts      (little endian)
    lengths = one u64 per part

An `END` in place of a prefix says that no more frames come: for streams that can't be closed in one direction only.

`encode` is called by writers of stream transports, `Splitter` by their readers. A splitter is made
for `asyncio.BufferedProtocol`: it says where the next bytes shall go, so that the kernel copies a
large payload straight to the buffer that is delivered. Sizes are checked before anything is
allocated for them; this module must never trust a length from the wire.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from enum import Enum, auto
from typing import NoReturn

from nomad.errors import FrameTooLarge
from nomad.transport.base import MAX_FRAME_BYTES, MAX_PARTS, Buffer, Frame
from nomad.transport.pool import Pool, fresh

PREFIX = struct.Struct("<II")
END = PREFIX.pack(0, 0xFFFFFFFF)
IN_PLACE_BYTES = 1 << 16
"""A head or part from this size on is received into a buffer of its own."""
JOIN_BYTES = 1 << 14
"""Neighbouring buffers below this size are joined for writing."""
FIRST_BYTES = 1 << 12
"""Reused buffer of a splitter for all that is small; a master has thousands of connections where little is said."""
SCRATCH_BYTES = 1 << 18
"""What that grows to, in steps of `GROWTH`, where it was too small."""
GROWTH = 8
QUIET_READS = 16
"""So many reads in a row that a smaller buffer would have done for, and it is that again: a burst is soon over."""
FRAME_OVERHEAD = 128
"""What a waiting frame counts for beyond its bytes, so that empty ones are bounded too."""
_LOOK_AHEAD = 16
"""Buffers of a frame that are searched for the next large one."""
_DISCARDED = memoryview(bytearray(SCRATCH_BYTES))
"""Where goes what nobody wants."""
_TAIL_BYTES = 4096
"""The most that a large payload's buffer has room for what follows it."""
_FEW = 9
"""A frame of less parts than this takes the fast ways."""
_HEADERS = [struct.Struct(f"<II{parts}Q") for parts in range(_FEW)]
_SIZES = [struct.Struct(f"<{parts}Q") for parts in range(_FEW)]


def flat(buffer: Buffer) -> Buffer:
    """`buffer` such that its `len` is its size in bytes; raises `TypeError` when it isn't C-contiguous."""
    if not isinstance(buffer, memoryview) or (buffer.ndim == 1 and buffer.format == "B" and buffer.c_contiguous):
        return buffer
    return buffer.cast("B") if buffer.nbytes else b""


def check(frame: Frame, max_bytes: int = MAX_FRAME_BYTES) -> Sequence[Buffer]:
    """The buffers of `frame`, flat; raises `FrameTooLarge` above a limit, `ValueError` when it is empty."""
    buffers: Sequence[Buffer] = frame
    for buffer in frame:
        if type(buffer) is not bytes:
            buffers = [flat(buffer) for buffer in frame]
            break
    if not buffers:
        raise ValueError("a frame needs at least a head")
    size = sum(map(len, buffers))
    if size > max_bytes:
        raise FrameTooLarge(f"a frame of {size} bytes; the limit is {max_bytes}")
    if len(buffers) - 1 > MAX_PARTS:
        raise FrameTooLarge(f"a frame of {len(buffers) - 1} parts; the limit is {MAX_PARTS}")
    return buffers


def cost_of(frames: Iterable[Frame]) -> int:
    """What waiting frames count for."""
    return sum(FRAME_OVERHEAD + sum(map(len, frame)) for frame in frames)


def encode(frames: Iterable[Frame], max_bytes: int = MAX_FRAME_BYTES) -> list[Buffer]:
    """`frames` as buffers to write one after another: small ones joined, large ones as they are.

    Raises what `check` raises, before anything can be sent.
    """
    out: list[Buffer] = []
    small: list[Buffer] = []
    quick = min(JOIN_BYTES, max_bytes)
    for frame in frames:
        if len(frame) == 1 and type(frame[0]) is bytes and len(frame[0]) < quick:  # the common case at speed
            small.append(PREFIX.pack(len(frame[0]), 0))
            small.append(frame[0])
            continue
        buffers = check(frame, max_bytes)
        sizes = list(map(len, buffers))
        small.append(_header(sizes))
        if max(sizes) < JOIN_BYTES:
            small += buffers
            continue
        for buffer in buffers:
            if len(buffer) < JOIN_BYTES:
                small.append(buffer)
            else:
                if small:
                    out.append(b"".join(small))
                    small = []
                out.append(buffer)
    if small:
        out.append(b"".join(small))
    return out


def _header(sizes: list[int]) -> bytes:
    """Prefix and lengths of a frame of buffers of these sizes."""
    parts = len(sizes) - 1
    layout = _HEADERS[parts] if parts < _FEW else struct.Struct(f"<II{parts}Q")
    return layout.pack(sizes[0], parts, *sizes[1:])


class Ended(Exception):
    """The stream said that no more frames come."""


class _Stage(Enum):
    """What the next piece of the stream is."""

    PREFIX = auto()
    LENGTHS = auto()
    BUFFERS = auto()


class Splitter:
    """Splits a stream into frames: fill `get_buffer()`, then tell `buffer_updated(n)`.

    Small buffers come out as exact-size `bytes`, large ones as read-only `memoryview`s of memory
    that nobody else uses. Nothing is allocated for a frame over the limit.
    """

    def __init__(self, max_bytes: int = MAX_FRAME_BYTES) -> None:
        self.max_bytes = max_bytes
        """All buffers of one frame together; may be changed at any time, and counts for frames that begin then."""
        self._refused: tuple[float, str] | None = None
        """What the frame that was refused would need as limit, and why it was."""
        self._pool: Pool | None = None  # where nothing large has come there is none
        self._scratch = fresh(FIRST_BYTES)
        self.clear: memoryview | None = self._scratch
        """Where the next bytes go, if a frame begins with them and it is probably small."""
        self._stage = _Stage.PREFIX
        self._want = PREFIX.size  # bytes of the piece that comes next
        self._end = 0  # bytes of it in scratch
        self._quiet = 0  # reads in a row for which scratch was larger than it has to be
        self._target: memoryview | None = None  # where it goes instead, when it is large
        self._filled = 0
        self._head_size = 0
        self._sizes: list[int] = []  # of the buffers after the next one, last one first
        self._buffers: list[Buffer] = []  # of the frame in the making
        # Bytes from the start of a frame to its first large payload: of this frame, once its sizes are
        # known, else of the last one, which it probably resembles; 0 if there is none. Reading stops
        # there, so that the payload doesn't begin in scratch and need a copy.
        self._lead = 0

    def discard(self) -> None:
        """Nothing of what comes is wanted any more: `get_buffer` gives what will never be read."""
        self._scratch, self._target, self._end, self._lead = _DISCARDED, None, 0, 0
        self.clear = None
        self._pool, self._buffers = None, []

    @property
    def partial(self) -> bool:
        """Whether the stream stands in the middle of a frame."""
        return self._stage is not _Stage.PREFIX or self._end > 0

    @property
    def coming(self) -> int:
        """Bytes of all buffers of the frame in the making; 0 while that isn't known."""
        if self._stage is not _Stage.BUFFERS:
            return 0
        return self._want + sum(self._sizes) + sum(map(len, self._buffers))

    def get_buffer(self, sizehint: int = -1) -> memoryview:
        """Where the next bytes of the stream go, never empty; as `asyncio.BufferedProtocol` has it."""
        if self.clear is not None:
            return self.clear
        if self._target is not None:
            return self._target[self._filled :]
        if self._lead:
            return self._scratch[self._end : max(self._want, self._until_large())]
        return self._scratch[self._end :]

    def buffer_updated(self, count: int, frames: list[Frame]) -> None:
        """Take the `count` bytes that were put in the buffer, and append to `frames` those that they complete.

        Raises, after appending the frames before it, `FrameTooLarge` when the stream announces one over a limit, and
        `Ended` when it says that no more come. After the first, 0 bytes more give that frame if the limit allows it by
        then, and raise again if not.
        """
        if self._refused is not None:
            self._reconsider()
        scratch, start, end = self._scratch, 0, self._end
        target = self._target
        if target is None:
            end += count
        else:
            self._filled += count
            end = self._filled - self._want
            if end < 0:
                return
            self._target = None
            if end:
                scratch[:end] = target[self._want : self._filled]
        try:
            if target is not None:
                self._advance(target[: self._want].toreadonly(), frames)
            while True:
                if self._stage is _Stage.PREFIX:
                    start = self._split(start, end, frames)
                want = self._want
                if end - start >= want:
                    piece = scratch[start : start + want].tobytes()
                    start += want
                    self._advance(piece, frames)
                    continue
                if want >= IN_PLACE_BYTES:
                    # With room for what comes before the next payload, which saves a read for it alone.
                    tail = min(_TAIL_BYTES, self._small_ahead()) if self._stage is _Stage.BUFFERS else 0
                    self._pool = self._pool or Pool()
                    self._target = self._pool.take(want + tail)
                    self._filled = end - start
                    self._target[: self._filled] = scratch[start:end]
                    start = end
                break
        finally:
            self._end = end - start
            size = len(scratch)
            if size < SCRATCH_BYTES and self._refused is None and (end == size or self._want > size):
                self._scratch = fresh(size * GROWTH if self._want <= size * GROWTH else SCRATCH_BYTES)
                self._scratch[: self._end] = scratch[start:end]
            else:
                if start and self._end:
                    scratch[: self._end] = scratch[start:end]
                if size > FIRST_BYTES:
                    self._quiet = 0 if target is not None or end * GROWTH > size else self._quiet + 1
                    if self._quiet >= QUIET_READS and self._want <= size // GROWTH:
                        self._quiet = 0
                        self._scratch = fresh(size // GROWTH)
                        self._scratch[: self._end] = scratch[: self._end]
            begins = self._stage is _Stage.PREFIX and not self._end and not self._lead
            self.clear = self._scratch if begins and len(self._scratch) == FIRST_BYTES else None

    def _split(self, start: int, end: int, frames: list[Frame]) -> int:
        """Split what lies in scratch from `start` to `end` into frames: where the first begins that this can't.

        The quick way for frames of few parts; the way through `_advance` gives the same, piece by piece.
        """
        scratch = self._scratch
        while end - start >= PREFIX.size:
            size, parts = PREFIX.unpack_from(scratch, start)
            at = start + PREFIX.size
            if not parts:
                stop = at + size
                if stop <= end and size <= self.max_bytes:
                    frames.append((scratch[at:stop].tobytes(),))
                    self._lead = 0
                    start = stop
                    continue
                sizes = (size,)
            elif parts < _FEW and end - at >= 8 * parts:
                sizes = (size, *_SIZES[parts].unpack_from(scratch, at))
                at += 8 * parts
            else:
                break
            if not self._fits(sizes):
                break
            buffers: list[Buffer] = []
            for index, size in enumerate(sizes):
                stop = at + size
                if stop > end:
                    self._stage, self._want, self._sizes = _Stage.BUFFERS, size, list(sizes[:index:-1])
                    self._buffers = buffers
                    return at
                buffers.append(scratch[at:stop].tobytes())
                at = stop
            frames.append(tuple(buffers))
            self._lead = 0
            start = at
        return start

    def _advance(self, piece: bytes | memoryview, frames: list[Frame]) -> None:
        """Take the piece that was wanted and find what is wanted next."""
        if self._stage is _Stage.BUFFERS:
            self._buffers.append(piece)
        elif self._stage is _Stage.PREFIX:
            if piece == END:
                raise Ended
            self._head_size, parts = PREFIX.unpack(piece)
            self._stage, self._want = _Stage.LENGTHS, 8 * parts
            if parts > MAX_PARTS:
                self._refuse(math.inf, f"{parts} parts; the limit is {MAX_PARTS}")
            if self._want > self.max_bytes:
                self._refuse(self._want, f"{parts} parts; {self.max_bytes} bytes are the limit")
            return
        else:
            sizes = (self._head_size, *struct.unpack(f"<{len(piece) // 8}Q", piece))
            self._stage, self._sizes = _Stage.BUFFERS, list(reversed(sizes))
            self._want = self._sizes.pop()
            if not self._fits(sizes):
                self._refuse(sum(sizes), f"{sum(sizes)} bytes; the limit is {self.max_bytes}")
            return
        if self._sizes:
            self._want = self._sizes.pop()
        else:
            frames.append(tuple(self._buffers))
            self._buffers = []
            self._stage, self._want = _Stage.PREFIX, PREFIX.size

    def _refuse(self, needs: float, what: str) -> NoReturn:
        """All is such that reading could go on nonetheless. `needs`: the least limit that would allow it."""
        self._refused = needs, what
        raise FrameTooLarge(f"the peer announced a frame of {what}")

    def _reconsider(self) -> None:
        assert self._refused is not None
        needs, what = self._refused
        if needs > self.max_bytes:
            self._refuse(needs, what)
        self._refused = None

    def _fits(self, sizes: Sequence[int]) -> bool:
        """Whether a frame of buffers of these sizes is allowed; if so, remembers where its first large one begins."""
        total = sum(sizes)
        if total > self.max_bytes:
            return False
        self._lead = 0
        if total >= IN_PLACE_BYTES:
            lead = PREFIX.size + 8 * (len(sizes) - 1)
            for size in sizes[:_LOOK_AHEAD]:
                if size >= IN_PLACE_BYTES:
                    self._lead = lead
                    break
                lead += size
        return True

    def _until_large(self) -> int:
        """Bytes from the start of scratch to where a large payload is expected, or all of scratch."""
        if self._stage is _Stage.PREFIX:
            return self._lead
        if self._stage is _Stage.LENGTHS:
            return self._lead - PREFIX.size
        return min(SCRATCH_BYTES, self._want + self._small_ahead())

    def _small_ahead(self) -> int:
        """Bytes that are expected between the wanted buffer and the next large one."""
        ahead = 0
        for size in self._sizes[: -_LOOK_AHEAD - 1 : -1]:
            if size >= IN_PLACE_BYTES:
                return ahead
            ahead += size
        return SCRATCH_BYTES if self._sizes[_LOOK_AHEAD:] else ahead + self._lead
