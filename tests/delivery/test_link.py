from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nomad.delivery import frames
from nomad.delivery.codec import Codec
from nomad.delivery.frames import Ack, Data, Places, Position, step, unpack
from nomad.delivery.receiver import ACK_DELAY, Receiver
from nomad.delivery.sender import GIVE_UP, SILENCE, Sender, Tail
from nomad.delivery.states import State
from nomad.errors import Fenced, ProtocolError
from tests.delivery.wire import LINK, Wire, kinds, messages, pair, submit, values, work


def receive(receiver: Receiver, word: object, now: float = 0.0) -> bool:
    return receiver.receive(word.pack(), now)  # type: ignore[attr-defined]


def data(seq: int, content: list[object], first: int | None = None, places: Places | None = None) -> Data:
    start = seq + 1 if first is None else first
    body, buffers = Codec().encode(content)
    return Data(seq, places or Places(0, range(start, start + len(content))), 0, body, buffers)


# The ordinary course


def test_messages_arrive_in_order_and_are_settled() -> None:
    wire = pair()
    submit(wire.sender, [1, 2, 3])
    submit(wire.sender, [4])
    wire.run()
    assert [values(batch) for batch in wire.receiver.inbox] == [[1, 2, 3], [4]]
    assert wire.sender.unsettled[0] == 4
    assert work(wire.receiver) == [1, 2, 3, 4]
    wire.receiver.settle(0, now=0.0)
    wire.run(now=ACK_DELAY)
    assert wire.sender.unsettled == (0, 0)
    assert wire.receiver.unsettled == (0, 0)
    assert wire.sender.settled == 4
    assert (wire.receiver.accepted, wire.receiver.duplicates) == (4, 0)


def test_nothing_may_be_submitted_before_a_receiver_has_been_heard() -> None:
    wire = pair(connect=False)
    assert wire.sender.room == (0, 0)
    assert wire.sender.room_for(None) == 0
    assert not wire.sender.greeted
    wire.connect()
    assert wire.sender.greeted
    assert wire.sender.room == (8, 1000)


def test_one_message_at_a_time_until_a_size_is_known() -> None:
    wire = pair(window_messages=8, window_bytes=1000)
    assert wire.sender.room_for(None) == 1
    assert wire.sender.room_for(10.0) == 8
    assert wire.sender.room_for(300.0) == 3
    assert wire.sender.room_for(5000.0) == 1
    submit(wire.sender, [bytes(1000)])
    assert wire.sender.room_for(10.0) == 0


def test_a_batch_is_settled_when_what_came_of_it_is() -> None:
    """Marks are the numbers of the messages that the operator itself has sent."""
    wire = pair()
    for n in (1, 2, 3):
        submit(wire.sender, [n])
    wire.run()
    for batch, mark in zip(wire.receiver.inbox, (5, 7, 7), strict=True):
        batch.done(mark)
    wire.receiver.inbox.clear()
    for mark, settled in ((4, 0), (5, 1), (6, 1), (7, 3)):
        wire.receiver.settle(mark, now=0.0)
        wire.run(now=1.0)
        assert wire.sender.settled == settled
    assert wire.receiver.settled == {0: Position(3)}


def test_what_is_not_worked_off_holds_up_what_is_behind_it() -> None:
    wire = pair()
    submit(wire.sender, [1])
    submit(wire.sender, [2])
    wire.run()
    wire.receiver.inbox[1].done(0)
    wire.receiver.settle(100, now=0.0)
    wire.run(now=1.0)
    assert wire.sender.settled == 0


def test_a_batch_that_is_worked_off_gives_its_bytes_back() -> None:
    wire = pair()
    submit(wire.sender, [bytes(500)])
    wire.run()
    batch = wire.receiver.inbox[0]
    batch.done(0)
    assert len(batch.body) == 0
    assert len(batch.buffers) == 0
    assert wire.receiver.unsettled[1] > 500, "the sender keeps them: they count until they are settled"


