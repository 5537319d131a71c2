"""The Python client: submit pipelines to a master, watch them, and stop them.

    async with nomad.connect() as cluster:
        pipeline = await cluster.submit([source, square, record], start="edge", end="cloud", id="test")
        async for value in pipeline.outputs("square"):
            ...
        await pipeline.stop()

The master's address is the one given, else NOMAD_MASTER, else http://127.0.0.1:30000; its token and signing
key are found by themselves (see `nomad.credentials`). Every call raises `MasterUnreachable` when no master
answers, and a kind of `RequestError` with the master's own words when it refuses. The synchronous calls of
`nomad.compat` are a thin face of this module.
"""

from __future__ import annotations

import base64
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from nomad import bundle, credentials, program
from nomad.delivery.codec import Codec
from nomad.errors import AuthenticationError, PayloadError, UsageError
from nomad.master.views import (
    BundleView,
    EventView,
    ExplainView,
    LatencyView,
    LinkView,
    LogLine,
    MoveView,
    NodeView,
    OperatorState,
    PipelineView,
)
from nomad.pipeline import Pipeline, build, check_id
from nomad.rest import Rest, view

Operators = Iterable[Callable[..., Any]]
Profile = Sequence[Mapping[str, float]]
DEFAULT_TIMEOUT = 60.0
"""Seconds. Running many set-aside messages again may take the master this long to answer."""


def connect(
    url: str | None = None,
    token: str | None = None,
    *,
    signing_key: bytes | None = None,
    timeout: float = DEFAULT_TIMEOUT,
) -> Cluster:
    """The cluster of the master at `url`, for use in `async with`. Nothing is sent yet.

    Without arguments the address comes from NOMAD_MASTER or is the default of `nomad up`, the token from NOMAD_TOKEN
    and the key that signs operator code from NOMAD_SIGNING_KEY, or both from the credentials file. A call that is
    `timeout` seconds without an answer raises `MasterUnreachable`.
    Raises `UsageError` when `url` isn't an http(s) address.
    """
    address = credentials.master_url(url)
    found = credentials.find(address)
    return Cluster(Rest(address, token or found.token, timeout=timeout), signing_key or found.signing_key)


async def submit(
    operators: Operators | bytes,
    *,
    start: str,
    end: str,
    id: str | None = None,
    codec: str = "data",
    profile: Profile | None = None,
    moves: bool = True,
    pins: Mapping[str, str] | None = None,
    url: str | None = None,
    token: str | None = None,
) -> PipelineHandle:
    """Submit one pipeline and keep no connection: `connect` and `Cluster.submit` in one.

    The handle works like any other; each of its calls makes a connection of its own.
    """
    return await connect(url, token).submit(
        operators, start=start, end=end, id=id, codec=codec, profile=profile, moves=moves, pins=pins
    )


