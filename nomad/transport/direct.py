"""Writing to a stream's socket from another thread than the event loop's.

A source's function runs in a thread of its own. Where it gives a value now and then, waking the loop's thread to have
that written takes as long as all else that the source does with it. An event loop's transport is for its own thread
alone, though; so this writes to the socket itself, which the transport and a duplicate of its descriptor share.

Made by `nomad.transport.stream`. The owner of the connection sees to it that nobody else writes to it meanwhile.
"""

from __future__ import annotations

import asyncio
import functools
import os
import threading
from contextlib import suppress

from nomad.transport.base import Frame
from nomad.transport.framing import PREFIX, encode


class Direct:
    """Writes from any thread; made, flushed and closed in the loop's."""

    def __init__(self, transport: asyncio.Transport, descriptor: int):
        """Raises `OSError` where the descriptor can't be duplicated."""
        self.writable = True
        self.rest = b""
        """What the socket didn't take: it goes before anything else."""
        self._transport = transport
        self.busy = True
        """The transport may have something to write, or be closing. Set and cleared in the loop's thread alone: in
        another one its backlog tells nothing, it is empty for a moment while a part of it is being written, and when
        an abort has dropped it.
        """
        self._backlog = transport.get_write_buffer_size
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._descriptor = os.dup(descriptor)
        self._send = functools.partial(os.write, self._descriptor)

    def write(self, frames: list[Frame]) -> None:
        """Send frames. Of a connection that is lost, whoever reads from it knows."""
        if len(frames) == 1 and len(frames[0]) == 1:
            head = frames[0][0]
            data = PREFIX.pack(len(head), 0) + head
        else:
            data = b"".join(encode(frames))
        with self._lock:  # the descriptor's number may be another file's once it was closed
            if self._descriptor < 0:
                return
            sent = 0
            try:
                if not self.rest and not self.busy:
                    sent = self._send(data)
            except BlockingIOError:
                pass
            except OSError:
                return
            if sent == len(data):
                return
            self.rest += data[sent:]
            self.writable = False
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self.flush)

    def flush(self) -> None:
        """Write the rest, or leave it to the transport."""
        with self._lock:
            rest, self.rest, self.writable = self.rest, b"", True
            if self._descriptor < 0 or self._transport.is_closing():
                self.busy = True
                return
            if rest and not self._backlog():
                with suppress(OSError):  # of a lost connection, whoever reads from it knows
                    rest = rest[self._send(rest) :]
            if rest:
                self._transport.write(rest)
            self.busy = self._backlog() > 0

    def close(self) -> None:
        """Nothing is written any more."""
        with self._lock:
            os.close(self._descriptor)
            self._descriptor = -1
