"""Where an operator stands: the positions of what it takes in, and of what it puts out. Pure; used by the actors.

A message's position (see `nomad.delivery.frames`) descends from its input's: same origin, and an index that
counts what came of that origin on the outgoing link. As long as a function gives the same number of messages
for the same input, an instance that starts anew and is fed the same inputs gives its outputs the same
positions, and the next operator recognises what it has had.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

from nomad.delivery.frames import NOWHERE, Data, Position

SOURCE_BITS = 40
"""A source counts its messages from `epoch << SOURCE_BITS`: a new instance goes on above all that an earlier one sent."""


class Numbering:
    """Positions of what an operator puts out."""

    def __init__(self) -> None:
        self._last = NOWHERE
        self._resume = NOWHERE

    def resume(self, position: Position) -> None:
        """What the next operator has had of an earlier instance; called before the first output."""
        self._resume = max(self._resume, position)

    def enter(self, first: Position) -> None:
        """The next input has this position.

        If it isn't the first of its origin, those before it were settled: an instance that starts anew here
        goes on where the earlier one had come to, instead of counting from 0 and being taken for a double.
        """
        if first.ordinal > 0 and first.origin > self._last.origin and first.origin == self._resume.origin:
            self._last = self._resume

    def place(self, origins: Sequence[int]) -> tuple[Position, array[int] | None]:
        """The first position, and how the origins advance (None: by 1 each), of outputs with these origins.

        `origins` doesn't decrease and isn't empty; a `range` is taken to advance by 1.
        """
        first = self._next(origins[0])
        if type(origins) is range:
            self._last = first if len(origins) == 1 else Position(origins[-1], 0)
            return first, None
        advances = array("I", [0])
        previous, index = first
        for origin in origins[1:]:
            advances.append(origin - previous)
            index = index + 1 if origin == previous else 0
            previous = origin
        self._last = Position(previous, index)
        return first, advances

    def extra(self, count: int) -> tuple[Position, array[int]]:
        """The same for `count` outputs that descend from no present input: messages run again."""
        base = max(self._last, self._resume)
        first = Position(base.origin, base.ordinal + 1)
        self._last = Position(base.origin, base.ordinal + count)
        return first, array("I", bytes(4 * count))

    def _next(self, origin: int) -> Position:
        return Position(origin, self._last.ordinal + 1 if origin == self._last.origin else 0)


class Chunk:
    """Some consecutive messages of one batch, decoded: the unit that is handed to the function."""

    __slots__ = ("values", "origins", "birth", "complete", "_first", "_positions")

    def __init__(self, values: list[Any], positions: list[Position] | range, birth: int, complete: int | None):
        """`positions` are those of the values; a `range` of origins where they advance by 1 and the indices are 0."""
        self.values = values
        self._positions = None if isinstance(positions, range) else positions
        self.origins: Sequence[int] = positions if isinstance(positions, range) else [p.origin for p in positions]
        """Origin of each value."""
        self.birth = birth
        self.complete = complete
        """The batch's `complete` when this is its last chunk, else None."""

    def position(self, k: int) -> Position:
        """Position of value `k`."""
        return Position(self.origins[k], 0) if self._positions is None else self._positions[k]

    def complete_before(self, end: int) -> int:
        """Nothing after value number `end - 1` descends from origins up to this one."""
        if end < len(self.values):
            return self.origins[end] - 1
        return self.origins[-1] - 1 if self.complete is None else self.complete

    def owners(self, kept: Sequence[int]) -> Sequence[int]:
        """Origins of the outputs whose inputs are the values numbered `kept`."""
        if isinstance(kept, range):
            return self.origins[kept.start : kept.stop]
        return [self.origins[k] for k in kept]


class Batches:
    """A decoded batch that is worked off in chunks."""

    def __init__(self, data: Data, skip: int, values: list[Any]):
        self._values = values
        self._at = skip
        self._birth = data.birth
        self._complete = data.complete
        dense = data.advances is None and data.first.ordinal == 0
        self._positions = range(data.first.origin, data.first.origin + data.count) if dense else data.positions()

    def __bool__(self) -> bool:
        return self._at < len(self._values)

    @property
    def left(self) -> int:
        """Messages not taken yet."""
        return len(self._values) - self._at

    @property
    def position(self) -> Position:
        """Position of the next message."""
        position = self._positions[self._at]
        return position if isinstance(position, Position) else Position(position, 0)

    def take(self, count: int) -> Chunk:
        """The next `count` messages, or what is left."""
        start, stop = self._at, min(self._at + count, len(self._values))
        self._at = stop
        complete = self._complete if stop == len(self._values) else None
        if start == 0 and stop == len(self._values):
            return Chunk(self._values, self._positions, self._birth, complete)
        return Chunk(self._values[start:stop], self._positions[start:stop], self._birth, complete)
