"""What the enactor does for pods that have to go: orders that others take their places, carries over what they keep.

`reconcile` wants both. A pod has to go when somebody else ends it or its node, or when it is out of date; the order is
carried out like any other move.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError

from nomad.errors import NomadError
from nomad.master.moves import MoveLog
from nomad.master.observe import Observer
from nomad.master.pods import PodPort
from nomad.master.reconcile.actions import Carry, Relieve
from nomad.master.state import DesiredPipeline, operator_id
from nomad.master.views import PlacementView

log = logging.getLogger(__name__)

Homes = Callable[[DesiredPipeline, str, str], Awaitable[PlacementView]]
"""Another node for an operator (pipeline, operator, the node that won't do), everything else staying where it is.

Raises `NomadError` when there is none.
"""


@dataclass(frozen=True, slots=True)
class _Part:
    """What a pod answers to `export`."""

    data: bytes
    more: bool


_PART = TypeAdapter(_Part)


async def carry(action: Carry, port: PodPort, observer: Observer) -> None:
    """What one instance has set aside goes to the next one, a few MiB at a time. Nothing waits for it."""
    offset, more = 0, True
    try:
        while more:
            part = _PART.validate_python(await port.ask(action.old, "export", offset=offset))
            more = part.more and bool(part.data)
            await port.ask(action.new, "import", offset=offset, data=part.data, last=not more)
            offset += len(part.data)
    except (NomadError, ValidationError) as exc:
        observer.carried(action.new, str(exc))
    else:
        observer.carried(action.new)


async def relieve(action: Relieve, wanted: DesiredPipeline, homes: Homes, moves: MoveLog, observer: Observer) -> None:
    """Order a move for a pod that won't be there much longer, or shouldn't. Raises `NomadError`: ask again later."""
    node, placement = action.node, None
    if action.cause == "drain":
        id = operator_id(action.pipeline, action.operator)
        try:
            placement = await homes(wanted, action.operator, action.node)
        except NomadError as exc:
            if observer.homeless(id, str(exc)):
                log.warning("%s can't leave %s: %s", id, action.node, exc)
            return
        observer.homeless(id, None)
        node = placement.node
    await moves.order(
        wanted,
        action.operator,
        node,
        cause=action.cause,
        reason=action.reason,
        placement=placement,
        relieves=action.pod,
    )
