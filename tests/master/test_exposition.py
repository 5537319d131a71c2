"""What is put together from parts is what the library would have written."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families

from nomad.master import exposition
from nomad.master.exposition import SLICE, Column, Table

Row = tuple[float | None, float | None]
values = st.none() | st.floats() | st.integers(-(10**20), 10**20) | st.booleans()
names = st.text() | st.text('"\\\n\r\u2028{},= x')
COLUMNS: list[Column[Row]] = [
    Column(GaugeMetricFamily, "one", 'A\nhelp "text" \\', lambda row: row[0]),
    Column(CounterMetricFamily, "two", "", lambda row: row[1]),
    Column(GaugeMetricFamily, "three", "Of two parts.", lambda row: row[0], quantile="0.5"),
    Column(GaugeMetricFamily, "three", "Of two parts.", lambda row: row[1], quantile='"\n'),
]


def as_the_library_writes_it(rows: list[tuple[Row, str, str]]) -> bytes:
    one = GaugeMetricFamily("one", 'A\nhelp "text" \\', labels=["a", "b"])
    two = CounterMetricFamily("two", "", labels=["a", "b"])
    three = GaugeMetricFamily("three", "Of two parts.", labels=["a", "b", "quantile"])
    for index, quantile in ((0, "0.5"), (1, '"\n')):
        for row, a, b in rows:
            if (value := row[index]) is not None:
                (one, two)[index].add_metric([a, b], value)
                three.add_metric([a, b, quantile], value)
    return exposition.text([one, two, three])


@given(st.lists(st.tuples(st.tuples(values, values), names, names)))
def test_it_is_what_the_library_writes(rows: list[tuple[Row, str, str]]) -> None:
    table = Table(COLUMNS, ("a", "b"))
    for row, a, b in rows:
        table.add(row, a, b)
    assert b"".join(table.text()) == as_the_library_writes_it(rows)


def test_many_rows_come_in_slices() -> None:
    table: Table[Row] = Table(COLUMNS, ("a", "b"))
    rows: list[tuple[Row, str, str]] = [((n, None), f"a{n}", f"b{n % 7}") for n in range(2 * SLICE + 1)]
    for row, a, b in rows:
        table.add(row, a, b)
    parts = list(table.text())
    assert max(part.count(b"\n") for part in parts) == SLICE
    assert b"".join(parts) == as_the_library_writes_it(rows)
    read = {metric.name: len(metric.samples) for metric in text_string_to_metric_families(b"".join(parts).decode())}
    assert read == {"one": len(rows), "two": 0, "three": len(rows)}
