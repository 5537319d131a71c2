"""Which of several masters leads: what each may conclude from the lease that they share. Pure: time is passed in.

One object of the cluster, the lease, says who leads. Who wants to write it must have seen its present version, so of
two who try only one succeeds. Whoever leads renews it, and leads no longer than it lasts, counted from before the
last renewal was sent. The others take it when it is free, when it hasn't changed for as long as it lasts, counted from
when they saw the last change, or at once when its holder is proven dead. Clocks of two machines are never compared, so
at no time two of them lead.

A lease lasts long, since renewing it is a request. So that a leader which vanishes is missed sooner, the others, here
called standbys, are connected with it, and it calls them each second. What the lease lists is whom the leader has
given a shorter time: such a one may take it `SILENCE` after it last saw it change and last heard its holder. It isn't
the calls that promise something, they only put off what the lease has promised. This is why at no time two lead:

- A standby that is listed in a version of the lease begins to take that version no sooner than `SILENCE` after it saw
  it, which is after the write of it began, and no sooner than `SILENCE` after the last call that it has answered
  until then, which is after that was sent.
- So a leader that counts from before its last successful write, or from before it sent the last call that was
  answered if that is later, stops sooner than any standby begins whom it must take for listed: by `MARGIN`, which is
  there for clocks of different speed, too. It must take for listed whom the last successful write listed, and whom
  any later one does of which nobody knows whether it succeeded, from its beginning on.
- Answers to a leader whose time is over revive it no more: a standby that has begun, and whose write is still under
  way, may hear calls again and answer them.
- A standby that isn't in the present version waits for as long as the lease lasts, as if there were no calls. If it
  was listed before and doesn't know yet, its write is on top of an old version, and fails.

So a leader that misses a standby's answers writes the lease anew, without that one, and owes it nothing any more: one
request, once. It writes one, too, when a standby has come. While all are well, calls cost no request at all. If it
misses a standby and can't write either, it is the one that is cut off, and stops before the standby begins.

`leader` is the only caller, and does what `next` says; `standby` calls and answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import inf

MARGIN = 1.0
"""Seconds that a leader stops before its lease has run out: for its last acts, and for clocks of different speed."""

RETRY = 0.5
"""Seconds until what failed is tried again."""

SILENCE = 8.0
"""Seconds that a listed standby must have heard nothing for, and seen no change, before it takes the lease."""

SPACING = 2.0
"""Seconds from one write to the next, at the least, when it is due only because standbys come and go."""


@dataclass(frozen=True, slots=True)
class Lease:
    """The lease as somebody wrote it."""

    holder: str
    """What its holder calls itself, see `holder_name`; "" when it is free."""
    seconds: float
    """How long it lasts without being renewed."""
    acquired: float
    """When the holder got it, in seconds since the epoch by its own clock."""
    version: str
    """Another one with each write."""
    transitions: int = 0
    standbys: frozenset[str] = frozenset()
    """Who may take it when its holder was silent, though it hasn't run out."""
    silence: float = SILENCE
    """For how long."""


@dataclass(frozen=True, slots=True)
class MasterPod:
    """A pod in which a master runs, as its node has last told. Times by that node's clock, in whole seconds."""

    over: bool
    """Nothing will run in it again."""
    started: float | None = None
    """When the container that runs now was started."""
    finished: float | None = None
    """When the last container that has ended did."""


class Step(Enum):
    """What to do."""

    WAIT = "wait"
    TAKE = "take"
    """Write the lease in one's own name."""
    RENEW = "renew"
    STOP = "stop"
    """Act no more."""


