"""`Book`: everything that was measured of a cluster, kept as estimates. Pure: time is passed in, nothing is awaited.

Fed by the master's observer with heart-beats, and by agents with probes and calibrations; read by those
who decide and by the views. It must not know what is configured of emulated nodes and links: only what was measured,
and, as a prior, what a topology declares and a profile says. Unknown is None.

Heart-beats carry counters of a process; a sample is what they advanced by since the sample before. docs/measure.md has
each quantity with its formula.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from nomad.control import PodStats
from nomad.measure.estimate import SETTLED_SAMPLES, Estimate, prior, smooth
from nomad.measure.vivaldi import Coordinates

RATE_MESSAGES = 5
RATE_SECONDS = 3.0
"""A rate is sampled once so many messages or seconds have gone by: counting two or three of them says little."""

FORGET_SECONDS = 60.0
"""What a process has said is forgotten after so long without a word, once there is another. Several heart-beats at the
slowest pace that a master asks for: what speaks isn't gone.
"""

STALE_SECONDS = 60.0
"""A latency that was measured so long before the newest one is less sure than what coordinates predict."""

MOST_PAIRS = 30_000
"""Latencies that are kept where there are coordinates: of a thousand nodes there are half a million pairs."""

SETTLED_RATES = 3
"""Samples of a rate that can be relied on."""

SLIGHT_WORK, SLIGHT_BYTES = 0.0005, 512.0
"""Deviations that no placement depends on, however large a share of the value they are."""

AGREEING_SAMPLES, AGREEING_DEVIATION, MANY_SAMPLES = 4, 0.25, 20
"""A bandwidth counts from so many samples on, once their deviation was at most this share of it; or from so many more.

One or two say little: on a busy machine a link without a limit seems to be filled now and then.
"""

MOST = 1e18
"""What is more than that is no measurement, of whatever it is."""

KEPT_SAMPLES = 4096
"""Raw samples that wait for readers: a second and a half of the most that there are."""

UNNOTED = frozenset({"service", "arrival", "queue_bytes", "busy", "cores_free", "memory_free_mb"})
"""Kinds whose raw samples nobody reads: changes of these aren't looked for."""


@dataclass(slots=True)  # not frozen: see `Estimate`
class OperatorEstimates:
    """One operator, wherever it runs."""

    work: Estimate | None = None
    """Reference-seconds per message."""
    service: Estimate | None = None
    """Seconds per message on the node where it runs."""
    output_bytes: Estimate | None = None
    """Encoded bytes per message sent on."""
    selectivity: Estimate | None = None
    """Messages sent on per message worked off."""
    arrival: Estimate | None = None
    """Messages received per second; None for a source."""
    departure: Estimate | None = None
    """Messages worked off per second; for a source, made."""
    queue: Estimate | None = None
    """Messages received and not yet worked off."""
    queue_bytes: Estimate | None = None
    busy: Estimate | None = None
    """Share of the time that its function runs, 0 to 1. As of work and selectivity, nothing is known of a generator
    that is a source: it is pulled, not called.
    """

    @property
    def settled(self) -> bool:
        """Whether a placement can rely on them: what placing needs is measured and steady.

        What an operator doesn't have (a sink's output, the work of a generator source) isn't waited for.
        """
        return (
            self.departure is not None
            and self.departure.samples >= SETTLED_RATES
            and (self.work is None or self.work.settled or _slight(self.work, SLIGHT_WORK))
            and (self.output_bytes is None or self.output_bytes.settled or _slight(self.output_bytes, SLIGHT_BYTES))
        )


@dataclass(slots=True)
class LinkEstimates:
    """The way from one node to another."""

    latency: Estimate | None = None
    """Seconds one way: half of the round trip, since clocks of two nodes can't be compared. The same both ways."""
    bandwidth: Estimate | None = None
    """Bytes per second that it carries, from transfers that filled it."""
    counted: Estimate | None = None
    """The bandwidth to decide by: what is measured, once several samples have agreed; until then what is declared."""
    reached: float | None = None
    """Bytes per second that it carried lately without being filled: a lower bound, where the bandwidth isn't known."""
    derived: bool = False
    """The latency is predicted by network coordinates and not this link's own; its deviation is their error."""


