"""Operators that move while messages flow: real instances in one event loop, step by step or all at once."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nomad import pipeline
from nomad.actor import operator as module
from nomad.actor.operator import OperatorFailed
from nomad.control import Role, Shape
from nomad.errors import NomadError
from tests.actor.chain import Chain, until


class Flow:
    """A source that goes on until it is told to stop, at a few thousand messages a second."""

    def __init__(self, pace: float = 0.0002) -> None:
        self.pace = pace
        self.made = 0
        self._end = threading.Event()

    def __call__(self) -> Iterator[int]:
        while not self._end.wait(self.pace):
            yield self.made
            self.made += 1

    def stop(self) -> None:
        self._end.set()


def numbers(count: int) -> Callable[[], Iterator[int]]:
    def source() -> Iterator[int]:
        yield from range(count)

    return source


def same(x: int) -> int:
    return x


def three(x: int) -> Iterator[tuple[int, int]]:
    for k in range(3):
        yield x, k


def shown(chain: Chain, number: int) -> tuple[str, bool]:
    """The state of an operator's link from the one before it, and whether that is connected."""
    link = chain[number].stats.links[0]
    return link["state"], link["connected"]


async def disorder(chain: Chain) -> int:
    """As the last operator counts it."""
    return int(chain.members[-1].instance.numbers()["links"][0]["disorder"])


@pytest.mark.parametrize("listen", ["inproc:", "unix:"])
async def test_an_operator_moves_while_messages_flow(listen: str, tmp_path: Path) -> None:
    flow, got = Flow(), list[int]()
    async with Chain([flow, same, lambda x: x, got.append], tmp_path, listen=listen) as chain:
        for number in (1, 2, 1, 2):
            before = len(got)
            await until(lambda before=before: len(got) > before + 50)
            await chain.move(number)
        flow.stop()
        await chain.finished()
        assert await disorder(chain) == 0
        assert [m.life.epoch for m in chain.members] == [1, 3, 3, 1]
    assert got == list(range(flow.made))


async def test_a_generator_moves_while_messages_flow(tmp_path: Path) -> None:
    flow, got = Flow(0.001), list[tuple[int, int]]()
    async with Chain([flow, three, got.append], tmp_path, window_messages=16) as chain:
        for _ in range(3):
            before = len(got)
            await until(lambda before=before: len(got) > before + 50)
            await chain.move(1)
        flow.stop()
        await chain.finished()
    assert got == [(x, k) for x in range(flow.made) for k in range(3)]


async def test_nothing_stands_still_meanwhile(tmp_path: Path) -> None:
    """The link is long, and the new instance has more to catch up with than it may take."""
    flow, got = Flow(0.002), list[int]()
    pause = threading.Event()

    def slow(x: int) -> int:
        pause.wait(0.001)
        return x

    async with Chain([flow, slow, got.append], tmp_path, window_messages=1000, shape=Shape(latency=0.05)) as chain:
        await until(lambda: len(got) > 50)
        await chain.prepare(1)
        await chain.connected(1)
        await chain.hand_over(1)
        at_switch = len(got)
        old = chain.switch(1)
        await chain.taken_over(1)
        assert len(got) > at_switch + 20, "the old one was heard until the new one had caught up"
        await old.kill()
        flow.stop()
        await chain.finished()
        assert await disorder(chain) == 0
    assert got == list(range(flow.made))


async def test_a_standby_does_nothing(tmp_path: Path) -> None:
    flow, got = Flow(), list[int]()
    async with Chain([flow, same, got.append], tmp_path) as chain:
        await chain.prepare(1)
        await chain.connected(1)
        new = chain[1].next
        assert new is not None
        await until(lambda: len(got) > 100)
        assert new.instance.status() == {
            "role": "standby",
            "links": [
                {"link": "p:Flow>same", "direction": "in", "epoch": 0, "standby": 1},
                {"link": "p:same>append", "direction": "out", "epoch": 1, "standby": 0},
            ],
            "called": [],
        }
        assert chain[0].instance.status()["links"] == [
            {"link": "p:Flow>same", "direction": "out", "epoch": 1, "standby": 2}
        ]
        assert chain[2].instance.status()["links"] == [
            {"link": "p:same>append", "direction": "in", "epoch": 1, "standby": 2}
        ]
        with pytest.raises(NomadError, match="about to move"):
            await new.instance.rerun(None)
        assert new.instance.stats().received == new.instance.stats().emitted == 0
        assert chain[1].stats.reconnects == chain[2].stats.reconnects == 0
        await chain.roll_back(1)
        await until(lambda: chain[0].life.status("p:Flow>same")["standby"] == 0)
        flow.stop()
        await chain.finished()
    assert got == list(range(flow.made))


