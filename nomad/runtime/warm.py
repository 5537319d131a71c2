"""Operator pods that are started before anybody knows for which operator, so that a move or a restart waits for no
image and no interpreter.

A few per node that takes pods. `run` is the one task that keeps them: it sleeps until a node or one of these pods
has changed. `claim` gives one to an operator, in a single request that fails when somebody was faster. Used by
`nomad.runtime.kubernetes` alone.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from nomad.clock import Clock
from nomad.errors import ApiConflict, ApiError, ApiForbidden, ApiInvalid, ApiNotFound, NomadError
from nomad.kubernetes import paths
from nomad.kubernetes.api import Api, Json
from nomad.runtime import manifests
from nomad.runtime.base import PodPhase, PodSpec
from nomad.runtime.kubenodes import Nodes
from nomad.runtime.kubepods import KubePod
from nomad.runtime.kubestart import Starter
from nomad.settings import Backoff, Kubernetes
from nomad.tasks import Tasks

log = logging.getLogger(__name__)

LETTERS = "bcdfghjkmnpqrtvwxz"
"""Of random parts of names: no words, and nothing that could be an epoch."""

AT_ONCE = 8
"""Nodes that are seen to at the same time."""

REFILL = 3.0
"""Seconds until a pod that was given away is replaced: its operator has the node's cores to itself first."""

STUCK = 10.0
"""Seconds that a pod may be kept from starting before it is taken away again."""

SLOW = 300.0
"""Seconds that a pod may take to start at all: an image may have to be fetched over a thin line."""

BACKOFF = Backoff(first=5.0, factor=2.0, limit=300.0)
"""Of a node whose waiting pods end or can't be started."""


@dataclass(slots=True)
class _Trouble:
    """What went wrong with the waiting pods of a node."""

    failures: int = 0
    until: float = 0.0


