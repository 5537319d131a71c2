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

_MOVING = "the operator is about to move: its messages that were set aside are another process's; ask again"


def _nothing() -> None:
    """What is called when nobody wants to know."""


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
        self.writing = False
        """A run is under way which the store is going to know of."""
        self.noted: Callable[[], None] = _nothing
        """Called when the store knows of a run."""
        self._active = False
        self._old = False
        """There may be results of another instance's runs to be sent."""
        self._asked: deque[tuple[list[int] | None, asyncio.Future[dict[str, int]]]] = deque()
        self._on_the_way: deque[tuple[int, int]] = deque()
        """How many messages had been sent when the results of a run were among them, and the run's number."""

    def ask(self, ids: list[int] | None) -> asyncio.Future[dict[str, int]]:
        """Have messages run again: how many ran, and how many failed again."""
        self._refuse_unless_active()
        if self._lane >= LANES:
            raise NomadError(f"only the first {LANES} operators of a pipeline can run messages again")
        done: asyncio.Future[dict[str, int]] = asyncio.get_running_loop().create_future()
        self._asked.append((ids, done))
        return done

    def drop(self, ids: list[int] | None) -> int:
        """Forget messages that were set aside; how many there were."""
        self._refuse_unless_active()
        dropped = self._set_aside.remove(ids, self._settled)
        self._meter.set_aside(self._set_aside.count)
        return dropped

    @property
    def due(self) -> bool:
        """Whether `go_on` has something to do."""
        return bool(self._old or self._asked)

    def activate(self) -> None:
        """The store is this instance's from now on."""
        self._active = self._old = True

    def retire(self) -> None:
        """Begin no run, and write nothing to the store but what the run under way gives."""
        self._active = self._old = False
        for _, done in self._asked:
            if not done.done():
                done.set_exception(NomadError(_MOVING))
        self._asked.clear()

    async def go_on(self) -> None:
        """Send what another instance got and the next operators may not have; else serve the oldest request."""
        if self._old:
            self._old = False
            await self._send_old()
        elif self._asked:
            await self._serve(*self._asked.popleft())

    async def _send_old(self) -> None:
        mine = {number for _, number in self._on_the_way}
        for number, results in self._set_aside.reruns():
            self._newest = max(self._newest, number)
            if number not in mine:
                await self._send(number, self._codec.decode_one(results))

    async def _serve(self, ids: list[int] | None, done: asyncio.Future[dict[str, int]]) -> None:
        ran = failed = 0
        for record in self._set_aside.records(ids):
            if not self._active:
                break
            ran += 1
            self.writing = True
            number, results, error = await self._run(record)
            self.writing = False
            self.noted()
            if error is not None:
                failed += 1
                self._meter.failed(error, retried=False)
                continue
            if number is not None:
                await self._send(number, results)
            self._meter.emitted(results)
        self._meter.set_aside(self._set_aside.count)
        if not done.done():
            done.set_result({"ran": ran, "failed": failed})

    def settle(self, settled: int) -> None:
        """The first `settled` messages that the operator has sent are acknowledged."""
        if not self._active:
            return
        delivered = None
        while self._on_the_way and self._on_the_way[0][0] <= settled:
            delivered = self._on_the_way.popleft()[1]
        if delivered is not None:
            self._set_aside.delivered(delivered)

    async def _run(self, record: Record) -> tuple[int | None, list[Any], BaseException | None]:
        """Run it and note that: the run's number if there is something to send, the results, and why it failed."""
        results: list[Any] = []
        try:
            results, error = await self._call(self._codec.decode_one(record.value), record.sent)
            encoded = self._codec.encode_one(results) if error is None else b""
        except PayloadError as exc:
            error = exc
        if error is not None:
            self._set_aside.failed_again(record, describe(error))
            return None, [], error
        if results and self._out.links:
            self._newest += 1
            self._set_aside.ran(record, self._newest, encoded, self._settled)
            return self._newest, results, None
        self._set_aside.remove([record.id], self._settled)
        return None, results, None

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

    def _refuse_unless_active(self) -> None:
        if not self._active:
            raise NomadError(_MOVING)
