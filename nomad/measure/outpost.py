"""One node's agent as a process of its own: `python -m nomad.measure.outpost`, started by `seated`.

For nodes whose network this machine's other processes aren't in. It is told what to do on standard input, one JSON
object a line, and answers on standard output; it ends when its input does, so that a master that died leaves none.

    {"node", "key": hex, "listen": address}        first          {"address": where other agents reach it}
    {"id", "node", "address", "nbytes"}            a probe        {"id", "round_trip", "transfer"} or {"id", "error"}
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from nomad.clock import SystemClock
from nomad.errors import NomadError, TransportError
from nomad.measure.agent import Agent
from nomad.tasks import Tasks


async def run() -> None:
    """Until standard input ends. Raises `TransportError` when it can't listen."""
    asked = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(asked), sys.stdin)
    first = json.loads(await asked.readline())
    agent, tasks = Agent(first["node"], bytes.fromhex(first["key"]), SystemClock()), Tasks()
    try:
        _say({"address": await agent.listen(first["listen"])})
        while line := await asked.readline():
            tasks.start(_probe(agent, json.loads(line)), name="probe")
    finally:
        await tasks.close()
        await agent.close()


async def _probe(agent: Agent, asked: dict[str, Any]) -> None:
    agent.close_idle()
    try:
        probe = await agent.probe(asked["node"], asked["address"], asked["nbytes"])
    except NomadError as exc:
        _say({"id": asked["id"], "error": str(exc)})
    else:
        _say({"id": asked["id"], "round_trip": probe.round_trip, "transfer": probe.transfer})


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    try:
        asyncio.run(run())
    except TransportError as exc:
        sys.exit(f"agent: {exc}")
