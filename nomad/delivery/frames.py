"""The words of an open data link, and their bytes. Pure; used by `sender` and `receiver`.

docs/delivery.md gives the wire format. All integers are little-endian. A frame is a sequence of buffers as the
transport seam has it: the head starts with one byte of kind; large parts of a DATA frame follow it out of band.

A *position* says where a message comes from: `origin` is the number of the source's message that it descends
from (1, 2, …), `path` has a step for each generator on the way: the how-many-eth of its outputs it was. A position
depends on nothing else, so an operator that starts anew gives what it makes of a message the same positions as its
predecessor did, wherever it starts, and whoever has had them recognises them. Positions are ordered as the messages of
a link are; `NOWHERE` is before the first.

Messages that an operator runs again after they were set aside come in between, in a *lane* of their own: lane 0 is
what comes from the source, lane n what operator number n runs again, counted by that operator.
"""

from __future__ import annotations

import bisect
import functools
import struct
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from nomad.errors import ProtocolError
from nomad.transport.base import Buffer, Frame

DATA, ACK, PING, PONG, RESUME = 1, 2, 3, 4, 5

_SPARSE = 1
"""A DATA frame lists how the origins of its messages advance; without it they are consecutive."""
_PATHS = 2
"""A DATA frame lists the paths of its messages; without it they are empty."""
_BODY_PART = 4
"""The body of a DATA frame is its first part and not in the head."""

DATA_HEAD = struct.Struct("<BBHIQQQ")
"""Kind, flags, lane, number of messages, sequence number, first origin, birth."""
PLAIN = 0
"""Flags of a DATA frame whose origins are consecutive, without paths, its body behind its head."""
_ACK = struct.Struct("<BQQQQd")
_RESUME = struct.Struct("<BQQQ")

INLINE_BODY = 16 * 1024
"""Bodies up to this size share the head's buffer."""

MOST_PATH = 96
"""Bytes of a path: a dozen generators one behind another, whatever they yield, and many more that yield little."""

LANES = 256


BATCH_OVERHEAD = 768
"""What a batch weighs beyond its values: about what keeping one costs, so that credits bound small ones too."""


class Position(NamedTuple):
    """Where a message of a lane comes from; ordered as the messages of the lane are."""

    origin: int
    path: bytes = b""


NOWHERE = Position(0)

position = functools.partial(tuple.__new__, Position)
"""`Position` of a pair, without the detour over a function in Python."""


def step(index: int) -> bytes:
    """A step of a path, for a generator's output number `index`: how many bytes follow, and the number, big-endian.

    Paths made of steps are ordered as the outputs are, and none is the beginning of another.
    """
    return _STEPS[index] if index < len(_STEPS) else _step(index)


def _step(index: int) -> bytes:
    size = (index.bit_length() + 7) // 8
    return bytes((size,)) + index.to_bytes(size, "big")


_STEPS = tuple(map(_step, range(1024)))


class Places:
    """Where the messages of a batch come from: their lane, and of each the position. Immutable."""

    __slots__ = ("lane", "origins", "paths")

    def __init__(self, lane: int, origins: Sequence[int], paths: Sequence[bytes] | None = None):
        """`origins` don't decrease; a `range` where they advance by 1. `paths` is None where all are empty."""
        self.lane = lane
        self.origins = origins
        self.paths = paths

    def __len__(self) -> int:
        return len(self.origins)

    def __getitem__(self, k: int) -> Position:
        return position((self.origins[k], b"" if self.paths is None else self.paths[k]))

    def cut(self, start: int, stop: int) -> Places:
        """Those from number `start` to before `stop`."""
        return Places(self.lane, self.origins[start:stop], None if self.paths is None else self.paths[start:stop])

    def pick(self, numbers: Sequence[int]) -> Places:
        """Those with these numbers; one may come several times."""
        if type(numbers) is range:
            return self.cut(numbers.start, numbers.stop)
        paths = None if self.paths is None else [self.paths[k] for k in numbers]
        return Places(self.lane, [self.origins[k] for k in numbers], paths)

    def up_to(self, position: Position) -> int:
        """How many of them are at `position` or before."""
        return 0 if self[0] > position else bisect.bisect_right(self, position)


class Data(NamedTuple):
    """A batch of messages, one at least."""

    seq: int
    """Messages that this sender numbered before this batch."""
    places: Places
    birth: int
    """When the source emitted what this descends from: nanoseconds since the epoch, of the first message."""
    body: Buffer
    buffers: Sequence[Buffer]

    def pack(self) -> Frame:
        """The frame."""
        return pack_data(*self)


_data = functools.partial(tuple.__new__, Data)


def pack_data(seq: int, places: Places, birth: int, body: Buffer, buffers: Sequence[Buffer]) -> Frame:
    """The frame of a batch, see `Data`."""
    origins, paths = places.origins, places.paths
    flags = 0
    extra: tuple[Buffer, ...] = ()
    if type(origins) is not range:
        flags |= _SPARSE
        advances = array("I", [0])
        advances.extend(map(int.__sub__, origins[1:], origins[:-1]))
        extra = (_little(advances).tobytes(),)
    if paths is not None:
        flags |= _PATHS
        extra += (bytes(map(len, paths)), *paths)
    inline = len(body) <= INLINE_BODY
    if not inline:
        flags |= _BODY_PART
    head = DATA_HEAD.pack(DATA, flags, places.lane, len(origins), seq, origins[0], birth)
    if inline:
        return (b"".join((head, *extra, body)), *buffers)
    return (b"".join((head, *extra)), body, *buffers)


