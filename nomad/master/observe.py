"""Writes what is seen: of pods by the runtime, and what pods say of themselves. The only writer of `Observed`.

Everything from a pod is checked here before it is believed: its process runs users' code. What matters to
the loop wakes it; heart-beats of healthy pods don't, and what they measure goes on to the `Book`.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, replace
from operator import attrgetter
from typing import Any

from pydantic import TypeAdapter, ValidationError

from nomad.clock import Clock
from nomad.control import LinkStatus, PodStats, Role
from nomad.master.pace import Pace
from nomad.master.state import Called, History, Observed, PodState, Tally, pod_id
from nomad.master.views import DataLinkView, FailureView
from nomad.measure.book import Book
from nomad.runtime.base import NodeInfo, ObservedPod, reason_of

log = logging.getLogger(__name__)

COUNTERS = (
    "received",
    "processed",
    "emitted",
    "failed",
    "retried",
    "duplicates",
    "fenced",
    "reconnects",
    "cpu",
    "busy_seconds",
    "sent_bytes",
)
"""Fields of `PodStats` that are added up over an operator's processes; the others are of the present one."""

UNREAL = float(1 << 63)
"""No number that a pod counts comes to this. Larger ones, which text can give, are none that can be divided or written
down, and an infinite one couldn't be read again by the next master.
"""

MAX_TEXT = 20_000
"""Characters of an error's text that are kept."""

_STATS = TypeAdapter(PodStats)
_LINKS = TypeAdapter(list[DataLinkView])
_STATS_NUMBERS = attrgetter(*(name for name, value in asdict(PodStats()).items() if type(value) in (int, float)))
_LINK_NUMBERS = attrgetter("peer_epoch", "unsettled_messages", "unsettled_bytes")
_ENDS = TypeAdapter(list[LinkStatus])
_CALLED = TypeAdapter(Called)


