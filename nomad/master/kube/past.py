"""What has been, as it is kept in ConfigMaps: a pipeline's past moves, its operators' counters, failures and last
outputs, and the master's last events. Pure packing; `store` reads and writes.

A ConfigMap holds 1 MiB at most. What doesn't fit is left out in this order: last outputs, the largest first; logs and
tracebacks; the oldest events.
"""

from __future__ import annotations

import base64
import gzip
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import TypeAdapter

from nomad.control import PodStats
from nomad.errors import StateError
from nomad.master.views import EventView, FailureView, MoveView

Json = dict[str, Any]

MOST = 800 << 10
"""Bytes of one ConfigMap, before base64."""

MOST_EVENTS = 1_000

_MOVES, _EVENTS, _OPERATORS, _OUTPUT = "moves.json.gz", "events.json.gz", "operators.json.gz", "last-"


@dataclass(frozen=True, slots=True)
class PastOperator:
    """What is kept of the pods of an operator that have ended."""

    totals: PodStats = field(default_factory=PodStats)
    failure: FailureView | None = None


_DAMAGED = (ValueError, OSError, EOFError, zlib.error)
"""What reading raises where somebody has changed it."""

_MOVE_LIST = TypeAdapter(list[MoveView])
_EVENT_LIST = TypeAdapter(list[EventView])
_OPERATOR_MAP = TypeAdapter(dict[str, PastOperator])


def pack(moves: Sequence[MoveView], operators: Mapping[str, PastOperator]) -> dict[str, str]:
    """The `binaryData` of a pipeline's history."""
    moved = _zipped(_MOVE_LIST.dump_json(list(moves)))
    outputs = {name: past.totals.last_output for name, past in operators.items() if past.totals.last_output is not None}
    bare = {name: replace(past, totals=replace(past.totals, last_output=None)) for name, past in operators.items()}
    kept = _zipped(_OPERATOR_MAP.dump_json(bare))
    if len(moved) + len(kept) > MOST:
        bare = {name: replace(past, failure=_shortened(past.failure)) for name, past in bare.items()}
        kept = _zipped(_OPERATOR_MAP.dump_json(bare))
    room = MOST - len(moved) - len(kept)
    for name in sorted(outputs, key=lambda name: (-len(outputs[name]), name)):
        if sum(map(len, outputs.values())) <= room:
            break
        del outputs[name]
    parts = {_MOVES: moved, _OPERATORS: kept} | {_OUTPUT + name: data for name, data in outputs.items()}
    return {key: base64.b64encode(data).decode() for key, data in parts.items()}


def unpack(data: Mapping[str, str]) -> tuple[list[MoveView], dict[str, PastOperator]]:
    """The inverse. Raises `StateError`."""
    try:
        moves = _MOVE_LIST.validate_json(_unzipped(data.get(_MOVES)) or b"[]")
        operators = _OPERATOR_MAP.validate_json(_unzipped(data.get(_OPERATORS)) or b"{}")
        for name, past in operators.items():
            if (output := data.get(_OUTPUT + name)) is not None:
                past.totals.last_output = base64.b64decode(output)
    except _DAMAGED as exc:
        raise StateError(f"what was kept of a pipeline's past can't be read: {exc}") from exc
    return moves, operators


def pack_events(events: Sequence[EventView], keep: int) -> dict[str, str]:
    """The last events, as many as fit and `keep` at most."""
    kept = list(events[-min(keep, MOST_EVENTS) :])
    while len(packed := _zipped(_EVENT_LIST.dump_json(kept))) > MOST // 2:
        kept = kept[len(kept) // 2 :]
    return {_EVENTS: base64.b64encode(packed).decode()}


def unpack_events(data: Mapping[str, str]) -> list[EventView]:
    """Oldest first. Raises `StateError`."""
    try:
        return _EVENT_LIST.validate_json(_unzipped(data.get(_EVENTS)) or b"[]")
    except _DAMAGED as exc:
        raise StateError(f"the last events can't be read: {exc}") from exc


def is_fact(key: str) -> bool:
    """Whether an entry of the master's own ConfigMap is one of the small facts."""
    return key != _EVENTS


def _shortened(failure: FailureView | None) -> FailureView | None:
    if failure is None:
        return None
    return replace(failure, message=failure.message[:500], traceback=failure.traceback[-1000:], log=[])


def _zipped(data: bytes) -> bytes:
    """The same for the same data, so that what didn't change isn't written."""
    return gzip.compress(data, mtime=0)


def _unzipped(text: str | None) -> bytes:
    return gzip.decompress(base64.b64decode(text)) if text else b""
