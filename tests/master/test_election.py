"""Which master leads: single rules, and histories of masters that crash, pause and can't reach the lease."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from nomad.master.election import MARGIN, Election, Lease, MasterPod, Step, holder_name, is_dead, pod_of

SECONDS, RENEW = 13.0, 10.0


def lease(holder: str, version: str = "1", *, seconds: float = SECONDS, acquired: float = 0.0) -> Lease:
    return Lease(holder, seconds, acquired, version)


def election() -> Election:
    return Election("me", SECONDS, RENEW)


# Single rules


def test_nothing_is_done_before_it_was_looked_for() -> None:
    assert election().next(100.0) == (Step.WAIT, None)


def test_a_lease_that_isnt_there_or_is_free_is_taken_at_once() -> None:
    for found in (None, lease("")):
        mine = election()
        mine.saw(found, 100.0)
        assert mine.next(100.0) == (Step.TAKE, None)


def test_another_ones_is_taken_when_it_hasnt_changed_for_as_long_as_it_lasts() -> None:
    mine = election()
    mine.saw(lease("other", seconds=20.0), 100.0)
    assert mine.next(100.0) == (Step.WAIT, 120.0)
    mine.saw(lease("other", "2", seconds=20.0), 110.0)
    assert mine.next(129.9) == (Step.WAIT, 130.0)
    assert mine.next(130.0) == (Step.TAKE, None)


def test_what_a_dead_one_holds_is_taken_at_once() -> None:
    mine = election()
    mine.saw(lease("other"), 100.0)
    mine.proven_dead("other")
    assert mine.next(100.0) == (Step.TAKE, None)
    mine.failed(100.0)
    step, at = mine.next(100.0)
    assert step is Step.WAIT
    assert at is not None
    assert mine.next(at) == (Step.TAKE, None)
    mine.saw(lease("third", "2"), 101.0)
    assert mine.next(101.0) == (Step.WAIT, 114.0)


def test_one_that_is_deleted_is_taken_when_its_holder_must_have_noticed() -> None:
    mine = election()
    mine.saw(lease("other"), 100.0)
    mine.saw(None, 105.0)
    assert mine.next(105.0) == (Step.WAIT, 118.0)


def test_a_leader_renews_in_time_or_stops() -> None:
    mine = election()
    mine.saw(None, 100.0)
    mine.wrote(lease("me"), 100.0)
    assert mine.leads(100.0)
    assert mine.next(100.0) == (Step.WAIT, 110.0)
    assert mine.next(110.0) == (Step.RENEW, None)
    mine.wrote(lease("me", "2"), 110.0)
    mine.saw(lease("me", "2"), 110.1)
    assert mine.next(120.0) == (Step.RENEW, None)
    mine.failed(121.8)
    assert mine.next(121.9) == (Step.WAIT, 110.0 + SECONDS - MARGIN)
    assert not mine.leads(122.0)
    assert mine.next(122.0) == (Step.STOP, None)
    mine.wrote(lease("me", "3"), 122.0)
    assert mine.next(122.0) == (Step.STOP, None), "once is for good"


def test_a_leader_whose_lease_another_one_has_stops() -> None:
    mine = election()
    mine.saw(None, 100.0)
    mine.wrote(lease("me"), 100.0)
    mine.saw(lease("other", "2"), 101.0)
    assert not mine.leads(101.0)
    assert mine.next(101.0) == (Step.STOP, None)


def test_its_own_write_that_nobody_answered_is_repeated() -> None:
    mine = election()
    mine.saw(None, 100.0)
    mine.failed(100.0)
    mine.saw(lease("me"), 100.2)
    assert mine.next(101.0) == (Step.TAKE, None)


def test_what_proves_that_a_holder_is_dead() -> None:
    held = lease(holder_name("pod-a", "1f"), acquired=100.7)
    assert pod_of(held.holder) == "pod-a"
    assert pod_of(holder_name("", "1f")) == ""
    assert is_dead(held, None)
    assert is_dead(held, MasterPod(over=True))
    assert not is_dead(held, MasterPod(over=False, started=90.0)), "the container that it runs in"
    assert not is_dead(held, MasterPod(over=False, started=100.0, finished=99.0)), "the one before has ended"
    assert is_dead(held, MasterPod(over=False, finished=105.0))
    assert is_dead(held, MasterPod(over=False, started=101.0, finished=100.0))
    assert not is_dead(held, MasterPod(over=False))


# Histories

TICK = 0.25


@dataclass
class Master:
    """One process, with what is under way between it and the lease."""

    election: Election
    writing: tuple[float, float, Lease | None, str] | None = None
    """When it was begun, when it arrives, on top of what, and what becomes of the answer."""
    heard: list[tuple[float, Lease | None]] = field(default_factory=list)
    """What a watch brings, and when."""
    paused_until: float = 0.0
    alive: bool = True


@dataclass
class World:
    """The lease, and masters on it. `rng` decides about everything that isn't the election's."""

    rng: Random
    trouble: float
    lease: Lease | None = None
    now: float = 1000.0
    masters: list[Master] = field(default_factory=list)
    versions: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    names: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    api_down_until: float = 0.0

    def start(self) -> None:
        master = Master(Election(f"m{next(self.names)}", SECONDS, RENEW))
        master.heard.append((self.now, self.lease))
        self.masters.append(master)

    def store(self, new: Lease) -> None:
        self.lease = new
        for master in self.masters:
            delay = self.rng.choice([0.0, 0.25, 1.0, 6.0 if self.rng.random() < self.trouble else 0.5])
            last = master.heard[-1][0] if master.heard else 0.0
            master.heard.append((max(last, self.now + delay), new))

    def leaders(self) -> list[str]:
        return [m.election.identity for m in self.masters if m.alive and m.election.leads(self.now)]

    def tick(self) -> None:
        self.now += TICK
        for master in [m for m in self.masters if m.alive]:
            self.deliver(master)
            if self.now < master.paused_until:
                continue
            while master.heard and master.heard[0][0] <= self.now:
                master.election.saw(master.heard.pop(0)[1], self.now)
            if master.writing is None:
                step, _ = master.election.next(self.now)
                if step is Step.STOP:
                    master.alive = False
                elif step is not Step.WAIT:
                    arrives = self.now + self.rng.choice([0.0, 0.25, 1.0])
                    fate = "lost" if self.rng.random() < self.trouble else "answered"
                    master.writing = (self.now, arrives, master.election.lease, fate)

    def deliver(self, master: Master) -> None:
        """A write that arrives at the lease, if there is one."""
        if master.writing is None or master.writing[1] > self.now:
            return
        began, _, base, fate = master.writing
        master.writing = None
        if self.now < self.api_down_until or base != self.lease:
            master.election.failed(self.now)
            return
        new = Lease(master.election.identity, SECONDS, self.now, str(next(self.versions)))
        self.store(new)
        if fate == "lost":
            master.election.failed(self.now)
        else:
            master.election.wrote(new, began)

    def mischief(self) -> None:
        chance = self.rng.random()
        alive = [m for m in self.masters if m.alive]
        if chance < 0.2 and alive:
            victim = self.rng.choice(alive)
            victim.alive, victim.writing = False, None
            if self.rng.random() < 0.5:  # and somebody can tell
                for other in self.masters:
                    other.election.proven_dead(victim.election.identity)
        elif chance < 0.4 and alive:
            self.rng.choice(alive).paused_until = self.now + self.rng.choice([1.0, 5.0, 20.0])
        elif chance < 0.5:
            self.api_down_until = self.now + self.rng.choice([2.0, 15.0, 60.0])
        elif chance < 0.6 and alive and self.lease is not None and self.lease.holder:
            holder = next((m for m in alive if m.election.identity == self.lease.holder), None)
            if holder is not None and holder.writing is None and self.now >= self.api_down_until:
                holder.alive = False  # an ordinary end: it gives the lease up
                self.store(replace(self.lease, holder="", version=str(next(self.versions))))
        elif len(alive) < 3:
            self.start()


@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.1, 0.4]))
@settings(max_examples=60)
def test_never_two_lead_and_one_does_in_the_end(seed: int, trouble: float) -> None:
    world = World(Random(seed), trouble)
    world.start()
    world.start()
    for _ in range(1200):
        world.tick()
        assert len(world.leaders()) <= 1, world.leaders()
        if world.rng.random() < 0.03:
            world.mischief()
    world.trouble = world.api_down_until = 0.0
    if not any(m.alive for m in world.masters):
        world.start()
    for master in world.masters:
        master.paused_until = 0.0
    for _ in range(int((2 * SECONDS + 10) / TICK)):
        world.tick()
        assert len(world.leaders()) <= 1
        if not any(m.alive for m in world.masters):
            world.start()
    assert len(world.leaders()) == 1


def test_an_undisturbed_leader_writes_once_in_ten_seconds() -> None:
    world = World(Random(1), 0.0)
    world.start()
    world.start()
    for _ in range(int(600 / TICK)):
        world.tick()
    assert len(world.leaders()) == 1
    assert next(world.versions) - 1 <= 600 / RENEW + 1
