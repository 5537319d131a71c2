from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nomad.delivery.states import TABLE, Event, Machine, State
from nomad.errors import ProtocolError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("event", Event)
def test_what_is_not_in_the_table_is_refused(state: State, event: Event) -> None:
    machine = Machine("p:a>b")
    machine.state = state
    if (state, event) in TABLE:
        assert machine.fire(event) is machine.state is TABLE[state, event]
    else:
        with pytest.raises(ProtocolError, match=f"link p:a>b: {event} is not allowed in state {state}"):
            machine.fire(event)
        assert machine.state is state


def test_the_table() -> None:
    """Written down a second time, so that a change of it is meant."""
    new, hello, is_open, lost, closed = State
    connected, agreed, disconnected, close = Event
    expected = {
        (new, connected): hello,
        (hello, agreed): is_open,
        (hello, disconnected): lost,
        (is_open, disconnected): lost,
        (lost, connected): hello,
        (hello, connected): hello,
        (is_open, connected): hello,
        (new, close): closed,
        (hello, close): closed,
        (is_open, close): closed,
        (lost, close): closed,
        (closed, close): closed,
    }
    assert expected == TABLE


@given(st.lists(st.sampled_from(Event), max_size=30))
def test_only_a_handshake_opens_and_only_close_closes(events: list[Event]) -> None:
    machine = Machine("p:a>b")
    for event in events:
        before = machine.state
        try:
            machine.fire(event)
        except ProtocolError:
            assert machine.state is before
        if machine.state is State.OPEN and before is not State.OPEN:
            assert (before, event) == (State.HELLO, Event.AGREED)
        if before is State.CLOSED:
            assert machine.state is State.CLOSED


def test_an_error_tells_the_recent_history() -> None:
    machine = Machine("p:a>b")
    for _ in range(20):
        machine.fire(Event.CONNECTED)
        machine.fire(Event.DISCONNECTED)
    with pytest.raises(ProtocolError) as caught:
        machine.fire(Event.DISCONNECTED)
    assert "hello-[disconnected]->lost" in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_the_document_shows_the_table() -> None:
    """docs/make_states.py writes it there."""
    command = [sys.executable, str(ROOT / "docs" / "make_states.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
