"""The contract of transports, run against every one of Nomad's own, on every event loop there is."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from nomad.control import Shape
from nomad.transport import base, tls
from nomad.transport.registry import transport_for
from nomad.transport.shaping import ShapedTransport
from tests.certificates import authority, put
from tests.contract.loops import LOOPS
from tests.contract.transport import CHECKS, Check

ADDRESSES = {
    "inproc": "inproc:",
    "tcp": "tcp://127.0.0.1:0",
    "tls": "tls://127.0.0.1:0",
    "unix": "unix:{folder}/socket",
    "zmq+tcp": "zmq+tcp://127.0.0.1:0",
    "zmq+ipc": "zmq+ipc:{folder}/socket",
    "zmq+tcp by pyzmq": "zmq+tcp://127.0.0.1:0",  # as on Python 3.14
}


LATENCY = Shape(latency=0.003, jitter=0.001)
# Shaping is the same code on every loop.
RUNS: list[tuple[str, str, Shape | None]] = [(backend, loop, None) for backend in ADDRESSES for loop in LOOPS]
RUNS += [(backend, list(LOOPS)[-1], LATENCY) for backend in ADDRESSES if "pyzmq" not in backend]


def case(backend: str, loop: str, shape: Shape | None) -> Any:
    """For `parametrize`. What a transport runs of its code it runs on the first loop."""
    name = f"{backend}-{loop}" + ("-shaped" if shape else "")
    return pytest.param(backend, loop, shape, id=name, marks=[] if loop == next(iter(LOOPS)) else pytest.mark.no_cover)


@pytest.fixture(scope="module", autouse=True)
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    tls.use(put(tmp_path_factory.mktemp("tls"), authority()))
    yield
    tls.use(None)


@pytest.mark.parametrize(("backend", "loop", "shape"), [case(*run) for run in RUNS])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(
    check: Check, backend: str, loop: str, shape: Shape | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "clogged" in check.__name__ or "both_sides_close" in check.__name__:  # over TLS each side waits for the other
        monkeypatch.setattr(base, "CLOSE_SECONDS", 0.05)
    if backend.endswith("by pyzmq"):
        monkeypatch.setattr("nomad.transport.zmqsockets.aiozmq", None)
    address = ADDRESSES[backend].format(folder=tmp_path)
    transport = transport_for(address)
    if shape is not None:
        transport = ShapedTransport(transport, shape, random=Random(1))

    async def checked() -> None:
        await check(transport, address)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"tasks left behind: {left}"

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(checked())
