"""The REST interface: every endpoint, over the `Master` facade and nothing else.

Handlers are plain: their types (`forms`, `views`) are the contract (see `http.routing`), their docstrings the summaries
in /openapi.json, what they raise becomes a problem document. State changes by POST, PUT, PATCH and DELETE only.
`webapp` serves them.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Iterable
from typing import Annotated, Any

from pydantic import Field

from nomad import scheduler
from nomad.delivery import codec
from nomad.errors import InvalidRequestError, NotFoundError, RequestError
from nomad.master import views
from nomad.master.app import Master
from nomad.master.rest.forms import (
    Chosen,
    Dropped,
    EventId,
    Health,
    LinkChange,
    MessageId,
    MoveForm,
    NodeChange,
    Operator,
    OutputView,
    Pin,
    PipelineChange,
    PipelineId,
    PipelinePlan,
    PlanView,
    ProfileEntry,
    Rerun,
    SetAsideMessage,
    ValueView,
)
from nomad.master.rest.http import sse
from nomad.master.rest.http.routing import Routes
from nomad.scheduler.problem import ProblemForm
from nomad.tasks import Turns

PREFIX = "/api/v1"
BUNDLE = "application/vnd.nomad.bundle"

api = Routes(PREFIX)
health = Routes()


# -- nodes and links


@api("GET", "/nodes", tag="cluster")
def list_nodes(master: Master) -> Iterable[views.NodeView]:
    """The nodes and what is placed on them."""
    return master.each_node()


@api("GET", "/nodes/{node}", tag="cluster", raises=(404,))
def get_node(master: Master, node: str) -> views.NodeView:
    """One node."""
    return master.node(node)


@api("PATCH", "/nodes/{node}", tag="cluster", raises=(404, 409))
async def change_node(master: Master, node: str, body: NodeChange) -> views.NodeView:
    """Change how fast an emulated node is."""
    return await master.update_node(node, speed=body.speed)


@api("POST", "/nodes/{node}/lose", tag="cluster", raises=(404, 409))
async def lose_node(master: Master, node: str) -> views.NodeView:
    """Let an emulated node fail: the processes on it are killed, and none is started there until it is restored."""
    return await master.lose_node(node)


@api("POST", "/nodes/{node}/restore", tag="cluster", raises=(404, 409))
async def restore_node(master: Master, node: str) -> views.NodeView:
    """Let an emulated node that was lost come back."""
    return await master.restore_node(node)


@api("GET", "/links", tag="cluster")
def list_links(master: Master) -> Iterable[views.LinkView]:
    """The directed links between nodes: what is declared, and what is measured."""
    return master.each_link()


@api("GET", "/links/{source}/{target}", tag="cluster", raises=(404,))
async def get_link(master: Master, source: str, target: str) -> views.LinkView:
    """One directed link."""
    turns = Turns()
    for link in master.each_link():
        await turns.give()
        if (link.source, link.target) == (source, target):
            return link
    raise NotFoundError(f"there is no link from {source!r} to {target!r}")


@api("PATCH", "/links/{source}/{target}", tag="cluster", raises=(404, 409))
async def change_link(master: Master, source: str, target: str, body: LinkChange) -> views.LinkView:
    """Change how a directed link is emulated; pipelines that run feel it at once."""
    unlimited = body.bandwidth == "unlimited"
    return await master.set_link(
        source,
        target,
        latency=body.latency,
        jitter=body.jitter,
        bandwidth=None if isinstance(body.bandwidth, str) else body.bandwidth,
        loss=body.loss,
        unlimited=unlimited,
    )


# -- placement


@api("POST", "/plans", tag="cluster")
async def make_plan(master: Master, body: ProblemForm) -> PlanView:
    """Place the operators of a problem, which needn't be about this cluster; nothing is started or moved."""
    answer = await asyncio.to_thread(scheduler.plan, body)
    pipelines = {id: PipelinePlan(**plan) for id, plan in answer.pop("pipelines", {}).items()}
    return PlanView(**answer, pipelines=pipelines or None)