async def test_an_idle_pipeline_moves_and_goes_on(tmp_path: Path) -> None:
    go = threading.Event()
    got: list[int] = []

    def source() -> Iterator[int]:
        yield 0
        go.wait()
        yield 1

    async with Chain([source, same, got.append], tmp_path) as chain:
        await until(lambda: got == [0])
        await chain.prepare(1)
        await chain.connected(1)
        await chain.hand_over(1)
        old = chain.switch(1)
        await until(lambda: chain[1].life.status("p:source>same")["epoch"] == 1)
        await old.kill()
        chain.introduce(1)
        await until(lambda: shown(chain, 2) == ("open", True))
        go.set()
        await chain.finished()
    assert got == [0, 1]


async def test_a_sender_that_has_said_nothing_yet_is_shown_as_waiting(tmp_path: Path) -> None:
    go = threading.Event()

    def source() -> Iterator[int]:
        go.wait()
        yield 0

    got: list[int] = []
    async with Chain([source, same, got.append], tmp_path) as chain:
        await until(lambda: shown(chain, 2) == ("open", True))
        await chain.prepare(1)
        await chain.connected(1)
        await chain[1].life.kill()
        await until(lambda: shown(chain, 2) == ("waiting", True))
        chain.switch(1)
        chain[1].instance.set_role(Role.ACTIVE)
        chain.introduce(1)
        go.set()
        await chain.finished()
    assert got == [0]


async def test_neighbours_move_while_nothing_flows(tmp_path: Path) -> None:
    """Each is heard all the same, so that the next one knows that it is its turn, and runs messages again."""
    go = threading.Event()
    trouble, got = Trouble(0), list[int]()

    def source() -> Iterator[int]:
        yield from range(3)
        go.wait()
        yield 3

    async with Chain([source, same, trouble, same, got.append], tmp_path) as chain:
        await until(lambda: got == [1, 2])
        for number in (1, 2, 3):
            await chain.move(number)
        trouble.bad.clear()
        assert await chain[2].instance.rerun(None) == {"ran": 1, "failed": 0}
        await until(lambda: got == [1, 2, 0])
        go.set()
        await chain.finished()
    assert got == [1, 2, 0, 3]


async def test_a_lost_greeting_is_made_up_for(tmp_path: Path) -> None:
    """Connections that stand by break, and the neighbours start anew."""
    flow, got = Flow(), list[int]()
    async with Chain([flow, same, lambda x: x, got.append], tmp_path) as chain:
        await chain.prepare(2)
        await chain.connected(2)
        new = chain[2].next
        assert new is not None
        new.instance.cut()
        await chain.connected(2)
        await chain.restart(1)
        await chain.connected(2)
        await chain.restart(3)
        await chain.connected(2)
        await chain.hand_over(2)
        old = chain.switch(2)
        await chain.taken_over(2)
        await old.kill()
        flow.stop()
        await chain.finished()
    assert list(dict.fromkeys(got)) == list(range(flow.made))
    assert len(got) <= flow.made + 1, "the call that the kill of the sink interrupted"


async def test_without_a_greeting_it_is_dialed_at_the_switch(tmp_path: Path) -> None:
    flow, got = Flow(), list[int]()
    async with Chain([flow, same, got.append], tmp_path) as chain:
        await until(lambda: len(got) > 20)
        await chain.prepare(1)
        await chain.hand_over(1)
        old = chain.switch(1)
        await chain.taken_over(1)
        await old.kill()
        flow.stop()
        await chain.finished()
    assert got == list(range(flow.made))


async def test_an_instance_that_was_left_is_not_heard_again(tmp_path: Path) -> None:
    flow, got = Flow(), list[int]()
    async with Chain([flow, same, got.append], tmp_path) as chain:
        await chain.prepare(1)
        await chain.connected(1)
        await chain.hand_over(1)
        old = chain.switch(1)
        await chain.taken_over(1)
        await until(lambda: old.instance.stats().fenced > 1)
        assert chain[2].stats.fenced > 1
        await old.kill()
        flow.stop()
        await chain.finished()
    assert got == list(range(flow.made))


