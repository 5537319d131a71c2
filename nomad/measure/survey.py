"""Which links of a cluster are probed when: all once in the beginning, later only those that a decision needs.

Runs beside the master. What operators send measures the links it goes over (`nomad.delivery.samples`); the
survey fills in the others through agents, within the limits of `probes`, and writes what they find into the book.
It probes a link only while nothing else has measured it for a while.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

from nomad.clock import Clock
from nomad.errors import NomadError
from nomad.measure.agent import Probe
from nomad.measure.book import Book
from nomad.measure.probes import ASSUMED_BANDWIDTH, PROBE_BYTES, Budget
from nomad.measure.vivaldi import Coordinates
from nomad.tasks import Tasks

log = logging.getLogger(__name__)

ROUND = 0.25
MANY_NODES = 16
"""Seconds between two looks at what is due, four times as many on clusters with more nodes than that."""

MOST_PAIRS_NODES = 64
"""Clusters of up to so many nodes have all their pairs probed; larger ones use network coordinates."""

FIRST_PROBES = 2
"""Of each directed link in the beginning."""

TRIES = 3
"""Probes of a round trip one after the other, of which the least counts: what a busy machine adds isn't the link's.

Only one on clusters of more than `MANY_NODES`, so that all links get their turn.
"""

REFRESH = 2.0
"""Seconds after which a latency that a decision may need is measured again."""

REFRESH_BANDWIDTH = 15.0

COORDINATE_ROUND = 5.0
NEIGHBOURS = 6
"""On large clusters every node probes so many others, different ones each time, once in so many seconds or more."""

COORDINATE_PROBES = 150.0
"""Such probes per second, of all nodes together: from 125 nodes on a round takes longer. Each is a request's share and
a sample for the master.
"""

MOST_AT_ONCE = 40
"""Probes that are begun in one look, and that are under way, where agents share their process with the master."""

MOST_ELSEWHERE = 200
"""The same where they have processes of their own: a few per cent of a core of the master's, which has to ask."""

TRANSFERS = 4
"""Attempts to tell the bandwidth of a link in the beginning, each larger than the one before."""

SURE_SAMPLES = 8
SURE_DEVIATION = 0.2
"""A bandwidth is asked for again until it has so many samples, or a deviation of at most this share of it."""

LEAST_SECONDS = 0.002
"""Transfers that are quicker tell nothing."""

HANDSHAKE_BYTES = 1024
"""What a new connection between two agents costs."""

RETRY = 10.0
"""Seconds until a link is probed again on which a probe has failed."""


class Prober(Protocol):
    """How a survey reaches the agents."""

    def connected(self, source: str, target: str) -> bool:
        """Whether a probe needs no new connection."""
        ...

    async def probe(self, source: str, target: str, nbytes: int) -> Probe:
        """Let the agent of one node probe another's. Raises `NomadError`."""
        ...

    async def round_trips(self, source: str, targets: Sequence[str]) -> Sequence[float | None]:
        """Let the agent of one node probe several others at once; None for those that it hasn't reached.

        Raises `NomadError` when nothing came of it at all.
        """
        ...


@dataclass(slots=True)
class _Way:
    """A directed link, as far as probing goes."""

    probes: int = 0
    transfers: int = 0
    busy: bool = False
    not_before: float = 0.0
    transfer_at: float = 0.0


