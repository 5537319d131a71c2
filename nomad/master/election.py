"""Which of several masters leads: what each may conclude from the lease that they share. Pure: time is passed in.

One object of the cluster, the lease, says who leads. Who wants to write it must have seen its present version, so of
two who try only one succeeds. Whoever leads renews it, and leads no longer than it lasts, counted from before the
last renewal was sent. The others take it when it is free, when it hasn't changed for as long as it lasts, counted from
when they saw the last change, or at once when its holder is proven dead. Clocks of two machines are never compared, so
at no time two of them lead.

`leader` is the only caller, and does what `next` says.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

MARGIN = 1.0
"""Seconds that a leader stops before its lease has run out: for its last acts, and for clocks of different speed."""

RETRY = 0.5
"""Seconds until what failed is tried again."""


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
        self._free_at = 0.0
        """When it may be taken: whoever holds it leads no more."""
        self._dead: set[str] = set()
        self._renewed_at: float | None = None
        """When the last write began that succeeded; None: it has never led."""
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
        self.lease, self._looked = lease, True
        if lease is not None and self._renewed_at is not None and lease.holder != self.identity:
            self._over = True  # somebody wrote it who didn't know better

    def proven_dead(self, holder: str) -> None:
        """That holder will never act again."""
        self._dead.add(holder)

    def wrote(self, lease: Lease, began: float) -> None:
        """Its own write succeeded, which was begun at `began`."""
        self.lease, self._looked, self._renewed_at = lease, True, began

    def failed(self, now: float) -> None:
        """Its own write failed, or nobody knows."""
        self._not_before = now + RETRY

    # What follows

    def leads(self, now: float) -> bool:
        """Whether it may act."""
        return self.until is not None and not self._over and now < self.until

    @property
    def until(self) -> float | None:
        """When it leads no more unless it renews; None before it has led."""
        return None if self._renewed_at is None else self._renewed_at + self._seconds - MARGIN

    def next(self, now: float) -> tuple[Step, float | None]:
        """What to do; for `Step.WAIT`, when to ask again though nothing happens (None: not at all)."""
        if self._renewed_at is not None and self.until is not None:
            if not self.leads(now):
                self._over = True
                return Step.STOP, None
            due = max(self._renewed_at + self._renew, self._not_before)
            return (Step.RENEW, None) if now >= due else (Step.WAIT, min(due, self.until))
        if not self._looked:
            return Step.WAIT, None
        at = self._not_before
        if self.lease is None or (self.lease.holder != self.identity and self.lease.holder not in self._dead):
            at = max(at, self._free_at)
        return (Step.TAKE, None) if now >= at else (Step.WAIT, at)


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
