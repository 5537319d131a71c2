"""Messages that were set aside and are run again: on demand, between two chunks of the operator's work.

What comes of them goes on in the operator's own lane (see `nomad.delivery.frames`), counted like a source counts, and
stays in the store until the next operators have it. So a kill at any moment neither loses nor doubles it there.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from nomad.actor.execute import GENERATOR_KINDS, Handoff, Worker, start_calls
from nomad.actor.meter import Meter
from nomad.actor.outbox import BATCH_MESSAGES, Outbox
from nomad.actor.progress import SOURCE_BITS
from nomad.delivery.codec import Codec
from nomad.delivery.frames import LANES, Places, Position, step
from nomad.errors import NomadError, PayloadError, describe
from nomad.pipeline import Kind
from nomad.setaside import Record, SetAside


class Reruns:
    """Requests to run messages again, and the results that are on their way."""

    def __init__(
        self,
        kind: Kind,
        function: Callable[..., Any],
        worker: Worker,
        codec: Codec,
        outbox: Outbox,
        set_aside: SetAside,
        meter: Meter,
        settled: Mapping[int, Position],
        room: Callable[[], Awaitable[None]],
        *,
        lane: int,
        epoch: int,
    ):
        """`settled` is how far the operator's input is settled, `room` waits until something may be sent."""
        self._kind = kind
        self._function = function
        self._worker = worker
        self._codec = codec
        self._out = outbox
        self._set_aside = set_aside
        self._meter = meter
        self._settled = settled
        self._room = room
        self._lane = lane
        self._newest = epoch << SOURCE_BITS
        """Number of the newest run that had results."""
        self.asked: deque[tuple[list[int] | None, asyncio.Future[dict[str, int]]]] = deque()
        self._on_the_way: deque[tuple[int, int]] = deque()
        """How many messages had been sent when the results of a run were among them, and the run's number."""

    def ask(self, ids: list[int] | None) -> asyncio.Future[dict[str, int]]:
        """Have messages run again: how many ran, and how many failed again."""
        if self._lane >= LANES:
            raise NomadError(f"only the first {LANES} operators of a pipeline can run messages again")
        done: asyncio.Future[dict[str, int]] = asyncio.get_running_loop().create_future()
        self.asked.append((ids, done))
        return done

    def drop(self, ids: list[int] | None) -> int:
        """Forget messages that were set aside; how many there were."""
        dropped = self._set_aside.remove(ids, self._settled)
        self._meter.set_aside(self._set_aside.count)
        return dropped

    async def send_old(self) -> None:
        """Send what an earlier instance got and the next operators may not have. Called before anything is sent."""
        for number, results in self._set_aside.reruns():
            await self._send(number, self._codec.decode_one(results))

    async def run_next(self) -> None:
        """Serve the oldest request."""
        ids, done = self.asked.popleft()
        ran = failed = 0
        for record in self._set_aside.records(ids):
            ran += 1
            error = await self._run(record)
            if error is not None:
                failed += 1
                self._meter.failed(error, retried=False)
                self._set_aside.failed_again(record, describe(error))
        self._meter.set_aside(self._set_aside.count)
        if not done.done():
            done.set_result({"ran": ran, "failed": failed})

    def settle(self, settled: int) -> None:
        """The first `settled` messages that the operator has sent are acknowledged."""
        delivered = None
        while self._on_the_way and self._on_the_way[0][0] <= settled:
            delivered = self._on_the_way.popleft()[1]
        if delivered is not None:
            self._set_aside.delivered(delivered)

    async def _run(self, record: Record) -> BaseException | None:
        try:
            results, error = await self._call(self._codec.decode_one(record.value), record.sent)
            if error is not None:
                return error
            encoded = self._codec.encode_one(results)
        except PayloadError as exc:
            return exc
        if results and self._out.links:
            self._newest += 1
            self._set_aside.ran(record, self._newest, encoded, self._settled)
            await self._send(self._newest, results)
        else:
            self._set_aside.remove([record.id], self._settled)
        self._meter.emitted(results)
        return None

    async def _call(self, value: Any, sent: int) -> tuple[list[Any], BaseException | None]:
        """What the function gives for `value`; of a generator's results the first `sent` have been sent already."""
        results: list[Any] = []
        out = Handoff(asyncio.get_running_loop(), BATCH_MESSAGES)
        start_calls(self._worker, self._kind, self._function, [value], out)
        try:
            while not (out.finished and not out.items):
                await out.wait()
                results += out.take()
        finally:
            out.stop()
        if self._kind in GENERATOR_KINDS:
            results = [result for _, index, result in results if index >= sent]
        return [r for r in results if r is not None], out.error

    async def _send(self, number: int, results: list[Any]) -> None:
        await self._room()
        places = Places(self._lane, [number] * len(results), [step(index) for index in range(len(results))])
        self._out.emit(results, places, time.time_ns())
        self._on_the_way.append((self._out.numbered, number))
