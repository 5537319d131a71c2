from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tests.property.world import FUNCTIONS, World

CHAINS = [(a, b) for a in FUNCTIONS for b in FUNCTIONS]


def happen(world: World, rng: random.Random, *, faults: float, moves: bool) -> None:
    """One thing happens."""
    if moves and rng.random() < 0.1:
        advance(world, rng)
        return
    if rng.random() < faults:
        kind = rng.randrange(6)
        if kind < 3 and world.connections:
            ends = rng.choice([(True, True), (True, False), (False, True)])
            world.break_off(rng.choice(world.connections), dialer=ends[0], listener=ends[1])
        elif kind < 5:
            numbers = rng.sample([1, 2, 3], rng.choice([1, 1, 1, 2, 3]))
            world.restart(sorted(numbers), zombies=rng.random() < 0.3, told=rng.random() < 0.7)
        elif rng.random() < 0.5:
            world.tell(rng.randrange(1, 4))
        else:
            world.dial(rng.randrange(3), zombie=rng.randrange(4))
        return
    kind = rng.randrange(12)
    if kind == 0:
        world.produce(rng.randrange(1, 5))
    elif kind < 5:
        others = [z for z in world.zombies if z.alive] + ([world.next] if world.next else [])
        node = rng.choice(world.nodes[1:] + others)
        node.work(rng.randrange(1, 4))
    elif kind == 5:
        world.now += rng.choice([0.001, 0.005, 0.02])
        if rng.random() < 0.3:
            rng.choice(world.nodes[1:3]).rerun()
    elif kind == 6:
        world.forget()
        for number in range(3):
            if world.nodes[number].outgoing is None:
                world.dial(number)
                break
    elif world.connections:
        connection = rng.choice(world.connections)
        if not world.agree(connection):
            world.collect(connection, rng.choice([1, 40, 1000]))
            move = rng.choice([world.deliver, world.deliver, world.acknowledge])
            for _ in range(rng.randrange(5)):
                move(connection)


def advance(world: World, rng: random.Random) -> None:
    """Something of a move happens, perhaps too early, perhaps never."""
    kind = rng.randrange(12)
    if kind < 2:
        world.prepare(rng.choice([1, 2]))
    elif kind < 6:
        world.greet(before=rng.random() < 0.5)
    elif kind < 8:
        world.hand_over()
    elif kind == 8:
        world.switch()
    elif kind == 9:
        world.end_one(rng.randrange(4))
    elif kind == 10:
        rng.choice(world.nodes[1:3]).release()
    elif rng.random() < 0.3:
        world.roll_back()
    elif rng.random() < 0.5:
        world.tell(rng.choice([1, 2]))


@pytest.mark.parametrize("chain", CHAINS, ids="-".join)
@pytest.mark.parametrize("histories", [12, pytest.param(60, marks=[pytest.mark.slow, pytest.mark.timeout(300)])])
def test_nothing_is_lost_doubled_or_out_of_order(chain: tuple[str, str], histories: int, seed: int) -> None:
    """Random histories; a failing one is repeated by its own seed, which is printed."""
    for number in range(histories):
        own = seed + number
        rng = random.Random(own)
        world = World(*chain, failing=rng.random() < 0.5)
        faults = rng.choice([0.0, 0.01, 0.05, 0.2])
        moves = rng.random() < 0.7
        print(f"seed {own}, faults {faults}, moves {moves}")
        for _ in range(rng.randrange(50, 800)):
            happen(world, rng, faults=faults, moves=moves)
        world.heal()
        world.check()


class Histories(RuleBasedStateMachine):
    """The same world for hypothesis, which finds the shortest history that fails."""

    @initialize(chain=st.sampled_from(CHAINS), failing=st.booleans())
    def start(self, chain: tuple[str, str], failing: bool) -> None:
        self.world = World(*chain, failing=failing)
        for number in range(3):
            self.world.dial(number)
        self.world.round()

    @rule(count=st.integers(1, 6))
    def produce(self, count: int) -> None:
        self.world.produce(count)

    @rule(times=st.integers(1, 3))
    def everything(self, times: int) -> None:
        for _ in range(times):
            self.world.now += 0.01
            self.world.round()

    @rule(number=st.integers(1, 3), count=st.integers(1, 3))
    def work(self, number: int, count: int) -> None:
        self.world.nodes[number].work(count)

    @rule(number=st.integers(1, 2))
    def rerun(self, number: int) -> None:
        self.world.nodes[number].rerun()

    @rule(number=st.integers(0, 2))
    def dial(self, number: int) -> None:
        self.world.dial(number)

    @rule(which=st.integers(0, 9), most=st.sampled_from([1, 1000]))
    @precondition(lambda self: self.world.connections)
    def collect(self, which: int, most: int) -> None:
        self.world.collect(self.world.connections[which % len(self.world.connections)], most)

    @rule(which=st.integers(0, 9), back=st.booleans())
    @precondition(lambda self: self.world.connections)
    def frame(self, which: int, back: bool) -> None:
        connection = self.world.connections[which % len(self.world.connections)]
        if not self.world.agree(connection):
            (self.world.acknowledge if back else self.world.deliver)(connection)

    @rule(which=st.integers(0, 9), ends=st.sampled_from([(True, True), (True, False), (False, True)]))
    @precondition(lambda self: self.world.connections)
    def cut(self, which: int, ends: tuple[bool, bool]) -> None:
        connection = self.world.connections[which % len(self.world.connections)]
        self.world.break_off(connection, dialer=ends[0], listener=ends[1])

    @rule(
        numbers=st.sets(st.integers(1, 3), min_size=1),
        zombies=st.booleans(),
        told=st.booleans(),
    )
    def restart(self, numbers: set[int], zombies: bool, told: bool) -> None:
        self.world.restart(sorted(numbers), zombies=zombies, told=told)

    @rule(number=st.integers(1, 2))
    def prepare(self, number: int) -> None:
        self.world.prepare(number)

    @rule(before=st.booleans())
    @precondition(lambda self: self.world.next)
    def greet(self, before: bool) -> None:
        self.world.greet(before=before)

    @rule()
    @precondition(lambda self: self.world.next)
    def hand_over(self) -> None:
        self.world.hand_over()

    @rule()
    @precondition(lambda self: self.world.next)
    def switch(self) -> None:
        self.world.switch()

    @rule()
    @precondition(lambda self: self.world.next)
    def roll_back(self) -> None:
        self.world.roll_back()

    @rule(which=st.integers(0, 3))
    @precondition(lambda self: self.world.zombies)
    def end_one(self, which: int) -> None:
        self.world.end_one(which)

    @rule(number=st.integers(1, 2))
    def tell(self, number: int) -> None:
        self.world.tell(number)

    @rule(number=st.integers(1, 2))
    def release(self, number: int) -> None:
        self.world.nodes[number].release()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.heal()
            self.world.check()


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=20, stateful_step_count=40, deadline=None)


@pytest.mark.slow
@pytest.mark.timeout(300)
class TestManyHistories(Histories.TestCase):  # type: ignore[misc]
    settings = settings(max_examples=120, stateful_step_count=60, deadline=None)