# Credit


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 25)), max_size=60), st.randoms(use_true_random=False))
def test_credit_is_never_exceeded(sizes: list[tuple[int, int]], rng: object) -> None:
    """Whatever is submitted and whenever it is settled; the receiver refuses what exceeds it, and holds no more."""
    wire = pair(window_messages=5, window_bytes=100)
    waiting = list(sizes)
    now = 0.0
    while waiting or wire.receiver.inbox or wire.sender.unsettled[0]:
        now += ACK_DELAY
        assert now < len(sizes) + 1, "it stands still"
        if waiting and wire.sender.room_for(waiting[0][1] + 4.0) >= waiting[0][0]:
            count, size = waiting.pop(0)
            submit(wire.sender, [bytes(size)] * count)
        wire.run(now)
        held, nbytes = wire.receiver.unsettled
        assert held <= 5
        assert nbytes <= 100
        if wire.receiver.inbox and rng.random() < 0.5:  # type: ignore[attr-defined]
            wire.receiver.inbox.popleft().done(0)
            wire.receiver.settle(0, now)
    assert wire.sender.unsettled == (0, 0)


@pytest.mark.parametrize("limit", ["messages", "bytes"])
def test_the_sender_stops_at_its_credit_and_goes_on_when_there_is_more(limit: str) -> None:
    wire = pair(window_messages=4, window_bytes=100_000) if limit == "messages" else pair(window_bytes=4 * 11 + 10)
    for _ in range(7):
        submit(wire.sender, [b"12345678"])
    wire.collect(now=0.0)
    assert messages(wire.to_receiver) == 4
    assert wire.sender.blocked
    wire.run()
    work(wire.receiver)
    wire.receiver.settle(0, now=0.0)
    wire.run(now=1.0)
    assert len(wire.receiver.inbox) == 3
    assert not wire.sender.blocked


def test_a_message_larger_than_the_window_travels_alone() -> None:
    wire = pair(window_bytes=100)
    submit(wire.sender, [b"small"])
    submit(wire.sender, [bytes(5000)])
    submit(wire.sender, [b"behind"])
    wire.run()
    assert [values(b) for b in wire.receiver.inbox] == [[b"small"]]
    for expected in ([bytes(5000)], [b"behind"]):
        work(wire.receiver)
        wire.receiver.settle(0, now=0.0)
        wire.run(now=1.0)
        assert [values(b) for b in wire.receiver.inbox] == [expected]


def test_a_large_message_goes_on_after_a_cut_and_lets_nothing_pass() -> None:
    wire = pair(window_bytes=100)
    submit(wire.sender, [bytes(5000)])
    submit(wire.sender, [b"behind"])
    wire.run()
    wire.cut()
    wire.connect()
    wire.run()
    assert [len(values(b)[0]) for b in wire.receiver.inbox] == [5000]
    work(wire.receiver)
    wire.receiver.settle(0, now=0.0)
    wire.run(now=1.0)
    assert [values(b) for b in wire.receiver.inbox] == [[b"behind"]]


def test_a_sender_that_exceeds_its_credit_is_refused() -> None:
    wire = pair(window_messages=2)
    wire.run()
    receive(wire.receiver, data(0, [1, 2]))
    with pytest.raises(ProtocolError, match="exceeds its credit"):
        receive(wire.receiver, data(2, [3]))


def test_a_lost_or_repeated_acknowledgement_does_no_harm() -> None:
    wire = pair(window_messages=4)
    for n in range(4):
        submit(wire.sender, [n])
    wire.run()
    acks = []
    for batch in list(wire.receiver.inbox):
        batch.done(0)
        wire.receiver.settle(0, now=0.0)
        acks += wire.receiver.take(now=1.0)
    assert len(acks) == 4
    for ack in (acks[2], acks[2], acks[0], acks[3]):
        wire.sender.receive(ack, now=1.0)
    assert wire.sender.settled == 4
    assert wire.sender.room == (4, 1000)


def test_an_acknowledgement_of_what_was_never_sent_is_refused() -> None:
    wire = pair()
    wire.run()
    with pytest.raises(ProtocolError, match="never sent"):
        wire.sender.receive(Ack(5, 100, 100, 5, 0.0).pack(), 0.0)


def test_an_acknowledgement_settles_only_what_was_sent() -> None:
    wire = pair(window_messages=1)
    submit(wire.sender, [1])
    submit(wire.sender, [2])
    wire.run()
    wire.sender.receive(Ack(settled=2, credit_messages=1, credit_bytes=1000, echo=1, held=0.0).pack(), 0.0)
    assert wire.sender.settled == 1


# When acknowledgements go out


