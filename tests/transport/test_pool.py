"""Buffers are used again when nobody looks at them any more, and never before."""

from __future__ import annotations

import psutil
from hypothesis import given
from hypothesis import strategies as st

from nomad.transport.pool import LAZY_BYTES, Pool


def test_a_pool_lends_again_what_nobody_looks_at() -> None:
    pool = Pool()
    first = pool.take(100_000)
    buffer = first.obj
    first[:3] = b"abc"
    part = first.toreadonly()[1:]
    del first
    second = pool.take(100_000)
    assert second.obj is not buffer, "it was lent while a view of it lived"
    assert bytes(part[:2]) == b"bc"
    del part
    assert pool.take(90_000).obj is buffer
    assert len(pool.take(90_000)) == 90_000


def test_a_pool_lends_what_was_used_last() -> None:
    """It is in the processor's caches."""
    pool = Pool()
    views = [pool.take(100_000) for _ in range(4)]
    last = views[-1].obj
    del views
    for _ in range(5):
        assert pool.take(100_000).obj is last


def test_a_pool_does_not_lend_far_too_much() -> None:
    pool = Pool()
    large = pool.take(1_000_000).obj
    assert pool.take(100_000).obj is not large


@given(st.lists(st.tuples(st.integers(1, 300_000), st.integers(0, 5)), max_size=60))
def test_a_pool_is_bounded_and_never_lends_twice(script: list[tuple[int, int]]) -> None:
    pool = Pool(limit=1_000_000)
    held: list[tuple[memoryview, int]] = []
    for number, (size, kept) in enumerate(script):
        view = pool.take(size)
        view[0] = view[-1] = number
        held.append((view, number))
        del view
        del held[: max(0, len(held) - kept)]
        assert all(view[0] == view[-1] == content for view, content in held)
        assert pool.kept <= 1_000_000


def test_a_very_large_buffer_takes_memory_as_it_is_filled() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    view = Pool().take(1 << 30)
    assert len(view) == 1 << 30 > LAZY_BYTES
    view[:1000] = bytes(1000)
    assert process.memory_info().rss - before < 10_000_000
    assert view.toreadonly()[:5] == bytes(5)
