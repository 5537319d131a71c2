from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nomad.delivery.frames import (
    INLINE_BODY,
    LANES,
    MOST_PATH,
    NOWHERE,
    Ack,
    Data,
    Ping,
    Places,
    Pong,
    Position,
    Resume,
    step,
    unpack,
)
from nomad.errors import ProtocolError
from nomad.transport.base import Frame
from tests.delivery.wire import flat

U64 = st.integers(0, 2**64 - 1)
BUFFERS = st.lists(st.binary(max_size=50), max_size=3)
STEPS = st.lists(st.integers(0, 2**40), max_size=8).map(lambda indices: b"".join(map(step, indices)))


@st.composite
def places(draw: Callable, most: int = 20) -> Places:
    """Origins that don't decrease, consecutive or with gaps, with and without paths."""
    count = draw(st.integers(1, most))
    first = draw(st.integers(0, 2**63))
    lane = draw(st.integers(0, LANES - 1))
    if draw(st.booleans()):
        origins: range | list[int] = range(first, first + count)
    else:
        origins = [first]
        for advance in draw(st.lists(st.integers(0, 2**32 - 1), min_size=count - 1, max_size=count - 1)):
            origins.append(origins[-1] + advance)
    paths = draw(st.none() | st.lists(STEPS, min_size=count, max_size=count))
    return Places(lane, origins, paths)


@st.composite
def data(draw: Callable) -> Data:
    where = draw(places())
    body = draw(st.binary(min_size=len(where), max_size=60)) * draw(st.sampled_from([1, INLINE_BODY]))
    return Data(draw(U64), where, draw(U64), body, draw(BUFFERS))


def same(a: Data, b: Data) -> bool:
    def plain(d: Data) -> object:
        origins, paths = list(d.places.origins), d.places.paths
        return d.seq, d.places.lane, origins, paths, d.birth, bytes(d.body), list(map(bytes, d.buffers))

    return plain(a) == plain(b)


@settings(max_examples=50)
@given(data())
def test_data_comes_back(word: Data) -> None:
    frame = word.pack()
    for arrived in (frame, flat(frame)):
        got = unpack(arrived)
        assert isinstance(got, Data)
        assert same(got, word)
        assert (type(got.places.origins) is range) == (type(word.places.origins) is range)


@given(
    st.builds(Ack, U64, U64, U64, U64, st.floats())
    | st.builds(Resume, U64, U64, U64)
    | st.sampled_from([Ping(), Pong()])
)
def test_control_comes_back(word: Ack | Resume | Ping | Pong) -> None:
    got = unpack(flat(word.pack()))
    if isinstance(word, Ack) and math.isnan(word.held):
        assert isinstance(got, Ack)
        word.held = got.held = 0.0
    assert got == word


def test_a_large_body_is_a_part_of_its_own_and_not_copied() -> None:
    body = bytes(INLINE_BODY + 1)
    buffer = bytes(10)
    frame = Data(0, Places(0, range(1, 3)), 0, body, [buffer]).pack()
    assert frame[1] is body
    assert frame[2] is buffer
    small = Data(0, Places(0, range(1, 3)), 0, b"ab", [buffer]).pack()
    assert len(small) == 2
    assert small[1] is buffer


def test_the_wire_format_byte_by_byte() -> None:
    """As docs/delivery.md has it."""
    dense = Data(7, Places(0, range(5, 7)), 9, b"\x92\x01\x02", [])
    assert dense.pack() == (
        b"\x01" b"\x00" b"\x00\x00" b"\x02\0\0\0" b"\x07\0\0\0\0\0\0\0" b"\x05\0\0\0\0\0\0\0" b"\x09\0\0\0\0\0\0\0"
        b"\x92\x01\x02",
    )  # fmt: skip
    sparse = Data(7, Places(3, [5, 5, 8], [step(0), step(1), step(300)]), 9, b"\x93\x01\x02\x03", [b"part"])
    assert sparse.pack() == (
        b"\x01" b"\x03" b"\x03\x00" b"\x03\0\0\0" b"\x07\0\0\0\0\0\0\0" b"\x05\0\0\0\0\0\0\0" b"\x09\0\0\0\0\0\0\0"
        b"\0\0\0\0" b"\0\0\0\0" b"\x03\0\0\0" b"\x01\x02\x03" b"\x00" b"\x01\x01" b"\x02\x01\x2c"
        b"\x93\x01\x02\x03",
        b"part",
    )  # fmt: skip
    ack = Ack(1, 2, 3, 4, 0.5)
    assert ack.pack() == (
        b"\x02" b"\x01\0\0\0\0\0\0\0" b"\x02\0\0\0\0\0\0\0" b"\x03\0\0\0\0\0\0\0"
        b"\x04\0\0\0\0\0\0\0" b"\0\0\0\0\0\0\xe0\x3f",
    )  # fmt: skip
    assert Ping().pack() == (b"\x03",)
    assert Pong().pack() == (b"\x04",)
    assert Resume(1, 2, 3).pack() == (b"\x05" + b"".join(n.to_bytes(8, "little") for n in (1, 2, 3)),)


