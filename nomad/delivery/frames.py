"""The words of an open data link, and their bytes. Pure; used by `sender` and `receiver`.

docs/delivery.md gives the wire format. All integers are little-endian. A frame is a sequence of buffers as the
transport seam has it: the head starts with one byte of kind; large parts of a DATA frame follow it out of band.

A *position* says where a message comes from: `origin` is the number of the source's message that it descends
from (1, 2, …), `ordinal` counts the messages on this link that descend from the same one (0, 1, …). Positions
are what makes a message recognisable after a restart; `NOWHERE` is before the first.
"""

from __future__ import annotations

import struct
import sys
from array import array
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from nomad.errors import ProtocolError
from nomad.transport.base import Buffer, Frame

DATA, ACK, PING, PONG, RESUME = 1, 2, 3, 4, 5

_SPARSE = 1
"""A DATA frame lists how the origins of its messages advance; without it they are consecutive."""
_BODY_PART = 2
"""The body of a DATA frame is its first part and not in the head."""

_DATA_HEAD = struct.Struct("<BBHIQQQQQ")
_ACK = struct.Struct("<BQQQQd")
_RESUME = struct.Struct("<BQQQ")

INLINE_BODY = 16 * 1024
"""Bodies up to this size share the head's buffer."""


class Position(NamedTuple):
    """Where a message comes from; ordered as the messages of a link are."""

    origin: int
    ordinal: int


NOWHERE = Position(0, 0)


class Data:
    """A batch of messages. Made for every batch that is sent or received: slots, and everything worked out once."""

    __slots__ = (
        "advances",
        "birth",
        "body",
        "buffers",
        "complete",
        "count",
        "first",
        "last",
        "nbytes",
        "seq",
    )

    def __init__(
        self,
        seq: int,
        count: int,
        first: Position,
        advances: array[int] | None,
        complete: int,
        birth: int,
        body: Buffer,
        buffers: list[Buffer],
    ):
        self.seq = seq
        """Messages that this sender numbered before this batch."""
        self.count = count
        self.first = first
        self.advances = advances
        """By how much the origin grows from message to message (the first entry is 0); None: by 1 each, ordinal 0."""
        self.complete = complete
        """All messages that descend from origins up to this one are in this batch or an earlier one."""
        self.birth = birth
        """When the source emitted what this descends from: nanoseconds since the epoch, of the first message."""
        self.body = body
        self.buffers = buffers
        self.last = first if count <= 1 else self._last()
        """Position of the last message. For an empty batch `first`."""
        self.nbytes = len(body) + sum(map(len, buffers)) if buffers else len(body)
        """What credits count: the bytes of the values."""

    def positions(self) -> list[Position]:
        """Position of each message."""
        if self.advances is None:
            origin = self.first.origin
            head = [self.first] if self.count else []
            return head + [Position(origin + k, 0) for k in range(1, self.count)]
        origin, ordinal = self.first
        positions = []
        for k, step in enumerate(self.advances):
            if k:
                origin, ordinal = (origin + step, 0) if step else (origin, ordinal + 1)
            positions.append(Position(origin, ordinal))
        return positions

    def pack(self) -> Frame:
        """The frame."""
        flags = 0
        extra = b""
        if self.advances is not None:
            flags |= _SPARSE
            extra = _little(self.advances).tobytes()
        inline = len(self.body) <= INLINE_BODY
        if not inline:
            flags |= _BODY_PART
        head = _DATA_HEAD.pack(
            DATA, flags, 0, self.count, self.seq, self.first.origin, self.first.ordinal, self.complete, self.birth
        )
        if inline:
            return (b"".join((head, extra, self.body)), *self.buffers)
        return (head + extra, self.body, *self.buffers)

    def _last(self) -> Position:
        if self.advances is None:
            return Position(self.first.origin + self.count - 1, 0)
        return self.positions()[-1]


@dataclass(slots=True)
class Ack:
    """What the receiver is done with, and how far the sender may go. Cumulative and absolute: repeating or losing one does no harm."""

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
    complete: int
    """Nothing that the receiver lacks descends from origins up to this one."""

    def pack(self) -> Frame:
        return (_RESUME.pack(RESUME, self.seq, self.nbytes, self.complete),)


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
    if not head:
        raise ProtocolError("an empty frame")
    kind = head[0]
    try:
        if kind == DATA:
            return _unpack_data(frame, head)
        if kind == ACK:
            _, settled, messages, nbytes, echo, held = _ACK.unpack(head)
            return Ack(settled, messages, nbytes, echo, held)
        if kind == RESUME:
            _, seq, nbytes, complete = _RESUME.unpack(head)
            return Resume(seq, nbytes, complete)
    except struct.error as exc:
        raise ProtocolError(f"a frame of kind {kind} has {len(head)} bytes") from exc
    if kind == PING:
        return Ping()
    if kind == PONG:
        return Pong()
    raise ProtocolError(f"unknown frame kind {kind}")


def _unpack_data(frame: Frame, head: Buffer) -> Data:
    _, flags, _, count, seq, origin, index, complete, birth = _DATA_HEAD.unpack_from(head)
    at = _DATA_HEAD.size
    advances = None
    if flags & _SPARSE:
        advances = array("I")
        end = at + 4 * count
        if len(head) < end:
            raise ProtocolError("a data frame is cut short")
        advances.frombytes(head[at:end])
        advances = _little(advances)
        at = end
    if flags & _BODY_PART:
        if len(frame) < 2:
            raise ProtocolError("a data frame without its body")
        return Data(seq, count, Position(origin, index), advances, complete, birth, frame[1], list(frame[2:]))
    return Data(seq, count, Position(origin, index), advances, complete, birth, head[at:], list(frame[1:]))


def _little(values: array[int]) -> array[int]:
    if sys.byteorder == "big":
        values = values[:]
        values.byteswap()
    return values
