"""The states of a data link, as a table. `sender` and `receiver` share it; docs/delivery.md shows it.

This file knows nothing of which side it is on, nor of frames or time. All transitions are here; one that
isn't in the table raises `ProtocolError` with the recent history.
"""

from __future__ import annotations

from collections import deque
from enum import StrEnum

from nomad.errors import ProtocolError


class State(StrEnum):
    """Where a link is in its life."""

    NEW = "new"
    """Never connected."""
    HELLO = "hello"
    """A connection stands; the handshake is under way."""
    OPEN = "open"
    """Messages flow."""
    LOST = "lost"
    """The connection is gone; buffers are kept."""
    CLOSED = "closed"
    """The end."""


class Event(StrEnum):
    """What happens to a link."""

    CONNECTED = "connected"
    AGREED = "agreed"
    """The handshake succeeded."""
    DISCONNECTED = "disconnected"
    CLOSE = "close"


TABLE: dict[tuple[State, Event], State] = {
    (State.NEW, Event.CONNECTED): State.HELLO,
    (State.HELLO, Event.AGREED): State.OPEN,
    (State.HELLO, Event.DISCONNECTED): State.LOST,
    (State.OPEN, Event.DISCONNECTED): State.LOST,
    (State.LOST, Event.CONNECTED): State.HELLO,
    # A newer connection of the same peer replaces one that isn't known to be broken yet.
    (State.HELLO, Event.CONNECTED): State.HELLO,
    (State.OPEN, Event.CONNECTED): State.HELLO,
    **{(state, Event.CLOSE): State.CLOSED for state in State},
}


class Machine:
    """The state of one link and how it got there."""

    def __init__(self, link: str):
        self.link = link
        self.state = State.NEW
        self._history: deque[str] = deque(maxlen=16)

    def fire(self, event: Event) -> State:
        """Apply `event`. Raises `ProtocolError` when the table doesn't allow it."""
        following = TABLE.get((self.state, event))
        if following is None:
            story = " ".join(self._history)
            raise ProtocolError(f"link {self.link}: {event} is not allowed in state {self.state} (history: {story})")
        self._history.append(f"{self.state}-[{event}]->{following}")
        self.state = following
        return following
