"""Who connects to the REST interface and shows no token doesn't stay."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest

from nomad.master.rest.http import server
from tests.master.facade import TOKEN, FakeMaster, serve

AUTH = {"Authorization": f"Bearer {TOKEN}"}


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"GET /api/v1/nodes HTTP/1.1\r\nHost: x\r\nX-Long: ",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer guessed\r\n\r\n",
        b"GET /api/v1/nodes HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer guessed\r\n\r\n",
    ],
    ids=["nothing", "half", "open path", "refused"],
)
async def test_a_connection_without_a_token_is_cut(monkeypatch: pytest.MonkeyPatch, said: bytes) -> None:
    monkeypatch.setattr(server, "STRANGER", 0.1)
    async with asyncio.timeout(30), serve(FakeMaster()) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(said)
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 ") is said.endswith(b"\r\n\r\n")
        writer.close()
        await writer.wait_closed()


async def test_who_has_shown_a_token_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "STRANGER", 0.1)
    async with asyncio.timeout(30), serve(FakeMaster()) as url:
        _, other = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        connector = aiohttp.TCPConnector(limit=1)
        async with aiohttp.ClientSession(url, headers=AUTH, connector=connector) as session:
            async with session.get("/api/v1/events", headers={"Accept": "text/event-stream"}) as stream:
                for _ in range(3):  # so long the stream lasts
                    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
                    assert await reader.read() == b""
                    writer.close()
                assert stream.connection is not None
                assert not stream.content.at_eof()
        other.close()
