"""The sending half of a data link, sans I/O: numbers, keeps and repeats batches until they are settled.

Feed it what happens (`connected`, `welcomed`, `receive`, `disconnected`) and the time; `submit` batches; drain
frames with `take`; ask `room` before producing more and `deadline` for when to call `tick`. It doesn't know
what carries its frames (`driver`) or where messages come from (`nomad.actor`).

The replay buffer is the queue: every batch stays in it, sent or not, until the receiver says that all
that came of it is settled. What goes on a connection is decided by a cursor into it, so that a new
connection only moves the cursor. Buffers are kept by reference.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from nomad.delivery import frames
from nomad.delivery.frames import NOWHERE, Ack, Places, Position, position
from nomad.delivery.samples import LinkSamples
from nomad.delivery.states import Event, Machine, State
from nomad.errors import Fenced, ProtocolError
from nomad.transport.base import Buffer, Frame

SILENCE = 5.0
"""Seconds without a frame from the peer after which an open link asks whether it is there."""

GIVE_UP = 15.0
"""Seconds without a frame after which the connection is given up and dialed anew."""


class _Entry(NamedTuple):
    frame: Frame
    start: int
    """Messages numbered before it."""
    end: int
    """Messages numbered up to its last."""
    nbytes: int
    bytes_end: int
    """Cumulative bytes up to its end."""
    lane: int
    last: Position


_entry = functools.partial(tuple.__new__, _Entry)


class Tail:
    """What a receiver is still sent after its next instance was preferred: all that is new, while its credit lasts.

    It is heard by those behind it until the next instance has caught up; its acknowledgements aren't.
    """

    def __init__(self, entries: deque[_Entry], sent: int, credit_messages: int, credit_bytes: int):
        self._entries = entries
        self._sent = sent
        self._credit_messages = credit_messages
        self._credit_bytes = credit_bytes

    def take(self) -> list[Frame]:
        """The next frames to send."""
        new: list[_Entry] = []
        for entry in reversed(self._entries):
            if entry.start < self._sent:
                break
            new.append(entry)
        taken: list[Frame] = []
        if not new or new[-1].start > self._sent:  # what it should get next is settled already
            return taken
        for entry in reversed(new):
            if entry.end > self._credit_messages or entry.bytes_end > self._credit_bytes:
                break
            taken.append(entry.frame)
            self._sent = entry.end
        return taken


@dataclass(frozen=True, slots=True)
class Welcome:
    """What a receiver answers to a hello."""

    epoch: int
    received: dict[int, Position]
    """The last position that it received in each lane."""
    window_messages: int
    window_bytes: int
    grant_messages: int
    """What may be sent before the first acknowledgement."""
    grant_bytes: int


def read_welcome(link: str, body: dict[str, Any]) -> Welcome:
    """The words in a receiver's answer. Raises `ProtocolError` when it makes no sense."""
    try:
        received = {_int(lane): Position(_int(origin), _bytes(path)) for lane, origin, path in body["received"]}
        numbers = ("window_messages", "window_bytes", "grant_messages", "grant_bytes")
        return Welcome(_int(body["epoch"]), received, *(_int(body[name]) for name in numbers))
    except (KeyError, TypeError, ValueError) as exc:
        raise ProtocolError(f"link {link}: malformed welcome: {exc!r}") from exc


