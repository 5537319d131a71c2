from __future__ import annotations

import asyncio

from nomad.fanout import Fanout


async def test_every_reader_gets_every_item_from_its_start_on() -> None:
    fanout: Fanout[int] = Fanout()
    fanout.publish(0)
    first = fanout.subscribe()
    fanout.publish(1)
    second = fanout.subscribe()
    fanout.publish(2)
    fanout.close()
    assert [item async for item in first] == [1, 2]
    assert [item async for item in second] == [2]
    assert [item async for item in fanout.subscribe()] == []


async def test_a_slow_reader_loses_the_oldest_and_is_told() -> None:
    fanout: Fanout[int] = Fanout()
    reader = fanout.subscribe(limit=2)
    for n in range(5):
        fanout.publish(n)
    fanout.skip(10)
    fanout.publish(5)
    assert [(await anext(reader), reader.skipped) for _ in range(2)] == [(4, 4), (5, 10)]


async def test_a_waiting_reader_is_woken_by_an_item_and_by_the_end() -> None:
    fanout: Fanout[int] = Fanout()
    reader = fanout.subscribe()
    waiting = asyncio.create_task(anext(reader, None))
    await asyncio.sleep(0)
    fanout.publish(1)
    assert await waiting == 1
    waiting = asyncio.create_task(anext(reader, None))
    await asyncio.sleep(0)
    fanout.unsubscribe(reader)
    assert await waiting is None
    assert len(fanout) == 0


async def test_a_forgotten_reader_is_not_kept() -> None:
    fanout: Fanout[int] = Fanout()
    reader = fanout.subscribe()
    assert len(fanout) == 1
    del reader
    assert len(fanout) == 0


async def test_the_oldest_go_when_what_waits_is_too_large() -> None:
    fanout: Fanout[bytes] = Fanout()
    reader = fanout.subscribe(100, size=len, most=10)
    for item in (b"a" * 6, b"b" * 6, b"c" * 3, b"d" * 50):
        fanout.publish(item)
    assert await anext(reader) == b"d" * 50
    assert reader.skipped == 3
    fanout.publish(b"e")
    assert await anext(reader) == b"e"
    assert reader.skipped == 0
    fanout.close()
