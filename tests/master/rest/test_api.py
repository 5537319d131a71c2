"""The REST interface: who may ask, what is refused and how, and what each answer is."""

from __future__ import annotations

import asyncio
import base64
import gzip
import io
import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
import yarl
from aiohttp import web

from nomad import bundle
from nomad.credentials import LOOPBACK_NAMES
from nomad.delivery import codec
from nomad.errors import EnvironmentMismatch, StateError
from nomad.master.rest import api, webapp
from nomad.master.rest.http import routing, server
from nomad.master.views import LinkView, PipelineView
from nomad.pipeline import build
from nomad.rest import EventDecoder
from nomad.tasks import Turns
from tests.master.facade import SIGNING_KEY, TOKEN, FakeMaster, serve

AUTH = {"Authorization": f"Bearer {TOKEN}"}
PROBLEM = "application/problem+json"


def numbers() -> int:
    return 4


def square(x: int) -> int:
    return x * x


BUNDLE = bundle.make(build([numbers, square]), SIGNING_KEY)


class Api:
    """A running interface and its facade."""

    def __init__(self, master: FakeMaster, session: aiohttp.ClientSession) -> None:
        self.master = master
        self.session = session

    async def call(self, method: str, path: str, **options: Any) -> tuple[int, Any]:
        """Status, and the body as JSON."""
        async with self.session.request(method, path, **options) as response:
            body = await response.read()
            return response.status, json.loads(body) if body else None

    async def problem(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        """The problem document that the answer must be."""
        async with self.session.request(method, path, **options) as response:
            assert response.content_type == PROBLEM
            document: dict[str, Any] = json.loads(await response.read())
            assert document["status"] == response.status
            assert document["title"]
            return document

    async def submit(self, id: str = "test", data: bytes = BUNDLE, **query: str) -> tuple[int, Any]:
        params = {"id": id, "start": "edge", "end": "cloud"} | query
        return await self.call(
            "POST", "/api/v1/pipelines", params=params, data=data, headers={"Content-Type": bundle.MEDIA_TYPE}
        )


@pytest_asyncio.fixture
async def rest() -> AsyncIterator[Api]:
    master = FakeMaster()
    async with serve(master) as url, aiohttp.ClientSession(url, headers=AUTH) as session:
        yield Api(master, session)


# -- who may ask


def routes() -> list[tuple[str, str]]:
    """Every method and path that the application knows, with something in the place of each parameter."""
    app = webapp.application(FakeMaster(), token=TOKEN)
    found = []
    for route in app.router.routes():
        assert route.resource is not None
        path = route.resource.canonical
        for name in ("node", "source", "target", "pipeline", "operator", "move"):
            path = path.replace(f"{{{name}}}", "x")
        assert "{" not in path
        found.append((route.method, path))
    return found


async def test_every_route_but_the_health_checks_needs_the_token() -> None:
    asked = [(method, path) for method, path in routes() if path not in webapp.OPEN_PATHS]
    assert len(asked) > 30
    async with serve(FakeMaster()) as url, aiohttp.ClientSession(url) as session:
        for method, path in asked:
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}):
                async with session.request(method, path, headers=headers) as response:
                    assert response.status == 401, (method, path, headers)
                    assert response.content_type == PROBLEM
                    assert response.headers["WWW-Authenticate"] == 'Bearer realm="nomad"'


async def test_what_is_unknown_needs_the_token_too() -> None:
    """Default deny: who has no token doesn't learn which paths there are."""
    async with serve(FakeMaster()) as url, aiohttp.ClientSession() as session:
        for path in ("/", "/api/v1", "/api/v1/nowhere", "/healthz/", "//healthz", "/healthz/../metrics", "/HEALTHZ"):
            async with session.get(yarl.URL(url + path, encoded=True)) as response:
                assert response.status == 401, path