class Cluster:
    """A master, and through it the nodes, links and pipelines it looks after. Made by `connect`.

    Outside `async with` every call makes a connection of its own.
    """

    def __init__(self, rest: Rest, signing_key: bytes | None) -> None:
        self._rest = rest
        self._signing_key = signing_key

    @property
    def url(self) -> str:
        """The master's address."""
        return self._rest.url

    async def __aenter__(self) -> Self:
        await self._rest.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._rest.__aexit__(*exc)

    async def submit(
        self,
        operators: Operators | bytes,
        *,
        start: str,
        end: str,
        id: str | None = None,
        codec: str = "data",
        profile: Profile | None = None,
        moves: bool = True,
        pins: Mapping[str, str] | None = None,
    ) -> PipelineHandle:
        """Run a pipeline: `operators` in their order, or the bytes of a bundle that `nomad bundle` made.

        `start` and `end` are the nodes of the first and the last operator. Without an `id` the master makes one.
        `codec` and `profile` are those of `nomad.pipeline.build`. With `moves=False` Nomad moves no operator by
        itself; `pins` binds operators to nodes, by their names. Returns once the master has accepted the pipeline,
        which then starts. Raises `PipelineError` and `BundleError` for operators that can't be run, `ConflictError`
        when the id is taken, `InvalidRequestError` for an unknown node or when no node is fit for an operator.
        """
        if program.being_loaded():
            raise UsageError(
                "the file submits a pipeline when it is loaded: put that under `if __name__ == '__main__':`"
            )
        if isinstance(operators, (bytes, bytearray, memoryview)):
            if codec != "data" or profile is not None:
                raise UsageError("a bundle holds its codec and its profile already; they can't be given again")
            data = bytes(operators)
        else:
            pipeline = build(operators, codec=codec, profile=profile)
            if self._signing_key is None:
                await self.nodes()  # most likely there is no master at all, which is the better thing to say
            data = self._bundle(pipeline)
        query = {
            "id": None if id is None else check_id(id),
            "start": start,
            "end": end,
            "moves": None if moves else "false",
            "pin": [f"{operator}={node}" for operator, node in (pins or {}).items()],
        }
        answer = await self._rest.upload("pipelines", query=query, data=data, media_type=bundle.MEDIA_TYPE)
        return self._handle(view(PipelineView, answer))

    def bundle(self, operators: Operators, *, codec: str = "data", profile: Profile | None = None) -> bytes:
        """`operators`, packed and signed, as `submit` sends them. Raises `PipelineError` and `BundleError`."""
        return self._bundle(build(operators, codec=codec, profile=profile))

    def _bundle(self, pipeline: Pipeline) -> bytes:
        if self._signing_key is None:
            raise AuthenticationError(
                f"No key is known to sign operator code for {self.url}. "
                + credentials.where_looked("It", "NOMAD_SIGNING_KEY", self.url),
                status=401,
            )
        return bundle.make(pipeline, self._signing_key)

    async def pipelines(self) -> list[PipelineView]:
        """All pipelines, those that are over included until they are removed."""
        return view(list[PipelineView], await self._rest.request("GET", "pipelines"))

    async def pipeline(self, id: str) -> PipelineHandle:
        """The pipeline `id`. Raises `NotFoundError`, and `PipelineError` for the empty one, which has no address."""
        if not id:
            check_id(id)
        return self._handle(view(PipelineView, await self._rest.request("GET", "pipelines", id)))

    def _handle(self, status: PipelineView) -> PipelineHandle:
        return PipelineHandle(self._rest, status)

    async def nodes(self) -> list[NodeView]:
        """The nodes and what is placed on them."""
        return view(list[NodeView], await self._rest.request("GET", "nodes"))

    async def set_node(self, node: str, *, speed: float) -> NodeView:
        """Change a node's emulated speed; 1.0 is a core of the reference machine."""
        return view(NodeView, await self._rest.request("PATCH", "nodes", node, json={"speed": speed}))

    async def lose_node(self, node: str) -> NodeView:
        """Let an emulated node fail: the processes on it are killed, and none is started there."""
        return view(NodeView, await self._rest.request("POST", "nodes", node, "lose"))

    async def restore_node(self, node: str) -> NodeView:
        """Let an emulated node that was lost come back."""
        return view(NodeView, await self._rest.request("POST", "nodes", node, "restore"))

    async def links(self) -> list[LinkView]:
        """The directed links between nodes."""
        return view(list[LinkView], await self._rest.request("GET", "links"))

    async def set_link(
        self,
        source: str,
        target: str,
        *,
        latency: float | None = None,
        jitter: float | None = None,
        bandwidth: float | str | None = None,
        loss: float | None = None,
    ) -> LinkView:
        """Change how the link from `source` to `target` is emulated; pipelines that run feel it at once.

        None leaves a value as it is. Seconds, seconds, bytes per second (or "unlimited"), probability.
        """
        given = {"latency": latency, "jitter": jitter, "bandwidth": bandwidth, "loss": loss}
        body = {name: value for name, value in given.items() if value is not None}
        return view(LinkView, await self._rest.request("PATCH", "links", source, target, json=body))

    async def events(self, *, pipeline: str | None = None, after: int = 0, limit: int = 1000) -> list[EventView]:
        """What happened, oldest first: the newest `limit` events with ids above `after`."""
        query = {"pipeline": pipeline, "after": after, "limit": limit}
        return view(list[EventView], await self._rest.request("GET", "events", query=query))

    async def follow_events(
        self, *, pipeline: str | None = None, after: int | None = None
    ) -> AsyncGenerator[EventView]:
        """Events as they happen; with `after`, first those that are kept and newer than that one."""
        query = {"pipeline": pipeline, "after": after}
        async with self._rest.events("events", query=query) as items:
            async for item in items:
                yield view(EventView, item)


@dataclass(frozen=True, slots=True)
class SetAside:
    """A message whose function raised."""

    id: str
    time: float
    """Seconds since the epoch."""
    error: dict[str, str]
    """type, message, traceback."""
    attempts: int
    value: Any
    """The message; as JSON shows it where this process lacks its class."""


class Rerun(NamedTuple):
    """What became of set-aside messages that were run again."""

    ran: int
    failed: int
    """Of those, how many raised again; they stay set aside."""


