"""A scrape of a large cluster: what it says, and that it leaves the loop to others meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from nomad import tasks
from nomad.control import PodStats
from nomad.errors import RequestError
from nomad.master import metrics, rows, show
from nomad.master.metrics import Metrics
from nomad.master.rows import LinkRow, NodeRow, OperatorRow, PipelineRow
from nomad.master.state import History
from nomad.master.views import DataLinkView, OperatorState, Phase
from nomad.measure.book import Book, NodeEstimates, OperatorEstimates
from tests.master.fakepods import Cluster
from tests.master.worlds import World


class Many:
    """Rows of 50 pipelines. `between` is called before each of them."""

    def __init__(self) -> None:
        self.scrapes = 0
        self.between: Callable[[], None] = lambda: None

    def pipeline_rows(self) -> Iterator[PipelineRow]:
        self.scrapes += 1
        for number in range(50):
            self.between()
            op = OperatorRow("work", "n1", True, 0, None, PodStats(processed=number), OperatorEstimates())
            yield PipelineRow(f"p{number}", Phase.RUNNING, [op])

    def node_rows(self) -> Iterator[NodeRow]:
        yield NodeRow("n1", 50, 0.0, 1024.0, NodeEstimates())

    def link_rows(self) -> Iterator[LinkRow]:
        return iter(())

    def connections(self) -> Mapping[str, int]:
        return {"direct": 50}


@pytest.fixture(autouse=True)
def always_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others have their turn whenever they may."""
    monkeypatch.setattr(metrics, "Turns", lambda: tasks.Turns(0.0))


async def test_others_have_their_turn_in_between() -> None:
    many, rounds = Many(), 0
    seen: list[int] = []
    many.between = lambda: seen.append(rounds)

    async def others() -> None:
        nonlocal rounds
        while True:
            rounds += 1
            await asyncio.sleep(0)

    beside = asyncio.create_task(others())
    text = await Metrics(many).text()
    beside.cancel()
    await asyncio.gather(beside, return_exceptions=True)
    assert len(set(seen)) == 50
    assert text.count(b"\nnomad_operator_processed_total{") == 50
    assert b'\nnomad_pipelines{phase="running"} 50.0\n' in text


async def test_of_scrapes_at_once_one_is_made() -> None:
    many = Many()
    made = Metrics(many)
    one, other, gone = (asyncio.create_task(made.text()) for _ in range(3))
    await asyncio.sleep(0)
    one.cancel()
    gone.cancel()
    text = await other
    assert many.scrapes == 1, "who asked first may go without harm to the others"
    assert await made.text() == text
    assert many.scrapes == 2, "a later one is made anew"


async def test_a_scrape_that_fails_says_so_and_the_next_is_another() -> None:
    many = Many()
    made = Metrics(many)

    def fail() -> None:
        raise RequestError("the master isn't running", status=503)

    many.between = fail
    for result in await asyncio.gather(made.text(), made.text(), return_exceptions=True):
        assert isinstance(result, RequestError)
    many.between = lambda: None
    assert b"nomad_operator_up{" in await made.text()


async def test_closing_ends_a_scrape() -> None:
    made = Metrics(Many())
    asked = asyncio.create_task(made.text())
    await asyncio.sleep(0)
    await made.close()
    with pytest.raises(asyncio.CancelledError):
        await asked
    await made.close()


async def test_rows_say_what_views_say(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    async with cluster.run() as master:
        await cluster.submit_and_run()
        cluster.pods["p.square-e1"].beat(processed=5, received=6)
        await cluster.until(lambda: cluster.operator("square").stats.processed == 5)
        for phase in (Phase.RUNNING, Phase.STOPPED):
            (view,), (row,) = master.pipelines(), master.pipeline_rows()
            assert (row.id, row.phase) == (view.id, view.phase) == ("p", phase)
            assert len(row.operators) == len(view.operators)
            for mine, shown in zip(row.operators, view.operators, strict=True):
                assert (mine.name, mine.node, mine.restarts) == (shown.name, shown.node, shown.restarts)
                assert mine.running == (shown.state is OperatorState.RUNNING)
                assert mine.heartbeat_age == shown.heartbeat_age
                assert (mine.stats.processed, mine.stats.received) == (shown.stats.processed, shown.stats.received)
            nodes = [(row.id, row.operators, row.memory_used_mb, row.memory_mb) for row in master.node_rows()]
            assert nodes == [(n.id, len(n.operators), n.memory_used_mb, n.memory_mb) for n in master.nodes()]
            links = {(row.source, row.target): row.rtt for row in master.link_rows()}
            assert links == {(link.source, link.target): link.rtt for link in master.links()}
            if phase is Phase.RUNNING:
                await master.stop("p")
                await cluster.until(lambda: master.pipeline("p").phase is Phase.STOPPED, passing=0.1)


def test_what_ended_processes_counted_is_part_of_it() -> None:
    world = World()
    world.step()
    world.run("square")
    state = world.state("square")
    state.heartbeat_at, state.stats = world.now, PodStats(processed=5, rss=7)
    world.observed.history["p.square"] = History(PodStats(processed=100, rss=9))
    (row,) = rows.pipelines(world.desired, world.requested, world.observed, Book(), world.now + 2.0)
    square = next(op for op in row.operators if op.name == "square")
    assert (square.stats.processed, square.stats.rss, square.heartbeat_age) == (105, 7, 2.0)
    source = next(op for op in row.operators if op.name == "source")
    assert (source.stats, source.heartbeat_age, source.running) == (PodStats(), None, False)


def test_rows_survive_what_happens_between_them() -> None:
    world = World()
    world.step()
    world.run("square")
    world.state("source").links = [DataLinkView("p:source>square", "out", rtt=0.25)]
    args: tuple[Any, ...] = (world.desired, world.requested, world.observed)
    pipelines, nodes = rows.pipelines(*args, Book(), world.now), rows.nodes(*args, Book())
    links, shown = (
        rows.links(world.desired, world.observed, Book()),
        show.links(world.desired, world.observed, Book(), 0.0),
    )
    assert {next(links).rtt, next(shown).rtt} == {0.25}
    assert next(nodes).id == "edge"
    world.desired.pipelines.clear()
    world.observed.pods.clear()
    world.observed.nodes.clear()
    assert [row.id for row in pipelines] == []
    assert [row.id for row in nodes] == ["cloud"]
    assert len([*links, *shown]) == 2
