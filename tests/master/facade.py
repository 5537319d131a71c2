"""A `Master` in memory: the facade's promises without pods, for tests of what stands in front of it.

Also `serve` and `serve_in_thread`, which put the REST interface of any facade on a port of loopback.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any

from aiohttp import web

from nomad import bundle
from nomad.delivery import codec
from nomad.errors import ConflictError, InvalidRequestError, NotFoundError
from nomad.fanout import Fanout
from nomad.master.app import Master
from nomad.master.rest import webapp
from nomad.master.rest.http import server
from nomad.master.views import (
    BundleView,
    ConsideredView,
    EventView,
    ExplainedOperatorView,
    ExplainView,
    LatencyView,
    LinkView,
    LogLine,
    MovePhase,
    MoveState,
    MoveView,
    NodeView,
    OperatorState,
    OperatorView,
    Phase,
    PipelineView,
    PlacementView,
    SetAsideView,
    StatsView,
    TailItem,
)

TOKEN = "the-token-of-these-tests"
SIGNING_KEY = bytes(range(32))
NODES = ("edge", "fog", "cloud")


class FakeMaster(Master):
    """Accepts pipelines and never runs them; tests push outputs, lines and phases by the methods on top."""

    def __init__(self) -> None:
        self._nodes = {name: NodeView(name, 1.0, 2.0, 1024.0, 0.0, "x86_64", [], "3.11", []) for name in NODES}
        self._links = {(a, b): LinkView(a, b, 0.0, 0.0, None, 0.0) for a in NODES for b in NODES if a != b}
        self._pipelines: dict[str, PipelineView] = {}
        self._bundles: dict[str, bytes] = {}
        self._events: list[EventView] = []
        self._numbers = itertools.count(1)
        self._happened: Fanout[EventView] = Fanout()
        self._outputs: dict[tuple[str, str], Fanout[TailItem]] = {}
        self._follow: dict[str, Fanout[LogLine]] = {}
        self._printed: dict[str, list[LogLine]] = {}
        self._last: dict[tuple[str, str], bytes] = {}
        self._moves: dict[str, dict[str, MoveView]] = {}
        self.aside: dict[tuple[str, str], list[SetAsideView]] = {}
        self.is_ready = True
        self.loop: asyncio.AbstractEventLoop | None = None
        """The loop that serves this, for tests that run in another thread."""

    # what tests do

    def emit(self, pipeline: str, operator: str, value: Any, *, skipped: int = 0) -> None:
        mode = self._pipelines[pipeline].codec
        data = codec.encode_one(value, mode)
        self._last[pipeline, operator] = data
        self._outputs[pipeline, operator].publish(TailItem(data, skipped))

    def readers(self, pipeline: str, operator: str) -> int:
        """How many listen to the operator's outputs."""
        return len(self._outputs[pipeline, operator])

    def print(self, pipeline: str, operator: str, text: str) -> None:
        line = LogLine(operator, f"{pipeline}.{operator}-e1", text)
        self._printed[pipeline].append(line)
        self._follow[pipeline].publish(line)

    def put_aside(self, pipeline: str, operator: str, value: Any) -> str:
        number = str(next(self._numbers))
        error = {"type": "ValueError", "message": "no good", "traceback": "Traceback ..."}
        record = SetAsideView(number, 1_700_000_000.0, error, 1, codec.encode_one(value))
        self.aside.setdefault((pipeline, operator), []).append(record)
        return number

    def finish(self, pipeline: str, phase: Phase = Phase.COMPLETED, reason: str = "") -> None:
        self._pipelines[pipeline] = replace(self.pipeline(pipeline), phase=phase, reason=reason)
        for fanout in [self._outputs[key] for key in self._outputs if key[0] == pipeline]:
            fanout.close()
        self._follow[pipeline].close()
        self.happen(f"pipeline.{phase}", f"pipeline {pipeline} is {phase}", pipeline)

    def happen(self, kind: str, message: str, pipeline: str | None = None, operator: str | None = None) -> None:
        event = EventView(next(self._numbers), time.time(), kind, message, pipeline, operator)
        self._events.append(event)
        self._happened.publish(event)

    # the facade

    @property
    def ready(self) -> bool:
        return self.is_ready

    @property
    def token(self) -> str:
        return TOKEN

    @property
    def signing_key(self) -> bytes:
        return SIGNING_KEY

    async def metrics(self) -> bytes:
        return b"# TYPE nomad_pipelines gauge\nnomad_pipelines 0\n"

    def each_node(self) -> Iterator[NodeView]:
        return iter(list(self._nodes.values()))

    def node(self, node: str) -> NodeView:
        if node not in self._nodes:
            raise NotFoundError(f"there is no node {node!r}; the cluster has {', '.join(self._nodes)}")
        return self._nodes[node]

    def each_link(self) -> Iterator[LinkView]:
        return iter(list(self._links.values()))

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
        if (source, target) not in self._links:
            raise NotFoundError(f"there is no link from {source!r} to {target!r}")
        given = {"latency": latency, "jitter": jitter, "bandwidth": bandwidth, "loss": loss}
        link = replace(self._links[source, target], **{k: v for k, v in given.items() if v is not None})
        if unlimited:
            link = replace(link, bandwidth=None)
        self._links[source, target] = link
        return link

    async def update_node(self, node: str, *, speed: float) -> NodeView:
        self._nodes[node] = replace(self.node(node), speed=speed)
        return self._nodes[node]

    async def lose_node(self, node: str) -> NodeView:
        self._nodes[node] = replace(self.node(node), ready=False)
        return self._nodes[node]

    async def restore_node(self, node: str) -> NodeView:
        self._nodes[node] = replace(self.node(node), ready=True)
        return self._nodes[node]

    async def move(self, id: str, operator: str, node: str | None, *, reason: str = "a user asked for it") -> MoveView:
        source = next((op.node for op in self.pipeline(id).operators if op.name == operator), None)
        if source is None:
            raise NotFoundError(f"pipeline {id!r} has no operator {operator!r}")
        node = source if node is None else node
        self.node(node)
        move = f"m{next(self._numbers)}"
        view = MoveView(move, id, operator, source, node, "user", reason, MoveState.PLANNED, time.time())
        self._moves.setdefault(id, {})[move] = view
        return view

    def end_move(self, id: str, state: MoveState = MoveState.DONE, error: str = "") -> None:
        """The pipeline's last move comes to its end."""
        view = list(self._moves[id].values())[-1]
        phases = [MovePhase("starting", 0.5), MovePhase("switching", 0.01)]
        done = replace(view, state=state, error=error, finished=time.time(), phases=phases)
        if state is MoveState.DONE:
            done = replace(done, pause=0.012, lost=0, doubled=0)
        self._moves[id][view.id] = done
        self.happen(f"move.{state}", f"move {view.id} is {state}", id)

    def moves(self, id: str) -> list[MoveView]:
        self.pipeline(id)
        return list(self._moves.get(id, {}).values())

    def move_status(self, id: str, move: str) -> MoveView:
        self.pipeline(id)
        if move not in self._moves.get(id, {}):
            raise NotFoundError(f"pipeline {id!r} has no move {move!r}")
        return self._moves[id][move]

    async def explain(self, id: str) -> ExplainView:
        operators = [
            ExplainedOperatorView(
                name=op.name,
                node=op.node,
                pinned=False,
                terms={"input": 0.0, "transfer": 0.005, "processing": 0.01, "queueing": 0.0},
                waits_for=None,
                finish=0.015,
                measured=0.02,
                runner_up="cloud",
                runner_up_latency=0.03,
                why_not="on cloud the latency would be 30 ms, 15 ms more",
                decided="it was asked for",
            )
            for op in self.pipeline(id).operators
        ]
        looked = ConsideredView(1.5, "interval", "no move makes 15 ms less", 0.015, 0.0, None)
        return ExplainView(id, 10.0, 0.5, 0.015, 0.02, operators, looked, True, 12)

    async def bundle(self, id: str) -> BundleView:
        self.pipeline(id)
        return BundleView("d" * 64, base64.b64encode(self._bundles[id]).decode())

    def problem(self, id: str) -> dict[str, Any]:
        operators = [{"id": op.name, "pin": op.node} for op in self.pipeline(id).operators]
        return {"nodes": [{"id": node} for node in self._nodes], "pipeline": {"id": id, "operators": operators}}

    async def latencies(self, id: str, after: float = 0.0) -> list[LatencyView]:
        self.pipeline(id)
        return [sample for sample in (LatencyView(1.5, 0.25), LatencyView(2.5, 0.125)) if sample.time > after]

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
        made = bundle.read(data, bundle.public_key(SIGNING_KEY))
        for place, node in (("start", start), ("end", end)):
            if node not in self._nodes:
                raise InvalidRequestError(f"the {place} node {node!r} is unknown; known are {', '.join(self._nodes)}")
        id = id or f"pipeline-{next(self._numbers)}"
        if id in self._pipelines:
            raise ConflictError(f"a pipeline {id!r} exists already; remove it, or take another id")
        spec = made.spec(id, start, end)
        pins = {op.name: op.pin for op in spec.operators if op.pin} | dict(pins or {})
        operators = [
            OperatorView(
                id=f"{id}.{operator.name}",
                name=operator.name,
                kind=operator.kind,
                node=end if operator is spec.operators[-1] else pins.get(operator.name, start),
                state=OperatorState.RUNNING,
                pod=f"{id}.{operator.name}-e1",
                pid=4711,
                epoch=1,
                restarts=0,
                heartbeat_age=0.1,
                stats=StatsView(),
                last_failure=None,
                placement=PlacementView(start, "it was asked for"),
                pin=pins.get(operator.name),
            )
            for operator in spec.operators
        ]
        self._bundles[id] = data
        view = PipelineView(
            id=id,
            phase=Phase.RUNNING,
            reason="",
            created=time.time(),
            start=start,
            end=end,
            codec=spec.codec,
            operators=operators,
            edges=list(spec.edges),
            profile=list(spec.profile),
            warnings=[],
            moves=moves,
        )
        self._pipelines[id] = view
        self._outputs |= {(id, operator.name): Fanout() for operator in operators}
        self._follow[id] = Fanout()
        self._printed[id] = []
        self.happen("pipeline.submitted", f"pipeline {id} was submitted", id)
        return view

    def each_pipeline(self) -> Iterator[PipelineView]:
        return iter(list(self._pipelines.values()))

    def pipeline(self, id: str) -> PipelineView:
        if id not in self._pipelines:
            raise NotFoundError(f"there is no pipeline {id!r}")
        return self._pipelines[id]

    def _key(self, id: str, operator: str) -> tuple[str, str]:
        names = [view.name for view in self.pipeline(id).operators]
        if operator not in names:
            raise NotFoundError(f"pipeline {id!r} has no operator {operator!r}; it has {', '.join(names)}")
        return id, operator

    async def stop(self, id: str) -> PipelineView:
        self.pipeline(id)
        self.finish(id, Phase.STOPPED)
        return self._pipelines[id]

    async def remove(self, id: str) -> None:
        self.finish(id, Phase.STOPPED)
        del self._pipelines[id]

    async def change(
        self, id: str, *, moves: bool | None = None, pins: Mapping[str, str | None] | None = None
    ) -> PipelineView:
        view = self.pipeline(id)
        operators = [replace(op, pin=(pins or {}).get(op.name, op.pin)) for op in view.operators]
        moves = view.moves if moves is None else moves
        self._pipelines[id] = replace(view, operators=operators, moves=moves)
        return self._pipelines[id]

    async def update_profile(self, id: str, profile: Sequence[dict[str, float]]) -> PipelineView:
        view = self.pipeline(id)
        if len(profile) != len(view.operators):
            raise InvalidRequestError(f"{id!r} has {len(view.operators)} operators; give one entry each, in order")
        self._pipelines[id] = replace(view, profile=list(profile))
        return self._pipelines[id]

    def events(self, pipeline: str | None = None, after: int = 0, limit: int = 1000) -> list[EventView]:
        found = [event for event in self._events if event.id > after and pipeline in (None, event.pipeline)]
        return found[-limit:]

    def subscribe_events(self) -> AsyncIterator[EventView]:
        return self._happened.subscribe()

    async def logs(self, id: str, operator: str | None = None, tail: int | None = None) -> list[LogLine]:
        self.pipeline(id)
        found = [line for line in self._printed[id] if operator in (None, line.operator)]
        return found if tail is None else found[len(found) - tail :] if tail else []

    def follow_logs(self, id: str, operator: str | None = None) -> AsyncIterator[LogLine]:
        self.pipeline(id)
        return self._follow[id].subscribe()

    async def set_aside(self, id: str, operator: str) -> list[SetAsideView]:
        return list(self.aside.get(self._key(id, operator), ()))

    async def rerun(self, id: str, operator: str, ids: Sequence[str] | None = None) -> dict[str, Any]:
        return {"ran": (await self.drop(id, operator, ids))["dropped"], "failed": 0}

    async def drop(self, id: str, operator: str, ids: Sequence[str] | None = None) -> dict[str, Any]:
        records = self.aside.get(self._key(id, operator), [])
        chosen = [record for record in records if ids is None or record.id in ids]
        self.aside[id, operator] = [record for record in records if record not in chosen]
        return {"dropped": len(chosen)}

    def last_output(self, id: str, operator: str) -> bytes | None:
        return self._last.get(self._key(id, operator))

    def tail(self, id: str, operator: str) -> AsyncIterator[TailItem]:
        return self._outputs[self._key(id, operator)].subscribe(1000)


@asynccontextmanager
async def serve(master: Master, **options: Any) -> AsyncIterator[str]:
    """The REST interface of `master` at a URL that the block gets."""
    if isinstance(master, FakeMaster):
        master.loop = asyncio.get_running_loop()
    runner = server.runner(webapp.application(master, token=TOKEN, **options))
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@contextmanager
def serve_in_thread(master: FakeMaster, **options: Any) -> Iterator[str]:
    """`serve` from a thread with a loop of its own, for callers that block."""
    started, over = threading.Event(), threading.Event()
    addresses: list[str] = []

    async def run() -> None:
        async with serve(master, **options) as url:
            addresses.append(url)
            started.set()
            await asyncio.to_thread(over.wait)

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    try:
        assert started.wait(10)
        yield addresses[0]
    finally:
        over.set()
        thread.join()
