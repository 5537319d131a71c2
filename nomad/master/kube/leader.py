"""Leading a cluster's masters: a lease, watched by all of them and renewed by one.

    async with leading(api, settings, clock):
        ...                       # this process leads, and nobody else does

What is concluded from what is seen is `election`'s; here it is watched and written. Used by `nomad master`. A leader
that couldn't renew in time has `LeadershipLost` raised into its block, and must end its process: whatever is still
under way in it could meet its successor's acts. One that ends by itself gives the lease up, and the next one need not
wait.

The master that leads has the label `nomad.dev/leader`, by which the Service finds it. Those that wait are connected
with it (`standby`), and miss it sooner for that; whom it has listed for that is in an annotation of the lease.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from nomad.clock import Clock
from nomad.errors import ApiConflict, ApiError, NomadError
from nomad.kubernetes import names, paths
from nomad.kubernetes.api import Api, Json
from nomad.kubernetes.reflector import Reflector
from nomad.master.kube.election import SILENCE, Election, Lease, MasterPod, Step, holder_name, is_dead, pod_of
from nomad.master.kube.standby import Door, Reach, attend
from nomad.settings import Kubernetes
from nomad.tasks import alongside

log = logging.getLogger(__name__)

WRITE_SECONDS = 5.0
"""How long an attempt to get the lease may take."""

GIVE_UP_SECONDS = 3.0
"""How long a leader that ends tries to say so."""

MASTERS = f"{names.APP}={names.NOMAD},{names.COMPONENT}={names.MASTER}"
"""Selects the pods of masters."""


class LeadershipLost(NomadError):
    """The lease couldn't be renewed in time: somebody else may lead by now."""


@dataclass(frozen=True, slots=True)
class Leadership:
    """What a process that leads has of it."""

    door: Door
    """Where those that wait come to."""
    lasts: Callable[[], bool]
    """Whether it may act now: a process that was stopped for a while may learn here that its time is over."""


@asynccontextmanager
async def leading(
    api: Api,
    settings: Kubernetes,
    clock: Clock,
    *,
    lost: Callable[[str], None] = lambda why: None,
    reach: Reach | None = None,
) -> AsyncIterator[Leadership]:
    """Wait until this process leads, and run the block while it does. Raises `LeadershipLost` into it.

    `lost(why)` is called before that, for what must stop at once. `reach`: how to get to the master that leads while
    this one waits; without, it isn't missed before its lease runs out.
    """
    leader = _Leader(api, settings, clock, lost)
    async with alongside(*leader.watches()):
        await leader.unmark(settings.identity)
        try:
            async with alongside(*leader.attends(reach)):
                await leader.win()
            async with alongside(leader.keep()):
                await leader.mark()
                yield Leadership(leader.door, leader.leads)
        finally:
            await leader.door.close()
            await leader.give_up()