async def test_the_health_checks_need_no_token() -> None:
    master = FakeMaster()
    async with serve(master) as url, aiohttp.ClientSession(url) as session:
        api_ = Api(master, session)
        assert await api_.call("GET", "/healthz") == (200, {"status": "ok"})
        assert await api_.call("GET", "/readyz") == (200, {"status": "ok"})
        master.is_ready = False
        assert (await api_.problem("GET", "/readyz"))["detail"] == "The master isn't ready yet."
        assert (await api_.call("GET", "/readyz"))[0] == 503


async def test_strangers_arent_told_what_runs_here() -> None:
    async with serve(FakeMaster()) as url, aiohttp.ClientSession(url) as session, session.get("/healthz") as response:
        assert response.headers["Server"] == "nomad"


async def test_a_wrong_token_is_told_from_a_missing_one() -> None:
    master = FakeMaster()
    async with serve(master) as url, aiohttp.ClientSession(url) as session:
        api_ = Api(master, session)
        missing = await api_.problem("GET", "/api/v1/nodes")
        assert "`Authorization: Bearer <token>`" in missing["detail"]
        wrong = await api_.problem("GET", "/api/v1/nodes", headers={"Authorization": "Bearer nöt\udcff it"})
        assert wrong["detail"] == "The token is not this master's."
        assert wrong["type"] == "urn:nomad:problem:authentication-error"


