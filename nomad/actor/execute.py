"""Calls the user's function: in the data loop, or in a thread from which results are handed over.

A thread hands its results to the loop through a `Handoff`: one wake-up for however many values, and a bound
on how many wait. Synchronous functions run in a plain thread; asynchronous ones in a thread with an event loop of
their own, so that even one that blocks by mistake doesn't hold up the network.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future
from typing import Any

from nomad.actor.meter import STRETCH_LEAST
from nomad.errors import NomadError, message_of
from nomad.pipeline import Kind

ASYNC_KINDS = (Kind.ASYNC, Kind.ASYNC_GENERATOR, Kind.ASYNC_PERIODIC, Kind.ASYNC_SOURCE_GENERATOR)
GENERATOR_KINDS = (Kind.GENERATOR, Kind.ASYNC_GENERATOR)


PRECISE = 64
"""Up to this many values that may wait, each has its own time; of more, those made between two takings share one."""

QUIET = 1_000_000
"""Nanoseconds since the last value after which one may be sent by the thread itself: more often, batches pay."""


class Stopped(BaseException):
    """Unwinds a user's generator when the operator stops; a BaseException so that `except Exception` lets it pass."""


class SetupFailed(NomadError):
    """An operator's `setup` raised: starting it again wouldn't help."""