class _Leader:
    def __init__(self, api: Api, settings: Kubernetes, clock: Clock, lost: Callable[[str], None]) -> None:
        self._api = api
        self._settings = settings
        self._clock = clock
        self._lost = lost
        token = secrets.token_hex(4)
        name = holder_name(settings.identity, token if settings.identity else f"{socket.gethostname()}_{token}")
        self._election = Election(name, settings.lease_seconds, settings.renew_seconds)
        self._woken = asyncio.Event()
        self.door = Door(self._election, clock, self._woken.set)
        namespace = settings.namespace
        self._path = paths.leases(namespace, names.MASTER_NAME)
        self._leases = Reflector(
            api,
            paths.leases(namespace),
            lease_from,
            lambda old, new: self._saw(new),
            params={"fieldSelector": f"metadata.name={names.MASTER_NAME}"},
            clock=clock,
        )
        self._pods = Reflector(
            api,
            paths.pods(namespace),
            pod_from,
            lambda old, new: self._look(),
            params={"labelSelector": MASTERS},
            clock=clock,
        )
        self._seen: set[str] = set()
        """Pods that were there."""

    def leads(self) -> bool:
        return self._election.leads(self._clock.now())

    def watches(self) -> tuple[Any, ...]:
        return self._leases.run(), self._watch_pods()

    def attends(self, reach: Reach | None) -> tuple[Any, ...]:
        return () if reach is None else (attend(self._election, reach, self._clock),)

    async def _watch_pods(self) -> None:
        await self._leases.synced()
        lease = self._leases.items.get(names.MASTER_NAME)
        self._saw(lease)
        async with alongside(self._pods.run()):
            await self._pods.synced()
            if lease is not None:
                self._seen.add(pod_of(lease.holder))  # before it held the lease; a later list hasn't got it: it is gone
            self._look()
            await asyncio.Event().wait()

    async def win(self) -> None:
        """Return once this process leads."""
        while True:
            step, at = self._election.next(self._clock.now())
            if step is Step.TAKE:
                await self._write()
            elif self._election.leads(self._clock.now()):
                log.info("%s leads", self._election.identity)
                return
            else:
                await self._wait(at)

    async def keep(self) -> None:
        """Renew until that fails. Raises `LeadershipLost`."""
        while True:
            step, at = self._election.next(self._clock.now())
            if step is Step.RENEW:
                await self._write()
            elif step is Step.STOP:
                why = "this master couldn't renew its lease, and leads no more"
                self._lost(why)
                raise LeadershipLost(why)
            else:
                await self._wait(at)

    async def give_up(self) -> None:
        """Say that this process doesn't lead any more, if it did."""
        lease = self._election.lease
        if lease is None or not self._election.leads(self._clock.now()):
            return
        try:
            async with asyncio.timeout(GIVE_UP_SECONDS):
                await self.unmark(self._settings.identity)
                free = Lease("", 1.0, self._clock.wall(), lease.version, lease.transitions)
                await self._api.patch(self._path, _body(free, self._clock.wall()))
        except (ApiError, TimeoutError) as exc:
            log.warning("the lease couldn't be given up, so that the next master has to wait for its end: %s", exc)

    async def mark(self) -> None:
        """Have the Service find this process, and no other one. Raises `ApiError`."""
        await self._pods.synced()
        own = self._settings.identity
        for name in [name for name, pod in self._pods.items.items() if pod[1] and name != own]:
            await self.unmark(name)
        if own:
            await self._label(own, "true")

    async def unmark(self, pod: str) -> None:
        """Have the Service not find a pod, as far as that can be had now."""
        if pod:
            try:
                await self._label(pod, None)
            except ApiError as exc:
                log.warning("the label of pod %s can't be taken away: %s", pod, exc)

    async def _label(self, pod: str, value: str | None) -> None:
        body = {"metadata": {"labels": {names.LEADER_LABEL: value}}}
        await self._api.patch(paths.pods(self._settings.namespace, pod), body)

    # Inside

    async def _write(self) -> None:
        """Try to get the lease, or to renew it."""
        election, began, wall = self._election, self._clock.now(), self._clock.wall()
        before = election.lease
        renews = before is not None and before.holder == election.identity
        lease = Lease(
            holder=election.identity,
            seconds=self._settings.lease_seconds,
            acquired=before.acquired if before is not None and renews else wall,
            version=before.version if before is not None else "",
            transitions=0 if before is None else before.transitions + (not renews),
            standbys=election.writes(began),
        )
        try:
            until = election.until
            async with asyncio.timeout(WRITE_SECONDS if until is None else max(0.0, until - began)):
                if before is None:
                    written = await self._api.create(paths.leases(self._settings.namespace), _body(lease, wall))
                else:
                    written = await self._api.patch(self._path, _body(lease, wall))
        except (ApiError, TimeoutError) as exc:
            log.log(logging.INFO if isinstance(exc, ApiConflict) else logging.WARNING, "the lease: %s", exc)
            election.failed(self._clock.now())
            return
        election.wrote(lease_from(written), began)
        self._leases.seen(written)

    async def _wait(self, at: float | None) -> None:
        """Until something was seen, or `at`."""
        waits: set[asyncio.Task[Any]] = {asyncio.create_task(self._woken.wait(), name="the lease changed")}
        if at is not None:
            pause = self._clock.sleep(max(0.0, at - self._clock.now()))
            waits.add(asyncio.create_task(pause, name="the lease is due"))
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()
            await asyncio.wait(waits)
        self._woken.clear()

    def _saw(self, lease: Lease | None) -> None:
        self._election.saw(lease, self._clock.now())
        self._look()

    def _look(self) -> None:
        """Whether what is known of pods says that the holder is dead."""
        self._seen.update(self._pods.items)
        lease = self._election.lease
        if lease is not None and lease.holder and lease.holder != self._election.identity:
            pod = pod_of(lease.holder)
            if pod and pod == self._settings.identity:
                self._election.proven_dead(lease.holder)  # an earlier process of this very pod
            elif pod and pod in self._seen:
                found = self._pods.items.get(pod)
                if is_dead(lease, found[0] if found is not None else None):
                    self._election.proven_dead(lease.holder)
        self._woken.set()


