from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nomad import setaside
from nomad.delivery.frames import Position, step
from nomad.errors import NomadError, describe
from nomad.setaside import SetAside, StoreFull

ERROR = {"type": "ValueError", "message": "no", "traceback": "Traceback ..."}
NOTHING: dict[int, Position] = {}

Open = Callable[[], SetAside]


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[Open]:
    opened: list[SetAside] = []

    def make() -> SetAside:
        for store in opened:
            store.close()
        opened.append(SetAside(str(tmp_path / "set-aside.db")))
        return opened[-1]

    yield make
    for store in opened:
        store.close()


def test_a_store_without_messages_makes_no_file(open_store: Open, tmp_path: Path) -> None:
    store = open_store()
    assert store.records() == store.reruns() == []
    assert store.remove(None, NOTHING) == 0
    assert not store.kept
    assert os.listdir(tmp_path) == []


def test_messages_are_kept_with_their_error(open_store: Open) -> None:
    store = open_store()
    try:
        raise ValueError("no")
    except ValueError as exc:
        error = describe(exc)
    store.add(0, Position(5), b"value", error, 3, sent=2)
    for find in (lambda: store, open_store):
        again = find()
        (record,) = again.records()
        assert (record.lane, record.position, record.value) == (0, Position(5), b"value")
        assert (record.attempts, record.sent) == (3, 2)
        assert record.error["type"] == "ValueError"
        assert "test_setaside.py" in record.error["traceback"]
        assert set(record.as_data()) == {"id", "time", "error", "attempts", "value"}
        assert again.count == 1


def test_a_message_is_kept_once(open_store: Open) -> None:
    store = open_store()
    for _ in range(2):
        store.add(0, Position(5, step(1)), b"value", ERROR, 1)
    store.add(1, Position(5, step(1)), b"other lane", ERROR, 1)
    store.add(0, Position(5, step(2)), b"other path", ERROR, 1)
    assert [r.value for r in store.records()] == [b"value", b"other lane", b"other path"]
    assert store.count == 3


def test_only_an_earlier_instance_is_asked_about(open_store: Open) -> None:
    """Within one life no message comes twice."""
    store = open_store()
    store.add(0, Position(5, step(1)), b"", ERROR, 1)
    assert not store.kept
    store = open_store()
    assert store.kept
    assert store.holds(0, Position(5, step(1)))
    assert not store.holds(0, Position(5))
    assert not store.holds(1, Position(5, step(1)))
    assert store.covers(0, 5)
    assert store.covers(0, 4)
    assert not store.covers(0, 6)
    assert not store.covers(1, 5)


def test_records_are_found_by_id_oldest_first(open_store: Open) -> None:
    store = open_store()
    for number in range(4):
        store.add(0, Position(9 - number), bytes([number]), ERROR, 1)
    ids = [r.id for r in store.records()]
    assert ids == sorted(ids)
    assert [r.value for r in store.records([ids[3], ids[1], 999])] == [b"\1", b"\3"]
    assert store.remove([ids[0], 999], NOTHING) == 1
    assert [r.id for r in store.records()] == ids[1:]
    assert store.remove(None, NOTHING) == 3
    assert store.count == 0


def test_a_second_failure_replaces_the_first(open_store: Open) -> None:
    store = open_store()
    store.add(0, Position(5), b"value", ERROR, 1)
    (record,) = store.records()
    store.failed_again(record, {**ERROR, "message": "again"})
    (again,) = store.records()
    assert (again.error["message"], again.attempts) == ("again", 2)
    assert again.time >= record.time


def test_a_message_that_is_gone_is_remembered_until_it_is_settled(open_store: Open) -> None:
    store = open_store()
    for origin in (5, 6, 7):
        store.add(0, Position(origin), b"value", ERROR, 1)
    store.remove(None, settled={0: Position(5, step(9)), 3: Position(100)})
    store = open_store()
    assert store.records() == []
    assert store.count == 0
    assert [store.holds(0, Position(origin)) for origin in (5, 6, 7)] == [False, True, True]
    store.add(0, Position(8), b"value", ERROR, 1)
    store.remove(None, settled={0: Position(8)})
    assert not open_store().kept


def test_what_came_of_a_message_takes_its_place(open_store: Open) -> None:
    store = open_store()
    for origin in (5, 6):
        store.add(0, Position(origin), b"value", ERROR, 1)
    first, second = store.records()
    store.ran(second, 11, b"of the second", NOTHING)
    store.ran(first, 12, b"of the first", NOTHING)
    assert store.count == 0
    store = open_store()
    assert store.reruns() == [(11, b"of the second"), (12, b"of the first")]
    assert store.records() == []
    assert store.holds(0, Position(5)), "its input may come again"
    store.delivered(11)
    assert open_store().reruns() == [(12, b"of the first")]


