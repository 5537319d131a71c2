"""A runtime without processes, for tests: pods are tasks, and everything that goes wrong is asked for.

    runtime = FakeRuntime([NodeInfo("edge")], host=run_pod)
    runtime.fail_starts.append("no memory")     # the next start raises
    runtime.start_delay = 2.0                   # seconds until a pod runs
    runtime.kill("p.square-e1")                 # as kill -9 would

`host(spec)` is what runs inside the pod; it returns the exit code. Without one, pods just are there. It
gives the same observed type as every runtime, on whatever clock it is given. Pods go on after `close`, as
real ones do, so that a second master can adopt them; `shutdown` ends the fake for good.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

from nomad.clock import Clock, SystemClock
from nomad.errors import PodStartError
from nomad.fanout import Fanout
from nomad.runtime.base import NodeInfo, ObservedPod, PodPhase, PodSpec, reason_of
from nomad.tasks import Tasks


@dataclass(slots=True)
class FakePod:
    """A pod and what was done to it."""

    spec: PodSpec
    observed: ObservedPod
    lines: list[str] = field(default_factory=list)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    printed: Fanout[str] = field(default_factory=Fanout)
    runner: asyncio.Task[None] | None = None
    stopper: asyncio.Task[None] | None = None


class FakeRuntime:
    """`nomad.runtime.base.Runtime`, scripted."""

    def __init__(
        self,
        nodes: Iterable[NodeInfo],
        *,
        host: Callable[[PodSpec], Awaitable[int]] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._nodes = list(nodes)
        self._lost: set[str] = set()
        self._host = host
        self._clock = clock or SystemClock()
        self._changes: Fanout[ObservedPod] = Fanout()
        self._tasks = Tasks()
        self.pods: dict[str, FakePod] = {}
        self.started: list[str] = []
        """Ids of all pods that were started, in order."""
        self.forgotten: list[str] = []
        """Pipelines that were forgotten, in order."""
        self.fail_starts: list[str] = []
        """Reasons; each makes one start raise."""
        self.start_delay = 0.0
        self.folders_follow = True
        """Whether an operator has the same folder wherever it is."""
        self.secrets: set[str] = set()
        """`name/key` of those that there are."""
        self.stop_delay = 0.0
        """Seconds that a pod takes to end when it is asked to; beyond the grace it is killed."""

    async def missing_secrets(self, references: Collection[str]) -> Sequence[str]:
        return [f"there is no secret {name}" for name in sorted(set(references) - self.secrets)]

    @property
    def nodes(self) -> Sequence[NodeInfo]:
        return [replace(node, ready=node.id not in self._lost) for node in self._nodes]

    def lose_node(self, node: str) -> None:
        """Its pods end at once, and none is started there."""
        self._lost.add(node)
        for pod in [pod for pod in self.pods.values() if pod.spec.node == node and not pod.over.is_set()]:
            self.kill(pod.spec.id)

    def restore_node(self, node: str) -> None:
        """Pods can be started there again."""
        self._lost.discard(node)

    def cordon(self, node: str, *, on: bool = True) -> None:
        """The node takes no new pods, or does again."""
        self._nodes = [replace(known, schedulable=not on) if known.id == node else known for known in self._nodes]

    async def start(self, spec: PodSpec) -> None:
        if spec.id in self.pods:
            return
        if self.fail_starts:
            raise PodStartError(self.fail_starts.pop(0))
        if spec.node not in {node.id for node in self._nodes}:
            raise PodStartError(f"pod {spec.id}: there is no node {spec.node!r}")
        if spec.node in self._lost:
            raise PodStartError(f"pod {spec.id}: the node {spec.node!r} is lost")
        pod = FakePod(spec, ObservedPod(spec.id, PodPhase.STARTING, spec.node, spec.epoch))
        self.pods[spec.id] = pod
        self.started.append(spec.id)
        self._changes.publish(pod.observed)
        pod.runner = self._tasks.start(self._run(pod), name=f"fake pod {spec.id}")

    async def stop(self, pod_id: str, *, grace: float) -> None:
        pod = self.pods.get(pod_id)
        if pod is not None and not pod.over.is_set():
            if pod.stopper is not None:
                pod.stopper.cancel()
            pod.stopper = self._tasks.start(self._stop(pod, grace), name=f"stop fake pod {pod_id}")

    async def list(self) -> Sequence[ObservedPod]:
        return [pod.observed for pod in self.pods.values()]

    def watch(self) -> AsyncIterator[ObservedPod]:
        return self._changes.subscribe()

    async def logs(self, pod_id: str, *, tail: int | None = None) -> Sequence[str]:
        lines = self.pods[pod_id].lines if pod_id in self.pods else []
        return lines[-tail:] if tail else list(lines) if tail is None else []

    def follow(self, pod_id: str) -> AsyncIterator[str]:
        if pod_id not in self.pods or self.pods[pod_id].over.is_set():
            nothing: Fanout[str] = Fanout()
            nothing.close()
            return nothing.subscribe()
        return self.pods[pod_id].printed.subscribe()

    def workdir(self, pipeline: str, operator: str) -> str:
        return ""

    def listen_address(self, pod_id: str) -> str:
        return "inproc:"

    def pod_of(self, name: str) -> str | None:
        return name

    async def forget(self, pipeline: str) -> None:
        self.forgotten.append(pipeline)
        for pod in [pod for pod in self.pods.values() if pod.spec.pipeline == pipeline and pod.over.is_set()]:
            del self.pods[pod.spec.id]

    async def close(self) -> None:
        self._changes.close()
        self._changes = Fanout()

    # What tests ask for

    def kill(self, pod_id: str, code: int = -signal.SIGKILL) -> None:
        """The pod ends at once with `code`."""
        pod = self.pods[pod_id]
        if pod.runner is not None:
            pod.runner.cancel()
        self._end(pod, code)

    def mark(self, pod_id: str, *, leaving: bool = False, outdated: bool = False) -> None:
        """Somebody wants the pod to end, or a new one would have another image."""
        pod = self.pods[pod_id]
        self._show(pod, replace(pod.observed, leaving=leaving, outdated=outdated))

    def say(self, pod_id: str, line: str) -> None:
        """The pod prints a line."""
        self.pods[pod_id].lines.append(line)
        self.pods[pod_id].printed.publish(line)

    def running(self) -> Sequence[str]:
        """Ids of the pods that haven't ended."""
        return [pod_id for pod_id, pod in self.pods.items() if not pod.over.is_set()]

    async def shutdown(self) -> None:
        """End everything; the last call."""
        await self._tasks.close()
        await self.close()

    # Inside

    async def _run(self, pod: FakePod) -> None:
        if self.start_delay:
            await self._clock.sleep(self.start_delay)
        self._show(pod, replace(pod.observed, phase=PodPhase.RUNNING, pid=1000 + len(self.started)))
        if self._host is None:
            await asyncio.Event().wait()
        else:
            self._end(pod, await self._host(pod.spec))

    def _end(self, pod: FakePod, code: int) -> None:
        if not pod.over.is_set():
            pod.over.set()
            pod.printed.close()
            self._show(pod, replace(pod.observed, phase=PodPhase.EXITED, exit_code=code, reason=reason_of(code)))

    async def _stop(self, pod: FakePod, grace: float) -> None:
        await self._clock.sleep(min(grace, self.stop_delay))
        self.kill(pod.spec.id, 0 if self.stop_delay <= grace else -signal.SIGKILL)

    def _show(self, pod: FakePod, observed: ObservedPod) -> None:
        pod.observed = observed
        self._changes.publish(observed)
