"""The store of a master on Kubernetes: what it must not forget is in the cluster, in objects that people can look at.

    Pipeline x              spec: what is wanted. status: what was asked for, placements, moves under way, how it ended
                            (`objects`: how it is read and written; `changes`: what changes when; `resource`:
                            what it looks like)
    Secret x-link           what the pods of x prove to each other; owned by the Pipeline, as the next is: `owned`
    ConfigMap x-history     past moves, counters, failures and last outputs of x: `past`
    Secrets nomad-bundle-*  code: `bundles`
    Secret nomad-master     token, signing key, pod key: `state`
    ConfigMap nomad-state   small facts and the last events: `state`

Opened once this master leads. Masters count: opening leaves the next number on every Pipeline, and so a new resource
version. A master that was superseded and doesn't know yet has the old one, so that its next write conflicts; it reads
again, finds a higher number than its own, and is fenced: `fenced` is set, and all of its writes fail from then on.
After a conflict with a user's edit a write is made again, on top of it. What changes one Pipeline at the same time is
written together. While the API doesn't answer, writes wait (see `writes`); reads don't need it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Self

from nomad.clock import Clock, SystemClock
from nomad.errors import ApiError, ApiNotFound, InvalidRequestError, StateError
from nomad.kubernetes import paths
from nomad.kubernetes.api import Api
from nomad.master.kube import changes, resource
from nomad.master.kube.bundles import Bundles
from nomad.master.kube.changes import ordered, put
from nomad.master.kube.objects import Change, Held, Pipelines, owner, same, taken
from nomad.master.kube.owned import Owned
from nomad.master.kube.past import PastOperator
from nomad.master.kube.resource import Json
from nomad.master.kube.state import EVENT_GAP, MasterState, place_of
from nomad.master.kube.writes import ALWAYS, LOOP, USER, Writes, term_of
from nomad.master.state import DesiredPipeline, Goal, Outcome
from nomad.master.store import StoredOperator, StoredPipeline
from nomad.master.views import EventView, MoveView, PlacementView
from nomad.pipeline import PipelineSpec
from nomad.tasks import Tasks, first

log = logging.getLogger(__name__)

SWEEP_AFTER = 60.0
"""Seconds from the start to the first look for bundles that no pipeline has; takeover has other things to do."""

LOADS_AT_ONCE = 16
"""Pipelines that are read at the same time when a master begins."""


class KubernetesStore:
    """The store in one namespace. Made by `open`; used by the master that leads."""

    def __init__(self, api: Api, namespace: str, identity: str, clock: Clock, lasts: Callable[[], bool]) -> None:
        self._api = api
        self._namespace = namespace
        self._clock = clock
        self._writes = Writes(identity, clock, lasts)
        self._bundles = Bundles(api, namespace, self._writes, clock)
        self._pipelines = Pipelines(api, namespace, self._writes)
        self._owned = Owned(api, namespace, self._writes, self._pipelines)
        self._state = MasterState(api, namespace, self._writes, clock)
        self.adding: set[str] = set()
        """Ids of pipelines that are being taken on. For reading."""
        self.unread: set[str] = set()
        """Ids of pipelines that were taken on, and couldn't be read. For reading."""
        self._unused = asyncio.Event()
        self._tasks = Tasks()

    @classmethod
    async def open(
        cls,
        api: Api,
        namespace: str,
        identity: str,
        *,
        clock: Clock | None = None,
        lasts: Callable[[], bool] = lambda: True,
    ) -> Self:
        """Take the namespace over from whoever had it. `identity`: what this master is called, best its pod's name.
        `lasts`: whether it leads, asked before each write.

        Raises `StateError`, when the API doesn't answer or refuses.
        """
        clock = clock or SystemClock()
        self = cls(api, namespace, f"{identity or os.uname().nodename}/{secrets.token_hex(4)}", clock, lasts)
        try:
            found, _ = await self._writes.patiently(lambda: api.list(paths.pipelines(namespace)), LOOP)
        except ApiNotFound:
            raise StateError(
                "the cluster doesn't know what a Pipeline is: kubectl apply --server-side -f images/k8s/crd.yaml"
            ) from None
        for item in found:
            self.seen(item)
        await self._state.open(max((term_of(held.writer) for held in self._pipelines.held.values()), default=0))
        for held in self._pipelines.held.values():
            held.known, held.early = resource.is_accepted(held.found), True
        await asyncio.gather(*(self._take_over(held) for held in self.known()))
        self._tasks.start(self._state.run(), name="write events")
        self._tasks.start(self._sweep(), name="look for unused bundles")
        return self

    async def _take_over(self, held: Held) -> None:
        try:
            await self._pipelines.take_over(held)
        except StateError as exc:
            if not self._writes.is_about_one(exc):
                raise
            log.error("Pipeline %s can't be written to, so nothing of it will be kept: %s", held.name, exc)

    async def close(self) -> None:
        """Write down the last events."""
        await self._tasks.close()
        await self._state.close()

    @property
    def fenced(self) -> asyncio.Event:
        """Set once another master leads: this one can write nothing any more, and should end."""
        return self._writes.fenced

    def fence(self, why: str) -> None:
        """This master leads no more, `why` as a clause: nothing is to be written any more."""
        self._writes.fence(why)

    # What is in the cluster, for those who watch it

    def seen(self, found: Json) -> Held:
        """A Pipeline as it was read; an older one than is known already is left aside."""
        return self._pipelines.seen(found)

    def lost(self, name: str, uid: str) -> None:
        """A Pipeline isn't there any more."""
        held = self._pipelines.held.get(name)
        self._pipelines.lost(name, uid)
        if held is not None and held.gone and held.known:
            self.unread.discard(held.id)

    def owner(self, pipeline: str) -> Json | None:
        """The owner reference that makes an object go with the Pipeline; None when there is none."""
        held = self.of(pipeline)
        return None if held is None else owner(held)

    def held(self, name: str) -> Held | None:
        """The Pipeline of that name, as an object."""
        return self._pipelines.held.get(name)

    def of(self, pipeline: str) -> Held | None:
        """The Pipeline of that id: the one that was taken on, where there are several."""
        return self._pipelines.of(pipeline)

    def known(self) -> list[Held]:
        """The Pipelines that a master has taken on."""
        return [held for held in self._pipelines.held.values() if held.known]

    async def report(self, held: Held, change: Change) -> None:
        """Change what a status shows to people; without effect, and without a request, where it shows that already."""
        await self._pipelines.write_status(held, change, USER)

    def half_made(self, held: Held) -> bool:
        """Whether a master began to make it, and never came to the end of that. What has another master's mark and was
        made while this one leads is a copy, which a user has made.
        """
        mark = changes.mark(held.found)
        return not held.known and mark is not None and (held.early or mark == self._writes.writer)

    async def unmark(self, held: Held) -> None:
        """It isn't half-made any more, and neither is a copy of it that a user makes. Raises `StateError`."""
        if changes.mark(held.found) is not None:
            await self._pipelines.write(held, changes.unmark, USER)

    async def discard(self, held: Held) -> None:
        """Have a Pipeline gone that no master looks after."""
        await self._pipelines.delete(held, LOOP)
        await self._pipelines.release(held)
        if held.known:
            self.unread.discard(held.id)
        self._unused.set()

    # `Store`

    async def secret(self, name: str, make: Callable[[], str]) -> str:
        """A secret of the master's, as text; made when it isn't there yet."""
        return await self._state.secret(name, make)

    def where(self, name: str) -> str:
        """In words, where that secret is kept."""
        return place_of(name)

    async def meta(self) -> dict[str, bytes]:
        """The small facts by name."""
        return self._state.facts

    async def set_meta(self, key: str, value: bytes) -> None:
        await self._state.set(key, value, USER)

    async def bundle(self, digest: str) -> bytes:
        """The bundle's bytes. Raises `StateError` when it isn't there."""
        return await self._bundles.read(digest, LOOP)

    async def pipelines(self) -> list[StoredPipeline]:
        """Those that a master has taken on, oldest first. One that can't be read is left as it is, and logged."""
        found, limit = [], asyncio.Semaphore(LOADS_AT_ONCE)

        async def load(held: Held) -> None:
            async with limit:
                try:
                    found.append(await self._load(held))
                except (InvalidRequestError, StateError, KeyError, TypeError, ValueError) as exc:
                    if isinstance(exc, StateError) and not self._writes.is_about_one(exc):
                        raise
                    log.error("Pipeline %s can't be read, and isn't looked after: %s", held.name, exc)
                    self.unread.add(held.id)

        await asyncio.gather(*(load(held) for held in self.known()))
        return sorted(found, key=lambda stored: (stored.wanted.created, stored.wanted.spec.id))

    async def add_pipeline(self, wanted: DesiredPipeline, bundle: bytes) -> None:
        """A new pipeline and its bundle; one that a user has applied already is taken on.

        A bundle that then nobody has goes by time. Raises `ConflictError` when there is a pipeline of that id.
        """
        content = resource.manifest(wanted.spec, wanted.bundle, moves=wanted.moves, pins=wanted.pins, goal=wanted.goal)
        await self._bundles.add(wanted.bundle, bundle, USER)
        if wanted.spec.id in self.adding:
            raise taken(wanted.spec.id)
        self.adding.add(wanted.spec.id)
        try:
            held = self.of(wanted.spec.id) or await self._pipelines.create(content, wanted.spec.id)
            if held.known or not same(held.found, content):
                raise taken(wanted.spec.id)
            await self._accept(held, wanted, content)
        finally:
            self.adding.discard(wanted.spec.id)

    async def _accept(self, held: Held, wanted: DesiredPipeline, content: Json) -> None:
        def accept(status: Json) -> None:
            changes.accept(status, wanted, held.found["metadata"].get("generation", 0))

        await self._pipelines.write(held, lambda found: changes.complete(found, wanted, content), USER)
        await self._owned.make(held, wanted.link_key, USER)
        await self._pipelines.write_status(held, accept, USER)
        if not held.gone:
            held.known = True
            with suppress(StateError):  # who watches Pipelines does it again
                await self.unmark(held)
        if held.gone:
            raise StateError(f"pipeline {wanted.spec.id!r} was deleted while it was submitted")

    async def set_goal(self, pipeline: str, goal: Goal) -> None:
        held = self._taken_on(pipeline)
        if held is None:
            return
        if goal is Goal.REMOVE:
            await self._pipelines.delete(held, USER)
        else:
            text = "Run" if goal is Goal.RUN else "Stop"
            await self._pipelines.write(held, lambda found: found["spec"].__setitem__("goal", text), USER)

    async def set_spec(self, spec: PipelineSpec) -> None:
        profile = resource.profile(spec)
        if held := self._taken_on(spec.id):
            await self._pipelines.write(held, lambda found: put(found["spec"], "profile", profile), USER)

    async def set_placing(self, pipeline: str, *, moves: bool, pins: dict[str, str]) -> None:
        """What Nomad may do with the pipeline's operators by itself."""
        if held := self._taken_on(pipeline):
            async with self._writes.turn(held.placing, USER) as left:
                await self._pipelines.write(held, lambda found: changes.ask_placing(found, moves, pins), left)
                await self._pipelines.write_status(held, lambda status: put(status, "pins", dict(pins)), left)

    async def set_placement(self, pipeline: str, placement: dict[str, PlacementView]) -> None:
        """Where the next pods go."""
        if held := self._taken_on(pipeline):
            await self._pipelines.write_status(held, lambda status: changes.place(status, placement), LOOP)

    async def set_outcome(self, pipeline: str, outcome: Outcome, reason: str) -> None:
        change = {"outcome": str(outcome), "phase": str(outcome).capitalize(), "reason": reason}
        if held := self._taken_on(pipeline):
            await self._pipelines.write_status(held, lambda status: status.update(change), ALWAYS)

    async def save_operator(self, pipeline: str, operator: StoredOperator) -> None:
        """Write or replace; without effect when the pipeline has been removed."""
        if held := self._taken_on(pipeline):
            # Only what of it has ended counts, so that either may be there without the other.
            await self._owned.keep_operator(held, operator)
            await self._pipelines.write_status(held, lambda status: changes.save_operator(status, operator), LOOP)

    async def save_switch(
        self, pipeline: str, operator: StoredOperator, placement: dict[str, PlacementView], move: MoveView
    ) -> None:
        """A move's point of no return, all or nothing: another pod, on another node, is the present one."""

        def change(status: Json) -> None:
            changes.place(status, placement)
            changes.save_operator(status, operator)
            changes.save_move(status, move)

        if held := self._taken_on(pipeline):
            await self._owned.keep_operator(held, operator)
            await self._pipelines.write_status(held, change, LOOP)

    async def save_moves(self, moves: Sequence[MoveView], keep: int) -> None:
        """Write or replace; of each pipeline all but the last `keep` are dropped."""
        for pipeline in dict.fromkeys(move.pipeline for move in moves):
            if held := self._taken_on(pipeline):
                await self._save_moves(held, [move for move in moves if move.pipeline == pipeline], keep, LOOP)

    async def order_move(self, move: MoveView, keep: int) -> None:
        """A new one that a user waits for; when it can't be written down, nothing of it is left over."""
        if held := self._taken_on(move.pipeline):
            try:
                await self._save_moves(held, [move], keep, USER)
            except (StateError, asyncio.CancelledError):
                # It may be on its way, alone or together with what else changes the status.
                self._tasks.start(self._withdraw(held, move), name=f"take back move {move.id}")
                raise

    async def remove_pipeline(self, pipeline: str, epoch_floor: int) -> None:
        """Delete a pipeline and remember which epochs were used; its bundle goes by time once no other has it."""
        await self._state.set("epoch_floor", str(epoch_floor).encode(), LOOP)
        if held := self._taken_on(pipeline):
            await self._pipelines.delete(held, LOOP)
            await self._owned.clear(held)
            await self._pipelines.release(held)
            self._unused.set()

    async def events(self, limit: int) -> list[EventView]:
        """The last `limit`, oldest first; 1,000 at most."""
        return self._state.events[-limit:] if limit else []

    @property
    def event_gap(self) -> int:
        """What a crash costs at most; nothing before the first master."""
        return EVENT_GAP if self._writes.term > 1 else 0

    async def add_events(self, events: Sequence[EventView], keep: int) -> None:
        """Append, and drop all but the last `keep`. They are written down a little later, many at a time."""
        self._state.add(events, keep)

    def _taken_on(self, pipeline: str) -> Held | None:
        """What is written about a pipeline isn't about an object of its name that was made after it."""
        held = self.of(pipeline)
        return held if held is not None and held.known else None

    # Inside

    async def _load(self, held: Held) -> StoredPipeline:
        wanted = resource.desired(held.found, await self._owned.read_key(held))
        await self._owned.read_past(held)
        operators = resource.stored_operators(held.found)
        for op in operators:
            past = held.past.get(op.name, PastOperator())
            op.totals, op.failure = past.totals, past.failure
        outcome, reason = resource.outcome(held.found)
        return StoredPipeline(wanted, outcome, reason, operators, ordered(held.moves.values()))

    async def _withdraw(self, held: Held, move: MoveView) -> None:
        try:
            await self._pipelines.undo(held, lambda status: changes.withdraw_move(status, move.id))
        except (StateError, ApiError) as exc:
            log.warning("move %s of %s was refused, and may be made by the next master: %s", move.id, held.id, exc)

    async def _save_moves(self, held: Held, moves: list[MoveView], keep: int, patience: float) -> None:
        """First to where they stay, then away from where they were: a crash between leaves them in both."""
        deadline = self._clock.now() + patience
        known = ordered((held.moves | {view.id: view for view in moves}).values())
        kept = {view.id for view in known[-keep:]} if keep else set()
        past = {view.id: view for view in known if view.state.final and view.id in kept}
        done = sum(view.state == "done" for view in past.values())
        await self._owned.keep_moves(held, past, patience)
        await self._pipelines.write_status(
            held,
            lambda status: changes.save_moves(status, moves, kept - past.keys(), done),
            deadline - self._clock.now(),
        )

    async def _sweep(self) -> None:
        await self._clock.sleep(SWEEP_AFTER)
        while True:
            self._unused.clear()
            used = {str(held.found["spec"].get("bundle")) for held in self._pipelines.held.values()}
            try:
                wait = max(SWEEP_AFTER, await self._bundles.sweep(used))
            except (StateError, ApiError) as exc:
                if self.fenced.is_set():
                    return
                log.warning("bundles that nobody has can't be looked for: %s", exc)
                wait = SWEEP_AFTER
            await first(self._unused.wait(), self._clock.sleep(wait))
            await self._clock.sleep(SWEEP_AFTER)