# Messages set aside


class Trouble:
    """Raises for some inputs while it is told to."""

    def __init__(self, *bad: int) -> None:
        self.bad = set(bad)
        self.calls: list[int] = []

    def __call__(self, x: int) -> int:
        self.calls.append(x)
        if x in self.bad:
            raise ValueError(f"bad {x}")
        return x


async def test_messages_set_aside_move_along(tmp_path: Path) -> None:
    flow, trouble, got = Flow(), Trouble(3, 5), list[int]()
    async with Chain([flow, trouble, got.append], tmp_path) as chain:
        await until(lambda: chain[1].stats.set_aside == 2)
        await chain.move(1)
        instance = chain[1].instance
        assert len(instance.set_aside()) == chain[1].stats.set_aside == 2
        trouble.bad.clear()
        assert await instance.rerun(None) == {"ran": 2, "failed": 0}
        await until(lambda: 3 in got and 5 in got)
        flow.stop()
        await chain.finished()
        assert instance.set_aside() == []
    assert sorted(got) == list(range(flow.made))


async def test_what_came_of_a_rerun_moves_along(tmp_path: Path) -> None:
    """It was run, and those behind weren't there to get it."""
    trouble, got = Trouble(1), list[int]()
    async with Chain([numbers(4), trouble, same, got.append], tmp_path) as chain:
        await chain.finished()
        await chain.kill(2)
        trouble.bad.clear()
        assert await chain[1].instance.rerun(None) == {"ran": 1, "failed": 0}
        await chain.prepare(1)
        await chain.hand_over(1)
        old = chain.switch(1)
        await old.kill()
        await chain.restart(2)
        await until(lambda: len(got) == 4)
        await until(lambda: chain[1].instance._set_aside.reruns() == [])
    assert got == [0, 2, 3, 1]


