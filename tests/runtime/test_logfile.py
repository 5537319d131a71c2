from __future__ import annotations

from pathlib import Path

import pytest

from nomad.runtime.logfile import LogFile

LIMIT = 100


@pytest.fixture
def log(tmp_path: Path) -> LogFile:
    return LogFile(tmp_path / "pod.log", LIMIT)


def append(log: LogFile, text: str) -> None:
    with log.path.open("a") as file:
        file.write(text)


def test_no_file_is_an_empty_log(log: LogFile) -> None:
    assert log.tail() == []
    assert not log.rotate()
    assert log.reader().lines() == []


def test_lines_from_now_on(log: LogFile) -> None:
    append(log, "before\nhalf ")
    reader = log.reader()
    append(log, "a line\none\ntw")
    assert reader.lines() == ["one"]
    append(log, "o\n")
    assert reader.lines() == ["two"]
    append(log, "not ended")
    assert reader.lines() == []
    assert reader.lines(last=True) == ["not ended"]


def test_a_reader_loses_nothing_over_one_rotation(log: LogFile) -> None:
    reader = log.reader()
    append(log, "".join(f"line {n:02}\n" for n in range(10)))
    assert len(reader.lines()) == 10
    append(log, "".join(f"line {n:02}\n" for n in range(10, 16)))
    assert log.rotate()
    append(log, "line 16\n")
    assert reader.lines() == [f"line {n:02}" for n in range(10, 17)]
    assert log.tail() == [f"line {n:02}" for n in range(4, 17)]
    assert log.tail(2) == ["line 15", "line 16"]


def test_a_reader_that_is_too_slow_goes_on_with_a_whole_line(log: LogFile) -> None:
    reader = log.reader()
    for _ in range(2):
        append(log, "x" * (LIMIT + 1))
        assert log.rotate()
    append(log, "the end of a line\nnext\n")
    assert reader.lines() == ["next"]


def test_what_is_kept_is_bounded(log: LogFile) -> None:
    append(log, "x" * 10 * LIMIT)
    assert log.rotate()
    assert log.older.stat().st_size == LIMIT
    assert log.path.stat().st_size == 0
    log.remove()
    assert log.tail() == []


def test_what_is_no_text_is_shown_as_well_as_can_be(log: LogFile) -> None:
    log.path.write_bytes(b"\xff\xfe\nplain\n")
    assert log.tail() == ["\ufffd\ufffd", "plain"]
