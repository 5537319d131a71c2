"""The process around one operator: `python -m nomad.actor`, started by a runtime.

Three threads, so that no user function can hold up what must go on: the main thread's loop speaks with the master
(heart-beats, orders), the data thread's loop runs links and actor, and the function's own thread runs
whatever isn't known to be quick. The pod dials the master and goes on without it when it is away.

A process may also be started before anybody knows for which operator: it dials in under its own name, loads what
every operator needs and waits for an assignment like any other. In a container there is more to do: `Container`.

Exit codes, for those who read logs (a user's function may end the process with any). What the master goes by is the
message `failed`: with `fatal`, which is sent before 3 and 4, it doesn't start the operator again.
"""

from __future__ import annotations

import asyncio
import ctypes
import enum
import functools
import importlib
import json
import logging
import os
import random
import resource
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, MutableMapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from nomad import control
from nomad.actor.execute import SetupFailed
from nomad.actor.instance import Instance
from nomad.actor.operator import OperatorFailed
from nomad.actor.route import Route
from nomad.actor.source import Source, SourceFailed
from nomad.clock import SystemClock
from nomad.control import Assignment, Role
from nomad.delivery.codec import Codec
from nomad.delivery.driver import HANDSHAKE_TIMEOUT, shake_dialer
from nomad.errors import DeliveryError, NomadError, PackagesError, PayloadError, TransportError, describe, message_of
from nomad.packages import Packages
from nomad.pipeline import OperatorSpec
from nomad.transport.base import Connection, Frame

T = TypeVar("T")

TURN_SECONDS = 3.0
"""How long the master may take to answer over another way; meanwhile nothing is heard over the present one."""

BACKOFF_FIRST, BACKOFF_MOST = 0.05, 2.0
"""Seconds between attempts to reach the master, doubled from the first to the most."""

STEADY = 2.0
"""Seconds that a connection must have stood for the next attempt to be a first one again.

A master that answers, and hangs up, isn't asked on and on.
"""

TAP_ITEMS, TAP_BYTES, TAP_EVERY = 4096, 4 << 20, 0.02
"""Outputs and their bytes that wait for the master while somebody looks on, and the seconds between messages.

What is over is counted.
"""

LAST_OUTPUT_BYTES = 64 * 1024

CLOSE_SECONDS = 2.0
"""How long links and function may take to end."""

SWITCH_INTERVAL = 0.0005
"""Seconds after which a computing thread must let another one have the interpreter.

Bounds what it adds to the network's latency.
"""

log = logging.getLogger(__name__)


class Exit(enum.IntEnum):
    """Why the process ended. Anything else, or a signal, is a crash."""

    STOPPED = 0
    """As asked."""
    CRASHED = 1
    """A generator source raised, or something of ours did."""
    CODE = 3
    """The operator's code could not be verified or loaded, or its `setup` raised; starting it again wouldn't help."""
    FAILED = 4
    """A message failed under on_error="fail", or the input can't be decoded."""
    ABANDONED = 5
    """No master for longer than agreed."""


__doc__ = (__doc__ or "") + "\n".join(f"    {code.value}  {code.name.lower()}" for code in Exit)


@dataclass(frozen=True, slots=True)
class Container:
    """What a pod is told of the container that it runs in, if it does."""

    address: str | None = None
    """NOMAD_POD_IP: where others reach what listens here."""
    ready_port: int | None = None
    """NOMAD_READY_PORT: accepts connections while the actor can take messages; what a readiness probe looks at."""
    serving: Path | None = None
    """A file in NOMAD_WORK that is there from the assignment to the end of the process: as long as it is, a container
    that is to end waits for the master, which has been told so by SIGUSR1, to put another one in its place.
    """

    @classmethod
    def of(cls, environ: MutableMapping[str, str]) -> Self:
        """As the environment describes it."""
        port, folder = environ.get("NOMAD_READY_PORT"), environ.get("NOMAD_WORK")
        return cls(
            environ.get("NOMAD_POD_IP") or None,
            int(port) if port else None,
            Path(folder) / "serving" if folder else None,
        )


