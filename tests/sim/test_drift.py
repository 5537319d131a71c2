"""What drift does to a placement that conditions leave behind: measured, detected and decided as in a master.

Hours of virtual time: coverage would double what they cost. The rules one by one are in `tests/scheduler`.
"""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nomad.scheduler import drift
from tests.amount import rest_slow
from tests.sim.drifting import World, chain, node

pytestmark = pytest.mark.no_cover

WORKS = {"source": 1e-5, "detect": 0.01, "sink": 1e-5}
OTHERS = {("cloud", "edge"): 0.03, ("cloud", "fog"): 0.03}


def fog_world(latency: Any, *, works: Any = None, rate: float = 100.0, **options: Any) -> World:
    """Source and sink on a slow edge; `latency(time)` is that between edge and fog, and at 29.4 ms fog and cloud are
    equally good."""

    def of(a: str, b: str, at: float) -> float:
        pair = (min(a, b), max(a, b))
        return float(latency(at)) if pair == ("edge", "fog") else OTHERS[pair]

    nodes = [node("edge", 0.2), node("fog", 4.0), node("cloud", 8.0)]
    pins = {"source": "edge", "sink": "edge"}
    return World(chain(WORKS), nodes, of, works or (lambda name, at: WORKS[name]), rate=rate, pins=pins, **options)


@pytest.mark.parametrize("seed", rest_slow(range(5), quick=[0, 1]))
@pytest.mark.parametrize("noise", rest_slow([0.0, 0.1, 0.3], quick=[0.0, 0.3]))
def test_a_step_is_answered_by_the_right_move_within_four_seconds(noise: float, seed: int) -> None:
    world = fog_world(lambda at: 0.005 if at < 60 else 0.1, noise=noise, seed=seed)
    assert world.placement["detect"] == "fog"
    world.run(60)
    assert world.moves == []
    world.run(120)
    ((at, operator, target, reason),) = world.moves
    assert (operator, target) == ("detect", "cloud")
    assert at <= 64
    assert "the latency between edge and fog went from" in reason
    assert world.placement == world.best(120)


@pytest.mark.parametrize("wave", ["sine", "square"])
@pytest.mark.parametrize("mean", rest_slow([0.0215, 0.025, 0.029, 0.03, 0.035, 0.05], quick=[0.0215, 0.029]))
@pytest.mark.parametrize(("noise", "begins"), [(0.1, 0.0), (0.3, 60.0)])
def test_an_oscillation_moves_at_most_once(wave: str, mean: float, noise: float, begins: float) -> None:
    def latency(at: float) -> float:
        if at < begins:
            return mean
        turn = (at + 1.3) / 10
        return mean + 0.02 * (math.sin(2 * math.pi * turn) if wave == "sine" else 1 if turn % 1 < 0.5 else -1)

    world = fog_world(latency, noise=noise, seed=7)
    world.run(begins + 600)
    assert len(world.moves) <= 1


@pytest.mark.parametrize("seed", rest_slow(range(5), quick=[0]))
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_ramp_is_answered_within_five_seconds_of_the_point_where_it_pays(noise: float, seed: int) -> None:
    world = fog_world(lambda at: min(0.1, 0.005 + max(0.0, at - 60) * 0.095 / 60), noise=noise, seed=seed)
    world.run(60)
    pays = next(at / 4 for at in range(240, 500) if world.pays(at / 4))
    world.run(150)
    ((at, operator, target, _),) = world.moves
    assert (operator, target) == ("detect", "cloud")
    assert pays - 1 <= at <= pays + 5


@pytest.mark.parametrize("seed", rest_slow(range(5), quick=[0]))
def test_an_operator_that_falls_behind_goes_to_a_faster_node_before_its_queue_is_full(seed: int) -> None:
    def work(name: str, at: float) -> float:
        return WORKS[name] * (3 if name == "detect" and at >= 60 else 1)

    world = fog_world(lambda at: 0.005, works=work, rate=200.0, noise=0.1, seed=seed)
    assert world.placement["detect"] == "fog"
    world.run(150)
    ((at, operator, target, reason),) = world.moves
    assert (operator, target) == ("detect", "cloud")
    assert at <= 64
    assert world.fullest < 0.1
    assert "detect can't keep up" in reason or "the work of detect" in reason


@pytest.mark.parametrize("seed", rest_slow(range(3), quick=[0]))
def test_where_heart_beats_are_rare_it_takes_as_many_of_them(seed: int) -> None:
    """8 s apart, as of 1,600 to 3,200 pods."""
    world = fog_world(lambda at: 0.005 if at < 300 else 0.1, noise=0.1, seed=seed, pace=8.0)
    world.run(600)
    ((at, operator, target, _),) = world.moves
    assert (operator, target) == ("detect", "cloud")
    assert at <= 300 + 3 * 8