def test_an_empty_token_is_refused() -> None:
    with pytest.raises(ValueError, match="empty token"):
        webapp.application(FakeMaster(), token="")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:30000", "", "127.0.0.1.evil.example", "[", "[::2]"])
async def test_a_rebound_name_is_refused(host: str) -> None:
    async with (
        serve(FakeMaster(), hosts=LOOPBACK_NAMES) as url,
        aiohttp.ClientSession(url) as session,
        session.get("/api/v1/nodes", headers={**AUTH, "Host": host}) as response,
    ):
        assert response.status == 421
        assert response.content_type == PROBLEM


@pytest.mark.parametrize("host", ["127.0.0.1:30000", "localhost", "[::1]:30000", "LOCALHOST:1"])
async def test_loopback_names_are_served(host: str) -> None:
    async with (
        serve(FakeMaster(), hosts=LOOPBACK_NAMES) as url,
        aiohttp.ClientSession(url) as session,
        session.get("/api/v1/nodes", headers={**AUTH, "Host": host}) as response,
    ):
        assert response.status == 200


# -- what is refused, and how


async def test_nothing_there(rest: Api) -> None:
    problem = await rest.problem("GET", "/api/v1/nowhere")
    assert problem == {
        "type": "about:blank",
        "title": "Not Found",
        "status": 404,
        "detail": "There is nothing at /api/v1/nowhere.",
    }


async def test_wrong_method_says_which_are_right(rest: Api) -> None:
    async with rest.session.put("/api/v1/pipelines") as response:
        assert response.status == 405
        assert response.headers["Allow"] == "GET,HEAD,POST"
        assert "it takes GET, HEAD, POST" in (json.loads(await response.read()))["detail"]


async def test_wrong_media_type(rest: Api) -> None:
    problem = await rest.problem("POST", "/api/v1/pipelines?start=edge&end=cloud", json={})
    assert problem["status"] == 415
    assert "must be application/vnd.nomad.bundle or application/octet-stream, not application/json" in problem["detail"]


async def test_a_body_that_announces_too_much_is_refused_unread() -> None:
    master = FakeMaster()
    async with serve(master, max_body=1 << 20) as url, aiohttp.ClientSession(url, headers=AUTH) as session:
        problem = await Api(master, session).problem(
            "POST",
            "/api/v1/pipelines?start=edge&end=cloud",
            data=io.BytesIO(b"x" * ((1 << 20) + 1)),
            headers={"Content-Type": bundle.MEDIA_TYPE},
        )
        assert problem["status"] == 413
        assert problem["detail"] == "The body is larger than 1 MiB, which is the limit."


async def test_a_body_that_turns_out_too_large_is_refused() -> None:
    async def drops() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b"x" * 65536

    master = FakeMaster()
    async with serve(master, max_body=1 << 20) as url, aiohttp.ClientSession(url, headers=AUTH) as session:
        problem = await Api(master, session).problem(
            "POST", "/api/v1/pipelines?start=edge&end=cloud", data=drops(), headers={"Content-Type": bundle.MEDIA_TYPE}
        )
        assert problem["status"] == 413
        assert master.pipelines() == []


async def test_a_compressed_body_is_not_inflated(rest: Api) -> None:
    """Neither for those who have no token, who don't even learn that, nor for those who have."""
    request = {"data": gzip.compress(bytes(1 << 20)), "headers": {"Content-Encoding": "gzip"}}
    request["headers"] |= {"Content-Type": bundle.MEDIA_TYPE}
    problem = await rest.problem("POST", "/api/v1/pipelines?start=edge&end=cloud", **request)
    assert problem["status"] == 415
    assert problem["detail"] == "The body must be sent as it is, without the Content-Encoding gzip."
    request["headers"] |= {"Authorization": "Bearer wrong"}
    assert (await rest.problem("POST", "/api/v1/pipelines?start=edge&end=cloud", **request))["status"] == 401


async def test_the_limit_is_64_mib() -> None:
    assert webapp.MAX_BODY == bundle.MAX_BUNDLE == 64 << 20


@pytest.mark.parametrize(
    ("query", "detail"),
    [
        ("end=cloud", "query.start: it is missing"),
        ("start=edge&end=cloud&start=fog", "query.start: given more than once"),
        ("start=edge&end=cloud&nod=x", "query.nod: there is no such parameter"),
        ("start=edge&end=cloud&id=", "query.id: '' can't be the id of a pipeline"),
        ("start=edge&end=cloud&id=a%2Fb", "query.id: 'a/b' can't be the id of a pipeline"),
        ("start=nowhere&end=cloud", "the start node 'nowhere' is unknown; known are edge, fog, cloud"),
    ],
)
async def test_bad_queries(rest: Api, query: str, detail: str) -> None:
    problem = await rest.problem(
        "POST", f"/api/v1/pipelines?{query}", data=BUNDLE, headers={"Content-Type": bundle.MEDIA_TYPE}
    )
    assert problem["status"] == 422
    assert problem["detail"].startswith(detail)
    assert rest.master.pipelines() == []


@pytest.mark.parametrize("limit", ["0", "-1", "10001", "many", "", "1e3", "9" * 400])
async def test_bad_numbers_in_queries(rest: Api, limit: str) -> None:
    problem = await rest.problem("GET", "/api/v1/events", params={"limit": limit})
    assert problem["status"] == 422
    assert problem["errors"][0]["location"] == "query.limit"


@pytest.mark.parametrize(
    ("body", "location"),
    [
        ('{"latency": -1}', "body.latency"),
        ('{"latency": "20ms"}', "body.latency"),
        ('{"latency": NaN}', "body.latency"),
        ('{"latency": 1e999}', "body.latency"),
        ('{"loss": 1}', "body.loss"),
        ('{"latncy": 1}', "body.latncy"),
        ("[]", "body"),
        ("{", "body"),
        ("", "body"),
    ],
)
async def test_bad_bodies(rest: Api, body: str, location: str) -> None:
    before = rest.master.links()
    problem = await rest.problem(
        "PATCH", "/api/v1/links/edge/cloud", data=body, headers={"Content-Type": "application/json"}
    )
    assert problem["status"] == 422
    assert problem["errors"][0]["location"] == location
    assert rest.master.links() == before


async def test_a_duplicate_id_is_a_conflict(rest: Api) -> None:
    assert (await rest.submit())[0] == 201
    status, problem = await rest.submit()
    assert status == 409
    assert problem["type"] == "urn:nomad:problem:conflict-error"
    assert problem["detail"] == "a pipeline 'test' exists already; remove it, or take another id"
    assert len(rest.master.pipelines()) == 1


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "bundle-error"),
        (b"no bundle", "bundle-error"),
        (BUNDLE[:-1], "bundle-error"),
        (bundle.make(build([numbers, square]), bytes(32)), "bundle-tampered"),
    ],
)
async def test_bad_bundles(rest: Api, data: bytes, kind: str) -> None:
    status, problem = await rest.submit(data=data)
    assert (status, problem["type"]) == (422, f"urn:nomad:problem:{kind}")
    assert rest.master.pipelines() == []


