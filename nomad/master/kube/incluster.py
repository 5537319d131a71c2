"""A master of a Kubernetes cluster, from its first look at the lease to its end: what `nomad master` runs.

    waits (says that it is well; hears the leader)  ─ leads: certificates ─ store ─ runtime ─ the master itself

Everything that it has to remember is in the cluster, so that another one goes on where this one ended, however that
was; pods go on in between. Whoever finds out that it leads no more writes nothing from then on, and ends.
"""

from __future__ import annotations

import base64
import json
import logging
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

from nomad.clock import Clock, SystemClock
from nomad.delivery.driver import shake_dialer
from nomad.errors import ApiError, ApiNotFound
from nomad.kubernetes import names, paths
from nomad.kubernetes.api import Api, Json
from nomad.kubernetes.certificates import Certificates
from nomad.master.assembly import Secrets
from nomad.master.enact import Keys
from nomad.master.kube.leader import LeadershipLost, leading
from nomad.master.kube.pipelines import PipelineWatch
from nomad.master.kube.store import KubernetesStore
from nomad.master.rest import webapp
from nomad.master.serve import Served, answering, listen, serve
from nomad.runtime.kubernetes import KubernetesRuntime
from nomad.runtime.manifests import Boot
from nomad.settings import Kubernetes, Settings
from nomad.tasks import alongside
from nomad.transport import certificates as tls
from nomad.transport import registry
from nomad.transport.base import Connection

log = logging.getLogger(__name__)


@asynccontextmanager
async def serve_in_cluster(
    settings: Settings,
    api: Api,
    lease_api: Api | None = None,
    *,
    clock: Clock | None = None,
    other_tokens: Callable[[str], Awaitable[bool]] | None = None,
    lost: Callable[[str], None] = lambda why: None,
) -> AsyncIterator[Served]:
    """Wait until this process leads, and run a master until the block ends. Pods go on after that.

    `lease_api`: other connections to the same cluster, for the lease alone.
    `settings.control`: where pods are listened for. `lost(why)` is called when it leads no more, which ends the block,
    too: the process should end in a second. Raises `LeadershipLost` when another one may lead, `StateError` and
    `ApiError` when it can't begin, `UsageError` when the port is taken.
    """
    clock = clock or SystemClock()
    settings = replace(settings, pods=replace(settings.pods, outlive_master=True, shaped=False))
    store: KubernetesStore | None = None

    def fence(why: str) -> None:
        if store is not None:
            store.fence(why)
        lost(why)

    async with AsyncExitStack() as stack:
        sock = listen(settings.rest)
        stack.callback(sock.close)
        waiting = await stack.enter_async_context(AsyncExitStack())
        await waiting.enter_async_context(answering(webapp.standby(), sock.dup()))

        def reach(name: str) -> AbstractAsyncContextManager[Connection]:
            return _reached(settings, api, name)

        leads = leading(lease_api or api, settings.kubernetes, clock, lost=fence, reach=reach)
        leadership = await stack.enter_async_context(leads)
        api.may_write = leadership.lasts
        await stack.enter_async_context(_certified(settings, api, clock))
        store = await KubernetesStore.open(
            api, settings.kubernetes.namespace, settings.kubernetes.identity, clock=clock, lasts=leadership.lasts
        )
        closing = await stack.enter_async_context(AsyncExitStack())  # until the master closes them itself
        closing.push_async_callback(store.close)
        runtime = await _runtime(settings, api, store, clock)
        closing.pop_all()
        served = serve(settings, None, runtime=runtime, store=store, sock=sock, other_tokens=other_tokens)
        await stack.enter_async_context(alongside(_until_fenced(store), runtime.watching()))
        made = await stack.enter_async_context(served)
        made.master.receive(names.MASTER, leadership.door)
        kubernetes = settings.kubernetes
        watch = PipelineWatch(made.master, store, api, kubernetes.namespace, kubernetes.identity, clock)
        await stack.enter_async_context(alongside(watch.run()))
        await waiting.aclose()
        yield made


