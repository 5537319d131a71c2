"""A connection over a byte stream of the event loop: TCP, TLS or a unix socket.

Used by `nomad.transport.tcp` and `nomad.transport.tls`. Works on asyncio's own loops and on uvloop. It must not copy a
large buffer: those are handed to the kernel as they are, and received in place (see `framing.Splitter`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import cast

from nomad.errors import FrameTooLarge
from nomad.transport import base
from nomad.transport.base import HIGH_WATER, Frame, Writer
from nomad.transport.direct import Direct
from nomad.transport.endpoint import Endpoint
from nomad.transport.framing import END, FRAME_OVERHEAD, JOIN_BYTES, PREFIX, Ended, Splitter, encode
from nomad.transport.waiting import Once

RECEIVE_LIMIT = 2 << 20
"""Bytes of received frames waiting for `recv` above which nothing more is read."""


class StreamConnection(Endpoint, asyncio.BufferedProtocol):
    """`nomad.transport.base.Connection` over a stream; also the protocol object of its transport."""

    writable = True

    def __init__(
        self,
        describe: Callable[[asyncio.Transport], tuple[str, str]],
        on_open: Callable[[StreamConnection], None] | None = None,
    ) -> None:
        """`describe` sets up the new stream and gives its local and peer address."""
        super().__init__()
        self._describe = describe
        self._on_open = on_open
        self._transport: asyncio.Transport
        splitter = Splitter()
        self._splitter: Splitter | None = splitter  # None: what is received is thrown away
        self.get_buffer = splitter.get_buffer  # type: ignore[method-assign]
        self._waiting_bytes = 0  # received and not taken by recv
        self._receive_limit = RECEIVE_LIMIT
        self._reading = True
        self._refused = False
        """A frame over the limit is next, and those before it are still to be taken."""
        self._gathers = False
        self._direct: Direct | None = None
        self._lost = Once()  # the stream is gone
        self._released = False

    # Connection

    def write(self, frames: Iterable[Frame]) -> None:
        if self._closed or self._broken is not None:
            raise self._error()
        if self._direct is not None and self._direct.rest:
            self._direct.flush()
        if type(frames) is list and len(frames) == 1 and len(frames[0]) == 1:
            (head,) = frames[0]
            if type(head) is bytes and len(head) < JOIN_BYTES:  # one message on a quiet link
                self._transport.write(PREFIX.pack(len(head), 0) + head)
                if self._direct is not None:
                    self._wrote(self._direct)
                return
        buffers = encode(frames)
        if len(buffers) > 1 and self._gathers:
            self._transport.writelines(buffers)
        else:
            for buffer in buffers:
                self._transport.write(buffer)
        if self._direct is not None:
            self._wrote(self._direct)

    def poll(self) -> list[Frame]:
        if self._closed or (self._broken is not None and not self._received):
            raise self._error()
        frames, self._received = self._received, []
        if self._broken is not None:
            self._reader.wake()
        self._waiting_bytes = 0
        if not self._reading:
            if self._refused:
                asyncio.get_running_loop().call_soon(self._reconsider)
            else:
                self._read(True)
        return frames

    def direct(self) -> Writer | None:
        if self._direct is None and self._transport.get_extra_info("ssl_object") is None and not self.closed:
            sock = self._transport.get_extra_info("socket")
            with suppress(OSError):
                self._direct = Direct(self._transport, sock.fileno())
                self._direct.flush()
        return self._direct

    def limit(self, max_bytes: int) -> None:
        self._receive_limit = min(RECEIVE_LIMIT, max_bytes)
        if self._splitter is not None:
            self._splitter.max_bytes = max_bytes
            if (coming := self._splitter.coming) > max_bytes and not self._refused:
                self._break(f"{self._peer} sends a frame of {coming} bytes; the limit is {max_bytes}")

    async def close(self) -> None:
        if not self.closed:
            if self._direct is not None:
                self._direct.flush()
            # What was written must not be lost to a reset, which is what closing a stream with unread
            # bytes causes. So: say that no more comes, and read what there is until the peer closes too.
            self._end()
            self._read(True)
            if not self._transport.is_closing():
                if self._transport.can_write_eof():
                    self._transport.write_eof()
                else:
                    self._transport.write(END)
        self._end()
        try:
            async with asyncio.timeout(base.CLOSE_SECONDS):
                await self._lost.wait()
        except TimeoutError:
            pass
        finally:
            if not self._released:
                self._transport.abort()
        await self._lost.wait()

    def abort(self) -> None:
        self._end()
        if not self._released:
            self._transport.abort()

    @property
    def unread(self) -> int:
        """Bytes that have come since the last `poll`, those of a frame that isn't whole yet included."""
        return self._waiting_bytes

    def set_option(self, level: int, option: int, value: int) -> None:
        """An option of the socket below; one that it doesn't have is left alone."""
        sock = self._transport.get_extra_info("socket")
        if sock is not None and not self._transport.is_closing():
            with suppress(OSError):
                sock.setsockopt(level, option, value)

    def release(self) -> asyncio.Transport:
        """Give up the stream for another protocol, which has to resume reading: this connection is closed.

        The peer must have no reason to have sent anything that wasn't received. Raises `ConnectionBroken` or
        `ConnectionClosed` when it did, or is gone.
        """
        if self._splitter is None or self._received or self._splitter.partial or self._transport.is_closing():
            self._break(f"{self._peer} doesn't wait until it is its turn")
            raise self._error()
        self._read(False)
        self._released = True
        self._reader.callback = None
        self._end()
        self._lost.set()
        return self._transport

    # asyncio.BufferedProtocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=HIGH_WATER)
        # uvloop writes many buffers with one system call. Before Python 3.12 asyncio's writelines joins them,
        # and until 3.12.3 it doesn't count them as backlog; its write sends at once, so little is lost.
        self._gathers = type(transport).__module__.startswith("uvloop")
        self._local, self._peer = self._describe(self._transport)
        if self._on_open is not None:
            self._on_open(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._break(f"{self._peer} is gone: {exc or 'it closed the connection'}", exc)
        if self._direct is not None:
            self._direct.close()
        self._lost.set()

    def eof_received(self) -> None:
        partial = self._splitter is not None and self._splitter.partial
        self._break(f"{self._peer} closed the connection" + (" in the middle of a frame" if partial else ""))

    def pause_writing(self) -> None:
        self.writable = False

    def resume_writing(self) -> None:
        self.writable = True
        self._drainer.wake()

    def buffer_updated(self, nbytes: int) -> None:
        splitter = self._splitter
        if splitter is None:
            return
        if self._one is not None and (data := splitter.clear) is not None and PREFIX.size <= nbytes:
            size, parts = PREFIX.unpack_from(data)
            alone = not parts and PREFIX.size + size == nbytes and size <= splitter.max_bytes and not self._received
            if alone and self._one(data[PREFIX.size : nbytes].tobytes()):
                return
        before = len(self._received)
        try:
            splitter.buffer_updated(nbytes, self._received)
        except FrameTooLarge as exc:
            if not self._received:
                self._break(f"{self._peer} doesn't speak this protocol: {exc}", exc)
                return
            self._refused = True
            self._read(False)
        except Ended:
            self.eof_received()
            return
        frames = len(self._received) - before
        self._waiting_bytes += nbytes + FRAME_OVERHEAD * frames
        if frames:
            (self._reader.callback or self._reader.wake)()  # this is the loop's own call
        if self._waiting_bytes > self._receive_limit and self._received:
            self._read(False)

    # Inside

    def _wrote(self, direct: Direct) -> None:
        if self._transport.get_write_buffer_size():
            direct.busy = True

    def _reconsider(self) -> None:
        """What came before a frame over the limit was taken: the limit may be another one by now."""
        if self._refused:
            self._refused = False
            self._read(True)
            self.buffer_updated(0)

    def _read(self, on: bool) -> None:
        if on is not self._reading and not self._transport.is_closing():
            self._reading = on
            if on:
                self._transport.resume_reading()
            else:
                self._transport.pause_reading()

    def _end(self) -> None:
        self._discard()
        super()._end()

    def _discard(self) -> None:
        if self._splitter is not None:
            self._splitter.discard()
            self._splitter = None

    def _break(self, reason: str, cause: BaseException | None = None) -> None:
        if self._broken is None:
            self._discard()
            self._transport.abort()
        super()._break(reason, cause)
