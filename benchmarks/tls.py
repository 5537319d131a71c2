"""What encryption costs: frames over tls:// against tcp://, both ends in one process. `python -m benchmarks.tls`

Both transports in turns, on uvloop; for each size the median of the throughput, and the CPU time per frame of both ends
together, which other work on the machine disturbs less.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import uvloop

from nomad.kubernetes.certs import new_ca, new_leaf
from nomad.transport import registry, tls
from nomad.transport.base import Connection
from nomad.transport.certificates import AUTHORITIES, CERTIFICATE, KEY, POD, Identity

SIZES = {100: 200_000, 1024: 100_000, 65_536: 4_000, 921_600: 500}
"""Bytes of a frame -> how many are sent."""
ROUNDS = 3
WRITE_BYTES = 256 << 10


async def send(scheme: str, size: int, count: int) -> tuple[float, float]:
    """Frames per second, and CPU seconds per frame."""
    done, got = asyncio.Event(), 0

    async def serve(conn: Connection) -> None:
        nonlocal got
        while got < count:
            got += len(await conn.recv())
        done.set()
        await asyncio.Event().wait()

    listener = await registry.listen(f"{scheme}://127.0.0.1:0", serve)
    conn = await registry.connect(listener.reachable)
    frame, at_once = (os.urandom(size),), max(1, WRITE_BYTES // size)
    began, cpu = time.perf_counter(), time.process_time()
    for start in range(0, count, at_once):
        conn.write([frame] * min(at_once, count - start))
        await conn.drain()
        await asyncio.sleep(0)
    await done.wait()
    took, used = time.perf_counter() - began, time.process_time() - cpu
    await conn.close()
    await listener.close()
    return count / took, used / count


def certify(folder: Path) -> None:
    """Make this process's certificates."""
    now = datetime.now(UTC)
    ca = new_ca("bench", now)
    leaf = new_leaf(ca, Identity("bench", POD), now)
    for name, content in ((CERTIFICATE, leaf.certificate), (KEY, leaf.key), (AUTHORITIES, ca.certificate)):
        (folder / name).write_bytes(content)
    tls.use(folder)


def main() -> None:
    """Measure, and print a table."""
    print("| bytes | tcp frames/s | tls frames/s | tcp MB/s | tls MB/s | CPU µs per frame, tcp / tls |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        certify(Path(folder))
        for size, count in SIZES.items():
            found: dict[str, list[tuple[float, float]]] = {"tcp": [], "tls": []}
            for _ in range(ROUNDS):
                for scheme, runs in found.items():
                    runs.append(runner.run(send(scheme, size, count)))
            rate = {scheme: statistics.median(run[0] for run in runs) for scheme, runs in found.items()}
            cpu = {scheme: statistics.median(run[1] for run in runs) * 1e6 for scheme, runs in found.items()}
            print(
                f"| {size} | {rate['tcp']:,.0f} | {rate['tls']:,.0f} | {rate['tcp'] * size / 1e6:,.0f} "
                f"| {rate['tls'] * size / 1e6:,.0f} | {cpu['tcp']:.1f} / {cpu['tls']:.1f} |"
            )


if __name__ == "__main__":
    main()
