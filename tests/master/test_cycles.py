"""Cycles of references are found, and what stays isn't looked at."""

from __future__ import annotations

import asyncio
import gc
import weakref

from nomad.master.cycles import FIRST, MOST, search_rarely
from tests.clock import VirtualClock


class Knot:
    """Refers to itself."""

    def __init__(self) -> None:
        self.me = self


async def test_cycles_are_found_and_the_rest_is_spared() -> None:
    clock = VirtualClock()
    running = asyncio.create_task(search_rarely(clock))
    await clock.advance(FIRST)
    assert gc.get_freeze_count() > 1000
    knot = Knot()
    seen = weakref.ref(knot)
    await clock.advance(2 * FIRST)
    assert seen() is knot
    del knot
    await clock.advance(MOST)
    assert seen() is None, "though it was set aside before it was let go"
    running.cancel()
    await asyncio.wait([running])
    assert gc.get_freeze_count() == 0
