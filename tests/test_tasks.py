from __future__ import annotations

import asyncio

import pytest

from nomad.tasks import Tasks, Turns, alongside


async def forever() -> None:
    await asyncio.Event().wait()


async def failing() -> None:
    await asyncio.sleep(0)
    raise ZeroDivisionError


async def test_tasks_are_ended_with_their_owner() -> None:
    tasks = Tasks()
    task = tasks.start(forever(), name="for ever")
    await tasks.close()
    assert task.cancelled()
    await tasks.close()


async def test_a_task_that_fails_is_heard(caplog: pytest.LogCaptureFixture) -> None:
    tasks = Tasks()
    task = tasks.start(failing(), name="the failing one")
    await asyncio.wait({task})
    await tasks.close()
    assert "the failing one failed" in caplog.text


async def test_the_block_ends_the_work() -> None:
    async with alongside(forever(), forever()):
        await asyncio.sleep(0)


async def test_a_block_may_have_no_work_beside_it() -> None:
    async with alongside():
        await asyncio.sleep(0)


async def test_work_that_fails_ends_the_block() -> None:
    with pytest.raises(ZeroDivisionError):
        async with alongside(forever(), failing()):
            await forever()
    current = asyncio.current_task()
    assert current is not None
    assert current.cancelling() == 0


async def test_an_exception_of_the_block_passes_through() -> None:
    with pytest.raises(ValueError, match="mine"):
        async with alongside(forever()):
            raise ValueError("mine")


async def test_a_cancellation_from_outside_stays_one() -> None:
    async def block() -> None:
        async with alongside(forever()):
            await forever()

    task = asyncio.create_task(block())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 10), (3600.0, 0)])
async def test_others_have_their_turn_when_it_is_time(seconds: float, rounds: int) -> None:
    seen = 0

    def others() -> None:
        nonlocal seen
        seen += 1
        asyncio.get_running_loop().call_soon(others)

    asyncio.get_running_loop().call_soon(others)
    turns = Turns(seconds)
    for _ in range(10):
        await turns.give()
    assert seen == rounds