@pytest.mark.parametrize("seed", rest_slow(range(3), quick=[0]))
@pytest.mark.parametrize("pace", [1.0, 8.0, 16.0])
def test_what_was_measured_before_a_move_isnt_taken_for_what_came_of_it(pace: float, seed: int) -> None:
    """Nothing goes on to an even faster node for a queue of which it isn't known yet that it has gone."""
    works = {"source": 1e-5, "one": 0.01, "two": 0.005, "sink": 1e-5}
    ways = {("edge", "fog"): 0.005, ("big", "edge"): 0.04}

    def work(name: str, at: float) -> float:
        return works[name] * (2.5 if name == "one" and at >= 300 else 1)

    def latency(a: str, b: str, at: float) -> float:
        return ways.get((min(a, b), max(a, b)), 0.03)

    nodes = [node("edge", 0.2), node("fog", 4.0), node("cloud", 8.0), node("big", 16.0)]
    pins = {"source": "edge", "sink": "edge"}
    world = World(chain(works), nodes, latency, work, noise=0.1, seed=seed, pins=pins, pace=pace)
    assert world.placement["one"] == "fog"
    world.run(700)
    assert [(operator, target) for _, operator, target, _ in world.moves] == [("one", "cloud"), ("two", "cloud")]
    assert world.placement == world.best(700)


def test_a_source_that_is_held_back_still_shows_who_is_too_slow() -> None:
    """Queues that are full hide what would be sent: what is busy and behind is taken to be wanted more."""

    def work(name: str, at: float) -> float:
        return WORKS[name] * (6 if name == "detect" and at >= 60 else 1)

    world = fog_world(lambda at: 0.005, works=work, rate=100.0, noise=0.1)
    world.run(90)
    assert [(operator, target) for _, operator, target, _ in world.moves] == [("detect", "cloud")]


@pytest.mark.parametrize("seed", rest_slow(range(3), quick=[0]))
@pytest.mark.parametrize("latency", rest_slow([0.005, 0.028, 0.031], quick=[0.028, 0.031]))
def test_noise_moves_nothing(latency: float, seed: int) -> None:
    """Also where another node is nearly as good."""
    world = fog_world(lambda at: latency, noise=0.3, seed=seed)
    world.run(3600)
    assert world.moves == []


def random_world(seed: int, **options: Any) -> World:
    """Chains of 3 to 6 operators on 3 to 6 nodes; at 60 s two links and an operator become worse, or better."""
    rng = random.Random(seed)
    names = [f"n{number}" for number in range(rng.randint(3, 6))]
    nodes = [node(name, rng.choice([0.5, 1, 2, 4, 8]), cores=8) for name in names]
    pairs = list(itertools.combinations(names, 2))
    before = {pair: rng.uniform(0.005, 0.06) for pair in pairs}
    after = dict(before)
    for pair in rng.sample(pairs, 2):
        after[pair] = before[pair] * rng.choice([0.1, 3, 6, 10])
    works = {f"op{number}": rng.uniform(0.001, 0.03) for number in range(rng.randint(3, 6))}
    heavier, factor = rng.choice(list(works)), rng.choice([1, 1, 3])
    spec = chain(works)
    first, *_, last = works

    def latency(a: str, b: str, at: float) -> float:
        return (before if at < 60 else after)[min(a, b), max(a, b)]

    def work(name: str, at: float) -> float:
        return works[name] * (factor if name == heavier and at >= 60 else 1)

    pins = {first: rng.choice(names), last: rng.choice(names)}
    return World(spec, nodes, latency, work, rate=5.0, pins=pins, seed=seed, **options)


@pytest.mark.parametrize("seed", rest_slow(range(60), quick=range(10)))
def test_after_the_moves_the_latency_is_near_the_best_there_is(seed: int) -> None:
    world = random_world(seed, noise=0.1)
    world.run(60)
    assert world.moves == []
    world.run(240)
    best = world.worth(240, world.best(240))
    assert world.worth(240) <= max(1.1 * best, best + world.settings.absolute)


changing = given(
    seed=st.integers(0, 10**6),
    budget=st.integers(0, 4),
    dwell=st.floats(0, 20),
    period=st.floats(2, 200),
    noise=st.floats(0, 0.5),
)


@settings(max_examples=4)
@changing
def test_no_more_moves_than_the_budget_and_none_within_the_dwell(**conditions: Any) -> None:
    within_the_rules(**conditions)


@pytest.mark.slow
@settings(max_examples=40)
@changing
def test_no_more_moves_whatever_happens(**conditions: Any) -> None:
    within_the_rules(**conditions)


def within_the_rules(seed: int, budget: int, dwell: float, period: float, noise: float) -> None:
    rules = drift.Settings(budget=budget, dwell=dwell, relative=0.0, absolute=0.0, caution=0.0, startup=0.0)
    rng = random.Random(seed)
    levels = [rng.uniform(0.001, 0.1) for _ in range(1000)]
    world = fog_world(lambda at: levels[int(at / period)], noise=noise, seed=seed, settings=rules)
    world.run(300)
    assert len(world.moves) <= budget
    times = [at for at, *_ in world.moves]
    assert all(b - a >= dwell for a, b in itertools.pairwise(times))
