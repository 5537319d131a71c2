"""Messages of a batch, decoded, that are worked off together. Pure; used by the actors."""

from __future__ import annotations

from typing import Any

from nomad.delivery.frames import Places

SOURCE_BITS = 44
"""A source counts from `epoch << SOURCE_BITS`: a new instance goes on above all that an earlier one sent.

That is half a year at a million messages a second, and half a million instances in the 63 bits that SQLite has.
"""


class Chunk:
    """Some consecutive messages of one batch: the unit that is handed to the function."""

    __slots__ = ("birth", "places", "values")

    def __init__(self, values: list[Any], places: Places, birth: int):
        self.values = values
        self.places = places
        """Where each value comes from."""
        self.birth = birth

    def cut(self, start: int, stop: int) -> Chunk:
        """Those from number `start` to before `stop`."""
        return Chunk(self.values[start:stop], self.places.cut(start, stop), self.birth)
