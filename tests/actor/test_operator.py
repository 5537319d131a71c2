from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tests.actor.chain import Chain


def numbers(count: int):
    def source() -> Iterator[int]:
        yield from range(count)

    return source


async def test_one_input_may_give_more_than_a_window_of_outputs(tmp_path: Path) -> None:
    def expand(x: int) -> Iterator[tuple[int, int]]:
        for k in range(100):
            yield x, k

    got: list[tuple[int, int]] = []
    async with Chain([numbers(3), expand, got.append], tmp_path, window_messages=16) as chain:
        await chain.finished()
    assert got == [(x, k) for x in range(3) for k in range(100)]
