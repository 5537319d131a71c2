"""Which master leads, in histories of masters that crash, pause and can't reach the lease or each other.

Hours of virtual time, as in `tests/sim`: not measured. The rules one by one are in `test_election`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nomad.master.kube.election import SILENCE, Election, Lease, Step

pytestmark = pytest.mark.no_cover

SECONDS, RENEW = 13.0, 10.0
TICK = 0.25
CALL_EVERY, PATIENCE = 1.0, 2.5


@dataclass
class Master:
    """One process, with what is under way between it and the lease."""

    election: Election
    rate: float = 1.0
    """How fast its clock is."""
    writing: Write | None = None
    heard: list[tuple[float, Lease | None]] = field(default_factory=list)
    """What a watch brings, and when."""
    calls: list[tuple[float, Master, float | None, float]] = field(default_factory=list)
    """From other masters: when it arrives, from whom, when that one called; None: it is an answer to the last one."""
    called: dict[str, tuple[float, bool]] = field(default_factory=dict)
    """Whom it has called, when, and whether that is answered, by its own clock."""
    paused_until: float = 0.0
    cut_until: float = 0.0
    """It doesn't reach the API."""
    alive: bool = True


@dataclass
class Write:
    """One that is under way."""

    master: Master
    began: float
    """By the master's clock."""
    arrives: float
    base: Lease | None
    new: Lease
    fate: str
    """"answered", "lost" (the answer is), "late" (it arrives after it was given up)"""


