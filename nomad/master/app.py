"""`Master`: what the REST handlers and the embedding program call.

`async with Master(settings, topology) as master` opens the state folder, finds the pipelines of an
earlier master again, adopts their pods and keeps things as they should be until the block ends.
Reads answer from memory and are synchronous; calls that write return once what they wrote is stored
(pods follow by themselves). Every error is one of `nomad.errors`, and after it nothing is half-started.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import random
import secrets
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from nomad import bundle
from nomad.clock import Clock, SystemClock
from nomad.errors import ConflictError, InvalidRequestError, NotFoundError, RequestError
from nomad.master import moves, rows, show
from nomad.master.asides import Asides, understood
from nomad.master.assembly import Parts, assemble, declare_profile
from nomad.master.emulation import Emulation
from nomad.master.follow import follow
from nomad.master.metrics import Metrics
from nomad.master.moves import under_way
from nomad.master.placing import check_devices, check_packages, check_pins, place
from nomad.master.placing import view as placement_view
from nomad.master.pods import Guests
from nomad.master.reconcile import peers
from nomad.master.state import DesiredPipeline, Goal, History, operator_id
from nomad.master.store import Store
from nomad.master.tally import SAMPLES
from nomad.master.views import (
    BundleView,
    EventView,
    ExplainView,
    LatencyView,
    LinkView,
    LogLine,
    MoveView,
    NodeView,
    PipelineView,
    PlacementView,
    SetAsideView,
    TailItem,
)
from nomad.pipeline import PipelineSpec, check_profile
from nomad.runtime.base import Runtime
from nomad.scheduler.sustain import describe_at_most
from nomad.settings import Settings
from nomad.topology import Topology
from nomad.units import milliseconds


class Master:
    """The whole master; one per state folder."""

    def __init__(
        self,
        settings: Settings,
        topology: Topology | None,
        *,
        runtime: Runtime | None = None,
        store: Store | None = None,
        clock: Clock | None = None,
    ) -> None:
        """Without a `runtime`, pods are processes of this machine; without a `store`, the state folder is it. Both are
        closed with the master. Without a `topology` the cluster is a real one, whose runtime knows it.
        """
        self._settings = settings
        self._assembly: AbstractAsyncContextManager[Parts] = assemble(
            settings, topology, runtime, clock or SystemClock(), store
        )
        self._opened: Parts | None = None
        self._submitting = asyncio.Lock()
        self._changing = asyncio.Lock()
        self._metrics = Metrics(self)

    async def __aenter__(self) -> Self:
        """Raises `StateError` (folder in use, not writable, newer version) and `TransportError`."""
        self._opened = await self._assembly.__aenter__()
        self._opened.moves.ended = self._metrics.moved
        self._opened.loop.stepped = self._metrics.stepped
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        """Stop the pods, unless they are to outlive the master. What is wanted of pipelines stays as it is."""
        await self._metrics.close()
        await self._assembly.__aexit__(kind, exc, tb)
        self._opened = None

    @property
    def ready(self) -> bool:
        """Whether the state is loaded, the control listener is bound and the loop runs."""
        return self._opened is not None and not self._opened.desired.closing

    @property
    def token(self) -> str:
        """What REST callers must present; kept in the state folder with mode 0600."""
        return self._parts.token

    @property
    def signing_key(self) -> bytes:
        """The Ed25519 seed that bundles for this master are signed with."""
        return self._parts.signing_key

    def receive(self, kind: str, guests: Guests) -> None:
        """Let in processes of a kind that are no pods, where pods dial."""
        self._parts.port.receive(kind, guests)

    async def metrics(self) -> bytes:
        """Prometheus text."""
        return await self._metrics.text()

    # nodes and links

    def nodes(self) -> list[NodeView]:
        """All nodes."""
        return list(self.each_node())

    def each_node(self) -> Iterator[NodeView]:
        """The same, one after the other: others may have their turn in between."""
        parts = self._parts
        return show.nodes(parts.desired, parts.loop.requested, parts.observed, parts.book, parts.clock.now())

    def node(self, node: str) -> NodeView:
        """One node. Raises `NotFoundError`."""
        self._check_node(node)
        return next(view for view in self.each_node() if view.id == node)

    def links(self) -> list[LinkView]:
        """Every ordered pair of nodes; on large clusters those that are used or were measured."""
        return list(self.each_link())

    def each_link(self) -> Iterator[LinkView]:
        """The same, one after the other: others may have their turn in between."""
        parts = self._parts
        return show.links(parts.desired, parts.observed, parts.book, parts.clock.now())

    def connections(self) -> Mapping[str, int]:
        """Pods that are connected now, by the way that they came: "direct", or by way of an "agent"."""
        return self._parts.port.connections

    async def set_link(
        self,
        source: str,
        target: str,
        *,
        latency: float | None = None,
        jitter: float | None = None,
        bandwidth: float | None = None,
        loss: float | None = None,
        unlimited: bool = False,
    ) -> LinkView:
        """Change how a directed link is emulated, at once.

        None leaves a field as it is; `unlimited` takes the bandwidth limit away. Seconds, bytes per second.
        Raises `NotFoundError`, `InvalidRequestError`, and `ConflictError` where links are real.
        """
        emulation = self._emulated("the links of this cluster are real: they are measured, and can't be set")
        self._check_node(source)
        self._check_node(target)
        await emulation.set_link(
            source, target, latency=latency, jitter=jitter, bandwidth=bandwidth, loss=loss, unlimited=unlimited
        )
        self._parts.events.add(
            "link.changed", f"the link from {source} to {target} was changed", data={"source": source, "target": target}
        )
        return next(view for view in self.each_link() if (view.source, view.target) == (source, target))

    async def update_node(self, node: str, *, speed: float) -> NodeView:
        """Change how fast a node is emulated, at once.

        Raises `NotFoundError`, `InvalidRequestError`, and `ConflictError` where nodes are real.
        """
        emulation = self._emulated("the nodes of this cluster are real: their speed is measured, and can't be set")
        self._check_node(node)
        await emulation.set_speed(node, speed)
        self._parts.events.add("node.changed", f"the speed of {node} is now {speed:g}", data={"node": node})
        return self.node(node)

    async def lose_node(self, node: str) -> NodeView:
        """Let an emulated node fail: its processes are killed, and none is started there until it is restored.

        What follows is noticed and mended as on any cluster. Raises `NotFoundError`, `ConflictError`.
        """
        return await self._emulate(node, lost=True)

    async def restore_node(self, node: str) -> NodeView:
        """Let an emulated node come back. Raises `NotFoundError`, `ConflictError`."""
        return await self._emulate(node, lost=False)

    async def _emulate(self, node: str, *, lost: bool) -> NodeView:
        refusal = "the nodes of this cluster are real: they can't be made to fail"
        emulation = self._emulated(refusal)
        if not emulation.loses_nodes:
            raise ConflictError(refusal, status=409)
        self._check_node(node)
        await emulation.set_lost(node, lost=lost)
        text, change = ("is made to fail", "lose") if lost else ("is made to come back", "restore")
        self._parts.events.add("node.changed", f"node {node} {text}", data={"node": node, "change": change})
        return self.node(node)

    # what a scrape reads: see `metrics`

    def pipeline_rows(self) -> Iterator[rows.PipelineRow]:
        """All pipelines and their operators."""
        parts = self._parts
        return rows.pipelines(parts.desired, parts.loop.requested, parts.observed, parts.book, parts.clock.now())

    def node_rows(self) -> Iterator[rows.NodeRow]:
        """All nodes."""
        parts = self._parts
        return rows.nodes(parts.desired, parts.loop.requested, parts.observed, parts.book)

    def link_rows(self) -> Iterator[rows.LinkRow]:
        """The links that `links` has."""
        return rows.links(self._parts.desired, self._parts.observed, self._parts.book)

    # moves

    async def move(self, id: str, operator: str, node: str | None, *, reason: str = "a user asked for it") -> MoveView:
        """Order a move of one operator, which is carried out while the pipeline runs. Without a node it stays on its
        own, and a new instance takes its place there.

        Raises `NotFoundError`, `InvalidRequestError` and `ConflictError` when it can't be, `StateError`.
        """
        parts, wanted = self._parts, self._wanted(id)
        if node is None:
            pod = moves.check_replacing(wanted, operator, parts.loop.requested, parts.observed)
            here = wanted.node_of(operator)
            return await parts.moves.order(wanted, operator, here, cause="user", reason=reason, relieves=pod)
        used = show.memory_used(parts.desired, parts.loop.requested)
        devices = show.devices_used(parts.desired, parts.loop.requested)
        moves.check(wanted, operator, node, parts.loop.requested, parts.observed, used, devices)
        predicted, why = await self._predicted(wanted, operator, node)
        return await parts.moves.order(
            wanted, operator, node, cause="user", reason=reason, predicted=predicted, placement=why
        )

    async def _predicted(
        self, wanted: DesiredPipeline, operator: str, node: str
    ) -> tuple[dict[str, float], PlacementView | None]:
        """What the cost model says of a move, in the form of `MoveOrder`; nothing where it knows too little."""
        problem = self._parts.replanner.problem(wanted)
        now = {op.name: wanted.node_of(op.name) for op in wanted.spec.operators}
        before, _ = await asyncio.to_thread(describe_at_most, problem, now)
        after, _ = await asyncio.to_thread(describe_at_most, problem, {**now, operator: node})
        predicted = {} if before is None else {"latency_before": float(before["latency"])}
        if after is None:
            return predicted, None
        predicted["latency_after"] = float(after["latency"])
        return predicted, placement_view(after["reasons"][operator], pinned=False)

    def moves(self, id: str) -> list[MoveView]:
        """The pipeline's moves, oldest first. Raises `NotFoundError`."""
        self._wanted(id)
        return self._parts.moves.list(id)

    def move_status(self, id: str, move: str) -> MoveView:
        """One move. Raises `NotFoundError`."""
        self._wanted(id)
        return self._parts.moves.get(id, move)

    async def latencies(self, id: str, after: float = 0.0) -> list[LatencyView]:
        """When messages were done at the last operator, later than `after`, and how long they took; the newest ones.

        Raises `NotFoundError`, `ConflictError`, `RequestError`.
        """
        last = self._wanted(id).spec.operators[-1].name
        samples = understood(SAMPLES, await self._ask(id, last, "samples", after=after))
        return [LatencyView(time, latency) for time, latency in samples]

    # pipelines

    async def submit(
        self,
        data: bytes,
        *,
        id: str | None = None,
        start: str,
        end: str,
        profile: Sequence[dict[str, float]] = (),
        moves: bool = True,
        pins: Mapping[str, str] | None = None,
    ) -> PipelineView:
        """Run the pipeline in a bundle. Without an id it gets a readable one; a profile replaces the bundle's.

        `moves`: Nomad may move its operators by itself. `pins`: operator -> the node that it is bound to; they are
        added to those in the bundle.

        Raises `BundleError` and its kin, `PipelineError`, `ConflictError` (the id is taken), `InvalidRequestError`
        (unknown nodes, nowhere to place it), `StateError` (it can't be stored).
        """
        parts = self._parts
        found = await asyncio.to_thread(bundle.read, data, bundle.public_key(parts.signing_key))
        images = self._settings.kubernetes.images.keys() if parts.emulation is None else None
        warnings = await asyncio.to_thread(bundle.check_environment, found, images)
        lacking = await parts.runtime.missing_secrets({name for op in found.operators for name in op.secrets.values()})
        if lacking:
            raise InvalidRequestError("; ".join(lacking), status=422)
        if parts.agents is not None:
            check_packages(found.operators, found.python, parts.agents.pythons())
        for name, node in (("start", start), ("end", end)):
            self._check_usable(node, f"the {name} node")
        async with self._submitting:
            spec = found.spec(id if id is not None else self._new_id(), start, end)
            if profile:
                names = [op.name for op in spec.operators]
                spec = replace(spec, profile=check_profile(profile, names))
            if spec.id in parts.desired.pipelines:
                raise ConflictError(
                    f"there is a pipeline {spec.id!r} already; take another id, or remove it: nomad rm {spec.id}",
                    status=409,
                )
            wanted = DesiredPipeline(
                spec=spec,
                bundle=found.digest,
                link_key=secrets.token_bytes(32),
                created=parts.clock.wall(),
                placement={},
                warnings=tuple(warnings),
                epoch_floor=parts.desired.epoch_floor,
                moves=moves,
                pins=self._checked_pins(spec, {op.name: op.pin for op in spec.operators if op.pin} | dict(pins or {})),
            )
            for name, node in wanted.bound.items():
                if not parts.observed.open(node):
                    raise InvalidRequestError(
                        f"operator {name!r} can't be placed: its node {node!r} takes no new operators", status=422
                    )
            devices = parts.replanner.devices_taken(wanted)
            check_pins(spec, list(parts.observed.nodes.values()), wanted.bound, devices)
            placed = await asyncio.to_thread(place, parts.replanner.problem(wanted))
            check_devices(spec, parts.observed.nodes, placed.nodes, devices)
            wanted.placement = placed.views
            warnings += [placed.warning] if placed.warning else []
            warnings += peers.apart(wanted, parts.observed)
            wanted.warnings = tuple(warnings)
            await parts.store.add_pipeline(wanted, data)
            parts.desired.pipelines[spec.id] = wanted
            declare_profile(parts.book, spec, parts.clock.now())
        predicted = milliseconds(placed.latency)
        text = f"{spec.id} was submitted, with {len(spec.operators)} operators; predicted: {predicted}"
        self._caused(spec.id, "pipeline.submitted", text, latency=placed.latency, placement=placed.nodes)
        for warning in warnings:
            parts.events.add("pipeline.warning", warning, pipeline=spec.id)
        return self.pipeline(spec.id)

    def pipelines(self) -> list[PipelineView]:
        """All pipelines, oldest first."""
        return list(self.each_pipeline())

    def each_pipeline(self) -> Iterator[PipelineView]:
        """The same, one after the other: others may have their turn in between."""
        known = self._parts.desired.pipelines
        return (self.pipeline(id) for id in list(known) if id in known)

    def pipeline(self, id: str) -> PipelineView:
        """One pipeline. Raises `NotFoundError`."""
        self._wanted(id)
        parts = self._parts
        return show.pipeline(id, parts.desired, parts.loop.requested, parts.observed, parts.book, parts.clock.now())

    async def stop(self, id: str) -> PipelineView:
        """Stop a pipeline; one that is over stays as it is. Raises `NotFoundError`."""
        wanted = self._wanted(id)
        if wanted.goal is Goal.RUN and not self._parts.loop.is_over(id):
            await self._parts.store.set_goal(id, Goal.STOP)
            if wanted.goal is Goal.RUN:  # it may have been removed in the meantime
                wanted.goal = Goal.STOP
                self._caused(id, "pipeline.stopping", f"{id} is to be stopped")
        return self.pipeline(id)

    async def remove(self, id: str) -> None:
        """Stop a pipeline at once if it runs, and forget it with all that it kept. Raises `NotFoundError`."""
        wanted = self._wanted(id)
        if wanted.goal is not Goal.REMOVE:
            await self._parts.store.set_goal(id, Goal.REMOVE)
            wanted.goal = Goal.REMOVE
            self._caused(id, "pipeline.removing", f"{id} is to be removed")
        await self._parts.loop.until(lambda: self._parts.desired.pipelines.get(id) is not wanted)

    async def change(
        self, id: str, *, moves: bool | None = None, pins: Mapping[str, str | None] | None = None
    ) -> PipelineView:
        """Say what Nomad may do with the operators by itself; None leaves it as it is, a pin of None takes one away.

        Raises `NotFoundError`, `InvalidRequestError`, and `ConflictError` for an operator that is about to move.
        """
        async with self._changing:  # what is left as it is must be what it is then
            wanted = self._wanted(id)
            await self._change(wanted, wanted.moves if moves is None else moves, pins or {})
        return self.pipeline(id)

    async def _change(self, wanted: DesiredPipeline, moves: bool, pins: Mapping[str, str | None]) -> None:
        id = wanted.spec.id
        changed = self._checked_pins(wanted.spec, {name: node for name, node in pins.items() if node})
        for name, node in changed.items():
            if wanted.node_of(name) != node:
                raise InvalidRequestError(
                    f"operator {name!r} is on {wanted.node_of(name)}: move it before it is pinned there, "
                    f"nomad move {id} {name} {node}",
                    status=422,
                )
            if any(order.operator == name for order in wanted.orders):
                raise under_way(name, id)
        kept = {name: node for name, node in wanted.pins.items() if name not in pins} | changed
        await self._parts.store.set_placing(id, moves=moves, pins=kept)
        wanted.moves, wanted.pins = moves, kept
        self._parts.woken.set()

    async def update_profile(self, id: str, profile: Sequence[dict[str, float]]) -> PipelineView:
        """Say what is expected of each operator, in order. Raises `NotFoundError`, `PipelineError`."""
        wanted = self._wanted(id)
        names = [op.name for op in wanted.spec.operators]
        spec = replace(wanted.spec, profile=check_profile(profile or None, names))
        await self._parts.store.set_spec(spec)
        wanted.spec = spec
        declare_profile(self._parts.book, spec, self._parts.clock.now())
        return self.pipeline(id)

    async def explain(self, id: str) -> ExplainView:
        """Why its operators are where they are, by what is known now. Raises `NotFoundError`."""
        wanted = self._wanted(id)
        measured = {op.name: op.stats.latency_p50 for op in self.pipeline(id).operators}
        return await self._parts.replanner.explain(wanted, measured)

    async def bundle(self, id: str) -> BundleView:
        """Its code, as it was submitted. Raises `NotFoundError`, `StateError`."""
        digest = self._wanted(id).bundle
        return BundleView(digest, base64.b64encode(await self._parts.store.bundle(digest)).decode())

    def problem(self, id: str) -> dict[str, Any]:
        """Its placement problem as it is now, in the form that plans are asked for in. Raises `NotFoundError`."""
        return dict(self._parts.replanner.problem(self._wanted(id)))

    # what happened

    def events(self, pipeline: str | None = None, after: int = 0, limit: int = 1000) -> list[EventView]:
        """Oldest first, ids above `after`; the newest `limit` of them."""
        return self._parts.events.list(pipeline, after, limit)

    def subscribe_events(self) -> AsyncIterator[EventView]:
        """Events from now on, until the master closes."""
        return self._parts.events.subscribe()

    async def logs(self, id: str, operator: str | None = None, tail: int | None = None) -> list[LogLine]:
        """The last `tail` lines of each operator, by operator; of its earlier pods too, as far as they are kept.

        Raises `NotFoundError`.
        """
        runtime = self._parts.runtime
        pods = sorted(await runtime.list(), key=lambda pod: pod.epoch)
        found: list[LogLine] = []
        for name in self._names(id, operator):
            mine = [pod.id for pod in pods if pod.id.rpartition("-e")[0] == operator_id(id, name)]
            lines = [LogLine(name, pod, line) for pod in mine for line in await runtime.logs(pod, tail=tail)]
            found += lines if tail is None else lines[len(lines) - tail :] if tail < len(lines) else lines
        return found

    def follow_logs(self, id: str, operator: str | None = None) -> AsyncIterator[LogLine]:
        """Lines from now on, across restarts, until the pipeline is over. Raises `NotFoundError`."""
        return follow(self._parts.loop, self._parts.observed, self._parts.runtime, id, self._names(id, operator))

    # operators

    async def set_aside(self, id: str, operator: str) -> list[SetAsideView]:
        """The messages whose function raised, also of a pipeline that has ended.

        Raises `NotFoundError`, `RequestError` with status 503 while the operator is being restarted.
        """
        return await self._asides(id, operator).records()

    async def rerun(self, id: str, operator: str, ids: Sequence[str] | None = None) -> dict[str, Any]:
        """{"ran": n, "failed": n}; None runs all of them."""
        return await self._asides(id, operator).rerun(ids)

    async def drop(self, id: str, operator: str, ids: Sequence[str] | None = None) -> dict[str, Any]:
        """{"dropped": n}; None drops all of them."""
        return await self._asides(id, operator).drop(ids)

    async def cut(self, id: str, operator: str) -> None:
        """Break an operator's data connections, as a fault of the network would; for tests of what that does."""
        await self._ask(id, operator, "cut")

    def last_output(self, id: str, operator: str) -> bytes | None:
        """Encoded by the codec; the last that a heart-beat brought, or a pod left behind. Raises `NotFoundError`."""
        (name,) = self._names(id, operator)
        pod = self._pod(id, name)
        state = self._parts.observed.pods.get(pod) if pod else None
        if state is not None and state.stats.last_output is not None:
            return state.stats.last_output
        return self._parts.observed.history.get(operator_id(id, name), History()).totals.last_output

    def tail(self, id: str, operator: str) -> AsyncIterator[TailItem]:
        """Live outputs from now on, until the pipeline is over. Drops the oldest when the reader is slow.

        Raises `NotFoundError`.
        """
        (name,) = self._names(id, operator)
        outputs = self._parts.port.tail(operator_id(id, name))
        if self._parts.loop.is_over(id):
            self._parts.port.end_tails(operator_id(id, name))
        return outputs

    # Inside

    @property
    def _parts(self) -> Parts:
        if self._opened is None:
            raise RequestError("the master isn't running", status=503)
        return self._opened

    def _wanted(self, id: str) -> DesiredPipeline:
        wanted = self._parts.desired.pipelines.get(id)
        if wanted is None:
            raise NotFoundError(f"there is no pipeline {id!r}", status=404)
        return wanted

    def _names(self, id: str, operator: str | None) -> list[str]:
        names = [op.name for op in self._wanted(id).spec.operators]
        if operator is None:
            return names
        if operator not in names:
            raise NotFoundError(f"pipeline {id!r} has no operator {operator!r}; it has {', '.join(names)}", status=404)
        return [operator]

    def _checked_pins(self, spec: PipelineSpec, pins: Mapping[str, str]) -> dict[str, str]:
        """Pins that can be, without those that the first and the last operator have anyway."""
        names = [op.name for op in spec.operators]
        ends = {names[0]: (spec.start, "start"), names[-1]: (spec.end, "end")}
        for name, node in pins.items():
            if name not in names:
                raise InvalidRequestError(
                    f"there is no operator {name!r} to pin; the pipeline has {', '.join(names)}", status=422
                )
            self._check_usable(node, f"operator {name!r} can't be pinned: the node")
            if name in ends and node != ends[name][0]:
                own, which = ends[name]
                raise InvalidRequestError(
                    f"operator {name!r} can't be pinned to {node}: it is the pipeline's {which}, which is on {own}",
                    status=422,
                )
        return {name: node for name, node in pins.items() if name not in ends}

    def _check_usable(self, node: str, what: str) -> None:
        nodes = self._parts.observed.nodes
        if node not in nodes:
            raise InvalidRequestError(f"{what} {node!r} is unknown; known nodes: {', '.join(nodes)}", status=422)
        if not nodes[node].ready:
            raise InvalidRequestError(f"{what} {node!r} is lost", status=422)

    def _check_node(self, node: str) -> None:
        known = self._parts.observed.nodes
        if node not in known:
            raise NotFoundError(f"there is no node {node!r}; known nodes: {', '.join(known)}", status=404)

    def _pod(self, id: str, operator: str) -> str | None:
        have = self._parts.loop.requested.pipelines.get(id)
        return have.operators[operator].pod if have is not None else None

    def _asides(self, id: str, operator: str) -> Asides:
        (name,) = self._names(id, operator)
        left = self._parts.observed.folders_follow and self._parts.loop.is_over(id)
        folder = self._parts.runtime.workdir(id, name) if left else ""
        return Asides(functools.partial(self._ask, id, operator), Path(folder) if folder else None)

    async def _ask(self, id: str, operator: str, method: str, **args: Any) -> Any:
        (name,) = self._names(id, operator)
        pod = self._pod(id, name)
        if pod is None:
            if self._parts.loop.is_over(id):
                raise ConflictError(f"pipeline {id!r} has ended: submit it again to run anything", status=409)
            raise ConflictError(f"operator {name!r} of {id!r} doesn't run now", status=409)
        return await self._parts.port.ask(pod, method, **args)

    def _caused(self, id: str, kind: str, message: str, **data: Any) -> None:
        """Note what a user asked for: what follows follows from it."""
        self._parts.loop.caused(id, self._parts.events.add(kind, message, pipeline=id, data=data))
        self._parts.woken.set()

    def _emulated(self, refusal: str) -> Emulation:
        """Of a cluster that is emulated. Raises `ConflictError` on any other."""
        if self._parts.emulation is None:
            raise ConflictError(refusal, status=409)
        return self._parts.emulation

    def _new_id(self) -> str:
        while True:
            id = f"{random.choice(_ADJECTIVES)}-{random.choice(_NOUNS)}-{random.randrange(100, 1000)}"
            if id not in self._parts.desired.pipelines:
                return id


_ADJECTIVES = ("amber", "brave", "calm", "dusty", "eager", "fair", "gentle", "happy", "icy", "jolly", "keen", "lucky")
_NOUNS = ("badger", "camel", "dingo", "eagle", "falcon", "gull", "heron", "ibis", "jackal", "kite", "lemur", "moose")
