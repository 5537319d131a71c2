"""What the connections of all backends share: names, waiting for frames and for room, and the errors of the end.

Base of the connections in `stream`, `messages` and `inproc`, which add how frames travel. Knows nothing of
sockets or of how anything is sent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from nomad.errors import ConnectionBroken, ConnectionClosed, TransportError
from nomad.transport.base import MAX_FRAME_BYTES, Frame, Writer
from nomad.transport.waiting import Waiter


class Endpoint(ABC):
    """This side of a connection; see `nomad.transport.base.Connection` for the public methods."""

    def __init__(self, local: str = "", peer: str = "") -> None:
        self._local = local
        self._peer = peer
        self._received: list[Frame] = []
        """What has arrived and not been taken by `poll`."""
        self._most = MAX_FRAME_BYTES
        """Bytes of a frame that may be received."""
        self._reader = Waiter()
        self._one: Callable[[bytes], bool] | None = None
        """May take a frame that came alone."""
        self._drainer = Waiter()
        self._closed = False
        """By our own wish."""
        self._broken: str | None = None
        """Why it can't be used any more, if by the peer."""
        self._cause: BaseException | None = None

    @property
    def local(self) -> str:
        return self._local

    @property
    def peer(self) -> str:
        return self._peer

    @property
    def closed(self) -> bool:
        return self._closed or self._broken is not None

    @property
    @abstractmethod
    def writable(self) -> bool: ...

    @abstractmethod
    def poll(self) -> list[Frame]: ...

    async def recv(self) -> list[Frame]:
        while not (frames := self.poll()):
            await self._reader.wait()
        return frames

    async def drain(self) -> None:
        while not self.closed and not self.writable:
            await self._drainer.wait()
        if self.closed:
            raise self._error()

    def direct(self) -> Writer | None:
        return None

    def limit(self, max_bytes: int) -> None:
        self._most = max_bytes

    def notify(self, callback: Callable[[], None], one: Callable[[bytes], bool] | None = None) -> None:
        self._reader.callback = callback
        self._one = one

    def _take(self) -> list[Frame]:
        """What was received, for backends whose frames arrive as a whole: up to the first that is over the limit.

        That one and those behind it stay, and the reader is told of them; none taken means that it is the next.
        """
        frames, self._received = self._received, []
        if self._most < MAX_FRAME_BYTES:
            for number, frame in enumerate(frames):
                if sum(map(len, frame)) > self._most:
                    self._received = frames[number:]
                    self._reader.wake()
                    return frames[:number]
        return frames

    def _end(self) -> None:
        """Nothing is received or sent by the user any more, by our own wish."""
        self._closed = True
        self._received = []
        self._wake()

    def _break(self, reason: str, cause: BaseException | None = None) -> None:
        """The peer ended it. What has arrived stays for `recv`."""
        if self._broken is None:
            self._broken, self._cause = reason, cause
            self._wake()

    def _wake(self) -> None:
        self._reader.wake()
        self._drainer.wake()

    def _error(self) -> TransportError:
        """What the methods of a closed connection raise."""
        if self._closed:
            return ConnectionClosed(f"the connection to {self._peer} was closed on this side")
        error = ConnectionBroken(self._broken)
        error.__cause__ = self._cause
        return error
