"""Metrics for Prometheus, made from the views at the moment of the scrape: nothing is counted twice. Moves alone are
added up as they end.

Each master has a registry of its own, so that several can live in one process.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from nomad.master.views import LinkView, MoveView, NodeView, OperatorState, Phase, PipelineView, StatsView

_COUNTERS = {
    "received": "Messages taken in.",
    "processed": "Messages the function was done with, failed ones included.",
    "emitted": "Messages sent on, or returned by the last operator.",
    "failed": "Calls that raised.",
    "retried": "Calls made again after they raised.",
    "duplicates": "Messages recognised as already seen, and dropped.",
    "fenced": "Connections refused for an old epoch.",
    "reconnects": "Data links connected again.",
}
_GAUGES = {
    "set_aside": ("set_aside_messages", "Messages set aside."),
    "queue_messages": ("queue_messages", "Messages received and not yet processed."),
    "queue_bytes": ("queue_bytes", "Bytes received and not yet processed."),
    "unacked_messages": ("unacked_messages", "Messages sent and not yet acknowledged."),
    "unacked_bytes": ("unacked_bytes", "Bytes sent and not yet acknowledged."),
    "service_time": ("service_seconds", "Smoothed seconds of the function per message."),
    "output_bytes": ("output_bytes", "Smoothed bytes per output message."),
    "busy": ("busy_ratio", "Share of the time that the function runs."),
    "rss": ("resident_memory_bytes", "Memory of the operator's process."),
    "paused": ("paused", "1 while the operator waits for credit downstream."),
}


PAUSES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
ROUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0)
PHASES = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


_ESTIMATES = {
    "work": ("work_reference_seconds", "Measured: reference-seconds per message."),
    "selectivity": ("selectivity_ratio", "Measured: messages sent on per message worked off."),
    "arrival": ("arrival_rate", "Measured: messages received per second."),
    "departure": ("departure_rate", "Measured: messages worked off per second."),
}


class Views(Protocol):
    """What a scrape reads: the master's facade."""

    def pipelines(self) -> list[PipelineView]: ...

    def nodes(self) -> list[NodeView]: ...

    def links(self) -> list[LinkView]: ...

    def connections(self) -> Mapping[str, int]: ...


class Metrics(Collector):
    """The metrics of one master."""

    def __init__(self, views: Views) -> None:
        self._views = views
        # Not registered by the constructor's own scrape: there is nothing to show before the master runs.
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        self._moves = Moves(self._registry)
        self._rounds = Histogram(
            "nomad_reconcile_seconds",
            "One round of the master's loop: compare all that is wanted with what is seen, and decide.",
            buckets=ROUNDS,
            registry=self._registry,
        )

    def moved(self, move: MoveView) -> None:
        """A move has come to its end."""
        self._moves.add(move)

    def stepped(self, seconds: float) -> None:
        """The master's loop has gone round once."""
        self._rounds.observe(seconds)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        pipelines = self._views.pipelines()
        yield from _pipelines(pipelines)
        yield from _operators(pipelines)
        yield from _nodes(self._views.nodes())
        yield from _links(self._views.links())
        connected = GaugeMetricFamily("nomad_pods_connected", "Pods connected, and by which way.", labels=["way"])
        for way, count in self._views.connections().items():
            connected.add_metric([way], count)
        yield connected