class Sender:
    """One link's sending half. `epoch` is that of the operator instance that owns it."""

    def __init__(self, link: str, epoch: int, *, quiet: bool = False):
        self.link = link
        self.epoch = epoch
        self._quiet = quiet
        """Another instance may still be heard: leave the link to that one while there is nothing to be settled, ..."""
        self._held = quiet
        """... and even then until `release`."""
        self.peer_epoch = 0
        """The newest epoch of the receiver that was heard or announced; older ones are fenced."""
        self.machine = Machine(link)
        self.samples = LinkSamples()
        """What the traffic tells of the way to the receiver."""
        self._entries: deque[_Entry] = deque()
        self._cursor = 0
        """Entries before this index were sent on the present connection."""
        self.numbered = 0
        """Messages submitted."""
        self.settled = 0
        """Messages numbered up to here are settled, and have left the replay buffer."""
        self._bytes = 0
        self._settled_bytes = 0
        self._sent = 0
        """Messages numbered up to here went on the present connection."""
        self._credit_messages = 0
        self._credit_bytes = 0
        self._window_messages = 0
        self._window_bytes = 0
        self._heard_at = 0.0
        self._pinged = False
        self._control: deque[Frame] = deque()
        self._resume: tuple[int, int] | None = None
        """Where the present connection goes on, in messages and bytes, until its first frame may go."""
        self._grant = 0, 0
        """What may be sent with it."""

    # -- what happens

    def hello(self) -> dict[str, Any]:
        """What this side says first on a new connection."""
        return {"epoch": self.epoch}

    def expect(self, epoch: int) -> None:
        """From now on, hear only a receiver of this epoch or a newer one."""
        self.peer_epoch = max(self.peer_epoch, epoch)

    def connected(self) -> None:
        """A connection stands and the handshake begins."""
        self.machine.fire(Event.CONNECTED)

    def welcomed(self, body: dict[str, Any], now: float) -> None:
        """The receiver's answer, just now or a while ago: nothing but the handshake has gone over the connection.

        Raises `Fenced` when the receiver is of an older epoch than one already heard, `ProtocolError`
        when the answer makes no sense.
        """
        welcome = read_welcome(self.link, body)
        if (epoch := welcome.epoch) < self.peer_epoch:
            raise Fenced(f"link {self.link}: the receiver is of epoch {epoch}, {self.peer_epoch} has been heard")
        self.peer_epoch = epoch
        self._window_messages, self._window_bytes = welcome.window_messages, welcome.window_bytes
        self.machine.fire(Event.AGREED)
        self._cursor = 0
        for entry in self._entries:
            if entry.last > welcome.received.get(entry.lane, NOWHERE):
                break
            self._cursor += 1
        base = self._entries[self._cursor] if self._cursor < len(self._entries) else None
        seq = base.start if base else self.numbered
        nbytes = base.bytes_end - base.nbytes if base else self._bytes
        self._credit_messages, self._credit_bytes = seq, nbytes
        self._heard_at, self._pinged = now, False
        self.samples.opened(epoch)
        self._control.clear()
        self._sent = seq
        self._resume, self._grant = (seq, nbytes), (welcome.grant_messages, welcome.grant_bytes)
        self._take_over()

    def receive(self, frame: Frame, now: float) -> bool:
        """Take a frame from the receiver; True when it freed room. Raises `ProtocolError`."""
        self._heard_at, self._pinged = now, False
        word = frames.unpack(frame)
        if isinstance(word, Ack):
            return self._acknowledged(word, now)
        if isinstance(word, frames.Ping):
            self._control.append(frames.Pong().pack())
            self.release()  # it hears nobody
        elif isinstance(word, frames.Pong):
            self.samples.answered(now)
        else:
            raise ProtocolError(f"link {self.link}: a receiver sent {type(word).__name__}")
        return False

    def disconnected(self) -> None:
        """The connection is gone. Nothing is lost: everything unsettled will be sent again."""
        if self.machine.state in (State.HELLO, State.OPEN):
            self.machine.fire(Event.DISCONNECTED)
        self._cursor = 0
        self._control.clear()
        self._resume = None

    def close(self) -> None:
        """The end of the link; what is unsettled is given up."""
        self.machine.fire(Event.CLOSE)
        self._entries.clear()

    # -- taking another instance's place

    def release(self, *, caught_up: bool = False) -> None:
        """The link may be taken over, if there is something to send, or as soon as there is.

        `caught_up`: even if there is nothing, since the instance before hasn't anything more to give.
        """
        self._held = False
        self._quiet = self._quiet and not caught_up
        self._take_over()

    def tail(self) -> Tail:
        """For the receiver of the present connection, which is about to be left for its next instance."""
        greeted = not self._control  # what waits there may be the first frame
        return Tail(self._entries, self._sent, *((self._credit_messages, self._credit_bytes) if greeted else (0, 0)))

    # -- producing

    @property
    def room(self) -> tuple[int, int]:
        """Messages and bytes that may be submitted now, each 0 at the least.

        Nothing until the receiver has been greeted once. A window's worth in all, submitted and unsettled; one batch
        may overshoot the bytes.
        """
        messages = self._window_messages - self.numbered + self.settled
        nbytes = self._window_bytes - self._bytes + self._settled_bytes
        return (messages if messages > 0 else 0), (nbytes if nbytes > 0 else 0)

    def room_for(self, size: float | None) -> int:
        """Messages of about `size` bytes that may be submitted now; one at a time until a size is known."""
        messages = self._window_messages - self.numbered + self.settled
        nbytes = self._window_bytes - self._bytes + self._settled_bytes
        if messages <= 0 or nbytes <= 0:
            return 0
        fitting = int(nbytes / size) or 1 if size else 1
        return fitting if fitting < messages else messages

    @property
    def greeted(self) -> bool:
        """Whether a receiver has been heard once, so that it is known what it has."""
        return self._window_messages > 0

    @property
    def unsettled(self) -> tuple[int, int]:
        """Messages and bytes in the replay buffer."""
        return self.numbered - self.settled, self._bytes - self._settled_bytes

    def submit(self, body: Buffer, buffers: Sequence[Buffer], places: Places, birth: int) -> None:
        """Queue a batch of messages, one at the least, whose positions follow all earlier ones of their lane."""
        start, origins, paths = self.numbered, places.origins, places.paths
        frame = frames.pack_data(start, places, birth, body, buffers)
        nbytes = frames.BATCH_OVERHEAD + len(body)
        if buffers:
            nbytes += sum(map(len, buffers))
        self._bytes += nbytes
        self.numbered = end = start + len(origins)
        last = position((origins[-1], b"" if paths is None else paths[-1]))
        self._entries.append(_entry((frame, start, end, nbytes, self._bytes, places.lane, last)))
        if self._resume is not None:
            self._take_over()

    def send_one(self, body: bytes, lane: int, origin: int, birth: int, now: float) -> list[Frame] | None:
        """`submit` and `take` in one, for a batch of one message, without a path, that may go at once.

        None where something else is to go first, or no credit or room is left for another one like it: nothing has
        changed then. For messages that come one by one, on a quiet link.
        """
        start, nbytes, samples = self.numbered, frames.BATCH_OVERHEAD + len(body), self.samples
        end, bytes_end = start + 1, self._bytes + nbytes
        if (
            self.machine.state is not State.OPEN
            or self._control
            or self._resume is not None
            or self._cursor != len(self._entries)
            or end >= self._credit_messages
            or bytes_end + nbytes > self._credit_bytes
            or end - self.settled >= self._window_messages
            or bytes_end - self._settled_bytes >= self._window_bytes
            or len(body) > frames.INLINE_BODY
        ):
            return None
        frame = (frames.DATA_HEAD.pack(frames.DATA, frames.PLAIN, lane, 1, start, origin, birth) + body,)
        self._bytes = bytes_end
        self.numbered = self._sent = end
        self._cursor += 1
        self._entries.append(_entry((frame, start, end, nbytes, bytes_end, lane, position((origin, b"")))))
        taken: list[Frame] = [frame]
        if now >= samples.ask_at and not self._pinged and samples.ask(nbytes, now):
            taken.insert(0, frames.Ping().pack())
        samples.sent((end, len(body), now))
        return taken

    @property
    def blocked(self) -> bool:
        """Whether something waits for credit: back-pressure."""
        if self.machine.state is not State.OPEN or self._cursor == len(self._entries):
            return False
        entry = self._entries[self._cursor]
        beyond = entry.end > self._credit_messages or entry.bytes_end > self._credit_bytes
        return beyond and not self._alone(entry)

    # -- draining

    def take(self, now: float, most: int) -> list[Frame]:
        """The next frames to send, until they reach `most` bytes. Empty when nothing may be sent."""
        taken: list[Frame] = []
        if self._control:
            taken.extend(self._control)
            self._control.clear()
        if self.machine.state is not State.OPEN:
            return taken
        entries, samples = self._entries, self.samples
        while most > 0 and self._cursor < len(entries):
            entry = entries[self._cursor]
            if (entry.end > self._credit_messages or entry.bytes_end > self._credit_bytes) and not self._alone(entry):
                break
            self._cursor += 1
            self._sent = entry.end
            if now >= samples.ask_at and not self._pinged and samples.ask(entry.nbytes, now):
                taken.append(frames.Ping().pack())
            samples.sent((entry.end, entry.nbytes - frames.BATCH_OVERHEAD, now))
            taken.append(entry.frame)
            most -= entry.nbytes
        return taken

    def deadline(self) -> float | None:
        """When `tick` should be called."""
        if self.machine.state is not State.OPEN:
            return None
        return self._heard_at + (GIVE_UP if self._pinged else SILENCE)

    def tick(self, now: float) -> bool:
        """Act on the time. False when the peer has been silent for too long and the connection should be given up."""
        if self.machine.state is not State.OPEN:
            return True
        if now >= self._heard_at + GIVE_UP:
            return False
        if now >= self._heard_at + SILENCE and not self._pinged:
            self._pinged = True
            self._control.append(frames.Ping().pack())
        return True

    # -- inside

    def _take_over(self) -> None:
        """Send the first frame if it may go. From its arrival on this connection is the link's."""
        if self._resume is None or self._held or (self._quiet and not self._entries):
            return
        seq, nbytes = self._resume
        self._resume, self._quiet = None, False
        self._control.append(frames.Resume(seq, nbytes, self.numbered).pack())
        self._credit_messages, self._credit_bytes = seq + self._grant[0], nbytes + self._grant[1]

    def _alone(self, entry: _Entry) -> bool:
        """Whether the receiver holds nothing: a batch larger than its whole window travels alone, rather than never."""
        return (
            self._credit_messages - entry.start >= self._window_messages
            and self._credit_bytes - (entry.bytes_end - entry.nbytes) >= self._window_bytes
        )

    def _acknowledged(self, ack: Ack, now: float) -> bool:
        if ack.echo > self._sent:
            raise ProtocolError(f"link {self.link}: the receiver acknowledges what was never sent")
        self._credit_messages = max(self._credit_messages, ack.credit_messages)
        self._credit_bytes = max(self._credit_bytes, ack.credit_bytes)
        freed = False
        while self._cursor and self._entries[0].end <= ack.settled:
            entry = self._entries.popleft()
            self.settled = entry.end
            self._settled_bytes += entry.nbytes
            self._cursor -= 1
            freed = True
        self.samples.acknowledged(ack.echo, ack.held, now)
        return freed


def _int(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} is no whole number")
    return value


def _bytes(value: Any) -> bytes:
    if type(value) is not bytes:
        raise TypeError(f"{value!r} is no path")
    return value
