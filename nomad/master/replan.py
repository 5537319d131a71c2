"""Looks whether running pipelines are placed well, orders a move where one pays, and keeps what it found for `explain`.

One task of the master. It wakes with heart-beats, at most every `ROUND` seconds, takes in what they measured, and asks
`judge` about the pipelines that run and may be moved; nothing is done while nothing is heard. Placements are worked
out in a thread. It carries nothing out: orders go to `moves`, and the loop does the rest.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from nomad.clock import Clock
from nomad.errors import NomadError
from nomad.master import moves as orders
from nomad.master import show
from nomad.master.judge import Judge, Scene
from nomad.master.loop import Loop
from nomad.master.moves import MoveLog
from nomad.master.placing import view
from nomad.master.problem import Placed, devices_taken
from nomad.master.state import Desired, DesiredPipeline, Goal, Observed
from nomad.master.views import ConsideredView, ExplainedOperatorView, ExplainView
from nomad.runtime.base import NodeInfo
from nomad.scheduler.drift import Decision, Order, Situation
from nomad.scheduler.sustain import describe_at_most

log = logging.getLogger(__name__)

ROUND = 0.5
"""Seconds between two looks at the least: each pod's heart-beats come twice a second at the most."""


SHARE, BURST = 0.01, 2.0
"""Of one core, what looking may take in the long run, and seconds of it that may be taken at once. Where there are
hundreds of pipelines or nodes they are looked at less often, sooner where something has changed.
"""


@dataclass(frozen=True, slots=True)
class Around:
    """What is the same for all pipelines that are looked at at one moment."""

    nodes: tuple[NodeInfo, ...]
    """Those that are there."""
    ids: frozenset[str]
    placed: Mapping[str, Placed]
    """By id, the pipelines that aren't over."""