class Survey:
    """`run` until cancelled, `close` after."""

    def __init__(
        self,
        book: Book,
        prober: Prober,
        nodes: Callable[[], Sequence[str]],
        needed: Callable[[], bool],
        clock: Clock,
        random: Random | None = None,
        *,
        most: int = MOST_AT_ONCE,
    ) -> None:
        """`needed`: whether anybody is going to decide by these links now. `most`: probes begun in one look."""
        self._most = most
        self._book = book
        self._prober = prober
        self._nodes = nodes
        self._needed = needed
        self._clock = clock
        self._random = random or Random()
        self._budget = Budget()
        self._ways: dict[tuple[str, str], _Way] = {}
        self._under_way = 0
        self._many = False
        """More than `MANY_NODES`."""
        self._large = False
        self._round_at = 0.0
        """When the next round may begin; 0 before the first."""
        self._round: dict[tuple[str, str], None] = {}
        """What is still to be probed, in this order."""
        self._tasks = Tasks()

    async def run(self) -> None:
        while True:
            self.look()
            await self._clock.sleep(4 * ROUND if self._many else ROUND)

    async def close(self) -> None:
        await self._tasks.close()

    def forget(self, node: str) -> None:
        """It has left the cluster."""
        self._ways = {way: state for way, state in self._ways.items() if node not in way}
        self._round = {way: None for way in self._round if node not in way}
        self._budget.forget(node)

    def look(self) -> None:
        """Begin the probes that are due and allowed."""
        nodes, now = list(self._nodes()), self._clock.now()
        self._many = len(nodes) > MANY_NODES
        if len(nodes) > MOST_PAIRS_NODES and not self._large:
            self._large = True
            self._book.use_coordinates(Coordinates(self._random))
        if self._large:
            self._begin_large(nodes, now)
            return
        begun = 0
        for way, transfer in self._due(nodes, now):
            if begun >= self._most or self._under_way >= self._most:
                return
            begun += self._begin(*way, now, transfer=transfer)

    # -- what is due

    def _due(self, nodes: Sequence[str], now: float) -> list[tuple[tuple[str, str], bool]]:
        """Ordered pairs, the least known first, and of each whether it is the bandwidth that is to be measured."""
        needed = self._needed()
        due: list[tuple[int, float, tuple[str, str]]] = []
        for a, b in itertools.combinations(nodes, 2):
            latency = self._book.link(a, b).latency
            for way in ((a, b), (b, a)):
                state = self._ways.setdefault(way, _Way())
                if state.busy or now < state.not_before:
                    continue
                if state.probes < FIRST_PROBES:
                    back = self._ways.setdefault((way[1], way[0]), _Way())
                    due.append((0, float(state.probes + back.probes), way))
                elif needed and way == (a, b) and (latency is None or now - latency.updated >= REFRESH):
                    due.append((1, 0.0 if latency is None else latency.updated, way))
                elif self._transfer_due(way, state, now, needed=needed):
                    due.append((2, state.transfer_at, way))
        return [(way, kind == 2) for kind, _, way in sorted(due)]

    def _transfer_due(self, way: tuple[str, str], state: _Way, now: float, *, needed: bool) -> bool:
        known = self._book.link(*way).bandwidth
        if known is None or not known.measured:
            return state.transfers < TRANSFERS or (needed and now - state.transfer_at >= 4 * REFRESH_BANDWIDTH)
        if known.samples < SURE_SAMPLES and known.deviation > SURE_DEVIATION * known.value:
            return True
        return needed and now - known.updated >= REFRESH_BANDWIDTH and now - state.transfer_at >= REFRESH_BANDWIDTH

    def _due_large(self, nodes: Sequence[str], now: float) -> list[tuple[str, str]]:
        """A few others for each node, once per round; in the beginning, and while somebody needs it."""
        started = self._round_at > 0
        if (not started or self._needed()) and now >= self._round_at and not self._round:
            self._round_at = now + max(COORDINATE_ROUND, NEIGHBOURS * len(nodes) / COORDINATE_PROBES)
            self._round = {  # those of one node in a row: they are asked for together
                (node, other): None
                for node in self._random.sample(nodes, len(nodes))
                for other in self._random.sample(nodes, min(NEIGHBOURS + 1, len(nodes)))[:NEIGHBOURS]
                if other != node
            }
        return list(self._round)

    # -- one probe

    def _begin(self, source: str, target: str, now: float, *, transfer: bool) -> bool:
        way = (source, target)
        state = self._ways.setdefault(way, _Way())
        nbytes = 0
        if transfer:
            known = self._book.link(source, target).bandwidth
            nbytes = self._budget.transfer_bytes(source, target, known.value if known is not None else None)
        tries = 1 if transfer or self._many else TRIES
        if not self._take(way, tries * PROBE_BYTES + nbytes, now, tries):
            return False
        state.busy = True
        self._under_way += 1
        self._tasks.start(self._probe(way, state, nbytes, tries), name=f"probe {source} to {target}")
        return True

    def _take(self, way: tuple[str, str], nbytes: int, now: float, probes: int = 1) -> bool:
        """Whether so much may be sent now; if so, it counts."""
        cost = nbytes + (0 if self._prober.connected(*way) else HANDSHAKE_BYTES)
        return self._budget.take(*way, cost, self._bandwidth(*way), now, probes)

    def _bandwidth(self, source: str, target: str) -> float:
        """Bytes per second that the link carries, as far as that is known; what it has reached is only a bound."""
        link = self._book.link(source, target)
        return link.bandwidth.value if link.bandwidth is not None else max(link.reached or 0.0, ASSUMED_BANDWIDTH)

    async def _probe(self, way: tuple[str, str], state: _Way, nbytes: int, tries: int) -> None:
        try:
            probes = [await self._prober.probe(*way, nbytes) for _ in range(tries)]
            self._found(way, state, min(probes, key=lambda probe: probe.round_trip), nbytes)
        except NomadError as exc:
            log.debug("probing %s to %s: %s", *way, exc)
            state.not_before = self._clock.now() + RETRY
        finally:
            state.busy = False
            self._under_way -= 1

    def _found(self, way: tuple[str, str], state: _Way, probe: Probe, nbytes: int) -> None:
        now = self._clock.now()
        state.probes += 1
        if probe.transfer is None:
            self._book.link_sample(*way, now, round_trip=probe.round_trip)
            return
        state.transfers += 1
        state.transfer_at = now
        if probe.transfer >= LEAST_SECONDS:
            self._book.link_sample(*way, now, bandwidth=nbytes / probe.transfer)
        else:
            self._book.link_sample(*way, now, reached=nbytes / max(probe.transfer, 1e-4))
            self._budget.too_quick(*way)

    # -- many at once, of which nothing is kept here: there are too many ways

    def _begin_large(self, nodes: Sequence[str], now: float) -> None:
        begun: dict[str, list[str]] = {}
        for way in self._due_large(nodes, now):
            if self._under_way >= self._most:
                break
            if self._take(way, PROBE_BYTES, now):
                del self._round[way]
                self._under_way += 1
                begun.setdefault(way[0], []).append(way[1])
            elif self._budget.wait(*way, self._bandwidth(*way), now) > COORDINATE_ROUND:
                del self._round[way]  # the next round begins when nothing is left of this one
        for source, targets in begun.items():
            self._tasks.start(self._round_trips(source, targets), name=f"probe {source} to {len(targets)} others")

    async def _round_trips(self, source: str, targets: Sequence[str]) -> None:
        try:
            found = await self._prober.round_trips(source, targets)
            now = self._clock.now()
            for target, seconds in zip(targets, found, strict=True):
                self._book.link_sample(source, target, now, round_trip=seconds)
        except NomadError as exc:
            log.debug("probing %s to others: %s", source, exc)
        finally:
            self._under_way -= len(targets)


async def one_by_one(prober: Prober, source: str, targets: Sequence[str]) -> Sequence[float | None]:
    """`Prober.round_trips` of one that is asked for each by itself, all the same at once."""
    return await asyncio.gather(*(_round_trip(prober, source, target) for target in targets))


async def _round_trip(prober: Prober, source: str, target: str) -> float | None:
    try:
        return (await prober.probe(source, target, 0)).round_trip
    except NomadError as exc:
        log.debug("probing %s to %s: %s", source, target, exc)
        return None