# Frames that are none


@given(st.lists(st.binary(max_size=80), min_size=1, max_size=3))
def test_garbage_is_a_protocol_error(frame: Frame) -> None:
    for kind in (b"", *(bytes((k,)) for k in range(7))):
        try:
            unpack((kind + bytes(frame[0]), *frame[1:]))
        except ProtocolError:
            pass


@settings(max_examples=50)
@given(data(), st.data())
def test_a_truncated_or_damaged_head_is_a_protocol_error_or_data(word: Data, choose: st.DataObject) -> None:
    head, *parts = word.pack()
    cut = choose.draw(st.integers(0, len(head)))
    at = choose.draw(st.integers(0, len(head) - 1))
    for damaged in (head[:cut], head[:at] + bytes([choose.draw(st.integers(0, 255))]) + head[at + 1 :]):
        try:
            got = unpack((damaged, *parts))
        except ProtocolError:
            continue
        if isinstance(got, Data):  # what it says must be usable without a surprise
            assert 1 <= len(got.places) <= len(got.body)
            assert got.places[0].origin <= got.places[-1].origin


@pytest.mark.parametrize(
    "frame",
    [
        (b"",),
        (b"\x00",),
        (b"\x06",),
        (b"\x01",),
        (b"\x02" + bytes(39),),
        (b"\x05" + bytes(25),),
        (Data(0, Places(0, range(1, 2)), 0, b"", []).pack()),
        (Data(0, Places(0, range(1, 1 << 30)), 0, b"x", []).pack()),
        (Data(0, Places(0, [2**64 - 1, 2**64]), 0, b"xy", []).pack()),
        (Data(0, Places(0, range(1, 3)), 0, bytes(INLINE_BODY + 1), []).pack()[:1]),
        (Data(0, Places(LANES, range(1, 2)), 0, b"x", []).pack()),
        (Data(0, Places(0, [1], [bytes(MOST_PATH + 1)]), 0, b"x", []).pack()),
        (b"\x01\x03\x00\x00\xff\xff\xff\xff" + bytes(24),),
        (b"\x01\x02\x00\x00\x01\x00\x00\x00" + bytes(24) + b"\x05abc",),
    ],
    ids=[
        "empty", "no kind", "unknown kind", "no head", "short ack", "long resume", "no body",
        "more messages than bytes", "origin", "body lost", "lane", "path too long", "positions cut short",
        "paths cut short",
    ],
)  # fmt: skip
def test_what_is_refused(frame: Frame) -> None:
    with pytest.raises(ProtocolError):
        unpack(frame)


# Positions


@given(st.lists(st.integers(0, 2**64 - 1), max_size=5), st.lists(st.integers(0, 2**64 - 1), max_size=5))
def test_paths_are_ordered_as_their_steps_are(a: list[int], b: list[int]) -> None:
    path_a, path_b = (b"".join(map(step, indices)) for indices in (a, b))
    assert (path_a < path_b) == (a < b)
    assert (path_a == path_b) == (a == b)


@given(st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=2, unique=True))
def test_no_step_is_the_beginning_of_another(indices: list[int]) -> None:
    first, second = map(step, indices)
    assert not second.startswith(first)
    assert len(first) <= 9


def test_nowhere_is_before_everything() -> None:
    assert (
        NOWHERE
        < Position(0, step(0))
        < Position(1)
        < Position(1, step(0))
        < Position(1, step(0) + step(5))
        < Position(2)
    )


@settings(max_examples=50)
@given(places(), st.data())
def test_places_are_cut_and_picked_as_lists_are(where: Places, choose: st.DataObject) -> None:
    positions = [where[k] for k in range(len(where))]
    start, stop = sorted(choose.draw(st.tuples(st.integers(0, len(where)), st.integers(0, len(where)))))
    for numbers in (range(start, stop), choose.draw(st.lists(st.integers(0, len(where) - 1)))):
        got = where.pick(numbers)
        assert [got[k] for k in range(len(got))] == [positions[k] for k in numbers]
        assert got.lane == where.lane


@given(st.sets(st.builds(Position, st.integers(1, 5), STEPS), min_size=1), st.data())
def test_how_many_are_up_to_a_position(made: set[Position], choose: st.DataObject) -> None:
    positions = sorted(made)
    where = Places(0, [p.origin for p in positions], [p.path for p in positions])
    for position in (choose.draw(st.sampled_from(positions)), Position(choose.draw(st.integers(0, 6))), NOWHERE):
        assert where.up_to(position) == sum(p <= position for p in positions)


def test_consecutive_origins_cost_nothing_however_many() -> None:
    where = Places(0, range(1, 1 << 40))
    assert where.up_to(Position(1000)) == 1000
