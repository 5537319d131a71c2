"""The actor of an operator that has an input: takes chunks from its inbox, calls the function, emits, settles.

Runs in the data loop of `nomad.actor.host`. Everything here is per chunk, never per message, but for what the
user's function itself costs. It knows links only through their `InLink` and the `Outbox`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nomad.actor.execute import GENERATOR_KINDS, Handoff, Worker, noting, start_calls
from nomad.actor.journal import Journal
from nomad.actor.meter import Meter
from nomad.actor.mode import Mode
from nomad.actor.outbox import BATCH_MESSAGES, Outbox, sent
from nomad.actor.progress import Chunk
from nomad.actor.rerun import Reruns
from nomad.clock import Clock
from nomad.control import Role
from nomad.delivery.codec import Codec
from nomad.delivery.driver import nothing
from nomad.delivery.frames import MOST_PATH, NOWHERE, Places, Position, step
from nomad.delivery.inlink import InLink
from nomad.delivery.receiver import Batch
from nomad.errors import NomadError, PayloadError, describe, message_of
from nomad.pipeline import Kind, OnError, OperatorSpec
from nomad.setaside import SetAside
from nomad.transport.base import Buffer

HOLD_MOST = 0.5
"""Seconds that an instance which takes another's place may need to catch up before it is heard all the same."""

RETRY_FIRST, RETRY_MOST = 0.1, 5.0
"""Seconds between attempts under on_error="retry", doubled from the first to the most."""


class OperatorFailed(NomadError):
    """A message's function raised under on_error="fail", or its input can't be decoded; ends the pipeline."""


@dataclass(slots=True)
class _Rest:
    """How far a chunk has been worked off, and what is to be done before it goes on."""

    chunk: Chunk
    at: int
    """Number of the next value."""
    error: BaseException | None
    """What value `at - 1` raised."""
    debt: float
    """Seconds to sleep, to be as slow as the emulated node."""