def test_an_acknowledgement_waits_for_a_quarter_of_the_window() -> None:
    wire = pair(window_messages=8)
    for n in range(4):
        submit(wire.sender, [n])
    wire.run()
    batches = list(wire.receiver.inbox)
    batches[0].done(0)
    wire.receiver.settle(0, now=5.0)
    assert wire.receiver.take(now=5.0) == []
    assert wire.receiver.deadline() == 5.0 + ACK_DELAY
    batches[1].done(0)
    wire.receiver.settle(0, now=5.0)
    (frame,) = wire.receiver.take(now=5.0)
    assert unpack(frame).settled == 2  # type: ignore[union-attr]
    assert wire.receiver.deadline() is None


def test_a_quarter_of_the_bytes_counts_too() -> None:
    wire = pair(window_messages=1000, window_bytes=400)
    submit(wire.sender, [bytes(100)])
    wire.run()
    work(wire.receiver)
    wire.receiver.settle(0, now=5.0)
    assert len(wire.receiver.take(now=5.0)) == 1


def test_an_acknowledgement_waits_no_longer_than_its_delay() -> None:
    wire = pair(window_messages=1000)
    submit(wire.sender, [1])
    submit(wire.sender, [2])
    wire.run()
    first, second = wire.receiver.inbox
    first.done(0)
    wire.receiver.settle(0, now=5.0)
    second.done(0)
    wire.receiver.settle(0, now=5.0 + ACK_DELAY * 0.9)
    assert wire.receiver.deadline() == 5.0 + ACK_DELAY, "the first sets the time"
    assert wire.receiver.take(now=5.0 + ACK_DELAY * 0.99) == []
    assert len(wire.receiver.take(now=5.0 + ACK_DELAY)) == 1
    assert wire.receiver.take(now=9.0) == []


def test_the_round_trip_is_timed_without_the_time_that_the_receiver_took() -> None:
    wire = pair()
    wire.run()
    assert wire.sender.samples.newest is None
    submit(wire.sender, [1])
    wire.collect(now=10.0)
    wire.deliver_data(now=10.25)
    work(wire.receiver)
    wire.receiver.settle(0, now=12.0)
    wire.collect(now=12.0 + ACK_DELAY)
    wire.deliver_ack(now=12.5 + ACK_DELAY)
    assert wire.sender.samples.newest == pytest.approx(0.75)


# Silence


def test_a_silent_peer_is_asked_and_then_given_up() -> None:
    wire = pair()
    wire.run(now=0.0)
    assert wire.sender.deadline() == SILENCE
    assert wire.sender.tick(now=SILENCE - 0.1)
    wire.collect(now=SILENCE - 0.1)
    assert not wire.to_receiver
    assert wire.sender.tick(now=SILENCE)
    wire.collect(now=SILENCE)
    assert kinds(wire.to_receiver) == ["ping"]
    assert wire.sender.deadline() == GIVE_UP
    assert wire.sender.tick(now=GIVE_UP - 0.1), "asked once only"
    assert wire.sender.take(GIVE_UP - 0.1, 1000) == []
    assert not wire.sender.tick(now=GIVE_UP)


def test_an_answer_keeps_the_connection() -> None:
    wire = pair()
    wire.run(now=0.0)
    wire.sender.tick(now=SILENCE)
    wire.collect(now=SILENCE)
    wire.deliver_data(now=SILENCE)
    assert wire.receiver.asked
    wire.collect(now=SILENCE)
    assert kinds(wire.to_sender) == ["pong"]
    wire.deliver_ack(now=SILENCE + 1)
    assert wire.sender.deadline() == SILENCE + 1 + SILENCE
    assert wire.sender.tick(now=GIVE_UP)


def test_a_receiver_may_ask_too() -> None:
    wire = pair()
    wire.run()
    wire.sender.receive(frames.Ping().pack(), now=0.0)
    wire.collect(now=0.0)
    assert kinds(wire.to_receiver) == ["pong"]
    assert not wire.deliver_data(now=0.0)


def test_a_link_that_is_not_open_has_no_deadlines() -> None:
    wire = pair(connect=False)
    assert (wire.sender.deadline(), wire.receiver.deadline()) == (None, None)
    assert wire.sender.tick(now=1e9)
    wire.connect()
    wire.run()
    wire.cut()
    assert (wire.sender.deadline(), wire.receiver.deadline()) == (None, None)
    assert wire.sender.take(0.0, 1000) == wire.receiver.take(0.0) == []


# Broken connections


