"""Puts a master together and takes it apart again: opens, restores, wires, starts the tasks, and winds down.

`assemble` is called by `app.Master`, with a topology for a cluster that pretends to be one, without for a real one. Of
that everything comes from its runtime: which nodes there are changes while it runs, and nothing can be set by hand.
After a crash of the master everything needed is in the store:
what is wanted, the epochs and pods that were asked for, and, with the runtime, the processes. After a
normal end it is the same, but that pods were stopped first (unless they are to outlive the master).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Self

from nomad import bundle, credentials
from nomad.clock import Clock
from nomad.delivery.relay import Relay as RelayServer
from nomad.errors import RequestError, StateError
from nomad.handout import key_of
from nomad.master.emulation import OVERRIDES, Emulation
from nomad.master.enact import Enactor, Keys
from nomad.master.events import EventLog
from nomad.master.gathered import STEER_SECONDS, Way
from nomad.master.judge import Judge
from nomad.master.loop import Loop
from nomad.master.measuring import measure, measure_machines, seen
from nomad.master.moves import MoveLog
from nomad.master.observe import Observer
from nomad.master.pace import Pace
from nomad.master.pods import PodPort
from nomad.master.rehome import Homes
from nomad.master.replan import Replanner
from nomad.master.restoring import give_up_moves, miss, restore, where_found
from nomad.master.sqlite import SqliteStore
from nomad.master.state import (
    Desired,
    Observed,
    Relay,
    operator_id,
)
from nomad.master.store import Store
from nomad.master.tally import Tallier
from nomad.master.views import MoveView
from nomad.master.words import say_words
from nomad.measure.book import Book
from nomad.measure.remote import KIND as AGENTS
from nomad.measure.remote import RemoteAgents
from nomad.pipeline import PipelineSpec
from nomad.runtime import sockets
from nomad.runtime.base import Apart, Distant, Emulated, LinkInfo, Machines, NodeInfo, ObservedPod, PodPhase, Runtime
from nomad.settings import Settings
from nomad.tasks import Tasks, alongside
from nomad.topology import Topology

log = logging.getLogger(__name__)

RELAY = "relay"
"""What the relay calls itself, whose key is made of that."""


@dataclass(slots=True)
class Parts:
    """A master's parts, wired."""

    settings: Settings
    clock: Clock
    emulation: Emulation | None
    """None: the cluster is real."""
    store: Store
    runtime: Runtime
    desired: Desired
    observed: Observed
    observer: Observer
    book: Book
    loop: Loop
    events: EventLog
    moves: MoveLog
    replanner: Replanner
    port: PodPort
    agents: RemoteAgents | None
    """Of the nodes, where these are machines of their own."""
    woken: asyncio.Event
    token: str
    signing_key: bytes


@dataclass(frozen=True, slots=True)
class Secrets:
    """What a master keeps to itself."""

    token: str
    signing_key: bytes
    keys: Keys

    @classmethod
    async def of(cls, store: Store) -> Self:
        """Those that are in a store; made where they aren't there yet. Raises `StateError`."""
        token = await store.secret("token", credentials.new_token)
        signing_key = await _key(store, "signing_key", bundle.new_signing_key)
        kept = (await store.meta()).get("pod_key")  # where earlier versions had it
        pod_key = await _key(store, "pod_key", lambda: kept or secrets.token_bytes(32))
        return cls(token, signing_key, Keys(pod_key, bundle.public_key(signing_key)))


