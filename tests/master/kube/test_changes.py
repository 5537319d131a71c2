"""What changes of a Pipeline when; each may be made again on top of what others have changed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nomad.kubernetes.names import FINALIZER
from nomad.master.kube import changes, resource
from nomad.master.kube.resource import Json
from nomad.master.views import MoveState, PlacementView
from tests.contract.store import wanted
from tests.master.kube.stores import MOVE, PAST


def test_one_that_was_taken_on_is_kept_until_it_is_let_go_and_marked_no_more() -> None:
    marks = {resource.SUBMITTED_ANNOTATION: "1/a", "of": "a user"}
    found: Json = {"metadata": {"finalizers": ["other"], "annotations": marks}, "spec": {"pins": {"square": "edge"}}}
    assert changes.mark(found) == "1/a"
    for _ in range(2):
        changes.complete(found, wanted(), {"spec": {}})
        changes.unmark(found)
    assert found["metadata"] == {"finalizers": ["other", FINALIZER], "annotations": {"of": "a user"}}
    assert found["spec"] == {"moves": wanted().moves}
    assert changes.mark(found) is None


@pytest.mark.parametrize(
    ("asked", "met", "pins", "then"),
    [
        ({}, {}, {"a": "x"}, {"a": "x"}),
        ({"a": "x"}, {"a": "x"}, {"a": "x"}, {"a": "x"}),
        ({"a": "x"}, {"a": "x"}, {}, {}),
        ({"a": "y"}, {"a": "x"}, {}, {"a": "y"}),
        ({"a": "y"}, {"a": "x"}, {"a": "x"}, {"a": "y"}),
        ({"a": "y"}, {"a": "x"}, {"a": "z"}, {"a": "z"}),
    ],
)
def test_what_a_user_asks_for_and_cant_be_yet_stays_asked_for(asked: Any, met: Any, pins: Any, then: Any) -> None:
    found: Json = {"spec": {"pins": asked}, "status": {"pins": met}}
    changes.ask_placing(found, False, pins)
    assert (found["spec"].get("pins", {}), found["spec"]["moves"]) == (then, False)


def test_an_operator_is_written_or_replaced_where_it_is_placed() -> None:
    status: Json = {}
    changes.place(status, {"square": PlacementView("edge", "because")})
    for restarts in (0, 1):
        changes.save_operator(status, replace(PAST, restarts=restarts))
    changes.save_operator(status, replace(PAST, name="sink"))
    assert [(op["name"], op["node"]) for op in status["operators"]] == [("square", "edge"), ("sink", "")]
    changes.place(status, {"square": PlacementView("fog", "because")})
    assert [op["node"] for op in status["operators"]] == ["fog", ""]


def test_open_moves_are_in_the_order_in_which_they_were_asked_for() -> None:
    status: Json = {}
    earlier, other = replace(MOVE, id="e", asked=0.5), replace(MOVE, id="n")
    for move in (MOVE, other, earlier, replace(MOVE, state=MoveState.STARTING)):
        changes.save_move(status, move)
    assert [entry["id"] for entry in status["openMoves"]] == ["e", "m", "n"]
    changes.save_moves(status, [replace(MOVE, state=MoveState.DONE)], {"e", "n"}, 1)
    assert ([entry["id"] for entry in status["openMoves"]], status["moves"]) == (["e", "n"], 1)
    changes.withdraw_move(status, "e")
    changes.withdraw_move(status, "n")
    assert "openMoves" not in status