# -- pipelines


@api(
    "POST",
    "/pipelines",
    tag="pipelines",
    status=201,
    raises=(409,),
    body_types=(BUNDLE, "application/octet-stream"),
    location="/pipelines/{0.id}",
)
async def submit_pipeline(
    master: Master,
    body: bytes,
    start: str,
    end: str,
    id: PipelineId | None = None,
    moves: bool = True,
    pin: list[Pin] | None = None,
) -> views.PipelineView:
    """Run a pipeline: the body is a bundle, as `nomad bundle FILE` makes it.

    `start` and `end` are the nodes of the first and the last operator. Without an id the pipeline gets one. With
    `moves=false` Nomad moves no operator by itself. Each `pin` binds one operator to a node.
    """
    return await master.submit(body, id=id, start=start, end=end, moves=moves, pins=_pins(pin or []))


@api("GET", "/pipelines", tag="pipelines")
def list_pipelines(master: Master) -> Iterable[views.PipelineView]:
    """All pipelines, those that are over included until they are removed."""
    return master.each_pipeline()


@api("GET", "/pipelines/{pipeline}", tag="pipelines", raises=(404,))
def get_pipeline(master: Master, pipeline: str) -> views.PipelineView:
    """One pipeline: where it stands, and each of its operators."""
    return master.pipeline(pipeline)


@api("PATCH", "/pipelines/{pipeline}", tag="pipelines", raises=(404, 409))
async def change_pipeline(master: Master, pipeline: str, body: PipelineChange) -> views.PipelineView:
    """Say what Nomad may do with a pipeline's operators by itself."""
    return await master.change(pipeline, moves=body.moves, pins=body.pins)


@api("DELETE", "/pipelines/{pipeline}", tag="pipelines", raises=(404, 409))
async def remove_pipeline(master: Master, pipeline: str) -> None:
    """Stop a pipeline if it runs, and forget it with all that it kept."""
    await master.remove(pipeline)


@api("POST", "/pipelines/{pipeline}/stop", tag="pipelines", raises=(404, 409))
async def stop_pipeline(master: Master, pipeline: str) -> views.PipelineView:
    """Stop a pipeline: its source at once, the others when they have settled what was under way."""
    return await master.stop(pipeline)


@api("GET", "/pipelines/{pipeline}/explain", tag="pipelines", raises=(404,))
async def explain_pipeline(master: Master, pipeline: str) -> views.ExplainView:
    """Why each operator is where it is, what is predicted and measured, and what the last look at it decided."""
    return await master.explain(pipeline)


@api("GET", "/pipelines/{pipeline}/problem", tag="pipelines", raises=(404,))
def get_problem(master: Master, pipeline: str) -> ProblemForm:
    """Its placement problem as it is now, to be kept, changed and asked again: POST /plans, `nomad plan`."""
    return ProblemForm.model_validate(master.problem(pipeline))


@api("GET", "/pipelines/{pipeline}/bundle", tag="pipelines", raises=(404,))
async def get_bundle(master: Master, pipeline: str) -> views.BundleView:
    """Its code, signed as it was submitted: to be kept, or submitted elsewhere."""
    return await master.bundle(pipeline)


@api("GET", "/pipelines/{pipeline}/profile", tag="pipelines", raises=(404,))
def get_profile(master: Master, pipeline: str) -> list[ProfileEntry]:
    """What is expected of each operator, in order; empty where nothing is."""
    return [ProfileEntry.model_validate(entry) for entry in master.pipeline(pipeline).profile]


@api("PUT", "/pipelines/{pipeline}/profile", tag="pipelines", raises=(404,))
async def replace_profile(master: Master, pipeline: str, body: list[ProfileEntry]) -> list[ProfileEntry]:
    """Say what is expected of each operator, in order."""
    await master.update_profile(pipeline, [entry.model_dump(exclude_none=True) for entry in body])
    return get_profile(master, pipeline)


