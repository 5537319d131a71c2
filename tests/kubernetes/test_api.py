"""The client of Kubernetes' API against a server that answers as no API server can be made to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from pathlib import Path

import pytest
import yaml
from aiohttp import web

from nomad.errors import ApiCrowded, ApiError, ApiUnavailable
from nomad.kubernetes import answers
from nomad.kubernetes import api as client
from nomad.kubernetes.api import ATTEMPTS, FOLLOWED, PIECE, Api
from nomad.kubernetes.login import CONNECTIONS
from tests.clock import VirtualClock


class Server:
    """Answers each request with the next of `answers`, and then with the last; `/endless` is a line and no end."""

    def __init__(self) -> None:
        self.answers: list[web.Response] = []
        self.asked = 0
        self.over = asyncio.Event()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked += 1
        if request.path == "/endless":
            stream = web.StreamResponse()
            await stream.prepare(request)
            await stream.write(b"one\n")
            await self.over.wait()
            return stream
        planned = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return web.Response(status=planned.status, headers=planned.headers, body=planned.body)


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
async def api(server: Server, clock: VirtualClock, tmp_path: Path) -> AsyncIterator[Api]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    config = {
        "clusters": [{"name": "c", "cluster": {"server": url}}],
        "users": [{"name": "u", "user": {}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    file = tmp_path / "kubeconfig"
    file.write_text(yaml.safe_dump(config))
    async with Api.open(file, clock=clock) as api:
        yield api
    server.over.set()
    await runner.cleanup()


async def asked(api: Api, clock: VirtualClock) -> dict[str, str]:
    """What a request gives, while time passes as it has to."""
    task = asyncio.create_task(api.get("/thing"))
    async with asyncio.timeout(10):
        while not task.done():
            if clock.sleeping:
                await clock.advance(1.0)
            await asyncio.sleep(0.001)
    return await task


async def test_what_is_turned_away_is_sent_again(api: Api, server: Server, clock: VirtualClock) -> None:
    busy = web.Response(status=429, headers={"Retry-After": "3"}, text="too many requests")
    server.answers = [busy, busy, web.json_response({"is": "there"})]
    before = clock.now()
    assert await asked(api, clock) == {"is": "there"}
    assert server.asked == 3
    assert 6.0 <= clock.now() - before <= 12.0


async def test_who_is_turned_away_again_and_again_gives_up(api: Api, server: Server, clock: VirtualClock) -> None:
    server.answers = [web.Response(status=429, headers={"Retry-After": "1"}, text="too many requests")]
    with pytest.raises(ApiUnavailable, match="too many requests") as refused:
        await asked(api, clock)
    assert (refused.value.status, refused.value.retry_after, server.asked) == (429, 1.0, ATTEMPTS)


async def test_an_api_that_wants_much_patience_is_unavailable(api: Api, server: Server, clock: VirtualClock) -> None:
    server.answers = [web.Response(status=503, headers={"Retry-After": "600"}, text="gone fishing")]
    with pytest.raises(ApiUnavailable, match="gone fishing"):
        await asked(api, clock)
    assert server.asked == 1


async def test_a_failure_of_the_server_is_the_callers_to_judge(api: Api, server: Server, clock: VirtualClock) -> None:
    server.answers = [web.json_response({"message": "etcd is away", "reason": "InternalError"}, status=500)]
    with pytest.raises(ApiUnavailable, match="etcd is away") as failed:
        await asked(api, clock)
    assert (failed.value.reason, failed.value.retry_after, server.asked) == ("InternalError", None, 1)


async def test_an_answer_that_is_no_json_is_no_answer(api: Api, server: Server, clock: VirtualClock) -> None:
    server.answers = [web.Response(text="<html>a proxy's greeting</html>")]
    with pytest.raises(ApiUnavailable, match="isn't answered with JSON"):
        await asked(api, clock)


async def test_a_watch_that_breaks_off_in_an_event_is_broken(api: Api, server: Server) -> None:
    server.answers = [web.Response(text='{"type": "ADDED", "object": {}}\n{"type": "ADD')]
    events = api.watch("/things", None, "1")
    assert (await anext(events))["type"] == "ADDED"
    with pytest.raises(ApiUnavailable, match="in the middle of an event"):
        await anext(events)


async def test_an_error_of_an_unknown_kind_keeps_its_words(api: Api, server: Server, clock: VirtualClock) -> None:
    server.answers = [web.json_response({"message": "a teapot", "reason": "Short"}, status=418)]
    with pytest.raises(ApiError, match="a teapot") as refused:
        await asked(api, clock)
    assert (refused.value.status, refused.value.reason) == (418, "Short")


async def test_a_long_line_comes_in_pieces(api: Api, server: Server) -> None:
    long = "a" + "ü" * 3_000_000
    server.answers = [web.Response(text=f"one\n{long}\nlast")]
    first, *pieces, last = [line async for line in api.lines("/log")]
    assert (first, "".join(pieces), last) == ("one\n", f"{long}\n", "last")
    assert max(map(len, pieces)) < 10 * PIECE


async def test_events_of_whatever_length_are_whole(api: Api, server: Server) -> None:
    event = {"type": "ADDED", "object": {"text": "\r" * 1_000_000}}
    server.answers = [web.Response(text=f"{json.dumps(event)}\n{json.dumps(event)}")]
    assert [found async for found in api.watch("/things", None, "1")] == [event, event]


async def begun(stack: AsyncExitStack, api: Api, follow: bool) -> None:
    """A log that has given its first line, until the stack ends."""
    lines = await stack.enter_async_context(aclosing(api.lines("/endless", {"follow": follow})))  # type: ignore[type-var]
    assert await anext(lines) == "one\n"


async def test_logs_that_are_followed_leave_connections_for_all_others(api: Api, server: Server) -> None:
    server.answers = [web.json_response({"is": "there"})]
    async with asyncio.timeout(20), AsyncExitStack() as stack:
        async with AsyncExitStack() as followers:
            for _ in range(FOLLOWED):
                await begun(followers, api, follow=True)
            asked = server.asked
            with pytest.raises(ApiCrowded, match=f"too many logs are followed: {FOLLOWED}"):
                await begun(stack, api, follow=True)
            assert server.asked == asked
            await begun(stack, api, follow=False)
            assert await api.get("/thing") == {"is": "there"}
        await begun(stack, api, follow=True)


async def test_a_watch_that_gets_no_connection_says_so(
    api: Api, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with asyncio.timeout(30), AsyncExitStack() as stack:
        for _ in range(CONNECTIONS):
            await begun(stack, api, follow=False)
        monkeypatch.setattr(client, "WAIT", 0.05)
        with pytest.raises(ApiUnavailable, match="no connection to .* in time: GET /things"):
            await anext(api.watch("/things", None, "1"))


async def test_a_line_is_put_together_in_time_that_grows_with_it() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(100_000):
            yield b"x" * 100

    assert [len(line) async for line in answers.lines(chunks())] == [10_000_000]


async def test_who_may_write_no_more_sends_nothing_again(api: Api, server: Server, clock: VirtualClock) -> None:
    busy = web.Response(status=429, headers={"Retry-After": "8"}, text="too many requests")
    server.answers = [busy, web.json_response({"is": "done"})]
    leads = True
    api.may_write = lambda: leads
    write = asyncio.create_task(api.patch("/thing", {"spec": {}}))
    async with asyncio.timeout(10):
        while not clock.sleeping:
            await asyncio.sleep(0.001)
    leads = False
    await clock.advance(20)
    with pytest.raises(ApiUnavailable, match="may change nothing"):
        await write
    assert server.asked == 1
    server.answers = [web.json_response({"is": "there"})]
    assert await api.get("/thing") == {"is": "there"}


def test_objects_that_are_kept_share_their_strings() -> None:
    found = {"items": [{"name": "operator-1", "text": "x" * 1000, "number": 1.5, "nothing": None}]}
    one, other = (answers.shared(json.loads(json.dumps(found))) for _ in range(2))
    assert one == other == found
    (first,), (second,) = one["items"], other["items"]
    assert [id(key) for key in first] == [id(key) for key in second]
    assert first["name"] is second["name"]
    assert first["text"] is not second["text"]
