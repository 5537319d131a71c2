"""What is known of a token, and what has to be asked."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from nomad.kubernetes.api import Api
from nomad.kubernetes.reviews import AT_ONCE, TokenReviews
from tests.clock import VirtualClock, settle


class Reviewer:
    """The API: knows `good` as `ada`, and takes its time over all others."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.over = asyncio.Event()

    async def create(self, path: str, body: Any) -> Any:
        token = body["spec"]["token"]
        self.asked.append(token)
        if token != "good":
            await self.over.wait()
            return {"status": {"authenticated": False}}
        return {"status": {"authenticated": True, "user": {"username": "ada"}}}


async def test_who_is_known_does_not_wait_behind_those_who_are_not() -> None:
    reviewer = Reviewer()
    reviews = TokenReviews(cast(Api, reviewer), ["ada"], [], VirtualClock())
    assert await reviews("good")
    strangers = [asyncio.create_task(reviews(f"guess {number}")) for number in range(3 * AT_ONCE)]
    await settle()
    async with asyncio.timeout(5):
        assert await reviews("good")
    assert len(reviewer.asked) == 1 + AT_ONCE
    reviewer.over.set()
    assert not any(await asyncio.gather(*strangers))
