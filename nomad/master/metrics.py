"""Metrics for Prometheus, made from the state at the moment of the scrape: nothing is counted twice. Moves alone are
added up as they end.

On a large cluster a scrape is work for a third of a second: it is done a slice at a time, with the master's loop in
between, and once for all who ask meanwhile. Each master has a registry of its own, so that several can live in one
process.
"""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from nomad.master import exposition
from nomad.master.exposition import Column, Table
from nomad.master.rows import LinkRow, NodeRow, OperatorRow, PipelineRow
from nomad.master.views import MoveView, Phase
from nomad.measure.estimate import Estimate
from nomad.tasks import Turns

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


class Rows(Protocol):
    """What a scrape reads: the master's facade. Others have their turn between two rows."""

    def pipeline_rows(self) -> Iterator[PipelineRow]: ...

    def node_rows(self) -> Iterator[NodeRow]: ...

    def link_rows(self) -> Iterator[LinkRow]: ...

    def connections(self) -> Mapping[str, int]: ...


class Metrics:
    """The metrics of one master."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._registry = CollectorRegistry()
        self._moves = Moves(self._registry)
        self._rounds = Histogram(
            "nomad_reconcile_seconds",
            "One round of the master's loop: compare all that is wanted with what is seen, and decide.",
            buckets=ROUNDS,
            registry=self._registry,
        )
        self._scrape: asyncio.Task[bytes] | None = None

    def moved(self, move: MoveView) -> None:
        """A move has come to its end."""
        self._moves.add(move)

    def stepped(self, seconds: float) -> None:
        """The master's loop has gone round once."""
        self._rounds.observe(seconds)

    async def text(self) -> bytes:
        """All metrics in Prometheus' text format. Who asks while they are being written gets the same."""
        if self._scrape is None:
            self._scrape = asyncio.create_task(self._written(), name="metrics")
            self._scrape.add_done_callback(self._done)
        return await asyncio.shield(self._scrape)

    async def close(self) -> None:
        """Nobody is to be answered any more."""
        if self._scrape is not None:
            self._scrape.cancel()
            await asyncio.wait((self._scrape,))

    def _done(self, scrape: asyncio.Task[bytes]) -> None:
        self._scrape = None
        if not scrape.cancelled():
            scrape.exception()  # is for those who asked; they may have gone

    async def _written(self) -> bytes:
        turns = Turns()
        operators = Table(_OPERATORS, ("node", "operator", "pipeline"))
        phases: collections.Counter[Phase] = collections.Counter()
        for pipeline in self._rows.pipeline_rows():
            phases[pipeline.phase] += 1
            for op in pipeline.operators:
                operators.add(op, op.node, op.name, pipeline.id)
            await turns.give()
        nodes = Table(_NODES, ("node",))
        count = 0
        for node in self._rows.node_rows():
            nodes.add(node, node.id)
            count += 1
            await turns.give()
        links = Table(_LINKS, ("source", "target"))
        for link in self._rows.link_rows():
            links.add(link, link.source, link.target)
            await turns.give()
        text = [exposition.text(_few(phases, count, self._rows.connections())), generate_latest(self._registry)]
        for table in (operators, nodes, links):
            for part in table.text():
                text.append(part)
                await turns.give()
        return b"".join(text)


def _few(phases: Mapping[Phase, int], nodes: int, connections: Mapping[str, int]) -> list[GaugeMetricFamily]:
    """What there is little of, however large the cluster."""
    pipelines = GaugeMetricFamily("nomad_pipelines", "Pipelines by phase.", labels=["phase"])
    for phase in Phase:
        pipelines.add_metric([phase], phases[phase])
    connected = GaugeMetricFamily("nomad_pods_connected", "Pods connected, and by which way.", labels=["way"])
    for way, count in connections.items():
        connected.add_metric([way], count)
    return [pipelines, GaugeMetricFamily("nomad_nodes", "Nodes of the cluster.", value=nodes), connected]


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


def _measured(estimate: Estimate | None) -> float | None:
    """What is only declared isn't shown."""
    return estimate.value if estimate is not None and estimate.samples else None


def _estimate(name: str) -> Callable[[OperatorRow], float | None]:
    known = attrgetter(f"estimates.{name}")
    return lambda row: _measured(known(row))


_OPERATORS: list[Column[OperatorRow]] = [
    Column(GaugeMetricFamily, "nomad_operator_up", "1 while the operator is at work.", lambda row: row.running),
    Column(CounterMetricFamily, "nomad_operator_restarts", "Pods started after the first.", lambda row: row.restarts),
    Column(
        GaugeMetricFamily,
        "nomad_operator_heartbeat_age_seconds",
        "Since the last heart-beat.",
        lambda row: row.heartbeat_age,
    ),
    Column(
        CounterMetricFamily,
        "nomad_operator_cpu_seconds",
        "CPU time of the operator's processes.",
        lambda row: row.stats.cpu,
    ),
    *(
        Column[OperatorRow](
            GaugeMetricFamily,
            "nomad_operator_latency_seconds",
            "From the source's emission to the end of the operator's function, recent messages.",
            attrgetter(f"stats.{name}"),
            quantile=quantile,
        )
        for quantile, name in (("0.5", "latency_p50"), ("0.99", "latency_p99"))
    ),
    *(
        Column(GaugeMetricFamily, f"nomad_operator_{shown}", text, _estimate(name))
        for name, (shown, text) in _ESTIMATES.items()
    ),
    *(
        Column[OperatorRow](CounterMetricFamily, f"nomad_operator_{name}", text, attrgetter(f"stats.{name}"))
        for name, text in _COUNTERS.items()
    ),
    *(
        Column[OperatorRow](GaugeMetricFamily, f"nomad_operator_{shown}", text, attrgetter(f"stats.{name}"))
        for name, (shown, text) in _GAUGES.items()
    ),
]

_NODES: list[Column[NodeRow]] = [
    Column(GaugeMetricFamily, "nomad_node_operators", "Operators placed on the node.", lambda row: row.operators),
    Column(
        GaugeMetricFamily,
        "nomad_node_memory_used_bytes",
        "Memory that they ask for.",
        lambda row: row.memory_used_mb * 2**20,
    ),
    Column(GaugeMetricFamily, "nomad_node_memory_bytes", "Memory of the node.", lambda row: row.memory_mb * 2**20),
    Column(
        GaugeMetricFamily,
        "nomad_node_speed",
        "Measured: reference-seconds of work per second and core.",
        lambda row: _measured(row.estimates.speed),
    ),
]

_LINKS: list[Column[LinkRow]] = [
    Column(
        GaugeMetricFamily,
        "nomad_link_round_trip_seconds",
        "Least round trip of the data links now.",
        lambda row: row.rtt,
    ),
    Column(
        GaugeMetricFamily,
        "nomad_link_latency_seconds",
        "Measured: one way, half of the round trip.",
        lambda row: _measured(row.estimates.latency),
    ),
    Column(
        GaugeMetricFamily,
        "nomad_link_bandwidth_bytes_per_second",
        "Measured.",
        lambda row: _measured(row.estimates.bandwidth),
    ),
]