def test_what_was_lost_on_the_way_is_sent_again() -> None:
    wire = pair()
    for n in range(5):
        submit(wire.sender, [n])
    wire.collect(now=0.0)
    for _ in range(3):
        wire.deliver_data(now=0.0)  # the sender's greeting and two batches
    wire.cut()
    wire.connect()
    wire.run()
    assert work(wire.receiver) == [0, 1, 2, 3, 4]
    assert (wire.receiver.accepted, wire.receiver.duplicates) == (5, 0)


def test_a_lost_acknowledgement_is_made_up_for() -> None:
    wire = pair()
    submit(wire.sender, [1])
    wire.run()
    work(wire.receiver)
    wire.receiver.settle(0, now=0.0)
    wire.collect(now=1.0)
    assert kinds(wire.to_sender) == ["ack"]
    wire.cut()
    wire.connect()
    wire.run()
    assert wire.sender.unsettled == (0, 0)
    assert not wire.receiver.inbox


def test_what_was_settled_while_the_link_was_down_is_acknowledged_at_once() -> None:
    wire = pair()
    submit(wire.sender, [1])
    wire.run()
    wire.cut()
    work(wire.receiver)
    wire.receiver.settle(0, now=0.0)
    wire.connect()
    wire.run(now=0.0)
    assert wire.sender.unsettled == (0, 0)


def test_messages_submitted_while_the_link_is_down_wait() -> None:
    wire = pair()
    wire.run()
    wire.cut()
    submit(wire.sender, [1])
    assert wire.sender.take(0.0, 1000) == []
    assert not wire.sender.blocked, "it isn't credit that they wait for"
    wire.connect()
    wire.run()
    assert work(wire.receiver) == [1]


def test_a_connection_replaces_one_that_is_not_known_to_be_broken() -> None:
    """Messages that still arrived over the old one come again over the new one, and are dropped."""
    wire = pair()
    for n in range(3):
        submit(wire.sender, [n])
    wire.collect(now=0.0)
    welcome = wire.greet()  # the receiver says what it has: nothing
    while wire.to_receiver:
        wire.deliver_data(now=0.0)  # and then gets it after all
    assert wire.receiver.accepted == 3
    wire.agree(welcome, now=0.0)
    wire.run()
    assert work(wire.receiver) == [0, 1, 2]
    assert wire.receiver.duplicates == 3
    wire.receiver.settle(0, now=0.0)
    wire.run(now=1.0)
    assert wire.sender.unsettled == (0, 0)


def test_a_repeated_message_larger_than_the_window_is_dropped_like_any() -> None:
    wire = pair(window_bytes=100)
    submit(wire.sender, [bytes(500)])
    wire.collect(now=0.0)
    welcome = wire.greet()
    while wire.to_receiver:
        wire.deliver_data(now=0.0)
    wire.agree(welcome, now=0.0)
    wire.run()
    assert work(wire.receiver) == [bytes(500)]
    wire.receiver.settle(0, now=0.0)
    wire.run(now=1.0)
    assert wire.receiver.duplicates == 1
    wire.receiver.settle(0, now=1.0)
    wire.run(now=2.0)
    assert wire.sender.unsettled == (0, 0)


def test_more_than_was_granted_comes_with_the_first_acknowledgement() -> None:
    """What was free during the handshake may be taken meanwhile, by messages over an older connection."""
    wire = pair(window_messages=3)
    for n in range(3):
        submit(wire.sender, [n], first=n + 1)
    old = wire.sender
    wire.collect(now=0.0)
    wire.sender = Sender(LINK, 2)
    wire.sender.connected()
    welcome = wire.receiver.welcome(wire.sender.hello())  # nothing is held
    while wire.to_receiver:
        wire.deliver_data(now=0.0)  # from the sender that is about to be replaced
    assert old.numbered == wire.receiver.unsettled[0] == 3
    wire.agree(welcome, now=0.0)
    for n in range(3, 6):
        submit(wire.sender, [n], first=n + 1)
    wire.run()
    assert wire.sender.blocked
    assert work(wire.receiver) == [0, 1, 2, 3]
    wire.receiver.settle(0, now=0.0)
    wire.run(now=1.0)
    assert work(wire.receiver) == [4, 5]


