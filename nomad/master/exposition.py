"""Prometheus' text format for metrics of which there are thousands, at a tenth of what the library takes for it.

`prometheus_client` looks at each sample for itself: it checks its name and those of its labels, sorts and escapes the
labels, 10 µs in all. Here many metrics share the labels of a row (an operator, a node, a link), so the library is asked
once how each label is written and each metric is headed, and lines are put together from that. The text is the same,
which is a test. Used by `metrics` only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

SLICE = 500
"""Rows whose labels, or lines of one metric, are written at once."""

_number: Callable[[float], str] = floatToGoString  # its types aren't told
R = TypeVar("R")


class Column(Generic[R]):
    """The samples of a metric, one for each row that it knows a value of. `labels` are those that it has besides.

    Columns that follow each other with the same name are one metric.
    """

    def __init__(
        self,
        kind: type[CounterMetricFamily] | type[GaugeMetricFamily],
        name: str,
        text: str,
        value: Callable[[R], float | None],
        **labels: str,
    ) -> None:
        family = kind(name, text, labels=list(labels))
        family.add_metric(list(labels.values()), 0.0)
        *head, sample = _lines(family)
        self.head = "".join(f"{line}\n" for line in head)
        self.sample, _, more = sample.removesuffix(" 0.0").partition("{")
        self.labels = more.removesuffix("}")
        self.value = value


class Table(Generic[R]):
    """Rows, and their metrics. `names`: the labels of each row, in the order in which they are written: by name."""

    def __init__(self, columns: Sequence[Column[R]], names: Sequence[str]) -> None:
        self._columns = columns
        self._names = names
        self._rows: list[R] = []
        self._values: list[Sequence[str]] = []

    def add(self, row: R, *values: str) -> None:
        """A row, and the values of its labels."""
        self._rows.append(row)
        self._values.append(values)

    def text(self) -> Iterator[bytes]:
        """All metrics of these rows, a slice at a time, of which some may be empty."""
        labels: list[str] = []
        known: list[dict[str, str]] = [{} for _ in self._names]
        for start in range(0, len(self._values), SLICE):
            columns = zip(*self._values[start : start + SLICE], strict=True)
            written = [
                self._written(name, values, texts)
                for name, values, texts in zip(self._names, columns, known, strict=True)
            ]
            labels += [",".join(mine) for mine in zip(*written, strict=True)]
            yield b""
        head = ""
        for column in self._columns:
            if column.head != head:
                head = column.head
                yield head.encode()
            before, after = f"{column.sample}{{", f",{column.labels}}} " if column.labels else "} "
            for start in range(0, len(self._rows), SLICE):
                some = zip(labels[start : start + SLICE], self._rows[start : start + SLICE], strict=True)
                yield "".join(
                    [
                        f"{before}{mine}{after}{_number(value)}\n"
                        for mine, row in some
                        if (value := column.value(row)) is not None
                    ]
                ).encode()

    @staticmethod
    def _written(name: str, values: Sequence[str], known: dict[str, str]) -> list[str]:
        """A label of some rows, as the library writes it; the same values come again and again."""
        if new := list(set(values).difference(known)):
            family = GaugeMetricFamily("x", "", labels=[name])
            for value in new:
                family.add_metric([value], 0.0)
            lines = _lines(family)[2:]
            known.update(zip(new, (line.removeprefix("x{").removesuffix("} 0.0") for line in lines), strict=True))
        return [known[value] for value in values]


def text(metrics: Sequence[Metric]) -> bytes:
    """A few metrics, as the library writes them."""
    return generate_latest(_Some(metrics))


class _Some(Collector):
    """What the library takes for a registry."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


def _lines(metric: Metric) -> list[str]:
    """One metric. (A line ends with "\\n" alone: labels may have other characters that end lines.)"""
    return text([metric]).decode().removesuffix("\n").split("\n")