@dataclass(frozen=True, slots=True)
class NodeEstimates:
    """One node."""

    speed: Estimate | None = None
    """Reference-seconds of work per second and core."""
    cores_free: Estimate | None = None
    memory_free_mb: Estimate | None = None


class Sample(NamedTuple):
    """One raw measurement, before it was smoothed; what detectors of changes look at."""

    number: int
    """Grows by one from sample to sample."""
    time: float
    kind: str
    """A field of the estimates that isn't `UNNOTED`: "latency", "bandwidth", "work", "queue", "speed", ..."""
    key: tuple[str, ...]
    """(pipeline, operator), (from, to) or (node,). A latency is noted once, with the names in order."""
    value: float


@dataclass(slots=True)
class _Pod:
    """What was counted at the last samples of a process."""

    at: float
    stats: PodStats
    rates_at: float
    rates: PodStats


@dataclass(slots=True)
class _Operator:
    estimates: dict[str, Estimate] = field(default_factory=dict)
    pods: dict[str, _Pod] = field(default_factory=dict)
    """Its processes; while it moves there are two."""
    worker: str = ""
    """The one that has worked last, whose beats count."""


class Book:
    """Estimates by what they are of. One per master; used in its event loop only."""

    def __init__(self) -> None:
        self._operators: dict[tuple[str, str], _Operator] = {}
        self._latency: dict[tuple[str, str], Estimate] = {}
        """By pair of nodes in order of their names."""
        self._coordinates: Coordinates | None = None
        self._placed_at = 0.0
        """When the coordinates last heard of a round trip."""
        self._bandwidth: dict[tuple[str, str], Estimate] = {}
        self._declared: dict[tuple[str, str], Estimate] = {}
        """Bandwidths, as a topology has them."""
        self._agreed: set[tuple[str, str]] = set()
        """Ways whose measured bandwidth counts."""
        self._reached: dict[tuple[str, str], float] = {}
        self._nodes: dict[str, dict[str, Estimate]] = {}
        self._samples: deque[Sample] = deque(maxlen=KEPT_SAMPLES)
        self._number = 0

    # -- reading

    def operator(self, pipeline: str, name: str) -> OperatorEstimates:
        """What is known of an operator."""
        known = self._operators.get((pipeline, name))
        return OperatorEstimates(**known.estimates) if known is not None else OperatorEstimates()

    def link(self, source: str, target: str) -> LinkEstimates:
        """What is known of the way from one node to another."""
        pair, way = _pair(source, target), (source, target)
        latency, derived = self._latency.get(pair), False
        if latency is None or not latency.measured or latency.updated < self._placed_at - STALE_SECONDS:
            predicted = self._coordinates.predict(*pair) if self._coordinates is not None else None
            if predicted is not None:
                round_trip, error = predicted
                latency, derived = Estimate(round_trip / 2, error / 2, self._placed_at, 1), True
        return LinkEstimates(
            latency=latency,
            bandwidth=self._bandwidth.get(way),
            counted=(self._bandwidth if way in self._agreed else self._declared).get(way),
            reached=self._reached.get(way),
            derived=derived,
        )

    def ways(self) -> set[tuple[str, str]]:
        """The directed links that something is known of by more than network coordinates."""
        pairs = self._latency.keys()
        return {*pairs, *((b, a) for a, b in pairs), *self._bandwidth, *self._reached}

    def node(self, id: str) -> NodeEstimates:
        """What is known of a node."""
        return NodeEstimates(**self._nodes.get(id, {}))

    def since(self, number: int) -> list[Sample]:
        """The raw samples after this number, oldest first; 0 for all that are kept."""
        found: list[Sample] = []
        for sample in reversed(self._samples):
            if sample.number <= number:
                break
            found.append(sample)
        found.reverse()
        return found

    @property
    def newest(self) -> int:
        """The number of the newest sample, 0 before the first."""
        return self._number

    # -- priors

    def declare_operator(
        self, pipeline: str, name: str, now: float, *, work: float | None = None, output_bytes: float | None = None
    ) -> None:
        """What a profile says; measurements that are there already stay."""
        known = self._operators.setdefault((pipeline, name), _Operator())
        _declare(known.estimates, now, work=work, output_bytes=output_bytes)

    def declare_link(
        self, source: str, target: str, now: float, *, latency: float | None = None, bandwidth: float | None = None
    ) -> None:
        """What a topology says of a directed link. Of two directions that differ, the latency is the mean of both."""
        if bandwidth is not None and (source, target) not in self._bandwidth:
            self._bandwidth[source, target] = self._declared[source, target] = prior(bandwidth, now)
        if latency is not None:
            pair = _pair(source, target)
            known = self._latency.get(pair)
            if known is None:
                self._latency[pair] = prior(latency, now)
            elif not known.measured and known.value != latency:
                self._latency[pair] = prior((known.value + latency) / 2, now)

    def declare_node(self, id: str, now: float, *, speed: float | None = None) -> None:
        """What a topology says of a node."""
        _declare(self._nodes.setdefault(id, {}), now, speed=speed)

    # -- measurements

    def heartbeat(self, pipeline: str, operator: str, pod: str, node: str, stats: PodStats, now: float) -> None:
        """What a pod says of itself. `stats` as it sent them: service times as long as on its node."""
        key = (pipeline, operator)
        known = self._operators.setdefault(key, _Operator())
        before = known.pods.get(pod)
        if before is None:
            # Of a new process the first beat counts for nothing: it has been loading what its function needs.
            known.pods = {id: other for id, other in known.pods.items() if now - other.at < FORGET_SECONDS}
            known.pods[pod] = _Pod(now, stats, now, stats)
            known.worker = known.worker or pod
            return
        if now <= before.at:
            return
        if stats.processed > before.stats.processed:
            known.worker = pod
        if pod != known.worker:
            known.pods[pod] = _Pod(now, stats, now, stats)
            return
        # By the pod's clock: what was held up on its way comes all at once.
        seconds = stats.seconds_since(before.stats) or now - before.at
        for kind, value in self._operator_samples(node, before.stats, stats, seconds):
            self._take(known.estimates, kind, key, value, now)
        before.at, before.stats = now, stats
        seconds = stats.seconds_since(before.rates) or now - before.rates_at
        arrived, departed = stats.received - before.rates.received, stats.processed - before.rates.processed
        if max(arrived, departed) >= RATE_MESSAGES or seconds >= RATE_SECONDS:
            if stats.received:
                self._take(known.estimates, "arrival", key, arrived / seconds, now)
            self._take(known.estimates, "departure", key, departed / seconds, now)
            before.rates_at, before.rates = now, stats

    def link_sample(
        self,
        source: str,
        target: str,
        now: float,
        *,
        round_trip: float | None = None,
        bandwidth: float | None = None,
        reached: float | None = None,
    ) -> None:
        """Seconds there and back, and bytes per second from `source` to `target`; see `nomad.delivery.samples`."""
        if source == target:
            return
        if round_trip is not None and _valid(round_trip):
            pair = _pair(source, target)
            known = self._latency.get(pair)
            if known is not None and not known.measured:
                known = None  # a round trip that was seen says more than any declaration
            self._latency[pair] = smooth(known, round_trip / 2, now)
            self._note("latency", pair, round_trip / 2, now)
            if self._coordinates is not None:
                self._coordinates.observe(*pair, round_trip)
                self._placed_at = now
                if len(self._latency) > MOST_PAIRS:  # coordinates have what those said that nobody measures any more
                    fresh = now - STALE_SECONDS
                    self._latency = {p: known for p, known in self._latency.items() if known.updated >= fresh}
        way = (source, target)
        if bandwidth is not None and _valid(bandwidth) and bandwidth > 0:
            known = self._bandwidth.get(way)
            found = smooth(known if known is not None and known.measured else None, bandwidth, now)
            self._bandwidth[way] = found
            if _agree(found):
                self._agreed.add(way)
            self._note("bandwidth", way, bandwidth, now)
        if reached is not None and _valid(reached):
            self._reached[way] = reached

    def use_coordinates(self, coordinates: Coordinates) -> None:
        """Let network coordinates fill the gaps from now on: there are too many pairs of nodes to measure each."""
        self._coordinates = coordinates

    def node_sample(
        self,
        id: str,
        now: float,
        *,
        speed: float | None = None,
        cores_free: float | None = None,
        memory_free_mb: float | None = None,
    ) -> None:
        """What a node's agent found. A speed is the median of several rounds; it replaces what was declared."""
        known = self._nodes.setdefault(id, {})
        if "speed" in known and speed is not None and not known["speed"].measured:
            del known["speed"]
        given = {"speed": speed, "cores_free": cores_free, "memory_free_mb": memory_free_mb}
        for kind, value in given.items():
            if value is not None:
                self._take(known, kind, (id,), value, now)

    # -- forgetting

    def forget(self, pipeline: str, operator: str) -> None:
        """The operator's pipeline was removed."""
        self._operators.pop((pipeline, operator), None)

    def forget_node(self, id: str) -> None:
        """It has left the cluster."""
        self._nodes.pop(id, None)
        tables: list[MutableMapping[tuple[str, str], Any]] = [
            self._latency,
            self._bandwidth,
            self._declared,
            self._reached,
        ]
        for table in tables:
            for pair in [pair for pair in table if id in pair]:
                del table[pair]
        self._agreed = {way for way in self._agreed if id not in way}
        if self._coordinates is not None:
            self._coordinates.forget(id)

    # -- inside

    def _operator_samples(
        self, node: str, before: PodStats, stats: PodStats, seconds: float
    ) -> Iterator[tuple[str, float]]:
        done = stats.processed - before.processed
        sent = stats.emitted - before.emitted
        running = stats.busy_seconds - before.busy_seconds
        if done > 0 and running > 0:
            service = running / done
            yield "service", service
            speed = self._nodes.get(node, {}).get("speed")
            if speed is not None:
                yield "work", service * speed.value
        if done > 0 and stats.received:
            yield "selectivity", sent / done
        nbytes = stats.sent_bytes - before.sent_bytes
        if sent > 0 and nbytes > 0:
            yield "output_bytes", nbytes / sent
        yield "queue", float(stats.queue_messages)
        yield "queue_bytes", float(stats.queue_bytes)
        if stats.busy_seconds:
            yield "busy", min(1.0, max(0.0, running / seconds))

    def _take(self, estimates: dict[str, Estimate], kind: str, key: tuple[str, ...], value: float, now: float) -> None:
        if 0 <= value <= MOST:
            estimates[kind] = smooth(estimates.get(kind), value, now)
            if kind not in UNNOTED:
                self._note(kind, key, value, now)

    def _note(self, kind: str, key: tuple[str, ...], value: float, now: float) -> None:
        self._number += 1
        self._samples.append(Sample(self._number, now, kind, key, value))


def _declare(estimates: dict[str, Estimate], now: float, **values: float | None) -> None:
    for kind, value in values.items():
        known = estimates.get(kind)
        if value is not None and (known is None or not known.measured):
            estimates[kind] = prior(value, now)


def _agree(bandwidth: Estimate) -> bool:
    """Whether it is more than a few samples that happened to be slow."""
    close = bandwidth.deviation <= AGREEING_DEVIATION * bandwidth.value
    return bandwidth.samples >= (AGREEING_SAMPLES if close else MANY_SAMPLES)


def _slight(estimate: Estimate, deviation: float) -> bool:
    return estimate.samples >= SETTLED_SAMPLES and estimate.deviation <= deviation


def _pair(a: str, b: str) -> tuple[str, str]:
    return (a, b) if a <= b else (b, a)


def _valid(value: float) -> bool:
    return 0 <= value <= MOST
