"""What a move cost, counted and not assumed: messages lost and doubled, and the pause that the last operator saw.

The enactor starts it twice per move: before the switch, to know where the last operator's counters stood, and after
it. All is asked of the pods: what can't be asked is None. The functions are pure; the rules stand in docs/moves.md.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from pydantic import TypeAdapter, ValidationError

from nomad.clock import Clock
from nomad.errors import NomadError
from nomad.master.observe import Observer
from nomad.master.pods import PodPort
from nomad.master.reconcile.actions import Measure
from nomad.master.state import Tally
from nomad.settings import Moving
from nomad.tasks import Tasks

log = logging.getLogger(__name__)

USUAL = 5.0
"""Seconds before the switch that say what gap between arrivals is usual."""
ASK_AGAIN = 0.25
"""Seconds between looks at a last operator that nothing has reached yet."""
PATIENCE = 5.0
"""Seconds after the switch for something to arrive; a pipeline that is slower than that has no pause to speak of."""
CLOCKS_AGREE = 0.005
"""Seconds by which an arrival may precede what caused it: clocks of one machine, read by two processes."""

Sample = tuple[float, float]


@dataclass(frozen=True, slots=True)
class _Link:
    """How far one end of a link is, as its pod says; what it doesn't know is None."""

    link: str
    direction: str
    first: int | None = None
    settled: int | None = None
    numbered: int | None = None
    disorder: int | None = None


@dataclass(frozen=True, slots=True)
class _Numbers:
    links: list[_Link]


_NUMBERS = TypeAdapter(_Numbers)
SAMPLES = TypeAdapter(list[Sample])
"""Of the request `samples`: when something was done, in seconds since the epoch, and how long it took."""


def pause(samples: Sequence[Sample], switched: float) -> float | None:
    """By how much the longest gap between arrivals since `switched` exceeds the usual one, 0 at the least.

    A gap counts when it ends after the switch; None when nothing has arrived since, or only one thing ever did.
    """
    times = sorted(time for time, _ in samples)
    gaps = [(later, later - earlier) for earlier, later in zip(times, times[1:], strict=False)]
    since = [gap for later, gap in gaps if later >= switched - CLOCKS_AGREE]
    if not since:
        return None
    usual = [gap for later, gap in gaps if later < switched - CLOCKS_AGREE] or since
    return max(0.0, max(since) - median(usual))


def lost(settled: int | None, first: int | None) -> int | None:
    """Messages between what the old instance had settled and what the sender went on with towards the new one."""
    return None if settled is None or first is None else max(0, first - settled)


def doubled(before: int | None, after: int | None) -> int | None:
    """Calls of the last operator with what it had been called with, or with what is older; of one and the same pod."""
    return None if before is None or after is None or after < before else after - before


def _lost(old: Sequence[_Link], new: Sequence[_Link], link: str) -> int | None:
    """What the move of an operator lost. `link` is the one to it; "" for a source, of which nothing may be left."""
    if not link:
        left = [end.numbered - end.settled for end in old if end.numbered is not None and end.settled is not None]
        return max(left, default=None)
    settled = next((end.settled for end in old if (end.link, end.direction) == (link, "in")), None)
    first = next((end.first for end in new if (end.link, end.direction) == (link, "in")), None)
    return lost(settled, first)


def _disorder(numbers: Sequence[_Link]) -> int | None:
    return max((entry.disorder for entry in numbers if entry.disorder is not None), default=None)


class Tallier:
    """Asks pods for their numbers. `measure` returns at once; `close` ends what is under way."""

    def __init__(self, port: PodPort, observer: Observer, clock: Clock, settings: Moving) -> None:
        self._port = port
        self._observer = observer
        self._clock = clock
        self._settings = settings
        self._tasks = Tasks()
        self._before: dict[str, tuple[str, int | None]] = {}
        """By pipeline, as each has one move at a time: the last operator's pod, and its counter before the switch."""

    def measure(self, action: Measure) -> None:
        """Begin what the action asks for."""
        job = self._stand(action) if action.switching else self._count(action)
        self._tasks.start(job, name=f"measure {action.move}")

    async def close(self) -> None:
        await self._tasks.close()

    async def _stand(self, action: Measure) -> None:
        self._before[action.pipeline] = action.sink, await self._disorder(action.sink)

    async def _count(self, action: Measure) -> None:
        switched = self._clock.wall() - (self._clock.now() - action.since)
        sink, before = self._before.pop(action.pipeline, ("", None))
        moved = sink == action.old  # it is the last operator itself
        old, new, earlier = await asyncio.gather(
            self._numbers(action.old),
            self._numbers(action.new),
            self._samples(action.old if moved else "", switched - USUAL),
        )
        tally = Tally(counted=True, lost=_lost(old, new, action.link))
        self._observer.counted(action.move, tally)
        await self._clock.sleep(self._settings.settle)
        give_up = self._clock.now() + PATIENCE
        while True:
            found = await self._samples(action.sink, switched - USUAL)
            samples = None if found is None else [*(earlier or ()), *found]
            if samples is None or pause(samples, switched) is not None or self._clock.now() >= give_up:
                break
            if not any(time < switched for time, _ in samples):
                break  # nothing flowed, so there is nothing to wait for
            await self._clock.sleep(ASK_AGAIN)
        again = await self._disorder(action.sink)
        if sink == action.sink:
            tally.doubled = doubled(before, again)
        elif moved and again is not None and (more := doubled(before, _disorder(old))) is not None:
            tally.doubled = more + again
        tally.pause = pause(samples, switched) if samples else None
        tally.measured = True
        self._observer.counted(action.move, tally)

    async def _disorder(self, pod: str) -> int | None:
        return _disorder(await self._numbers(pod))

    async def _numbers(self, pod: str) -> list[_Link]:
        try:
            reply = await self._port.ask(pod, "numbers", timeout=self._settings.count)
            return _NUMBERS.validate_python(reply).links
        except (NomadError, ValidationError) as exc:
            log.debug("pod %s doesn't say its numbers: %s", pod, exc)
            return []

    async def _samples(self, pod: str, after: float) -> list[Sample] | None:
        if not pod:
            return None
        try:
            reply = await self._port.ask(pod, "samples", timeout=self._settings.count, after=after)
            return SAMPLES.validate_python(reply)
        except (NomadError, ValidationError) as exc:
            log.debug("pod %s doesn't say when something arrived: %s", pod, exc)
            return None