def boot_from(environ: MutableMapping[str, str]) -> dict[str, Any]:
    """What a process is told at its start: in the file that NOMAD_BOOT names, else in NOMAD_POD. Both are removed, so
    that neither the user's code nor what it starts inherits them.
    """
    path, text = environ.pop("NOMAD_BOOT", ""), environ.pop("NOMAD_POD", "")
    boot: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8") if path else text)
    return boot


class Host:
    """The pod: waits for its assignment, runs it, and reports."""

    def __init__(self, boot: dict[str, Any], container: Container | None = None):
        self._pod: str = boot["pod"]
        self._epoch: int = boot.get("epoch", 0)
        """0 until it is known for which operator the process is."""
        self._container = container or Container()
        self._route = Route(boot["control"], self._pod)
        self._turned = False
        """The master wants to be reached another way."""
        self._key = bytes.fromhex(boot["key"])
        self._verify_key = bytes.fromhex(boot["verify_key"])
        self._master_timeout: float = boot["master_timeout"]
        self._data = DataThread()
        self._conn: Connection | None = None
        self._made: Instance | None = None
        """To be closed at the end."""
        self._instance: Instance | None = None
        """The same, once it is ready."""
        self._ready: dict[str, Any] | None = None
        self._status: dict[str, Any] | None = None
        """As last told."""
        self._status_due = False
        self._pace = control.HEARTBEAT
        """Seconds between two heart-beats."""
        self._paced = asyncio.Event()
        """The pace has changed."""
        self._finished = False
        self._exit: asyncio.Future[Exit] | None = None
        self._work: asyncio.Task[None] | None = None
        self._taps = Taps()
        self._requests: set[asyncio.Task[None]] = set()
        self._leaving = False
        """Somebody else than the master wants it to end."""
        self._probed: asyncio.Server | None = None
        self._packages: Packages | None = None
        """Held, so that they stay."""

    async def run(self) -> Exit:
        """Until the pod is to end; why it did."""
        loop = asyncio.get_running_loop()
        self._exit = loop.create_future()
        loop.add_signal_handler(signal.SIGTERM, self._end, Exit.STOPPED)
        loop.add_signal_handler(signal.SIGUSR1, self._leave)
        tasks = [asyncio.create_task(job) for job in (self._talk(), self._beat(), self._forward())]
        for task in tasks:
            task.add_done_callback(self._ended)
        try:
            return await self._exit
        finally:
            if self._work is not None:
                tasks.append(self._work)
            for task in (*tasks, *self._requests):
                task.cancel()
            await asyncio.gather(*tasks, *self._requests, return_exceptions=True)
            if self._probed is not None:
                self._probed.close()
            if self._conn is not None:
                self._send_outputs()
                self._send_stats()  # the last: what the master keeps of this process
                await self._conn.close()

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A pod that the master hears nothing of any more, or that hears nothing, is better started anew."""
        if not task.cancelled() and (exc := task.exception()) is not None:
            self._fail(exc, Exit.CRASHED)

    def close(self) -> bool:
        """Stop the data plane; False when a call of the user's function hangs, wherever it runs."""
        if self._made is not None:
            try:
                ended = self._data.call(self._made.close()).result(CLOSE_SECONDS)
            except TimeoutError:
                return False
            if not ended:
                return False
        self._data.close()
        return True

    def gone(self) -> None:
        """The very last: nobody needs to wait for this process."""
        if self._container.serving is not None:
            with suppress(OSError):
                self._container.serving.unlink(missing_ok=True)

    # -- talking with the master

    async def _talk(self) -> None:
        """Keep a connection to the master, for as long as it may be away."""
        backoff, alone_since = BACKOFF_FIRST, time.monotonic()
        while True:
            try:
                conn = await self._route.dial(time.monotonic() - alone_since)
                try:
                    await self._meet(conn)
                    met_at, self._turned = time.monotonic(), False
                    while True:
                        self._hear(conn, await conn.recv())
                        if self._turned:
                            self._turned = False
                            conn = await self._turn(conn)
                finally:
                    if self._conn is conn:
                        alone_since = time.monotonic()
                        if alone_since - met_at >= STEADY:
                            backoff = BACKOFF_FIRST
                    if self._conn is not conn or not self._ending:  # else `run` has something left to say over it
                        self._conn = None
                        conn.abort()
            except (TransportError, DeliveryError) as exc:
                log.debug("no master: %s", exc)
            except (ValueError, KeyError, TypeError) as exc:
                log.warning("the master said what this pod doesn't understand: %r", exc)
            if time.monotonic() - alone_since > self._master_timeout:
                print(f"nomad: no master for {self._master_timeout:g} s, stopping", file=sys.stderr, flush=True)
                self._end(Exit.ABANDONED)
            await asyncio.sleep(min(backoff, max(0.05, self._master_timeout / 4)))
            backoff = min(BACKOFF_MOST, backoff * 2)

    async def _meet(self, conn: Connection, timeout: float = HANDSHAKE_TIMEOUT) -> None:
        """Talk over a new connection from now on. Raises `TransportError` or `DeliveryError`."""
        hello = {"epoch": self._epoch, "pid": os.getpid(), "assigned": self._work is not None}
        await shake_dialer(conn, self._key, self._pod, hello, timeout)
        self._conn = conn
        self._set_pace(control.HEARTBEAT)
        self._send_state()

    async def _turn(self, conn: Connection) -> Connection:
        """Come the way that the master asks for: the new connection, or the present one if that leads nowhere."""
        fresh = None
        try:
            fresh = await self._route.by_agent()
            await self._meet(fresh, TURN_SECONDS)
        except (TransportError, DeliveryError) as exc:
            log.debug("no other way to the master: %s", exc)
            return conn
        finally:
            if fresh is not None and fresh is not self._conn:
                fresh.abort()
        with suppress(TransportError):
            self._hear(conn, conn.poll())  # what it had said before
        await conn.close()
        return fresh

    def _hear(self, conn: Connection, frames: Iterable[Frame]) -> None:
        for frame in frames:
            self._receive(control.unpack(bytes(frame[0])), conn)

    def _send(self, message: dict[str, Any]) -> None:
        """Tell the master, if it is there."""
        if self._conn is not None and not self._conn.closed:
            try:
                self._conn.write([(control.pack(message),)])
            except TransportError:
                return  # `_talk` sees the same and dials again

    def _send_state(self) -> None:
        """What a master must know that has just been connected to, perhaps a new one."""
        if self._leaving:
            self._send({"type": "leaving"})
        if self._ready is not None:
            self._send(self._ready)
            self._status = None
            self._send_status()
            self._send_stats()
        if self._finished:
            self._send({"type": "finished"})

    def _receive(self, message: dict[str, Any], conn: Connection) -> None:
        kind = message["type"]
        if kind == "assign" and self._work is None:
            assignment = control.assignment_from(message)
            self._epoch = assignment.epoch
            self._work = asyncio.create_task(self._work_on(assignment))
        elif kind == "peers" and self._instance is not None:
            peers = [control.peer_from(p) for p in message["links"]]
            self._data.run(self._instance.set_peers, peers)
            if "role" in message:
                self._data.run(self._instance.set_role, Role(message["role"]), message.get("called") or ())
            if "speed" in message:
                self._data.run(self._instance.meter.set_speed, float(message["speed"]))
        elif kind == "pace":
            self._set_pace(control.pace_from(message))
        elif kind == "stop":
            self._stop(bool(message["drain"]), float(message["grace"]))
        elif kind == "via":
            self._route.turn(str(message["address"]), bytes(message["key"]))
            self._turned = True
        elif kind == "request":
            task = asyncio.create_task(self._answer(message, conn))
            self._requests.add(task)
            task.add_done_callback(self._requests.discard)

    async def _answer(self, message: dict[str, Any], conn: Connection) -> None:
        try:
            value = await self._do(message["method"], message.get("args") or {})
            reply = {"type": "reply", "id": message["id"], "ok": True, "value": value}
        except Exception as exc:  # noqa: BLE001 - whatever it is, the one who asked is to get an answer
            reply = {"type": "reply", "id": message["id"], "ok": False, "error": describe(exc)}
        if conn is self._conn:  # else it would answer what somebody else has asked since, with the same number
            self._send(reply)

    async def _do(self, method: str, args: dict[str, Any]) -> Any:
        instance = self._instance
        if instance is None:
            raise NomadError("the operator is not ready yet")
        if method == "last_output":
            last = instance.meter.last
            return None if last is None else instance.shown.encode_one(last)
        if method == "set_aside":
            return await self._data.on_loop(instance.set_aside)
        if method == "rerun":
            return await asyncio.wrap_future(self._data.call(instance.rerun(args.get("ids"))))
        if method == "drop":
            return await self._data.on_loop(lambda: instance.drop(args.get("ids")))
        if method == "tap":
            instance.meter.tap = self._tap if args["on"] else None
            return {}
        if method == "samples":
            return instance.meter.samples(float(args.get("after") or 0.0))
        if method == "numbers":
            return await self._data.on_loop(instance.numbers)
        if method == "export":
            return await asyncio.to_thread(instance.hand_out, int(args["offset"]))
        if method == "import":
            offset, data = int(args["offset"]), bytes(args["data"])
            return await asyncio.to_thread(instance.take_in, offset, data, last=bool(args["last"]))
        if method == "cut":
            return await self._data.on_loop(instance.cut)
        raise NomadError(f"a pod doesn't know the request {method!r}")

    # -- the operator

    async def _work_on(self, assignment: Assignment) -> None:
        try:
            if self._container.serving is not None:
                self._container.serving.touch()
            spec = await asyncio.to_thread(self._spec, assignment)
            os.environ.update(spec.environment)
            if spec.requirements:
                await self._install(spec.requirements, assignment)
            loaded = await asyncio.to_thread(self._load, assignment)
        except PackagesError as exc:
            self._fail(exc, Exit.CODE if exc.final else Exit.CRASHED)
            return
        except Exception as exc:  # noqa: BLE001 - a manifest may be signed and still not be one for this version
            self._fail(exc, Exit.CODE)
            return
        try:
            told = functools.partial(self._status_changed, asyncio.get_running_loop())
            instance = await self._data.on_loop(
                lambda: Instance(assignment, loaded, SystemClock(), told, self._container.address)
            )
            self._made = instance
            await asyncio.wrap_future(self._data.call(instance.setup()))
            address = await asyncio.wrap_future(self._data.call(instance.start()))
            self._instance = instance
            self._ready = {"type": "ready", "address": address, "pid": os.getpid()}
            self._send_state()
            await self._let_probe()
            await asyncio.wrap_future(self._data.call(instance.run()))
        except SetupFailed as exc:
            self._fail(exc, Exit.CODE)
        except SourceFailed as exc:
            self._fail(exc, Exit.CRASHED)
        except OperatorFailed as exc:
            self._fail(exc, Exit.FAILED)
        except Exception as exc:  # noqa: BLE001 - whatever it is, the master and the user are to see it
            self._fail(exc, Exit.CRASHED)
        else:
            if isinstance(instance.actor, Source) and instance.actor.draining:
                self._end(Exit.STOPPED)
                return
            self._finished = True
            self._send_stats()
            self._send({"type": "finished"})

    def _spec(self, assignment: Assignment) -> OperatorSpec:
        """What the user has signed for, whatever the master says."""
        from nomad.bundle import verified_spec

        return verified_spec(assignment.manifest, assignment.signature, self._verify_key, assignment.operator)

    async def _install(self, requirements: tuple[str, ...], assignment: Assignment) -> None:
        """Have what the operator requires, for as long as this process lives. Raises `PackagesError`."""
        from nomad import packages
        from nomad.handout import fetched

        begun = time.monotonic()
        if assignment.agent:
            cache = packages.Cache(Path(assignment.workdir or tempfile.gettempdir()) / "packages")
            self._packages = await fetched(cache, requirements, assignment.agent, self._pod, assignment.agent_key)
        else:
            cache = packages.Cache(Path(assignment.packages), assignment.packages_bytes)
            self._packages = await cache.installed(requirements)
        taken = time.monotonic() - begun
        print(f"nomad: {', '.join(requirements)} installed, in {taken:.1f} s", file=sys.stderr, flush=True)
        for name in packages.use(self._packages.path):
            print(f"nomad: {name} was loaded before it was installed and stays as it is", file=sys.stderr, flush=True)

    def _load(self, assignment: Assignment) -> Any:
        from nomad.bundle import load_operator

        return load_operator(
            assignment.manifest,
            assignment.signature,
            self._verify_key,
            assignment.operator,
            assignment.code,
            assignment.types,
        )

    async def _let_probe(self) -> None:
        """Accept connections on the port for probes, and close them at once."""
        if self._container.ready_port is not None:
            self._probed = await asyncio.start_server(
                lambda reader, writer: writer.close(), self._container.address, self._container.ready_port
            )

    def _fail(self, exc: BaseException, code: Exit) -> None:
        cause = exc.__cause__ if isinstance(exc, (OperatorFailed, SetupFailed)) and exc.__cause__ is not None else exc
        error = {**describe(cause), "message": message_of(exc)}
        print(error["traceback"], file=sys.stderr, flush=True)
        self._send_stats()
        self._send({"type": "failed", "error": error, "fatal": code in (Exit.CODE, Exit.FAILED)})
        self._end(code)

    def _stop(self, drain: bool, grace: float) -> None:
        instance = self._instance
        if drain and instance is not None and isinstance(instance.actor, Source) and not self._finished:
            self._data.run(instance.actor.drain)
            asyncio.get_running_loop().call_later(grace, self._end, Exit.STOPPED)
        else:
            self._end(Exit.STOPPED)

    def _leave(self) -> None:
        """Tell the master that this process is wanted to end, and go on until it says what to do."""
        self._leaving = True
        self._send({"type": "leaving"})

    @property
    def _ending(self) -> bool:
        return self._exit is not None and self._exit.done()

    def _end(self, code: Exit) -> None:
        if self._exit is not None and not self._exit.done():
            self._exit.set_result(code)

    # -- reporting

    async def _beat(self) -> None:
        """The first heart-beat at another pace comes at any moment within it: the pods of a master, which are all told
        at once, are not to speak all at once.
        """
        wait = self._pace
        while True:
            try:
                async with asyncio.timeout(wait):
                    await self._paced.wait()
                self._paced.clear()
                wait = random.uniform(0.0, self._pace)
            except TimeoutError:
                self._send_stats()
                wait = self._pace

    def _set_pace(self, seconds: float) -> None:
        if seconds != self._pace:
            self._pace = seconds
            self._paced.set()

    def _send_stats(self) -> None:
        if self._instance is None or self._conn is None:
            return
        stats = self._instance.stats()
        stats.rss = _resident()
        stats.cpu = time.process_time()
        stats.last_output = self._last_output(self._instance)
        self._send({"type": "heartbeat", "stats": asdict(stats), "error": self._instance.meter.last_error})

    def _status_changed(self, loop: asyncio.AbstractEventLoop) -> None:
        """Called in the data thread."""
        if not self._status_due:
            self._status_due = True
            loop.call_soon_threadsafe(self._send_status)

    def _send_status(self) -> None:
        """Say it if it is news to the master."""
        self._status_due = False
        if self._instance is None or self._ready is None or self._conn is None:
            return
        status = self._instance.status()
        if status != self._status:
            self._status = status
            self._send({"type": "status", **status})

    def _last_output(self, instance: Instance) -> bytes | None:
        last, size = instance.meter.last, instance.outbox.output_bytes
        if last is None or max(size or 0, _nbytes(last)) > LAST_OUTPUT_BYTES:
            return None
        try:
            data = instance.shown.encode_one(last)
        except PayloadError:
            return None
        return data if len(data) <= LAST_OUTPUT_BYTES else None

    def _tap(self, values: list[Any]) -> None:
        """Called in the data thread."""
        assert self._instance is not None
        self._taps.put(values, self._instance.codec)

    async def _forward(self) -> None:
        while True:
            await self._taps.waiting.wait()
            await asyncio.sleep(TAP_EVERY)
            self._send_outputs()

    def _send_outputs(self) -> None:
        items, skipped = self._taps.take()
        if items or skipped:
            self._send({"type": "outputs", "items": items, "skipped": skipped})


