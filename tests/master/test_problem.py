"""What the master counts on when it makes a problem."""

from __future__ import annotations

from nomad.master.problem import Knowledge
from nomad.measure.book import Book


def test_a_bandwidth_counts_once_several_samples_agree() -> None:
    book = Book()
    book.declare_link("a", "b", 0.0, latency=0.01, bandwidth=1e7)
    knowledge = Knowledge(book, {("bandwidth", (source, "b")): 2e6 for source in "ac"})
    for k in range(3):
        for source in "ac":
            book.link_sample(source, "b", float(k), bandwidth=1e6)
    assert knowledge.link("a", "b") == (0.01, 1e7), "as declared"
    assert knowledge.link("c", "b") == (0.0, None), "not known to be limited"
    for source in "ac":
        book.link_sample(source, "b", 3.0, bandwidth=1e6)
    assert knowledge.link("a", "b") == (0.01, 2e6), "what drift counts on"
    assert knowledge.link("c", "b") == (0.0, 2e6)
    assert Knowledge(book).link("a", "b") == (0.01, 1e6), "what was measured"
