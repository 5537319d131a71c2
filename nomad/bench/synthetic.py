"""The harness's own pipeline: a source at a rate, operators of given work, and a sink that checks what comes.

    functions(folder, operators, rate=200, message_bytes=1024)  ->  callables for nomad.submit
    turn(folder, rate=400)                                      ->  from now on, while it runs
    outcome(folder)                                             ->  what came, what is missing, doubled, out of order

The operators run in pods. What they share with the harness is a folder: `knobs.json`, which they look at now and
then, `sent`, the source's count, and `arrived`, one record for each message that reached the sink. Importing it
imports nothing but the standard library and numbers of the scenario.
"""

from __future__ import annotations

import json
import os
import random
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nomad.pipeline import operator, source

SOURCE, SINK = "source", "sink"
"""Names of the first and the last operator."""
HEADER = struct.Struct("<qq")
"""At the beginning of each message: its number, from 0, and when it was made, in nanoseconds since the epoch."""
RECORD = struct.Struct("<qqq")
"""Of a message at the sink: number, made, arrived."""
LOOK_EVERY = 0.05
"""Seconds between two looks at the knobs."""
LATE = 0.5
"""Seconds that the source may be late before it goes on from there: it doesn't make up for a long halt with a burst."""


class Knobs:
    """The settings that may change while it runs, as the last look at the file found them."""

    def __init__(self, folder: Path) -> None:
        self._path = str(folder / "knobs.json")
        self._next = 0.0
        self._seen = 0
        self._values: dict[str, Any] = {}

    def read(self) -> dict[str, Any]:
        """`{"rate": ..., "work": {operator: seconds}}`. Cheap: the file is looked at every `LOOK_EVERY` seconds."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + LOOK_EVERY
            stamp = os.stat(self._path).st_mtime_ns
            if stamp != self._seen:
                self._seen = stamp
                self._values = json.loads(Path(self._path).read_text())
        return self._values


def turn(folder: Path, *, rate: float | None = None, work: dict[str, float] | None = None) -> None:
    """Change what is given. Renamed into place, so that who reads the file sees all of it."""
    path = folder / "knobs.json"
    values: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rate": 1.0, "work": {}}
    if rate is not None:
        values["rate"] = rate
    values["work"].update(work or {})
    (folder / "knobs.new").write_text(json.dumps(values))
    (folder / "knobs.new").rename(path)


class Source:
    """Numbers, at a rate: evenly, or with a `seed` at random (a Poisson process)."""

    def __init__(self, folder: Path, message_bytes: int, seed: int | None = None) -> None:
        self.folder = folder
        self.padding = bytes(message_bytes - HEADER.size)
        self.seed = seed

    def __call__(self) -> Iterator[bytes]:
        knobs, chance = Knobs(self.folder), random.Random(self.seed)
        sent = os.open(self.folder / "sent", os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            due, number = time.monotonic(), 0
            while True:
                now = time.monotonic()
                if due > now:
                    time.sleep(due - now)
                elif now - due > LATE:
                    due = now
                rate = knobs.read()["rate"]
                due += 1.0 / rate if self.seed is None else chance.expovariate(rate)
                os.pwrite(sent, str(number + 1).encode(), 0)  # a count only grows, so it covers the one before
                yield HEADER.pack(number, time.time_ns()) + self.padding
                number += 1
        finally:
            os.close(sent)


class Work:
    """Takes its time for each message and gives back as many bytes as it is told, with the same number and time."""

    def __init__(self, folder: Path, name: str, output_bytes: int) -> None:
        self.folder = folder
        self.name = name
        self.padding = bytes(output_bytes - HEADER.size)
        self.knobs: Knobs | None = None

    def __call__(self, message: bytes) -> bytes:
        if self.knobs is None:
            self.knobs = Knobs(self.folder)
        seconds = self.knobs.read()["work"][self.name]
        if seconds:
            time.sleep(seconds)
        return bytes(message[: HEADER.size]) + self.padding


class Sink:
    """Writes down what arrives, one record for each call, at once: a process that is killed loses none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file: int | None = None

    def __call__(self, message: bytes) -> None:
        arrived = time.time_ns()
        if self.file is None:
            self.file = os.open(self.folder / "arrived", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(self.file, RECORD.pack(*HEADER.unpack_from(message), arrived))


@dataclass(frozen=True, slots=True)
class Made:
    """An operator between source and sink."""

    name: str
    output_bytes: int
    memory: float | None = None
    """MiB; None is the default of any operator."""


def functions(
    folder: Path, operators: Iterable[Made], message_bytes: int, seed: int | None = None
) -> list[Callable[..., Any]]:
    """The pipeline's operators, for one run in `folder`, whose knobs must be there when it starts.

    With a `seed` the source sends at random.
    """
    return [
        source(Source(folder, message_bytes, seed), name=SOURCE),
        *(operator(Work(folder, op.name, op.output_bytes), name=op.name, memory=op.memory) for op in operators),
        operator(Sink(folder), name=SINK),
    ]


@dataclass(frozen=True, slots=True)
class Arrival:
    """A message at the sink."""

    number: int
    made: float
    """Seconds since the epoch."""
    arrived: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the sink got of what was sent. Counted over a whole run, once all that was under way has settled."""

    sent: int
    arrived: int
    """Calls of the sink."""
    lost: int
    doubled: int
    disorder: int
    """Calls with a number below that of the call before them, doubled ones left out."""


def arrivals(folder: Path) -> list[Arrival]:
    """All calls of the sink so far, in their order."""
    path = folder / "arrived"
    data = path.read_bytes() if path.exists() else b""
    whole = len(data) - len(data) % RECORD.size
    return [Arrival(n, made / 1e9, at / 1e9) for n, made, at in RECORD.iter_unpack(data[:whole])]


def outcome(folder: Path, *, drained: bool = True) -> Outcome:
    """Of a run that is over. Unless it was `drained`, what was under way behind the last that arrived isn't lost."""
    numbers = [arrival.number for arrival in arrivals(folder)]
    sent = int((folder / "sent").read_text()) if drained and (folder / "sent").exists() else 0
    return judge(numbers, sent or max(numbers, default=-1) + 1)


def judge(numbers: Sequence[int], sent: int) -> Outcome:
    """What is wrong with the numbers that came, when those from 0 to `sent` should have, once each and in order."""
    seen: set[int] = set()
    doubled = disorder = 0
    highest = -1
    for number in numbers:
        if number in seen:
            doubled += 1
        elif number < highest:
            disorder += 1
        seen.add(number)
        highest = max(highest, number)
    lost = max(sent, highest + 1) - len(seen)
    return Outcome(sent, len(numbers), lost, doubled, disorder)
