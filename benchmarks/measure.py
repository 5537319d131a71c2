"""How closely emulated links are measured: what agents find where nothing flows, and what messages tell.

    python -m benchmarks.measure [--quick] [--seconds N] [--json OUT]

Each link from a hub to a node of its own is set to a latency and a bandwidth. Then the estimates are read: first of
idle links, then while small messages go over each (200 a second of 1 KiB), then large ones (2 a second of 100 kB). In
between a latency steps from 5 to 100 ms, and the time is taken until the estimate is within 10 % of it.

Exit code 1 when a latency is off by more than 10 % and 2 ms, a bandwidth that can be known by more than 15 %, or the
step isn't followed within 3 s.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import harness
from nomad import bundle, topology
from nomad.master.app import Master
from nomad.master.views import LinkEstimatesView
from nomad.pipeline import build
from nomad.settings import Settings

HUB = "hub"
LINKS: dict[str, tuple[float, float | None]] = {
    "lan": (0.001, 125e6),
    "metro": (0.005, 12.5e6),
    "dsl": (0.02, 1.25e6),
    "far": (0.1, 12.5e6),
    "radio": (0.05, 0.25e6),
    "open": (0.01, None),
}
"""Node -> seconds one way, and bytes per second (None: unlimited), in both directions."""

SMALL, LARGE = (1024, 200.0), (100_000, 2.0)
"""Bytes of a message, and messages per second."""

STEP = "metro"
STEP_TO = 0.1
FOLLOWED_SECONDS = 3.0


def source(nbytes: int, rate: float) -> Callable[[], Iterator[bytes]]:
    """A generator of messages at a steady rate."""

    def messages() -> Iterator[bytes]:
        import time

        due = time.monotonic()
        while True:
            yield bytes(nbytes)
            due += 1 / rate
            time.sleep(max(0.0, due - time.monotonic()))

    return messages


def sink(message: bytes) -> None:
    """The end."""


async def measure(seconds: float) -> dict[str, Any]:
    """What was set and what was found, per phase and link; and how long the step took."""
    links = tuple(
        topology.LinkInfo(*ends, topology.Shape(latency=latency, bandwidth=bandwidth))
        for node, (latency, bandwidth) in LINKS.items()
        for ends in ((HUB, node), (node, HUB))
    )
    nodes = topology.from_names([HUB, *LINKS]).nodes
    with tempfile.TemporaryDirectory(prefix="nomad-bench-") as state:
        async with Master(Settings.from_environment({}, state=Path(state)), topology.Topology(nodes, links)) as master:
            found: dict[str, Any] = {}
            await asyncio.sleep(2 * seconds)
            found["idle"] = estimates(master)
            for phase, (nbytes, rate) in (("small messages", SMALL), ("large messages", LARGE)):
                await run(master, nbytes, rate)
                await asyncio.sleep(seconds)
                found[phase] = estimates(master)
                if phase == "small messages":
                    found["step"] = await step(master)
                await asyncio.gather(*(master.remove(view.id) for view in master.pipelines()))
            return found


async def run(master: Master, nbytes: int, rate: float) -> None:
    """A pipeline over each link."""
    data = bundle.make(build([source(nbytes, rate), sink]), master.signing_key)
    for node in LINKS:
        await master.submit(data, id=node, start=HUB, end=node)
    while not all(view.phase == "running" for view in master.pipelines()):  # noqa: ASYNC110 - the facade is to be asked
        await asyncio.sleep(0.1)


def link(master: Master, node: str) -> LinkEstimatesView:
    """What is measured of the way to a node."""
    return next(view.estimates for view in master.links() if (view.source, view.target) == (HUB, node))


def estimates(master: Master) -> dict[str, dict[str, Any]]:
    """Per link what was set and what is measured."""
    rows = {}
    for node, (latency, bandwidth) in LINKS.items():
        known = link(master, node)
        rows[node] = {
            "latency": latency,
            "measured_latency": known.latency.value if known.latency else None,
            "latency_deviation": known.latency.deviation if known.latency else None,
            "bandwidth": bandwidth,
            "measured_bandwidth": known.bandwidth.value if known.bandwidth and known.bandwidth.samples else None,
            "reached": known.reached,
        }
    return rows


async def step(master: Master) -> float:
    """Seconds until a latency that stepped is followed."""
    before = time.monotonic()
    for ends in ((HUB, STEP), (STEP, HUB)):
        await master.set_link(*ends, latency=STEP_TO)
    while (known := link(master, STEP).latency) is None or abs(known.value - STEP_TO) > 0.1 * STEP_TO:
        if time.monotonic() > before + 60:
            return float("inf")
        await asyncio.sleep(0.02)
    took = time.monotonic() - before
    for ends in ((HUB, STEP), (STEP, HUB)):
        await master.set_link(*ends, latency=LINKS[STEP][0])
    return took


def met(row: dict[str, Any], phase: str) -> bool:
    """Whether what is measured is close enough."""
    off = abs((row["measured_latency"] or 0.0) - row["latency"])
    close = off <= max(0.1 * row["latency"], 0.002)
    # Small messages fill no link, and over a wide one even large ones are gone too quickly: nothing is claimed then.
    told = phase == "idle" or (phase == "large messages" and row["bandwidth"] and LARGE[0] / row["bandwidth"] > 0.005)
    if told and row["bandwidth"] and row["measured_bandwidth"]:
        close = close and abs(row["measured_bandwidth"] / row["bandwidth"] - 1) <= 0.15
    return close


def main() -> None:
    args = harness.arguments(__doc__, seconds={"type": float, "help": "per phase (default 10; 6 with --quick)"})
    found = asyncio.run(measure(args.seconds or (6.0 if args.quick else 10.0)))
    took = found.pop("step")
    good = took <= FOLLOWED_SECONDS
    for phase, rows in found.items():
        good = good and all(met(row, phase) for row in rows.values())
        harness.table(
            f"links, {phase}",
            ["link", "latency", "measured", "±", "bandwidth", "measured", ""],
            [
                [
                    node,
                    f"{row['latency'] * 1e3:g} ms",
                    "-" if row["measured_latency"] is None else f"{row['measured_latency'] * 1e3:.2f} ms",
                    "-" if row["latency_deviation"] is None else f"{row['latency_deviation'] * 1e3:.2f} ms",
                    "unlimited" if row["bandwidth"] is None else f"{row['bandwidth'] / 1e6:g} MB/s",
                    _shown(row),
                    "met" if met(row, phase) else "MISSED",
                ]
                for node, row in rows.items()
            ],
        )
    errors = [abs(r["measured_latency"] / r["latency"] - 1) for rows in found.values() for r in rows.values()]
    print(f"\nlatency off by {statistics.median(errors):.1%} in the median, {max(errors):.1%} at most")
    print(f"a step from {LINKS[STEP][0] * 1e3:g} to {STEP_TO * 1e3:g} ms was followed after {took:.2f} s")
    harness.write(args.json, {"measure": found, "step": took})
    sys.exit(0 if good else 1)


def _shown(row: dict[str, Any]) -> str:
    if row["measured_bandwidth"] is not None:
        return f"{row['measured_bandwidth'] / 1e6:.3g} MB/s"
    return "-" if row["reached"] is None else f"at least {row['reached'] / 1e6:.3g} MB/s"


if __name__ == "__main__":
    main()