@pytest.mark.parametrize("on_error", ["set-aside", "retry", "fail"])
@pytest.mark.parametrize("bad", [1, 190], ids=["thread", "inline"])
async def test_one_that_retires_halts_where_it_would_set_aside(
    on_error: Any, bad: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And goes on there when it becomes active again."""
    monkeypatch.setattr(module, "RETRY_FIRST", 0.001)
    go, got = threading.Event(), list[int]()
    trouble = Trouble(bad)

    def source() -> Iterator[int]:
        yield from range(bad)
        go.wait()
        yield from range(bad, 200)

    operator = pipeline.operator(trouble, name="t", on_error=on_error)
    async with Chain([source, operator, got.append], tmp_path, window_messages=300) as chain:
        await until(lambda: len(got) == bad)
        await chain.prepare(1)
        old = chain[1].instance
        old.set_role(Role.RETIRED)
        go.set()
        await until(lambda: bad in trouble.calls)
        await until(lambda: old.stats().received == 200)
        assert old.set_aside() == []
        assert not chain[1].running.done()
        with pytest.raises(NomadError, match="about to move"):
            await old.rerun(None)
        with pytest.raises(NomadError, match="about to move"):
            old.drop(None)
        await chain.roll_back(1)
        if on_error == "fail":
            with pytest.raises(OperatorFailed, match=f"bad {bad}"):
                await chain.finished()
        else:
            await chain.finished()
            assert len(old.set_aside()) == 1
            assert got == [x for x in range(200) if x != bad]


async def test_one_that_retires_keeps_what_can_not_be_sent_for_later(tmp_path: Path) -> None:
    go, got = threading.Event(), list[Any]()

    def source() -> Iterator[int]:
        yield 0
        go.wait()
        yield from range(1, 4)

    async with Chain([source, lambda x: object() if x == 2 else x, got.append], tmp_path) as chain:
        await until(lambda: got == [0])
        chain[1].instance.set_role(Role.RETIRED)
        go.set()
        await until(lambda: chain[1].stats.received == 4)
        await until(lambda: 1 in got)
        assert chain[1].instance.set_aside() == []
        chain[1].instance.set_role(Role.ACTIVE)
        await chain.finished()
        assert len(chain[1].instance.set_aside()) == 1
    assert got == [0, 1, 3]


async def test_the_run_under_way_is_finished_before_it_has_retired(tmp_path: Path) -> None:
    """Of several that were asked for only that one is run; what came of it is known to the next instance."""
    go, running, got = threading.Event(), threading.Event(), list[int]()
    calls = 0

    def function(x: int) -> int:
        nonlocal calls
        calls += 1
        if calls <= 3:
            raise ValueError
        running.set()
        go.wait()
        return x

    async with Chain([numbers(3), function, got.append], tmp_path) as chain:
        await chain.finished()
        old = chain[1].instance
        asked = asyncio.create_task(old.rerun(None))
        refused = asyncio.create_task(old.rerun(None))
        await asyncio.to_thread(running.wait)
        await chain.prepare(1)
        old.set_role(Role.RETIRED)
        assert old.status()["role"] == Role.ACTIVE
        with pytest.raises(NomadError, match="about to move"):
            await refused
        go.set()
        assert await asked == {"ran": 1, "failed": 0}
        await until(lambda: old.status()["role"] == Role.RETIRED)
        await chain.hand_over(1)
        assert chain[1].next is not None
        assert len(chain[1].next.instance.set_aside()) == 2
        before = chain.switch(1)
        await until(lambda: got == [0])
        await before.kill()
        chain.introduce(1)
        assert await chain[1].instance.rerun(None) == {"ran": 2, "failed": 0}
        await until(lambda: got == [0, 1, 2])
        await until(lambda: chain[1].instance._set_aside.reruns() == [])


# Faults


@pytest.mark.no_cover
@pytest.mark.parametrize("middle", [same, three], ids=lambda f: f.__name__)
async def test_faults_in_every_phase(middle: Callable[[int], Any], tmp_path: Path, rng: random.Random) -> None:
    """Neighbours, the old and the new instance are killed, connections cut, before and after each step."""
    flow, got = Flow(0.0005), list[Any]()
    kills = 0
    window = rng.choice([8, 100, 10_000])
    chain = Chain([flow, lambda x: x, middle, lambda x: x, got.append], tmp_path, window_messages=window)

    async def fault(number: int) -> None:
        nonlocal kills
        await asyncio.sleep(rng.random() * 0.01)
        kind = rng.randrange(6)
        if kind == 0:
            chain[number].instance.cut()
        elif kind == 1:
            await chain.restart(number - 1 or 1)
        elif kind == 2:
            kills += number == 3
            await chain.restart(number + 1)
        elif kind == 3 and (following := chain[number].next) is not None:
            following.instance.cut()

    async with chain:
        for _ in range(12):
            number = rng.choice([2, 3])
            await chain.prepare(number)
            await fault(number)
            if rng.random() < 0.8:
                await chain.connected(number)
            await fault(number)
            if rng.random() < 0.2:
                await chain.roll_back(number)
                continue
            await chain.hand_over(number)
            await fault(number)
            if rng.random() < 0.2:
                await chain.roll_back(number)
                continue
            if rng.random() < 0.2:  # the old one dies: the new one is there
                chain[number].running.cancel()
            old = chain.switch(number)
            if rng.random() < 0.3:
                await chain.restart(number)
            await fault(number)
            if rng.random() < 0.7:
                await chain.taken_over(number)
            await old.kill()
            chain.introduce(number)
        flow.stop()
        await chain.finished()
        assert chain[0].stats.unacked_messages == 0
    expected = [y for x in range(flow.made) for y in (three(x) if middle is three else [x])]
    assert list(dict.fromkeys(got)) == expected
    assert len(got) - len(expected) <= kills


# The first and the last operator


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("slow", [False, True], ids=["inline", "thread"])
async def test_a_sink_is_replaced_and_no_call_is_missed_or_made_twice(apart: bool, slow: bool, tmp_path: Path) -> None:
    flow, got, pause = Flow(0.0005 if slow else 0.0002), list[int](), threading.Event()

    def sink(x: int) -> None:
        if slow:
            pause.wait(0.002)
        got.append(x)

    async with Chain([flow, same, sink], tmp_path, apart=apart) as chain:
        for _ in range(4):
            before = len(got)
            await until(lambda before=before: len(got) > before + 50)
            await chain.move(2)
        flow.stop()
        await chain.finished()
        assert await disorder(chain) == 0
    assert got == list(range(flow.made))


@pytest.mark.parametrize("kind", ["generator", "async"])
async def test_a_sink_of_each_kind_is_replaced(kind: str, tmp_path: Path) -> None:
    flow, got = Flow(0.001), list[tuple[int, int]]()

    def generating(pair: tuple[int, int]) -> Iterator[None]:
        got.append(pair)
        yield None
        yield None

    async def waiting(pair: tuple[int, int]) -> None:
        await asyncio.sleep(0.0001)
        got.append(pair)

    sink = generating if kind == "generator" else waiting
    async with Chain([flow, three, sink], tmp_path, window_messages=16, apart=True) as chain:
        for _ in range(3):
            before = len(got)
            await until(lambda before=before: len(got) > before + 20)
            await chain.move(2)
        flow.stop()
        await chain.finished()
    assert got == [(x, k) for x in range(flow.made) for k in range(3)]


async def test_a_halted_sink_calls_nothing_and_goes_on_where_it_was(tmp_path: Path) -> None:
    flow, got = Flow(), list[int]()
    async with Chain([flow, same, got.append], tmp_path) as chain:
        await until(lambda: len(got) > 50)
        await chain.prepare(2)
        await chain.connected(2)
        old = chain[2].instance
        received = old.stats().received  # what is let in behind a sink that halts is bounded, and may have come at once
        old.set_role(Role.HALTED)
        await until(lambda: old.status()["role"] == Role.HALTED)
        called = len(got)
        await until(lambda: old.stats().received > received + 20)
        assert len(got) == called
        assert old.status()["called"] == [(0, (1 << 44) + called, b"")]
        await chain.roll_back(2)
        await until(lambda: len(got) > called + 50)
        flow.stop()
        await chain.finished()
        assert await disorder(chain) == 0
    assert got == list(range(flow.made))


async def test_a_long_call_is_over_before_the_sink_has_halted(tmp_path: Path) -> None:
    go, running, got = threading.Event(), threading.Event(), list[int]()

    def sink(x: int) -> None:
        if x == 1:
            running.set()
            go.wait()
        got.append(x)

    async with Chain([numbers(5), same, sink], tmp_path) as chain:
        await asyncio.to_thread(running.wait)
        await chain.prepare(2)
        await chain.connected(2)
        old = chain[2].instance
        old.set_role(Role.HALTED)
        assert old.status()["role"] == Role.RETIRED
        go.set()
        await chain.hand_over(2)
        assert got == [0, 1]
        before = chain.switch(2)
        await chain.taken_over(2)
        await before.kill()
        await chain.finished()
    assert got == [0, 1, 2, 3, 4]


async def test_what_a_sink_has_set_aside_goes_with_it_part_by_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nomad.actor.instance.PART", 1000)
    trouble, got = Trouble(1, 3), list[int]()

    def sink(x: int) -> None:
        got.append(trouble(x))

    async with Chain([numbers(5), same, sink], tmp_path, apart=True) as chain:
        await chain.finished()
        assert got == [0, 2, 4]
        await chain.prepare(2)
        await chain.connected(2)
        assert chain[2].next is not None
        old, new = chain[2].instance, chain[2].next.instance
        with pytest.raises(NomadError, match="has retired"):
            old.hand_out(0)
        old.set_role(Role.RETIRED)
        offset, more = 0, True
        while more:
            part = old.hand_out(offset)
            more = part["more"]
            new.take_in(offset, part["data"], last=not more)
            offset += len(part["data"])
        assert offset > 2000
        await chain.hand_over(2)
        with pytest.raises(NomadError, match="stands by"):
            new.take_in(0, b"", last=True)
        await chain.switch(2).kill()
        await chain.taken_over(2)
        assert len(chain[2].instance.set_aside()) == 2
        trouble.bad.clear()
        await until(lambda: chain[2].instance.numbers()["links"][0]["first"] is not None)
        assert await chain[2].instance.rerun(None) == {"ran": 2, "failed": 0}
    assert got == [0, 2, 4, 1, 3]


async def test_a_generator_source_is_replaced_and_nothing_that_it_gave_is_lost(tmp_path: Path) -> None:
    """The next one begins anew, and only once the one before has ended."""
    end, world, got, lives = threading.Event(), itertools.count(), list[int](), list[str]()

    def source() -> Iterator[int]:
        lives.append("begins")
        try:
            while not end.wait(0.0002):
                yield next(world)
        finally:
            lives.append("ends")

    async with Chain([source, same, got.append], tmp_path) as chain:
        for number in range(3):
            before = len(got)
            await until(lambda before=before: len(got) > before + 50)
            assert lives == ["begins", *["ends", "begins"] * number]
            await chain.move(0)
        end.set()
        await chain.finished()
        assert [m.life.epoch for m in chain.members] == [4, 1, 1]
    assert got == list(range(next(world)))


async def test_a_periodic_source_is_replaced(tmp_path: Path) -> None:
    calls, got = list[int](), list[int]()

    def tick() -> int:
        calls.append(len(calls))
        return calls[-1]

    async with Chain([pipeline.source(tick, interval=0.002), same, got.append], tmp_path) as chain:
        for _ in range(3):
            before = len(got)
            await until(lambda before=before: len(got) > before + 20)
            await chain.move(0)
        chain[0].instance.actor.drain()  # type: ignore[union-attr]
        await chain.finished()
    assert got == calls


@pytest.mark.parametrize("periodic", [False, True])
async def test_a_source_that_rests_goes_on_where_it_was(periodic: bool, tmp_path: Path) -> None:
    flow, got = Flow(0.001), list[int]()
    ticks = iter(range(10_000))
    source: Any = pipeline.source(lambda: next(ticks), interval=0.001, name="ticks") if periodic else flow
    async with Chain([source, same, got.append], tmp_path) as chain:
        await until(lambda: len(got) > 20)
        await chain.prepare(0)
        await chain.connected(0)
        old = chain[0].instance
        old.set_role(Role.HALTED)
        await until(lambda: old.status()["role"] == Role.HALTED)
        emitted = old.stats().emitted
        assert len(got) == emitted
        assert old.numbers()["links"][0]["numbered"] == old.numbers()["links"][0]["settled"]
        await chain.roll_back(0)
        await until(lambda: len(got) > emitted + 20)
        old.actor.drain()  # type: ignore[union-attr]
        await chain.finished()
    assert got == list(range(len(got)))


async def test_a_source_that_stays_in_its_function_is_not_waited_for_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nomad.actor.source.STILL_SECONDS", 0.05)
    go, got = threading.Event(), list[int]()

    def source() -> Iterator[int]:
        yield 0
        go.wait()
        yield 1

    async with Chain([source, same, got.append], tmp_path) as chain:
        await until(lambda: got == [0])
        old = chain[0].instance
        old.set_role(Role.HALTED)
        await until(lambda: old.status()["role"] == Role.HALTED)
        go.set()
        await until(lambda: old.actor.queued == (1, 0))
        assert got == [0]
        old.set_role(Role.ACTIVE)
        await chain.finished()
    assert got == [0, 1]


@pytest.mark.no_cover
@pytest.mark.parametrize("end", ["source", "sink"])
async def test_faults_in_every_phase_of_replacing_an_end(end: str, tmp_path: Path, rng: random.Random) -> None:
    stop, world, got, kills = threading.Event(), itertools.count(), list[int](), 0

    def source() -> Iterator[int]:
        while not stop.wait(0.0005):
            yield next(world)

    window = rng.choice([8, 100, 10_000])
    chain = Chain([source, same, lambda x: x, got.append], tmp_path, window_messages=window)
    number, neighbour = (0, 1) if end == "source" else (3, 2)

    async def fault() -> None:
        await asyncio.sleep(rng.random() * 0.01)
        kind = rng.randrange(5)
        if kind == 0:
            chain[number].instance.cut()
        elif kind == 1:
            await chain.restart(neighbour)
        elif kind == 2 and (following := chain[number].next) is not None:
            following.instance.cut()

    async with chain:
        for _ in range(10):
            await chain.prepare(number)
            await fault()
            if rng.random() < 0.8:
                await chain.connected(number)
            await fault()
            if rng.random() < 0.2:
                await chain.roll_back(number)
                continue
            await chain.hand_over(number)
            await fault()
            if rng.random() < 0.2:
                await chain.roll_back(number)
                continue
            old = chain.switch(number)
            if number and rng.random() < 0.3:
                kills += 1
                await chain.restart(number)
            await fault()
            if not number:
                await chain.end_source(old)
            if rng.random() < 0.7:
                await chain.taken_over(number)
            await old.kill()
            chain.introduce(number)
        stop.set()
        await chain.finished()
        assert chain[0].stats.unacked_messages == 0
    expected = list(range(next(world)))
    assert list(dict.fromkeys(got)) == expected
    assert len(got) - len(expected) <= kills