async def _runtime(settings: Settings, api: Api, store: KubernetesStore, clock: Clock) -> KubernetesRuntime:
    """What starts pods, and has found those that are there."""
    own, kubernetes = await Secrets.of(store), settings.kubernetes
    await _tell_guests(api, kubernetes, own.keys.of)
    boot = Boot(kubernetes.control, own.keys.verify, settings.pods.master_timeout)
    keep = settings.pods.keep_ended
    masters = await _deployment(api, kubernetes.namespace)
    runtime = await KubernetesRuntime.open(api, kubernetes, boot, own.keys.of, keep_ended=keep, clock=clock)

    def owner(pipeline: str) -> Json | None:
        """Of what belongs to a pipeline, its object; of what belongs to none, the masters' Deployment."""
        if not pipeline:
            return masters
        try:
            return store.owner(pipeline)
        except KeyError:
            return None

    runtime.owner = owner
    return runtime


async def _tell_guests(api: Api, settings: Kubernetes, key_of: Callable[[str], bytes]) -> None:
    """What agents and relays have to know when they start, in the Secrets that their pods wait for."""
    agent = {"control": settings.control, "key": key_of(names.AGENT).hex()}
    for name, component, data in (
        (names.AGENT_NAME, names.AGENT, {"boot": json.dumps(agent)}),
        (names.RELAY_NAME, names.RELAY, {"key": key_of(names.RELAY).hex()}),
    ):
        labels = {names.APP: names.NOMAD, names.MANAGED_BY: names.NOMAD, names.COMPONENT: component}
        body = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "labels": labels}, "stringData": data}
        await api.apply(paths.secrets(settings.namespace, name), body)


async def _deployment(api: Api, namespace: str) -> Json | None:
    """The masters' Deployment, as an owner; None where they run without one."""
    try:
        found = await api.get(paths.deployments(namespace, names.MASTER_NAME))
    except ApiNotFound:
        return None
    except ApiError as exc:
        log.warning("waiting pods will belong to nobody, as the masters' Deployment can't be looked up: %s", exc)
        return None
    metadata = found["metadata"]
    return {"apiVersion": "apps/v1", "kind": "Deployment", "name": metadata["name"], "uid": metadata["uid"]}


@asynccontextmanager
async def _certified(settings: Settings, api: Api, clock: Clock) -> AsyncIterator[None]:
    """Have certificates for whoever needs them, and use this process's own; where pods are spoken to without, none."""
    if not settings.control.startswith("tls"):
        yield
        return
    certificates = Certificates(api, settings.kubernetes.namespace, clock)
    await certificates.renew()
    with tempfile.TemporaryDirectory(prefix="nomad-tls-") as folder:
        certificates.put(folder)
        tls.use(folder)
        try:
            async with alongside(certificates.keep(folder)):
                yield
        finally:
            tls.use(None)


@asynccontextmanager
async def _reached(settings: Settings, api: Api, name: str) -> AsyncIterator[Connection]:
    """A connection with the master that leads, for one that waits and calls itself `name`: see `standby.Reach`."""
    namespace, address = settings.kubernetes.namespace, settings.kubernetes.control
    kept = await _secret(api, namespace, names.MASTER_NAME)
    key = Keys(bytes.fromhex(kept["pod_key"].decode()), b"").of(names.MASTER)
    with tempfile.TemporaryDirectory(prefix="nomad-tls-") as folder:
        if address.startswith("tls"):
            for file, content in (await _secret(api, namespace, names.MASTER_TLS_SECRET)).items():
                (Path(folder) / file).write_bytes(content)
            tls.use(folder)
        try:
            conn = await registry.connect(address)
            try:
                await shake_dialer(conn, key, f"{names.MASTER}:{name}", {})
                yield conn
            finally:
                conn.abort()
        finally:
            tls.use(None)


async def _secret(api: Api, namespace: str, name: str) -> dict[str, bytes]:
    found = await api.get(paths.secrets(namespace, name))
    return {key: base64.b64decode(value) for key, value in (found.get("data") or {}).items()}


async def _until_fenced(store: KubernetesStore) -> None:
    await store.fenced.wait()
    raise LeadershipLost("another master has taken over")


def listens(control: str) -> str:
    """Where to listen for those who dial `control`: the same port, at all addresses of this machine or pod."""
    scheme, _, rest_ = control.partition("://")
    port = rest_.rpartition(":")[2]
    return f"{scheme}://0.0.0.0:{port if port.isdigit() else names.CONTROL_PORT}"
