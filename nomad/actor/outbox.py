"""What an operator sends: encodes results into batches, keeps them on every outgoing link, says how much room is left.

Every successor gets a full copy; the encoded bytes are shared between the links.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nomad.delivery.codec import Codec
from nomad.delivery.driver import OutLink
from nomad.delivery.frames import Places
from nomad.errors import PayloadError

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
        self.numbered = 0
        """Messages sent, on every link the same."""
        self._codec = codec
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
        return unsendable

    @property
    def settled(self) -> int:
        """So many of the messages sent are acknowledged by all that got them."""
        settled = self.numbered
        for link in self.links:
            if link.sender.settled < settled:
                settled = link.sender.settled
        return settled

    @property
    def greeted(self) -> bool:
        """Whether every link's receiver has been heard once, so that it is known where to go on."""
        return all(link.sender.greeted for link in self.links)

    def _emit(self, values: list[Any], places: Places, birth: int, offset: int) -> list[Unsendable]:
        unsendable: list[Unsendable] = []
        try:
            body, buffers = self._codec.encode(values)
        except PayloadError:
            good, unsendable = self._sendable(values, offset)
            if not good:
                return unsendable
            places = places.pick(good)
            body, buffers = self._codec.encode([values[k] for k in good])
        count = len(places.origins)
        size = len(body) + sum(map(len, buffers)) if buffers else len(body)
        each = size / count
        if self.output_bytes is not None:
            each = self.output_bytes + 0.2 * (each - self.output_bytes)
        self.output_bytes = each
        self._most = max(1, min(BATCH_MESSAGES, int(BATCH_BYTES / each)))
        self.numbered += count
        if self._copy:
            buffers = [bytes(b) for b in buffers]
        for link in self.links:
            link.sender.submit(body, buffers, places, birth)
        return unsendable

    def _sendable(self, values: list[Any], offset: int) -> tuple[list[int], list[Unsendable]]:
        good: list[int] = []
        unsendable = []
        for number, value in enumerate(values):
            try:
                self._codec.encode([value])
            except PayloadError as exc:
                unsendable.append(Unsendable(offset + number, exc))
            else:
                good.append(number)
        return good, unsendable
