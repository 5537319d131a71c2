"""What changes of a Pipeline when: its spec, its marks, its status. Pure, on the object or the status in place.

Used by `store`, which has these changes written: a change may be made again, on top of what others have changed
meanwhile. What an object looks like says `resource`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from nomad.kubernetes.names import FINALIZER
from nomad.master.kube import resource
from nomad.master.kube.resource import Json
from nomad.master.state import DesiredPipeline
from nomad.master.store import StoredOperator
from nomad.master.views import MoveView, PlacementView

# Of an object


def mark(found: Json) -> str | None:
    """The master that made it, unless all of that is done."""
    text = (found["metadata"].get("annotations") or {}).get(resource.SUBMITTED_ANNOTATION)
    return None if text is None else str(text)


def unmark(found: Json) -> None:
    """All of its making is done."""
    annotations = found["metadata"].get("annotations") or {}
    annotations.pop(resource.SUBMITTED_ANNOTATION, None)


def complete(found: Json, wanted: DesiredPipeline, content: Json) -> None:
    """It is taken on; `content` is what was submitted."""
    finalizers = found["metadata"].get("finalizers") or []
    found["metadata"]["finalizers"] = list(dict.fromkeys([*finalizers, FINALIZER]))
    found["spec"]["moves"] = wanted.moves
    for key in ("pins", "profile"):
        put(found["spec"], key, content["spec"].get(key))


def ask_placing(found: Json, moves: bool, pins: dict[str, str]) -> None:
    """What Nomad may do by itself. What a user has asked for in the object, and can't be yet, stays asked for."""
    found["spec"]["moves"] = moves
    asked, met = dict(found["spec"].get("pins") or {}), (found.get("status") or {}).get("pins") or {}
    kept = {name: node for name, node in asked.items() if name in pins or met.get(name) != node}
    put(found["spec"], "pins", kept | {name: node for name, node in pins.items() if met.get(name) != node})


# Of a status


def accept(status: Json, wanted: DesiredPipeline, generation: int) -> None:
    """That of a pipeline that has just been taken on."""
    status.clear()
    status.update(resource.accepted(wanted))
    status["observedGeneration"] = generation


def place(status: Json, placement: dict[str, PlacementView]) -> None:
    """Where the next pods go."""
    status["placement"] = resource.placement(placement)
    for entry in status.get("operators") or ():
        if entry["name"] in placement:
            entry["node"] = placement[entry["name"]].node


def save_operator(status: Json, operator: StoredOperator) -> None:
    """Write or replace."""
    node = ((status.get("placement") or {}).get(operator.name) or {}).get("node", "")
    entry = resource.stored_operator(operator, node)
    entries = status.setdefault("operators", [])
    for index, other in enumerate(entries):
        if other["name"] == operator.name:
            entries[index] = entry
            return
    entries.append(entry)


def save_move(status: Json, move: MoveView) -> None:
    """Write or replace one that is open."""
    entries = status.setdefault("openMoves", [])
    entries[:] = [entry for entry in entries if entry["id"] != move.id] + [resource.move(move)]
    entries.sort(key=lambda entry: (entry["asked"], entry["id"]))


def save_moves(status: Json, moves: Iterable[MoveView], open: Collection[str], done: int) -> None:
    """Write or replace `moves`, of which those with the ids `open` stay; `done` have been made in all."""
    for view in moves:
        save_move(status, view)
    status["openMoves"] = [entry for entry in status["openMoves"] if entry["id"] in open]
    status["moves"] = done
    if not status["openMoves"]:
        del status["openMoves"]


def withdraw_move(status: Json, id: str) -> None:
    """As if it hadn't been asked for."""
    put(status, "openMoves", [entry for entry in status.get("openMoves") or () if entry["id"] != id])


# Of both


def put(content: Json, key: str, value: Any) -> None:
    """What is empty isn't there."""
    if value:
        content[key] = value
    else:
        content.pop(key, None)


def ordered(moves: Iterable[MoveView]) -> list[MoveView]:
    """Oldest first."""
    return sorted(moves, key=lambda view: (view.asked, view.id))
