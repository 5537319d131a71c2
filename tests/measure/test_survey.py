"""Who is probed when, on virtual time and with a network that answers from a table."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Sequence
from random import Random

import pytest

from nomad.errors import ConnectionBroken
from nomad.measure import book as book_module
from nomad.measure import probes as probes_module
from nomad.measure.agent import Probe
from nomad.measure.book import Book
from nomad.measure.probes import PROBES_PER_SECOND
from nomad.measure.survey import (
    COORDINATE_PROBES,
    MOST_AT_ONCE,
    MOST_ELSEWHERE,
    NEIGHBOURS,
    REFRESH,
    TRIES,
    Survey,
    one_by_one,
)
from tests.clock import VirtualClock


class Network:
    """Answers probes at once; notes them."""

    def __init__(self, clock: VirtualClock, *, bandwidth: float | None = 1e6) -> None:
        self.clock = clock
        self.bandwidth = bandwidth
        self.latency = 0.01
        self.probes: list[tuple[float, str, str, int]] = []
        self.broken: set[str] = set()
        self.asked: list[tuple[str, tuple[str, ...]]] = []
        """Probes that were asked for together."""

    def connected(self, source: str, target: str) -> bool:
        return False

    async def probe(self, source: str, target: str, nbytes: int) -> Probe:
        self.probes.append((self.clock.now(), source, target, nbytes))
        if {source, target} & self.broken:
            raise ConnectionBroken("it is down")
        return Probe(2 * self.latency, (nbytes / self.bandwidth if self.bandwidth else 1e-5) if nbytes else None)

    async def round_trips(self, source: str, targets: Sequence[str]) -> Sequence[float | None]:
        self.asked.append((source, tuple(targets)))
        return await one_by_one(self, source, targets)


class World:
    def __init__(self, count: int, *, bandwidth: float | None = 1e6, most: int = MOST_AT_ONCE) -> None:
        self.clock = VirtualClock()
        self.nodes = [f"n{k}" for k in range(count)]
        self.network = Network(self.clock, bandwidth=bandwidth)
        self.book = Book()
        self.needed = False
        self.survey = Survey(
            self.book, self.network, lambda: self.nodes, lambda: self.needed, self.clock, Random(1), most=most
        )

    async def run(self, seconds: float) -> list[tuple[float, str, str, int]]:
        """The probes of the next seconds."""
        before = len(self.network.probes)
        running = asyncio.create_task(self.survey.run())
        await self.clock.advance(seconds)
        running.cancel()
        await asyncio.wait([running])
        await self.survey.close()
        return self.network.probes[before:]


async def test_in_the_beginning_all_pairs_are_probed_and_then_none() -> None:
    world = World(4)
    probes = await world.run(60)
    assert {(a, b) for _, a, b, _ in probes} == {(a, b) for a in world.nodes for b in world.nodes if a != b}
    for a in world.nodes:
        for b in world.nodes:
            if a != b:
                link = world.book.link(a, b)
                assert link.latency is not None
                assert link.latency.value == pytest.approx(0.01)
                assert link.bandwidth is not None
                assert link.bandwidth.value == pytest.approx(1e6)
    assert await world.run(120) == [], "nobody needs to know"


async def test_what_a_decision_needs_is_kept_fresh_unless_messages_measure_it() -> None:
    world = World(3)
    await world.run(60)
    world.needed = True
    world.network.latency = 0.08
    flowing = asyncio.create_task(flow(world))
    probes = await world.run(10)
    flowing.cancel()
    small = [(a, b) for _, a, b, nbytes in probes if not nbytes]
    assert 3 * TRIES <= small.count(("n0", "n1")) <= (10 / REFRESH + 1) * TRIES
    assert ("n1", "n2") not in small, "messages flow there"
    link = world.book.link("n0", "n1").latency
    assert link is not None
    assert link.value == pytest.approx(0.08, rel=0.01)


async def test_a_bandwidth_that_never_settles_keeps_no_latency_from_being_fresh() -> None:
    world = World(2)
    world.needed = True

    async def vary() -> None:
        while True:
            world.network.bandwidth = 1e6 if world.network.bandwidth == 1e5 else 1e5
            await world.clock.sleep(0.1)

    varying = asyncio.create_task(vary())
    began = world.clock.now()
    probes = await world.run(60)
    varying.cancel()
    small = [began, *(at for at, a, b, nbytes in probes if (a, b) == ("n0", "n1") and not nbytes), began + 60]
    assert max(after - before for before, after in itertools.pairwise(small)) <= 4 * REFRESH


async def flow(world: World) -> None:
    while True:
        world.book.link_sample("n1", "n2", world.clock.now(), round_trip=0.02)
        await world.clock.sleep(0.5)


@pytest.mark.no_cover
async def test_the_budget_holds_on_a_cluster_of_many_nodes() -> None:
    world = World(64)
    world.needed = True
    probes = await world.run(30)
    for node in world.nodes:
        times = [at for at, *ends, _ in probes if node in ends]
        assert all(last - first >= 1 for first, last in zip(times, times[PROBES_PER_SECOND:], strict=False))
    assert len({tuple(sorted((a, b))) for _, a, b, _ in probes}) > 1000


@pytest.mark.no_cover
async def test_a_large_cluster_needs_few_probes_and_knows_all_pairs() -> None:
    world = World(100)
    world.needed = True
    probes = await world.run(90)
    assert all(nbytes == 0 for *_, nbytes in probes)
    assert len(probes) < 90 * len(world.nodes) * 2
    for a in world.nodes:
        for b in world.nodes[:10]:
            if a != b:
                latency = world.book.link(a, b).latency
                assert latency is not None
                assert latency.value == pytest.approx(0.01, rel=0.6)


async def test_many_hundred_nodes_are_probed_less_often() -> None:
    """All of them pass by one master."""
    world = World(300, most=MOST_ELSEWHERE)
    world.needed = True
    await world.run(20)  # the first round, in which nothing is known yet
    probes = await world.run(48)
    assert 0.8 * COORDINATE_PROBES < len(probes) / 48 < 1.2 * COORDINATE_PROBES
    assert len({source for _, source, _, _ in probes}) == 300


@pytest.mark.no_cover
@pytest.mark.parametrize("known", ["reached", "bandwidth"])
async def test_a_quiet_or_a_slow_link_holds_up_nobody_on_a_large_cluster(known: str) -> None:
    """Its hundredth is a byte per second: what a probe costs is owed for 18 minutes."""
    world = World(70)
    for other in world.nodes[1:]:
        world.book.link_sample("n0", other, world.clock.now(), **{known: 100.0})
    world.needed = True
    await world.run(180)
    assert len(await world.run(60)) > 2_000, "nearly as many as may be begun"
    again = max(Counter(target for _, source, target, _ in world.network.probes if source == "n0").values()) > 1
    assert again == (known == "reached"), "a lower bound is no limit"


async def test_a_large_cluster_of_which_few_nodes_are_left_is_measured_all_the_same() -> None:
    world = World(65)
    await world.run(1)
    del world.nodes[3:]
    world.needed = True
    left = {(a, b) for _, a, b, _ in (await world.run(60))[-10:]}
    assert left
    assert {node for way in left for node in way} <= set(world.nodes)


async def test_hundreds_of_nodes_are_probed_once_and_what_is_kept_of_them_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(book_module, "MOST_PAIRS", 3_000)
    monkeypatch.setattr(book_module, "STALE_SECONDS", 10.0)
    monkeypatch.setattr(probes_module, "MOST_LINKS", 3_000)
    world = World(300)
    world.survey._most = MOST_ELSEWHERE
    probes = await world.run(30)
    assert len(probes) == pytest.approx(300 * NEIGHBOURS, rel=0.01)
    assert max(Counter(int(time) for time, *_ in probes).values()) <= MOST_ELSEWHERE
    assert len(world.network.asked) < 400, "those of one node are asked for together"
    assert world.book.link("n1", "n299").latency is not None
    assert await world.run(60) == [], "nobody needs to know"
    world.needed = True
    assert len(await world.run(30)) > 5 * MOST_ELSEWHERE
    assert not world.survey._ways
    assert len(world.book._latency) <= 3_000
    assert len(world.survey._budget._links) <= 3_000
    world.survey.forget("n1")
    assert not any("n1" in way for way in world.survey._round)


async def test_a_link_that_is_too_wide_to_measure_is_left_alone_after_a_while() -> None:
    world = World(2, bandwidth=None)
    probes = await world.run(300)
    assert 4 <= sum(nbytes > 0 for *_, nbytes in probes) <= 8
    link = world.book.link("n0", "n1")
    assert link.bandwidth is None
    assert link.reached is not None


async def test_a_node_that_does_not_answer_holds_up_nobody() -> None:
    world = World(3)
    world.needed = True
    world.network.broken = {"n2"}
    probes = await world.run(30)
    assert world.book.link("n0", "n1").latency is not None
    assert world.book.link("n0", "n2").latency is None
    assert sum("n2" in (a, b) for _, a, b, _ in probes) < 20, "one that fails isn't tried again at once"
    world.network.broken = set()
    await world.run(30)
    assert world.book.link("n0", "n2").latency is not None


async def test_of_several_that_are_probed_together_some_do_not_answer() -> None:
    world = World(80)
    world.network.broken = {"n2"}
    await world.run(60)
    assert world.book.link("n1", "n3").latency is not None
    assert world.book.link("n1", "n2").latency is None
    assert not world.survey._under_way
