"""Carries out single actions of `reconcile`: calls the runtime, tells pods, writes to the store.

Called by the loop only, action after action for each pod. Decides nothing: whether an action worked is
seen by its effect, and one that can't be carried out is reported to the observer or logged.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from nomad import handout
from nomad.clock import Clock
from nomad.control import Assignment
from nomad.errors import NomadError, PodStartError, StateError
from nomad.master.bundlecache import BundleCache
from nomad.master.events import EventLog
from nomad.master.moves import MoveLog
from nomad.master.observe import Observer
from nomad.master.pods import PodPort
from nomad.master.reconcile.actions import (
    Action,
    AskStop,
    Assign,
    Carry,
    Ended,
    Finish,
    Forget,
    Kill,
    Measure,
    Moving,
    Rehome,
    Relieve,
    Start,
    Switch,
    TellPeers,
)
from nomad.master.relieve import Homes, carry, relieve
from nomad.master.state import Desired, Goal, History, Observed, Requested, RequestedOperator, operator_id
from nomad.master.store import Store, StoredOperator
from nomad.master.tally import Tallier
from nomad.master.views import PlacementView
from nomad.measure.book import Book
from nomad.measure.remote import KIND as AGENTS
from nomad.measure.remote import RemoteAgents
from nomad.runtime.base import PodSpec, Runtime
from nomad.settings import Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Keys:
    """The master's secrets, as far as pods need them."""

    pods: bytes
    """The key of each process is derived from this one and what it calls itself, so that none needs to be kept."""
    verify: bytes
    """Public key that bundles must be signed with."""

    def of(self, name: str) -> bytes:
        """The key of the process that calls itself so; where processes are started for one pod each, its pod's id."""
        return hmac.new(self.pods, name.encode(), hashlib.sha256).digest()


def cores(book: Book, pipeline: str, operator: str, node: str) -> float | None:
    """Cores that an operator keeps busy on a node, as far as that was measured."""
    known, speed = book.operator(pipeline, operator), book.node(node).speed
    if known.work is None or known.departure is None or speed is None or not known.work.measured:
        return None
    return known.work.value * known.departure.value / max(speed.value, 1e-6)


