"""Shows pods and agents that this master is at work, which its machine's answers alone don't.

Run by `assembly` beside the loop. Who misses these words breaks its connection and dials again (`nomad.reach`), and
finds whoever leads by then. One is said on each connection; those who come by way of agents get it from these. A word
over TLS takes 25 µs of the master: so it comes less often where connections are many.
"""

from __future__ import annotations

from nomad import control
from nomad.clock import Clock
from nomad.master.pods import PodPort
from nomad.settings import Heartbeats

MISSED = 2.5
"""Times the pause between two words: silence that is longer means something."""

AT_ONCE, PAUSE = 50, 0.05
"""Connections that are told in one go, and the seconds until the next ones are: nothing else has to wait for long."""


def timing(connections: int, settings: Heartbeats) -> tuple[float, float]:
    """Seconds from one word to the next on each of so many connections, and how long there may be silence there."""
    every = max(settings.word, connections / settings.words)
    return every, max(settings.silence, MISSED * every)


async def say_words(port: PodPort, settings: Heartbeats, clock: Clock) -> None:
    """Until cancelled."""
    while True:
        began, told = clock.now(), port.direct()
        every, within = timing(len(told), settings)  # both hold until the next time
        frame = (control.pack({"type": "word", "within": within}),)
        for first in range(0, len(told), AT_ONCE):
            for channel in told[first : first + AT_ONCE]:
                channel.remark(frame)
            await clock.sleep(PAUSE)
        await clock.sleep(max(PAUSE, began + every - clock.now()))