@dataclass
class World:
    """The lease, and masters on it. `rng` decides about everything that isn't the election's."""

    rng: Random
    trouble: float
    skew: float = 0.0
    delays: tuple[float, ...] = (0.0, 0.25, 1.0)
    """Of a write, and of what a watch brings, when there is no trouble."""
    lease: Lease | None = None
    now: float = 1000.0
    masters: list[Master] = field(default_factory=list)
    late: list[Write] = field(default_factory=list)
    versions: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    names: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    api_down_until: float = 0.0
    cuts: dict[tuple[str, str], float] = field(default_factory=dict)
    """What one sends to the other is lost, until then."""

    def start(self) -> Master:
        rate = 1.0 + self.rng.choice([-self.skew, 0.0, self.skew])
        master = Master(Election(f"m{next(self.names)}", SECONDS, RENEW), rate)
        master.heard.append((self.now, self.lease))
        self.masters.append(master)
        return master

    def store(self, new: Lease) -> None:
        self.lease = new
        for master in self.masters:
            delay = self.rng.choice([*self.delays, 6.0 if self.rng.random() < self.trouble else 0.25])
            last = master.heard[-1][0] if master.heard else 0.0
            master.heard.append((max(last, self.now + delay), new))

    def leaders(self) -> list[Master]:
        return [m for m in self.masters if m.alive and m.election.leads(self.now * m.rate)]

    def tick(self) -> None:
        self.now += TICK
        for write in [write for write in self.late if write.arrives <= self.now]:
            self.late.remove(write)
            self.arrive(write)
        alive = [m for m in self.masters if m.alive]
        self.rng.shuffle(alive)
        for master in alive:
            if master.writing is not None and master.writing.arrives <= self.now:
                self.end(master, master.writing)
            if self.now < master.paused_until:
                continue
            steps = [self.watch, self.talk, self.step]
            self.rng.shuffle(steps)
            for step in steps:
                step(master)

    def watch(self, master: Master) -> None:
        while master.heard and max(master.heard[0][0], master.cut_until) <= self.now:
            master.election.saw(master.heard.pop(0)[1], self.now * master.rate)

    def talk(self, master: Master) -> None:
        """Calls and answers, over connections that keep the order in each direction."""
        now = self.now * master.rate
        for message in [message for message in master.calls if message[0] <= self.now]:
            master.calls.remove(message)
            _, other, called, at = message
            if called is not None:
                master.election.heard(other.election.identity, now)
                self.send(master, other, None, called)
            else:
                master.election.answered(other.election.identity, at, now)
                if master.called.get(other.election.identity, (0.0, False))[0] == at:
                    master.called[other.election.identity] = (at, True)
        if not master.election.leads(now):
            return
        for other in self.masters:
            name = other.election.identity
            at, answered = master.called.get(name, (float("-inf"), True))
            if not answered and now - at > PATIENCE:
                master.election.left(name)
                answered = True
            if other is not master and answered and now - at >= CALL_EVERY:
                master.called[name] = (now, False)
                self.send(master, other, now, now)

    def send(self, sender: Master, to: Master, called: float | None, at: float) -> None:
        cut = self.cuts.get((sender.election.identity, to.election.identity), 0.0)
        if self.now < cut or self.rng.random() < self.trouble / 4:
            return
        delay = self.rng.choice([0.0, 0.25, 3.0 if self.rng.random() < self.trouble else 0.0])
        last = max((message[0] for message in to.calls if message[1] is sender), default=0.0)
        to.calls.append((max(last, self.now + delay), sender, called, at))

    def step(self, master: Master) -> None:
        if master.writing is not None:
            return
        now = self.now * master.rate
        step, _ = master.election.next(now)
        if step is Step.STOP:
            master.alive = False
        elif step is not Step.WAIT:
            fate = "lost" if self.rng.random() < self.trouble else "answered"
            fate = "late" if self.rng.random() < self.trouble / 2 else fate
            arrives = self.now + self.rng.choice(self.delays)
            base, listed = master.election.lease, master.election.writes(now)
            new = Lease(master.election.identity, SECONDS, self.now, "", standbys=listed)
            master.writing = Write(master, now, arrives, base, new, fate)

    def end(self, master: Master, write: Write) -> None:
        """What a master is told of its write. It takes note though it is paused: that is when the answer came."""
        master.writing = None
        now, new = self.now * master.rate, None
        if write.fate == "late":
            self.late.append(replace(write, arrives=self.now + self.rng.choice([0.5, 3.0, 8.0])))
        elif self.now >= master.cut_until:
            new = self.arrive(write)
        if new is None or write.fate != "answered":
            master.election.failed(now)
        else:
            master.election.wrote(new, write.began)

    def arrive(self, write: Write) -> Lease | None:
        """It is at the API; what the lease is then, if it succeeds."""
        if self.now < self.api_down_until or write.base != self.lease:
            return None
        new = replace(write.new, version=str(next(self.versions)))
        self.store(new)
        return new

    def mischief(self) -> None:
        chance = self.rng.random()
        alive = [m for m in self.masters if m.alive]
        if chance < 0.15 and alive:
            victim = self.rng.choice(alive)
            victim.alive, victim.writing = False, None
            if self.rng.random() < 0.5:  # and somebody can tell
                for other in self.masters:
                    other.election.proven_dead(victim.election.identity)
        elif chance < 0.3 and alive:
            self.rng.choice(alive).paused_until = self.now + self.rng.choice([1.0, 3.0, 5.0, 7.0, 9.0, 20.0])
        elif chance < 0.4 and alive:
            self.rng.choice(alive).cut_until = self.now + self.rng.choice([2.0, 8.0, 20.0])
        elif chance < 0.5:
            self.api_down_until = self.now + self.rng.choice([2.0, 15.0, 60.0])
        elif chance < 0.7 and len(alive) > 1:
            one, other = self.rng.sample([m.election.identity for m in alive], 2)
            until = self.now + self.rng.choice([1.0, 4.0, 9.0, 20.0])
            self.cuts[one, other] = until
            if self.rng.random() < 0.5:
                self.cuts[other, one] = until
        elif chance < 0.75 and alive and self.lease is not None and self.lease.holder:
            holder = next((m for m in alive if m.election.identity == self.lease.holder), None)
            if holder is not None and holder.writing is None and self.now >= self.api_down_until:
                holder.alive = False  # an ordinary end: it gives the lease up
                self.store(Lease("", 1.0, self.now, str(next(self.versions))))
        elif len(alive) < 3:
            self.start()

    def part(self) -> None:
        """A short trouble between one and another, or the API: what calls and their absence are about."""
        alive = [m for m in self.masters if m.alive]
        until = self.now + self.rng.choice([1.0, 3.0, 6.0, 7.5, 9.0, 12.0])
        victim = self.rng.choice(self.leaders() * 2 + alive)
        chance = self.rng.random()
        if len(alive) < 3:
            self.start()
        elif chance < 0.3:
            victim.paused_until = until
        elif chance < 0.6:
            victim.cut_until = until
        else:
            names = [victim.election.identity, self.rng.choice(alive).election.identity]
            self.rng.shuffle(names)
            self.cuts[names[0], names[1]] = until
            if self.rng.random() < 0.5:
                self.cuts[names[1], names[0]] = until

    def run(self, seconds: float) -> None:
        for _ in range(int(seconds / TICK)):
            self.tick()
            assert len(self.leaders()) <= 1, [m.election.identity for m in self.leaders()]

    def written(self) -> int:
        """How often the lease was, since this was asked last."""
        return next(self.versions) - 1