class Observer:
    """Takes in what is seen. Calls `wake` when the loop should look."""

    def __init__(self, observed: Observed, book: Book, clock: Clock, wake: Callable[[], None], pace: Pace) -> None:
        """`pace`: says when a heart-beat was overdue, so that the one that comes is worth a look of the loop."""
        self._observed = observed
        self._book = book
        self._clock = clock
        self._wake = wake
        self._pace = pace
        self.heard = asyncio.Event()
        """Set with each heart-beat, for who looks at what was measured."""
        self.first_failure: Callable[[str, FailureView], None] = _nobody
        """Called when an operator's function has failed that never did before."""

    # What the runtime sees

    def runtime(self, pod: ObservedPod) -> None:
        state = self._state(pod.id)
        state.runtime = pod
        if pod.failed:
            state.start_error = pod.reason
        self._wake()

    def start_failed(self, pod: str, reason: str) -> None:
        self._state(pod).start_error = reason
        self._wake()

    def nodes(self, nodes: Iterable[NodeInfo]) -> list[NodeInfo]:
        """What the runtime says of its nodes; those that came or went."""
        found = {node.id: node for node in nodes}
        before = self._observed.nodes
        changed = [node for id, node in found.items() if id not in before or before[id].ready != node.ready]
        changed += [replace(node, ready=False) for id, node in before.items() if id not in found and node.ready]
        if found != before:
            self._observed.nodes = found
            self._observed.node_changes += 1
            self._wake()
        return changed

    # What came of actions

    def switched(self, pod: str, error: str = "") -> None:
        """That the pod is its operator's present one is written down, or couldn't be."""
        state = self._state(pod)
        state.switched, state.switch_error = not error, error
        self._wake()

    def carried(self, pod: str, error: str = "") -> None:
        """The pod has what its predecessor had set aside, or couldn't get it."""
        state = self._state(pod)
        state.carried, state.carry_error = not error, error
        self._wake()

    def counted(self, move: str, tally: Tally) -> None:
        """What is known of the cost of a move."""
        self._observed.tallies[move] = tally
        self._wake()

    def homeless(self, operator: str, reason: str | None) -> bool:
        """Why there is no other node for an operator, None when there is one; whether that is news."""
        known = self._observed.homeless.pop(operator, None)
        if reason is not None:
            self._observed.homeless[operator] = reason
        self._wake()
        return reason != known

    def over(self, pipeline: str) -> None:
        """It is written down how the pipeline ended."""
        self._observed.over.add(pipeline)
        self._wake()

    # What pods say

    def connected(self, pod: str, connection: int, *, assigned: bool) -> None:
        state = self._state(pod)
        state.connection, state.assigned = connection, assigned
        self._wake()

    def disconnected(self, pod: str, connection: int) -> None:
        state = self._observed.pods.get(pod)
        if state is not None and state.connection == connection:
            state.connection = None
            self._wake()

    def said(self, pod: str, operator: str, message: dict[str, Any]) -> None:
        """Take in what a pod says of itself; the message is used up. Raises `ValueError` when it isn't valid."""
        state = self._state(pod)
        kind = message["type"]
        if kind == "heartbeat":
            self._heartbeat(pod, operator, state, message)
            return
        if kind == "ready":
            address, pid = message.get("address"), message.get("pid")
            if not (address is None or isinstance(address, str)) or not isinstance(pid, int):
                raise ValueError("a ready without a valid address and pid")
            state.assigned, state.address, state.pid = True, address, pid
            state.ready_at = state.ready_at or self._clock.now()
        elif kind == "status":
            state.role, state.ends, state.called = _status(message)
        elif kind == "finished":
            state.finished = True
        elif kind == "leaving":
            state.says_leaving = True
        elif kind == "failed":
            state.error, state.fatal = _error(message.get("error")), message.get("fatal") is True
            self._failed(operator, state.error)
        else:
            raise ValueError(f"a pod doesn't say {kind!r}")
        self._wake()

    # What the loop is done with

    def bury(self, pod: str, operator: str, *, expected: bool, reason: str = "") -> FailureView | None:
        """A pod has ended: keep its counters, and how it ended unless that was `expected`."""
        state = self._observed.pods.pop(pod, PodState())
        if state.runtime is not None and not state.exited:
            # It couldn't be put to work, but its process runs: nobody's from now on, and to be ended.
            self._observed.pods[pod] = PodState(runtime=state.runtime, connection=state.connection)
        history = self._history(operator)
        if state.heartbeat_at is not None:
            history.totals = replace(added(history.totals, state.stats), rss=0, paused=False, at=None)
        if not expected:
            error = state.error or {}
            how = reason or state.start_error or f"its process {reason_of(state.exit_code)}"
            history.failure = FailureView(
                time=self._clock.wall(),
                message=error.get("message") or how,
                type=error.get("type", ""),
                traceback=error.get("traceback", ""),
                exit_code=state.exit_code,
            )
        return history.failure

    def log_lines(self, operator: str, failure: FailureView, lines: list[str]) -> None:
        """The last lines that the pod of this failure printed."""
        history = self._history(operator)
        if history.failure is failure:
            history.failure = replace(failure, log=lines)

    def prune(self, present: Collection[str | None]) -> None:
        """Forget ended pods that nobody asks for any more."""
        for pod in [pod for pod, state in self._observed.pods.items() if state.ended and pod not in present]:
            del self._observed.pods[pod]

    def forget(self, operator: str) -> None:
        """The operator's pipeline was removed."""
        self._observed.history.pop(operator, None)
        self._observed.homeless.pop(operator, None)
        self._observed.over.discard(operator.partition(".")[0])
        self._book.forget(*operator.split("."))

    def restore(self, operator: str, history: History) -> None:
        """What an earlier master kept."""
        self._observed.history[operator] = history

    # Inside

    def _heartbeat(self, pod: str, operator: str, state: PodState, message: dict[str, Any]) -> None:
        given = message.get("stats")
        said = given.pop("links", []) if isinstance(given, dict) else []  # so that they are kept once, as views
        try:
            stats, links = _STATS.validate_python(given), _LINKS.validate_python(said)
        except ValidationError as exc:
            raise ValueError(f"a heart-beat without valid stats: {exc.errors()[0]['msg']}") from None
        if not (_real(_STATS_NUMBERS(stats)) and all(_real(_LINK_NUMBERS(link)) for link in links)):
            raise ValueError("a heart-beat with numbers that can't be")
        now = self._clock.now()
        last = state.heartbeat_at
        again = last is not None and stats.failed > state.stats.failed
        if last is not None and now > last:
            seconds = stats.seconds_since(state.stats) or now - last
            rate = max(0.0, (stats.processed - state.stats.processed) / seconds)
            state.rate = rate if state.rate is None else (rate + state.rate) / 2
        if stats.last_output is None:
            stats.last_output = state.stats.last_output
        state.stats, state.links, state.heartbeat_at = stats, links, now
        if state.runtime is not None:
            self._measured(pod, operator, state.runtime.node, state, now)
        self.heard.set()
        if message.get("error") is not None:
            first = self._history(operator).failure is None
            self._failed(operator, _error(message["error"]), again=again)
            if first and (failure := self._history(operator).failure) is not None:
                self.first_failure(operator, failure)
        if now >= max(last or 0.0, state.ready_at or 0.0) + self._pace.overdue:
            self._wake()

    def _measured(self, pod: str, operator: str, node: str, state: PodState, now: float) -> None:
        """Hand on what a heart-beat says of its operator, and of the links to the nodes of its peers."""
        pipeline, name = operator.split(".")
        self._book.heartbeat(pipeline, name, pod, node, state.stats, now)
        for link in state.links:
            if link.direction != "out":
                continue
            peer = self._observed.pods.get(pod_id(pipeline, link.link.rpartition(">")[2], link.peer_epoch))
            if peer is not None and peer.runtime is not None:
                self._book.link_sample(
                    node,
                    peer.runtime.node,
                    now,
                    round_trip=link.rtt_least,
                    bandwidth=link.bandwidth,
                    reached=link.reached,
                )

    def _failed(self, operator: str, error: dict[str, str], *, again: bool = False) -> None:
        """`again`: something has failed since what is known. Else it may be that, for heart-beats repeat it."""
        history = self._history(operator)
        known = history.failure
        told = error["type"], error["message"], error["traceback"]
        if known is None or again or (known.type, known.message, known.traceback) != told:
            history.failure = FailureView(self._clock.wall(), error["message"], error["type"], error["traceback"])

    def _state(self, pod: str) -> PodState:
        state = self._observed.pods.get(pod)
        if state is None:
            state = self._observed.pods[pod] = PodState()
        return state

    def _history(self, operator: str) -> History:
        return self._observed.history.setdefault(operator, History())


