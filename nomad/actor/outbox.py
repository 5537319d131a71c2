"""What an operator sends: encodes results into batches, keeps them on every outgoing link, and says how much room there is.

Every successor gets a full copy; the encoded bytes are shared between the links.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nomad.actor.progress import Numbering
from nomad.delivery.codec import Codec
from nomad.delivery.driver import OutLink
from nomad.delivery.frames import Position
from nomad.errors import PayloadError
from nomad.transport.base import Buffer

BATCH_MESSAGES = 4096
BATCH_BYTES = 256 * 1024
"""The most that goes into one batch: enough to make its cost per message vanish, little enough to flow."""


@dataclass(frozen=True, slots=True)
class Unsendable:
    """A result that can't be sent."""

    number: int
    """Which of the results it was."""
    error: PayloadError


class Outbox:
    """All outgoing links of one operator. Without any it takes everything: the last operator's results go nowhere."""

    def __init__(self, links: list[OutLink], codec: Codec, *, copy: bool = False):
        self.links = links
        self.output_bytes: float | None = None
        """Smoothed encoded bytes per message."""
        self.numbering = Numbering()
        self._codec = codec
        self._copy = copy

    @property
    def room(self) -> int:
        """Messages that may be emitted now."""
        room = BATCH_MESSAGES
        for link in self.links:
            messages = link.sender.room_for(self.output_bytes)
            if messages < room:
                room = messages
        return room

    def emit(self, values: list[Any], origins: Sequence[int], birth: int, complete: int) -> list[Unsendable]:
        """Send results that descend from `origins` (one each, not decreasing). Those that can't be sent are returned."""
        step = self._batch_size()
        if len(values) <= step:
            unsendable = self._emit(values, origins, birth, complete, 0)
        else:
            unsendable = []
            for start in range(0, len(values), step):
                part, owners = values[start : start + step], origins[start : start + step]
                last = start + step >= len(values)
                unsendable += self._emit(part, owners, birth, complete if last else owners[-1] - 1, start)
        self.flush()
        return unsendable

    def emit_extra(self, values: list[Any], birth: int) -> list[Unsendable]:
        """Send results of a message that was run again."""
        values, _, unsendable = self._sendable(values, range(len(values)), 0)
        if values:
            body, buffers = self._codec.encode(values)
            first, advances = self.numbering.extra(len(values))
            self._submit(body, buffers, len(values), first, advances, first.origin, birth)
            self.flush()
        return unsendable

    def completed(self, origin: int) -> None:
        """No more results will descend from origins up to this one."""
        for link in self.links:
            link.sender.completed(origin)
        self.flush()

    def settled(self, processed: int) -> int:
        """How far all is acknowledged downstream, when inputs up to `processed` have been worked off."""
        for link in self.links:
            outstanding = link.sender.settled
            if outstanding is not None and outstanding < processed:
                processed = outstanding
        return processed

    @property
    def greeted(self) -> bool:
        """Whether every link's receiver has been heard once, so that it is known where to go on."""
        return all(link.sender.greeted for link in self.links)

    def flush(self) -> None:
        """Hand the connections what they may have."""
        for link in self.links:
            link.flush()

    def _batch_size(self) -> int:
        if not self.output_bytes:
            return BATCH_MESSAGES
        return max(1, min(BATCH_MESSAGES, int(BATCH_BYTES / self.output_bytes)))

    def _emit(
        self, values: list[Any], owners: Sequence[int], birth: int, complete: int, offset: int
    ) -> list[Unsendable]:
        unsendable: list[Unsendable] = []
        try:
            body, buffers = self._codec.encode(values)
        except PayloadError:
            values, owners, unsendable = self._sendable(values, owners, offset)
            if not values:
                return unsendable
            body, buffers = self._codec.encode(values)
        first, advances = self.numbering.place(owners)
        self._submit(body, buffers, len(values), first, advances, complete, birth)
        return unsendable

    def _sendable(
        self, values: list[Any], owners: Sequence[int], offset: int
    ) -> tuple[list[Any], Sequence[int], list[Unsendable]]:
        good: list[int] = []
        unsendable = []
        for number, value in enumerate(values):
            try:
                self._codec.encode([value])
            except PayloadError as exc:
                unsendable.append(Unsendable(offset + number, exc))
            else:
                good.append(number)
        return [values[k] for k in good], [owners[k] for k in good], unsendable

    def _submit(
        self,
        body: bytes,
        buffers: Sequence[Buffer],
        count: int,
        first: Position,
        advances: array[int] | None,
        complete: int,
        birth: int,
    ) -> None:
        size = len(body) + sum(map(len, buffers)) if buffers else len(body)
        each = size / count
        self.output_bytes = each if self.output_bytes is None else self.output_bytes + 0.2 * (each - self.output_bytes)
        if self._copy:
            buffers = [bytes(b) for b in buffers]
        for link in self.links:
            link.sender.submit(body, buffers, count, first, advances, complete, birth)
