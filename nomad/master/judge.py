"""What the master counts on, and what follows for a pipeline: measurements in, decisions of `scheduler.drift` out.

Pure: time is passed in, nothing is awaited. `replan` drives it in the master, simulations on virtual time. It
joins the book, the detectors of change and the problem; the rules are `drift`'s.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from nomad import units
from nomad.control import HEARTBEAT
from nomad.master.problem import Claims, Knowledge, Placed, build, claims, rates
from nomad.master.views import MoveView
from nomad.measure.book import Book
from nomad.measure.survey import MOST_PAIRS_NODES
from nomad.pipeline import PipelineSpec
from nomad.runtime.base import NodeInfo
from nomad.scheduler import detect, drift
from nomad.scheduler.drift import Decision, Situation
from nomad.settings import Windows

MANY_SAMPLES = 20
"""Estimates that vary much never settle; after so many samples they are as good as they get."""


WORTH_SAYING = 0.25
"""Share by which a quantity must have changed to be given as a reason."""


DECIDED = ("drift", "settled")
"""Causes of moves that were decided here."""


@dataclass(slots=True)
class Case:
    """What is remembered of one pipeline."""

    watch: drift.Watch = field(default_factory=drift.Watch)
    history: drift.History = field(default_factory=drift.History)


@dataclass(frozen=True, slots=True)
class Scene:
    """One pipeline as it runs now, and what is beside it."""

    spec: PipelineSpec
    placement: Mapping[str, str]
    """Operator -> node."""
    pins: Mapping[str, str]
    """Operators that can't move -> node."""
    nodes: tuple[NodeInfo, ...]
    """Those that are there."""
    others: tuple[Placed, ...] = ()


@dataclass(frozen=True, slots=True)
class _Claimed:
    placed: Placed
    until: float
    claims: Claims


@dataclass(slots=True)
class Changes:
    """What has changed."""

    pipelines: set[str] = field(default_factory=set)
    """Those of whose operators something has."""
    nodes: set[str] = field(default_factory=set)
    """Of which, or of a link to or from which, something has."""

    def __bool__(self) -> bool:
        return bool(self.pipelines or self.nodes)

    def concern(self, pipeline: str, nodes: Iterable[str]) -> bool:
        """A pipeline that runs on these nodes."""
        return pipeline in self.pipelines or not self.nodes.isdisjoint(nodes)


