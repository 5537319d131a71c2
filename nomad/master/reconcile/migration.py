"""A live move of one operator, as a table of states: what is waited for in each, for how long, and what follows.

Make before break: a second instance of the operator is started on the target beside the first, its neighbours shake
hands with it, and only then is it the one. Up to that point, which is written down before anything of it is
said, whatever goes wrong is rolled back and the old instance goes on; from there on there is only forward.

Called by `movesteps` with the facts of the moment, as often as it likes: the table is level-triggered. Pure: no clock,
no I/O, no await. How pods are started, told and ended is `podsteps`'s; `docs/moves.md` says what is promised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from nomad.master.views import MoveState
from nomad.settings import Moving


@dataclass(frozen=True, slots=True)
class Facts:
    """What holds of a move now, as far as it is seen."""

    wanted: bool
    """The pipeline is to go on."""
    at_work: bool
    """All of its operators are ready."""
    there: bool
    """The operator is on the target already, and that isn't the point of it."""
    target_ready: bool
    """Pods can run on the target."""
    old_gone: bool
    new_ready: bool
    new_gone: bool
    new_error: str = ""
    """How the new instance ended."""
    away: bool = False
    """The instance whose place was to be taken isn't the present one any more."""
    target_closed: bool = False
    """No new pods may be started on the target."""
    apart: bool = False
    """The new instance has another folder than the old one."""
    carried: bool = False
    """It has a copy of what the old one had set aside."""
    carry_error: str = ""
    connected: bool = False
    """The operators before have shaken hands with the new instance, and it has with those behind."""
    handed: bool = False
    """The old instance has let go of what it had set aside."""
    active: bool = False
    """The new instance has taken it over."""
    overheard: bool = False
    """An operator behind has heard the new instance: it won't listen to the old one any more."""
    stored: bool = False
    """The switch is written down."""
    store_error: str = ""
    turned: bool = False
    """The operators before send to the new instance."""
    followed: bool = False
    """Those behind hear it; where there are none, it hears those before."""
    counted: bool = False
    """What the move cost is known, as far as it can be."""


Condition = Callable[[Facts], bool]
Words = Callable[[Facts], str]


@dataclass(frozen=True, slots=True)
class Way:
    """When `when` holds, the move comes to `state`; `why` says what went wrong, "" for nothing."""

    when: Condition
    state: MoveState
    why: Words = field(default=lambda facts: "")


@dataclass(frozen=True, slots=True)
class Row:
    """One state: the ways out of it in order of precedence, and what follows when its deadline passes."""

    ways: tuple[Way, ...]
    deadline: Callable[[Moving], float]
    late: MoveState
    why: str = ""
    patient: Condition = field(default=lambda facts: False)
    """While this holds the deadline doesn't count."""


def _says(text: str) -> Words:
    return lambda facts: text


_OVER = "the pipeline, or the master, is being stopped"
_LOST = "the target is lost"

_BACK = (
    Way(lambda f: not f.wanted, MoveState.ROLLED_BACK, _says(_OVER)),
    Way(lambda f: not f.target_ready, MoveState.ROLLED_BACK, _says(_LOST)),
    Way(lambda f: f.new_gone, MoveState.ROLLED_BACK, lambda f: f"the new instance {f.new_error}"),
)
"""What ends a move from the start of the new instance to the switch."""

TABLE: Mapping[MoveState, Row] = {
    MoveState.PLANNED: Row(
        ways=(
            Way(lambda f: not f.wanted, MoveState.FAILED, _says(_OVER)),
            Way(lambda f: f.there, MoveState.FAILED, _says("the operator is there already")),
            Way(lambda f: f.away, MoveState.FAILED, _says("the instance that was to be replaced has ended")),
            Way(lambda f: not f.target_ready, MoveState.FAILED, _says(_LOST)),
            Way(lambda f: f.target_closed, MoveState.FAILED, _says("the target takes no new operators")),
            Way(lambda f: f.at_work, MoveState.STARTING),
        ),
        deadline=lambda settings: settings.plan,
        late=MoveState.FAILED,
        why="the pipeline wasn't at work in time",
    ),
    MoveState.STARTING: Row(
        ways=(
            *_BACK,
            Way(lambda f: f.old_gone and f.new_ready, MoveState.HANDING_OVER),
            Way(
                lambda f: f.old_gone,
                MoveState.ROLLED_BACK,
                _says("the old instance ended before the new one was ready"),
            ),
            Way(lambda f: f.new_ready, MoveState.CONNECTING),
        ),
        deadline=lambda settings: settings.start,
        late=MoveState.ROLLED_BACK,
        why="the new instance wasn't ready in time",
    ),
    MoveState.CONNECTING: Row(
        ways=(
            *_BACK,
            # With the old instance dead, nothing is gained by waiting: what is connected late dials by itself.
            Way(lambda f: f.old_gone, MoveState.HANDING_OVER),
            Way(lambda f: f.connected and f.apart, MoveState.CARRYING),
            Way(lambda f: f.connected, MoveState.HANDING_OVER),
        ),
        deadline=lambda settings: settings.connect,
        late=MoveState.ROLLED_BACK,
        why="its neighbours weren't connected with the new instance in time",
    ),
    MoveState.CARRYING: Row(
        ways=(
            *_BACK,
            # What it had set aside is lost with it; what the last operator was called for, too.
            Way(lambda f: f.old_gone, MoveState.HANDING_OVER),
            Way(
                lambda f: bool(f.carry_error),
                MoveState.ROLLED_BACK,
                lambda f: f"what is set aside couldn't be carried over: {f.carry_error}",
            ),
            Way(lambda f: f.carried, MoveState.HANDING_OVER),
        ),
        deadline=lambda settings: settings.carry,
        late=MoveState.ROLLED_BACK,
        why="what is set aside wasn't carried over in time",
    ),
    MoveState.HANDING_OVER: Row(
        ways=(
            *_BACK,
            Way(lambda f: f.overheard, MoveState.SWITCHING),
            Way(lambda f: f.handed and f.active, MoveState.SWITCHING),
        ),
        deadline=lambda settings: settings.hand_over,
        late=MoveState.ROLLED_BACK,
        why="the instances didn't hand over in time",
    ),
    MoveState.SWITCHING: Row(
        ways=(
            Way(
                lambda f: bool(f.store_error),
                MoveState.ROLLED_BACK,
                lambda f: f"the switch couldn't be written down: {f.store_error}",
            ),
            Way(lambda f: f.stored and not f.wanted, MoveState.STOPPING),
            Way(lambda f: f.stored and f.turned and f.followed, MoveState.STOPPING),
        ),
        deadline=lambda settings: settings.switch,
        late=MoveState.STOPPING,
        patient=lambda f: not f.stored,
    ),
    MoveState.STOPPING: Row(
        ways=(Way(lambda f: f.old_gone and (f.counted or not f.wanted), MoveState.DONE),),
        deadline=lambda settings: settings.stop,
        late=MoveState.DONE,
    ),
}
"""States that aren't here are final."""


def advance(state: MoveState, facts: Facts, *, late: bool) -> tuple[MoveState, str]:
    """The state that follows from the facts, or the same; and what went wrong. `late`: its `deadline` has passed."""
    row = TABLE.get(state)
    if row is None:
        return state, ""
    for way in row.ways:
        if way.when(facts):
            return way.state, way.why(facts)
    if late and not row.patient(facts):
        return row.late, row.why
    return state, ""


def deadline(state: MoveState, settings: Moving) -> float | None:
    """Seconds that a move may be in this state; None in a final one."""
    row = TABLE.get(state)
    return None if row is None else row.deadline(settings)
