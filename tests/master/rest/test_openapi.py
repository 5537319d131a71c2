"""The OpenAPI document says what the interface does: schemathesis, with all of its checks, finds no difference."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio
from openapi_pydantic import OpenAPI

from nomad import bundle
from nomad import topology as topologies
from nomad.fanout import Fanout, Subscription
from nomad.master.app import Master
from nomad.master.rest import webapp
from nomad.master.views import EventView, LogLine, TailItem
from nomad.pipeline import build
from nomad.runtime.fake import FakeRuntime
from nomad.settings import Settings
from tests.master.facade import NODES, TOKEN, FakeMaster, serve
from tests.master.rest.schemathesis_hooks import numbers, square

ROOT = Path(__file__).parents[3]
SEED = 20261122
"""Fixed: this test asks whether document and interface agree, and must answer the same every time."""


class Ending(Master):
    """A master whose streams end at once, where schemathesis would wait for them."""

    def tail(self, id: str, operator: str) -> AsyncIterator[TailItem]:
        super().tail(id, operator)
        return ended()

    def follow_logs(self, id: str, operator: str | None = None) -> AsyncIterator[LogLine]:
        super().follow_logs(id, operator)
        return ended()

    def subscribe_events(self) -> AsyncIterator[EventView]:
        return ended()


def ended() -> Subscription:
    fanout: Fanout = Fanout()
    fanout.close()
    return fanout.subscribe()


@pytest_asyncio.fixture
async def master(tmp_path: Path) -> AsyncIterator[Master]:
    """The real one, over pods that are made up."""
    topology = topologies.from_names(NODES)
    runtime = FakeRuntime(topology.nodes)
    async with Ending(Settings(state=tmp_path / "state"), topology, runtime=runtime) as running:
        yield running
    await runtime.shutdown()


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("phases", "mode"),
    [
        ("examples,coverage", "positive"),
        pytest.param("coverage", "negative", marks=pytest.mark.slow),
        pytest.param("fuzzing,stateful", "all", marks=pytest.mark.slow),
    ],
)
async def test_schemathesis_finds_nothing(master: Master, tmp_path: Path, phases: str, mode: str) -> None:
    """In the quick suite with all valid requests that its rules derive from the schema, else also with invalid ones,
    random ones and chains."""
    await master.submit(bundle.make(build([numbers, square]), master.signing_key), id="test", start="edge", end="cloud")
    config = tmp_path / "schemathesis.toml"
    config.write_text(
        f"""
        seed = {SEED}
        headers = {{ Authorization = "Bearer {TOKEN}" }}
        request-timeout = 60
        continue-on-failure = true
        generation.max-examples = 5
        [parameters]
        "query.start" = "{NODES[0]}"
        "query.end" = "{NODES[1]}"
        "path.node" = "{NODES[0]}"
        "path.source" = "{NODES[0]}"
        "path.target" = "{NODES[1]}"
        "path.operator" = "square"
        "query.pin" = "square={NODES[1]}"
        # What no schema can say: a profile has one entry per operator, a link's jitter isn't above its latency,
        # edges and links are between what there is, pins name operators, a pipeline's ends don't move, and a node
        # may have been lost just before.
        [[operations]]
        include-operation-id = [
            "replace_profile", "change_link", "make_plan", "change_pipeline", "order_move", "submit_pipeline",
        ]
        checks.positive_data_acceptance.expected-statuses = ["2xx", "404", "409", "422"]
        # The pods are made up, so that there is nobody to ask; that is what 503 is for.
        [[operations]]
        include-path-regex = "/set-aside|/latencies"
        checks.not_a_server_error.expected-statuses = ["2xx", "4xx", "503"]
        """
    )
    document = tmp_path / "openapi.json"
    document.write_bytes(webapp.openapi_document())
    async with serve(master) as url:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "schemathesis.cli", "--no-color", "--config-file", str(config)),
            *("run", str(document), "--url", url, "--checks", "all", "--phases", phases, "--mode", mode),
            cwd=tmp_path,
            # Not measured: nothing of Nomad's runs in it, and that would make it twice as slow.
            env={name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
            | {"SCHEMATHESIS_HOOKS": "tests.master.rest.schemathesis_hooks", "PYTHONPATH": str(ROOT)}
            | {"NOMAD_SIGNING_KEY": master.signing_key.hex()},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()


async def test_the_document_is_valid_and_complete() -> None:
    async with (
        serve(FakeMaster()) as url,
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {TOKEN}"}) as session,
        session.get(f"{url}/openapi.json") as response,
    ):
        assert response.content_type == "application/json"
        text = await response.read()
    OpenAPI.model_validate_json(text)
    document = json.loads(text)
    described = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    app = webapp.application(FakeMaster(), token=TOKEN)
    known = {(route.method, route.resource.canonical) for route in app.router.routes() if route.resource is not None}
    assert described == {pair for pair in known if pair[0] != "HEAD"} - {("GET", "/openapi.json")}


async def test_the_document_says_who_may_ask_and_what_fields_mean() -> None:
    document = json.loads(webapp.openapi_document())
    assert document["security"] == [{"token": []}]
    for path, item in document["paths"].items():
        for operation in item.values():
            assert (operation.get("security") == []) == (path in webapp.OPEN_PATHS), path
            assert operation["summary"]
    schemas = document["components"]["schemas"]
    assert schemas["NodeView"]["properties"]["speed"]["description"].startswith("Reference-seconds")
    assert schemas["LinkChange"]["additionalProperties"] is False
    assert "PipelineView" in json.dumps(document["paths"]["/api/v1/pipelines"]["post"]["responses"]["201"])