def test_the_first_messages_follow_the_greeting_at_once() -> None:
    wire = pair(window_messages=80, connect=False)
    wire.connect()
    for n in range(20):
        submit(wire.sender, [n])
    wire.collect(now=0.0)
    assert kinds(wire.to_receiver) == ["resume", *["data"] * 10], "an eighth of the window"
    wire.run()
    assert work(wire.receiver) == list(range(20))


def test_what_was_granted_before_is_not_granted_again() -> None:
    """However many senders come: a window is held, and an eighth of one more."""
    wire = pair(window_messages=16)
    for n in range(16):
        submit(wire.sender, [n], first=n + 1)
    wire.run()
    for epoch in (2, 3, 4):
        restarted_sender(wire, epoch)
        for n in range(16, 26):
            submit(wire.sender, [n], first=n + 1)
        wire.run()
        assert wire.receiver.unsettled[0] == 18, epoch
    assert wire.greet()["grant_messages"] == 0
    wire.connect()
    assert work(wire.receiver) == list(range(18))
    wire.receiver.settle(0, now=0.0)
    wire.run(now=1.0)
    assert work(wire.receiver) == list(range(18, 26))


def test_a_grant_that_was_taken_by_another_in_the_meantime_is_refused() -> None:
    wire = pair(window_messages=8)
    for n in range(8):
        submit(wire.sender, [n], first=n + 1)
    wire.run()
    late = Sender(LINK, 3)
    late.connected()
    welcome = wire.receiver.welcome(late.hello())
    restarted_sender(wire, 2)
    submit(wire.sender, [8], first=9)
    wire.run()
    assert wire.receiver.unsettled[0] == 9
    wire.sender = late
    wire.agree(welcome, now=0.0)
    submit(late, [8], first=9)
    submit(late, [9], first=10)
    wire.run()
    assert wire.receiver.unsettled[0] == 9, "a double weighs nothing"
    receiver = wire.receiver
    with pytest.raises(ProtocolError, match="exceeds its credit"):
        receive(receiver, data(1, [9], first=10))
    assert receiver.unsettled[0] == 9


def test_a_quiet_sender_greets_with_the_first_thing_it_has_to_send() -> None:
    wire = pair(connect=False)
    wire.sender = Sender(LINK, 1, quiet=True)
    wire.connect()
    assert wire.sender.greeted
    wire.sender.release()
    assert wire.sender.take(0.0, 1000) == []
    wire.cut()
    wire.connect()
    submit(wire.sender, [1])
    wire.sender.release()
    wire.collect(now=0.0)
    assert kinds(wire.to_receiver) == ["resume", "data"]
    wire.run()
    assert work(wire.receiver) == [1]
    wire.cut()
    wire.connect()
    wire.collect(now=0.0)
    assert kinds(wire.to_receiver) == ["resume"], "from then on the link is its"


def test_a_quiet_sender_that_has_caught_up_greets_with_nothing_to_send() -> None:
    wire = pair(connect=False)
    wire.sender = Sender(LINK, 1, quiet=True)
    wire.connect()
    wire.sender.release(caught_up=True)
    wire.collect(now=0.0)
    assert kinds(wire.to_receiver) == ["resume"]


@pytest.mark.parametrize("how", ["release", "ping"])
def test_a_quiet_sender_sends_nothing_until_it_is_released(how: str) -> None:
    """Or until the receiver, which hears nobody, asks."""
    wire = pair(connect=False)
    wire.sender = Sender(LINK, 1, quiet=True)
    wire.connect()
    submit(wire.sender, [1])
    submit(wire.sender, [2])
    assert wire.sender.take(0.0, 1000) == []
    wire.cut()
    wire.connect()
    assert wire.sender.take(0.0, 1000) == []
    if how == "release":
        wire.sender.release()
    else:
        wire.sender.receive(frames.Ping().pack(), now=0.0)
    wire.run()
    assert work(wire.receiver) == [1, 2]


def test_a_quiet_sender_has_what_was_received_from_another_one_settled() -> None:
    """There is nothing left to send, but all that came of its input is to be acknowledged."""
    wire = pair()
    submit(wire.sender, [1])
    wire.run()
    work(wire.receiver)
    wire.receiver.settle(0, now=0.0)
    wire.cut()
    wire.sender = Sender(LINK, 2, quiet=True)
    submit(wire.sender, [1])
    wire.sender.release()
    wire.connect()
    wire.run(now=1.0)
    assert wire.sender.unsettled == (0, 0)