class Taps:
    """Outputs on their way to somebody who looks on; from the data thread to the main one."""

    def __init__(self) -> None:
        self.waiting = asyncio.Event()
        """Set, in the main loop, when there is something to take."""
        self._loop = asyncio.get_running_loop()
        self._items: deque[bytes] = deque()
        self._bytes = 0
        self._skipped = 0
        self._told = False

    def put(self, values: list[Any], codec: Codec) -> None:
        """Keep what there is room for, encoded."""
        for number, value in enumerate(values):
            if len(self._items) >= TAP_ITEMS or self._bytes >= TAP_BYTES:
                self._skipped += len(values) - number
                break
            try:
                data = codec.encode_one(value)
            except PayloadError:
                self._skipped += 1
                continue
            self._items.append(data)
            self._bytes += len(data)
        # Last, and `take` forgets it first: whatever is put while the other thread takes is told of again.
        if not self._told:
            self._told = True
            self._loop.call_soon_threadsafe(self.waiting.set)

    def take(self) -> tuple[list[bytes], int]:
        """All that waits, and how many were skipped since the last time."""
        self._told = False
        self.waiting.clear()
        items = [self._items.popleft() for _ in range(len(self._items))]
        skipped, self._skipped, self._bytes = self._skipped, 0, 0
        return items, skipped