class WarmPool:
    """The waiting pods of all nodes."""

    def __init__(
        self,
        api: Api,
        settings: Kubernetes,
        nodes: Nodes,
        starter: Starter,
        seen: Callable[[Json], None],
        *,
        image: str,
        clock: Clock,
        rng: random.Random,
    ) -> None:
        """`seen` takes in what the API answered about a pod."""
        self._api = api
        self._settings = settings
        self._nodes = nodes
        self._starter = starter
        self._seen = seen
        self._image = image
        self._clock = clock
        self._rng = rng
        self._pods: dict[str, dict[str, KubePod]] = {}  # by node and name
        self._trouble: dict[str, _Trouble] = {}
        self._dirty: set[str] = set()
        self._woken = asyncio.Event()
        self._tasks = Tasks()
        self._resizes = True
        self._busy: set[str] = set()  # names of pods that are being given or taken away
        self.owner: Callable[[], Json | None] = lambda: None
        """Whom waiting pods end with."""
        self.connected: Callable[[str], bool] = lambda name: False
        """Whether the process of that name has reported to the master: it is at work soonest."""

    # What has changed

    def changed(self, old: KubePod | None, new: KubePod | None) -> None:
        """One of the waiting pods came, went, or isn't waiting any more."""
        if old is not None and old.warm:
            node = self._nodes.named(old.node)
            self._pods.get(node, {}).pop(old.name, None)
            if new is None or not new.warm:
                self._look(node, REFILL)
        if new is not None and new.warm:
            node = self._nodes.named(new.node)
            self._pods.setdefault(node, {})[new.name] = new
            if new.stuck and not (old is not None and old.stuck):
                self._tasks.start(self._judge(node, new, STUCK), name=f"watch {new.name}")
            if old is None and new.phase is PodPhase.STARTING:
                self._tasks.start(self._judge(node, new, SLOW), name=f"wait for {new.name}")
            if old is None or not new.alive or new.image != self._image:
                self._look(node)

    def look_at(self, nodes: Iterable[str]) -> None:
        """These nodes have changed."""
        for node in nodes:
            self._look(node)

    # Giving one away

    async def claim(self, spec: PodSpec, image: str, owner: Json | None) -> bool:
        """Give a waiting pod on its node to `spec`; False when there is none that would do. Raises `ApiError`."""
        for pod in self._fit(spec, image):
            if pod.name in self._busy:
                continue
            self._busy.add(pod.name)
            try:
                given = await self._give(pod, spec, owner)
            finally:
                self._busy.discard(pod.name)
            if given:
                self._trouble.pop(spec.node, None)
                self.enlarge(given, spec)
                return True
        return False

    async def _give(self, pod: KubePod, spec: PodSpec, owner: Json | None) -> str:
        """The name of the pod that is the operator's now: this one, or "" when it is gone or somebody else's."""
        path, patch = paths.pods(self._settings.namespace, pod.name), manifests.claim_patch(spec, pod.uid, owner)
        try:
            self._seen(await self._api.patch(path, patch, kind="json"))
        except ApiNotFound:
            return ""
        except (ApiConflict, ApiInvalid):
            return await self._starter.find(spec)  # by this very request, if the client has sent it twice
        return pod.name

    def enlarge(self, name: str, spec: PodSpec) -> None:
        """Have a pod that was given to `spec` ask for what that needs, by and by."""
        self._tasks.start(self._resize(name, spec), name=f"resize {name}")

    def _fit(self, spec: PodSpec, image: str) -> list[KubePod]:
        """Those that would do, the best first."""
        if spec.secrets or spec.devices or self._settings.storage_class:
            return []  # which can't be given to a process that runs
        if not self._resizes and spec.memory_mb > manifests.INTERPRETER_MB:
            return []
        found = [
            pod
            for pod in self._pods.get(spec.node, {}).values()
            if pod.alive and pod.phase is PodPhase.RUNNING and pod.image == image
        ]
        return sorted(found, key=lambda pod: not self.connected(pod.name))

    async def _resize(self, name: str, spec: PodSpec) -> None:
        """Have the pod ask for what its operator needs. Where the cluster can't do that, it goes on as it is."""
        path = paths.pods(self._settings.namespace, name, "resize")
        try:
            self._seen(await self._api.patch(path, manifests.resize_patch(spec), kind="strategic"))
        except (ApiForbidden, ApiNotFound) as exc:
            if _concerns_the_pod(exc):
                log.info("pod %s was given away, and goes on as it is, if it does: %s", name, exc)
                return
            self._resizes = False
            log.warning("pods can't ask for more memory while they run, so large operators start cold: %s", exc)
        except ApiError as exc:
            log.warning("pod %s asks for less than its operator needs: %s", name, exc)

    # Keeping them

    async def run(self) -> None:
        """Make and take away waiting pods, until cancelled."""
        gate = asyncio.Semaphore(AT_ONCE)

        async def see_to(node: str) -> None:
            async with gate:
                try:
                    await self._settle(node)
                except NomadError as exc:
                    self._failed(node, f"its waiting pods can't be seen to: {exc}")

        while True:
            await self._woken.wait()
            self._woken.clear()
            dirty, self._dirty = self._dirty, set()
            await asyncio.gather(*(see_to(node) for node in dirty))

    async def close(self) -> None:
        """Let go; the pods go on."""
        await self._tasks.close()

    async def _settle(self, node: str) -> None:
        """Bring the waiting pods of a node to their number."""
        known = self._nodes.get(node)
        pods = list(self._pods.get(node, {}).values())
        wanted = self._settings.warm if known is not None and self._image else 0
        good = [pod for pod in pods if pod.alive and pod.image == self._image]
        crashed = [pod for pod in pods if not pod.deleting and pod.phase is PodPhase.EXITED]
        surplus = [pod for pod in pods if pod.alive and pod not in good] + good[wanted:]
        for pod in [*crashed, *surplus]:
            await self._take_away(node, pod)
        if crashed:
            self._failed(node, f"{crashed[0].name} {crashed[0].reason}")
        if not pods and known is None:
            self._pods.pop(node, None)
            self._trouble.pop(node, None)
        trouble = self._trouble.get(node, _Trouble())
        if known is None or not self._nodes.usable(node) or self._clock.now() < trouble.until:
            return
        for _ in range(wanted - len(good)):
            name = f"nomad-warm-{manifests.short(node)}-{''.join(self._rng.choices(LETTERS, k=5))}"
            body = manifests.warm_pod(
                name, node, self._settings, host=known.host, image=self._image, owner=self.owner()
            )
            await self._starter.make(body, 0)

    async def _take_away(self, node: str, pod: KubePod) -> None:
        """Unless it is given to an operator, or was meanwhile."""
        if pod.name in self._busy or pod.name not in self._pods.get(node, {}):
            return
        self._busy.add(pod.name)
        try:
            await self._starter.delete(pod.name, pod.uid, 1)
        finally:
            self._busy.discard(pod.name)

    async def _judge(self, node: str, pod: KubePod, patience: float) -> None:
        """Take a pod away that doesn't run, and may not come to, after so many seconds."""
        await self._clock.sleep(patience)
        now = self._pods.get(node, {}).get(pod.name)
        if now is None or now.uid != pod.uid or now.phase is not PodPhase.STARTING or not now.alive:
            return
        if now.stuck or patience >= SLOW:
            self._failed(node, f"{pod.name} can't be started there: {now.reason or 'it takes too long'}")
            try:
                await self._starter.delete(now.name, now.uid, 1)
            except ApiError as exc:
                log.warning("pod %s can't be taken away: %s", pod.name, exc)

    def _failed(self, node: str, reason: str) -> None:
        trouble = self._trouble.setdefault(node, _Trouble())
        if self._clock.now() > trouble.until + BACKOFF.limit:
            trouble.failures = 0
        trouble.failures += 1
        delay = BACKOFF.delay(trouble.failures) * self._rng.uniform(1.0, 1.5)
        trouble.until = self._clock.now() + delay
        log.warning("no operator can start warm on %s for the next %.0f s: %s", node, delay, reason)
        self._look(node, delay)

    def _look(self, node: str, delay: float = 0.0) -> None:
        if delay:
            self._tasks.start(self._look_later(node, delay), name=f"look at {node}")
            return
        self._dirty.add(node)
        self._woken.set()

    async def _look_later(self, node: str, delay: float) -> None:
        await self._clock.sleep(delay)
        self._look(node)


def _concerns_the_pod(refusal: ApiForbidden | ApiNotFound) -> bool:
    """Whether it is this pod that is gone, or too large for a quota or a range, and not the cluster that can't."""
    if isinstance(refusal, ApiNotFound):
        return bool(refusal.details.get("name"))  # of a path that there isn't, Kubernetes names no object
    return "cannot patch resource" not in str(refusal)  # which is how it says that an account has no right
