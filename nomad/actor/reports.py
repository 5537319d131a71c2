"""What a pod says of itself without being asked: heart-beats, its status, and outputs while somebody looks on.

Used by `host`, in the main thread's loop; `Taps` and news of the status come from the data thread. Nothing is said
before the operator is `ready`. What is said goes over the `channel`, if there is anybody to hear it: what counts is
said again to the next master. Over a way that is too slow, heart-beats are left out and outputs wait, within bounds.
"""

from __future__ import annotations

import asyncio
import os
import random
import resource
import time
from collections import deque
from contextlib import suppress
from typing import Any

from nomad import control
from nomad.actor.channel import Channel
from nomad.actor.instance import Instance
from nomad.delivery.codec import Codec
from nomad.errors import PayloadError

TAP_ITEMS, TAP_BYTES, TAP_EVERY = 4096, 4 << 20, 0.02
"""Outputs and their bytes that wait for the master while somebody looks on, and the seconds between messages.

What is over is counted, and so are outputs of more than `control.MOST_SHOWN`.
"""

LAST_OUTPUT_BYTES = 64 * 1024


class Reports:
    """`beat` and `forward` run beside each other."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._instance: Instance | None = None
        self._ready: dict[str, Any] = {}
        self._status: dict[str, Any] | None = None
        """As last told."""
        self._status_due = False
        self._pace = control.HEARTBEAT
        """Seconds between two heart-beats."""
        self._paced = asyncio.Event()
        """The pace has changed."""
        self._late = False
        """A heart-beat was left out."""
        self._taps = Taps()

    def begin(self, instance: Instance, address: str | None) -> None:
        """The operator is ready, and listens at `address`."""
        self._instance = instance
        self._ready = {"type": "ready", "address": address, "pid": os.getpid()}

    def set_pace(self, seconds: float) -> None:
        """Between two heart-beats from now on."""
        if seconds != self._pace:
            self._pace = seconds
            self._paced.set()

    async def beat(self) -> None:
        """The first heart-beat at another pace comes at any moment within it: the pods of a master, which are all told
        at once, are not to speak all at once. One that couldn't go out is left out: the next says more.
        """
        wait = self._pace
        while True:
            try:
                async with asyncio.timeout(wait):
                    await self._paced.wait()
                self._paced.clear()
                wait = random.uniform(0.0, self._pace)
            except TimeoutError:
                self._late = not self._channel.writable
                if not self._late:
                    self.say_stats()
                wait = self._pace

    async def forward(self) -> None:
        """Send outputs that somebody looks at, and before them a heart-beat that was left out, as they may fill the way
        again for as long.
        """
        while True:
            await self._taps.waiting.wait()
            await asyncio.sleep(TAP_EVERY)
            if self._channel.writable:
                if self._late:
                    self.say_stats()
                    self._late = False
                self.say_outputs()

    def say_all(self) -> None:
        """How the operator stands, for a master that may know nothing of it."""
        if self._instance is not None:
            self._channel.say(self._ready)
            self._status = None
            self._say_status()
            self.say_stats()

    def say_stats(self) -> None:
        """A heart-beat."""
        if self._instance is None or not self._channel.connected:
            return
        stats = self._instance.stats()
        stats.rss = _resident()
        stats.cpu = time.process_time()
        stats.last_output = _last_output(self._instance)
        error = self._instance.meter.last_error
        self._channel.say(control.heartbeat(stats, error))

    def say_outputs(self) -> None:
        """Those that wait."""
        items, skipped = self._taps.take()
        if items or skipped:
            self._channel.say({"type": "outputs", "items": items, "skipped": skipped})

    # Called in the data thread

    def status_changed(self, loop: asyncio.AbstractEventLoop) -> None:
        """`loop`: the main thread's."""
        if not self._status_due:
            self._status_due = True
            with suppress(RuntimeError):  # the main thread has ended its loop, and there is nobody to tell
                loop.call_soon_threadsafe(self._say_status)

    def tap(self, values: list[Any]) -> None:
        """Outputs of the operator, for who looks on."""
        assert self._instance is not None
        self._taps.put(values, self._instance.codec)

    # Inside

    def _say_status(self) -> None:
        """Say it if it is news to the master."""
        self._status_due = False
        if self._instance is None or not self._channel.connected:
            return
        status = self._instance.status()
        if status != self._status:
            self._status = status
            self._channel.say({"type": "status", **status})


class Taps:
    """Outputs on their way to somebody who looks on; from the data thread to the main one.

    Less than `TAP_BYTES` + `control.MOST_SHOWN` waits, however the threads overlap, as each counter is written by one
    of them alone: one message can carry it.
    """

    def __init__(self) -> None:
        self.waiting = asyncio.Event()
        """Set, in the main loop, when there is something to take."""
        self._loop = asyncio.get_running_loop()
        self._items: deque[bytes] = deque()
        self._put_bytes = 0
        self._taken_bytes = 0
        self._skipped = 0
        self._skipped_before = 0
        """As last taken."""
        self._told = False

    def put(self, values: list[Any], codec: Codec) -> None:
        """Keep what there is room for, encoded."""
        for number, value in enumerate(values):
            if len(self._items) >= TAP_ITEMS or self._put_bytes - self._taken_bytes >= TAP_BYTES:
                self._skipped += len(values) - number
                break
            try:
                data = codec.encode_one(value)
            except PayloadError:
                self._skipped += 1
                continue
            if len(data) > control.MOST_SHOWN:
                self._skipped += 1
                continue
            self._items.append(data)
            self._put_bytes += len(data)
        # Last, and `take` forgets it first: whatever is put while the other thread takes is told of again.
        if not self._told:
            self._told = True
            self._loop.call_soon_threadsafe(self.waiting.set)

    def take(self) -> tuple[list[bytes], int]:
        """All that waits, and how many were skipped since the last time."""
        self._told = False
        self.waiting.clear()
        items = [self._items.popleft() for _ in range(len(self._items))]
        self._taken_bytes += sum(map(len, items))
        skipped = self._skipped
        before, self._skipped_before = self._skipped_before, skipped
        return items, skipped - before


def _last_output(instance: Instance) -> bytes | None:
    last, size = instance.meter.last, instance.outbox.output_bytes
    if last is None or max(size or 0, _nbytes(last)) > LAST_OUTPUT_BYTES:
        return None
    try:
        data = instance.shown.encode_one(last)
    except PayloadError:
        return None
    return data if len(data) <= LAST_OUTPUT_BYTES else None


def _nbytes(value: Any) -> int:
    """What an array says of its size; 0 for what isn't one. The value is the user's, and so is what it answers."""
    try:
        return int(getattr(value, "nbytes", 0))
    except Exception:  # noqa: BLE001 - the user's code
        return 0


def _resident() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