class Enactor:
    """Carries out actions. `requested` gives what is asked for at the moment of the call."""

    def __init__(
        self,
        *,
        runtime: Runtime,
        port: PodPort,
        control: str,
        store: Store,
        events: EventLog,
        moves: MoveLog,
        tallier: Tallier,
        homes: Homes,
        observer: Observer,
        book: Book,
        agents: RemoteAgents | None,
        observed: Observed,
        desired: Desired,
        requested: Callable[[], Requested],
        keys: Keys,
        settings: Settings,
        clock: Clock,
    ) -> None:
        self._runtime = runtime
        self._port = port
        self._control = control
        self._store = store
        self._events = events
        self._moves = moves
        self._tallier = tallier
        self._homes = homes
        self._observer = observer
        self._book = book
        self._agents = agents
        self._observed = observed
        self._desired = desired
        self._requested = requested
        self._keys = keys
        self._settings = settings
        self._clock = clock
        self._bundles = BundleCache(store, keys.verify)

    async def enact(self, action: Action) -> None:
        """Carry out one action. Raises `NomadError` when it can't and nothing else will tell."""
        match action:
            case Start():
                await self._start(action)
            case Assign():
                await self._assign(action)
            case TellPeers():
                self._port.peers(action.pod, action.links, action.speed, action.role, action.called)
            case AskStop():
                if not self._port.stop(action.pod, drain=action.drain, grace=action.grace):
                    await self._runtime.stop(action.pod, grace=self._settings.reconcile.stop_grace)
            case Kill():
                await self._runtime.stop(action.pod, grace=action.grace)
            case Ended():
                await self._ended(action)
            case Switch():
                await self._switch(action)
            case Measure():
                self._tallier.measure(action)
            case Moving():
                await self._moves.save(action.order.id)
            case Carry():
                await carry(action, self._port, self._observer)
            case Relieve():
                if (wanted := self._desired.pipelines.get(action.pipeline)) is not None:
                    await relieve(action, wanted, self._homes, self._moves, self._observer)
            case Rehome():
                await self._rehome(action)
            case Finish():
                await self._finish(action)
            case Forget():
                await self._forget(action.pipeline)
            case _:
                pass  # only to be noted

    async def _start(self, action: Start) -> None:
        wanted = self._desired.pipelines.get(action.pipeline)
        if wanted is None:
            return
        op = next(op for op in wanted.spec.operators if op.name == action.operator)
        try:
            code = await self._bundles.get(wanted.bundle)
            # Before anything runs, so that its epoch is never given again.
            await self._save(action.pipeline, action.operator)
            await self._runtime.start(
                PodSpec(
                    id=action.pod,
                    pipeline=action.pipeline,
                    operator=action.operator,
                    epoch=action.epoch,
                    node=action.node,
                    control=self._control,
                    key=self._keys.of(action.pod),
                    verify_key=self._keys.verify,
                    master_timeout=self._settings.pods.master_timeout,
                    memory_mb=op.memory_mb,
                    cores=cores(self._book, action.pipeline, action.operator, action.node),
                    python=code.python,
                    image=op.image,
                    environment=op.environment,
                    secrets=op.secrets,
                    devices=op.devices,
                    requirements=op.requirements,
                )
            )
            self._port.seat(action.pod)
        except NomadError as exc:
            self._observer.start_failed(action.pod, str(exc))

    async def _assign(self, action: Assign) -> None:
        wanted = self._desired.pipelines.get(action.pipeline)
        if wanted is None:
            return
        try:
            code = await self._bundles.get(wanted.bundle)
        except NomadError as exc:
            self._observer.start_failed(action.pod, str(exc))
            return
        installer: dict[str, Any] = {}
        if next(op for op in wanted.spec.operators if op.name == action.operator).requirements:
            try:
                installer = self._installer(action)
            except NomadError as exc:
                self._observer.start_failed(action.pod, str(exc))
                return
        windows = self._settings.windows
        self._port.assign(
            action.pod,
            Assignment(
                pipeline=action.pipeline,
                operator=action.operator,
                epoch=action.epoch,
                node=action.node,
                manifest=code.manifest_bytes,
                signature=code.signature,
                code=code.code[action.operator],
                types=code.types,
                link_key=wanted.link_key,
                listen=self._runtime.listen_address(action.pod),
                links=list(action.links),
                speed=action.speed,
                role=action.role,
                window_messages=windows.messages,
                window_bytes=windows.bytes,
                workdir=self._runtime.workdir(action.pipeline, action.operator),
                **installer,
            ),
        )

    def _installer(self, action: Assign) -> dict[str, Any]:
        """Who installs what an operator requires, as fields of its assignment. Raises `PodStartError`."""
        if self._agents is None:
            folder = self._settings.state / "packages"
            return {"packages": str(folder), "packages_bytes": self._settings.pods.packages_bytes}
        address = self._agents.address(action.node)
        if not address:
            raise PodStartError(
                f"the agent of node {action.node} isn't there, which installs what {action.operator} requires"
            )
        name = self._port.name_of(action.pod)
        return {"agent": address, "agent_key": handout.key_of(self._keys.of(AGENTS), name)}

    async def _ended(self, action: Ended) -> None:
        operator = operator_id(action.pipeline, action.operator)
        failure = self._observed.history.get(operator, History()).failure
        if failure is not None and not failure.log:
            lines = await self._runtime.logs(action.pod, tail=self._settings.history.failure_lines)
            self._observer.log_lines(operator, failure, list(lines))
        await self._save(action.pipeline, action.operator)

    async def _finish(self, action: Finish) -> None:
        """Write down how a pipeline ended: its pods are left as they are until then."""
        failures, wanted = 0, self._desired.pipelines.get(action.pipeline)
        while wanted is not None and wanted.goal is not Goal.REMOVE:
            try:
                await self._store.set_outcome(action.pipeline, action.outcome, action.reason)
            except StateError as exc:
                failures += 1
                log.warning("it can't be written down yet that %s is %s: %s", action.pipeline, action.outcome, exc)
                await self._clock.sleep(self._settings.reconcile.backoff.delay(failures))
            else:
                self._observer.over(action.pipeline)
                break

    async def _forget(self, pipeline: str) -> None:
        have = self._requested().pipelines[pipeline]
        highest = max(max(op.epoch, op.highest) for op in have.operators.values())
        self._desired.epoch_floor = max(self._desired.epoch_floor, highest)
        while True:
            try:
                await self._runtime.forget(pipeline)
                await self._store.remove_pipeline(pipeline, self._desired.epoch_floor)
                break
            except StateError as exc:
                log.warning("pipeline %s can't be removed yet: %s", pipeline, exc)
                await self._clock.sleep(self._settings.reconcile.retry)
        for name in have.operators:
            self._observer.forget(operator_id(pipeline, name))
        self._moves.forget(pipeline)
        del self._desired.pipelines[pipeline]

    async def _save(self, pipeline: str, operator: str) -> None:
        """Write down what is asked for an operator now, and what is left of its ended pods. Raises `StateError`."""
        have = self._requested().pipelines.get(pipeline)
        if have is None:
            return
        await self._store.save_operator(pipeline, self._stored(pipeline, operator, have.operators[operator]))

    def _stored(self, pipeline: str, operator: str, op: RequestedOperator) -> StoredOperator:
        history = self._observed.history.get(operator_id(pipeline, operator), History())
        return StoredOperator(
            operator, op.epoch, op.pod, op.last_pod, op.restarts, history.totals, history.failure, op.highest
        )

    async def _switch(self, action: Switch) -> None:
        """A move's point of no return. Until it is written down nobody is told of it."""
        wanted = self._desired.pipelines[action.pipeline]
        have = self._requested().pipelines[action.pipeline]
        move, old = have.move, have.operators[action.operator]
        assert move is not None
        order = action.order
        if order.node == move.source:
            reason = wanted.placement[action.operator]
        else:
            why = f"it was moved here from {move.source}: {order.reason}"
            reason = order.placement or PlacementView(order.node, why)
        placement = {**wanted.placement, action.operator: reason}
        new = replace(move.second, restarts=old.restarts)
        try:
            await self._store.save_switch(
                action.pipeline,
                self._stored(action.pipeline, action.operator, new),
                placement,
                self._moves.get(action.pipeline, order.id),
            )
        except StateError as exc:
            self._observer.switched(action.pod, str(exc))
            return
        wanted.placement = {**wanted.placement, action.operator: reason}  # another one's may have changed meanwhile
        self._observer.switched(action.pod)

    async def _rehome(self, action: Rehome) -> None:
        """Another node for what can't run on its own; its next pod is started there."""
        wanted, id = self._desired.pipelines.get(action.pipeline), operator_id(action.pipeline, action.operator)
        if wanted is None:
            return
        try:
            home = await self._homes(wanted, action.operator, action.node)
            if not (back := self._is_back(action)):
                await self._store.set_placement(action.pipeline, {**wanted.placement, action.operator: home})
                if back := self._is_back(action):
                    await self._store.set_placement(action.pipeline, wanted.placement)
        except NomadError as exc:
            if self._observer.homeless(id, str(exc)):
                log.warning("%s stays without a node: %s", id, exc)
            return
        self._observer.homeless(id, None)
        if back:
            return
        wanted.placement = {**wanted.placement, action.operator: home}
        self._events.add(
            "operator.rehomed",
            f"{action.operator} goes to {home.node}: {action.node} won't do, {action.reason}",
            pipeline=action.pipeline,
            operator=action.operator,
            data={"source": action.node, "target": home.node},
        )

    def _is_back(self, action: Rehome) -> bool:
        """The operator has a pod where that can be: while another node was looked for, its own has come back."""
        have = self._requested().pipelines.get(action.pipeline)
        op = have.operators[action.operator] if have is not None else RequestedOperator()
        return op.pod is not None and self._observed.usable(op.node)