class Handoff:
    """Values on their way from a thread to the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, limit: int, ready: Callable[[], None] | None = None):
        self.limit = limit
        self.seconds = 0.0
        """What the thread has spent in the function for what it has handed over; written when it finishes."""
        self.error: BaseException | None = None
        self.finished = False
        self.calls = 0
        """Values that a generator has been called for, the one that raised included."""
        self.slowdown = 1.0
        """How many times longer each value takes on the emulated node; the thread waits before it hands one over."""
        self.unpaid = 0.0
        """Seconds of work that weren't made longer yet; final when it has finished."""
        self.since = 0.0
        """`time.perf_counter` when the work on the next value began."""
        self.rested = 0.0
        """Seconds of waiting for `slowdown`, which aren't the function's."""
        self.items: list[Any] = []
        """Values that wait to be taken, oldest first. Only `take` removes any."""
        self.birth = 0
        """`time.time_ns` when the oldest of the values taken last was made, or a little earlier."""
        self._births: deque[tuple[int, int]] = deque()
        """Number of a value, from 0, and when it was made; it stands for those up to the next, see `PRECISE`."""
        self._made = 0
        self.taken = 0
        """Values that were taken, or sent by the thread itself."""
        self.send: Callable[[Any, int], bool] | None = None
        """Called in the thread with a generator's value and when it was made, now and then: whether it was sent."""
        self._loop = loop
        self._signalled = False
        self._stopped = False
        self._ready: asyncio.Event | None = None
        if ready is None:
            self._ready = asyncio.Event()
            ready = self._ready.set
        self._call = ready
        """What happens in the loop when there is something to take: `wait` returns, or what the owner wants instead."""
        self._full = False
        self._space = threading.Event()
        self._async_space: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    # -- in the thread

    def put(self, item: Any) -> None:
        """Hand over a value; waits while `limit` values wait."""
        if self.slowdown > 1.0 and (pause := self._pause()):
            self._rest(pause)
        self._append(item)
        if len(self.items) >= self.limit or self._stopped:
            self._wait()
        self.since = time.perf_counter()

    def put_all(self, items: Iterable[Any]) -> None:
        """Hand over all of a generator's values, each as soon as it is there. `put`, without a call per value."""
        waiting, append, born, now = self.items, self.items.append, self._births.append, time.time_ns
        send, last, newest = self.send, 0, -1
        for number, item in enumerate(items):
            if self._signalled:
                if self.limit <= PRECISE:
                    born((number, now()))
                append(item)
            else:
                before, last = last, now()
                alone, newest = number == newest + 1 and last - before >= QUIET, number
                if alone and send is not None and not self._stopped and send(item, last):
                    continue
                born((number, last))
                append(item)
                self._signal()
            if len(waiting) >= self.limit or self._stopped:
                self._wait()

    async def put_async(self, item: Any) -> None:
        """The same in a thread that runs a loop."""
        if self.slowdown > 1.0 and (pause := self._pause()):
            started = time.perf_counter()
            await asyncio.sleep(pause)
            self.rested += time.perf_counter() - started
        self._append(item)
        if self._async_space is None:
            self._async_space = asyncio.get_running_loop(), asyncio.Event()
        while len(self.items) >= self.limit and not self._stopped:
            space = self._async_space[1]
            space.clear()
            self._full = True
            if len(self.items) >= self.limit and not self._stopped:
                await space.wait()
            self._full = False
        if self._stopped:
            raise Stopped
        self.since = time.perf_counter()

    def finish(self, error: BaseException | None, seconds: float) -> None:
        """Nothing more comes, `seconds` after the beginning."""
        self.unpaid += time.perf_counter() - self.since
        self.error, self.seconds, self.finished = error, seconds - self.rested, True
        self._signal()

    # -- in the loop

    async def wait(self) -> None:
        """Until there is something to take, or it has finished."""
        assert self._ready is not None, "its owner is called"
        await self._ready.wait()

    def take(self, most: int | None = None) -> list[Any]:
        """Up to `most` values, oldest first."""
        self._signalled = False
        items, births = self.items, self._births
        if items:
            while len(births) > 1 and births[1][0] <= self.taken:
                births.popleft()
            self.birth = births[0][1]
        count = len(items) if most is None or most > len(items) else most
        taken = items[:count]
        del items[:count]
        self.taken += count
        if self._full or self._async_space is not None:
            self._free()
        if self._ready is not None and not items and not self.finished:
            self._ready.clear()
        return taken

    def allow(self, limit: int) -> None:
        """How many values may wait from now on; with 0 the thread waits once it has handed over another one."""
        self.limit = limit
        self._free()

    @property
    def resting(self) -> bool:
        """Nothing waits to be taken, and nothing more comes before it is allowed."""
        return not self.items and (self.finished or self._full)

    def stop(self) -> None:
        """Make the thread give up at its next value."""
        self._stopped = True
        self._free()

    # -- inside

    def _wait(self) -> None:
        while len(self.items) >= self.limit and not self._stopped:
            self._space.clear()
            self._full = True
            if len(self.items) >= self.limit and not self._stopped:
                self._space.wait()
            self._full = False
        if self._stopped:
            raise Stopped

    def _pause(self) -> float:
        """Seconds to wait before a value that is there; short ones are saved up, as timers aren't that fine."""
        self.unpaid += time.perf_counter() - self.since
        pause = self.unpaid * (self.slowdown - 1.0)
        if pause < STRETCH_LEAST:
            return 0.0
        self.unpaid = 0.0
        return pause

    def _rest(self, seconds: float) -> None:
        """Wait, unless it is stopped meanwhile."""
        started = time.perf_counter()
        while (left := started + seconds - time.perf_counter()) > 0 and not self._stopped:
            self._space.clear()
            self._full = True
            self._space.wait(left)
        self._full = False
        self.rested += time.perf_counter() - started

    def _append(self, item: Any) -> None:
        # Appending, slicing and deleting a list are atomic under the GIL, and only the loop removes.
        if not self._signalled or self.limit <= PRECISE:
            self._births.append((self._made, time.time_ns()))
        self._made += 1
        self.items.append(item)
        if not self._signalled:
            self._signal()

    def _signal(self) -> None:
        self._signalled = True
        try:
            self._loop.call_soon_threadsafe(self._call)
        except RuntimeError:
            return  # the loop has ended while a call hung: nobody waits any more

    def _free(self) -> None:
        if self._full:
            self._space.set()
        if self._async_space is not None:
            loop, event = self._async_space
            loop.call_soon_threadsafe(event.set)


class Worker:
    """The thread in which a function runs. `close` asks it to end and doesn't wait for a call that hangs."""

    def __init__(self, name: str, *, runs_loop: bool):
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop() if runs_loop else None
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], None]) -> None:
        """Run `job` in the thread."""
        self._jobs.put(job)

    def submit_async(self, job: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run the coroutine in the thread's loop."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._start, job)

    async def once(self, job: Callable[[], Any]) -> None:
        """Run `job` in the thread and wait until it is done. Raises `SetupFailed`, with what it raised as the cause."""
        done: Future[None] = Future()

        def run() -> None:
            if not done.set_running_or_notify_cancel():
                return
            try:
                job()
            except BaseException as exc:  # noqa: BLE001 - it is the user's function that raised, whatever it is
                failed = SetupFailed(f"setup: {message_of(exc)}")
                failed.__cause__ = exc
                done.set_exception(failed)
            else:
                done.set_result(None)

        if self._loop is None:
            self.submit(run)
        else:
            self._loop.call_soon_threadsafe(run)
        await asyncio.wrap_future(done)

    def close(self, timeout: float) -> bool:
        """Ask the thread to end; whether it did within `timeout` seconds. May be called again."""
        if not self._closing:
            self._closing = True
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._loop.stop)
            self._jobs.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _start(self, job: Callable[[], Coroutine[Any, Any, None]]) -> None:
        assert self._loop is not None
        task = self._loop.create_task(job())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _run(self) -> None:
        if self._loop is not None:
            asyncio.set_event_loop(self._loop)
            self._loop.run_forever()
            for task in self._tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*self._tasks, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()
            return
        while (job := self._jobs.get()) is not None:
            job()


