"""What pods print, as an API gives it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from nomad.errors import ApiCrowded, ApiError
from nomad.kubernetes.api import Api
from nomad.runtime import kubelogs, kubepods
from nomad.runtime.base import PodPhase
from tests.clock import VirtualClock
from tests.runtime.test_kuberuntime import pod


class Log:
    """Gives these pieces, or is too busy, once for each of the answers, and keeps what it was asked."""

    def __init__(self, *answers: list[str] | ApiError) -> None:
        self._answers = list(answers)
        self.asked: list[dict[str, Any]] = []

    async def lines(self, path: str, params: dict[str, Any]) -> AsyncIterator[str]:
        self.asked.append(params)
        answer = self._answers.pop(0)
        if isinstance(answer, ApiError):
            raise answer
        for piece in answer:
            yield piece


class Hurried(VirtualClock):
    """Nobody waits."""

    async def sleep(self, seconds: float) -> None:
        return


@pytest.mark.parametrize(
    ("pieces", "lines"),
    [
        (["one\n", "\n", "three\r\n", "four"], ["one", "", "three", "four"]),
        (["\r", "1 %\r", "2 %\r", "\n", "done\n"], ["1 %", "2 %", "done"]),
        (["much ", "more", "\n", "done\n"], ["much ", "more", "done"]),
    ],
)
async def test_what_is_printed_over_and_what_is_long_are_lines_too(pieces: list[str], lines: list[str]) -> None:
    assert await kubelogs.tail(cast(Api, Log(pieces)), "test", "a", None) == lines
    assert await kubelogs.tail(cast(Api, Log(pieces)), "test", "a", 2) == lines[-2:]


async def test_a_log_is_followed_by_the_stamps_of_whole_lines() -> None:
    running, ended = pod("a", "p.a-e1"), pod("a", "p.a-e1", ended=True)
    for item in (running, ended):
        item["metadata"]["uid"] = "u"
    log = Log(
        ["t1 one\n", "t2 \r", "1 %\r", "9 9\r", "\n", "t3 \n"], ["t2 \r", "1 %\r", "\n", "t3 \n", "t4 much ", "z more"]
    )
    states = [running, running, ended]
    found = [kubepods.take(item) for item in states]
    assert found[-1].phase is PodPhase.EXITED

    seen = kubelogs.follow(cast(Api, log), "test", "a", lambda: found.pop(0), Hurried())
    assert [line async for line in seen] == ["one", "1 %", "9 9", "", "much ", "z more"]
    assert [asked.get("sinceTime") for asked in log.asked] == [None, "t3"]


async def test_who_follows_one_log_too_many_is_told_once_and_gets_its_turn() -> None:
    running, ended = pod("a", "p.a-e1"), pod("a", "p.a-e1", ended=True)
    for item in (running, ended):
        item["metadata"]["uid"] = "u"
    crowded = ApiCrowded("too many logs are followed")
    log = Log(crowded, crowded, ["t1 one\n"], [])
    found = [kubepods.take(item) for item in (running, running, running, running, ended)]
    seen = kubelogs.follow(cast(Api, log), "test", "a", lambda: found.pop(0), Hurried())
    waits = "(what pod a prints isn't shown yet: too many logs are followed)"
    assert [line async for line in seen] == [waits, "one"]