def test_a_receiver_remembers_where_its_sender_began() -> None:
    """Over any number of connections."""
    wire = pair()
    assert wire.receiver.first == 0
    for n in range(3):
        submit(wire.sender, [n])
    wire.run()
    wire.cut()
    wire.connect()
    wire.run()
    assert wire.receiver.first == 0
    assert wire.receiver.progress == (3, 0)
    receiver = Receiver(LINK, 2, window_messages=8, window_bytes=1000, received={0: Position(2)})
    assert receiver.first is None
    wire.cut()
    wire.receiver = receiver
    wire.connect()
    wire.run()
    assert receiver.first == 2


def test_a_receiver_knows_when_it_has_caught_up() -> None:
    """With what its sender had when it greeted."""
    wire = pair(window_messages=16)
    for n in range(6):
        submit(wire.sender, [n])
    wire.run()
    wire.cut()
    wire.receiver = Receiver(LINK, 2, window_messages=16, window_bytes=1000)
    assert not wire.receiver.caught_up
    wire.connect()
    assert not wire.receiver.caught_up
    wire.collect(now=0.0)
    submit(wire.sender, [6])
    for _ in range(2):
        wire.deliver_data(now=0.0)
        assert not wire.receiver.caught_up
    wire.run()
    assert wire.receiver.caught_up


# A receiver that is left for its next instance


def moved(wire: Wire) -> Tail:
    """The sender prefers another receiver."""
    tail = wire.sender.tail()
    wire.cut_sender()
    wire.receiver = Receiver(LINK, 2, window_messages=8, window_bytes=1000)
    wire.connect()
    return tail


def test_it_goes_on_getting_what_is_new() -> None:
    wire = pair()
    old = wire.receiver
    submit(wire.sender, [1])
    submit(wire.sender, [2])
    wire.run()
    work(old)
    tail = moved(wire)
    assert tail.take() == []
    submit(wire.sender, [3])
    submit(wire.sender, [4])
    wire.run()
    for frame in tail.take():
        old.receive(frame, 0.0)
    assert tail.take() == []
    submit(wire.sender, [5])
    for frame in tail.take():
        old.receive(frame, 0.0)
    wire.run()
    assert work(old) == [3, 4, 5]
    assert work(wire.receiver) == [1, 2, 3, 4, 5]


def test_it_gets_no_more_than_it_has_given_credit_for() -> None:
    wire = pair(window_messages=4)
    submit(wire.sender, [1])
    wire.run()
    old, tail = wire.receiver, moved(wire)
    for n in range(2, 7):
        submit(wire.sender, [n])
    for frame in tail.take():
        old.receive(frame, 0.0)
    assert work(old) == [1, 2, 3, 4]


def test_it_gets_nothing_after_a_gap() -> None:
    """Its successor has settled what it should get next."""
    wire = pair()
    wire.run()
    tail = moved(wire)
    submit(wire.sender, [1])
    wire.run()
    work(wire.receiver)
    wire.receiver.settle(0, now=1.0)
    wire.run(now=2.0)
    submit(wire.sender, [2])
    assert wire.sender.unsettled[0] == 1
    assert tail.take() == []


def test_a_sender_greets_once() -> None:
    wire = pair()
    with pytest.raises(ProtocolError, match="resumed twice"):
        receive(wire.receiver, frames.Resume(0, 0, 0))


def test_data_must_follow_the_greeting_in_order() -> None:
    wire = pair(connect=False)
    wire.connect()
    with pytest.raises(ProtocolError, match="data before resume"):
        receive(wire.receiver, data(0, [1]))
    wire.run()
    receive(wire.receiver, data(0, [1]))
    for seq in (0, 2):
        with pytest.raises(ProtocolError, match=f"expected message 1, got {seq}"):
            receive(wire.receiver, data(seq, [2]))


def test_each_side_refuses_the_words_of_its_own() -> None:
    wire = pair()
    wire.run()
    with pytest.raises(ProtocolError, match="a sender sent Ack"):
        receive(wire.receiver, Ack(0, 0, 0, 0, 0.0))
    for word in (data(0, [1]), frames.Resume(0, 0, 0)):
        with pytest.raises(ProtocolError, match="a receiver sent"):
            wire.sender.receive(word.pack(), 0.0)


# Instances that start anew


def restarted_sender(wire: Wire, epoch: int = 2) -> None:
    wire.cut()
    wire.sender = Sender(LINK, epoch)
    wire.connect()


