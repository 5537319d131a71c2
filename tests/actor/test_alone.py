"""Messages that come one by one, mixed with bursts, while connections break, operators die or move."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nomad.control import Shape
from tests.actor.chain import Chain, until
from tests.contract.loops import LOOPS


class Sparse:
    """A source that gives a value now and then, and some at once now and then, until it is told to stop."""

    def __init__(self, seed: int) -> None:
        self.made = 0
        self._random = random.Random(seed)
        self._end = threading.Event()

    def __call__(self) -> Iterator[int]:
        while not self._end.wait(self._random.choice([0.0011, 0.0011, 0.0011, 0.002, 0.0])):
            for _ in range(self._random.choice([1, 1, 1, 1, 1, 1, 1, 2, 30])):
                yield self.made
                self.made += 1

    def stop(self) -> None:
        self._end.set()


def some(x: int) -> int | None:
    return None if x % 11 == 3 else x


async def trouble(chain: Chain, got: list[int], rng: random.Random, rounds: int, kinds: list[str]) -> None:
    for _ in range(rounds):
        goal = len(got) + rng.randrange(5, 60)
        await until(lambda goal=goal: len(got) >= goal)  # type: ignore[misc]
        kind = rng.choice(kinds)
        if kind == "cut":
            chain[rng.randrange(len(chain.members))].instance.cut()
        elif kind == "kill":
            await chain.restart(*rng.sample(range(1, chain.last + 1), rng.randrange(1, 3)))
        elif kind == "move":
            await chain.move(rng.randrange(1, chain.last + 1))
        elif kind == "back":
            number = rng.randrange(0, chain.last + 1)
            await chain.prepare(number)
            await chain.connected(number)
            if rng.random() < 0.5 and number:
                await chain.hand_over(number)
            await chain.roll_back(number)
        else:
            chain._shape = rng.choice([Shape(), Shape(), Shape(latency=0.001)])
            for number in range(len(chain.members)):
                chain.introduce(number)


async def flow(seed: int, folder: Path, window: int, rounds: int, kinds: list[str], listen: str) -> None:
    rng = random.Random(seed)
    source, got = Sparse(seed), list[int]()

    def slow(x: int) -> None:
        if window < 10 and x % 40 == 0:
            threading.Event().wait(0.008)
        got.append(x)

    async with Chain([source, some, lambda x: x, slow], folder, window_messages=window, listen=listen) as chain:
        await trouble(chain, got, rng, rounds, kinds)
        source.stop()
        await chain.finished()
    assert got == [x for x in range(source.made) if some(x) is not None]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("window", [4, 64])
@pytest.mark.parametrize("kinds", [["cut"], ["cut", "kill"], ["move", "back"], ["cut", "shape"]], ids="-".join)
def test_nothing_is_lost_or_doubled(loop: str, window: int, kinds: list[str], tmp_path: Path) -> None:
    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(flow(window, tmp_path, window, 6, kinds, "unix:"))
