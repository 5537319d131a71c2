"""The actor of a source: calls a function periodically, or pulls a generator as fast as back-pressure lets it.

When another instance is to take its place it comes to rest first (`Role.HALTED`): it makes nothing more, and all that
it made is settled, so that nothing of it is left to be lost. From there it can go on where it was.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from nomad.actor.execute import Handoff, Worker, start_source
from nomad.actor.meter import Meter
from nomad.actor.operator import OperatorFailed
from nomad.actor.outbox import BATCH_MESSAGES, Outbox, Unsendable, sent
from nomad.actor.progress import SOURCE_BITS
from nomad.clock import Clock
from nomad.control import Role
from nomad.delivery.driver import nothing
from nomad.delivery.frames import Places
from nomad.errors import PayloadError, message_of
from nomad.pipeline import Kind, OnError, OperatorSpec

AHEAD = 2 * BATCH_MESSAGES
"""Values that a generator may be ahead of the network, once their size is known to be small."""

AHEAD_BYTES = 1 << 20

STILL_SECONDS = 5.0
"""For so long a source that is to rest is waited for to come out of the user's function.

What that gives later isn't sent any more, unless the source goes on after all.
"""

LOOK_SECONDS = 0.002
"""How often it is looked whether it rests."""


class SourceFailed(OperatorFailed):
    """A generator source raised: it can't go on, and starts anew with its process."""


