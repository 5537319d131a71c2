"""The receiving half of a data link, sans I/O: drops doubles, keeps order, settles, and grants credit.

Feed it what happens (`welcome`, `receive`, `disconnected`) and the time; take batches from `inbox`; tell it
with `settle` how far what came of them is acknowledged downstream; drain frames with `take`, again at `deadline`.

Batches keep their encoded form until they are worked on, so that the inbox is as large as its bytes on the wire.
Credit follows settlement, not arrival: "up to what is settled, plus the window". So one number bounds
the inbox here and the replay buffer at the sender.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from nomad.delivery import frames
from nomad.delivery.frames import NOWHERE, Ack, Places, Position, position
from nomad.delivery.states import Event, Machine, State
from nomad.errors import Fenced, ProtocolError
from nomad.transport.base import Buffer, Frame

ACK_DELAY = 0.02
"""Seconds that an acknowledgement may wait for more to acknowledge.

A wake-up costs tens of microseconds whatever it carries.
"""

ACK_SHARE = 4
"""An acknowledgement goes out at once when it frees a window's 1/ACK_SHARE."""


GRANT_SHARE = 8
"""A sender may send a window's 1/GRANT_SHARE on a new connection before the first acknowledgement.

So that the first messages needn't wait for a round trip; the most that is held is a window and this.
"""


class Batch:
    """Messages in the order in which the function must see them."""

    __slots__ = ("_places", "birth", "body", "buffers", "lane", "last", "mark", "messages", "nbytes", "skip", "start")

    def __init__(
        self,
        start: int,
        lane: int,
        last: Position,
        places: Places | None,
        birth: int,
        body: Buffer,
        buffers: Sequence[Buffer],
        messages: int,
        nbytes: int,
    ):
        """`last`: the position of its last message. `places`: None for a single one."""
        self.start: int | None = start
        """Its number in the present sender's counting; None for a batch of an earlier sender instance."""
        self.lane = lane
        self.last = last
        self._places = places
        self.birth = birth
        self.body = body
        self.buffers = buffers
        self.skip = 0
        """Messages at its head that were received before."""
        self.messages = messages
        self.nbytes = nbytes
        """These two count against the window; a batch of doubles weighs nothing."""
        self.mark: int | None = None
        """What came of it is among the first so many messages that the operator has sent; None before it is done."""

    @property
    def places(self) -> Places:
        """Where its messages come from."""
        if self._places is None:
            origin, path = self.last
            self._places = Places(self.lane, range(origin, origin + 1), [path] if path else None)
        return self._places

    def drop(self, skip: int) -> None:
        """So many of its messages were received before."""
        self.skip = skip
        if skip == self.messages:
            self.messages = self.nbytes = 0
            self.done(0)

    def done(self, mark: int) -> None:
        """Worked off: results, if any, are with the outgoing links. Frees its bytes; the sender keeps them."""
        self.mark = mark
        self.body, self.buffers = b"", ()


