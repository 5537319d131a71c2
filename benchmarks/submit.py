"""How long from `nomad submit` to the first output, on a local cluster that runs already.

From the start of the command's process to the first call of the last operator: Python's start, packing,
the request, three pods, their links. Bar: 1.5 s.

    python -m benchmarks.submit [--quick] [--json OUT]

Exit code 1 when the median is above the bar.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import harness

BAR = 1.5
NOMAD = (sys.executable, "-m", "nomad")
PROGRAM = """
import os, time
def source():
    return 7
def square(x):
    return x * x
def sink(x):
    if not os.path.exists({out!r}):
        with open({out!r} + ".new", "w") as file:
            file.write(str(time.monotonic()))
        os.rename({out!r} + ".new", {out!r})
operators = [source, square, sink]
start_node = end_node = "here"
"""


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """A cluster in a process of its own; the environment in which commands find it."""
    env = {**os.environ, "NOMAD_CONFIG_DIR": str(folder / "config"), "NOMAD_STATE_DIR": str(folder / "state")}
    command = [*NOMAD, "up", "--node", "here", "--port", "0", "--json"]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield {**env, "NOMAD_MASTER": json.loads(process.stdout.readline())["url"]}
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)


def once(folder: Path, env: dict[str, str], number: int, timeout: float = 30.0) -> float:
    """Seconds of one submission."""
    out, program = folder / f"first-{number}", folder / "program.py"
    program.write_text(PROGRAM.format(out=str(out)))
    before = time.monotonic()
    command = [*NOMAD, "submit", str(program), "--id", f"submit-{number}"]
    subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
    while not out.exists():
        if time.monotonic() > before + timeout:
            raise RuntimeError(f"no output after {timeout:g} s")
        time.sleep(0.005)
    subprocess.run([*NOMAD, "rm", f"submit-{number}"], env=env, check=True, stdout=subprocess.DEVNULL)
    return float(out.read_text()) - before


def main() -> None:
    args = harness.arguments(__doc__)
    with tempfile.TemporaryDirectory(prefix="nomad-bench-") as name, cluster(Path(name)) as env:
        seconds = [once(Path(name), env, number) for number in range(2 if args.quick else 7)]
    median = statistics.median(seconds)
    harness.table(
        f"from `nomad submit` to the first output (bar {BAR:g} s)",
        ["", "median", "least", "most", ""],
        [
            [
                "seconds",
                *(f"{s:.2f}" for s in (median, min(seconds), max(seconds))),
                "met" if median <= BAR else "MISSED",
            ]
        ],
    )
    harness.write(args.json, {"submit": {"median": median, "runs": seconds, "bar": BAR, "met": median <= BAR}})
    sys.exit(0 if median <= BAR else 1)


if __name__ == "__main__":
    main()
