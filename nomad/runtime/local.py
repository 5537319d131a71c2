"""Pods as processes of this machine, on nodes that a topology declares.

A pod is `python -P -m nomad.actor` in a session of its own: it goes on when the master dies, and the next
master adopts it. What is needed for that is written down before a pod runs anything: one small file per
pod with pid and birth (see `process`). Ended pods keep their file, for their exit code and their log,
until their operator has `keep_ended` newer ones or the pipeline is forgotten.

    <state>/run/<pod>.json                  what is known of a pod
    <state>/logs/<pipeline>/<pod>.log       what it printed (and <pod>.log.1, the older part)
    <state>/pods/<pipeline>/<operator>/     the operator's own folder, which survives its processes
    <state>/secrets/<name>/<key>            a secret, put there by the user, readable for nobody else

Called by the master's loop only. Knows nothing of pipelines but their names.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import shutil
import signal
import stat
import sys
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Self

from nomad.errors import PodStartError, StateError
from nomad.fanout import Fanout
from nomad.runtime import process
from nomad.runtime.base import NodeInfo, ObservedPod, PodPhase, PodSpec, reason_of
from nomad.runtime.logfile import LogFile
from nomad.settings import Pods, Seat
from nomad.tasks import Tasks

log = logging.getLogger(__name__)

SECRET_VARIABLES = frozenset({"NOMAD_TOKEN", "NOMAD_SIGNING_KEY", "NOMAD_POD"})
"""Never handed on: operator code must not be able to act as the user or as another pod."""

ROTATE_SECONDS = 1.0
"""How often log files are measured."""

FOLLOW_SECONDS = 0.1
"""How often a followed log file is read."""


@dataclass(frozen=True, slots=True)
class _Record:
    """What is written down of a pod."""

    id: str
    pipeline: str
    operator: str
    epoch: int
    node: str
    pid: int
    birth: str
    """"" until the process is known to run."""
    ended: bool = False
    exit_code: int | None = None


@dataclass(slots=True)
class _Pod:
    record: _Record
    log: LogFile
    child: bool
    """Started by this process, so it is ours to reap."""
    over: asyncio.Event = field(default_factory=asyncio.Event)
    stopper: asyncio.Task[None] | None = None

    def observed(self) -> ObservedPod:
        record = self.record
        return ObservedPod(
            id=record.id,
            phase=PodPhase.EXITED if record.ended else PodPhase.RUNNING,
            node=record.node,
            epoch=record.epoch,
            pid=record.pid,
            exit_code=record.exit_code,
            reason=reason_of(record.exit_code) if record.ended else "",
        )


class LocalRuntime:
    """`nomad.runtime.base.Runtime` on this machine. Made by `open`."""

    def __init__(
        self, nodes: Iterable[NodeInfo], state: Path, sockets: Path, settings: Pods, argv: Sequence[str]
    ) -> None:
        self._nodes = {node.id: node for node in nodes}
        self._lost: set[str] = set()
        self._state = state
        self._sockets = sockets
        self._settings = settings
        self._argv = argv
        self._pods: dict[str, _Pod] = {}
        self._changes: Fanout[ObservedPod] = Fanout()
        self._tasks = Tasks()

    @classmethod
    async def open(
        cls,
        nodes: Iterable[NodeInfo],
        state: Path,
        sockets: Path,
        settings: Pods | None = None,
        *,
        argv: Sequence[str] = (sys.executable, "-P", "-m", "nomad.actor"),  # no module of the folder it is started in
    ) -> Self:
        """Find the pods of earlier runtimes on `state` again, and watch them.

        `sockets` is a short folder for unix sockets. Raises `StateError` when `state` can't be used.
        """
        runtime = cls(nodes, state, sockets, settings or Pods(), argv)
        try:
            for folder in ("run", "logs", "pods"):
                (state / folder).mkdir(mode=0o700, parents=True, exist_ok=True)
            records = [_read(path) for path in sorted((state / "run").glob("*.json"))]
        except OSError as exc:
            raise StateError(f"the state folder {state} can't be used: {exc.strerror}") from exc
        for record in records:
            if record is not None:
                runtime._take(record, child=False)
        runtime._tasks.start(runtime._rotate(), name="rotate pod logs")
        return runtime

    @property
    def nodes(self) -> Sequence[NodeInfo]:
        return [replace(node, ready=node.id not in self._lost) for node in self._nodes.values()]

    def lose_node(self, node: str) -> None:
        """As if its power failed."""
        self._lost.add(node)
        for pod in self._pods.values():
            if pod.record.node == node:
                self._signal(pod, signal.SIGKILL)

    def restore_node(self, node: str) -> None:
        """Pods can be started there again."""
        self._lost.discard(node)

    async def start(self, spec: PodSpec) -> None:
        if spec.id in self._pods:
            return
        if spec.node not in self._nodes:
            raise PodStartError(f"pod {spec.id}: there is no node {spec.node!r}; there are {', '.join(self._nodes)}")
        if spec.node in self._lost:
            raise PodStartError(f"pod {spec.id}: the node {spec.node!r} is lost")
        self._prune(spec.pipeline, spec.operator)
        # No await from here on: a pod is started and known, or neither.
        logfile = self._log(spec.pipeline, spec.id)
        try:
            logfile.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            prefix = self._seat(spec.node).prefix
            started = process.Gated([*prefix, *self._argv], self._environment(spec), logfile.path)
        except OSError as exc:
            raise PodStartError(f"pod {spec.id} can't be started: {exc}") from exc
        born = process.birth(started.pid) or ""
        record = _Record(spec.id, spec.pipeline, spec.operator, spec.epoch, spec.node, started.pid, born)
        try:
            self._write(record)
        except OSError as exc:
            started.give_up()
            raise PodStartError(f"pod {spec.id} can't be written down in {self._state}: {exc}") from exc
        started.go()
        self._take(record, child=True)
        self._changes.publish(self._pods[spec.id].observed())

    async def stop(self, pod_id: str, *, grace: float) -> None:
        pod = self._pods.get(pod_id)
        if pod is None or pod.record.ended:
            return
        if pod.stopper is not None:
            pod.stopper.cancel()  # the new grace counts
        pod.stopper = self._tasks.start(self._stop(pod, grace), name=f"stop {pod_id}")

    async def list(self) -> Sequence[ObservedPod]:
        return [pod.observed() for pod in self._pods.values()]

    def watch(self) -> AsyncIterator[ObservedPod]:
        return self._changes.subscribe()

    async def logs(self, pod_id: str, *, tail: int | None = None) -> Sequence[str]:
        pod = self._pods.get(pod_id)
        return [] if pod is None else await asyncio.to_thread(pod.log.tail, tail)

    def follow(self, pod_id: str) -> AsyncIterator[str]:
        pod = self._pods.get(pod_id)
        reader = None if pod is None else pod.log.reader()

        async def lines() -> AsyncIterator[str]:
            if pod is None or reader is None:
                return
            over = False
            while not over:
                over = pod.over.is_set()  # before reading, so that nothing printed before the end is missed
                for line in reader.lines(last=over):
                    yield line
                if not over:
                    await asyncio.sleep(FOLLOW_SECONDS)

        return lines()

    @property
    def folders_follow(self) -> bool:
        return self._settings.common_folders

    def workdir(self, pipeline: str, operator: str) -> str:
        folder = self._state / "pods" / pipeline / operator
        if not self._settings.common_folders:
            mine = [pod.record for pod in self._pods.values()]
            epochs = [record.epoch for record in mine if (record.pipeline, record.operator) == (pipeline, operator)]
            folder /= str(max(epochs, default=0))  # of the newest pod, the only one that isn't told its folder yet
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return str(folder)

    def listen_address(self, pod_id: str) -> str:
        if self._settings.transport in ("tcp", "zmq+tcp"):
            pod = self._pods.get(pod_id)
            host = self._seat(pod.record.node).host if pod is not None else Seat().host
            return f"{self._settings.transport}://{host}:0"
        return f"{self._settings.transport}:{self._socket(pod_id)}"

    def pod_of(self, name: str) -> str | None:
        return name

    async def missing_secrets(self, references: Collection[str]) -> Sequence[str]:
        found = []
        for reference in sorted(set(references)):
            try:
                self._secret(reference)
            except PodStartError as exc:
                found.append(str(exc))
        return found

    async def forget(self, pipeline: str) -> None:
        mine = [pod for pod in self._pods.values() if pod.record.pipeline == pipeline]
        for pod in mine:
            if pod.record.ended:
                self._drop(pod)
        if all(pod.record.ended for pod in mine):
            for folder in ("pods", "logs"):
                await asyncio.to_thread(shutil.rmtree, self._state / folder / pipeline, ignore_errors=True)

    async def close(self) -> None:
        await self._tasks.close()
        self._changes.close()

    # Inside

    def _environment(self, spec: PodSpec) -> dict[str, str]:
        secrets = {name: self._secret(reference) for name, reference in spec.secrets.items()}
        return {**_environment(spec), **secrets}

    def _secret(self, reference: str) -> str:
        """What a secret holds, but a line's end at its own end. Raises `PodStartError` that names its file."""
        path = self._state / "secrets" / reference
        try:
            mode = path.stat().st_mode
            if not stat.S_ISREG(mode) or mode & 0o077:
                raise PodStartError(f"the secret {reference} can be read by others: chmod 600 {path}")
            return path.read_text(encoding="utf-8").removesuffix("\n")
        except FileNotFoundError:
            raise PodStartError(f"there is no secret {reference}: put it into the file {path}, with mode 600") from None
        except (OSError, ValueError) as exc:
            raise PodStartError(f"the secret {reference} can't be read from {path}: {exc}") from None

    def _seat(self, node: str) -> Seat:
        return self._settings.seats.get(node, Seat())

    def _take(self, record: _Record, *, child: bool) -> None:
        pod = _Pod(record, self._log(record.pipeline, record.id), child)
        self._pods[record.id] = pod
        if record.ended:
            pod.over.set()
        else:
            self._tasks.start(self._watch(pod), name=f"watch {record.id}")

    async def _watch(self, pod: _Pod) -> None:
        code = await process.ended(pod.record.pid, pod.record.birth, child=pod.child)
        pod.record = replace(pod.record, ended=True, exit_code=code)
        try:
            self._write(pod.record)
        except OSError as exc:  # the pod is gone all the same; a later master finds that out by its birth
            log.warning("pod %s: its end can't be written down: %s", pod.record.id, exc)
        self._remove_socket(pod.record.id)
        pod.over.set()
        self._changes.publish(pod.observed())

    async def _stop(self, pod: _Pod, grace: float) -> None:
        try:
            self._signal(pod, signal.SIGTERM)
            async with asyncio.timeout(grace):
                await pod.over.wait()
        except TimeoutError:
            log.warning("pod %s didn't end within %g s and is killed", pod.record.id, grace)
            self._signal(pod, signal.SIGKILL)

    def _signal(self, pod: _Pod, number: signal.Signals) -> None:
        """Only what is proven to be the pod: an adopted process may have ended a moment ago."""
        if not pod.record.ended and (pod.child or process.birth(pod.record.pid) == pod.record.birth):
            process.signal_group(pod.record.pid, number)

    async def _rotate(self) -> None:
        while True:
            await asyncio.sleep(ROTATE_SECONDS)
            for pod in self._pods.values():
                if not pod.record.ended:
                    try:
                        pod.log.rotate()
                    except OSError as exc:  # a full disk, say: the next round tries again
                        log.warning("the log of pod %s can't be rotated: %s", pod.record.id, exc)

    def _prune(self, pipeline: str, operator: str) -> None:
        """Keep the newest ended pods of an operator only."""
        ended = [
            pod
            for pod in self._pods.values()
            if pod.record.ended and (pod.record.pipeline, pod.record.operator) == (pipeline, operator)
        ]
        ended.sort(key=lambda pod: pod.record.epoch, reverse=True)
        for pod in ended[self._settings.keep_ended :]:
            self._drop(pod)
            pod.log.remove()

    def _drop(self, pod: _Pod) -> None:
        del self._pods[pod.record.id]
        self._record_path(pod.record.id).unlink(missing_ok=True)

    def _log(self, pipeline: str, pod_id: str) -> LogFile:
        return LogFile(self._state / "logs" / pipeline / f"{pod_id}.log", self._settings.log_bytes)

    def _socket(self, pod_id: str) -> str:
        # Paths of sockets are limited to about 100 bytes, ids are not.
        return str(self._sockets / hashlib.blake2b(pod_id.encode(), digest_size=8).hexdigest())

    def _remove_socket(self, pod_id: str) -> None:
        """A pod that was killed leaves its socket behind."""
        Path(self._socket(pod_id)).unlink(missing_ok=True)

    def _record_path(self, pod_id: str) -> Path:
        return self._state / "run" / f"{pod_id}.json"

    def _write(self, record: _Record) -> None:
        path = self._record_path(record.id)
        beside = path.with_suffix(".new")
        beside.write_text(json.dumps(asdict(record)), encoding="utf-8")
        beside.replace(path)  # a reader, also after a crash, finds the old or the new one


def _environment(spec: PodSpec) -> dict[str, str]:
    boot = {
        "pod": spec.id,
        "epoch": spec.epoch,
        "control": spec.control,
        "key": spec.key.hex(),
        "verify_key": spec.verify_key.hex(),
        "master_timeout": spec.master_timeout,
    }
    kept = {name: value for name, value in os.environ.items() if name not in SECRET_VARIABLES}
    # Unbuffered, so that what an operator prints is seen when it prints it, and isn't lost in a crash.
    return {**kept, **spec.environment, "PYTHONUNBUFFERED": "1", "NOMAD_POD": json.dumps(boot)}


def _read(path: Path) -> _Record | None:
    try:
        return _Record(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as exc:
        log.warning("%s is no record of a pod and is left alone: %s", path, exc)
        return None
