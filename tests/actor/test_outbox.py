from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nomad.actor import outbox
from nomad.actor.outbox import BATCH_BYTES, BATCH_MESSAGES, LARGE_BATCH, Outbox
from nomad.clock import SystemClock
from nomad.delivery import frames
from nomad.delivery.codec import OUT_OF_BAND, Codec
from nomad.delivery.frames import Ack, Data, Places, Position, step, unpack
from nomad.delivery.receiver import Receiver
from nomad.delivery.sender import Sender
from tests.delivery.wire import LINK


class Link:
    """An outgoing link without a connection; what was flushed is decoded."""

    def __init__(self, window_messages: int = 1 << 20, window_bytes: int = 1 << 30) -> None:
        self.sender = Sender(LINK, 1)
        self.receiver = Receiver(LINK, 1, window_messages=window_messages, window_bytes=window_bytes)
        self.sender.connected()
        self.sender.welcomed(self.receiver.welcome(self.sender.hello()), 0.0)
        self.receiver.opened(1)
        (first,) = self.sender.take(0.0, 1)
        self.receiver.receive(first, 0.0)
        (credit,) = self.receiver.take(0.0)
        self.sender.receive(credit, 0.0)
        self.batches: list[Data] = []

    def flush(self) -> None:
        for frame in self.sender.take(0.0, 1 << 40):
            word = unpack(frame)
            if isinstance(word, Data):
                self.batches.append(word)

    @property
    def values(self) -> list[Any]:
        return [v for batch in self.batches for v in Codec().decode(batch.body, batch.buffers)]

    @property
    def positions(self) -> list[Position]:
        return [batch.places[k] for batch in self.batches for k in range(len(batch.places))]


def make(*links: Link, copy: bool = False) -> Outbox:
    return Outbox(list(links), Codec(), SystemClock(), copy=copy)  # type: ignore[arg-type]


def dense(count: int, first: int = 1) -> Places:
    return Places(0, range(first, first + count))


def test_values_go_out_with_their_places() -> None:
    link = Link()
    out = make(link)
    assert out.emit(["a", "b"], dense(2), birth=7) == []
    assert out.emit(["c"], Places(3, [9], [step(1)]), birth=8) == []
    assert link.values == ["a", "b", "c"]
    assert link.positions == [Position(1), Position(2), Position(9, step(1))]
    assert [(b.places.lane, b.birth) for b in link.batches] == [(0, 7), (3, 8)]
    assert out.numbered == 3


def test_every_successor_gets_a_full_copy_that_shares_its_bytes() -> None:
    links = Link(), Link()
    out = make(*links)
    array = np.arange(OUT_OF_BAND)
    out.emit([array, 5], dense(2), birth=0)
    for link in links:
        assert link.values[1] == 5
        assert np.shares_memory(link.values[0], array)


def test_without_successors_it_takes_everything() -> None:
    out = make()
    assert out.room == BATCH_MESSAGES
    assert out.emit([1], dense(1), birth=0) == []
    assert out.settled == out.numbered
    assert out.greeted


def test_copies_are_made_where_they_are_asked_for() -> None:
    link = Link()
    array = np.zeros(OUT_OF_BAND)
    make(link, copy=True).emit([array], dense(1), birth=0)
    array[:] = 1
    assert not link.values[0].any()


# Room


def test_room_is_what_all_successors_have() -> None:
    small, large = Link(window_messages=10), Link(window_messages=100)
    out = make(small, large)
    assert out.room == 1, "one at a time, until a size is known"
    out.emit([1], dense(1), birth=0)
    assert out.room == 9
    out.emit([1] * 9, dense(9, first=2), birth=0)
    assert out.room == 0


def test_what_is_known_of_the_room_is_never_too_much() -> None:
    link = Link(window_messages=10)
    out = make(link)
    assert out.spare == 0, "nobody has been heard, as far as it knows"
    out.emit([1], dense(1), birth=0)
    out.emit([1] * 4, dense(4, first=2), birth=0)
    assert out.spare == out.room == 5
    link.sender.receive(Ack(5, 15, 1 << 30, 5, 0.0).pack(), 0.0)
    assert (out.spare, out.room) == (5, 10)
    assert make().spare == BATCH_MESSAGES, "the last operator's results go nowhere"


def test_room_counts_bytes_too() -> None:
    link = Link(window_bytes=1000 + frames.BATCH_OVERHEAD)
    out = make(link)
    out.emit([bytes(97)], dense(1), birth=0)
    assert out.output_bytes == 100
    assert out.room == 9
    out.emit([bytes(897)], dense(1, first=2), birth=0)
    assert out.room == 0, "one message may overshoot"


