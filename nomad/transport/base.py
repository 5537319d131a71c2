"""The transport seam: frames from here to there, in order, whole or not at all.

A *frame* is a sequence of buffers: a small head and, after it, large parts that travel out of band
(numpy arrays, images). Backends keep the borders between the buffers and never copy a large one in
Python. What every backend would repeat (authentication, reconnecting, acknowledgements, credits,
batching) lives above this seam, in `nomad.delivery`.

Rules, tested by `tests/contract/transport.py` against every backend:

- one reader and one writer per connection; frames arrive in order, each complete, or not at all;
- `write` is synchronous and atomic: it takes all of a frame or raises. It never blocks; whoever
  writes much awaits `drain`, which returns once the backlog is below the high-water mark;
- the caller must not change a buffer that it has written (see docs/delivery.md, "Buffers");
- after the far side closed or broke, `recv` first hands out what had arrived, then raises
  `ConnectionBroken`; `write` and `drain` raise it too. After our own `close` or `abort` they
  raise `ConnectionClosed`;
- cancelling `recv` or `drain` loses nothing and leaves the connection usable;
- `close` flushes what was written, then closes; `abort` drops it and never waits;
- a frame over `MAX_FRAME_BYTES` raises `FrameTooLarge` at the sender; a receiver that is told of
  one, or of one over its own `limit`, breaks the connection before it allocates.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

Buffer: TypeAlias = bytes | bytearray | memoryview
Frame: TypeAlias = Sequence[Buffer]
"""Head first, then the large parts; never empty."""

MAX_FRAME_BYTES = 1 << 30
"""All buffers of one frame together."""

MAX_PARTS = 65_535
"""Buffers of one frame, without the head."""

HIGH_WATER = 1 << 20
"""Bytes of backlog in a connection above which `writable` is False and `drain` waits."""

CLOSE_SECONDS = 3.0
"""How long `close` waits for a peer to take what was written."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What callers above the seam may rely on, instead of asking for a concrete class."""

    cross_host: bool
    """Both ends may be on different machines."""
    cross_process: bool
    """Both ends may be in different processes."""


class Writer(Protocol):
    """A way to write to a connection from another thread than the event loop's."""

    @property
    def writable(self) -> bool:
        """Whether what was written before has gone."""
        ...

    def write(self, frames: list[Frame]) -> None:
        """Send whole frames, behind all that was written to the connection. Never blocks, and raises nothing.

        Nobody may write to the connection meanwhile: whoever has asked for the writer sees to that.
        """
        ...


class Connection(Protocol):
    """One established, ordered, message-oriented connection."""

    def write(self, frames: Iterable[Frame]) -> None:
        """Queue whole frames for sending; raises when closed or broken. Never blocks."""
        ...

    @property
    def writable(self) -> bool:
        """Whether the backlog is below the high-water mark."""
        ...

    def direct(self) -> Writer | None:
        """What another thread may write to, as long as the connection lasts; None where the backend has no such way."""
        ...

    async def drain(self) -> None:
        """Wait until `writable`."""
        ...

    async def recv(self) -> list[Frame]:
        """All frames that have arrived, at least one; waits for the first.

        Buffers are immutable `bytes` or read-only `memoryview`s that the caller owns.
        """
        ...

    def poll(self) -> list[Frame]:
        """`recv` without waiting: what has arrived, perhaps nothing."""
        ...

    def limit(self, max_bytes: int) -> None:
        """From now on a frame of more bytes that the peer sends breaks the connection; at first `MAX_FRAME_BYTES` may.

        What was taken counts no more. A frame that waits behind others breaks it once those are taken, and not
        before: who learns from them that the peer may send more raises the limit before waiting for anything else.
        """
        ...

    def notify(self, callback: Callable[[], None], one: Callable[[bytes], bool] | None = None) -> None:
        """From now on have the event loop call `callback` when frames have arrived or the connection has ended.

        `one`: where a frame without parts came alone, a backend may call this with its head in place of `callback`.
        Whoever returns False has done nothing and leaves the frame: `callback` is called.

        If it has ended when the last frames are polled, it is called once more, so that one `poll` per call will do.
        For a reader that `poll`s instead of having a task wait in `recv`, which costs a detour over the task. It
        isn't called from within another call on either end, so it may write, close or abort. It must not raise.
        """
        ...

    async def close(self) -> None:
        """Flush, then close. Idempotent; bounded to a few seconds if the peer is clogged, then aborts."""
        ...

    def abort(self) -> None:
        """Close at once, dropping what wasn't sent. Idempotent, never waits."""
        ...

    @property
    def closed(self) -> bool:
        """Closed by us, or known to be broken."""
        ...

    @property
    def local(self) -> str: ...

    @property
    def peer(self) -> str: ...


OnConnection: TypeAlias = Callable[[Connection], Awaitable[None]]
"""Called in a task of the listener's own for each accepted connection; the connection is aborted when it returns."""


class Listener(Protocol):
    """A bound address that accepts connections."""

    @property
    def bound(self) -> str:
        """The address it is bound to, ports resolved, e.g. `tcp://0.0.0.0:41234`."""
        ...

    @property
    def reachable(self) -> str:
        """The address that peers should dial; differs from `bound` in a pod."""
        ...

    async def close(self) -> None:
        """Stop accepting, cancel the handlers, abort their connections, wait for them. Idempotent."""
        ...


class Transport(Protocol):
    """A way to carry frames, found by the scheme of an address."""

    scheme: str
    capabilities: Capabilities

    async def connect(self, address: str, *, timeout: float = 10.0) -> Connection:
        """Dial `address`. Raises `ConnectionBroken` when refused or after `timeout` seconds."""
        ...

    async def listen(self, address: str, on_connection: OnConnection, *, advertise: str | None = None) -> Listener:
        """Bind `address` (port 0 or an empty path picks a free one). Raises `TransportError` when taken.

        `advertise` replaces the host in `Listener.reachable`.
        """
        ...
