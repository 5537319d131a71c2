"""The pure parts of the client's HTTP half."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nomad import rest
from nomad.errors import MasterUnreachable
from nomad.rest import Event, EventDecoder

STREAM = (
    b": hello\n\ndata: 1\n\nevent: end\ndata:two\ndata: lines\n\n\n\nid: 7\nretry: 1\ndata:  x \r\n\r\n"
    b"event: empty\n\ndata: after\n\ndata: cut off"
)
EVENTS = [
    Event("message", b"1"),
    Event("end", b"two\nlines"),
    Event("message", b" x "),
    Event("message", b"after"),
]


@given(st.lists(st.integers(0, len(STREAM)), max_size=12).map(sorted))
def test_events_however_the_stream_is_cut(cuts: list[int]) -> None:
    edges = [0, *cuts, len(STREAM)]
    decoder = EventDecoder()
    events = [event for a, b in zip(edges, edges[1:], strict=False) for event in decoder.feed(STREAM[a:b])]
    assert events == EVENTS


def test_byte_by_byte() -> None:
    decoder = EventDecoder()
    assert [event for byte in STREAM for event in decoder.feed(bytes([byte]))] == EVENTS


@pytest.mark.parametrize("chunk", [b"x" * 100, b"data: " + b"x" * 100 + b"\n"], ids=["one line", "many lines"])
def test_an_endless_event_is_given_up(monkeypatch: pytest.MonkeyPatch, chunk: bytes) -> None:
    monkeypatch.setattr(rest, "MAX_EVENT", 1000)
    decoder = EventDecoder()
    for _ in range(9):
        assert list(decoder.feed(chunk)) == []
    with pytest.raises(MasterUnreachable, match="more than"):
        list(decoder.feed(chunk * 2))