@api("GET", "/pipelines/{pipeline}/latencies", tag="pipelines", raises=(404, 409, 503))
async def get_latencies(
    master: Master, pipeline: str, after: Annotated[float, Field(allow_inf_nan=False)] = 0.0
) -> list[views.LatencyView]:
    """When messages were done at the last operator, and how long they took; the newest ones, later than `after`."""
    return await master.latencies(pipeline, after)


# -- moves


@api(
    "POST",
    "/pipelines/{pipeline}/moves",
    tag="moves",
    status=201,
    raises=(404, 409),
    location="/pipelines/{0.pipeline}/moves/{0.id}",
)
async def order_move(master: Master, pipeline: str, body: MoveForm) -> views.MoveView:
    """Move one operator to another node while the pipeline runs.

    The answer comes at once; the move is done, rolled back or failed once its `state` says so.
    """
    return await master.move(pipeline, body.operator, body.node)


@api("GET", "/pipelines/{pipeline}/moves", tag="moves", raises=(404,))
def list_moves(master: Master, pipeline: str) -> list[views.MoveView]:
    """The moves of a pipeline, oldest first: those under way, and past ones."""
    return master.moves(pipeline)


@api("GET", "/pipelines/{pipeline}/moves/{move}", tag="moves", raises=(404,))
def get_move(master: Master, pipeline: str, move: str) -> views.MoveView:
    """One move: where it stands, and what it cost."""
    return master.move_status(pipeline, move)


# -- operators


@api("GET", "/pipelines/{pipeline}/operators", tag="operators", raises=(404,))
def list_operators(master: Master, pipeline: str) -> list[views.OperatorView]:
    """The operators of a pipeline, from source to sink."""
    return master.pipeline(pipeline).operators


@api("GET", "/pipelines/{pipeline}/operators/{operator}", tag="operators", raises=(404,))
def get_operator(master: Master, pipeline: str, operator: Operator) -> views.OperatorView:
    """One operator: where it runs and why there, its counters, its last failure."""
    operators = {view.name: view for view in master.pipeline(pipeline).operators}
    if operator not in operators:
        raise NotFoundError(f"pipeline {pipeline!r} has no operator {operator!r}; it has {', '.join(operators)}")
    return operators[operator]


@api("GET", "/pipelines/{pipeline}/operators/{operator}/last-output", tag="operators", raises=(404,))
def get_last_output(master: Master, pipeline: str, operator: Operator) -> ValueView | None:
    """The operator's last output; null before the first one, and when it is larger than 64 KiB."""
    data = master.last_output(pipeline, operator)
    return None if data is None else ValueView(**_shown(data, _is_pickled(master, pipeline)))


@api("GET", "/pipelines/{pipeline}/operators/{operator}/outputs", tag="operators", raises=(404,))
def follow_outputs(master: Master, pipeline: str, operator: Operator) -> AsyncIterator[OutputView]:
    """Live outputs of an operator, from now on and until the pipeline is over."""
    pickled = _is_pickled(master, pipeline)
    items = master.tail(pipeline, operator)  # raises here, before the stream's status is sent
    return _outputs(items, pickled)


async def _outputs(items: AsyncIterator[views.TailItem], pickled: bool) -> AsyncIterator[OutputView]:
    async with sse.ending(items):
        async for item in items:
            yield OutputView(**_shown(item.value, pickled), skipped=item.skipped)


@api("GET", "/pipelines/{pipeline}/operators/{operator}/set-aside", tag="operators", raises=(404, 409, 503))
async def list_set_aside(master: Master, pipeline: str, operator: Operator) -> list[SetAsideMessage]:
    """The messages whose function raised, each with its traceback."""
    records = await master.set_aside(pipeline, operator)
    pickled = _is_pickled(master, pipeline)
    return [
        SetAsideMessage(item.id, item.time, item.error, item.attempts, **_shown(item.value, pickled))
        for item in records
    ]


