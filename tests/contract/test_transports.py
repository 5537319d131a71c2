"""The contract of transports, run against every one of Nomad's own, on every event loop there is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from nomad.control import Shape
from nomad.transport import base
from nomad.transport.base import Transport
from nomad.transport.registry import transport_for
from nomad.transport.shaping import ShapedTransport
from tests.contract.transport import CHECKS, Check

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
try:
    import uvloop
except ImportError:
    pass
else:
    LOOPS["uvloop"] = uvloop.new_event_loop

ADDRESSES = {
    "inproc": "inproc:",
    "tcp": "tcp://127.0.0.1:0",
    "unix": "unix:{folder}/socket",
}


def plain(address: str) -> Transport:
    return transport_for(address)


def shaped(address: str) -> Transport:
    return ShapedTransport(transport_for(address), Shape(latency=0.003, jitter=0.001), random=Random(1))


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("link", [plain, shaped], ids=lambda link: link.__name__)
@pytest.mark.parametrize("address", ADDRESSES.values(), ids=ADDRESSES)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(
    check: Check,
    address: str,
    link: Callable[[str], Transport],
    loop: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "clogged" in check.__name__:
        monkeypatch.setattr(base, "CLOSE_SECONDS", 0.1)
    address = address.format(folder=tmp_path)

    async def run() -> None:
        await check(link(address), address)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"tasks left behind: {left}"

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(run())