class Operator:
    """One operator at work. `run` until cancelled; `wake` after anything changed."""

    def __init__(
        self,
        spec: OperatorSpec,
        function: Callable[..., Any],
        inbox: InLink,
        outbox: Outbox,
        codec: Codec,
        worker: Worker,
        meter: Meter,
        set_aside: SetAside,
        journal: Journal | None,
        clock: Clock,
        *,
        lane: int,
        epoch: int,
        role: Role = Role.ACTIVE,
    ):
        """`lane` is that of the messages that it runs again."""
        self.spec = spec
        self._role = role
        self._active = asyncio.Event()
        """Set while the messages set aside are this instance's."""
        self._may_call = asyncio.Event()
        """Set unless it has been halted."""
        self._may_call.set()
        self._call: Handoff | None = None
        """Calls under way in the function's thread."""
        self.halted: Callable[[], None] = nothing
        """Called when the last call of one that was to halt has ended."""
        self._successor = role is Role.STANDBY
        """It takes another instance's place, and hasn't caught up with that one yet."""
        self._hold: asyncio.TimerHandle | None = None
        self.set_aside = set_aside
        self.mode = Mode(allowed=spec.kind is Kind.FUNCTION)
        self._function = function
        self._in = inbox
        self._out = outbox
        self._codec = codec
        self._worker = worker
        self._meter = meter
        self._journal = journal
        self._clock = clock
        self._wake = asyncio.Event()
        self._batch: Batch | None = None
        """What is being worked off."""
        self._left: Chunk | None = None
        """What of it no chunk has been made of yet; None when nothing."""
        self.reruns = Reruns(
            spec.kind,
            function,
            worker,
            codec,
            outbox,
            set_aside,
            meter,
            inbox.receiver.settled,
            self._room,
            lane=lane,
            epoch=epoch,
        )
        self._yielded = (0, NOWHERE, 0)
        """Lane and position of the newest input for which a generator has yielded something, and how many results."""
        self._parked = False
        """`run` waits, nothing of it is under way, and nobody has told it to go on."""
        self._rest: _Rest | None = None
        self._unkept: list[tuple[Chunk, int, PayloadError]] = []
        """Messages with a result that can't be sent, while this instance may set nothing aside."""
        self._called_for: dict[int, Position] = journal.positions() if journal is not None else {}
        """The last position in each lane that the function was called for."""
        self._broken: Exception | None = None
        if role is Role.ACTIVE:
            self._activate()

    @property
    def role(self) -> Role:
        """What it is. One that is to retire is active until the store knows what comes of the run under way, and one
        that is to halt has retired until the call under way has ended.
        """
        if self._role in (Role.RETIRED, Role.HALTED) and self.reruns.writing:
            return Role.ACTIVE
        return Role.RETIRED if self._role is Role.HALTED and self._call is not None else self._role

    @property
    def called(self) -> dict[int, Position]:
        """Of a last operator that has halted: the last position in each lane that its function was called for."""
        return self._journal.positions() if self._journal is not None and self.role is Role.HALTED else {}

    def set_role(self, role: Role, called: Mapping[int, Position] | None = None) -> None:
        """What it may do from now on. `called`: of the instance before, see the property."""
        if role is self._role:
            return
        if self._journal is not None:
            self._journal.slots.clear()  # another instance may note something meanwhile
        if role is Role.ACTIVE and self._role is Role.STANDBY and self._journal is not None:
            # What the one before has noted, too, where both have the same file.
            self._journal.advance(called or {})
            self._called_for = self._journal.positions()
            self._in.receiver.had(self._called_for)
        self._role = role
        if role is Role.ACTIVE:
            self.set_aside.reload()
            self._meter.set_aside(self.set_aside.count)
            self._activate()
        else:
            self._active.clear()
            self.reruns.retire()
        if role is Role.ACTIVE:
            self._may_call.set()
            self._go_on()
        elif role is Role.HALTED:
            self._may_call.clear()
            if self._call is not None and self.spec.kind not in GENERATOR_KINDS:  # they can't be ended half-way
                self._call.stop()

    def _activate(self) -> None:
        self._active.set()
        self.reruns.activate()

    def wake(self) -> None:
        """Something arrived, was acknowledged, or was asked for.

        A function that runs inline is called right here, which saves the detour over the task; what takes
        longer than one chunk, or needs waiting, is left to `run`.
        """
        if not self._parked or not self.mode.inline:
            self._settle()
            self._go_on()
            return
        self._parked = False
        try:
            if (chunk := self._take()) is None:
                self._settle()
            elif self.set_aside.kept:
                self._rest = _Rest(chunk, 0, None, 0.0)
            else:
                rest = self._call_inline(chunk, 0)
                if rest.error is None and rest.debt <= 0 and not self._unkept:
                    self._worked(chunk)
                else:
                    self._rest = rest
        except Exception as exc:  # noqa: BLE001 - whatever it is, `run` raises it
            self._broken = exc
        self._parked = True
        if (
            self._rest is not None
            or self._broken is not None
            or self._left is not None
            or self._in.receiver.inbox
            or self._successor
        ):
            self._go_on()

    def one(self, head: Buffer) -> bool:
        """Receive a frame that came alone and work it off, if it is one message for a function that runs inline.

        False if not: nothing was done. It is what `InLink`, `wake` and those below do for any batch, without all that
        needn't be asked for one message on a quiet link: each further function costs a microsecond or so when the
        caches are cold, and the next operator often waits for the same processor. What turns out not to be usual goes
        the usual way.
        """
        receiver, out, journal, unpack = self._in.receiver, self._out, self._journal, self._codec.unpack
        if (
            not self._parked
            or not self.mode.inline
            or unpack is None
            or self._left is not None
            or self._successor
            or self._role is not Role.ACTIVE
            or self.set_aside.kept
            or self._meter.slowdown > 1.0
            or (out.spare < 1 and out.room < 1)
            or (batch := receiver.receive_one(head, self._clock.now())) is None
        ):
            return False
        lane, origin, birth, error, result = batch.lane, batch.last.origin, batch.birth, None, None
        page, number = (None, 0) if journal is None else (journal.words, journal.slots.get(lane, -1))
        try:
            values = unpack(batch.body)
        except Exception:  # noqa: BLE001 - the usual way says what is wrong
            number = -1
        if number < 0 or type(values) is not list or len(values) != 1:
            receiver.inbox.append(batch)
            self.wake()
            return True
        self._parked = False
        started = time.perf_counter()
        try:
            result = self._function(values[0])
            if page is not None:
                page[number] = origin
        except BaseException as exc:  # noqa: BLE001 - it is the user's function that raised, whatever it is
            error = exc
        seconds = time.perf_counter() - started
        try:
            if error is None and (result is None or not out.links or out.emit_one(result, lane, origin, birth)):
                self.mode.observe(1, seconds)
                self._meter.one(seconds, birth, result)
                newest = self._called_for.get(lane)
                self._meter.disorder += newest is not None and batch.last <= newest
                self._called_for[lane] = batch.last
                batch.mark, batch.body = out.numbered, b""
                if result is None or not out.links:
                    self._settle()
            else:
                chunk, self._batch = Chunk(values, batch.places, birth), batch
                if error is None:
                    self._emit(chunk, 0, [result])
                rest = self._called(chunk, 0, 1, seconds, error)
                if error is None and not self._unkept:
                    self._worked(chunk)
                else:
                    self._rest = rest
        except Exception as exc:  # noqa: BLE001 - whatever it is, `run` raises it
            self._broken = exc
        self._parked = True
        if self._rest is not None or self._broken is not None:
            self._go_on()
        return True

    def _go_on(self) -> None:
        """Let `run` go on, if it waits."""
        self._parked = False
        self._wake.set()

    async def run(self) -> None:
        """Work until cancelled. Raises `OperatorFailed`.

        An instance that stands by does nothing until it is active. One that has retired goes on until something fails,
        and does nothing more then, unless it becomes active again.
        """
        await self._active.wait()
        try:
            await self._run()
        except Exception:
            await self._active.wait()
            raise
        finally:
            if self._hold is not None:
                self._hold.cancel()

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            if self._broken is not None:
                raise self._broken
            if self._successor:
                self._catch_up()
            if self._rerun_due:
                await self.reruns.go_on()
            rest = self._rest
            self._rest = None
            if rest is None and (chunk := self._take()) is not None:
                rest = _Rest(chunk, 0, None, 0.0)
            if rest is not None:
                await self._work(rest)
                continue
            if self._rerun_due:
                continue
            if self._hold is not None and self._successor and (self._in.receiver.caught_up or not self._out.room):
                self._be_heard()
            self._settle()
            self._parked = True
            await self._wake.wait()
            self._parked = False

    async def rerun(self, ids: list[int] | None) -> dict[str, int]:
        """Run messages that were set aside once more, between two chunks: how many ran, and how many failed again."""
        done = self.reruns.ask(ids)
        self._go_on()
        return await done

    @property
    def _rerun_due(self) -> bool:
        """Whether messages are to be run again now.

        Results of an instance that takes another one's place would end that one's being heard: not before it is its
        turn, which it knows by its own input.
        """
        return self.reruns.due and not (self._successor and self._in.receiver.first is None)

    def _catch_up(self) -> None:
        """It has its input now: give it some time to get as far as the instance before it."""
        if self._hold is None and self._in.receiver.first is not None:
            self._hold = asyncio.get_running_loop().call_later(HOLD_MOST, self._out.release)

    def _be_heard(self) -> None:
        """The next operators are to hear this instance from now on."""
        self._successor = False
        self._out.release(caught_up=True)

    @property
    def queued(self) -> tuple[int, int]:
        """Messages and bytes received and not yet worked off."""
        messages, nbytes = self._in.receiver.queued
        left = self._left
        return messages + (len(left.values) if left is not None else 0), nbytes

    # -- one chunk

    def _take(self) -> Chunk | None:
        """The next messages to be worked off, if there are any and there is room for what comes of them."""
        left, inbox, meter = self._left, self._in.receiver.inbox, self._meter
        if (left is None and not inbox) or (self._role is not Role.ACTIVE and not self._may_call.is_set()):
            meter.paused = False
            return None
        size = self._out.spare
        if size < self.mode.chunk:
            size = self._out.room
        if size <= 0:
            meter.paused = True
            return None
        meter.paused = False
        if left is None:
            self._batch = batch = inbox.popleft()
            places = batch.places
            count = len(places.origins)
            try:
                values = self._codec.decode(batch.body, batch.buffers)
                if len(values) != count:
                    raise PayloadError(f"{len(values)} values in a batch of {count}")
            except PayloadError as exc:
                raise OperatorFailed(f"it can't read its input: {exc}") from exc
            left = Chunk(values, places, batch.birth)
            if batch.skip:
                left = left.cut(batch.skip, count)
        if self.mode.chunk < size:
            size = self.mode.chunk
        if self.set_aside.kept and self.set_aside.covers(left.places.lane, left.places.origins[0]):
            size = 1
        count = len(left.values)
        if size >= count:
            self._left = None
            return left
        self._left = left.cut(size, count)
        return left.cut(0, size)

    async def _work(self, rest: _Rest) -> None:
        """Work off a chunk from where it stands."""
        chunk = rest.chunk
        while True:
            if rest.error is not None:
                await self._failed(chunk, rest.at - 1, rest.error)
            if rest.debt > 0:
                await self._clock.sleep(rest.debt)
            if rest.at == len(chunk.values) or self._known(chunk):
                break
            if not self._may_call.is_set():
                await self._may_call.wait()
            if self.mode.inline:
                rest = self._call_inline(chunk, rest.at)
                await asyncio.sleep(0)
            else:
                rest = await self._call_thread(chunk, rest.at)
        if self._unkept:
            await self._active.wait()
            unkept, self._unkept = self._unkept, []
            for failed, k, error in unkept:
                self._keep_aside(failed, k, error, 1)
        self._worked(chunk)

    def _known(self, chunk: Chunk) -> bool:
        """Whether the chunk is a message that an earlier instance has set aside."""
        aside = self.set_aside
        return bool(aside.kept) and len(chunk.values) == 1 and aside.holds(chunk.places.lane, chunk.places[0])

    def _worked(self, chunk: Chunk) -> None:
        self._meter.worked(chunk.birth)
        places = chunk.places
        newest = self._called_for.get(places.lane)
        if newest is not None and places.origins[0] <= newest[0]:
            self._meter.disorder += places.up_to(newest)
        self._called_for[places.lane] = places[-1]
        if self._left is None and self._batch is not None:
            self._batch.done(self._out.numbered)
            self._batch = None
        self._settle()

    def _called(
        self,
        chunk: Chunk,
        at: int,
        calls: int,
        seconds: float,
        error: BaseException | None,
        *,
        unpaid: float | None = None,
    ) -> _Rest:
        """`calls` took `seconds`; `unpaid` of them (default: all) are yet to be made as long as on the slow node."""
        if calls:
            self.mode.observe(calls, seconds)
            self._meter.called(calls, seconds)
        return _Rest(chunk, at + calls, error, self._meter.stretch(seconds if unpaid is None else unpaid))

    def _call_inline(self, chunk: Chunk, at: int) -> _Rest:
        """Call for the values from number `at` on, until one raises."""
        results: list[Any] = []
        error: BaseException | None = None
        values = chunk.values[at:] if at else chunk.values
        started = time.perf_counter()
        try:
            if self._journal is None:
                # If a call raises, `extend` has kept the results of those before it.
                results.extend(map(self._function, values))
            else:
                self._call_journaled(self._journal, chunk, at, values, results)
        except BaseException as exc:  # noqa: BLE001 - it is the user's function that raised, whatever it is
            error = exc
        if error is None and len(results) < len(values):
            error = StopIteration("raised by the function")  # which `map` takes for the end of the values
        seconds = time.perf_counter() - started
        self._emit(chunk, at, results)
        return self._called(chunk, at, len(results) + (error is not None), seconds, error)

    def _call_journaled(self, journal: Journal, chunk: Chunk, at: int, values: list[Any], results: list[Any]) -> None:
        function, add = self._function, results.append
        places = chunk.places
        if places.paths is None and (slot := journal.slot(places.lane)) is not None:
            page, number = slot
            # The loop's own target is the store that marks a message, right after its call has returned.
            for result, page[number] in zip(map(function, values), places.origins[at:], strict=False):
                add(result)
            return
        for k, value in enumerate(values, at):
            add(function(value))
            journal.mark(places.lane, places[k])

    async def _call_thread(self, chunk: Chunk, at: int, first: int = 0) -> _Rest:
        """The same in the function's thread. Of a generator's results, those before number `first` aren't sent."""
        await self._may_call.wait()
        kind = self.spec.kind
        self._call = out = Handoff(asyncio.get_running_loop(), BATCH_MESSAGES)
        out.slowdown = self._meter.slowdown
        values = chunk.values[at:] if at else chunk.values
        function = self._function
        if self._journal is not None:
            function = noting(kind, function, _marks(self._journal, chunk, at))
        start_calls(self._worker, kind, function, values, out)
        called = 0
        try:
            while not (out.finished and not out.items):
                await out.wait()
                while (room := self._out.room) <= 0 and out.items:
                    self._meter.paused = True
                    self._wake.clear()
                    await self._wake.wait()
                self._meter.paused = False
                results = out.take(room)
                if kind in GENERATOR_KINDS:
                    self._emit_many(chunk, at, [r for r in results if r[1] >= first] if first else results)
                else:
                    self._emit(chunk, at + called, results)
                    called += len(results)
        finally:
            out.stop()
            self._call = None
            if not self._may_call.is_set():
                self.halted()
        if kind in GENERATOR_KINDS:
            called = out.calls
        elif out.error is not None:
            called += 1
        return self._called(chunk, at, called, out.seconds, out.error, unpaid=out.unpaid)

    def _emit(self, chunk: Chunk, at: int, results: list[Any]) -> None:
        """Results of the values from number `at` on, one each; None is none."""
        values = results
        if len(results) != 1 or results[0] is None:
            values = [r for r in results if r is not None]
        if values:
            places = chunk.places
            kept: Sequence[int] = range(at, at + len(results))
            if len(values) < len(kept):
                kept = [k for k, r in zip(kept, results, strict=True) if r is not None]
            if len(kept) < len(chunk.values):
                places = places.pick(kept)
            self._send(chunk, kept, values, places)

    def _emit_many(self, chunk: Chunk, at: int, results: list[tuple[int, int, Any]]) -> None:
        """Results of a generator: of which value, the how many-eth of its results, and the result."""
        if not results:
            return
        number, index, _ = results[-1]
        self._yielded = chunk.places.lane, chunk.places[at + number], index + 1
        if results := [r for r in results if r[2] is not None]:
            kept = [at + k for k, _, _ in results]
            places = chunk.places.pick(kept)
            steps = [step(index) for _, index, _ in results]
            paths = steps if places.paths is None else list(map(bytes.__add__, places.paths, steps))
            if max(map(len, paths)) > MOST_PATH:
                raise OperatorFailed("too many generators stand one behind another")
            self._send(chunk, kept, [r for _, _, r in results], Places(places.lane, places.origins, paths))

    def _send(self, chunk: Chunk, kept: Sequence[int], values: list[Any], places: Places) -> None:
        unsendable = self._out.emit(values, places, chunk.birth) if self._out.links else ()
        self._meter.emitted(sent(values, unsendable))
        for bad in unsendable:
            if self._active.is_set():
                self._keep_aside(chunk, kept[bad.number], bad.error, 1)
            else:
                self._unkept.append((chunk, kept[bad.number], bad.error))

    # -- errors

    async def _failed(self, chunk: Chunk, k: int, error: BaseException) -> None:
        """Value `k` raised: retry it, set it aside or fail, as the operator says."""
        await self._active.wait()
        attempts = 1
        while self.spec.on_error is OnError.RETRY and attempts <= self.spec.retries:
            self._meter.failed(error, retried=True)
            await self._clock.sleep(min(RETRY_MOST, RETRY_FIRST * 2 ** (attempts - 1)))
            single = Chunk([chunk.values[k]], chunk.places.cut(k, k + 1), chunk.birth)
            rest = await self._call_thread(single, 0, self._sent_of(single, 0))
            if rest.error is None:
                return
            error, attempts = rest.error, attempts + 1
        await self._active.wait()
        self._keep_aside(chunk, k, error, attempts)

    def _sent_of(self, chunk: Chunk, k: int) -> int:
        """How many results a generator that raised had yielded for value `k`."""
        *newest, count = self._yielded
        return count if newest == [chunk.places.lane, chunk.places[k]] else 0

    def _keep_aside(self, chunk: Chunk, k: int, error: BaseException, attempts: int) -> None:
        self._meter.failed(error, retried=False)
        if self.spec.on_error is OnError.FAIL:
            raise OperatorFailed(message_of(error)) from error
        lane, position = chunk.places.lane, chunk.places[k]
        try:
            value = self._codec.encode_one(chunk.values[k])
            self.set_aside.add(lane, position, value, describe(error), attempts, self._sent_of(chunk, k))
        except NomadError as exc:
            raise OperatorFailed(str(exc)) from exc
        if self._journal is not None:
            self._journal.mark(lane, position)
        self._meter.set_aside(self.set_aside.count)

    # -- settling

    def _settle(self) -> None:
        settled = self._out.settled
        self.reruns.settle(settled)
        self._in.receiver.settle(settled, self._clock.now())
        self._in.flush()

    async def _room(self) -> None:
        while not self._out.room:
            self._wake.clear()
            await self._wake.wait()


def _marks(journal: Journal, chunk: Chunk, at: int) -> Callable[[], None]:
    """Notes the position of one value after the other, from number `at` on."""
    numbers = iter(range(at, len(chunk.values)))

    def mark() -> None:
        journal.mark(chunk.places.lane, chunk.places[next(numbers)])

    return mark