@dataclass(slots=True)
class Ack:
    """What the receiver is done with, and how far the sender may go.

    Cumulative and absolute: repeating or losing one does no harm.
    """

    settled: int
    """All that came of messages numbered up to this is acknowledged downstream, or needs no acknowledgement."""
    credit_messages: int
    """The sender may send messages numbered up to this."""
    credit_bytes: int
    """The same in the sender's cumulative bytes."""
    echo: int
    """End number of the newest batch received; lets the sender time the round trip."""
    held: float
    """Seconds between that batch's arrival and this acknowledgement."""

    def pack(self) -> Frame:
        return (_ACK.pack(ACK, self.settled, self.credit_messages, self.credit_bytes, self.echo, self.held),)


@dataclass(slots=True)
class Resume:
    """The sender's first frame on a new connection: the numbers from which it goes on."""

    seq: int
    nbytes: int
    known: int
    """Messages that the sender has numbered by now: the receiver has caught up when it has them."""

    def pack(self) -> Frame:
        return (_RESUME.pack(RESUME, self.seq, self.nbytes, self.known),)


@dataclass(frozen=True, slots=True)
class Ping:
    """Are you there? Sent on a silent link."""

    def pack(self) -> Frame:
        return (bytes((PING,)),)


@dataclass(frozen=True, slots=True)
class Pong:
    """The answer."""

    def pack(self) -> Frame:
        return (bytes((PONG,)),)


AnyFrame: TypeAlias = Data | Ack | Resume | Ping | Pong


def unpack(frame: Frame) -> AnyFrame:
    """The words in a frame. Raises `ProtocolError` when they are none."""
    head = frame[0]
    kind = head[0] if head else None
    try:
        if kind == DATA:
            return unpack_data(frame)
        if kind == ACK:
            _, settled, messages, nbytes, echo, held = _ACK.unpack(head)
            return Ack(settled, messages, nbytes, echo, held)
        if kind == RESUME:
            return Resume(*_RESUME.unpack(head)[1:])
    except struct.error as exc:
        raise ProtocolError(f"a frame of kind {kind} has {len(head)} bytes") from exc
    if kind == PING:
        return Ping()
    if kind == PONG:
        return Pong()
    if kind is None:
        raise ProtocolError("an empty frame")
    raise ProtocolError(f"unknown frame kind {kind}")


def unpack_data(frame: Frame) -> Data:
    """`unpack` of a frame that begins with `DATA`. Raises `ProtocolError` when it makes no sense."""
    head = frame[0]
    if len(head) < DATA_HEAD.size:
        raise ProtocolError(f"a frame of kind {DATA} has {len(head)} bytes")
    _, flags, lane, count, seq, origin, birth = DATA_HEAD.unpack_from(head)
    if not count or lane >= LANES:
        raise ProtocolError(f"a data frame with {count} messages of lane {lane}")
    at = DATA_HEAD.size
    origins: Sequence[int] = range(origin, origin + count)
    paths: list[bytes] | None = None
    if flags & _SPARSE:
        end = at + 4 * count
        origins = _origins(origin, count, bytes(head[at:end]))
        at = end
    if flags & _PATHS:
        end = at + count
        lengths = bytes(head[at:end])
        at = end + sum(lengths)
        if len(lengths) < count or len(head) < at:
            raise ProtocolError("a data frame is cut short")
        paths = _paths(lengths, bytes(head[end:at]))
    places = Places(lane, origins, paths)
    if flags & _BODY_PART:
        if len(frame) < 2:
            raise ProtocolError("a data frame without its body")
        body, buffers = frame[1], frame[2:]
    else:
        body, buffers = head[at:], frame[1:]
    if count > len(body):
        raise ProtocolError(f"a data frame with {count} messages in {len(body)} bytes")
    if origins[-1] >> 64:
        raise ProtocolError(f"a data frame with origin {origins[-1]}")
    return _data((seq, places, birth, body, buffers))


def _origins(first: int, count: int, packed: bytes) -> list[int]:
    if len(packed) < 4 * count:
        raise ProtocolError("a data frame is cut short")
    advances = array("I", packed)
    origins = [first]
    for advance in _little(advances)[1:]:
        first += advance
        origins.append(first)
    return origins


def _paths(lengths: bytes, joined: bytes) -> list[bytes]:
    paths = []
    at = 0
    for length in lengths:
        paths.append(joined[at : at + length])
        at += length
    if max(lengths) > MOST_PATH:
        raise ProtocolError(f"a data frame with a path of {max(lengths)} bytes")
    return paths


def _little(values: array[int]) -> array[int]:
    if sys.byteorder == "big":
        values = values[:]
        values.byteswap()
    return values