class Election:
    """What one master knows of the lease."""

    def __init__(self, identity: str, seconds: float, renew: float) -> None:
        """`seconds`: how long its own lease lasts; `renew`: how often it is renewed."""
        self.identity = identity
        self.lease: Lease | None = None
        self._seconds = seconds
        self._renew = renew
        self._looked = False
        self._changed_at = 0.0
        """When that was seen."""
        self._free_at = 0.0
        """When it may be taken: whoever holds it leads no more."""
        self._dead: set[str] = set()
        self._heard: tuple[str, float] = ("", 0.0)
        """Who called last, and when."""
        self._connected: set[str] = set()
        """Standbys that answer."""
        self._owed: dict[str, float] = {}
        """Standbys that may be listed, and since when each may have been waiting."""
        self._renewed_at: float | None = None
        """When the last write began that succeeded; None: it has never led."""
        self._listed: frozenset[str] = frozenset()
        """Whom that one listed."""
        self._over = False
        self._not_before = float("-inf")

    # What is seen

    def saw(self, lease: Lease | None, now: float) -> None:
        """What the lease is now (None: there is none), as far as is known."""
        if self._looked and lease == self.lease:
            return
        if lease is not None:
            self._free_at = now + lease.seconds if lease.holder else now
        elif self.lease is not None and self.lease.holder:
            self._free_at = now + self.lease.seconds  # somebody deleted it, and its holder doesn't know
        self.lease, self._looked, self._changed_at = lease, True, now
        if lease is not None and self._renewed_at is not None and lease.holder != self.identity:
            self._over = True  # somebody wrote it who didn't know better

    def proven_dead(self, holder: str) -> None:
        """That holder will never act again."""
        self._dead.add(holder)

    def writes(self, now: float) -> frozenset[str]:
        """It begins to write the lease; whom it has to list."""
        for standby in self._connected:
            self._owed.setdefault(standby, now)
        return frozenset(self._connected)

    def wrote(self, lease: Lease, began: float) -> None:
        """Its own write succeeded, which was begun at `began`."""
        self.lease, self._looked, self._renewed_at, self._listed = lease, True, began, lease.standbys
        self._owed = {standby: max(began, self._owed.get(standby, began)) for standby in lease.standbys}

    def failed(self, now: float) -> None:
        """Its own write failed, or nobody knows."""
        self._not_before = now + RETRY

    # Calls

    def heard(self, holder: str, now: float) -> None:
        """A standby was called by `holder`; it may answer after this."""
        self._heard = (holder, now)

    def answered(self, standby: str, called: float, now: float) -> bool:
        """A standby has answered what it was called at `called`; whether it is one that has just come."""
        if not self.leads(now):
            return False
        if standby in self._owed:
            self._owed[standby] = max(self._owed[standby], called)
        come = standby not in self._connected
        self._connected.add(standby)
        return come

    def left(self, standby: str) -> None:
        """A standby doesn't answer any more."""
        self._connected.discard(standby)

    # What follows

    @property
    def follows(self) -> bool:
        """Whether somebody else has the lease, as far as is known."""
        return self.lease is not None and self.lease.holder not in ("", self.identity)

    def leads(self, now: float) -> bool:
        """Whether it may act."""
        return self.until is not None and not self._over and now < self.until

    @property
    def until(self) -> float | None:
        """When it leads no more unless it renews or is answered; None before it has led."""
        if self._renewed_at is None:
            return None
        return min(self._renewed_at + self._seconds, *(at + SILENCE for at in self._owed.values()), inf) - MARGIN

    def next(self, now: float) -> tuple[Step, float | None]:
        """What to do; for `Step.WAIT`, when to ask again though nothing happens (None: not at all)."""
        if self._renewed_at is not None and self.until is not None:
            if not self.leads(now):
                self._over = True
                return Step.STOP, None
            rest = self._renew if self._connected == self._listed else min(SPACING, self._renew)
            due = max(self._renewed_at + rest, self._not_before)
            return (Step.RENEW, None) if now >= due else (Step.WAIT, min(due, self.until))
        if not self._looked:
            return Step.WAIT, None
        at = self._not_before
        if self.lease is None or (self.lease.holder != self.identity and self.lease.holder not in self._dead):
            at = max(at, self._taken_at())
        return (Step.TAKE, None) if now >= at else (Step.WAIT, at)

    def _taken_at(self) -> float:
        """When it may be taken from whoever holds it, unless that one is heard until then."""
        if self.lease is None or self.identity not in self.lease.standbys:
            return self._free_at
        holder, heard = self._heard
        since = max(self._changed_at, heard) if holder == self.lease.holder else self._changed_at
        return min(self._free_at, since + self.lease.silence)


def holder_name(pod: str, token: str) -> str:
    """What a process calls itself that runs in a pod ("" for none); another name after each start."""
    return f"{pod}_{token}"


def pod_of(holder: str) -> str:
    """The pod that a holder runs in, "" when in none. No pod's name has an underscore."""
    return holder.partition("_")[0]


def is_dead(lease: Lease, pod: MasterPod | None) -> bool:
    """Whether the holder of a lease is certain to have ended, by what is known of its pod (None: it is gone).

    Only times of the holder's own node are compared. A container's are cut to whole seconds, so what began later than
    the lease was acquired by them, did so.
    """
    if pod is None or pod.over:
        return True
    return any(time is not None and time > lease.acquired for time in (pod.started, pod.finished))
