"""Any way of cutting a stream gives the same frames, and no length from the wire is trusted."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nomad.errors import FrameTooLarge
from nomad.transport.base import MAX_FRAME_BYTES, MAX_PARTS, Frame
from nomad.transport.framing import (
    FIRST_BYTES,
    IN_PLACE_BYTES,
    JOIN_BYTES,
    QUIET_READS,
    SCRATCH_BYTES,
    Splitter,
    encode,
)

BORDERS = [0, 1, 8, JOIN_BYTES - 1, JOIN_BYTES, IN_PLACE_BYTES - 1, IN_PLACE_BYTES, IN_PLACE_BYTES + 1, SCRATCH_BYTES]
sizes = st.one_of(st.integers(0, 40), st.sampled_from(BORDERS), st.integers(0, SCRATCH_BYTES))
frames = st.lists(st.lists(sizes, min_size=1, max_size=5).map(lambda found: tuple(map(content, found))), max_size=5)


def content(size: int) -> bytes:
    """`size` bytes that are different for other sizes and at other places."""
    return (struct.pack("<I", size * 2_654_435_761 & 0xFFFFFFFF) + bytes(range(251)))[: size % 255] + bytes(
        range(255)
    ) * (size // 255)


def feed(splitter: Splitter, data: bytes, chunks: Iterable[int]) -> list[Frame]:
    """What comes of `data` that arrives in reads of at most `chunks` bytes each, over and over."""
    found: list[Frame] = []
    view = memoryview(data)
    limits = list(chunks) or [len(data)]
    turn = 0
    while view:
        buffer = splitter.get_buffer()
        assert len(buffer) > 0
        count = min(len(buffer), len(view), limits[turn % len(limits)])
        buffer[:count] = view[:count]
        view = view[count:]
        splitter.buffer_updated(count, found)
        turn += 1
    return found


def plain(found: Iterable[Frame]) -> list[tuple[bytes, ...]]:
    return [tuple(map(bytes, frame)) for frame in found]


def stream(sent: Iterable[Frame]) -> bytes:
    return b"".join(encode(sent))


@given(frames, st.lists(st.integers(1, 3 * SCRATCH_BYTES), max_size=5))
def test_any_chunks_give_the_same_frames(sent: list[tuple[bytes, ...]], chunks: list[int]) -> None:
    splitter, whole = Splitter(), stream(sent)
    least = len(whole) // 500  # a megabyte by single bytes takes seconds, and shows no more than a kilobyte
    assert plain(feed(splitter, whole, [max(least, chunk) for chunk in chunks])) == sent
    assert not splitter.partial


@given(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=4), max_size=5))
def test_byte_by_byte(shapes: list[list[int]]) -> None:
    sent = [tuple(map(content, shape)) for shape in shapes]
    assert plain(feed(Splitter(), stream(sent), [1])) == sent


@given(frames, st.data())
def test_a_cut_stream_is_partial(sent: list[tuple[bytes, ...]], data: st.DataObject) -> None:
    whole = stream([*sent, (b"head", b"part")])
    cut = data.draw(st.integers(0, len(whole) - 1))
    splitter = Splitter()
    found = plain(feed(splitter, whole[:cut], []))
    assert found == sent[: len(found)]
    assert splitter.partial is (cut > len(stream(found)))


def test_received_buffers_own_their_bytes() -> None:
    splitter = Splitter()
    sent = [(b"a" * 10, b"b" * 100_000), (b"c" * 10, b"d" * 100_000)]
    first = feed(splitter, stream(sent[:1]), [50_000])
    second = feed(splitter, stream(sent[1:]), [50_000])
    assert plain(first + second) == sent
    assert all(isinstance(buffer, bytes) or buffer.readonly for frame in first + second for buffer in frame)


def test_a_large_payload_is_received_in_place() -> None:
    """From the second frame on, one read per frame, and not a byte of the payload goes through scratch."""
    splitter = Splitter()
    frame = (b"head", b"p" * 921_600, b"tail")
    feed(splitter, stream([frame]), [])
    data = memoryview(stream([frame] * 4))
    reads: list[int] = []
    found: list[Frame] = []
    while data:
        buffer = splitter.get_buffer()
        count = min(len(buffer), len(data))
        buffer[:count] = data[:count]
        data = data[count:]
        splitter.buffer_updated(count, found)
        reads.append(count)
    header, rest = 8 + 2 * 8 + len(b"head"), 921_600 + len(b"tail")
    assert reads == [header, rest + header, rest + header, rest + header, rest]
    assert plain(found) == [frame] * 4
    assert isinstance(found[0][1], memoryview)


def test_what_follows_a_large_payload_is_read_at_once_when_it_turns_out_small() -> None:
    splitter = Splitter()
    feed(splitter, stream([(b"h", b"p" * 921_600)]), [])
    found = feed(splitter, stream([(b"small",)] * 2), [])
    assert plain(found) == [(b"small",)] * 2
    assert len(splitter.get_buffer()) == SCRATCH_BYTES


def test_the_buffer_for_what_is_small_grows_as_it_is_needed() -> None:
    splitter = Splitter()
    sizes = [len(splitter.get_buffer())]
    for _ in range(3):
        found = feed(splitter, stream([(bytes(60),)] * 5000), [])
        assert len(found) == 5000
        sizes.append(len(splitter.get_buffer()))
    assert sizes[0] == FIRST_BYTES
    assert sizes[-1] == SCRATCH_BYTES
    quiet = Splitter()
    for _ in range(100):
        feed(quiet, stream([(bytes(1000),)] * 3), [])
    assert len(quiet.get_buffer()) == FIRST_BYTES


def test_the_buffer_for_what_is_small_shrinks_after_a_burst() -> None:
    splitter, small = Splitter(), [(b"small",)]
    feed(splitter, stream([(bytes(60),)] * 20_000), [])
    assert len(splitter.get_buffer()) == SCRATCH_BYTES
    whole = stream([(bytes(100), bytes(200))])
    for number in range(2 * QUIET_READS):
        assert plain(feed(splitter, whole, [150])) == [(bytes(100), bytes(200))], number
    assert len(splitter.get_buffer()) == FIRST_BYTES
    feed(splitter, stream([(bytes(60),)] * 20_000), [])
    for _ in range(10 * QUIET_READS):  # what is large comes again and again
        feed(splitter, stream([(b"h", b"p" * 200_000), *small]), [])
    assert len(splitter.get_buffer()) == SCRATCH_BYTES


@pytest.mark.parametrize("size", [0, 1, 50, FIRST_BYTES - 8, FIRST_BYTES - 7])
def test_a_frame_that_comes_alone_is_what_it_is_in_pieces(size: int) -> None:
    data = stream([(content(size),)])
    alone, pieces = Splitter(), Splitter()
    for _ in range(3):
        assert plain(feed(alone, data, [])) == plain(feed(pieces, data, [3, 7])) == [(content(size),)]
    assert not alone.partial
    alone.max_bytes = size - 1
    with pytest.raises(FrameTooLarge):
        feed(alone, data, [])


def test_what_is_discarded_always_finds_room() -> None:
    splitter = Splitter()
    feed(splitter, stream([(bytes(IN_PLACE_BYTES),)])[:-1], [])
    splitter.discard()
    for _ in range(3):
        assert len(splitter.get_buffer()) == SCRATCH_BYTES


def test_many_parts() -> None:
    sent = [(b"head", *[b"x"] * MAX_PARTS), (b"", *[b""] * 100)]
    assert plain(feed(Splitter(), stream(sent), [10_000])) == sent


@pytest.mark.parametrize(
    "announced",
    [
        struct.pack("<II", MAX_FRAME_BYTES + 1, 0),
        struct.pack("<II", 0, MAX_PARTS + 1),
        struct.pack("<IIQ", 1, 1, MAX_FRAME_BYTES),
        struct.pack("<IIQQ", 0, 2, 2**63, 2**63),
        struct.pack("<IIQ", 0, 1, 2**64 - 1),
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
def test_what_is_announced_too_large_is_refused_before_memory_is_taken(announced: bytes) -> None:
    for chunk in (1, len(announced)):
        splitter = Splitter()
        tracemalloc.start()
        with pytest.raises(FrameTooLarge):
            feed(splitter, announced, [chunk])
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 100_000


def test_what_was_complete_before_the_stream_went_wrong_is_kept() -> None:
    splitter = Splitter()
    data = stream([(b"fine",), (b"head", b"part")]) + b"\xff" * 8
    splitter.get_buffer()[: len(data)] = data
    found: list[Frame] = []
    with pytest.raises(FrameTooLarge):
        splitter.buffer_updated(len(data), found)
    assert found == [(b"fine",), (b"head", b"part")]


@given(frames, st.integers(0, 2 * SCRATCH_BYTES), st.lists(st.integers(1, 3 * SCRATCH_BYTES), min_size=1, max_size=5))
def test_a_frame_that_was_refused_comes_whole_once_the_limit_allows_it(
    sent: list[tuple[bytes, ...]], limit: int, chunks: list[int]
) -> None:
    splitter, data = Splitter(limit), memoryview(stream(sent))
    least = len(data) // 500
    found: list[Frame] = []
    turn = refused = 0
    while data:
        buffer = splitter.get_buffer()
        count = min(len(buffer), len(data), max(least, chunks[turn % len(chunks)]))
        buffer[:count], data = data[:count], data[count:]
        while True:
            try:
                splitter.buffer_updated(count, found)
                break
            except FrameTooLarge:
                with pytest.raises(FrameTooLarge):
                    splitter.buffer_updated(0, found)
                refused, count = refused + 1, 0
                before, splitter.max_bytes = splitter.max_bytes, MAX_FRAME_BYTES
                assert plain(found) == sent[: len(found)]
                frame = sent[len(found)]
                assert max(sum(map(len, frame)), 8 * (len(frame) - 1)) > before  # its lengths, or what they say
        if refused:
            splitter.max_bytes = limit
        turn += 1
    assert plain(found) == sent
    assert not splitter.partial


def test_no_memory_is_taken_for_what_is_over_a_small_limit() -> None:
    for announced in (struct.pack("<II", 5000, 0), struct.pack("<II", 1, 65_000), struct.pack("<IIQ", 1, 1, 1 << 29)):
        splitter = Splitter(1000)
        tracemalloc.start()
        with pytest.raises(FrameTooLarge):
            feed(splitter, announced, [])
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 10_000


def test_limits_of_encode() -> None:
    assert encode([(b"1234567890",), (b"12345", b"67890")], max_bytes=10)
    for too_large in [(b"123456", b"12345"), (b"12345678901",)]:
        with pytest.raises(FrameTooLarge, match="11 bytes"):
            encode([too_large], max_bytes=10)
    with pytest.raises(FrameTooLarge, match="11 bytes"):
        encode([(b"123456", b"12345")], max_bytes=10)
    with pytest.raises(FrameTooLarge, match="parts"):
        encode([(b"", *[b""] * (MAX_PARTS + 1))])
    with pytest.raises(ValueError, match="head"):
        encode([()])
    with pytest.raises(TypeError):
        encode([(memoryview(bytes(10))[::2],)])


def test_small_buffers_are_joined_and_large_ones_are_not_copied() -> None:
    large = bytes(JOIN_BYTES)
    out = encode([(b"a", b"b")] * 100 + [(b"head", large, b"c")] + [(b"d",)] * 100)
    assert len(out) == 3
    assert out[1] is large


def test_no_frames() -> None:
    assert encode([]) == []