def restarted_receiver(wire: Wire, epoch: int = 2, received: dict[int, Position] | None = None) -> None:
    wire.cut()
    wire.receiver = Receiver(LINK, epoch, window_messages=8, window_bytes=1000, received=received)
    wire.connect()


def test_a_new_receiver_gets_all_that_is_not_settled() -> None:
    wire = pair()
    for n in range(4):
        submit(wire.sender, [n])
    wire.run()
    wire.receiver.inbox.popleft().done(0)
    wire.receiver.settle(0, now=0.0)
    wire.run(now=1.0)
    restarted_receiver(wire)
    wire.run(now=1.0)
    assert work(wire.receiver) == [1, 2, 3]


def test_a_new_receiver_that_remembers_skips_what_it_was_done_with() -> None:
    """Within a batch, too."""
    wire = pair()
    submit(wire.sender, ["a", "b"])
    submit(wire.sender, ["c", "d", "e"])
    wire.run()
    restarted_receiver(wire, received={0: Position(3)})
    wire.run()
    assert work(wire.receiver) == ["d", "e"]
    assert wire.receiver.duplicates == 1
    wire.receiver.settle(0, now=0.0)
    wire.run(now=1.0)
    assert wire.sender.unsettled == (0, 0)


def test_a_new_sender_repeats_in_other_batches() -> None:
    """It works off the same input in chunks of other sizes: what its predecessor sent is recognised by position."""
    wire = pair(window_messages=16)
    submit(wire.sender, [1, 2, 3], first=1)
    submit(wire.sender, [4, 5], first=4)
    wire.run()
    restarted_sender(wire)
    wire.run()
    submit(wire.sender, [1, 2], first=1)
    submit(wire.sender, [3, 4, 5, 6], first=3)
    submit(wire.sender, [7], first=7)
    wire.run()
    assert work(wire.receiver) == [1, 2, 3, 4, 5, 6, 7]
    assert (wire.receiver.accepted, wire.receiver.duplicates) == (7, 5)
    wire.receiver.settle(0, now=0.0)
    wire.run(now=1.0)
    assert wire.sender.unsettled == (0, 0)


def test_positions_with_paths_are_recognised_too() -> None:
    wire = pair()
    path = step(1)
    submit(wire.sender, ["a", "b"], places=Places(0, [7, 7], [path + step(0), path + step(1)]))
    wire.run()
    restarted_sender(wire)
    again = Places(0, [7, 7, 7], [path + step(1), path + step(2), step(2) + step(0)])
    submit(wire.sender, ["b", "c", "d"], places=again)
    wire.run()
    assert work(wire.receiver) == ["a", "b", "c", "d"]


def test_lanes_are_counted_apart() -> None:
    wire = pair()
    submit(wire.sender, ["main"], places=Places(0, range(100, 101)))
    submit(wire.sender, ["again"], places=Places(2, [5], [step(0)]))
    wire.run()
    restarted_sender(wire)
    submit(wire.sender, ["again"], places=Places(2, [5], [step(0)]))
    submit(wire.sender, ["main"], places=Places(0, range(100, 101)))
    submit(wire.sender, ["newer"], places=Places(2, [6], [step(0)]))
    submit(wire.sender, ["next"], places=Places(0, range(101, 102)))
    wire.run()
    assert work(wire.receiver) == ["main", "again", "newer", "next"]
    wire.cut()
    wire.connect()
    wire.collect(now=0.0)
    assert kinds(wire.to_receiver) == ["resume"], "the sender knows what the receiver has in each lane"


def test_a_repeated_batch_is_settled_only_after_the_original() -> None:
    wire = pair()
    submit(wire.sender, [1])
    wire.run()
    restarted_sender(wire)
    submit(wire.sender, [1], first=1)
    wire.run(now=1.0)
    assert wire.receiver.duplicates == 1
    assert wire.sender.settled == 0, "nobody has acknowledged it yet: the new sender must keep it"
    batch = wire.receiver.inbox.popleft()
    batch.done(3)
    wire.receiver.settle(2, now=1.0)
    wire.run(now=2.0)
    assert wire.sender.settled == 0
    wire.receiver.settle(3, now=2.0)
    wire.run(now=3.0)
    assert wire.sender.settled == 1


