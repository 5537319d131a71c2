"""Network coordinates against networks whose round trips are known."""

from __future__ import annotations

import itertools
import math
import statistics
from random import Random

from nomad.measure.vivaldi import Coordinates


def network(random: Random, count: int) -> dict[tuple[str, str], float]:
    """Nodes in a plane of 60 ms, each behind an access link of up to 20 ms, with noise of 10 %."""
    places = {
        f"n{k}": (random.uniform(0, 0.06), random.uniform(0, 0.06), random.uniform(0, 0.02)) for k in range(count)
    }
    return {
        (a, b): (math.dist(places[a][:2], places[b][:2]) + places[a][2] + places[b][2]) * random.uniform(0.95, 1.05)
        for a, b in itertools.combinations(places, 2)
    }


def learn(random: Random, trips: dict[tuple[str, str], float], rounds: int, neighbours: int) -> Coordinates:
    nodes = sorted({node for pair in trips for node in pair})
    coordinates = Coordinates(random)
    for _ in range(rounds):
        for node in nodes:
            for other in random.sample([n for n in nodes if n != node], neighbours):
                pair = (node, other) if (node, other) in trips else (other, node)
                coordinates.observe(*pair, trips[pair] * random.uniform(0.95, 1.1))
    return coordinates


def test_few_round_trips_predict_all(seed: int) -> None:
    random = Random(seed)
    trips = network(random, 100)
    coordinates = learn(random, trips, rounds=15, neighbours=6)
    errors, stated = [], []
    for pair, trip in trips.items():
        found = coordinates.predict(*pair)
        assert found is not None
        errors.append(abs(found[0] - trip) / trip)
        stated.append(found[1] / found[0])
    assert statistics.median(errors) < 0.15
    assert statistics.mean(errors) < 3 * statistics.mean(stated), "the error that is stated is of the right size"
    assert statistics.mean(stated) < 0.4


def test_an_unknown_node_has_no_prediction() -> None:
    coordinates = Coordinates(Random(1))
    assert coordinates.predict("a", "b") is None
    coordinates.observe("a", "b", 0.05)
    assert coordinates.predict("a", "c") is None
    coordinates.forget("a")
    assert coordinates.predict("a", "b") is None


def test_a_round_trip_of_nothing_does_no_harm() -> None:
    coordinates = Coordinates(Random(1))
    for _ in range(100):
        coordinates.observe("a", "b", 0.0)
        coordinates.observe("b", "c", 0.03)
    found = coordinates.predict("a", "b")
    assert found is not None
    assert 0 <= found[0] < 0.01
    assert math.isfinite(found[1])


def test_its_error_grows_when_the_network_changes(seed: int) -> None:
    random = Random(seed)
    trips = network(random, 30)
    coordinates = learn(random, trips, rounds=20, neighbours=6)
    pair = ("n0", "n1")
    before = coordinates.predict(*pair)
    for other in range(2, 12):
        coordinates.observe("n0", f"n{other}", trips["n0", f"n{other}"] + 0.3)
    after = coordinates.predict(*pair)
    assert before is not None
    assert after is not None
    assert after[1] > before[1]
