"""Keeps Python's search for cycles of references from going through all that a master knows, again and again.

Run by a process that is a master and nothing else. Of thousands of pods it knows hundreds of thousands of objects. A
full search goes through all of them, while nobody is heard, and comes whenever there is a quarter more; they stay, and
have no cycles. So what is there is set aside (`gc.freeze`), and only now and then looked at, too. What has no cycles is
let go at once, as ever.
"""

from __future__ import annotations

import gc

from nomad.clock import Clock

COLLECT_AFTER = 20_000
"""Objects that were made and not let go until there is a search among the new ones; for `gc.set_threshold`. A master
replaces what it knows of pods all the time, which is no cycle: with Python's 700 a quarter of its CPU went there.
"""

FIRST, MOST = 15.0, 900.0
"""Seconds until all is looked at, doubled from the first time, when pods have just been found, to the most."""


async def search_rarely(clock: Clock) -> None:
    """Until cancelled."""
    pause = FIRST
    try:
        while True:
            await clock.sleep(pause)
            gc.unfreeze()
            gc.collect()
            gc.freeze()
            pause = min(2 * pause, MOST)
    finally:
        gc.unfreeze()
