"""The process around one operator: `python -m nomad.actor`, started by a runtime.

Three threads, so that no user function can hold up what must go on: the main thread's loop speaks with the master
(`channel`: the connection; `reports`: what is said unasked), the data thread's loop (`threads`) runs links and actor,
and the function's own thread runs whatever isn't known to be quick. Here is what becomes of the process: from the
assignment to the operator at work, what the master orders and asks, and every way in which it ends.

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
import os
import signal
import sys
import tempfile
import time
from collections.abc import MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from nomad import control
from nomad.actor.channel import Channel
from nomad.actor.execute import SetupFailed
from nomad.actor.instance import Instance
from nomad.actor.operator import OperatorFailed
from nomad.actor.reports import Reports
from nomad.actor.source import Source, SourceFailed
from nomad.actor.threads import DataThread, new_loop
from nomad.clock import SystemClock
from nomad.control import Assignment, Role
from nomad.errors import NomadError, PackagesError, describe, message_of
from nomad.packages import Packages
from nomad.pipeline import OperatorSpec

CLOSE_SECONDS = 2.0
"""How long links and function may take to end."""

SWITCH_INTERVAL = 0.0005
"""Seconds after which a computing thread must let another one have the interpreter.

Bounds what it adds to the network's latency.
"""


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
    """The pod: waits for its assignment, runs it, and ends. To its channel it is the `channel.Side`."""

    def __init__(self, boot: dict[str, Any], container: Container | None = None):
        self._pod: str = boot["pod"]
        self._epoch: int = boot.get("epoch", 0)
        """0 until it is known for which operator the process is."""
        self._container = container or Container()
        self._verify_key = bytes.fromhex(boot["verify_key"])
        key, patience = bytes.fromhex(boot["key"]), boot["master_timeout"]
        self._channel = Channel(boot["control"], self._pod, key, patience, self, SystemClock())
        self._reports = Reports(self._channel)
        self._data = DataThread()
        self._made: Instance | None = None
        """To be closed at the end."""
        self._instance: Instance | None = None
        """The same, once it is ready."""
        self._finished = False
        self._exit: asyncio.Future[Exit] | None = None
        self._work: asyncio.Task[None] | None = None
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
        jobs = self._channel.keep(), self._reports.beat(), self._reports.forward()
        tasks = [asyncio.create_task(job) for job in jobs]
        for task in tasks:
            task.add_done_callback(self._ended)
        try:
            return await self._exit
        finally:
            if self._work is not None:
                tasks.append(self._work)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._probed is not None:
                self._probed.close()
            self._reports.say_outputs()
            self._reports.say_stats()  # the last: what the master keeps of this process
            await self._channel.close()

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

    # -- what the master is told, orders and asks

    @property
    def ending(self) -> bool:
        return self._exit is not None and self._exit.done()

    def hello(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "pid": os.getpid(), "assigned": self._work is not None}

    def met(self) -> None:
        self._reports.set_pace(control.HEARTBEAT)
        self._say_state()

    def _say_state(self) -> None:
        """What a master must know that has just been connected to, perhaps a new one."""
        if self._leaving:
            self._channel.say({"type": "leaving"})
        self._reports.say_all()
        if self._finished:
            self._channel.say({"type": "finished"})

    def heard(self, message: dict[str, Any]) -> None:
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
            self._reports.set_pace(control.pace_from(message))
        elif kind == "stop":
            self._stop(bool(message["drain"]), float(message["grace"]))

    async def do(self, method: str, args: dict[str, Any]) -> Any:
        instance = self._instance
        if instance is None:
            raise NomadError("the operator is not ready yet")
        if method == "last_output":
            last = instance.meter.last
            data = None if last is None else instance.shown.encode_one(last)
            return None if data is None or len(data) > control.MOST_SHOWN else data
        if method == "set_aside":
            return await self._data.on_loop(lambda: instance.set_aside(int(args.get("after") or 0)))
        if method == "rerun":
            return await asyncio.wrap_future(self._data.call(instance.rerun(args.get("ids"))))
        if method == "drop":
            return await self._data.on_loop(lambda: instance.drop(args.get("ids")))
        if method == "tap":
            instance.meter.tap = self._reports.tap if args["on"] else None
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

    def abandoned(self, seconds: float) -> None:
        print(f"nomad: no master for {seconds:g} s, stopping", file=sys.stderr, flush=True)
        self._end(Exit.ABANDONED)

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
            told = functools.partial(self._reports.status_changed, asyncio.get_running_loop())
            instance = await self._data.on_loop(
                lambda: Instance(assignment, loaded, SystemClock(), told, self._container.address)
            )
            self._made = instance
            await asyncio.wrap_future(self._data.call(instance.setup()))
            address = await asyncio.wrap_future(self._data.call(instance.start()))
            self._instance = instance
            self._reports.begin(instance, address)
            self._say_state()
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
            self._reports.say_stats()
            self._channel.say({"type": "finished"})

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
        try:
            error = {**describe(cause), "message": message_of(exc)}
            print(error["traceback"], file=sys.stderr, flush=True)
            self._reports.say_stats()
            self._channel.say({"type": "failed", "error": error, "fatal": code in (Exit.CODE, Exit.FAILED)})
        finally:
            self._end(code)  # also one that can't be told of: a process without its operator is of no use

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
        self._channel.say({"type": "leaving"})

    def _end(self, code: Exit) -> None:
        if self._exit is not None and not self._exit.done():
            self._exit.set_result(code)


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
