"""How far an operator has come in a batch of its input. Pure; used by the actors."""

from __future__ import annotations

from typing import Any

from nomad.delivery.frames import Data, Places, Position

SOURCE_BITS = 40
"""A source counts its messages from `epoch << SOURCE_BITS`: a new instance goes on above all that an earlier one sent."""


class Chunk:
    """Some consecutive messages of one batch, decoded: the unit that is handed to the function."""

    __slots__ = ("birth", "places", "values")

    def __init__(self, values: list[Any], places: Places, birth: int):
        self.values = values
        self.places = places
        """Where each value comes from."""
        self.birth = birth


class Batches:
    """A decoded batch that is worked off in chunks."""

    def __init__(self, data: Data, skip: int, values: list[Any]):
        self._values = values
        self._at = skip
        self._birth = data.birth
        self._places = data.places

    def __bool__(self) -> bool:
        return self._at < len(self._values)

    @property
    def lane(self) -> int:
        """Lane of its messages."""
        return self._places.lane

    @property
    def left(self) -> int:
        """Messages not taken yet."""
        return len(self._values) - self._at

    @property
    def position(self) -> Position:
        """Position of the next message."""
        return self._places[self._at]

    def take(self, count: int) -> Chunk:
        """The next `count` messages, or what is left."""
        start, stop = self._at, min(self._at + count, len(self._values))
        self._at = stop
        if start == 0 and stop == len(self._values):
            return Chunk(self._values, self._places, self._birth)
        return Chunk(self._values[start:stop], self._places.cut(start, stop), self._birth)
