"""What a pod says unasked: how often, and outputs for those who look on."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nomad import pipeline
from nomad.actor.reports import Reports, Taps
from nomad.control import PodStats
from nomad.delivery.codec import Codec, decode_one
from nomad.tasks import Tasks
from tests.actor.pods import Master, endless, master, ready


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Master]:
    async with master(tmp_path) as made:
        yield made


async def test_a_pod_sends_heart_beats_as_often_as_it_is_told(here: Master) -> None:
    pod = await ready(here, pipeline.build([endless, str]), 0)
    pod.tell({"type": "pace", "seconds": 60.0})
    await pod.ask("numbers")
    began, before = time.monotonic(), len(pod.all("heartbeat"))
    pod.tell({"type": "pace", "seconds": 0.1})
    await pod.until(lambda: len(pod.all("heartbeat")) >= before + 20, "at once, not after 60 s")
    assert time.monotonic() - began < 20 * 0.5

    pod.tell({"type": "pace", "seconds": 60.0})
    await pod.ask("numbers")
    for number, nonsense in enumerate(({}, {"seconds": "often"}, {"seconds": 0.0}, {"seconds": float("nan")})):
        pod.tell({"type": "pace", **nonsense})
        await pod.until(lambda connections=number + 2: pod.connections == connections, "it asks for a better master")
    before = len(pod.all("heartbeat"))
    await pod.until(lambda: len(pod.all("heartbeat")) >= before + 4, "after a connect it is as ever")


class Clogged:
    """A channel over which nothing goes for a while."""

    connected = True

    def __init__(self) -> None:
        self.said: list[dict[str, Any]] = []
        self.open = False
        self.looks = 0

    @property
    def writable(self) -> bool:
        self.looks += 1
        return self.open

    def say(self, message: dict[str, Any]) -> None:
        self.said.append(message)
        self.open = False


async def test_over_a_way_that_is_too_slow_little_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heart-beats and outputs would fill the memory; neither keeps the other back for ever."""
    monkeypatch.setattr("nomad.actor.reports.TAP_ITEMS", 3)
    monkeypatch.setattr("nomad.actor.reports.TAP_EVERY", 0.0)
    channel, tasks, meter = Clogged(), Tasks(), SimpleNamespace(last=None, last_error=None)
    outbox = SimpleNamespace(output_bytes=None)
    instance = SimpleNamespace(stats=PodStats, codec=Codec(), meter=meter, outbox=outbox)
    reports = Reports(cast(Any, channel))
    reports.begin(cast(Any, instance), None)

    async def until(condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                await asyncio.sleep(0.001)

    reports.set_pace(0.001)
    beating = tasks.start(reports.beat(), name="beat")
    await until(lambda: channel.looks > 5)
    assert channel.said == [], "what would wait is left out"
    channel.open = True
    await until(lambda: channel.said)
    looks = channel.looks
    await until(lambda: channel.looks > looks + 1)
    beating.cancel()

    tasks.start(reports.forward(), name="forward")
    reports.tap([1, 2, 3, 4, 5])
    looks = channel.looks
    await until(lambda: channel.looks > looks + 5)
    assert [m["type"] for m in channel.said] == ["heartbeat"]
    channel.open = True
    await until(lambda: len(channel.said) == 3)
    assert [m["type"] for m in channel.said] == ["heartbeat", "heartbeat", "outputs"]
    assert [decode_one(item) for item in channel.said[-1]["items"]] == [1, 2, 3]
    assert channel.said[-1]["skipped"] == 2
    await tasks.close()


async def test_taps_keep_what_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nomad.actor.reports.TAP_ITEMS", 3)
    taps = Taps()
    taps.put([1, 2], Codec())
    taps.put([3, 4, 5], Codec())
    taps.put([6], Codec())
    await taps.waiting.wait()
    items, skipped = taps.take()
    assert [decode_one(i) for i in items] == [1, 2, 3]
    assert skipped == 3
    assert taps.take() == ([], 0)
    taps.put([object(), 7], Codec())
    items, skipped = taps.take()
    assert [decode_one(i) for i in items] == [7]
    assert skipped == 1


async def test_what_is_too_large_for_one_message_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nomad.control.MOST_SHOWN", 1000)
    taps = Taps()
    taps.put(["x" * 900, "x" * 1001, "last"], Codec())
    items, skipped = taps.take()
    assert [decode_one(i) for i in items] == ["x" * 900, "last"]
    assert skipped == 1


async def test_what_is_put_while_others_are_taken_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else more and more of it could wait."""
    monkeypatch.setattr("nomad.actor.reports.TAP_BYTES", 2000)
    amid: list[Callable[[], None]] = []

    class Items(deque[bytes]):
        def popleft(self) -> bytes:
            item = super().popleft()
            if amid:
                amid.pop()()
            return item

    monkeypatch.setattr("nomad.actor.reports.deque", Items)
    taps = Taps()
    values = ["x" * 900] * 4
    taps.put(values[:1], Codec())
    amid.append(lambda: taps.put(values, Codec()))
    items, skipped = taps.take()
    assert (len(items), skipped) == (1, 2), "what is being taken still has its room"
    taps.put(values, Codec())
    items, skipped = taps.take()
    assert (len(items), skipped) == (3, 3)
    assert taps.take() == ([], 0)


async def test_taps_are_told_of_everything_whatever_overlaps() -> None:
    """Outputs come from another thread in any moment of the taking; none needs a later one to be told of."""
    taps = Taps()
    count = 3000
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        putting = asyncio.create_task(
            asyncio.to_thread(lambda: [taps.put([n], Codec()) for n in range(count)])  # type: ignore[func-returns-value]
        )
        got: list[int] = []
        async with asyncio.timeout(20):
            while len(got) < count:
                await taps.waiting.wait()
                items, skipped = taps.take()
                got += [decode_one(i) for i in items]
                assert skipped == 0
        await putting
    finally:
        sys.setswitchinterval(switch)
    assert got == list(range(count))


async def test_a_status_that_nobody_is_left_to_hear_of_is_no_error() -> None:
    """The data thread closes its links after the main one has ended."""
    loop = asyncio.new_event_loop()
    loop.close()
    reports = Reports(cast(Any, Clogged()))
    reports.status_changed(loop)
