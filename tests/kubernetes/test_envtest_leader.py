"""Several masters and one lease, at a real API server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import pytest

from nomad.clock import SystemClock
from nomad.kubernetes import names, paths
from nomad.kubernetes.api import Api
from nomad.master.kube.leader import LeadershipLost, leading
from nomad.settings import Kubernetes
from tests.kubernetes.cluster.envtest import Envtest

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(300)]

QUICK = Kubernetes(lease_seconds=3.0, renew_seconds=1.0)
SLOW = Kubernetes(lease_seconds=60.0, renew_seconds=30.0)
"""Nobody takes a lease from somebody else in the time of a test, unless that is proven dead."""


@pytest.fixture
async def api(envtest: Envtest) -> AsyncIterator[Api]:
    async with Api.open(envtest.kubeconfig) as api:
        yield api


@dataclass
class Process:
    """A master that does nothing but lead."""

    task: asyncio.Task[None]
    leads: asyncio.Event
    end: asyncio.Event = field(default_factory=asyncio.Event)
    error: BaseException | None = None


@contextlib.asynccontextmanager
async def masters() -> AsyncIterator[Callable[[Api, Kubernetes], Process]]:
    made: list[Process] = []

    def start(api: Api, settings: Kubernetes) -> Process:
        async def run() -> None:
            try:
                async with leading(api, settings, SystemClock()):
                    process.leads.set()
                    await process.end.wait()
            except LeadershipLost as exc:
                process.error = exc
            finally:
                process.leads.clear()

        process = Process(asyncio.create_task(run()), asyncio.Event())
        made.append(process)
        return process

    try:
        yield start
    finally:
        for process in made:
            process.task.cancel()
        await asyncio.gather(*(process.task for process in made), return_exceptions=True)


DEADLINE = 60.0
"""Seconds until a test gives up waiting. How soon a leader must stop and the next one lead is `tests/master/`'s, where
time is virtual: here the machine may stand still for a while."""


async def lead(process: Process, seconds: float = DEADLINE) -> None:
    async with asyncio.timeout(seconds):
        await process.leads.wait()


async def master_pod(api: Api, namespace: str, name: str) -> None:
    body = {
        "metadata": {"name": name, "labels": {names.APP: names.NOMAD, names.COMPONENT: names.MASTER}},
        "spec": {"containers": [{"name": "master", "image": "none"}], "automountServiceAccountToken": False},
    }
    await api.create(paths.pods(namespace), body)
    await runs(api, namespace, name)


async def runs(api: Api, namespace: str, name: str, *, again: bool = False) -> None:
    """As the kubelet says it, when a container has been started (or ended, and been started again)."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    state: dict[str, Any] = {"state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}}}
    if again:
        ended = {"exitCode": 137, "startedAt": "2026-01-01T00:00:00Z", "finishedAt": now}
        state = {"state": {"waiting": {"reason": "CrashLoopBackOff"}}, "lastState": {"terminated": ended}}
    status = {"name": "master", "image": "none", "imageID": "", "ready": False, "restartCount": 0, **state}
    await api.patch(
        paths.pods(namespace, name, "status"), {"status": {"phase": "Running", "containerStatuses": [status]}}
    )


async def labelled(api: Api, namespace: str) -> list[str]:
    found, _ = await api.list(paths.pods(namespace), {"labelSelector": f"{names.LEADER_LABEL}=true"})
    return [pod["metadata"]["name"] for pod in found]


async def test_one_leads_and_the_next_takes_over_when_it_ends(api: Api, namespace: str) -> None:
    for name in ("a", "b"):
        await master_pod(api, namespace, name)
    slow = replace(SLOW, namespace=namespace)
    async with masters() as start:
        first = start(api, replace(slow, identity="a"))
        await lead(first)
        assert await labelled(api, namespace) == ["a"]
        second = start(api, replace(slow, identity="b"))
        await asyncio.sleep(1)
        assert not second.leads.is_set()
        first.end.set()
        await lead(second)
        assert await labelled(api, namespace) == ["b"]
        lease = await api.get(paths.leases(namespace, names.MASTER_NAME))
        assert lease["spec"]["holderIdentity"].startswith("b_")
        assert lease["spec"]["leaseTransitions"] == 1


async def test_one_that_is_proven_dead_is_followed_at_once(api: Api, namespace: str) -> None:
    """Its container ended, whatever became of the process; nothing was given up."""
    for name in ("a", "b", "c"):
        await master_pod(api, namespace, name)
    slow = replace(SLOW, namespace=namespace)
    async with masters() as start:
        first = start(api, replace(slow, identity="a"))
        await lead(first)
        second = start(api, replace(slow, identity="b"))
        await asyncio.sleep(1.1)  # the node tells times in whole seconds
        assert not second.leads.is_set()
        await runs(api, namespace, "a", again=True)
        await lead(second)
        assert await labelled(api, namespace) == ["b"]
        with pytest.raises(TimeoutError):
            await lead(start(api, replace(slow, identity="c")), 0.5)
        await api.delete(paths.pods(namespace, "b"), grace=0)
        third = start(api, replace(slow, identity="c"))
        await lead(third)
        assert await labelled(api, namespace) == ["c"]
        async with asyncio.timeout(DEADLINE):
            await asyncio.wait([first.task, second.task])
        assert isinstance(first.error, LeadershipLost)
        assert isinstance(second.error, LeadershipLost)


async def test_an_earlier_process_of_the_same_pod_is_dead(api: Api, namespace: str) -> None:
    await master_pod(api, namespace, "a")
    slow = replace(SLOW, namespace=namespace, identity="a")
    async with masters() as start:
        first = start(api, slow)
        await lead(first)
        await lead(start(api, slow))


async def test_without_a_word_of_its_holder_the_lease_runs_out(api: Api, namespace: str) -> None:
    quick = replace(QUICK, namespace=namespace)
    body = {
        "metadata": {"name": names.MASTER_NAME},
        "spec": {
            "holderIdentity": "_elsewhere_1",
            "leaseDurationSeconds": 2,
            "renewTime": "2026-01-01T00:00:00.000000Z",
        },
    }
    await api.create(paths.leases(namespace), body)
    async with masters() as start:
        process = start(api, quick)
        with pytest.raises(TimeoutError):
            await lead(process, 1.5)
        await lead(process)


async def test_who_cant_renew_leads_no_more(envtest: Envtest, namespace: str) -> None:
    """The API server is away for longer than the lease lasts: the leader stops, and later one leads again."""
    async with Api.open(envtest.kubeconfig) as api, masters() as start:
        quick = replace(QUICK, namespace=namespace)
        first, second = start(api, quick), start(api, quick)
        async with asyncio.timeout(DEADLINE):
            while not (first.leads.is_set() or second.leads.is_set()):
                await asyncio.sleep(0.01)
        leader, standby = (first, second) if first.leads.is_set() else (second, first)
        envtest.stop_apiserver()
        async with asyncio.timeout(DEADLINE):
            await asyncio.wait([leader.task])
        assert isinstance(leader.error, LeadershipLost)
        await asyncio.to_thread(envtest.start_apiserver)
        await lead(standby)
