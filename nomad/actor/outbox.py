"""What an operator sends: encodes results into batches, keeps them on every outgoing link, says how much room is left.

Every successor gets a full copy; the encoded bytes are shared between the links.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nomad.clock import Clock
from nomad.delivery.codec import OUT_OF_BAND, Codec
from nomad.delivery.frames import INLINE_BODY, Places
from nomad.delivery.outlink import OutLink
from nomad.errors import PayloadError, TransportError
from nomad.transport.base import MAX_FRAME_BYTES, MAX_PARTS

BATCH_MESSAGES = 4096
BATCH_BYTES = 1 << 20
"""What goes into one batch: enough to make its cost per message vanish, little enough to flow."""

LARGE_BATCH = 2 * BATCH_BYTES
"""A batch that turns out to be larger is split."""

LARGEST = MAX_FRAME_BYTES - 4096
"""Bytes of one message: a frame with one must not exceed what a transport takes."""


@dataclass(frozen=True, slots=True)
class Unsendable:
    """A result that can't be sent."""

    number: int
    """Which of the results it was."""
    error: PayloadError


def sent(values: list[Any], unsendable: Sequence[Unsendable]) -> list[Any]:
    """Those of `values` that could be sent."""
    if not unsendable:
        return values
    bad = {result.number for result in unsendable}
    return [value for number, value in enumerate(values) if number not in bad]


class Outbox:
    """All outgoing links of one operator. Without any it takes everything: the last operator's results go nowhere."""

    def __init__(self, links: list[OutLink], codec: Codec, clock: Clock, *, copy: bool = False):
        self.links = links
        self.output_bytes: float | None = None
        """Smoothed encoded bytes per message."""
        self.sent_bytes = 0
        """Encoded bytes of all messages."""
        self.numbered = 0
        """Messages sent, on every link the same."""
        self.spare = 0 if links else BATCH_MESSAGES
        """`room` when something was emitted last, worked out once that had gone: by now it is as much or more."""
        self.lock = threading.RLock()
        """Held by who emits, where that may be a source's thread, too; the links' as well."""
        for link in links:
            link.lock = self.lock
        self._codec = codec
        self._clock = clock
        self._copy = copy
        self._most = BATCH_MESSAGES
        """Messages of one batch, as large as they are."""

    @property
    def room(self) -> int:
        """Messages that may be emitted now."""
        room = BATCH_MESSAGES
        for link in self.links:
            messages = link.sender.room_for(self.output_bytes)
            if messages < room:
                room = messages
        return room

    def emit(self, values: list[Any], places: Places, birth: int) -> list[Unsendable]:
        """Send results that come from `places`, behind all that was sent before; returns those that can't be sent."""
        step = self._most
        if len(values) <= step:
            unsendable = self._emit(values, places, birth, 0)
        else:
            unsendable = []
            for start in range(0, len(values), step):
                unsendable += self._emit(values[start : start + step], places.cut(start, start + step), birth, start)
        for link in self.links:
            link.flush()
        self.spare = self.room
        return unsendable

    def emit_one(self, value: Any, lane: int, origin: int, birth: int, *, threaded: bool = False) -> bool:
        """Send one small result, of a place without a path, if that can be done at once.

        False if not: nothing was sent, and `emit` does it. `threaded`: in another thread than the loop's. All that
        needn't be asked for one message on a quiet link is left out: each further function costs some microseconds
        when the caches are cold.
        """
        each, pack = self.output_bytes, self._codec.pack
        if each is None or each > INLINE_BODY or pack is None or len(self.links) != 1:
            return False
        if type(value) is bytes and len(value) >= OUT_OF_BAND:
            return False
        try:
            body = pack([value])
        except Exception:  # noqa: BLE001 - it isn't plain data
            return False
        link = self.links[0]
        way = link.direct if threaded else link.ready
        if way is None or not way.writable:
            return False
        taken = link.sender.send_one(body, lane, origin, birth, self._clock.now())
        if taken is None:
            return False
        try:
            way.write(taken)
        except TransportError:
            pass  # whoever reads from this connection sees the same and acts on it
        self.output_bytes = each = each + 0.2 * (len(body) - each)
        self._most = min(BATCH_MESSAGES, int(BATCH_BYTES / each))
        self.numbered += 1
        self.sent_bytes += len(body)
        self.spare = 1
        return True

    @property
    def settled(self) -> int:
        """So many of the messages sent are acknowledged by all that got them."""
        settled = self.numbered
        for link in self.links:
            if link.sender.settled < settled:
                settled = link.sender.settled
        return settled

    def release(self, *, caught_up: bool = False) -> None:
        """The links may be taken over from an earlier instance; see `Sender.release`."""
        with self.lock:
            for link in self.links:
                link.sender.release(caught_up=caught_up)
                link.flush()

    @property
    def greeted(self) -> bool:
        """Whether every link's receiver has been heard once, so that it is known where to go on."""
        return all(link.sender.greeted for link in self.links)

    def _emit(self, values: list[Any], places: Places, birth: int, offset: int) -> list[Unsendable]:
        count = len(values)
        try:
            body, buffers = self._codec.encode(values)
        except PayloadError as exc:
            return self._emit_halves(values, places, birth, offset) if count > 1 else [Unsendable(offset, exc)]
        size = len(body) + sum(map(len, buffers)) if buffers else len(body)
        if size > LARGE_BATCH:
            if count > 1:  # these values are much larger than the last ones were
                return self._emit_halves(values, places, birth, offset)
            if size > LARGEST or len(buffers) > MAX_PARTS:
                error = PayloadError(
                    f"a message of {size >> 20} MiB in {len(buffers)} large buffers can't be sent: the most is "
                    f"{LARGEST >> 20} MiB in {MAX_PARTS}"
                )
                return [Unsendable(offset, error)]
        each = size / count
        if self.output_bytes is not None:
            each = self.output_bytes + 0.2 * (each - self.output_bytes)
        self.output_bytes = each
        self._most = max(1, min(BATCH_MESSAGES, int(BATCH_BYTES / each)))
        self.numbered += count
        self.sent_bytes += size
        if self._copy:
            buffers = [bytes(b) for b in buffers]
        for link in self.links:
            link.sender.submit(body, buffers, places, birth)
        return []

    def _emit_halves(self, values: list[Any], places: Places, birth: int, offset: int) -> list[Unsendable]:
        half, count = len(values) // 2, len(values)
        first = self._emit(values[:half], places.cut(0, half), birth, offset)
        return first + self._emit(values[half:], places.cut(half, count), birth, offset + half)
