"""What every store must do, as functions. tests/master/test_sqlite.py and tests/kubernetes/test_envtest_store.py run
them against each kind.

Each gets a function that opens a store over the same world: a second one is what the next master has.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from nomad.clock import SystemClock
from nomad.control import PodStats
from nomad.errors import NomadError, StateError
from nomad.master.events import EventLog
from nomad.master.state import DesiredPipeline, Goal, Outcome
from nomad.master.store import Store, StoredOperator
from nomad.master.views import EventView, FailureView, MovePhase, MoveState, MoveView, PlacementView
from tests.master import worlds

Open = Callable[[], Awaitable[Store]]

BUNDLE = b"the bundle"


def wanted(id: str = "p", bundle: bytes = BUNDLE) -> DesiredPipeline:
    """A pipeline whose bundle has a real hash."""
    return replace(worlds.wanted(id), bundle=hashlib.sha256(bundle).hexdigest())


async def nothing_is_there_at_first(open: Open) -> None:
    store = await open()
    assert await store.pipelines() == []
    assert await store.events(10) == []
    with pytest.raises(StateError, match="is missing"):
        await store.bundle("0" * 64)
    await store.close()


async def everything_is_there_after_a_restart(open: Open) -> None:
    store = await open()
    pipeline = wanted("Test_p")
    pipeline.warnings = ("other numpy",)
    failure = FailureView(1.0, "boom", "ValueError", "Traceback", 1, ["a", "b"])
    square = StoredOperator(
        "square",
        3,
        "Test_p.square-e3",
        "Test_p.square-e3",
        2,
        PodStats(processed=7, last_output=b"\x00\xff"),
        failure,
        4,
    )
    await store.set_meta("overrides", b"\x00 something")
    await store.add_pipeline(pipeline, BUNDLE)
    await store.save_operator("Test_p", square)
    spec = replace(pipeline.spec, profile=({"cloud_execution_time": 0.5}, {}, {}))
    await store.set_spec(spec)
    placement = {**pipeline.placement, "square": PlacementView("fog", "nearer", {"transfer": 0.25}, "edge", "too slow")}
    await store.set_placement("Test_p", placement)
    await store.set_goal("Test_p", Goal.STOP)
    await store.set_outcome("Test_p", Outcome.FAILED, "because")
    await store.close()

    again = await open()
    (found,) = await again.pipelines()
    assert found.wanted == replace(pipeline, goal=Goal.STOP, spec=spec, placement=placement)
    assert (found.outcome, found.reason) == (Outcome.FAILED, "because")
    assert [op for op in found.operators if op.epoch] == [square]
    assert await again.bundle(pipeline.bundle) == BUNDLE
    assert (await again.meta())["overrides"] == b"\x00 something"
    await again.close()


async def pipelines_come_oldest_first(open: Open) -> None:
    store = await open()
    for created, id in enumerate("cab"):
        await store.add_pipeline(replace(wanted(id), created=float(created)), BUNDLE)
    assert [found.wanted.spec.id for found in await store.pipelines()] == ["c", "a", "b"]
    await store.close()


async def an_id_is_given_once(open: Open) -> None:
    store = await open()
    await store.add_pipeline(wanted(), BUNDLE)
    with pytest.raises(NomadError):
        await store.add_pipeline(wanted(bundle=b"another"), b"another")
    (found,) = await store.pipelines()
    assert found.wanted == wanted()
    await store.close()


async def an_id_can_be_used_again(open: Open) -> None:
    store = await open()
    for time in (1.0, 2.0):
        await store.add_pipeline(replace(wanted(), created=time, link_key=bytes([int(time)]) * 32), BUNDLE)
        (found,) = await store.pipelines()
        assert (found.wanted.created, found.wanted.link_key) == (time, bytes([int(time)]) * 32)
        assert ([op for op in found.operators if op.epoch], found.moves, found.outcome) == ([], [], None)
        failed = StoredOperator("square", 3, None, "p.square-e3", 2, PodStats(processed=7), FailureView(1.0, "boom"), 4)
        await store.save_operator("p", failed)
        await store.set_goal("p", Goal.REMOVE)
        await store.remove_pipeline("p", 4)
    assert await store.pipelines() == []
    await store.close()


async def what_is_to_be_removed_is_known_after_a_restart(open: Open) -> None:
    store = await open()
    await store.add_pipeline(wanted(), BUNDLE)
    await store.set_goal("p", Goal.REMOVE)
    await store.close()
    store = await open()
    (found,) = await store.pipelines()
    assert found.wanted.goal is Goal.REMOVE
    await store.remove_pipeline("p", 0)
    await store.close()
    store = await open()
    assert await store.pipelines() == []
    await store.close()


async def a_bundle_stays_while_a_pipeline_has_it(open: Open) -> None:
    store = await open()
    for id in ("p", "q"):
        await store.add_pipeline(wanted(id), BUNDLE)
        await store.save_operator(id, StoredOperator("square", 1, None, "", 0))
    await store.remove_pipeline("p", 4)
    assert await store.bundle(wanted().bundle) == BUNDLE
    assert [found.wanted.spec.id for found in await store.pipelines()] == ["q"]
    await store.remove_pipeline("q", 9)
    assert (await store.meta())["epoch_floor"] == b"9"
    for late in (
        store.save_operator("q", StoredOperator("square", 2, None, "", 0)),
        store.set_outcome("q", Outcome.STOPPED, ""),
        store.set_placement("q", wanted().placement),
    ):
        await late  # without effect
    assert await store.pipelines() == []
    await store.close()


async def moves_pins_and_the_switch_are_kept(open: Open) -> None:
    store = await open()
    pipeline = wanted()
    pipeline.pins, pipeline.moves = {"square": "cloud"}, False
    await store.add_pipeline(pipeline, BUNDLE)
    moves = [
        MoveView(f"m{n}", "p", "square", "cloud", "edge", "user", "because", MoveState.DONE, float(n)) for n in range(5)
    ]
    await store.save_moves(moves, 3)
    placement = {**pipeline.placement, "square": PlacementView("edge", "it was moved")}
    last = replace(
        moves[-1], id="m5", asked=5.0, state=MoveState.SWITCHING, epoch=2, phases=[MovePhase("starting", 0.5)]
    )
    await store.order_move(replace(last, state=MoveState.PLANNED, epoch=0, phases=[]), 3)
    square = StoredOperator("square", 2, "p.square-e2", "p.square-e2", 0, highest=2)
    await store.save_switch("p", square, placement, last)
    await store.set_placing("p", moves=True, pins={})
    await store.close()

    again = await open()
    (found,) = await again.pipelines()
    assert found.moves == [*moves[3:], last]
    assert [op for op in found.operators if op.epoch] == [square]
    assert found.wanted.placement == placement
    assert (found.wanted.moves, found.wanted.pins) == (True, {})
    done = replace(last, state=MoveState.DONE, finished=9.0, lost=0)
    await again.save_moves([done], 3)
    (found,) = await again.pipelines()
    assert found.moves == [*moves[3:], done]
    await again.remove_pipeline("p", 2)
    await again.save_moves([last], 3)  # too late: without effect
    await again.order_move(last, 3)
    assert await again.pipelines() == []
    await again.close()


async def writes_at_the_same_time_all_count(open: Open) -> None:
    store = await open()
    names = [op.name for op in wanted().spec.operators]
    await store.add_pipeline(wanted(), BUNDLE)
    saved = [StoredOperator(name, epoch, f"p.{name}-e{epoch}", "", 0) for epoch in range(1, 6) for name in names]
    await asyncio.gather(
        *(store.save_operator("p", op) for op in saved),
        store.set_placing("p", moves=False, pins={"square": "cloud"}),
        store.set_placement("p", {**wanted().placement, "square": PlacementView("fog", "nearer")}),
    )
    await store.close()
    store = await open()
    (found,) = await store.pipelines()
    assert sorted(op.name for op in found.operators) == sorted(names)
    assert {op.epoch for op in found.operators} == {5}
    assert (found.wanted.moves, found.wanted.pins) == (False, {"square": "cloud"})
    assert found.wanted.node_of("square") == "fog"
    await store.close()


async def events_are_bounded_and_keep_their_numbers(open: Open) -> None:
    store = await open()
    log = EventLog(store, SystemClock(), [], 3)
    live = log.subscribe()
    first = log.add("a", "first")
    for n in range(4):
        log.add("b", f"number {n}", pipeline="p", operator="square", cause=first, data={"n": n})
    await log.flush()
    log.close()
    assert [event.id async for event in live] == [3, 4, 5]  # the reader was slow; it keeps as many as the log does
    kept = await store.events(100)
    assert [event.id for event in kept] == [3, 4, 5]
    assert kept[-1] == EventView(5, kept[-1].time, "b", "number 3", "p", "square", first, {"n": 3})
    await store.close()

    store = await open()
    log = EventLog(store, SystemClock(), await store.events(3), 3)
    assert log.add("c", "after a restart") == 6 + store.event_gap
    assert [event.id for event in log.list(None, 4, 10)] == [5, 6 + store.event_gap]
    assert [event.id for event in log.list("p", 0, 1)] == [5]
    assert log.list(None, 0, 0) == []
    await log.flush()
    await store.close()


async def secrets_are_made_once(open: Open) -> None:
    store = await open()
    assert await store.secret("token", lambda: "made") == "made"
    assert await store.secret("signing_key", lambda: "a key") == "a key"
    await store.close()
    store = await open()
    assert await store.secret("token", lambda: "made again") == "made"
    assert await store.secret("signing_key", lambda: "made again") == "a key"
    assert "signing_key" in store.where("signing_key")
    await store.close()


CHECKS = (
    nothing_is_there_at_first,
    everything_is_there_after_a_restart,
    pipelines_come_oldest_first,
    an_id_is_given_once,
    an_id_can_be_used_again,
    what_is_to_be_removed_is_known_after_a_restart,
    a_bundle_stays_while_a_pipeline_has_it,
    moves_pins_and_the_switch_are_kept,
    writes_at_the_same_time_all_count,
    events_are_bounded_and_keep_their_numbers,
    secrets_are_made_once,
)
