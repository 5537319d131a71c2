"""A sender and a receiver joined by a wire that does what a test says, at a time that a test sets."""

from __future__ import annotations

from collections import deque

from nomad.delivery.codec import Codec
from nomad.delivery.frames import Data, Places, unpack
from nomad.delivery.receiver import Batch, Receiver
from nomad.delivery.sender import Sender
from nomad.transport.base import Frame

LINK = "p:a>b"


def flat(frame: Frame) -> Frame:
    """A frame as a transport delivers it: read-only, in memory of its own."""
    return tuple(memoryview(bytes(part)) for part in frame)


class Wire:
    """One link of which both ends may be replaced by newer instances. Frames move only when told to."""

    def __init__(self, sender: Sender, receiver: Receiver) -> None:
        self.sender = sender
        self.receiver = receiver
        self.to_receiver: deque[Frame] = deque()
        self.to_sender: deque[Frame] = deque()
        self.open = False

    def connect(self, now: float = 0.0) -> None:
        """The whole of a handshake. The sender's first frame, and the credit for it, are yet to come."""
        welcome = self.greet()
        self.agree(welcome, now)

    def greet(self) -> dict[str, object]:
        """The first half of a handshake: what the receiver answers."""
        self.cut_sender()
        self.sender.connected()
        return self.receiver.welcome(self.sender.hello())

    def agree(self, welcome: dict[str, object], now: float) -> None:
        """The second half. An older connection that the receiver still reads ends here."""
        self.cut_receiver()
        self.sender.welcomed(welcome, now)
        self.receiver.opened(self.sender.epoch)
        self.open = True

    def cut_sender(self) -> None:
        """The sender finds its connection broken; what was on the way to it is lost."""
        self.to_sender.clear()
        self.sender.disconnected()
        self.open = False

    def cut_receiver(self) -> None:
        """The receiver finds its connection broken."""
        self.to_receiver.clear()
        self.receiver.disconnected()

    def cut(self) -> None:
        """The connection breaks, and both know."""
        self.cut_sender()
        self.cut_receiver()

    def collect(self, now: float, most: int = 1 << 30) -> None:
        """Put on the wire what the ends may send now."""
        if self.open:
            self.to_receiver += map(flat, self.sender.take(now, most))
            self.to_sender += map(flat, self.receiver.take(now))

    def deliver_data(self, now: float) -> bool:
        """Let the first frame arrive at the receiver; True when it brought a batch."""
        return self.receiver.receive(self.to_receiver.popleft(), now)

    def deliver_ack(self, now: float) -> bool:
        """Let the first frame arrive at the sender; True when it freed room."""
        return self.sender.receive(self.to_sender.popleft(), now)

    def run(self, now: float = 0.0) -> None:
        """Until nothing moves any more at this time."""
        while True:
            self.collect(now)
            if not self.to_receiver and not self.to_sender:
                return
            while self.to_receiver:
                self.deliver_data(now)
            while self.to_sender:
                self.deliver_ack(now)


def pair(*, window_messages: int = 8, window_bytes: int = 1000, connect: bool = True) -> Wire:
    """Fresh ends; connected unless told otherwise."""
    receiver = Receiver(LINK, 1, window_messages=window_messages, window_bytes=window_bytes)
    wire = Wire(Sender(LINK, 1), receiver)
    if connect:
        wire.connect()
        wire.run()
    return wire


def submit(sender: Sender, values: list[object], first: int | None = None, places: Places | None = None) -> None:
    """Send values as one batch, with consecutive origins from `first` on."""
    if places is None:
        start = sender.numbered + 1 if first is None else first
        places = Places(0, range(start, start + len(values)))
    body, buffers = Codec().encode(values)
    sender.submit(body, buffers, places, 0)


def values(batch: Batch) -> list[object]:
    """What a batch holds, without doubles."""
    return Codec().decode(batch.body, batch.buffers)[batch.skip :]


def work(receiver: Receiver, mark: int = 0, now: float = 0.0) -> list[object]:
    """Work off all that is in the inbox; what was in it. It is settled once `mark` messages of the operator are."""
    got = []
    while receiver.inbox:
        batch = receiver.inbox.popleft()
        got += values(batch)
        batch.done(mark)
    return got


def kinds(frames: deque[Frame]) -> list[str]:
    """What is on the wire."""
    return [type(unpack(frame)).__name__.lower() for frame in frames]


def messages(frames: deque[Frame]) -> int:
    """Messages on the wire."""
    return sum(len(word.places) for frame in frames if isinstance(word := unpack(frame), Data))
