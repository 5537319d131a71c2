from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nomad.actor.journal import Journal
from nomad.delivery.frames import LANES, MOST_PATH, Position, step


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "journal")


def reopened(path: str) -> dict[int, Position]:
    journal = Journal(path)
    try:
        return journal.positions()
    finally:
        journal.close()


def test_a_new_journal_knows_nothing(path: str) -> None:
    assert reopened(path) == {}
    assert reopened(path) == {}
    assert os.stat(path).st_mode & 0o777 == 0o600


def test_it_remembers_the_last_position_of_each_lane(path: str) -> None:
    journal = Journal(path)
    journal.mark(0, Position(1))
    journal.mark(0, Position(5, step(3)))
    journal.mark(7, Position(2**64 - 1, bytes(MOST_PATH)))
    journal.mark(LANES - 1, Position(9))
    expected = {0: Position(5, step(3)), 7: Position(2**64 - 1, bytes(MOST_PATH)), LANES - 1: Position(9)}
    assert journal.positions() == expected
    journal.close()
    assert reopened(path) == expected


def test_a_shorter_path_replaces_a_longer_one(path: str) -> None:
    journal = Journal(path)
    for marked in (b"abcdef", b"abcdef", b"x", b"", b"yz"):
        journal.mark(0, Position(1, marked))
        assert journal.positions() == {0: Position(1, marked)}
    journal.close()


def test_one_store_marks_a_message_without_a_path(path: str) -> None:
    journal = Journal(path)
    slot = journal.slot(0)
    assert slot is not None
    page, word = slot
    page[word] = 41
    page[word] = 42
    assert journal.positions() == {0: Position(42)}
    journal.mark(0, Position(43, step(0)))
    assert journal.slot(0) is None, "behind a path, a store of the origin alone would not do"
    journal.mark(0, Position(44))
    assert journal.slot(0) is not None
    page.release()
    journal.close()


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(st.sampled_from([0, 1, 200]), st.integers(1, 2**64 - 1), st.binary(max_size=MOST_PATH)), max_size=20
    )
)
def test_what_was_marked_last_is_what_it_knows(tmp_path_factory: Callable, marks: list[tuple[int, int, bytes]]) -> None:
    path = str(tmp_path_factory.mktemp("journal") / "journal")  # type: ignore[attr-defined]
    journal = Journal(path)
    expected = {}
    for lane, origin, steps in marks:
        journal.mark(lane, Position(origin, steps))
        expected[lane] = Position(origin, steps)
    journal.close()
    assert reopened(path) == expected


def test_a_file_that_is_something_else_begins_anew(path: str) -> None:
    Path(path).write_bytes(b"garbage" * 1000)
    assert reopened(path) == {}


KILLED = """
import sys
from nomad.actor.journal import Journal
from nomad.delivery.frames import Position, step
journal = Journal(sys.argv[1])
page, word = journal.slot(0)
number = 0
while True:
    number += 1
    if sys.argv[2] == "store":
        page[word] = number
    else:
        journal.mark(0, Position(number, step(number % 300)))
    if number == 1000:
        print("ready", flush=True)
"""


@pytest.mark.parametrize("how", ["store", "mark"])
def test_it_survives_a_kill_at_any_moment(path: str, how: str) -> None:
    last = 0
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", KILLED, path, how], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        position = reopened(path)[0]
        assert position.origin >= 1000
        assert position.path == (b"" if how == "store" else step(position.origin % 300))
        last = max(last, position.origin)
        os.remove(path)


def test_what_another_instance_was_done_with_counts_where_it_is_ahead(path: str) -> None:
    journal = Journal(path)
    journal.mark(0, Position(5, step(1)))
    journal.mark(3, Position(9))
    journal.advance({0: Position(5, step(2)), 3: Position(8), 4: Position(1)})
    expected = {0: Position(5, step(2)), 3: Position(9), 4: Position(1)}
    assert journal.positions() == expected
    journal.close()
    assert reopened(path) == expected