def test_a_new_sender_is_not_acknowledged_in_the_numbers_of_the_old_one() -> None:
    """What is settled between the handshake and the sender's first frame: the receiver doesn't know its numbers yet."""
    wire = pair()
    for n in range(5):
        submit(wire.sender, [n], first=n + 1)
    wire.run()
    work(wire.receiver)
    wire.cut()
    wire.sender = Sender(LINK, 2)
    wire.agree(wire.greet(), now=0.0)
    wire.receiver.settle(0, now=0.0)
    assert wire.receiver.take(now=1.0) == []
    assert wire.receiver.deadline() is None
    submit(wire.sender, ["new"], first=6)
    wire.run(now=1.0)
    assert wire.sender.settled == 0
    assert work(wire.receiver) == ["new"]


def test_credit_stays_absolute_over_a_new_sender() -> None:
    """The old sender's messages fill the window; the new one gets room as they are settled."""
    wire = pair(window_messages=3)
    for n in range(3):
        submit(wire.sender, [n], first=n + 1)
    wire.run()
    restarted_sender(wire)
    for n in range(3, 6):
        submit(wire.sender, [n], first=n + 1)
    wire.run()
    assert wire.receiver.unsettled[0] == 3 + 1, "and what was granted"
    assert wire.sender.blocked
    assert work(wire.receiver) == [0, 1, 2, 3]
    wire.receiver.settle(0, now=0.0)
    wire.run(now=1.0)
    assert work(wire.receiver) == [4, 5]


# Fencing


def test_a_sender_of_an_older_epoch_is_refused() -> None:
    wire = pair()
    wire.run()
    restarted_sender(wire, epoch=2)
    with pytest.raises(Fenced, match="the sender is of epoch 1, 2 has been heard"):
        wire.receiver.welcome(Sender(LINK, 1).hello())


def test_a_receiver_of_an_older_epoch_is_refused() -> None:
    wire = pair()
    restarted_receiver(wire, epoch=2)
    wire.cut()
    wire.receiver = Receiver(LINK, 1, window_messages=8, window_bytes=1000)
    with pytest.raises(Fenced, match="the receiver is of epoch 1, 2 has been heard"):
        wire.connect()
    assert wire.sender.machine.state is State.HELLO


def test_an_announced_epoch_fences_before_it_is_heard() -> None:
    wire = pair(connect=False)
    wire.receiver.expect(2)
    with pytest.raises(Fenced):
        wire.connect()
    wire = pair(connect=False)
    wire.sender.expect(2)
    with pytest.raises(Fenced):
        wire.connect()
    wire.sender.expect(1)
    assert wire.sender.peer_epoch == 2, "an older announcement takes nothing back"


def test_an_epoch_announced_during_the_handshake_fences() -> None:
    wire = pair(connect=False)
    welcome = wire.greet()
    wire.receiver.expect(2)
    with pytest.raises(Fenced, match="epoch 1, 2 has been heard"):
        wire.agree(welcome, now=0.0)
    assert wire.receiver.machine.state is State.NEW


@pytest.mark.parametrize("epoch", [None, "1", 1.0, float("inf"), [1]])
def test_a_hello_without_an_epoch_is_refused(epoch: object) -> None:
    wire = pair(connect=False)
    with pytest.raises(ProtocolError, match="a hello with epoch"):
        wire.receiver.welcome({} if epoch is None else {"epoch": epoch})


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": "x"}, {"epoch": float("inf")}, {"received": 5}, {"received": [[0, 1]]}, {"received": [["x", 1, b""]]},
        {"received": [[0, 1, "path"]]}, {"received": [[0, 1, 10**12]]}, {"window_bytes": []}, {"grant_bytes": None},
    ],
    ids=repr,
)  # fmt: skip
def test_a_malformed_welcome_is_refused(change: dict[str, object]) -> None:
    wire = pair(connect=False)
    welcome = {**wire.greet(), **change}
    with pytest.raises(ProtocolError, match="malformed welcome"):
        wire.sender.welcomed(welcome, 0.0)


def test_the_end() -> None:
    wire = pair()
    submit(wire.sender, [1])
    wire.run()
    wire.sender.close()
    wire.receiver.close()
    assert wire.sender.machine.state is wire.receiver.machine.state is State.CLOSED
    assert wire.sender.take(0.0, 1000) == wire.receiver.take(0.0) == []
    with pytest.raises(ProtocolError, match="not allowed in state closed"):
        wire.sender.connected()
