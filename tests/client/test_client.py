"""The asynchronous client against the REST interface: every call, and every way in which it can go wrong."""

from __future__ import annotations

import asyncio
import gc
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
from aiohttp import web

import nomad
from nomad import bundle, credentials
from nomad.client import Cluster, Outputs, PipelineHandle, connect, submit
from nomad.errors import (
    AuthenticationError,
    BundleError,
    ConflictError,
    InvalidRequestError,
    MasterUnreachable,
    NotFoundError,
    PayloadError,
    PipelineError,
    RequestError,
    UsageError,
)
from nomad.master.views import MoveState, OperatorState, Phase, PipelineView
from nomad.pipeline import build
from nomad.rest import view
from tests.master.facade import SIGNING_KEY, TOKEN, FakeMaster
from tests.ports import free_port


@dataclass
class Point:
    x: int


LOCK = threading.Lock()


def numbers() -> int:
    return 4


def square(x: int) -> int:
    return x * x


async def submitted(cluster: Cluster, id: str = "test", **options: Any) -> PipelineHandle:
    return await cluster.submit([numbers, square], start="edge", end="cloud", id=id, **options)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


# -- submitting


async def test_submit_gives_a_handle(cluster: Cluster) -> None:
    pipeline = await submitted(cluster)
    assert pipeline.id == "test"
    assert pipeline.operators == ("numbers", "square")
    assert pipeline.operator_ids == ["test.numbers", "test.square"]
    assert repr(pipeline) == "<pipeline 'test': numbers -> square>"
    status = await pipeline.status()
    assert isinstance(status, PipelineView)
    assert status.phase is Phase.RUNNING
    assert status.edges == [("numbers", "square")]
    assert status.operators[1].node == "cloud"
    assert [view.id for view in await cluster.pipelines()] == ["test"]
    assert (await cluster.pipeline("test")).operators == pipeline.operators


async def test_the_master_names_what_has_no_id(cluster: Cluster) -> None:
    pipeline = await cluster.submit([numbers, square], start="edge", end="cloud")
    assert pipeline.id
    assert pipeline.operator_ids[0] == f"{pipeline.id}.numbers"


async def test_a_bundle_is_submitted_as_it_is(cluster: Cluster) -> None:
    made = cluster.bundle([numbers, square], codec="pickle")
    assert (await (await cluster.submit(made, start="edge", end="cloud", id="a")).status()).codec == "pickle"
    with pytest.raises(UsageError, match="a bundle holds its codec"):
        await cluster.submit(made, start="edge", end="cloud", codec="pickle")


async def test_a_large_bundle_is_sent(cluster: Cluster) -> None:
    table = "x" * (3 << 20)
    pipeline = await cluster.submit([numbers, lambda x: len(table)], start="edge", end="cloud")
    assert pipeline.operators == ("numbers", "lambda")


async def test_one_shot(url: str) -> None:
    pipeline = await submit([numbers, square], start="edge", end="cloud", id="one", url=url)
    assert (await pipeline.status()).phase is Phase.RUNNING
    await pipeline.remove()


