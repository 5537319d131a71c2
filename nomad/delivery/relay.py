"""A relay: where the two ends of a link meet if neither can be dialled. `python -m nomad.delivery.relay`.

Each end proves to it that it is an end of the link, with a key of that link's own, which the master gives to both. The
relay derives that from its own key, asks nobody, and keeps nothing. Once a sender and the receiver that it means are
there (`nomad.delivery.meeting`), bytes go from the one to the other as they come, unread, as fast as the slower
one takes them. The newest connection of an end takes the place of those before it.

The program takes from the environment NOMAD_RELAY_KEY (the name of a file with the key in hex digits) and
NOMAD_RELAY_LISTEN (the address, `tcp://0.0.0.0:30030` if there is none), and runs until it is told to stop.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from nomad.delivery.driver import nothing, shake_listener
from nomad.delivery.handshake import MAX_BYTES
from nomad.delivery.meeting import GO, IN, MEET, OUT
from nomad.errors import DeliveryError, HandshakeError, NomadError, TransportError, UsageError
from nomad.transport import base, registry
from nomad.transport.base import Connection, Listener
from nomad.transport.framing import encode
from nomad.transport.stream import StreamConnection

log = logging.getLogger(__name__)

KEY_VARIABLE, LISTEN_VARIABLE = "NOMAD_RELAY_KEY", "NOMAD_RELAY_LISTEN"
DEFAULT_LISTEN = "tcp://0.0.0.0:30030"

BUFFER_BYTES = 256 << 10
"""What is held for an end that doesn't take it, beyond what one read gives, before no more is read from the other."""

MOST_WAITING = 32
"""Ends of one link that wait for the other one; of more, the oldest is closed."""


def key_of(relay: bytes, link: str) -> bytes:
    """The key of a link at a relay, whose own key is `relay`."""
    return hmac.new(relay, b"link|" + link.encode(), hashlib.sha256).digest()