async def test_one_flipped_bit_is_found(rest: Api) -> None:
    where = BUNDLE.index(b"square")
    status, problem = await rest.submit(data=BUNDLE[:where] + b"S" + BUNDLE[where + 1 :])
    assert (status, problem["type"]) == (422, "urn:nomad:problem:bundle-tampered")
    assert rest.master.pipelines() == []


@pytest.mark.parametrize(
    ("error", "status"),
    [(EnvironmentMismatch("needs Python 3.99"), 422), (StateError("the state folder is full"), 503)],
)
async def test_errors_of_the_master_have_a_status_and_their_own_words(
    rest: Api, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    async def refuse(*args: Any, **kwargs: Any) -> PipelineView:
        raise error

    monkeypatch.setattr(rest.master, "submit", refuse)
    assert (await rest.submit())[1]["detail"] == str(error)
    assert (await rest.submit())[0] == status


async def test_what_nobody_expected_is_told_without_its_text(
    rest: Api, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> list[Any]:
        raise RuntimeError("the secret is 42")

    monkeypatch.setattr(rest.master, "each_node", fail)
    problem = await rest.problem("GET", "/api/v1/nodes")
    assert problem["status"] == 500
    assert "secret" not in json.dumps(problem)
    incident = problem["detail"].split()[-1].rstrip(".")
    assert incident in caplog.text
    assert "the secret is 42" in caplog.text


async def test_get_changes_nothing() -> None:
    """Whatever changes state is called by other methods only."""
    changing = {"submit", "stop", "remove", "update_profile", "set_link", "update_node", "rerun", "drop"}
    for operation in api.api.operations + api.health.operations:
        if operation.method == "GET":
            assert not changing & set(operation.handler.__code__.co_names), operation.path


# -- what is answered


async def test_submit_status_stop_remove(rest: Api) -> None:
    async with rest.session.post(
        "/api/v1/pipelines",
        params={"id": "test", "start": "edge", "end": "cloud"},
        data=BUNDLE,
        headers={"Content-Type": "application/octet-stream"},
    ) as response:
        assert response.status == 201
        assert response.headers["Location"] == "/api/v1/pipelines/test"
        made = json.loads(await response.read())
    assert made["phase"] == "running"
    assert [operator["id"] for operator in made["operators"]] == ["test.numbers", "test.square"]
    assert await rest.call("GET", "/api/v1/pipelines/test") == (200, made)
    assert await rest.call("GET", "/api/v1/pipelines") == (200, [made])
    assert await rest.call("GET", "/api/v1/pipelines/test/operators") == (200, made["operators"])
    assert await rest.call("GET", "/api/v1/pipelines/test/operators/square") == (200, made["operators"][1])
    assert (await rest.call("POST", "/api/v1/pipelines/test/stop"))[1]["phase"] == "stopped"
    assert await rest.call("DELETE", "/api/v1/pipelines/test") == (204, None)
    assert (await rest.problem("GET", "/api/v1/pipelines/test"))["detail"] == "there is no pipeline 'test'"


async def test_an_unknown_operator_names_the_known_ones(rest: Api) -> None:
    await rest.submit()
    for path in ("", "/outputs", "/last-output", "/set-aside"):
        problem = await rest.problem("GET", f"/api/v1/pipelines/test/operators/nope{path}")
        assert problem["detail"] == "pipeline 'test' has no operator 'nope'; it has numbers, square"


async def test_plans_are_made_for_any_cluster(rest: Api) -> None:
    node = {"id": "n", "speed": 2}
    pipeline = {"id": "p", "operators": [{"id": "a", "work": 1}, {"id": "b"}], "edges": [["a", "b"]], "rate": 0.1}
    status, answer = await rest.call("POST", "/api/v1/plans", json={"nodes": [node], "pipeline": pipeline})
    assert (status, answer["feasible"], answer["latency"]) == (200, True, 0.5)
    assert answer["placement"] == {"a": "n", "b": "n"}
    assert answer["reasons"]["a"]["terms"]["processing"] == 0.5
    status, answer = await rest.call("POST", "/api/v1/plans", json={"nodes": [node], "pipelines": [pipeline]})
    assert answer["pipelines"] == {"p": {"placement": {"a": "n", "b": "n"}, "latency": 0.5}}
    pipeline["rate"] = 100
    status, answer = await rest.call("POST", "/api/v1/plans", json={"nodes": [node], "pipeline": pipeline})
    assert (status, answer["feasible"], answer["reasons"]["constraint"]) == (200, False, "cpu")


async def test_problems_that_are_not_valid_are_refused(rest: Api) -> None:
    pipeline = {"operators": [{"id": "a"}]}
    problem = await rest.problem(
        "POST", "/api/v1/plans", json={"nodes": [{"id": "n", "sped": 1}], "pipeline": pipeline}
    )
    assert (problem["status"], problem["errors"][0]["location"]) == (422, "body.nodes.0.sped")
    problem = await rest.problem(
        "POST", "/api/v1/plans", json={"nodes": [{"id": "n"}, {"id": "n"}], "pipeline": pipeline}
    )
    assert (problem["status"], problem["detail"]) == (422, "node 'n' is given twice")


async def test_links_are_changed_in_part(rest: Api) -> None:
    path = "/api/v1/links/edge/cloud"
    await rest.call("PATCH", path, json={"latency": 0.08, "bandwidth": 1250000})
    status, link = await rest.call("PATCH", path, json={"loss": 0.01})
    assert status == 200
    assert (link["latency"], link["bandwidth"], link["loss"]) == (0.08, 1250000.0, 0.01)
    assert (await rest.call("PATCH", path, json={"bandwidth": "unlimited"}))[1]["bandwidth"] is None
    assert (await rest.call("GET", path))[1]["latency"] == 0.08
    assert (await rest.call("GET", "/api/v1/links/cloud/edge"))[1]["latency"] == 0.0
    assert (await rest.problem("GET", "/api/v1/links/cloud/moon"))["status"] == 404


async def test_node_speed(rest: Api) -> None:
    assert (await rest.call("PATCH", "/api/v1/nodes/edge", json={"speed": 0.25}))[1]["speed"] == 0.25
    assert (await rest.call("GET", "/api/v1/nodes/edge"))[1]["speed"] == 0.25
    assert (await rest.problem("PATCH", "/api/v1/nodes/moon", json={"speed": 1}))["status"] == 404


async def test_profile(rest: Api) -> None:
    await rest.submit()
    path = "/api/v1/pipelines/test/profile"
    assert await rest.call("GET", path) == (200, [])
    given = [{"cloud_execution_time": 0.5, "output_msg_size": 10.0}, {"cloud_execution_time": 0.1}]
    assert (await rest.call("PUT", path, json=given))[0] == 200
    assert (await rest.call("GET", path))[1][0] == given[0]
    assert (await rest.problem("PUT", path, json=given[:1]))["detail"].startswith("'test' has 2 operators")


async def test_last_output_shows_and_carries_the_value(rest: Api) -> None:
    await rest.submit()
    path = "/api/v1/pipelines/test/operators/square/last-output"
    assert await rest.call("GET", path) == (200, None)
    rest.master.emit("test", "square", {"n": (1, b"\x00")})
    shown = (await rest.call("GET", path))[1]
    assert shown["value"] == {"n": [1, {"$bytes": "AA=="}]}
    assert codec.decode_one(base64.b64decode(shown["data"])) == {"n": (1, b"\x00")}


async def test_a_pickle_is_never_opened_by_the_master(rest: Api) -> None:
    await rest.submit(data=bundle.make(build([numbers, square], codec="pickle"), SIGNING_KEY))
    rest.master.emit("test", "square", {1, 2})
    shown = (await rest.call("GET", "/api/v1/pipelines/test/operators/square/last-output"))[1]
    assert list(shown["value"]) == ["$pickle"]
    assert codec.decode_one(base64.b64decode(shown["data"]), codec="pickle") == {1, 2}


async def test_set_aside_messages(rest: Api) -> None:
    await rest.submit()
    path = "/api/v1/pipelines/test/operators/square/set-aside"
    first, second, third = (rest.master.put_aside("test", "square", n) for n in (1, 2, 3))
    records = (await rest.call("GET", path))[1]
    assert [record["value"] for record in records] == [1, 2, 3]
    assert records[0]["error"]["traceback"].startswith("Traceback")
    assert await rest.call("POST", f"{path}/rerun", json={"ids": [first]}) == (200, {"ran": 1, "failed": 0})
    assert await rest.call("DELETE", f"{path}?id={second}") == (200, {"dropped": 1})
    assert await rest.call("POST", f"{path}/rerun", json={}) == (200, {"ran": 1, "failed": 0})
    assert await rest.call("DELETE", path) == (200, {"dropped": 0})
    assert third


async def test_logs(rest: Api) -> None:
    await rest.submit()
    for n in range(3):
        rest.master.print("test", "square", f"line {n}")
    rest.master.print("test", "numbers", "other")
    lines = (await rest.call("GET", "/api/v1/pipelines/test/logs?operator=square&tail=2"))[1]
    assert [line["line"] for line in lines] == ["line 1", "line 2"]
    assert len((await rest.call("GET", "/api/v1/pipelines/test/logs"))[1]) == 4


async def test_metrics(rest: Api) -> None:
    async with rest.session.get("/metrics") as response:
        assert response.content_type == "text/plain"
        assert b"nomad_pipelines 0" in await response.read()


@pytest.mark.parametrize(
    ("accepted", "packed"),
    [("gzip", True), ("br, GZIP; q=0.5", True), ("deflate, identity", False), ("gzip;q=0", False), ("", False)],
)
async def test_what_is_large_is_sent_packed_to_who_takes_that(
    rest: Api, monkeypatch: pytest.MonkeyPatch, accepted: str, packed: bool
) -> None:
    small = (await rest.call("GET", "/api/v1/nodes"))[1]
    monkeypatch.setattr(routing, "LARGE", 1)
    async with rest.session.get("/api/v1/nodes", headers={"Accept-Encoding": accepted}) as response:
        assert response.headers["Vary"] == "Accept-Encoding"
        assert response.headers.get("Content-Encoding") == ("gzip" if packed else None)
        assert await response.json() == small


async def test_lists_leave_the_loop_to_others(rest: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "Turns", lambda: Turns(0.0))
    rounds, seen = 0, []

    async def others() -> None:
        nonlocal rounds
        while True:
            rounds += 1
            await asyncio.sleep(0)

    views = rest.master.links()

    def each_link() -> Iterator[LinkView]:
        for view in views:
            seen.append(rounds)
            yield view

    monkeypatch.setattr(rest.master, "each_link", each_link)
    beside = asyncio.create_task(others())
    status, found = await rest.call("GET", "/api/v1/links")
    beside.cancel()
    await asyncio.gather(beside, return_exceptions=True)
    assert (status, len(found)) == (200, len(views))
    assert len(set(seen)) == len(views)


async def test_head_answers_like_get_without_a_body(rest: Api) -> None:
    async with rest.session.head("/api/v1/nodes") as response:
        assert response.status == 200
        assert await response.read() == b""


# -- streams


async def events_of(response: aiohttp.ClientResponse) -> AsyncIterator[tuple[str, Any]]:
    decoder = EventDecoder()
    async for chunk in response.content.iter_any():
        for event in decoder.feed(chunk):
            yield event.name, json.loads(event.data)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for `condition`, at most 10 seconds."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


async def test_outputs_are_streamed_until_the_pipeline_is_over(rest: Api) -> None:
    await rest.submit()
    async with rest.session.get("/api/v1/pipelines/test/operators/square/outputs") as response:
        assert response.content_type == "text/event-stream"
        await until(lambda: rest.master.readers("test", "square") == 1)
        rest.master.emit("test", "square", 16)
        rest.master.emit("test", "square", b"x", skipped=3)
        rest.master.finish("test")
        events = [event async for event in events_of(response)]
    assert [name for name, _ in events] == ["message", "message", "end"]
    assert events[0][1]["value"] == 16
    assert events[1][1] == {
        "value": {"$bytes": "eA=="},
        "data": base64.b64encode(codec.encode_one(b"x")).decode(),
        "skipped": 3,
    }


async def test_events_follow_on_what_is_kept(rest: Api) -> None:
    await rest.submit("one")
    await rest.submit("two")
    listed = (await rest.call("GET", "/api/v1/events"))[1]
    assert [event["pipeline"] for event in listed] == ["one", "two"]
    headers = {"Accept": "text/event-stream"}
    path = f"/api/v1/events?pipeline=two&after={listed[0]['id'] - 1}"
    async with rest.session.get(path, headers=headers) as response:
        events = events_of(response)
        assert (await anext(events))[1]["message"] == "pipeline two was submitted"
        rest.master.finish("one")
        rest.master.finish("two")
        assert (await anext(events))[1]["message"] == "pipeline two is completed"


async def test_logs_are_followed(rest: Api) -> None:
    await rest.submit()
    rest.master.print("test", "square", "before")
    headers = {"Accept": "text/event-stream"}
    async with rest.session.get("/api/v1/pipelines/test/logs?tail=5", headers=headers) as response:
        events = events_of(response)
        assert (await anext(events))[1]["line"] == "before"
        rest.master.print("test", "square", "after")
        assert (await anext(events))[1]["line"] == "after"
        rest.master.finish("test")
        assert await anext(events) == ("end", {})


async def test_a_reader_that_leaves_is_noticed(rest: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nomad.master.rest.http.sse.KEEP_ALIVE", 0.01)
    await rest.submit()
    response = await rest.session.get("/api/v1/pipelines/test/operators/square/outputs")
    await until(lambda: rest.master.readers("test", "square") == 1)
    response.close()
    await until(lambda: rest.master.readers("test", "square") == 0)


async def test_an_error_in_mid_stream_is_told(rest: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*args: Any) -> AsyncIterator[Any]:
        raise StateError("the log is gone")
        yield

    await rest.submit()
    monkeypatch.setattr(rest.master, "follow_logs", fail)
    headers = {"Accept": "text/event-stream"}
    async with rest.session.get("/api/v1/pipelines/test/logs?tail=0", headers=headers) as response:
        events = [event async for event in events_of(response)]
    assert [name for name, _ in events] == ["problem"]
    assert events[0][1]["detail"] == "the log is gone"


async def test_open_streams_dont_hold_the_end_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "SHUTDOWN", 300.0)
    master = FakeMaster()
    runner = server.runner(webapp.application(master, token=TOKEN))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    async with (
        aiohttp.ClientSession(url, headers=AUTH) as session,
        session.get("/api/v1/events", headers={"Accept": "text/event-stream"}) as response,
    ):
        async with asyncio.timeout(30):
            await runner.cleanup()
        assert [event async for event in events_of(response)] == []
