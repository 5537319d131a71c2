"""The short way of a message that comes alone leaves everything as the usual way does.

Two links live through the same: on one of them each message that may take the short way does, on the other none.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from nomad.delivery.codec import Codec
from nomad.delivery.frames import Places, step
from nomad.delivery.receiver import Batch, Receiver
from nomad.delivery.samples import LinkSamples
from nomad.delivery.sender import Sender
from nomad.delivery.states import Machine
from nomad.errors import ProtocolError
from nomad.transport.base import Frame
from tests.delivery.wire import LINK, Wire, flat, pair


def plain(value: Any) -> Any:
    """What two of a kind are compared by."""
    if isinstance(value, Batch):
        places = (value.places.lane, list(value.places.origins), value.places.paths)
        rest = [value.start, value.last, value.birth, value.skip, value.messages, value.nbytes, value.mark]
        return places, rest, bytes(value.body), list(map(bytes, value.buffers))
    if isinstance(value, memoryview):
        return bytes(value)
    if isinstance(value, deque | list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, LinkSamples):
        return {name: plain(item) for name, item in vars(value).items() if name != "sent"}
    return value.state if isinstance(value, Machine) else value


def state(end: Sender | Receiver) -> dict[str, Any]:
    return {name: plain(value) for name, value in vars(end).items()}


class Twin:
    """A link, and the operator behind it that works off each batch at once and sends nothing on."""

    def __init__(self, *, short: bool, **window: int) -> None:
        self.wire: Wire = pair(**window)
        self.window = window["window_messages"]
        self.short = short
        self.taken: list[str] = []
        """Which short ways were taken."""

    def send(self, sizes: list[int], lane: int, path: bytes, now: float) -> None:
        sender, codec = self.wire.sender, Codec()
        origin = sender.numbered + 1
        body, _ = codec.encode([bytes(size) for size in sizes])
        if self.short and len(sizes) == 1 and not path:
            before = state(sender)
            sent = sender.send_one(body, lane, origin, 7, now)
            if sent is not None:
                assert sender.room_for(None), "there is room for another one like it"
                assert sender.unsettled[0] < self.window
                self.wire.to_receiver += map(flat, sent)
                self.taken.append("send")
                self.collect(now)
                return
            assert state(sender) == before
        paths = [path] * len(sizes) if path else None
        sender.submit(body, [], Places(lane, range(origin, origin + len(sizes)), paths), 7)
        self.collect(now)

    def collect(self, now: float) -> None:
        self.wire.collect(now)

    def deliver(self, frame: Frame, now: float) -> str | None:
        """What the receiver says of a frame; the batch, if there is one, is worked off."""
        receiver = self.wire.receiver
        batch = None
        if self.short and len(frame) == 1:
            before = state(receiver)
            batch = receiver.receive_one(frame[0], now)
            if batch is not None:
                self.taken.append("receive")
            else:
                assert state(receiver) == before
        if batch is None:
            try:
                receiver.receive(frame, now)
            except ProtocolError as exc:
                return str(exc)
            if receiver.inbox:
                batch = receiver.inbox.popleft()
        if batch is not None:
            batch.done(0)
        return None


STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("send"), st.lists(st.sampled_from([0, 1, 30, 200]), min_size=1, max_size=3), st.integers(0, 1)
        ),
        st.tuples(st.just("send"), st.just([1]), st.just(0)),
        st.tuples(st.just("path"), st.just([1]), st.just(0)),
        st.tuples(st.just("deliver"), st.integers(1, 3)),
        st.tuples(st.just("again"), st.integers(0, 60)),
        st.tuples(st.just("settle")),
        st.tuples(st.just("hear"), st.integers(1, 3)),
        st.tuples(st.just("wait"), st.sampled_from([0.001, 0.03, 0.3, 6.0])),
        st.tuples(st.just("cut")),
    ),
    max_size=60,
)


@given(STEPS, st.sampled_from([2, 8]), st.sampled_from([2000, 20_000]))
def test_the_short_way_leaves_all_as_the_usual_one_does(steps: list[Any], messages: int, nbytes: int) -> None:
    twins = [Twin(short=short, window_messages=messages, window_bytes=nbytes) for short in (True, False)]
    now = 0.0
    for what, *args in steps:
        said = []
        now += args[0] if what == "wait" else 0.0
        for twin in twins:
            wire = twin.wire
            if what in ("send", "path"):
                twin.send(args[0], args[1], step(3) if what == "path" else b"", now)
            elif what == "deliver":
                for _ in range(min(args[0], len(wire.to_receiver))):
                    said.append(twin.deliver(wire.to_receiver.popleft(), now))
            elif what == "again" and wire.to_receiver:  # a frame that has nothing to do here, cut or not
                (head, *parts) = wire.to_receiver[0]
                said.append(twin.deliver((head[: len(head) - args[0]], *parts), now))
            elif what == "settle":
                wire.receiver.settle(0, now)
                twin.collect(now)
            elif what == "hear":
                for _ in range(min(args[0], len(wire.to_sender))):
                    wire.deliver_ack(now)
                twin.collect(now)
            elif what == "wait":
                wire.sender.tick(now)
                twin.collect(now)
            elif what == "cut":
                wire.cut()
                wire.connect(now)
                wire.run(now)
                wire.receiver.inbox.clear()
        half = len(said) // 2
        assert said[:half] == said[half:]
        short, usual = (twin.wire for twin in twins)
        assert state(short.sender) == state(usual.sender)
        assert state(short.receiver) == state(usual.receiver)
        assert [plain(frame) for frame in short.to_receiver] == [plain(frame) for frame in usual.to_receiver]
        assert [plain(frame) for frame in short.to_sender] == [plain(frame) for frame in usual.to_sender]


def test_the_short_way_is_taken_on_a_quiet_link() -> None:
    twin = Twin(short=True, window_messages=8, window_bytes=20_000)
    for number in range(20):
        twin.send([1], 0, b"", 0.1 * number)
        while twin.wire.to_receiver:
            twin.deliver(twin.wire.to_receiver.popleft(), 0.1 * number)
        twin.wire.receiver.settle(0, 0.1 * number)
        twin.wire.run(0.1 * number + 0.05)
    assert twin.taken.count("send") >= 19
    assert twin.taken.count("receive") >= 19


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 6), st.sampled_from([1, 30, 900, 3000, 20_000]), st.integers(1, 40)), max_size=20
    ),
    st.sampled_from([1, 2, 3, 8, 24]),
)
@example([(0, 1, 23), (5, 1, 1), (0, 1, 1)], 24)
def test_a_sender_holds_no_more_than_a_window(steps: list[tuple[int, int, int]], window: int) -> None:
    """Also where credit goes beyond it, as after a new connection, which grants some more."""
    receiver = Receiver(LINK, 1, window_messages=window, window_bytes=40_000)
    wire = Wire(Sender(LINK, 1), receiver)
    wire.connect()
    wire.run()
    now = 0.0
    each = [(what, size) for what, size, times in steps for _ in range(times if what < 3 else 1)]
    for number, (what, size) in enumerate(each):
        now += 0.1
        sender = wire.sender
        body = b"b" * size
        if what < 3:
            sent = sender.send_one(body, 0, number + 1, 7, now)
            if sent is not None:
                assert sender.room_for(size) > 0, "as Outbox.spare says"
                wire.to_receiver += sent
            elif sender.room_for(size):
                sender.submit(body, [], Places(0, range(number + 1, number + 2)), 7)
        elif what == 3:
            wire.collect(now)
        elif what == 4:
            wire.collect(now)
            while wire.to_receiver:
                wire.deliver_data(now)
            while receiver.inbox:
                receiver.inbox.popleft().done(0)
            receiver.settle(0, now)
            now += 1.0
            wire.collect(now)
            while wire.to_sender:
                wire.deliver_ack(now)
        elif what == 5:
            while wire.to_receiver:
                wire.deliver_data(now)
            wire.cut()
            wire.connect(now)
            wire.run(now)
        elif what == 6:
            sender.tick(now + 6.0)
        assert sender.unsettled[0] <= window