class Source:
    """A source at work. `run` until cancelled, or until a generator has ended and all that it gave is settled."""

    def __init__(
        self,
        spec: OperatorSpec,
        function: Callable[..., Any],
        outbox: Outbox,
        worker: Worker,
        meter: Meter,
        clock: Clock,
        epoch: int,
        role: Role = Role.ACTIVE,
    ):
        self.spec = spec
        self.service_time: float | None = None
        self._function = function
        self._out = outbox
        self._worker = worker
        self._meter = meter
        self._clock = clock
        self._origin = epoch << SOURCE_BITS
        self._end = (epoch + 1) << SOURCE_BITS
        self._wake = asyncio.Event()
        self.draining = False
        self._handoff: Handoff | None = None
        """While a generator is being pulled, or a function called."""
        self._broken: Exception | None = None
        self._role = role
        self._resting: asyncio.Task[None] | None = None
        """While it comes to rest."""
        self._rests = False
        """It makes nothing, and all that it made is settled."""
        self.halted: Callable[[], None] = nothing
        """Called when it has come to rest, and when what made its messages has ended."""

    @property
    def role(self) -> Role:
        """What it is: one that is to halt is active until it rests, one that is to retire until it has ended."""
        if self._role is Role.RETIRED and self._handoff is not None:
            return Role.HALTED
        return Role.ACTIVE if self._role is Role.HALTED and not self._rests else self._role

    def set_role(self, role: Role) -> None:
        """What it may do from now on."""
        if role is self._role:
            return
        with self._out.lock:
            self._role, self._rests = role, False
        if self._resting is not None:
            self._resting.cancel()
            self._resting = None
        if role is Role.ACTIVE:
            self._out.release(caught_up=True)
            if self._handoff is not None:
                self._handoff.allow(1)
        elif role is Role.HALTED:
            if self._handoff is not None:
                self._handoff.allow(0)
            self._resting = asyncio.create_task(self._rest(), name=f"{self.spec.name} comes to rest")
        elif role is Role.RETIRED and self._handoff is not None:
            self._handoff.stop()
        self.wake()

    def wake(self) -> None:
        """Something was acknowledged."""
        if self._handoff is not None and self._pulls:
            self._pump()
        else:
            self._wake.set()

    def drain(self) -> None:
        """Produce nothing more; `run` returns when all is settled."""
        self.draining = True
        if self._handoff is not None and self._pulls:
            self._handoff.stop()
        self.wake()

    @property
    def queued(self) -> tuple[int, int]:
        """Messages made and not yet sent on; their bytes aren't known before they are encoded."""
        return (len(self._handoff.items) if self._handoff else 0), 0

    async def run(self) -> None:
        """Work. Raises `OperatorFailed` or `SourceFailed`. One that has retired never returns."""
        try:
            await self._until(lambda: self._out.greeted and self._role is Role.ACTIVE)
            if self._pulls:
                await self._generator()
            else:
                await self._periodic()
            await self._until(lambda: self._role is not Role.RETIRED)
            await self._settled()
        finally:
            if self._resting is not None:
                self._resting.cancel()

    @property
    def _pulls(self) -> bool:
        """It is a generator; else a function that is called again and again."""
        return self.spec.kind not in (Kind.PERIODIC, Kind.ASYNC_PERIODIC)

    async def _rest(self) -> None:
        """Until nothing more comes, and all that came is settled."""
        give_up = self._clock.now() + STILL_SECONDS
        while True:
            out = self._handoff
            still = out is None or out.resting or (not out.items and self._clock.now() >= give_up)
            if still and self._out.settled == self._out.numbered:
                break
            await self._clock.sleep(LOOK_SECONDS)
        self._rests = True
        self.halted()

    async def _periodic(self) -> None:
        interval = self.spec.interval or 0.0
        due = self._clock.now()
        while True:
            await self._until(lambda: self.draining or (self._role is Role.ACTIVE and self._out.room > 0))
            if self.draining:
                return
            out = self._handoff = Handoff(asyncio.get_running_loop(), 2)
            start_source(self._worker, self.spec.kind, self._function, out)
            try:
                while not (out.finished and not out.items):
                    await out.wait()
                    await self._until(lambda: not self._rests)
                    values = [v for v in out.take() if v is not None]
                    if self._role is not Role.RETIRED:
                        self._send(values, out.birth)
            finally:
                self._handoff = None
            if self._role is Role.RETIRED:
                self.halted()
                return
            self._called(1, out.seconds)
            if out.error is not None:
                self._meter.failed(out.error, retried=False)
                if self.spec.on_error is OnError.FAIL:
                    raise OperatorFailed(message_of(out.error)) from out.error
            # Missed ticks are skipped, not made up for.
            due = max(due + interval, self._clock.now())
            await self._sleep_until(due)

    async def _generator(self) -> None:
        out = self._handoff = Handoff(asyncio.get_running_loop(), 1, self._pump)
        out.send = self._send_by_itself
        start_source(self._worker, self.spec.kind, self._function, out)
        try:
            while not (out.finished and (not out.items or self._role is Role.RETIRED)):
                self._wake.clear()
                await self._wake.wait()
                if self._broken is not None:
                    raise self._broken
        finally:
            out.stop()
            self._handoff = None
        if self._role is Role.RETIRED:
            self.halted()
            return
        if out.error is not None and not self.draining:
            self._meter.failed(out.error, retried=False)
            if self.spec.on_error is OnError.FAIL:
                raise OperatorFailed(message_of(out.error)) from out.error
            await self._settled()  # its process is about to end; what the generator gave must not end with it
            raise SourceFailed(message_of(out.error)) from out.error

    def _pump(self) -> None:
        """Send what the generator has made, as far as there is room: called when it made something, and on credit."""
        out = self._handoff
        if out is None or self._broken is not None:
            return
        try:
            with self._out.lock:  # also while they are on their way from the one place to the other
                while out.items and not self._rests and self._role is not Role.RETIRED:
                    room = self._out.spare
                    if room < len(out.items) and (room := self._out.room) <= 0:
                        break
                    values = out.take(room)
                    if len(values) > 1 or values[0] is None:
                        values = [v for v in values if v is not None]
                    self._send(values, out.birth)
                    if size := self._out.output_bytes:
                        # How far the generator may be ahead: doubled from 1, as far as the size of its values allows.
                        out.limit = min(AHEAD, out.limit * 2, max(2, int(AHEAD_BYTES / size)))
        except Exception as exc:  # noqa: BLE001 - whatever it is, `run` raises it
            self._broken = exc
        self._meter.paused = bool(out.items)
        if self._broken is not None or (out.finished and (not out.items or self._role is Role.RETIRED)):
            self._wake.set()

    def _send_by_itself(self, value: Any, birth: int) -> bool:
        """Send a value in the function's thread, without waking the loop's. False: it has to be handed over."""
        out, handoff = self._out, self._handoff
        with out.lock:
            if (
                value is None
                or handoff is None
                or handoff.items
                or not handoff.limit
                or self._role is not Role.ACTIVE
                or self._broken is not None
                or self._meter.tap is not None
                or self._origin + 1 >= self._end
                or not out.emit_one(value, 0, self._origin + 1, birth, threaded=True)
            ):
                return False
            self._origin += 1
            handoff.taken += 1
            self._meter.stats.emitted += 1
            self._meter.last = value
        return True

    def _send(self, values: list[Any], birth: int) -> None:
        if not values:
            return
        first = self._origin + 1
        self._origin += len(values)
        if self._origin >= self._end:
            raise SourceFailed("it has sent all messages that one instance can count, and starts anew")
        unsendable: Sequence[Unsendable] = ()
        if len(values) > 1 or not self._out.emit_one(values[0], 0, first, birth):
            unsendable = self._out.emit(values, Places(0, range(first, first + len(values))), birth)
        self._meter.emitted(sent(values, unsendable))
        for bad in unsendable:
            self._refuse(bad.error)

    def _refuse(self, error: PayloadError) -> None:
        """A source has no input to set aside: what it made and can't be sent is counted and shown."""
        self._meter.failed(error, retried=False)
        if self.spec.on_error is OnError.FAIL:
            raise OperatorFailed(message_of(error)) from error

    def _called(self, calls: int, seconds: float) -> None:
        self._meter.called(calls, seconds)
        self.service_time = seconds / calls

    async def _settled(self) -> None:
        await self._until(lambda: self._out.settled == self._out.numbered)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._meter.paused = self._out.greeted
            self._wake.clear()
            await self._wake.wait()
        self._meter.paused = False

    async def _sleep_until(self, due: float) -> None:
        """Sleep, but not through `drain`."""
        timer = asyncio.ensure_future(self._clock.sleep(max(0.0, due - self._clock.now())))
        drained = asyncio.ensure_future(self._drained())
        try:
            await asyncio.wait((timer, drained), return_when=asyncio.FIRST_COMPLETED)
        finally:
            timer.cancel()
            drained.cancel()
            await asyncio.gather(timer, drained, return_exceptions=True)

    async def _drained(self) -> None:
        while not self.draining:
            self._wake.clear()
            await self._wake.wait()