@pytest.mark.parametrize("limit", ["MOST_MESSAGES", "MOST_BYTES"])
def test_a_full_store_refuses_instead_of_forgetting(
    open_store: Open, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setaside, limit, 30)
    store = open_store()
    most = 30 if limit == "MOST_MESSAGES" else 6
    for origin in range(1, most + 1):
        store.add(0, Position(origin), b"12345", ERROR, 1)
    with pytest.raises(StoreFull, match="run them again or drop them"):
        store.add(0, Position(1000), b"12345", ERROR, 1)
    assert store.count == most
    full = open_store()
    with pytest.raises(StoreFull):
        full.add(0, Position(1000), b"12345", ERROR, 1)
    full.remove([full.records()[0].id], NOTHING)
    full.add(0, Position(1000), b"12345", ERROR, 1)


def test_without_a_folder_it_is_kept_in_memory() -> None:
    store = SetAside(None)
    store.add(0, Position(5), b"value", ERROR, 1)
    assert store.count == len(store.records()) == 1
    store.close()


KILLED = """
import sys
from nomad.setaside import SetAside
from nomad.delivery.frames import Position
store = SetAside(sys.argv[1])
for origin in range(1, 1000):
    store.add(0, Position(origin), b"value", {"type": "", "message": "", "traceback": ""}, 1)
    if origin % 3 == 0:
        store.ran(store.records()[-1], origin, b"results", {})
    print(origin, flush=True)
"""


def test_it_survives_a_kill_at_any_moment(tmp_path: Path) -> None:
    path = str(tmp_path / "set-aside.db")
    process = subprocess.Popen([sys.executable, "-c", KILLED, path], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(20):
        seen = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    store = SetAside(path)
    kept = [r.position.origin for r in store.records()] + [number for number, _ in store.reruns()]
    assert set(range(1, seen + 1)) <= set(kept)
    assert len(kept) == len(set(kept))
    assert all(store.holds(0, Position(origin)) for origin in range(1, seen + 1))
    store.close()


def test_another_process_writes_and_this_one_reads_it_again(tmp_path: Path) -> None:
    """While an operator moves: one at a time writes."""
    path = str(tmp_path / "set-aside.db")
    first, second = SetAside(path), SetAside(path)
    first.add(0, Position(1), b"one", ERROR, 1)
    first.add(0, Position(2), b"two", ERROR, 1)
    second.reload()
    assert second.count == 2
    assert second.holds(0, Position(2))
    first.close()  # the kill of the one before changes nothing
    assert second.remove([second.records()[0].id], NOTHING) == 1
    second.add(0, Position(3), b"three", ERROR, 1)
    first = SetAside(path)
    assert [record.value for record in first.records()] == [b"two", b"three"]
    assert first.holds(0, Position(1)), "it may come again"
    second.ran(second.records()[0], 7, b"result", {0: Position(3)})
    first.reload()
    assert first.count == 1
    assert not first.holds(0, Position(1))
    assert not first.covers(0, 9)
    assert first.reruns() == [(7, b"result")]
    for store in (first, second):
        store.close()


def test_it_goes_from_one_folder_to_another_part_by_part(tmp_path: Path) -> None:
    paths = [tmp_path / name / "set-aside.db" for name in ("old", "new")]
    for path in paths:
        path.parent.mkdir()
    old, new = (SetAside(str(path)) for path in paths)
    for n in range(20):
        old.add(0, Position(n), bytes(1000), ERROR, 1)
    old.ran(old.records()[0], 7, b"result", NOTHING)
    offset, more = 0, True
    while more:
        data, more = old.part(offset, 10_000)
        assert len(data) <= 10_000
        assert new.count == 0, "only the whole counts"
        new.take(offset, data, last=not more)
        offset += len(data)
    assert offset > 20_000
    assert new.records() == old.records()
    assert new.reruns() == old.reruns() == [(7, b"result")]
    assert new.kept == {(0, Position(n)) for n in range(20)}
    assert sorted(path.name for path in paths[1].parent.iterdir() if "-" not in path.suffix) == ["set-aside.db"]
    new.take(0, b"some", last=False)
    with pytest.raises(NomadError, match="a part is missing before byte 5"):
        new.take(5, b"more", last=True)
    for store in (old, new):
        store.close()


def test_nothing_set_aside_is_nothing_to_hand_over(tmp_path: Path) -> None:
    old, new = SetAside(str(tmp_path / "old.db")), SetAside(str(tmp_path / "new.db"))
    assert old.part(0, 100) == (b"", False)
    new.take(0, b"", last=True)
    assert list(tmp_path.iterdir()) == []
    homeless = SetAside(None)
    homeless.take(0, b"", last=True)
    with pytest.raises(NomadError, match="no folder"):
        homeless.take(0, b"x", last=False)


def test_records_page_by_page(open_store: Open) -> None:
    store = open_store()
    assert store.page(0, 1) == []
    for number in range(5):
        store.add(0, Position(number), bytes(1000), ERROR, 1)
    pages: list[list[int]] = []
    while page := store.page(pages[-1][-1] if pages else 0, 1500):
        pages.append([record.id for record in page])
    assert pages == [[1, 2], [3, 4], [5]]
    assert [record.id for record in store.page(0, 1)] == [1]
