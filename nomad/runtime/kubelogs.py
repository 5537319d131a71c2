"""What the pods of a cluster print: read from their nodes through the API, line by line.

Called by `nomad.runtime.kubernetes`. A node keeps what a container printed as long as the pod's object is there.
What a carriage return ends is taken for a line too, and a long line for several, as they come.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from nomad.clock import Clock
from nomad.errors import ApiCrowded, ApiError, ApiInvalid, ApiNotFound
from nomad.kubernetes import paths
from nomad.kubernetes.api import Api
from nomad.runtime.base import PodPhase
from nomad.runtime.kubepods import KubePod
from nomad.runtime.manifests import CONTAINER

log = logging.getLogger(__name__)

PAUSE = 0.5
"""Seconds until a log that broke off, or that isn't there yet, is asked for again."""

LONGEST_PAUSE = 5.0

PATIENCE = 10.0
"""Seconds that a node may take to give what was printed."""


async def tail(api: Api, namespace: str, name: str, lines: int | None) -> list[str]:
    """The last lines that a pod has printed; none when it hasn't run yet or isn't there any more.

    Where its node doesn't answer, a line that says so: a log is read to find out what has happened.
    """
    params: dict[str, Any] = {"container": CONTAINER, "tailLines": lines}
    try:
        async with asyncio.timeout(PATIENCE):
            async with aclosing(api.lines(paths.pods(namespace, name, "log"), params)) as pieces:  # type: ignore[type-var]
                found: deque[str] = deque(maxlen=lines)
                begins = True
                async for piece in pieces:
                    found.extend(_shown(piece, begins))
                    begins = piece.endswith("\n")
                return list(found)
    except (ApiNotFound, ApiInvalid):
        return []
    except (ApiError, TimeoutError) as exc:
        return [f"(what pod {name} printed can't be read now: {str(exc) or 'its node does not answer'})"]


async def follow(
    api: Api, namespace: str, name: str, find: Callable[[], KubePod | None], clock: Clock
) -> AsyncIterator[str]:
    """Lines from now on, until the pod has ended; `find` gives the pod as it is.

    Connections that break are taken up where they were, by the nodes' own stamps on each line. Where too many logs are
    followed a line says so, and this one waits for its turn.
    """
    pod = find()
    if pod is None or pod.phase is PodPhase.EXITED:
        return
    last, pause = "", PAUSE
    told = False  # that it waits
    fresh = pod.phase is PodPhase.STARTING  # all that it prints is still to come
    while True:
        pod = find()
        over = pod is None or pod.phase is PodPhase.EXITED  # before reading, so that nothing of the end is missed
        params: dict[str, Any] = {"container": CONTAINER, "timestamps": True, "follow": not over}
        heard = last
        if heard:
            params["sinceTime"] = heard
        elif not fresh:
            params["tailLines"] = 0
        try:
            async with aclosing(api.lines(paths.pods(namespace, name, "log"), params)) as pieces:  # type: ignore[type-var]
                begins, stamp = True, ""
                async for piece in pieces:
                    text = piece
                    if begins:
                        stamp, _, text = piece.partition(" ")
                    if stamp > heard:  # the nodes' stamps are of one length
                        last, pause = stamp, PAUSE
                        for line in _shown(text, begins):
                            yield line
                    begins = piece.endswith("\n")
        except ApiNotFound:
            return
        except ApiInvalid:
            pass  # it doesn't run yet
        except ApiCrowded as exc:
            if not told:
                yield f"(what pod {name} prints isn't shown yet: {exc})"
            told = True
        except ApiError as exc:
            log.info("the log of pod %s broke off: %s", name, exc)
        if over:
            return
        await clock.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def _shown(piece: str, begins: bool) -> list[str]:
    """What is to be seen of it: not the mere end of what was given out before, nor of an empty bar."""
    text = piece.rstrip("\r\n")
    return [text] if text or (begins and piece.endswith("\n")) else []
