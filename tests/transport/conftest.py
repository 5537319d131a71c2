"""Tests of sockets run on every event loop there is, the others on asyncio's own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from tests.contract.loops import LOOPS

ON_ALL_LOOPS = {"test_tcp", "test_tls", "test_zmq"}


def pytest_asyncio_loop_factories(item: pytest.Item) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return LOOPS if item.path.stem in ON_ALL_LOOPS else {"asyncio": asyncio.new_event_loop}