def noting(kind: Kind, function: Callable[..., Any], done: Callable[[], None]) -> Callable[..., Any]:
    """`function`, calling `done` after each value that it is done with."""

    def call(value: Any) -> Any:
        result = function(value)
        done()
        return result

    async def call_async(value: Any) -> Any:
        result = await function(value)
        done()
        return result

    def generate(value: Any) -> Any:
        yield from function(value)
        done()

    async def generate_async(value: Any) -> Any:
        async for result in function(value):
            yield result
        done()

    return {
        Kind.ASYNC: call_async,
        Kind.GENERATOR: generate,
        Kind.ASYNC_GENERATOR: generate_async,
    }.get(kind, call)


def start_calls(worker: Worker, kind: Kind, function: Callable[..., Any], values: Iterable[Any], out: Handoff) -> None:
    """Call `function` for each value, in the worker.

    Functions hand over one result per value, None included; generators triples: number of the value, number of the
    result among those of the value, result.
    It ends at the first error.
    """
    if kind in ASYNC_KINDS:
        worker.submit_async(lambda: _timed_async(lambda: _calls_async(kind, function, values, out), out))
    else:
        worker.submit(lambda: _timed(lambda: _calls(kind, function, values, out), out))


def start_source(worker: Worker, kind: Kind, function: Callable[..., Any], out: Handoff) -> None:
    """Pull a generator source, or call a periodic one once, in the worker."""
    if kind is Kind.ASYNC_SOURCE_GENERATOR:
        worker.submit_async(lambda: _timed_async(lambda: _pull_async(function, out), out))
    elif kind is Kind.ASYNC_PERIODIC:
        worker.submit_async(lambda: _timed_async(lambda: _once_async(function, out), out))
    elif kind is Kind.SOURCE_GENERATOR:
        worker.submit(lambda: _timed(lambda: _pull(function, out), out))
    else:
        worker.submit(lambda: _timed(lambda: out.put(function()), out))


def _timed(job: Callable[[], None], out: Handoff) -> None:
    started = out.since = time.perf_counter()
    error: BaseException | None = None
    try:
        job()
    except Stopped:
        pass
    except BaseException as exc:  # noqa: BLE001 - a user's sys.exit() is an error of the message too; the operator reports it
        error = exc
    out.finish(error, time.perf_counter() - started)


async def _timed_async(job: Callable[[], Coroutine[Any, Any, None]], out: Handoff) -> None:
    started = out.since = time.perf_counter()
    error: BaseException | None = None
    try:
        await job()
    except Stopped:
        pass
    except BaseException as exc:  # noqa: BLE001 - as in _timed; cancellation happens at the thread's end only
        error = exc
    out.finish(error, time.perf_counter() - started)


def _calls(kind: Kind, function: Callable[..., Any], values: Iterable[Any], out: Handoff) -> None:
    put = out.put
    if kind is Kind.GENERATOR:
        for number, value in enumerate(values):
            out.calls = number + 1
            for index, result in enumerate(function(value)):
                put((number, index, result))
    else:
        for value in values:
            put(function(value))


async def _calls_async(kind: Kind, function: Callable[..., Any], values: Iterable[Any], out: Handoff) -> None:
    if kind is Kind.ASYNC_GENERATOR:
        for number, value in enumerate(values):
            out.calls = number + 1
            index = 0
            async for result in function(value):
                await out.put_async((number, index, result))
                index += 1
    else:
        for value in values:
            await out.put_async(await function(value))


def _pull(function: Callable[..., Any], out: Handoff) -> None:
    out.put_all(function())


async def _pull_async(function: Callable[..., Any], out: Handoff) -> None:
    async for value in function():
        await out.put_async(value)


async def _once_async(function: Callable[..., Any], out: Handoff) -> None:
    await out.put_async(await function())