class Relay:
    """`listen` first, `close` last."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._listener: Listener | None = None
        self._ends: dict[tuple[str, int, int], dict[str, _End]] = {}
        """By link and the epochs of its two ends: those that are there."""

    async def listen(self, address: str, *, advertise: str | None = None) -> str:
        """Bind `address`, of a stream transport without TLS; the address to dial. Raises `TransportError`."""
        self._listener = await registry.listen(address, self._serve, advertise=advertise)
        return self._listener.reachable

    async def close(self) -> None:
        """Stop listening and drop all connections."""
        for ends in list(self._ends.values()):
            for end in list(ends.values()):
                end.leave()
        if self._listener is not None:
            await self._listener.close()

    @property
    def meetings(self) -> int:
        """How many links have both their ends here now."""
        return sum(len(ends) == 2 for ends in self._ends.values())

    # Inside

    async def _serve(self, conn: Connection) -> None:
        try:
            identity, hello, rest = await shake_listener(
                conn, self._key_for, lambda _, hello: _checked(hello), most=MAX_BYTES
            )
            link, where = identity.removeprefix(MEET), _checked(hello)
            if rest:
                raise HandshakeError("an end of a link talks before the other one is there")
        except (TransportError, DeliveryError) as exc:
            log.debug("%s was turned away: %s", conn.peer, exc)
            return
        meeting, side = (link, int(where["sender"]), int(where["receiver"])), str(where["side"])
        if before := self._ends.get(meeting, {}).get(side):
            before.leave()
        self._make_room(link)
        ends = self._ends.setdefault(meeting, {})
        for other in [other for other, end in ends.items() if end.left.is_set()]:
            del ends[other]
        end = ends[side] = _End(cast(StreamConnection, conn))
        conn.notify(end.leave)  # it can only end, or talk too early
        try:
            if len(ends) == 2:
                _join(ends[OUT], ends[IN])
            await end.left.wait()
        except TransportError as exc:
            log.debug("link %s: an end was lost when the other one came: %s", link, exc)
        finally:
            end.leave()
            if ends.get(side) is end:
                del ends[side]
            if not ends and self._ends.get(meeting) is ends:
                del self._ends[meeting]

    def _key_for(self, identity: str) -> bytes | None:
        return key_of(self._key, identity.removeprefix(MEET)) if identity.startswith(MEET) else None

    def _make_room(self, link: str) -> None:
        waiting = [
            end for key, ends in self._ends.items() if key[0] == link and len(ends) == 1 for end in ends.values()
        ]
        if len(waiting) >= MOST_WAITING:
            waiting[0].leave()


def _checked(hello: dict[str, Any]) -> dict[str, Any]:
    """What an end says of itself. Raises `HandshakeError`."""
    if hello.get("side") not in (IN, OUT) or not all(isinstance(hello.get(end), int) for end in ("sender", "receiver")):
        raise HandshakeError("an end of a link that doesn't say which one it is")
    return hello


@dataclass(eq=False, slots=True)
class _End:
    """One end of a link, waiting or joined to the other."""

    conn: StreamConnection
    stream: asyncio.Transport | None = None
    other: _End | None = None
    """Once they are joined."""
    left: asyncio.Event = field(default_factory=asyncio.Event)

    def leave(self) -> None:
        """It is gone, or is to go, and so is the other one."""
        for end in (self, self.other):
            if end is not None:
                end.conn.abort()
                if end.stream is not None:
                    end.stream.abort()
                end.left.set()


def _join(sender: _End, receiver: _End) -> None:
    """From now on all that comes from the one goes to the other. Raises `TransportError`."""
    sender.other, receiver.other = receiver, sender
    for end in (sender, receiver):
        end.stream = end.conn.release()
    assert sender.stream is not None
    assert receiver.stream is not None
    one, other = _Stream(sender.stream, sender.left.set), _Stream(receiver.stream, receiver.left.set)
    one.other, other.other = other, one
    for buffer in encode([(GO,)]):
        one.transport.write(buffer)
    for stream in (one, other):
        stream.transport.set_protocol(stream)
        stream.transport.resume_reading()


class _Stream(asyncio.Protocol):
    """One of two streams of which each gets what the other one brings."""

    other: _Stream
    done = False
    """Nothing more comes from it."""

    def __init__(self, transport: asyncio.Transport, ended: Callable[[], None] = nothing) -> None:
        self.transport = transport
        self._ended = ended
        transport.set_write_buffer_limits(high=BUFFER_BYTES)

    def data_received(self, data: bytes) -> None:
        self.other.transport.write(data)

    def pause_writing(self) -> None:
        if not self.other.transport.is_closing():
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if not self.other.transport.is_closing():
            self.other.transport.resume_reading()

    def eof_received(self) -> bool:
        """This direction is done, the other one may go on."""
        self.done = True
        if not self.other.transport.is_closing():
            self.other.transport.write_eof()
        if self.other.done:
            self.other.transport.close()
        return not self.other.done

    def connection_lost(self, exc: BaseException | None) -> None:
        """The other one still gets what has come, if it takes that soon."""
        self._ended()
        other = self.other.transport
        if not other.is_closing():
            other.close()
            asyncio.get_running_loop().call_later(base.CLOSE_SECONDS, other.abort)


async def run(key: bytes, listen: str) -> None:
    """Relay until SIGTERM or SIGINT. Raises `NomadError`."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    relay = Relay(key)
    log.info("listening at %s", await relay.listen(listen))
    try:
        await stop.wait()
    finally:
        await relay.close()


def main() -> None:
    """Run the program; ends with 1 and a sentence when it can't."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        import uvloop

        factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    except ImportError:
        factory = asyncio.new_event_loop
    try:
        key = _read_key(os.environ.get(KEY_VARIABLE, ""))
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(run(key, os.environ.get(LISTEN_VARIABLE, DEFAULT_LISTEN)))
    except NomadError as exc:
        raise SystemExit(f"nomad relay: {exc}") from exc


def _read_key(path: str) -> bytes:
    """Raises `UsageError`."""
    try:
        key = bytes.fromhex(Path(path).read_text(encoding="ascii").strip()) if path else b""
    except (OSError, ValueError) as exc:
        raise UsageError(f"{KEY_VARIABLE}={path}: {exc}") from exc
    if len(key) != 32:
        raise UsageError(f"{KEY_VARIABLE} must name a file with the relay's key, 64 hex digits")
    return key


if __name__ == "__main__":
    main()