class Allowance:
    """Keeps to `SHARE`."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._at = clock.now()
        self._left = BURST

    @contextmanager
    def taken(self) -> Iterator[None]:
        """The CPU time of this thread counts. Nothing is to be awaited inside."""
        began = time.thread_time()
        try:
            yield
        finally:
            self.take(time.thread_time() - began)

    def take(self, seconds: float) -> None:
        """So much was used."""
        self._left -= seconds

    @property
    def spent(self) -> bool:
        return self._left < 0

    def pause(self) -> float:
        """Seconds until there is something left."""
        now = self._clock.now()
        self._left = min(BURST, self._left + SHARE * (now - self._at))
        self._at = now
        return max(0.0, -self._left / SHARE)


@dataclass(frozen=True, slots=True)
class Look:
    """The last time that a pipeline was looked at."""

    time: float
    """Seconds since the epoch."""
    cause: str
    decision: Decision


class Replanner:
    """`run` until cancelled."""

    def __init__(
        self,
        judge: Judge,
        *,
        desired: Desired,
        observed: Observed,
        loop: Loop,
        moves: MoveLog,
        heard: asyncio.Event,
        clock: Clock,
    ) -> None:
        """`heard`: set with each heart-beat."""
        self._judge = judge
        self._desired = desired
        self._observed = observed
        self._loop = loop
        self._moves = moves
        self._heard = heard
        self._clock = clock
        self._known: dict[str, DesiredPipeline] = {}
        """The pipelines that something may be remembered of."""
        self._looks: dict[str, Look] = {}
        self._moving: set[str] = set()
        self._allowance = Allowance(clock)
        self._turn: deque[str] = deque()
        """Ids of pipelines, those first that weren't looked at for longest."""
        self._changed: dict[str, None] = {}
        """Of those that something has changed for since they were looked at, the first ones first."""
        self._missed: dict[str, None] = {}
        """Of those, the ones that were about to change themselves when it was their turn: they are noted again."""
        self._changed_next = False
        self._around: Around | None = None
        """None: to be looked up."""
        self._troubles: dict[str, str] = {}
        """Why a pipeline couldn't be looked at the last time."""

    async def run(self) -> None:
        """Look after each round of heart-beats."""
        await asyncio.to_thread(_load)  # so that the first submission needn't
        while True:
            await self._heard.wait()
            self._heard.clear()
            self._around = None
            self._listen()  # isn't charged: the more there was to hear, the less would be looked at, at last nothing
            if not self._allowance.pause():
                await self._look_at_all()
            await self._clock.sleep(ROUND)

    async def _look_at_all(self) -> None:
        """Or at some of them, as far as the allowance goes."""
        noted = set(self._changed)
        for id, wanted in self._in_turn():
            try:
                if not await self._look(id, wanted) and id in noted:
                    self._missed[id] = None
                self._troubles.pop(id, None)
            except NomadError as exc:
                self._trouble(id, str(exc), None)
            except Exception as exc:  # noqa: BLE001 - advice on placement must not end what keeps pipelines at work
                self._trouble(id, f"{type(exc).__name__}: {exc}", exc)
            if self._allowance.spent:
                return  # the others are first in the next round

    def problem(self, wanted: DesiredPipeline) -> Mapping[str, Any]:
        """A pipeline's placement problem as it is now, placed or not: what is counted on, and what the others take."""
        return self._situation(wanted).problem

    async def explain(self, wanted: DesiredPipeline, measured: Mapping[str, float | None]) -> ExplainView:
        """Why each operator is where it is, by what is known now. `measured`: operator -> seconds from the source to
        its end."""
        spec = wanted.spec
        situation = self._situation(wanted)
        found, share = await asyncio.to_thread(describe_at_most, situation.problem, situation.placement)
        operators = []
        for op in spec.operators:
            reason = found["reasons"][op.name] if found is not None else None
            second = reason["runner_up"] if reason else None
            placed = wanted.placement[op.name]
            operators.append(
                ExplainedOperatorView(
                    name=op.name,
                    node=placed.node,
                    pinned=op.name in wanted.bound,
                    terms=dict(reason["terms"]) if reason else {},
                    waits_for=reason["waits_for"] if reason else None,
                    finish=reason["finish"] if reason else None,
                    measured=measured.get(op.name),
                    runner_up=second["node"] if second else None,
                    runner_up_latency=second["latency"] if second else None,
                    why_not=second["why"] if second else "",
                    decided=placed.summary,
                )
            )
        look = self._looks.get(spec.id)
        now = self._clock.now()
        history = self._judge.case(spec.id).history
        return ExplainView(
            pipeline=spec.id,
            rate=situation.problem["pipeline"]["rate"],
            sustained=share,
            predicted=found["latency"] if found is not None else None,
            measured=measured.get(spec.operators[-1].name),
            operators=operators,
            considered=_considered(look) if look is not None else None,
            moves=wanted.moves,
            moves_left=history.left(now, self._judge.settings),
        )

    # -- inside

    def _trouble(self, id: str, words: str, exc: Exception | None) -> None:
        """A pipeline couldn't be looked at. Said once, not in every round."""
        if self._troubles.get(id) != words:
            self._troubles[id] = words
            log.warning("%s isn't replanned: %s", id, words, exc_info=exc)

    def _listen(self) -> None:
        """Take in what was measured, and forget pipelines that were removed: others may have their names.

        Those that are new are next, and those that something has changed for sooner than the others.
        """
        changes = self._judge.listen()
        for id, known in list(self._known.items()):
            if self._desired.pipelines.get(id) is not known:
                del self._known[id]
                self._looks.pop(id, None)
                self._moving.discard(id)
                self._troubles.pop(id, None)
                self._judge.forget(id)
        there = self._desired.pipelines
        self._turn = deque(
            dict.fromkeys((*(there.keys() - self._known.keys()), *(id for id in self._turn if id in there)))
        )
        self._changed |= self._missed
        self._missed.clear()
        if changes:
            self._changed |= {id: None for id, wanted in there.items() if changes.concern(id, _nodes(wanted))}
        self._known.update(there)

    def _in_turn(self) -> Iterator[tuple[str, DesiredPipeline]]:
        """All pipelines once, beginning where the last round has ended. Every second one, as long as there are such, is
        one that something has changed for since it was its turn.
        """
        done: set[str] = set()
        for _ in range(len(self._turn) + len(self._changed)):
            self._changed_next = not self._changed_next
            first = self._changed if self._changed_next and self._changed else self._turn
            id = next(iter(first), "")
            self._changed.pop(id, None)
            wanted = self._desired.pipelines.get(id)
            if id in self._turn:
                self._turn.remove(id)
            if wanted is not None:
                self._turn.append(id)
                if id not in done:
                    done.add(id)
                    yield id, wanted

    async def _look(self, id: str, wanted: DesiredPipeline) -> bool:
        """False: not now, as an operator is on its way or doesn't run."""
        now = self._clock.now()
        if wanted.orders:
            self._moving.add(id)
            return False
        if id in self._moving:
            self._moving.discard(id)
            self._judge.case(id).history.finished(now)
        with self._allowance.taken():
            if not wanted.moves:
                return True
            if not self._runs(id, wanted):
                return False
            scene = self._scene(wanted)
            cause = self._judge.cause(scene, now)
            if cause is None:
                return True
            situation = self._judge.situation(scene, now)
        decision = await asyncio.to_thread(self._decide, scene, situation, now)
        self._around = None
        if self._desired.pipelines.get(id) is not wanted:
            return True  # it was removed meanwhile
        self._judge.looked(scene, now)
        self._looks[id] = Look(self._clock.wall(), cause, decision)
        if decision.order is None:
            log.debug("%s stays as it is (%s): %s", id, cause, decision.text)
            return True
        changed = wanted.orders or not wanted.moves
        if not changed and self._scene(wanted).placement == scene.placement:
            await self._order(wanted, decision.order, situation, cause)
            self._around = None
        return True

    def _decide(self, scene: Scene, situation: Situation, now: float) -> Decision:
        with self._allowance.taken():
            return self._judge.decide(scene, situation, now)

    async def _order(self, wanted: DesiredPipeline, order: Order, situation: Situation, cause: str) -> None:
        id = wanted.spec.id
        used = show.memory_used(self._desired, self._loop.requested)
        devices = show.devices_used(self._desired, self._loop.requested)
        orders.check(wanted, order.operator, order.node, self._loop.requested, self._observed, used, devices)
        history = self._judge.case(id).history
        why = "settled" if cause == "settled" and not history.moved_at else "drift"
        after = {**situation.placement, order.operator: order.node}
        found, _ = await asyncio.to_thread(describe_at_most, situation.problem, after)
        placement = view(found["reasons"][order.operator], pinned=False) if found is not None else None
        predicted = {"latency_after": order.after}
        if order.before is not None and math.isfinite(order.before):
            predicted |= {"latency_before": order.before, "gain": order.before - order.after}
        await self._moves.order(
            wanted,
            order.operator,
            order.node,
            cause=why,
            reason=order.reason,
            predicted=predicted,
            placement=placement,
        )
        history.ordered(order, self._clock.now())
        self._moving.add(id)

    def _runs(self, id: str, wanted: DesiredPipeline) -> bool:
        """Whether all of its operators are at work, on nodes that are there."""
        have = self._loop.requested.pipelines.get(id)
        if have is None or have.outcome is not None or wanted.goal is not Goal.RUN or self._desired.closing:
            return False
        states = [self._observed.pods.get(op.pod or "") for op in have.operators.values()]
        at_work = all(state is not None and state.ready_at is not None for state in states)
        return at_work and self._surroundings().ids.issuperset(self._placement(wanted).values())

    def devices_taken(self, wanted: DesiredPipeline) -> dict[str, dict[str, int]]:
        """Of each node the devices that other pipelines have there."""
        self._around = None
        return devices_taken(self._others(wanted))

    def _others(self, wanted: DesiredPipeline) -> tuple[Placed, ...]:
        return tuple(placed for id, placed in self._surroundings().placed.items() if id != wanted.spec.id)

    def _surroundings(self) -> Around:
        if self._around is None:
            nodes = tuple(node for node in self._observed.nodes.values() if node.ready)
            self._around = Around(
                nodes,
                frozenset(node.id for node in nodes),
                {
                    id: Placed(other.spec, self._placement(other))
                    for id, other in self._desired.pipelines.items()
                    if not self._loop.is_over(id)
                },
            )
        return self._around

    def _placement(self, wanted: DesiredPipeline) -> dict[str, str]:
        return {name: placed.node for name, placed in wanted.placement.items()}

    def _scene(self, wanted: DesiredPipeline) -> Scene:
        around = self._surroundings()
        pins = {name: node for name, node in wanted.bound.items() if node in around.ids}
        return Scene(wanted.spec, self._placement(wanted), pins, around.nodes, self._others(wanted))

    def _situation(self, wanted: DesiredPipeline) -> Situation:
        self._listen()
        self._around = None
        return self._judge.situation(self._scene(wanted), self._clock.now())


def _load() -> None:
    """Import the engine, and NumPy with it: a tenth of a second."""
    try:
        importlib.import_module("nomad.scheduler.moves")
    except ModuleNotFoundError as exc:
        log.warning("nothing can be placed: %s", exc)


def _considered(look: Look) -> ConsideredView:
    order = look.decision.order
    return ConsideredView(
        time=look.time,
        cause=look.cause,
        text=look.decision.text,
        latency=look.decision.latency,
        queueing=look.decision.queueing,
        move=f"{order.operator} to {order.node}" if order is not None else None,
    )


def _nodes(wanted: DesiredPipeline) -> Iterator[str]:
    return (placed.node for placed in wanted.placement.values())