@asynccontextmanager
async def assemble(
    settings: Settings, topology: Topology | None, runtime: Runtime | None, clock: Clock, store: Store | None = None
) -> AsyncIterator[Parts]:
    """A running master. Without a `runtime` it has local processes, without a `store` the state folder's.

    Both are closed at the end. Raises `StateError` and `TransportError`.
    """
    assert topology is not None or (runtime is not None and settings.control)
    async with AsyncExitStack() as stack:
        if store is None:
            store = await SqliteStore.open(settings.state)
        stack.push_async_callback(store.close)
        if runtime is not None:
            stack.push_async_callback(runtime.close)
        meta = await store.meta()
        own = await Secrets.of(store)
        listen, here = settings.control, runtime is None
        if here or not listen:
            folder = sockets.open_folder(meta["sockets"].decode() if "sockets" in meta else None)
            stack.callback(sockets.remove_folder, folder)
            await store.set_meta("sockets", str(folder).encode())
            listen = listen or f"unix:{folder}/master"
        if runtime is None:
            from nomad.runtime.local import LocalRuntime

            assert topology is not None
            runtime = await LocalRuntime.open(topology.nodes, settings.state, folder, settings.pods)
            stack.push_async_callback(runtime.close)

        events = EventLog(store, clock, await store.events(settings.history.events), settings.history.events)
        stack.push_async_callback(_last_events, events)
        desired, observed, woken = Desired(), Observed(), asyncio.Event()
        desired.epoch_floor = int(meta.get("epoch_floor", b"0"))
        emulation = None
        if topology is not None:
            emulation = Emulation(topology, desired, runtime, store, woken.set)
            emulation.restore(meta.get(OVERRIDES), shaped=settings.pods.shaped)
        if isinstance(runtime, Emulated):
            for node in sorted(desired.lost):
                runtime.lose_node(node)
        observed.nodes = {node.id: node for node in runtime.nodes}
        if here and not all(node.reachable for node in runtime.nodes):
            relay = RelayServer(own.keys.of(RELAY))
            stack.push_async_callback(relay.close)
            observed.relay = Relay(await relay.listen(f"unix:{folder}/{RELAY}"), own.keys.of(RELAY))
        elif settings.kubernetes.relay:
            observed.relay = Relay(settings.kubernetes.relay, own.keys.of(RELAY))
        observed.folders_follow = not isinstance(runtime, Apart) or runtime.folders_follow
        book = Book()
        declare_nodes(book, runtime.nodes, clock.now())
        declare_links(book, () if topology is None else topology.links, clock.now())
        pace = Pace(settings.heartbeats, clock)
        observer = Observer(observed, book, clock, woken.set, pace)
        moves = MoveLog(store, events, clock, settings.reconcile.moving.kept)
        requested = restore(desired, observer, moves, await store.pipelines(), clock)
        desired.unread = store.unread
        for wanted in desired.pipelines.values():
            declare_profile(book, wanted.spec, clock.now())
        keys = own.keys

        def pod_of(name: str) -> str | None:
            """The pod that a process is, if it is wanted; "" for one that waits for a pod."""
            pod = runtime.pod_of(name)
            return pod if not pod or loop.requested.operator_of(pod) else None

        def edges(pipeline: str) -> Sequence[tuple[str, str]]:
            wanted = desired.pipelines.get(pipeline)
            return () if wanted is None else wanted.spec.edges

        heard = runtime.heard if isinstance(runtime, Distant) else lambda name: None
        port = PodPort(observer, keys.of, pod_of, settings.heartbeats, settings.history, pace, heard=heard)
        if isinstance(runtime, Distant):
            runtime.knows(lambda name: name in port.waiting, edges, lambda: pace.missed)
        agents = None
        if not isinstance(runtime, Emulated):
            named = runtime.node_of if isinstance(runtime, Machines) else lambda name: name
            agents = RemoteAgents(book, clock, named)
            port.receive(AGENTS, agents.door, carry=True)

        def over(pipeline: str) -> None:
            if wanted := desired.pipelines.get(pipeline):
                for op in wanted.spec.operators:
                    port.end_tails(operator_id(pipeline, op.name))

        loop = Loop(
            desired=desired,
            requested=requested,
            observed=observed,
            observer=observer,
            events=events,
            moves=moves,
            woken=woken,
            settings=settings,
            pace=pace,
            clock=clock,
            over=over,
        )

        def ordered(move: MoveView, event: int) -> None:
            loop.caused(move.pipeline, event, move.operator)
            woken.set()

        moves.ordered = ordered
        # Pods are seen before the loop looks for the first time: none is taken for missing.
        changes = runtime.watch()
        for pod in await runtime.list():
            observer.runtime(pod)
        miss(requested, observed, observer)
        loop.requested = requested = await where_found(requested, desired, observed, store)
        control = await port.listen(listen)
        if topology is None:
            control = settings.kubernetes.control
        stack.push_async_callback(port.close)
        tallier = Tallier(port, observer, clock, settings.reconcile.moving)
        stack.push_async_callback(tallier.close)
        enactor = Enactor(
            runtime=runtime,
            port=port,
            control=control,
            store=store,
            events=events,
            moves=moves,
            tallier=tallier,
            homes=Homes(desired, observed, book, loop.is_over),
            observer=observer,
            book=book,
            agents=agents,
            observed=observed,
            desired=desired,
            requested=lambda: loop.requested,
            keys=keys,
            settings=settings,
            clock=clock,
        )
        judge = Judge(book, settings.windows, pace=lambda: pace.seconds)
        replanner = Replanner(
            judge,
            desired=desired,
            observed=observed,
            loop=loop,
            moves=moves,
            heard=observer.heard,
            clock=clock,
        )
        parts = Parts(
            settings=settings,
            clock=clock,
            emulation=emulation,
            store=store,
            runtime=runtime,
            desired=desired,
            observed=observed,
            observer=observer,
            book=book,
            loop=loop,
            events=events,
            moves=moves,
            replanner=replanner,
            port=port,
            agents=agents,
            woken=woken,
            token=own.token,
            signing_key=own.signing_key,
        )
        if here or agents is not None:
            measuring = Tasks()
            stack.push_async_callback(measuring.close)
            if agents is not None:
                work = measure_machines(desired, observed, loop, book, clock, agents)
                measuring.start(_steer(port, desired, observed, agents, keys, clock), name="steer")
            else:
                work = measure(desired, observed, loop, book, clock, pods=settings.pods)
            measuring.start(work, name="measure")
        text = f"a master started, with {len(desired.pipelines)} pipelines and {len(requested.pods)} pods"
        started = events.add("master.started", text)
        await give_up_moves(desired, moves, events, started, clock)
        for id in desired.pipelines:
            judge.restore(id, moves.list(id), clock.now(), clock.wall())
        watches = _watch(changes, observer, port, clock), _watch_nodes(parts)
        words = say_words(port, settings.heartbeats, clock)
        async with alongside(loop.run(enactor), *watches, words, replanner.run(), events.run()):
            try:
                yield parts
            finally:
                if not settings.pods.outlive_master:
                    await _wind_down(parts)