class Receiver:
    """One link's receiving half. `received`: the last positions, by lane, that an earlier instance was done with."""

    def __init__(
        self,
        link: str,
        epoch: int,
        *,
        window_messages: int,
        window_bytes: int,
        received: Mapping[int, Position] | None = None,
    ):
        self.link = link
        self.epoch = epoch
        self.peer_epoch = 0
        self._sender_epoch = 0
        self._newcomer = True
        """The sender of this epoch hasn't said yet where it goes on."""
        self.machine = Machine(link)
        self.inbox: deque[Batch] = deque()
        self.received = dict(received or {})
        """The last position received in each lane."""
        self.settled: dict[int, Position] = {}
        """The last position settled in each lane."""
        self.accepted = 0
        """Messages received for the first time."""
        self.duplicates = 0
        """Messages dropped because they had been received before."""
        self._window_messages = window_messages
        self._window_bytes = window_bytes
        self._grant = max(1, window_messages // GRANT_SHARE), max(1, window_bytes // GRANT_SHARE)
        """Messages and bytes."""
        self._granted_messages = self._granted_bytes = 0
        """What the present connection's sender may send at the least, in its numbers."""
        self._held: deque[Batch] = deque()
        """Received and not settled, in order; those in the inbox are its tail."""
        self._held_messages = 0
        self._held_bytes = 0
        self._known = 0
        """Messages that the present sender had numbered when it went on."""
        self.first: int | None = None
        """The number with which the newest sender instance went on first; None before any did."""
        self._seq = 0
        """End of what was received, in the sender's numbers."""
        self._bytes = 0
        self._settled = 0
        """Every message numbered up to here is settled, in the present sender's counting."""
        self._resumed = False
        """Whether the present connection's sender has told where it goes on; until then `_seq` is not its."""
        self._due: float | None = None
        self._freed_messages = 0
        self._freed_bytes = 0
        self.arrived_at = 0.0
        """When the newest batch arrived."""
        self._pong = False

    # -- what happens

    def expect(self, epoch: int) -> None:
        """From now on, hear only a sender of this epoch or a newer one."""
        self.peer_epoch = max(self.peer_epoch, epoch)

    def welcome(self, hello: dict[str, Any]) -> dict[str, Any]:
        """What this side answers to a sender's hello. Raises `Fenced` for a sender of an older epoch."""
        epoch = hello.get("epoch")
        if not isinstance(epoch, int):
            raise ProtocolError(f"link {self.link}: a hello with epoch {epoch!r}")
        self.admit(epoch)
        return {
            "epoch": self.epoch,
            "received": [(lane, *position) for lane, position in self.received.items()],
            "window_messages": self._window_messages,
            "window_bytes": self._window_bytes,
            "grant_messages": _between(self._window_messages - self._held_messages, self._grant[0]),
            "grant_bytes": _between(self._window_bytes - self._held_bytes, self._grant[1]),
        }

    def had(self, positions: Mapping[int, Position]) -> None:
        """An earlier instance was done with these, the last of each lane: they and those before them are doubles."""
        for lane, done in positions.items():
            self.received[lane] = max(done, self.received.get(lane, NOWHERE))

    def admit(self, epoch: int) -> None:
        """Raise `Fenced` for a sender of an older epoch than was heard or announced."""
        if epoch < self.peer_epoch:
            raise Fenced(f"link {self.link}: the sender is of epoch {epoch}, {self.peer_epoch} has been heard")

    def opened(self, epoch: int) -> None:
        """A sender that has proven itself sends its first frame: its connection is the link's from now on.

        `received` may have moved on since `welcome`, when an older connection of the same link was still read: what
        was received over it comes again, and is dropped. Raises `Fenced`.
        """
        self.admit(epoch)
        if epoch != self._sender_epoch:
            for batch in self._held:
                batch.start = None
            self._settled, self._sender_epoch, self._newcomer = 0, epoch, True
        self.peer_epoch = max(self.peer_epoch, epoch)
        if self.machine.state is not State.HELLO:
            self.machine.fire(Event.CONNECTED)
        self.machine.fire(Event.AGREED)
        self._resumed = False
        self._due = None

    def receive(self, frame: Frame, now: float) -> bool:
        """Take a frame; True when it brought a batch. Raises `ProtocolError`.

        All in one function for a batch: each further one costs microseconds when the caches are cold.
        """
        if not frame[0] or frame[0][0] != frames.DATA:
            self._told(frames.unpack(frame), now)
            return False
        data = frames.unpack_data(frame)
        if not self._resumed:
            raise ProtocolError(f"link {self.link}: data before resume")
        if data.seq != self._seq:
            raise ProtocolError(f"link {self.link}: expected message {self._seq}, got {data.seq}")
        places, origins, paths = data.places, data.places.origins, data.places.paths
        count, nbytes = len(origins), frames.BATCH_OVERHEAD + len(data.body)
        if data.buffers:
            nbytes += sum(map(len, data.buffers))
        received = self.received.get(places.lane, NOWHERE)
        last = position((origins[-1], b"" if paths is None else paths[-1]))
        batch = Batch(data.seq, places.lane, last, places, data.birth, data.body, data.buffers, count, nbytes)
        if origins[0] <= received[0]:
            batch.drop(places.up_to(received))
        if (
            self._held_messages
            and batch.messages
            and (
                self._held_messages + batch.messages > self._window_messages
                or self._held_bytes + batch.nbytes > self._window_bytes
            )
            and not self._granted(batch)
        ):
            raise ProtocolError(f"link {self.link}: the sender exceeds its credit")
        self._seq += count
        self._bytes += nbytes
        self.arrived_at = now
        self.duplicates += batch.skip
        self.accepted += count - batch.skip
        self._held.append(batch)
        self._held_messages += batch.messages
        self._held_bytes += batch.nbytes
        if batch.mark is None:
            self.received[places.lane] = last
            self.inbox.append(batch)
        return True

    def receive_one(self, head: Buffer, now: float) -> Batch | None:
        """The same, and the batch out of the inbox, for a frame with one message and nothing special about it.

        None for any other, and where something else is to be worked off before or there is no credit: nothing has
        changed then, and `receive` takes it. For messages that come one by one, on a quiet link.
        """
        if len(head) <= frames.DATA_HEAD.size:
            return None
        kind, flags, lane, count, seq, origin, birth = frames.DATA_HEAD.unpack_from(head)
        received = self.received.get(lane)
        nbytes = frames.BATCH_OVERHEAD + len(head) - frames.DATA_HEAD.size
        if (
            kind != frames.DATA
            or flags != frames.PLAIN
            or count != 1
            or seq != self._seq
            or not self._resumed
            or received is None
            or origin <= received[0]
            or self.inbox
            or self._held_messages >= self._window_messages
            or self._held_bytes + nbytes > self._window_bytes
        ):
            return None
        body = head[frames.DATA_HEAD.size :]
        last = position((origin, b""))
        batch = Batch(seq, lane, last, None, birth, body, (), 1, nbytes)
        self._seq = seq + 1
        self._bytes += nbytes
        self.arrived_at = now
        self.accepted += 1
        self._held.append(batch)
        self._held_messages += 1
        self._held_bytes += nbytes
        self.received[lane] = last
        return batch

    def disconnected(self) -> None:
        """The connection is gone; what was received stays."""
        if self.machine.state in (State.HELLO, State.OPEN):
            self.machine.fire(Event.DISCONNECTED)
        self._due = None
        self._pong = False

    def close(self) -> None:
        """The end of the link."""
        self.machine.fire(Event.CLOSE)

    # -- consuming

    def settle(self, mark: int, now: float) -> None:
        """The first `mark` messages that the operator has sent are acknowledged downstream."""
        freed = False
        while self._held and (done := self._held[0].mark) is not None and done <= mark:
            batch = self._held.popleft()
            self.settled[batch.lane] = batch.last
            self._held_messages -= batch.messages
            self._held_bytes -= batch.nbytes
            self._freed_messages += batch.messages
            self._freed_bytes += batch.nbytes
            freed = True
        if not freed:
            return
        self._count_settled()
        at_once = (
            self._freed_messages * ACK_SHARE >= self._window_messages
            or self._freed_bytes * ACK_SHARE >= self._window_bytes
        )
        self._acknowledge_by(now if at_once else now + ACK_DELAY)

    @property
    def queued(self) -> tuple[int, int]:
        """Messages and bytes in the inbox; may be asked from another thread."""
        waiting = tuple(self.inbox)
        return sum(b.messages - b.skip for b in waiting), sum(b.nbytes for b in waiting)

    @property
    def caught_up(self) -> bool:
        """Whether all has been received that the present sender had when it went on, or as much as is held at once."""
        if self.first is None:
            return False
        full = self._held_messages * 2 > self._window_messages or self._held_bytes * 2 > self._window_bytes
        return full or self._seq >= self._known

    @property
    def progress(self) -> tuple[int, int]:
        """In the present sender's numbers: the end of what was received, and of what is settled."""
        return self._seq, self._settled

    @property
    def unsettled(self) -> tuple[int, int]:
        """Messages and bytes received and not settled."""
        return self._held_messages, self._held_bytes

    # -- draining

    def take(self, now: float) -> list[Frame]:
        """Frames for the connection."""
        taken: list[Frame] = []
        if self.machine.state is not State.OPEN or not self._resumed:
            return taken
        if self._pong:
            self._pong = False
            taken.append(frames.Pong().pack())
        if self._due is not None and now >= self._due:
            self._due = None
            self._freed_messages = self._freed_bytes = 0
            taken.append(
                Ack(
                    settled=self._settled,
                    credit_messages=max(0, self._seq - self._held_messages + self._window_messages),
                    credit_bytes=max(0, self._bytes - self._held_bytes + self._window_bytes),
                    echo=self._seq,
                    held=max(0.0, now - self.arrived_at),
                ).pack()
            )
        return taken

    @property
    def asked(self) -> bool:
        """Whether the sender waits for an answer."""
        return self._pong

    def deadline(self) -> float | None:
        """When `take` will have something to send that it hasn't now."""
        return self._due if self.machine.state is State.OPEN and self._resumed else None

    # -- inside

    def _acknowledge_by(self, when: float) -> None:
        self._due = when if self._due is None else min(self._due, when)

    def _told(self, word: frames.AnyFrame, now: float) -> None:
        """What isn't a batch."""
        if isinstance(word, frames.Resume):
            if self._resumed:
                raise ProtocolError(f"link {self.link}: a sender resumed twice")
            self._seq, self._bytes, self._resumed = word.seq, word.nbytes, True
            self._granted_messages = word.seq + self._grant[0]
            self._granted_bytes = word.nbytes + self._grant[1]
            if self._newcomer:
                self.first, self._newcomer = word.seq, False
            self._known = word.known
            self._count_settled()
            self._acknowledge_by(now)
        elif isinstance(word, frames.Ping):
            self._pong = True
        elif not isinstance(word, frames.Pong):
            raise ProtocolError(f"link {self.link}: a sender sent {type(word).__name__}")

    def _granted(self, batch: Batch) -> bool:
        """Whether a batch that exceeds the window may be taken all the same."""
        return (
            self._seq + batch.messages <= self._granted_messages
            and self._bytes + batch.nbytes <= self._granted_bytes
            and self._held_messages + batch.messages <= self._window_messages + self._grant[0]
            and self._held_bytes + batch.nbytes <= self._window_bytes + self._grant[1]
        )

    def _count_settled(self) -> None:
        if not self._resumed:
            return
        if not self._held:
            self._settled = max(self._settled, self._seq)
        elif (start := self._held[0].start) is not None:
            self._settled = max(self._settled, start)


def _between(free: int, grant: int) -> int:
    """What may be granted when so much of the window is `free`, which is less than none if more was granted before."""
    return max(0, min(grant, free + grant))