class Judge:
    """One per master."""

    def __init__(
        self,
        book: Book,
        windows: Windows,
        settings: drift.Settings = drift.DEFAULT,
        *,
        pace: Callable[[], float] = lambda: HEARTBEAT,
    ) -> None:
        """`pace`: seconds between two heart-beats of a pod, which change with the number of pods."""
        self._settings = settings
        self._pace = pace
        self.settings = settings
        """At the present pace."""
        self._book = book
        self._windows = windows
        self._heard = 0
        self._tracks = detect.Tracks()
        self._cases: dict[str, Case] = {}
        self._claimed: dict[str, _Claimed] = {}
        """By pipeline: what each takes is asked for at every look at any other."""
        self._nodes: tuple[NodeInfo, ...] = ()
        self._node_ids: frozenset[str] = frozenset()

    def case(self, pipeline: str) -> Case:
        """What is remembered of a pipeline."""
        return self._cases.setdefault(pipeline, Case())

    def restore(self, pipeline: str, moves: Iterable[MoveView], now: float, wall: float) -> None:
        """What an earlier master moved by itself counts on. `wall`: what `now` is in seconds since the epoch."""
        ages = (wall - (move.finished or move.asked) for move in moves if move.cause in DECIDED)
        self.case(pipeline).history.moved_at.extend(sorted(now - max(0.0, age) for age in ages if age < drift.HOUR))

    def listen(self) -> Changes:
        """Take in what was measured since the last time; what has changed by that."""
        self.settings = self._settings.at_pace(self._pace())
        samples = self._book.since(self._heard)
        self._heard = self._book.newest
        changed = self._tracks.feed((sample.kind, sample.key, sample.value, sample.time) for sample in samples)
        found = Changes()
        for kind, key in changed:
            if kind in detect.OF_NODES:
                found.nodes.update(key)
            else:
                found.pipelines.add(key[0])
        return found

    def forget(self, pipeline: str) -> None:
        """It was removed."""
        self._cases.pop(pipeline, None)
        self._claimed.pop(pipeline, None)
        self._tracks.forget(pipeline)

    def cause(self, scene: Scene, now: float) -> str | None:
        """Why to look at a pipeline now; None: there is no need."""
        return self.case(scene.spec.id).watch.cause(
            now,
            self.settings,
            changed=any(True for _ in self._changed(scene, now)),
            overloaded=bool(self.overloaded(scene.spec)),
            settled=self._settled(scene.spec),
            nodes=self._ids(scene.nodes),
        )

    def looked(self, scene: Scene, now: float) -> None:
        """A look was taken."""
        nodes = self._ids(scene.nodes)
        self.case(scene.spec.id).watch.looked(now, settled=self._settled(scene.spec), nodes=nodes)

    def decide(self, scene: Scene, situation: Situation, now: float) -> Decision:
        """The next move, or none. May take a second on large clusters. Raises `PlacementError`."""
        return drift.decide(situation, self.case(scene.spec.id).history, now, self.settings)

    def situation(self, scene: Scene, now: float) -> Situation:
        """What there is to decide about."""
        spec = scene.spec
        errors: dict[drift.Signal, float] = {}

        def level(signal: drift.Signal) -> float | None:
            found = self._tracks.level(*signal, now)
            if found is None:
                return None
            errors[signal] = found.error
            return found.value

        knowledge = Knowledge(self._book, level)
        overloaded = self.overloaded(spec)
        problem = build(
            spec,
            knowledge,
            scene.nodes,
            pins=scene.pins,
            others=scene.others,
            claimed=lambda placed: self._claims(placed, knowledge, now),
            demand=self._demand(scene, knowledge, overloaded),
            now=scene.placement,
        )
        if len(scene.nodes) > MOST_PAIRS_NODES:
            for a, b in itertools.combinations(sorted(node["id"] for node in problem["nodes"]), 2):
                link = self._book.link(a, b)
                if link.derived and link.latency is not None:
                    errors["latency", (a, b)] = link.latency.deviation
        return Situation(
            problem=problem,
            placement=scene.placement,
            errors=errors,
            overloaded=overloaded,
            queued={op.name: self._queue(spec.id, op.name) for op in spec.operators},
            changes=self._told(scene, now),
        )

    def overloaded(self, spec: PipelineSpec) -> dict[str, float]:
        """Operators that fall behind -> seconds until the credits of their queues run out."""
        found = {}
        for op in spec.operators:
            known = self._book.operator(spec.id, op.name)
            if known.busy is None or known.arrival is None or known.departure is None or known.queue is None:
                continue
            arrival, departure, queue = known.arrival.value, known.departure.value, known.queue.value
            if drift.falls_behind(known.busy.value, arrival, departure, queue, self.settings):
                nbytes = known.queue_bytes.value if known.queue_bytes is not None else 0.0
                growth = arrival - departure
                full = drift.time_to_full(queue, growth, self._windows.messages)
                if queue > 0:
                    full = min(full, drift.time_to_full(nbytes, growth * nbytes / queue, self._windows.bytes))
                found[op.name] = full
        return found

    # -- inside

    def _claims(self, placed: Placed, knowledge: Knowledge, now: float) -> Claims:
        """What a pipeline takes: worked out again once it has moved, or there can be heart-beats that say more."""
        spec = placed.spec
        known = self._claimed.get(spec.id)
        if known is None or now >= known.until or known.placed.spec is not spec or known.placed.nodes != placed.nodes:
            known = self._claimed[spec.id] = _Claimed(placed, now + self._pace(), claims(placed, knowledge))
        return known.claims

    def _ids(self, nodes: tuple[NodeInfo, ...]) -> frozenset[str]:
        """Many pipelines are looked at with the same nodes."""
        if nodes is not self._nodes:
            self._nodes, self._node_ids = nodes, frozenset(node.id for node in nodes)
        return self._node_ids

    def _queue(self, pipeline: str, operator: str) -> float:
        queue = self._book.operator(pipeline, operator).queue
        return queue.value if queue is not None else 0.0

    def _settled(self, spec: PipelineSpec) -> bool:
        for op in spec.operators:
            known = self._book.operator(spec.id, op.name)
            if known.departure is None or not (known.settled or known.departure.samples >= MANY_SAMPLES):
                return False
        return True

    def _demand(self, scene: Scene, knowledge: Knowledge, overloaded: Mapping[str, float]) -> float:
        """What is overloaded holds its source back: more is wanted than is seen."""
        if not overloaded:
            return 1.0
        nodes = {node.id: node for node in scene.nodes}
        arriving = rates(scene.spec, knowledge)
        most = 1.0
        for number, op in enumerate(scene.spec.operators):
            node = nodes.get(scene.placement[op.name])
            load = knowledge.operator(scene.spec, number).work * arriving[op.name]
            if op.name in overloaded and node is not None and load > 0:
                most = max(most, self.settings.headroom * knowledge.speed(node) / load)
        return most

    def _changed(self, scene: Scene, now: float) -> Iterator[tuple[str, tuple[str, ...], detect.Track]]:
        """What changed lately and concerns the pipeline: of many nodes, among which something always changes, only
        what is of those where it is.
        """
        nodes, many = self._ids(scene.nodes), len(scene.nodes) > MOST_PAIRS_NODES
        names, here = {op.name for op in scene.spec.operators}, set(scene.placement.values())
        for kind, key, track in self._tracks.changed(now - self.settings.watch):
            if kind in detect.OF_NODES:
                mine = nodes.issuperset(key) and not (many and here.isdisjoint(key))
            else:
                mine = key[0] == scene.spec.id and key[1] in names and (kind != "queue" or track.direction > 0)
            if mine:
                yield kind, key, track

    def _told(self, scene: Scene, now: float) -> list[str]:
        """The same in words, of what changed much."""
        found = []
        for kind, key, track in self._changed(scene, now):
            if kind in _WORDS and abs(track.value - track.was) >= WORTH_SAYING * track.was:
                what, unit, scale = _WORDS[kind]
                was, value = units.number(track.was * scale), units.number(track.value * scale)
                found.append(f"{what.format(*reversed(key))} went from {was} to {value} {unit}".rstrip())
        return sorted(found)


_WORDS = {
    "latency": ("the latency between {1} and {0}", "ms", 1e3),
    "bandwidth": ("the bandwidth from {1} to {0}", "MB/s", 1e-6),
    "speed": ("the speed of {0}", "", 1.0),
    "work": ("the work of {0}", "ms", 1e3),
    "departure": ("the rate of {0}", "messages per second", 1.0),
    "queue": ("the queue of {0}", "messages", 1.0),
    "output_bytes": ("the output of {0}", "KB per message", 1e-3),
}
"""Kinds whose changes are told, how they are called, their unit and its factor."""