def _nobody(operator: str, failure: FailureView) -> None:
    return


def added(before: PodStats, now: PodStats) -> PodStats:
    """Counters of an operator over its processes: those of ended ones plus those of the present one."""
    sums = {name: getattr(before, name) + getattr(now, name) for name in COUNTERS}
    return replace(now, **sums, last_output=before.last_output if now.last_output is None else now.last_output)


def _real(numbers: Collection[float]) -> bool:
    return -UNREAL < min(numbers) <= max(numbers) < UNREAL and not math.isnan(sum(numbers))


def _status(message: dict[str, Any]) -> tuple[str, dict[tuple[str, str], LinkStatus], Called]:
    """A pod's role, whom the ends of its links are connected to, and how far a last operator has come."""
    try:
        ends = _ENDS.validate_python(message.get("links"))
        called = _CALLED.validate_python(message.get("called") or ())
        return Role(str(message.get("role"))), {(end.link, end.direction): end for end in ends}, called
    except ValidationError as exc:
        raise ValueError(f"a status that isn't valid: {exc.errors()[0]['msg']}") from None


def _error(value: Any) -> dict[str, str]:
    """An error as pods describe it: type, message and traceback, all text."""
    if not isinstance(value, dict):
        raise ValueError("an error must be a map")
    return {key: str(value.get(key, ""))[-MAX_TEXT:] for key in ("type", "message", "traceback")}