class DataThread:
    """The thread with the loop in which links and actor live."""

    def __init__(self) -> None:
        self._loop = new_loop()
        self._thread = threading.Thread(target=self._run, name="data", daemon=True)
        self._thread.start()

    def call(self, job: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine there."""
        return asyncio.run_coroutine_threadsafe(job, self._loop)

    def run(self, job: Callable[..., None], *args: Any) -> None:
        """Call a function there, without waiting."""
        self._loop.call_soon_threadsafe(job, *args)

    async def on_loop(self, job: Callable[[], T]) -> T:
        """Call a function there, and wait for its result."""

        async def wrapped() -> T:
            return job()

        return await asyncio.wrap_future(self.call(wrapped()))

    def close(self) -> None:
        """End the loop and wait for the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()


def new_loop() -> asyncio.AbstractEventLoop:
    """A uvloop where it exists, asyncio's own loop elsewhere."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def main() -> None:
    """Run the pod that the environment describes; doesn't return."""
    boot, container = boot_from(os.environ), Container.of(os.environ)
    sys.setswitchinterval(SWITCH_INTERVAL)
    _keep_large_buffers()
    _keep_signals_from_forks()
    if not boot.get("epoch"):
        _load_ahead()
    with asyncio.Runner(loop_factory=new_loop) as runner:
        host = runner.run(_make(boot, container))
        code = runner.run(host.run())
    ended = host.close()
    sys.stdout.flush()
    sys.stderr.flush()
    host.gone()
    if not ended:
        os._exit(code)  # a function that hangs in its thread would keep the interpreter from ending
    sys.exit(code)


async def _make(boot: dict[str, Any], container: Container) -> Host:
    return Host(boot, container)


def _load_ahead() -> None:
    """Import, while there is time, what an operator is going to need."""
    for name in ("nomad.bundle", "nomad.bundle.load", "cloudpickle"):
        with suppress(ImportError):
            importlib.import_module(name)


def _keep_signals_from_forks() -> None:
    """Let a signal to a process that the user's function forks end that one, and not the pod.

    The two share the socket over which the loop hears of signals, and multiprocessing ends its workers with SIGTERM.
    """
    numbers = (signal.SIGTERM, signal.SIGINT)

    def before() -> None:  # a signal may come before `child` is called
        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)

    def child() -> None:
        signal.set_wakeup_fd(-1)
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
        parent()

    def parent() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)

    os.register_at_fork(before=before, after_in_child=child, after_in_parent=parent)


def _keep_large_buffers() -> None:
    """Let glibc reuse large buffers instead of returning them: page faults of fresh ones cost more than the copies."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    m_trim_threshold, m_mmap_threshold = -1, -3
    mallopt(m_mmap_threshold, 32 << 20)
    mallopt(m_trim_threshold, 64 << 20)


def _nbytes(value: Any) -> int:
    """What an array says of its size; 0 for what isn't one. The value is the user's, and so is what it answers."""
    try:
        return int(getattr(value, "nbytes", 0))
    except Exception:  # noqa: BLE001 - the user's code
        return 0


def _resident() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
