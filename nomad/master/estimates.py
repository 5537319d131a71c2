"""What the book holds, as views. Pure, and only for readers."""

from __future__ import annotations

from nomad.master.views import EstimateView, LinkEstimatesView, NodeEstimatesView, OperatorEstimatesView
from nomad.measure.book import Book
from nomad.measure.estimate import Estimate


def operator(book: Book, pipeline: str, name: str, now: float) -> OperatorEstimatesView:
    """Of one operator."""
    known = book.operator(pipeline, name)
    return OperatorEstimatesView(
        work=_view(known.work, now),
        service=_view(known.service, now),
        output_bytes=_view(known.output_bytes, now),
        selectivity=_view(known.selectivity, now),
        arrival=_view(known.arrival, now),
        departure=_view(known.departure, now),
        queue=_view(known.queue, now),
        queue_bytes=_view(known.queue_bytes, now),
        busy=_view(known.busy, now),
        settled=known.settled,
    )


def link(book: Book, source: str, target: str, now: float) -> LinkEstimatesView:
    """Of the way from one node to another."""
    known = book.link(source, target)
    return LinkEstimatesView(
        latency=_view(known.latency, now),
        bandwidth=_view(known.bandwidth, now),
        reached=known.reached,
        derived=known.derived,
    )


def node(book: Book, id: str, now: float) -> NodeEstimatesView:
    """Of one node."""
    known = book.node(id)
    return NodeEstimatesView(
        speed=_view(known.speed, now),
        cores_free=_view(known.cores_free, now),
        memory_free_mb=_view(known.memory_free_mb, now),
    )


def _view(estimate: Estimate | None, now: float) -> EstimateView | None:
    if estimate is None:
        return None
    return EstimateView(
        value=estimate.value,
        deviation=estimate.deviation,
        age=estimate.age(now),
        samples=estimate.samples,
        settled=estimate.settled,
    )