@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.1, 0.4]), st.sampled_from([0.0, 0.03]), st.booleans())
@settings(max_examples=100)
def test_never_two_lead_and_one_does_in_the_end(seed: int, trouble: float, skew: float, short: bool) -> None:
    world = World(Random(seed), trouble, skew)
    world.start()
    world.start()
    for _ in range(800):
        world.run(TICK)
        if not short and world.rng.random() < 0.03:
            world.mischief()
        if short and world.rng.random() < 0.1:
            world.part()
    world.trouble = world.api_down_until = 0.0
    world.cuts.clear()
    if not any(m.alive for m in world.masters):
        world.start()
    for master in world.masters:
        master.paused_until = master.cut_until = 0.0
    for _ in range(int((2 * SECONDS + 10) / TICK)):
        world.run(TICK)
        if not any(m.alive for m in world.masters):
            world.start()
    assert len(world.leaders()) == 1


def undisturbed(masters: int) -> tuple[World, Master]:
    """Masters that have been well for a while, and the one that leads."""
    world = World(Random(1), 0.0, delays=(0.0, TICK))
    for _ in range(masters):
        world.start()
    world.run(60)
    (leader,) = world.leaders()
    assert world.lease is not None
    assert len(world.lease.standbys) == masters - 1
    return world, leader


def test_an_undisturbed_leader_writes_once_in_ten_seconds() -> None:
    for masters in (1, 2, 3):
        world, leader = undisturbed(masters)
        before = world.written()
        world.run(600)
        assert world.leaders() == [leader]
        assert world.written() - before - 1 <= 600 / RENEW


def test_one_that_vanishes_without_a_word_is_followed_within_nine_seconds() -> None:
    """Whenever it does, with one that waits and with two of them; frozen ones are no different from dead ones."""
    for masters, more in itertools.product((2, 3), range(int(RENEW / TICK))):
        world, leader = undisturbed(masters)
        world.run(more * TICK)
        leader.paused_until = float("inf")
        world.run(SILENCE + 1)
        assert len(world.leaders()) == 1, more
        assert world.leaders() != [leader]


def test_who_is_cut_off_from_the_api_and_from_its_standby_is_followed_as_soon() -> None:
    world, leader = undisturbed(2)
    other = next(m for m in world.masters if m is not leader)
    leader.cut_until = float("inf")
    for one, two in itertools.permutations(m.election.identity for m in world.masters):
        world.cuts[one, two] = float("inf")
    world.run(SILENCE + 1)
    assert world.leaders() == [other]


def test_a_standby_that_goes_costs_one_write() -> None:
    world, leader = undisturbed(2)
    for master in world.masters:
        master.alive = master is leader
    before = world.written()
    world.run(600)
    assert world.leaders() == [leader]
    assert world.written() - before - 1 <= 600 / RENEW + 1


def test_one_way_without_answers_costs_no_more_than_leaving() -> None:
    """Calls arrive, answers don't: the standby is struck off, and the leader goes on."""
    world, leader = undisturbed(2)
    other = next(m for m in world.masters if m is not leader)
    world.cuts[other.election.identity, leader.election.identity] = float("inf")
    before = world.written()
    world.run(600)
    assert world.leaders() == [leader]
    assert world.written() - before - 1 <= 600 / RENEW + 1
