"""A batch weighs no more than its values here, so that windows of a few bytes show the arithmetic of credits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest

from nomad.delivery import frames
from tests.contract.loops import LOOPS


def pytest_asyncio_loop_factories(item: pytest.Item) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """What hands streams from one protocol to another runs on every event loop there is."""
    return LOOPS if item.path.stem == "test_meeting" else {"asyncio": asyncio.new_event_loop}


@pytest.fixture(autouse=True, scope="module")
def no_overhead() -> Iterator[None]:
    real, frames.BATCH_OVERHEAD = frames.BATCH_OVERHEAD, 0
    yield
    frames.BATCH_OVERHEAD = real