async def _steer(
    port: PodPort, desired: Desired, observed: Observed, agents: RemoteAgents, keys: Keys, clock: Clock
) -> None:
    """Where pods are many, have them come by way of their nodes' agents."""
    key = keys.of(AGENTS)

    def way(pod: str, name: str) -> Way | None:
        state, wanted = observed.pods.get(pod), desired.pipelines.get(pod.partition(".")[0])
        if wanted is None or wanted.orders:
            return None  # a move asks its pods for much, and can't do without the answers
        address = "" if state is None or state.runtime is None else agents.address(state.runtime.node)
        return Way(address, key_of(key, name)) if address else None

    while True:
        await clock.sleep(STEER_SECONDS)
        port.steer(way, clock.now())


def declare_nodes(book: Book, nodes: Iterable[NodeInfo], now: float) -> None:
    """What is said of nodes, until they are measured. What they were changed to since isn't looked at: that has to be
    measured, as on any cluster.
    """
    for node in nodes:
        book.declare_node(node.id, now, speed=node.speed)


def declare_links(book: Book, links: Iterable[LinkInfo], now: float) -> None:
    """What is said of links, until they are measured."""
    for link in links:
        book.declare_link(link.source, link.target, now, latency=link.shape.latency, bandwidth=link.shape.bandwidth)


def declare_profile(book: Book, spec: PipelineSpec, now: float) -> None:
    """What a pipeline's profile says of its operators, until they are measured."""
    for op, expected in zip(spec.operators, spec.profile, strict=False):
        book.declare_operator(
            spec.id,
            op.name,
            now,
            work=expected.get("cloud_execution_time"),
            output_bytes=expected.get("output_msg_size"),
        )


async def _key(store: Store, name: str, make: Callable[[], bytes]) -> bytes:
    text = await store.secret(name, lambda: make().hex())
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != 32:
        raise StateError(f"{store.where(name)} must be 64 hex digits; delete it to have a new one made")
    return key


async def _watch(changes: AsyncIterator[ObservedPod], observer: Observer, port: PodPort, clock: Clock) -> None:
    tasks = Tasks()
    try:
        async for pod in changes:
            observer.runtime(pod)
            if pod.phase is PodPhase.EXITED:
                tasks.start(_hang_up(pod.id, port, clock), name=f"hang up on {pod.id}")
    finally:
        await tasks.close()


NODES_EVERY = 0.5
"""Seconds between looks at the runtime's nodes: one that is lost is noticed after a second at the most."""


async def _watch_nodes(parts: Parts) -> None:
    known: tuple[Sequence[NodeInfo], frozenset[str]] = (), frozenset()
    while True:
        nodes = parts.runtime.nodes
        behind = parts.agents.unreachable() if parts.agents is not None else frozenset()
        if nodes is not known[0] or behind != known[1]:  # of a thousand nodes it says the same again and again
            known, before = (nodes, behind), parts.observed.nodes
            _tell_of_nodes(parts, seen(nodes, behind))
            declare_nodes(parts.book, (node for node in nodes if node.id not in before), parts.clock.now())
            for id in before.keys() - parts.observed.nodes.keys():
                parts.book.forget_node(id)
        await parts.clock.sleep(NODES_EVERY)


def _tell_of_nodes(parts: Parts, nodes: Sequence[NodeInfo]) -> None:
    for node in parts.observer.nodes(nodes):
        text = f"node {node.id} is {'there' if node.ready else 'lost'}"
        event = parts.events.add(f"node.{'ready' if node.ready else 'lost'}", text, data={"node": node.id})
        for id, pipeline in parts.loop.requested.pipelines.items():
            for name, op in pipeline.operators.items():
                if op.node == node.id:
                    parts.loop.caused(id, event, name)


LAST_WORDS = 1.0
"""Seconds that a connection may outlive its process: what was sent before is heard, what hangs is cut."""


async def _hang_up(pod: str, port: PodPort, clock: Clock) -> None:
    await clock.sleep(LAST_WORDS)
    port.drop(pod)


async def _wind_down(parts: Parts) -> None:
    """Stop all pods and wait for them; what is wanted of pipelines stays as it is."""
    parts.desired.closing = True
    parts.woken.set()
    settings = parts.settings.reconcile
    patience = settings.drain_grace + 4 * (settings.stop_grace + settings.retry)
    try:
        async with asyncio.timeout(patience):
            await parts.loop.until(lambda: parts.loop.idle)
    except (TimeoutError, RequestError):
        log.warning("not all pods have ended; the next master will find them")


async def _last_events(events: EventLog) -> None:
    events.close()
    try:
        await events.flush()
    except StateError as exc:
        log.warning("the last events are lost: %s", exc)