def _body(lease: Lease, renewed: float) -> Json:
    """A lease as it is written; with the version that it replaces."""
    metadata = {"name": names.MASTER_NAME, "labels": {names.APP: names.NOMAD, names.COMPONENT: names.MASTER}}
    # The holder is named once more: what one that knows nothing of this leaves standing doesn't count.
    listed = {"holder": lease.holder, "standbys": sorted(lease.standbys), "silence": lease.silence}
    metadata["annotations"] = {names.STANDBYS_ANNOTATION: json.dumps(listed)}
    return {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {**metadata, **({"resourceVersion": lease.version} if lease.version else {})},
        "spec": {
            "holderIdentity": lease.holder or None,
            "leaseDurationSeconds": max(1, round(lease.seconds)),
            "acquireTime": _text(lease.acquired),
            "renewTime": _text(renewed),
            "leaseTransitions": lease.transitions,
        },
    }


def lease_from(item: Json) -> Lease:
    """A lease as it was read."""
    spec = item.get("spec") or {}
    holder = spec.get("holderIdentity") or ""
    standbys, silence = _listed(item, holder)
    return Lease(
        holder=holder,
        seconds=float(spec.get("leaseDurationSeconds") or 0.0),
        acquired=_time(spec.get("acquireTime")) or 0.0,
        version=item["metadata"]["resourceVersion"],
        transitions=int(spec.get("leaseTransitions") or 0),
        standbys=standbys,
        silence=silence,
    )


def _listed(item: Json, holder: str) -> tuple[frozenset[str], float]:
    """Whom the holder of a lease has listed, and the silence that it has agreed to."""
    text = (item["metadata"].get("annotations") or {}).get(names.STANDBYS_ANNOTATION)
    if holder and text:
        try:
            listed = json.loads(text)
            if listed["holder"] == holder:
                return frozenset(str(name) for name in listed["standbys"]), float(listed["silence"])
        except (ValueError, TypeError, KeyError):
            log.warning("the lease's annotation %s can't be read: %.200s", names.STANDBYS_ANNOTATION, text)
    return frozenset(), SILENCE


def pod_from(item: Json) -> tuple[MasterPod, bool]:
    """What matters of a master's pod, and whether it has the label of the one that leads."""
    status = item.get("status") or {}
    started: list[float | None] = []
    finished: list[float | None] = []
    for container in status.get("containerStatuses") or ():
        now, before = container.get("state") or {}, container.get("lastState") or {}
        started.append(_time((now.get("running") or {}).get("startedAt")))
        finished += [_time((state.get("terminated") or {}).get("finishedAt")) for state in (now, before)]
    pod = MasterPod(
        over=status.get("phase") in ("Succeeded", "Failed"),
        started=max((time for time in started if time is not None), default=None),
        finished=max((time for time in finished if time is not None), default=None),
    )
    return pod, names.LEADER_LABEL in (item["metadata"].get("labels") or {})


def _text(time: float) -> str:
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _time(text: str | None) -> float | None:
    return datetime.fromisoformat(text).timestamp() if text else None