class Moves:
    """What moves took and cost since the master started: added up, as the list of past moves is bounded."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._ended = Counter("nomad_moves", "Moves that ended.", ["cause", "outcome"], registry=registry)
        self._lost = Counter("nomad_move_lost_messages", "Messages that moves lost.", registry=registry)
        self._doubled = Counter("nomad_move_doubled_messages", "Messages that moves doubled.", registry=registry)
        self._pause = Histogram(
            "nomad_move_pause_seconds",
            "Longest gap between arrivals at the last operator around the switch, beyond the usual one.",
            buckets=PAUSES,
            registry=registry,
        )
        self._phase = Histogram(
            "nomad_move_phase_seconds", "Time in each state of a move.", ["phase"], buckets=PHASES, registry=registry
        )
        self._gain = Histogram(
            "nomad_move_predicted_gain_seconds",
            "Latency per message that a move was to save.",
            buckets=PAUSES,
            registry=registry,
        )

    def add(self, move: MoveView) -> None:
        self._ended.labels(move.cause, move.state).inc()
        for phase in move.phases:
            self._phase.labels(phase.name).observe(phase.seconds)
        for counter, count in ((self._lost, move.lost), (self._doubled, move.doubled)):
            if count is not None:
                counter.inc(count)
        for histogram, seconds in ((self._pause, move.pause), (self._gain, move.predicted_gain)):
            if seconds is not None:
                histogram.observe(seconds)


def _pipelines(pipelines: list[PipelineView]) -> Iterator[Metric]:
    phases = collections.Counter(pipeline.phase for pipeline in pipelines)
    family = GaugeMetricFamily("nomad_pipelines", "Pipelines by phase.", labels=["phase"])
    for phase in Phase:
        family.add_metric([phase], phases[phase])
    yield family


def _operators(pipelines: list[PipelineView]) -> Iterator[Metric]:
    names = ["pipeline", "operator", "node"]
    rows: list[tuple[list[str], StatsView]] = []
    up = GaugeMetricFamily("nomad_operator_up", "1 while the operator is at work.", labels=names)
    restarts = CounterMetricFamily("nomad_operator_restarts", "Pods started after the first.", labels=names)
    age = GaugeMetricFamily("nomad_operator_heartbeat_age_seconds", "Since the last heart-beat.", labels=names)
    cpu = CounterMetricFamily("nomad_operator_cpu_seconds", "CPU time of the operator's processes.", labels=names)
    latency = GaugeMetricFamily(
        "nomad_operator_latency_seconds",
        "From the source's emission to the end of the operator's function, recent messages.",
        labels=[*names, "quantile"],
    )
    for pipeline in pipelines:
        for op in pipeline.operators:
            labels = [pipeline.id, op.name, op.node]
            rows.append((labels, op.stats))
            up.add_metric(labels, op.state is OperatorState.RUNNING)
            restarts.add_metric(labels, op.restarts)
            cpu.add_metric(labels, op.stats.cpu)
            if op.heartbeat_age is not None:
                age.add_metric(labels, op.heartbeat_age)
            for quantile, value in (("0.5", op.stats.latency_p50), ("0.99", op.stats.latency_p99)):
                if value is not None:
                    latency.add_metric([*labels, quantile], value)
    yield from (up, restarts, age, cpu, latency)
    yield from _measured(pipelines, names)
    for name, text in _COUNTERS.items():
        counter = CounterMetricFamily(f"nomad_operator_{name}", text, labels=names)
        for labels, stats in rows:
            counter.add_metric(labels, getattr(stats, name))
        yield counter
    for name, (shown, text) in _GAUGES.items():
        gauge = GaugeMetricFamily(f"nomad_operator_{shown}", text, labels=names)
        for labels, stats in rows:
            if (value := getattr(stats, name)) is not None:
                gauge.add_metric(labels, value)
        yield gauge


def _measured(pipelines: list[PipelineView], names: list[str]) -> Iterator[Metric]:
    """The estimates that placement uses."""
    for name, (shown, text) in _ESTIMATES.items():
        gauge = GaugeMetricFamily(f"nomad_operator_{shown}", text, labels=names)
        for pipeline in pipelines:
            for op in pipeline.operators:
                known = getattr(op.estimates, name)
                if known is not None and known.samples:
                    gauge.add_metric([pipeline.id, op.name, op.node], known.value)
        yield gauge


def _nodes(nodes: list[NodeView]) -> Iterator[Metric]:
    yield GaugeMetricFamily("nomad_nodes", "Nodes of the cluster.", value=len(nodes))
    placed = GaugeMetricFamily("nomad_node_operators", "Operators placed on the node.", labels=["node"])
    used = GaugeMetricFamily("nomad_node_memory_used_bytes", "Memory that they ask for.", labels=["node"])
    memory = GaugeMetricFamily("nomad_node_memory_bytes", "Memory of the node.", labels=["node"])
    for node in nodes:
        placed.add_metric([node.id], len(node.operators))
        used.add_metric([node.id], node.memory_used_mb * 2**20)
        memory.add_metric([node.id], node.memory_mb * 2**20)
    speed = GaugeMetricFamily(
        "nomad_node_speed", "Measured: reference-seconds of work per second and core.", labels=["node"]
    )
    for node in nodes:
        if (known := node.estimates.speed) is not None and known.samples:
            speed.add_metric([node.id], known.value)
    yield from (placed, used, memory, speed)


def _links(links: list[LinkView]) -> Iterator[Metric]:
    rtt = GaugeMetricFamily(
        "nomad_link_round_trip_seconds", "Least round trip of the data links now.", labels=["source", "target"]
    )
    for link in links:
        if link.rtt is not None:
            rtt.add_metric([link.source, link.target], link.rtt)
    ends = ["source", "target"]
    latency = GaugeMetricFamily("nomad_link_latency_seconds", "Measured: one way, half of the round trip.", labels=ends)
    bandwidth = GaugeMetricFamily("nomad_link_bandwidth_bytes_per_second", "Measured.", labels=ends)
    for link in links:
        for family, known in ((latency, link.estimates.latency), (bandwidth, link.estimates.bandwidth)):
            if known is not None and known.samples:
                family.add_metric([link.source, link.target], known.value)
    yield from (rtt, latency, bandwidth)