async def test_the_address_comes_from_the_environment(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOMAD_MASTER", url)
    pipeline = await nomad.submit([numbers, square], start="edge", end="cloud", id="one")
    assert (await pipeline.status()).id == "one"


@pytest.mark.parametrize(
    ("operators", "kind", "message"),
    [
        ([], PipelineError, "the list of operators is empty"),
        ([numbers], PipelineError, "a pipeline needs at least a source and a sink"),
        ([numbers, 7], PipelineError, "position 2 of 2"),
        ([square, square], PipelineError, "position 1 of 2"),
        ([numbers, lambda x, y: x], PipelineError, "position 2 of 2"),
        ([numbers, lambda x: LOCK], BundleError, "operator 'lambda'"),
    ],
)
async def test_operators_that_cant_run_arent_sent(
    cluster: Cluster, master: FakeMaster, operators: list[Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        await cluster.submit(operators, start="edge", end="cloud")
    assert master.pipelines() == []


async def test_unknown_nodes_and_ids(cluster: Cluster, master: FakeMaster) -> None:
    with pytest.raises(InvalidRequestError, match="the end node 'moon' is unknown; known are edge, fog, cloud"):
        await cluster.submit([numbers, square], start="edge", end="moon")
    with pytest.raises(PipelineError, match="can't be the id of a pipeline"):
        await cluster.submit([numbers, square], start="edge", end="cloud", id="a b")
    with pytest.raises(PipelineError, match="'' can't be the id of a pipeline"):
        await cluster.pipeline("")
    assert master.pipelines() == []


async def test_a_duplicate_id(cluster: Cluster) -> None:
    await submitted(cluster)
    with pytest.raises(ConflictError, match="a pipeline 'test' exists already") as caught:
        await submitted(cluster)
    assert caught.value.status == 409
    assert caught.value.problem["type"] == "urn:nomad:problem:conflict-error"


async def test_bundles_that_are_refused(cluster: Cluster, master: FakeMaster) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await cluster.submit(b"no bundle", start="edge", end="cloud")
    assert caught.value.problem["type"] == "urn:nomad:problem:bundle-error"
    foreign = bundle.make(build([numbers, square]), bytes(32))
    with pytest.raises(InvalidRequestError, match="NOMAD_SIGNING_KEY") as caught:
        await cluster.submit(foreign, start="edge", end="cloud")
    assert caught.value.problem["type"] == "urn:nomad:problem:bundle-tampered"
    assert master.pipelines() == []


# -- who asks, and whom


async def test_a_wrong_token_says_where_tokens_are_looked_for(url: str) -> None:
    with pytest.raises(AuthenticationError) as caught:
        await connect(url, token="wrong").nodes()
    assert "The token is not this master's." in str(caught.value)
    assert "NOMAD_TOKEN" in str(caught.value)
    assert str(credentials.credentials_path()) in str(caught.value)
    assert f"for a master on Kubernetes, `nomad login --kubernetes --url {url}`)." in str(caught.value)


async def test_a_missing_token_says_where_tokens_are_looked_for(url: str) -> None:
    credentials.credentials_path().unlink()
    with pytest.raises(AuthenticationError, match="NOMAD_TOKEN"):
        await connect(url).nodes()


async def test_a_missing_signing_key_says_where_it_is_looked_for(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    credentials.credentials_path().unlink()
    monkeypatch.setenv("NOMAD_TOKEN", TOKEN)
    with pytest.raises(AuthenticationError, match="NOMAD_SIGNING_KEY"):
        await submitted(connect(url))
    monkeypatch.setenv("NOMAD_SIGNING_KEY", SIGNING_KEY.hex())
    assert (await submitted(connect(url))).id == "test"


async def test_no_master_says_what_to_run() -> None:
    port = free_port()
    with pytest.raises(MasterUnreachable) as caught:
        await connect(f"http://127.0.0.1:{port}").nodes()
    assert f"No master answers at http://127.0.0.1:{port} (connection refused). " in str(caught.value)
    assert f"`nomad up --node edge --node cloud --port {port}`" in str(caught.value)
    assert isinstance(caught.value, ConnectionError)


async def test_no_master_elsewhere_asks_for_the_address() -> None:
    """Nothing that is started here would be there."""
    with pytest.raises(MasterUnreachable) as caught:
        await connect("http://nomad.invalid:30000").nodes()
    assert str(caught.value) == (
        "No master answers at http://nomad.invalid:30000 (there is no address for the name nomad.invalid). "
        "Is that where it is (NOMAD_MASTER or --master), and can it be reached from here? "
        "On Kubernetes `kubectl --namespace nomad get pods` shows whether it runs."
    )


@pytest.mark.parametrize(
    "url", ["", "ftp://x", "127.0.0.1:30000", "http://", "http://u:p@x", "http://x:99999", "http://[x"]
)
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(UsageError, match="must look like http://127.0.0.1:30000"):
        connect(url)


@asynccontextmanager
async def answering(status: int, body: bytes, content_type: str) -> AsyncIterator[str]:
    """Something that answers every request like this."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(status=status, headers={"Content-Type": content_type})
        await response.prepare(request)
        await response.write(body)
        return response

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("status", [200, 302, 404, 502])
async def test_something_else_on_the_port(status: int) -> None:
    async with answering(status, b"<html>", "text/html") as url:
        with pytest.raises(MasterUnreachable, match=f"is no Nomad master \\(status {status}, text/html\\)"):
            await connect(url).nodes()


async def test_an_error_without_a_detail() -> None:
    async with answering(503, b"{}", "application/problem+json") as url:
        with pytest.raises(RequestError, match="Service Unavailable"):
            await connect(url).nodes()


async def test_json_that_is_broken() -> None:
    async with answering(200, b"{", "application/json") as url:
        with pytest.raises(MasterUnreachable, match="is no Nomad master"):
            await connect(url).nodes()


async def test_a_silent_master_is_given_up() -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        with pytest.raises(MasterUnreachable, match="is silent"):
            await connect(f"http://127.0.0.1:{deaf.getsockname()[1]}", timeout=0.05).nodes()


async def test_a_master_that_breaks_off() -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n[")
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
        with pytest.raises(MasterUnreachable, match="broke"):
            await connect(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}").nodes()


# -- nodes, links, events


async def test_nodes_and_links(cluster: Cluster) -> None:
    assert [node.id for node in await cluster.nodes()] == ["edge", "fog", "cloud"]
    assert (await cluster.set_node("edge", speed=0.25)).speed == 0.25
    link = await cluster.set_link("edge", "cloud", latency=0.08, bandwidth=1.25e6)
    assert (link.latency, link.bandwidth) == (0.08, 1.25e6)
    assert (await cluster.set_link("edge", "cloud", bandwidth="unlimited")).bandwidth is None
    assert {(link.source, link.target): link.latency for link in await cluster.links()}["edge", "cloud"] == 0.08
    with pytest.raises(InvalidRequestError, match="body.latency: input should be greater than or equal to 0"):
        await cluster.set_link("edge", "cloud", latency=-1)
    with pytest.raises(NotFoundError, match="there is no node 'a/b'"):
        await cluster.set_node("a/b", speed=1)


async def test_nodes_that_are_lost_and_restored(cluster: Cluster) -> None:
    assert not (await cluster.lose_node("fog")).ready
    assert [node.id for node in await cluster.nodes() if not node.ready] == ["fog"]
    assert (await cluster.restore_node("fog")).ready
    with pytest.raises(NotFoundError):
        await cluster.lose_node("moon")


async def test_pins_and_moves_are_submitted_and_changed(cluster: Cluster) -> None:
    handle = await submitted(cluster, moves=False, pins={"square": "cloud"})
    assert not handle.last_status.moves
    assert [op.pin for op in handle.last_status.operators] == [None, "cloud"]
    status = await handle.change(moves=True, pins={"square": None})
    assert status.moves
    assert status.operators[1].pin is None
    assert (await handle.change()) == status
    for pins in ({"square": ""}, {"": "cloud"}):
        with pytest.raises(InvalidRequestError):
            await submitted(cluster, id="other", pins=pins)


async def test_a_move_is_ordered_and_waited_for(cluster: Cluster, master: FakeMaster) -> None:
    handle = await submitted(cluster)
    ordered = await handle.move("square", "fog")
    assert (ordered.state, ordered.operator, ordered.target) == (MoveState.PLANNED, "square", "fog")
    waiting = asyncio.create_task(handle.wait_for_move(ordered.id))
    await until(lambda: len(master._happened) == 1)
    master.end_move("test")
    done = await waiting
    assert (done.state, done.pause, done.lost, done.doubled) == (MoveState.DONE, 0.012, 0, 0)
    assert done.phases[0].name == "starting"
    assert await handle.moves() == [done]
    assert await handle.move_status(done.id) == done
    with pytest.raises(NotFoundError):
        await handle.move("cube", "fog")
    with pytest.raises(NotFoundError):
        await handle.move_status("m0")


async def test_latencies(cluster: Cluster) -> None:
    handle = await submitted(cluster)
    assert [(item.time, item.latency) for item in await handle.latencies()] == [(1.5, 0.25), (2.5, 0.125)]
    assert [item.time for item in await handle.latencies(after=1.5)] == [2.5]


async def test_events(cluster: Cluster, master: FakeMaster) -> None:
    await submitted(cluster, "one")
    kept = await cluster.events()
    assert [event.kind for event in kept] == ["pipeline.submitted"]
    assert await cluster.events(after=kept[-1].id) == []
    seen = []
    follow = cluster.follow_events(after=0)
    async for event in follow:
        seen.append(event.message)
        if len(seen) == 1:
            master.finish("one")
        else:
            break
    await follow.aclose()  # type: ignore[attr-defined]
    assert seen == ["pipeline one was submitted", "pipeline one is completed"]


# -- a pipeline


async def test_outputs_until_the_pipeline_is_over(cluster: Cluster, master: FakeMaster) -> None:
    pipeline = await submitted(cluster)
    outputs = await pipeline.outputs("square").open()
    await until(lambda: master.readers("test", "square") == 1)
    for value in (16, (1, b"\x00"), Point(3)):
        master.emit("test", "square", value)
    master.emit("test", "square", "late", skipped=7)
    master.finish("test")
    assert [value async for value in outputs] == [16, (1, b"\x00"), Point(3), "late"]
    assert outputs.skipped == 7


async def test_outputs_of_megabytes(cluster: Cluster, master: FakeMaster) -> None:
    pipeline = await submitted(cluster)
    outputs = await pipeline.outputs("square").open()
    await until(lambda: master.readers("test", "square") == 1)
    master.emit("test", "square", b"x" * (3 << 20))
    assert len(await anext(outputs)) == 3 << 20
    await outputs.aclose()


async def test_outputs_as_json(cluster: Cluster, master: FakeMaster) -> None:
    pipeline = await submitted(cluster)
    async with pipeline.outputs("square", decode=False) as outputs:
        await until(lambda: master.readers("test", "square") == 1)
        master.emit("test", "square", b"x")
        assert await anext(outputs) == {"$bytes": "eA=="}


async def test_outputs_that_are_left_early_leave_nothing(cluster: Cluster, master: FakeMaster) -> None:
    pipeline = await submitted(cluster)
    async with pipeline.outputs("square") as outputs:
        await until(lambda: master.readers("test", "square") == 1)
        master.emit("test", "square", 1)
        async for value in outputs:
            assert value == 1
            break


async def test_outputs_that_are_just_dropped_leave_nothing(
    cluster: Cluster, master: FakeMaster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nomad.master.rest.http.sse.KEEP_ALIVE", 0.01)
    pipeline = await submitted(cluster)

    async def first() -> object:
        async for value in pipeline.outputs("square"):
            return value
        return None

    reading = asyncio.create_task(first())
    await until(lambda: master.readers("test", "square") == 1)
    master.emit("test", "square", 1)
    assert await reading == 1
    del reading
    gc.collect()
    await until(lambda: master.readers("test", "square") == 0)


async def test_a_class_that_isnt_here(cluster: Cluster, master: FakeMaster, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = await submitted(cluster)
    master.emit("test", "square", Point(3))
    master.put_aside("test", "square", Point(4))
    monkeypatch.delitem(globals(), "Point")
    with pytest.raises(PayloadError, match="Point"):
        await pipeline.last_output("square")
    (record,) = await pipeline.set_aside("square")
    assert record.value["x"] == 4


async def test_a_pipeline_with_pickles(cluster: Cluster, master: FakeMaster) -> None:
    pipeline = await submitted(cluster, codec="pickle")
    master.emit("test", "square", 1 + 2j)
    assert await pipeline.last_output("square") == 1 + 2j


async def test_last_output(cluster: Cluster, master: FakeMaster) -> None:
    pipeline = await submitted(cluster)
    assert await pipeline.last_output("square") is None
    master.emit("test", "square", 16)
    assert await pipeline.last_output("square") == 16


async def test_an_unknown_operator(cluster: Cluster) -> None:
    pipeline = await submitted(cluster)
    with pytest.raises(NotFoundError, match="has no operator 'nope'; it has numbers, square"):
        await anext(pipeline.outputs("nope"))
    with pytest.raises(NotFoundError, match="has no operator 'nope'"):
        await pipeline.last_output("nope")


async def test_a_stream_that_breaks_off_isnt_an_end() -> None:
    item = b'data: {"value": 1, "data": "AQ==", "skipped": 0}\n\n'
    async with answering(200, item, "text/event-stream") as url:
        outputs = Outputs(connect(url)._rest, "test", "square", lambda item: item["value"])
        assert await anext(outputs) == 1
        with pytest.raises(MasterUnreachable, match="broke off"):
            await anext(outputs)


async def test_wait(cluster: Cluster, master: FakeMaster) -> None:
    pipeline = await submitted(cluster)
    waiting = asyncio.create_task(pipeline.wait())
    await until(lambda: len(master._happened) == 1)
    master.happen("operator.restarting", "square died", "test")
    master.finish("test", Phase.FAILED, "square kept dying")
    status = await waiting
    assert (status.phase, status.reason) == (Phase.FAILED, "square kept dying")
    assert (await pipeline.wait()).phase is Phase.FAILED


async def test_wait_waits_for_the_last_counters(cluster: Cluster, master: FakeMaster) -> None:
    pipeline = await submitted(cluster)
    running = master.pipeline("test")
    ending = replace(running.operators[-1], state=OperatorState.STOPPING)
    master._pipelines["test"] = replace(running, phase=Phase.COMPLETED, operators=[*running.operators[:-1], ending])
    waiting = asyncio.create_task(pipeline.wait())
    await until(lambda: len(master._happened) == 1)
    master.happen("operator.stopped", "another has ended", "test")
    ended = replace(ending, state=OperatorState.FINISHED, stats=replace(ending.stats, set_aside=5))
    master._pipelines["test"] = replace(running, phase=Phase.COMPLETED, operators=[*running.operators[:-1], ended])
    master.happen("operator.stopped", "square has ended", "test")
    assert (await waiting).operators[-1].stats.set_aside == 5


async def test_stop_and_remove(cluster: Cluster) -> None:
    pipeline = await submitted(cluster)
    assert (await pipeline.stop()).phase is Phase.STOPPED
    await pipeline.remove()
    with pytest.raises(NotFoundError, match="there is no pipeline 'test'"):
        await pipeline.status()


async def test_logs(cluster: Cluster, master: FakeMaster) -> None:
    pipeline = await submitted(cluster)
    master.print("test", "numbers", "hello")
    master.print("test", "square", "world")
    assert [line.line for line in await pipeline.logs()] == ["hello", "world"]
    assert [line.line for line in await pipeline.logs("square", tail=1)] == ["world"]
    seen = []
    async for line in pipeline.follow_logs(tail=1):
        seen.append(line.line)
        if len(seen) == 1:
            master.print("test", "square", "again")
            master.finish("test")
    assert seen == ["world", "again"]


async def test_set_aside(cluster: Cluster, master: FakeMaster) -> None:
    pipeline = await submitted(cluster)
    first, second, _ = (master.put_aside("test", "square", n) for n in (1, 2, 3))
    records = await pipeline.set_aside("square")
    assert [record.value for record in records] == [1, 2, 3]
    assert records[0].error["message"] == "no good"
    assert await pipeline.rerun("square", [first]) == (1, 0)
    assert await pipeline.drop("square", [second]) == 1
    assert await pipeline.rerun("square") == (1, 0)
    assert await pipeline.drop("square") == 0


async def test_profile(cluster: Cluster) -> None:
    pipeline = await submitted(cluster, profile=[{"cloud_execution_time": 0.1}, {"output_msg_size": 8}])
    assert await pipeline.profile() == [{"cloud_execution_time": 0.1}, {"output_msg_size": 8.0}]
    await pipeline.set_profile([{}, {"cloud_execution_time": 2}])
    assert await pipeline.profile() == [{}, {"cloud_execution_time": 2.0}]


async def test_what_a_newer_master_adds_is_passed_over(cluster: Cluster, master: FakeMaster) -> None:
    await submitted(cluster)
    status = await cluster._rest.request("GET", "pipelines", "test")
    status |= {"colour": "green", "phase": "dreaming"}
    status["operators"][0]["taste"] = "sweet"
    seen = view(PipelineView, status)
    assert seen.phase == "dreaming"
    assert seen.operators[0].name == "numbers"