@api("POST", "/pipelines/{pipeline}/operators/{operator}/set-aside/rerun", tag="operators", raises=(404, 409, 503))
async def rerun_set_aside(master: Master, pipeline: str, operator: Operator, body: Chosen) -> Rerun:
    """Run set-aside messages again; those that succeed go on their way."""
    return Rerun(**await master.rerun(pipeline, operator, body.ids))


@api("DELETE", "/pipelines/{pipeline}/operators/{operator}/set-aside", tag="operators", raises=(404, 409, 503))
async def drop_set_aside(
    master: Master, pipeline: str, operator: Operator, id: list[MessageId] | None = None
) -> Dropped:
    """Drop set-aside messages for good: those whose `id` is given, else all."""
    return Dropped(**await master.drop(pipeline, operator, id))


# -- what happened


async def follow_events(
    master: Master, pipeline: str | None = None, after: EventId | None = None, limit: int = 0
) -> AsyncIterator[views.EventView]:
    """Events from now on; with `after`, first those that are kept and newer than that one."""
    seen = 0
    async with sse.ending(master.subscribe_events()) as live:
        for event in [] if after is None else master.events(pipeline, after, limit):
            seen = event.id
            yield event
        async for event in live:
            if event.id > seen and pipeline in (None, event.pipeline):
                yield event


@api("GET", "/events", tag="history", stream=follow_events)
def list_events(
    master: Master,
    pipeline: str | None = None,
    after: EventId | None = None,
    limit: Annotated[int, Field(ge=1, le=10_000)] = 1000,
) -> list[views.EventView]:
    """What happened, oldest first: the newest `limit` events with ids above `after`."""
    return master.events(pipeline, after or 0, limit)


async def follow_logs(
    master: Master, pipeline: str, operator: str | None = None, tail: int = 0
) -> AsyncIterator[views.LogLine]:
    """The last `tail` lines, then lines as they are printed, until the pipeline is over."""
    for line in await master.logs(pipeline, operator, tail) if tail else []:
        yield line
    async with sse.ending(master.follow_logs(pipeline, operator)) as lines:
        async for line in lines:
            yield line


@api("GET", "/pipelines/{pipeline}/logs", tag="history", raises=(404,), stream=follow_logs)
async def get_logs(
    master: Master,
    pipeline: str,
    operator: str | None = None,
    tail: Annotated[int, Field(ge=0, le=100_000)] = 100,
) -> list[views.LogLine]:
    """The last `tail` lines that the pods of a pipeline, or of one operator, printed."""
    return await master.logs(pipeline, operator, tail)


# -- operations


@health("GET", "/healthz", tag="operations")
def get_health(master: Master) -> Health:
    """Whether the process answers."""
    return Health()


@health("GET", "/readyz", tag="operations", raises=(503,))
def get_readiness(master: Master) -> Health:
    """Whether the master has its state and its loop runs."""
    if not master.ready:
        raise RequestError("The master isn't ready yet.", status=503)
    return Health()


@health("GET", "/metrics", tag="operations", media_type="text/plain; version=0.0.4; charset=utf-8")
async def get_metrics(master: Master) -> bytes:
    """All metrics, for Prometheus."""
    return await master.metrics()


def _pins(given: list[str]) -> dict[str, str]:
    pins: dict[str, str] = {}
    for name, _, node in (pin.partition("=") for pin in given):
        if pins.setdefault(name, node) != node:
            raise InvalidRequestError(f"operator {name!r} is pinned to {pins[name]} and to {node}", status=422)
    return pins


def _is_pickled(master: Master, pipeline: str) -> bool:
    return master.pipeline(pipeline).codec == "pickle"


def _shown(data: bytes, pickled: bool) -> dict[str, Any]:
    """An encoded message as the fields `value` and `data`. A pickle is never opened here."""
    value = {"$pickle": len(data)} if pickled else codec.to_jsonable(data)
    return {"value": value, "data": base64.b64encode(data).decode()}