def test_there_is_no_room_before_a_receiver_has_been_heard() -> None:
    link = Link()
    link.sender = Sender(LINK, 1)
    out = make(link)
    assert out.room == 0
    assert not out.greeted


def test_the_size_follows_what_is_sent() -> None:
    out = make(Link())
    assert out.output_bytes is None
    for number in range(50):
        out.emit([bytes(100)], dense(1, first=number + 1), birth=0)
    assert out.output_bytes == pytest.approx(103)
    for number in range(50, 100):
        out.emit([bytes(1000)], dense(1, first=number + 1), birth=0)
    assert out.output_bytes == pytest.approx(1004, rel=0.01)


# Batches


def test_batches_are_bounded_in_bytes() -> None:
    link = Link()
    out = make(link)
    out.emit([bytes(10_000)], dense(1), birth=0)
    values: list[Any] = [bytes(10_000)] * 100
    assert out.emit(values, dense(100, first=2), birth=0) == []
    assert link.values == [bytes(10_000)] * 101
    assert max(len(b.body) + sum(map(len, b.buffers)) for b in link.batches) <= BATCH_BYTES
    assert link.positions == [Position(n) for n in range(1, 102)]


def test_values_that_are_much_larger_than_the_last_ones_are_split() -> None:
    link = Link()
    out = make(link)
    out.emit([1] * 100, dense(100), birth=0)
    large = [np.zeros(300_000, "u1")] * 50
    assert out.emit(large, dense(50, first=101), birth=0) == []
    assert max(len(b.body) + sum(map(len, b.buffers)) for b in link.batches) <= LARGE_BATCH
    assert link.positions == [Position(n) for n in range(1, 151)]
    assert len(link.values) == 150


def test_one_message_may_be_larger_than_a_batch() -> None:
    link = Link()
    assert make(link).emit([bytes(4 * LARGE_BATCH)], dense(1), birth=0) == []
    assert link.values == [bytes(4 * LARGE_BATCH)]


@pytest.mark.parametrize("limit", ["LARGEST", "MAX_PARTS"])
def test_a_message_that_no_transport_takes_is_an_error_of_its_own(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, limit, 2 * LARGE_BATCH if limit == "LARGEST" else 2)
    link = Link()
    out = make(link)
    huge = [np.zeros(LARGE_BATCH, "u1")] * 3
    (bad,) = out.emit(["before", huge, "after"], dense(3), birth=0)
    assert bad.number == 1
    assert "can't be sent: the most is" in str(bad.error)
    assert link.values == ["before", "after"]
    assert link.positions == [Position(1), Position(3)]


# What can't be sent


@pytest.mark.parametrize("bad", [[0], [3], [0, 1, 2, 3], [0, 3], [1, 2]], ids=str)
def test_what_can_not_be_sent_is_returned_and_the_rest_is_sent(bad: list[int]) -> None:
    link = Link()
    out = make(link)
    values: list[Any] = [object() if k in bad else k for k in range(4)]
    unsendable = out.emit(values, dense(4), birth=0)
    assert [u.number for u in unsendable] == bad
    assert all("can't carry object" in str(u.error) for u in unsendable)
    assert link.values == [k for k in range(4) if k not in bad]
    assert link.positions == [Position(k + 1) for k in range(4) if k not in bad]
    assert out.numbered == 4 - len(bad)
    assert out.emit([4], dense(1, first=5), birth=0) == []
    assert link.values[-1] == 4


def test_their_numbers_are_those_of_all_results_however_they_are_batched() -> None:
    link = Link()
    out = make(link)
    out.emit([bytes(100_000)], dense(1), birth=0)
    values: list[Any] = [bytes(100_000)] * 10
    values[7] = object()
    (bad,) = out.emit(values, dense(10, first=2), birth=0)
    assert bad.number == 7
    assert len(link.values) == 10


def test_positions_of_generators_stay_with_their_values() -> None:
    link = Link()
    out = make(link)
    places = Places(0, [5, 5, 8, 8], [step(0), step(1), step(0), step(2)])
    out.emit(["a", object(), "b", "c"], places, birth=0)
    assert link.positions == [Position(5, step(0)), Position(8, step(0)), Position(8, step(2))]


def test_what_is_settled_is_what_all_successors_have_acknowledged() -> None:
    links = Link(), Link()
    out = make(*links)
    out.emit([1, 2], dense(2), birth=0)
    out.emit([3], dense(1, first=3), birth=0)
    assert out.settled == 0
    for link, settled, expected in ((links[0], 3, 0), (links[1], 2, 2), (links[1], 3, 3)):
        link.sender._acknowledged(unpack(ack(settled)), 0.0)  # type: ignore[arg-type]
        assert out.settled == expected
    assert out.settled == out.numbered


def ack(settled: int) -> Any:
    return Ack(settled, 100, 10**6, settled, 0.0).pack()