class Outputs(AsyncIterator[Any]):
    """Live outputs of one operator, for `async for`. Ends when the pipeline does.

    The master's buffer for a reader is bounded: for one that is too slow it leaves outputs out, and
    `skipped` counts them. (The pipeline itself loses none.)
    """

    def __init__(self, rest: Rest, pipeline: str, operator: str, decode: Callable[[Any], Any]) -> None:
        self.skipped = 0
        self._stack = AsyncExitStack()
        self._items: AsyncIterator[Any] | None = None
        self._stream = rest.events("pipelines", pipeline, "operators", operator, "outputs")
        self._decode = decode

    async def open(self) -> Self:
        """Start listening now instead of at the first step: what is put out from here on is seen."""
        if self._items is None:
            self._items = await self._stack.enter_async_context(self._stream)
        return self

    async def aclose(self) -> None:
        """Stop listening. An iterator that ran to its end, or into an error, is closed already."""
        await self._stack.aclose()

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def __anext__(self) -> Any:
        await self.open()
        assert self._items is not None
        try:
            item = await anext(self._items)
            self.skipped += item["skipped"]
            return self._decode(item)
        except BaseException:
            await self.aclose()
            raise


class PipelineHandle:
    """A pipeline that was submitted. Made by `Cluster.submit` and `Cluster.pipeline`."""

    def __init__(self, rest: Rest, status: PipelineView) -> None:
        self.id = status.id
        self.operators = tuple(operator.name for operator in status.operators)
        """Names, from source to sink."""
        self.last_status = status
        """What the master said last; `status` asks it anew."""
        self._reader = Codec(mode=status.codec)
        self._rest = rest

    def __repr__(self) -> str:
        return f"<pipeline {self.id!r}: {' -> '.join(self.operators)}>"

    @property
    def operator_ids(self) -> list[str]:
        """`id.name` of each operator, from source to sink."""
        return [f"{self.id}.{name}" for name in self.operators]

    async def status(self) -> PipelineView:
        """Where the pipeline stands, and each of its operators."""
        self.last_status = view(PipelineView, await self._rest.request("GET", "pipelines", self.id))
        return self.last_status

    def outputs(self, operator: str, *, decode: bool = True) -> Outputs:
        """The operator's outputs, live, from the first step on until the pipeline is over.

        Classes of the user's own are restored when this process has them. With `decode=False` values are as JSON
        shows them, as `nomad tail` prints them. A pipeline with the codec "pickle" is unpickled here: read only
        those of people whose code you would run.
        """
        return Outputs(self._rest, self.id, operator, self._decode if decode else lambda item: item["value"])

    async def last_output(self, operator: str) -> Any:
        """The operator's last output; None before the first, and when it is larger than 64 KiB."""
        item = await self._rest.request("GET", "pipelines", self.id, "operators", operator, "last-output")
        return None if item is None else self._decode(item)

    def _decode(self, item: dict[str, Any]) -> Any:
        return self._reader.decode_one(base64.b64decode(item["data"]))

    async def wait(self) -> PipelineView:
        """Wait until the pipeline is completed, failed or stopped, and its processes have ended; its last status."""
        async with self._rest.events("events", query={"pipeline": self.id}) as happened:
            status = await self.status()
            # The last counters of an operator come with its process's end.
            while not status.phase.final or any(op.state is OperatorState.STOPPING for op in status.operators):
                await anext(happened)
                status = await self.status()
        return status

    async def change(self, *, moves: bool | None = None, pins: Mapping[str, str | None] | None = None) -> PipelineView:
        """Say what Nomad may do with the operators by itself. None leaves it as it is; a pin of None takes one away."""
        body = {"moves": moves, "pins": None if pins is None else dict(pins)}
        self.last_status = view(PipelineView, await self._rest.request("PATCH", "pipelines", self.id, json=body))
        return self.last_status

    async def explain(self) -> ExplainView:
        """Why its operators are where they are, by what is known now."""
        return view(ExplainView, await self._rest.request("GET", "pipelines", self.id, "explain"))

    async def bundle(self) -> bytes:
        """Its code, signed as it was submitted."""
        found = view(BundleView, await self._rest.request("GET", "pipelines", self.id, "bundle"))
        return base64.b64decode(found.data)

    async def problem(self) -> dict[str, Any]:
        """Its placement problem as it is now, in the form that `nomad.scheduler.plan` takes."""
        return view(dict[str, Any], await self._rest.request("GET", "pipelines", self.id, "problem"))

    async def move(self, operator: str, node: str | None = None) -> MoveView:
        """Order a move of one operator to another node, while the pipeline runs; see `move_status`. Without a node a
        new instance takes its place where it is.

        Raises `NotFoundError`, `InvalidRequestError` and `ConflictError` when it can't be moved there.
        """
        body = {"operator": operator, "node": node}
        return view(MoveView, await self._rest.request("POST", "pipelines", self.id, "moves", json=body))

    async def moves(self) -> list[MoveView]:
        """The pipeline's moves, oldest first."""
        return view(list[MoveView], await self._rest.request("GET", "pipelines", self.id, "moves"))

    async def move_status(self, move: str) -> MoveView:
        """Where a move stands, and what it cost once it is over."""
        return view(MoveView, await self._rest.request("GET", "pipelines", self.id, "moves", move))

    async def wait_for_move(self, move: str) -> MoveView:
        """Wait until a move is done, rolled back or failed."""
        async with self._rest.events("events", query={"pipeline": self.id}) as happened:
            status = await self.move_status(move)
            while not status.state.final:
                await anext(happened)
                status = await self.move_status(move)
        return status

    async def latencies(self, *, after: float = 0.0) -> list[LatencyView]:
        """When messages were done at the last operator, later than `after` (seconds since the epoch), and how long
        they took. The operator keeps the newest few thousand.
        """
        query = {"after": repr(float(after))}
        return view(list[LatencyView], await self._rest.request("GET", "pipelines", self.id, "latencies", query=query))

    async def stop(self) -> PipelineView:
        """Ask the pipeline to stop: its source at once, the others when they have settled what is under way."""
        self.last_status = view(PipelineView, await self._rest.request("POST", "pipelines", self.id, "stop"))
        return self.last_status

    async def remove(self) -> None:
        """Stop the pipeline if it runs, and forget it with all that it kept."""
        await self._rest.request("DELETE", "pipelines", self.id)

    async def logs(self, operator: str | None = None, *, tail: int = 100) -> list[LogLine]:
        """The last `tail` lines that the pipeline, or one operator, printed."""
        query = {"operator": operator, "tail": tail}
        return view(list[LogLine], await self._rest.request("GET", "pipelines", self.id, "logs", query=query))

    async def follow_logs(self, operator: str | None = None, *, tail: int = 0) -> AsyncGenerator[LogLine]:
        """The last `tail` lines, then lines as they are printed, until the pipeline is over."""
        query = {"operator": operator, "tail": tail}
        async with self._rest.events("pipelines", self.id, "logs", query=query) as items:
            async for item in items:
                yield view(LogLine, item)

    async def set_aside(self, operator: str, *, decode: bool = True) -> list[SetAside]:
        """The messages whose function raised, each with its traceback. `decode` is as for `outputs`."""
        read = self._decode_or_show if decode else lambda item: item["value"]
        items = await self._rest.request("GET", *self._aside(operator))
        return [SetAside(item["id"], item["time"], item["error"], item["attempts"], read(item)) for item in items]

    async def rerun(self, operator: str, ids: Sequence[str] | None = None) -> Rerun:
        """Run set-aside messages again, all of them or those with `ids`; those that succeed go on their way."""
        body = {"ids": None if ids is None else list(ids)}
        answer = await self._rest.request("POST", *self._aside(operator), "rerun", json=body)
        return Rerun(answer["ran"], answer["failed"])

    async def drop(self, operator: str, ids: Sequence[str] | None = None) -> int:
        """Drop set-aside messages for good, all of them or those with `ids`; how many there were."""
        query = {"id": None if ids is None else list(ids)}
        answer = await self._rest.request("DELETE", *self._aside(operator), query=query)
        return int(answer["dropped"])

    def _aside(self, operator: str) -> tuple[str, ...]:
        return ("pipelines", self.id, "operators", operator, "set-aside")

    def _decode_or_show(self, item: dict[str, Any]) -> Any:
        try:
            return self._decode(item)
        except PayloadError:
            return item["value"]

    async def profile(self) -> list[dict[str, float]]:
        """What is expected of each operator, in order (`cloud_execution_time`, `output_msg_size`)."""
        entries: list[dict[str, float | None]] = await self._rest.request("GET", "pipelines", self.id, "profile")
        return [{name: value for name, value in entry.items() if value is not None} for entry in entries]

    async def set_profile(self, profile: Profile) -> None:
        """Say what is expected of each operator, in order."""
        await self._rest.request("PUT", "pipelines", self.id, "profile", json=[dict(entry) for entry in profile])
