from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nomad.control import Shape
from nomad.master.reconcile import listen_at
from nomad.master.reconcile.actions import (
    Action,
    AskStop,
    Assign,
    Ended,
    Finish,
    Forget,
    Hearing,
    Kill,
    Ready,
    Rehome,
    Running,
    Start,
    TellPeers,
)
from nomad.master.state import Goal, Outcome, PodState, Requested, RequestedPipeline
from nomad.master.views import PlacementView
from nomad.runtime.base import NodeInfo, ObservedPod, PodPhase
from nomad.settings import Backoff
from tests.master import worlds
from tests.master.worlds import NAMES, OVERDUE, SETTINGS, World


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def working() -> World:
    world = World()
    world.all_ready()
    return world


def of(kind: type[Action], world: World) -> list[Any]:
    """The actions of one kind that a step takes now."""
    return [action for action in world.step().actions if isinstance(action, kind)]


def operators(world: World) -> dict[str, Any]:
    return dict(world.requested.pipelines["p"].operators)


# Starting


def test_a_new_pipeline_gets_its_pods(world: World) -> None:
    assert world.step().actions == (
        Start("p", "source", "p.source-e1", 1, "edge"),
        Start("p", "square", "p.square-e1", 1, "cloud"),
        Start("p", "sink", "p.sink-e1", 1, "cloud"),
    )
    assert world.step().actions == ()


def test_epochs_are_above_those_of_removed_pipelines(world: World) -> None:
    world.desired.pipelines["p"].epoch_floor = 7
    assert [start.epoch for start in of(Start, world)] == [8, 8, 8]


def test_a_pod_is_assigned_once_per_connection_and_only_if_it_needs_it(world: World) -> None:
    world.step()
    world.connect("square")
    (assign,) = of(Assign, world)
    assert (assign.operator, assign.pod, assign.speed) == ("square", "p.square-e1", 1.0)
    assert [(link.link, link.direction, link.peer_operator, link.address) for link in assign.links] == [
        ("p:source>square", "in", "source", None),
        ("p:square>sink", "out", "sink", None),
    ]
    assert not of(Assign, world)
    world.connect("square")  # it lost the connection before it heard
    assert of(Assign, world)
    world.connect("square", assigned=True)
    assert not of(Assign, world)


def test_peers_are_told_addresses_and_epochs_as_they_become_known(world: World) -> None:
    world.step()
    for name in NAMES:
        world.connect(name)
    world.step()
    world.ready("square")
    assert not of(TellPeers, world)  # the source isn't ready to be told
    world.ready("source")
    (tell,) = of(TellPeers, world)
    assert tell.pod == "p.source-e1"
    (link,) = tell.links
    assert (link.direction, link.address, link.peer_epoch) == ("out", "unix:/p.square-e1", 1)
    world.ready("sink")
    assert [tell.pod for tell in of(TellPeers, world)] == ["p.square-e1"]


def test_all_ready_is_said_once(working: World) -> None:
    world = World()
    seen: list[Action] = []
    world.step()
    for name in NAMES:
        world.connect(name)
        world.ready(name)
        seen += world.step().actions
    assert [action.operator for action in seen if isinstance(action, Ready)] == list(NAMES)
    assert [action for action in seen if isinstance(action, Running)] == [Running("p")]
    assert working.step().actions == ()


def test_a_pod_that_never_gets_ready_is_replaced(world: World) -> None:
    decision = world.step()
    for name in NAMES:
        world.run(name)
    decision = world.step()
    assert decision.wake_at == world.now + SETTINGS.start_timeout
    world.now += SETTINGS.start_timeout
    assert [kill.pod for kill in of(Kill, world)] == ["p.source-e1", "p.square-e1", "p.sink-e1"]
    assert world.step().actions == ()
    world.now += SETTINGS.stop_grace + SETTINGS.retry
    assert len(of(Kill, world)) == 3  # still there: asked again
    world.exit("source")
    (ended,) = of(Ended, world)
    assert ended.retry_at == world.now + SETTINGS.backoff.first


# Ends that aren't wanted


@pytest.mark.parametrize("code", [0, 1, 3, 4, 5, -9, -11, None])
def test_what_died_is_started_again_after_a_pause(working: World, code: int | None) -> None:
    working.exit("square", code)
    decision = working.step()
    retry_at = working.now + SETTINGS.backoff.first
    assert decision.wake_at is not None
    assert Ended("p", "square", "p.square-e1", retry_at, False) in decision.actions
    assert not of(Start, working)
    working.now = retry_at
    assert of(Start, working) == [Start("p", "square", "p.square-e2", 2, "cloud")]
    assert operators(working)["square"].restarts == 1


def test_neighbours_go_on_and_are_told(working: World) -> None:
    working.exit("square")
    decision = working.step()
    assert not [action for action in decision.actions if isinstance(action, (Kill, AskStop, Start))]
    (tell,) = [action for action in decision.actions if isinstance(action, TellPeers)]
    assert tell.pod == "p.source-e1"
    assert tell.links[0].address is None
    working.now += SETTINGS.backoff.first
    told = {tell.operator: tell.links for tell in of(TellPeers, working)}
    assert told["source"][0].peer_epoch == 2
    assert told["sink"][0].peer_epoch == 2  # the old instance may not be heard any more
    working.connect("square")
    working.step()
    working.ready("square")
    told = {tell.operator: tell.links for tell in of(TellPeers, working)}
    assert told["source"][0].address == "unix:/p.square-e2"
    assert "sink" not in told


def test_pauses_grow_to_a_limit_and_begin_again_after_a_healthy_time(working: World) -> None:
    pauses = []
    for _ in range(6):
        working.exit("square")
        (ended,) = of(Ended, working)
        working.bury()
        pauses.append(ended.retry_at - working.now)
        working.now = ended.retry_at
        working.step()
        working.connect("square")
        working.ready("square")
        working.step()
    assert pauses == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    working.now += SETTINGS.backoff.healthy
    working.exit("square")
    (ended,) = of(Ended, working)
    assert ended.retry_at - working.now == 1.0


def test_a_pod_that_could_not_be_started_is_tried_again(world: World) -> None:
    world.step()
    world.state("square").start_error = "no memory"
    (ended,) = of(Ended, world)
    assert ended == Ended("p", "square", "p.square-e1", world.now + 1.0, False)


@pytest.mark.parametrize("code", [3, 4])
def test_what_cannot_be_mended_fails_the_pipeline(working: World, code: int) -> None:
    working.fail("square", code)
    decision = working.step()
    (finish,) = [action for action in decision.actions if isinstance(action, Finish)]
    assert finish.outcome is Outcome.FAILED
    assert finish.reason == "operator square: ZeroDivisionError: division by zero"
    working.store()
    decision = working.step()
    assert {stop.operator for stop in decision.actions if isinstance(stop, AskStop)} == {"source", "sink"}
    assert Ended("p", "square", "p.square-e1", None, False) in decision.actions
    for name in ("source", "sink"):
        working.exit(name, 0)
    assert of(Ended, working) == [Ended("p", name, f"p.{name}-e1", None, True) for name in ("source", "sink")]
    working.now += 1000
    assert working.step().actions == ()


def test_a_fatal_error_counts_before_the_process_has_ended(working: World) -> None:
    state = working.state("sink")
    state.error, state.fatal = {"type": "ZeroDivisionError", "message": "division by zero"}, True
    (finish,) = of(Finish, working)
    assert finish == Finish("p", Outcome.FAILED, "operator sink: ZeroDivisionError: division by zero")


def test_an_error_that_is_not_fatal_changes_nothing(working: World) -> None:
    working.state("sink").error = {"type": "ValueError", "message": "no"}
    assert working.step().actions == ()


def test_a_finished_source_completes_the_pipeline(working: World) -> None:
    working.state("source").finished = True
    assert working.step().actions == (Finish("p", Outcome.COMPLETED, ""),)
    working.store()
    stops = of(AskStop, working)
    assert [(stop.operator, stop.drain) for stop in stops] == [(name, False) for name in NAMES]


@pytest.mark.parametrize("closing", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_until_an_outcome_is_stored_nothing_is_ended_or_started(working: World, fails: bool, closing: bool) -> None:
    """The next master, which doesn't know it, finds the source as it is, and comes to the same."""
    if fails:
        working.fail("square", 4)
    else:
        working.state("source").finished = True
    assert [type(action) for action in working.step().actions] == [Finish]
    working.desired.closing = closing
    if not fails:
        working.exit("square")
    working.now += 10_000
    assert not [a for a in working.step().actions if isinstance(a, (AskStop, Kill, Ended, Start))]
    world = restarted(working)
    world.observed.pods = working.observed.pods
    actions = world.step().actions
    assert not [action for action in actions if isinstance(action, (AskStop, Kill, Start))]
    assert [type(action) for action in actions if isinstance(action, Finish)] == [Finish]
    working.store()
    assert {stop.operator for stop in of(AskStop, working)} == {"source", "sink"}


def test_what_is_stopped_or_removed_waits_for_no_outcome(working: World) -> None:
    working.state("source").finished = True
    working.step()
    working.desired.pipelines["p"].goal = Goal.STOP
    assert {stop.operator for stop in of(AskStop, working)} == set(NAMES)


# Heart-beats


def test_silence_is_noted_and_nothing_is_ended_for_it(working: World) -> None:
    decision = working.decide()
    assert decision.wake_at is None
    assert decision.listen_at == working.now + OVERDUE
    working.now += OVERDUE
    assert of(Hearing, working) == [Hearing("p", name, f"p.{name}-e1", True) for name in NAMES]
    working.now += 10_000
    assert working.step().actions == ()
    working.state("square").heartbeat_at = working.now
    assert of(Hearing, working) == [Hearing("p", "square", "p.square-e1", False)]


def test_a_pod_on_a_lost_node_is_not_listened_to(working: World) -> None:
    working.observed.nodes["edge"] = NodeInfo("edge", ready=False)
    working.step()
    working.now += OVERDUE - 1
    for name in ("square", "sink"):
        working.state(name).heartbeat_at = working.now
    decision = working.step()
    assert decision.listen_at == working.now + OVERDUE
    assert listen_at(working.requested, working.observed, overdue=OVERDUE) == decision.listen_at, "the source is away"


def test_a_lost_connection_is_no_end(working: World) -> None:
    working.state("square").connection = None
    assert working.step().actions == ()
    working.connect("square", assigned=True)
    (tell,) = of(TellPeers, working)
    assert [link.link for link in tell.links] == ["p:source>square", "p:square>sink"]


# Links and nodes that change


def test_a_changed_link_is_told_to_both_of_its_ends(working: World) -> None:
    working.desired.shapes["edge", "cloud"] = Shape(latency=0.08)
    (tell,) = of(TellPeers, working)
    assert (tell.operator, tell.links[0].shape.latency) == ("source", 0.08)
    working.desired.shapes["cloud", "edge"] = Shape(latency=0.05)
    (tell,) = of(TellPeers, working)
    assert (tell.operator, [link.link for link in tell.links]) == ("square", ["p:source>square"])
    assert tell.links[0].shape.latency == 0.05


def test_links_inside_a_node_are_not_shaped(working: World) -> None:
    working.desired.shapes["cloud", "cloud"] = Shape(latency=1.0)
    assert working.step().actions == ()


def test_a_changed_speed_is_told_to_the_pods_there(working: World) -> None:
    working.desired.speeds["cloud"] = 0.5
    assert [(tell.operator, tell.links, tell.speed) for tell in of(TellPeers, working)] == [
        ("square", (), 0.5),
        ("sink", (), 0.5),
    ]


# Nodes that are lost


def lose(world: World, *, back: bool = False) -> None:
    world.observed.nodes = {**world.observed.nodes, "cloud": NodeInfo("cloud", ready=back)}
    world.observed.node_changes += 1


def test_another_node_is_asked_for_less_and_less_often_and_that_is_told_once(working: World) -> None:
    lose(working)
    asked: list[tuple[float, Rehome]] = []
    begun = working.now
    while working.now < begun + 600:
        decision = working.step()
        asked += [(working.now - begun, action) for action in decision.actions if isinstance(action, Rehome)]
        assert not [action for action in decision.actions if isinstance(action, (Kill, Ended, Start))]
        working.now = decision.wake_at or begun + 600
        working.state("source").heartbeat_at = working.now
    assert [at for at, _ in asked[:7]] == [0, 2, 6, 14, 30, 62, 122]
    assert asked[0][1] == Rehome("p", "square", "cloud", "it is lost", False)
    assert all(again.again for _, again in asked[1:])


def test_when_nodes_change_another_one_is_asked_for_at_once(working: World) -> None:
    lose(working)
    for _ in range(6):
        working.step()
        working.now += 60
    working.step()
    working.now += 1
    assert not of(Rehome, working)
    working.observed.nodes["fog"] = NodeInfo("fog")
    working.observed.node_changes += 1
    assert [action.again for action in of(Rehome, working)] == [True]
    assert not of(Rehome, working)
    working.now += SETTINGS.relieve_backoff.first
    assert of(Rehome, working)
    lose(working, back=True)
    assert not of(Rehome, working)
    lose(working)
    assert [action.again for action in of(Rehome, working)] == [False]


@pytest.fixture
def tired(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """The node of `square` couldn't start its pod a third time just now, and crashes make it wait 0.8 s."""
    monkeypatch.setattr(worlds, "SETTINGS", replace(SETTINGS, backoff=Backoff()))
    world.step()
    for _ in range(SETTINGS.start_attempts - 1):
        world.state("square").start_error = "no device"
        world.now = world.step().wake_at or 0.0
        assert [start.node for start in of(Start, world)] == ["cloud"]
    world.state("square").start_error = "no device"
    return world


def test_a_node_where_nothing_starts_isnt_tried_while_another_is_looked_for(tired: World) -> None:
    begun = tired.now
    assert of(Rehome, tired) == [Rehome("p", "square", "cloud", "no pod could be started there", False)]
    tired.now = begun + 0.9
    assert not of(Start, tired)
    assert tired.decide().wake_at == begun + SETTINGS.relieve_backoff.first
    pipeline = tired.desired.pipelines["p"]
    pipeline.placement = {**pipeline.placement, "square": PlacementView("edge", "it was rehomed")}
    assert [start.node for start in of(Start, tired)] == ["edge"]


def test_where_there_is_no_other_node_the_same_one_is_tried_again_less_and_less_often(tired: World) -> None:
    begun, asked, started = tired.now, [], []
    while tired.now < begun + 300:
        decision = tired.step()
        asked += [tired.now - begun for action in decision.actions if isinstance(action, Rehome)]
        if any(isinstance(action, Start) for action in decision.actions):
            started.append(tired.now - begun)
            tired.state("square").start_error = "no device"
            continue
        tired.now = decision.wake_at or begun + 300
    assert started[:6] == pytest.approx([2, 6, 14, 30, 62, 122])
    assert asked[:6] == pytest.approx([0, 2, 6, 14, 30, 62])


def test_an_operator_that_is_bound_to_its_node_waits_for_no_other(tired: World) -> None:
    tired.desired.pipelines["p"].pins["square"] = "cloud"
    assert not of(Rehome, tired)
    tired.now = tired.decide().wake_at or 0.0
    assert [start.node for start in of(Start, tired)] == ["cloud"]


# Stopping


def test_sources_stop_first_and_drain(working: World) -> None:
    working.desired.pipelines["p"].goal = Goal.STOP
    assert of(AskStop, working) == [AskStop("p", "source", "p.source-e1", True, SETTINGS.drain_grace)]
    assert working.step().actions == ()
    working.exit("source", 0)
    stops = of(AskStop, working)
    assert [(stop.operator, stop.drain, stop.grace) for stop in stops] == [
        ("square", False, SETTINGS.stop_grace),
        ("sink", False, SETTINGS.stop_grace),
    ]
    working.exit("square", 0)
    working.exit("sink", 0)
    assert of(Finish, working) == [Finish("p", Outcome.STOPPED, "")]
    working.now += 1000
    assert working.step().actions == ()


def test_draining_has_an_end(working: World) -> None:
    working.desired.pipelines["p"].goal = Goal.STOP
    working.step()
    working.now += SETTINGS.drain_grace + SETTINGS.retry
    assert [kill.pod for kill in of(Kill, working)] == ["p.source-e1"]
    working.now += SETTINGS.stop_grace - SETTINGS.retry
    assert [stop.operator for stop in of(AskStop, working)] == ["square", "sink"]
    working.now += SETTINGS.stop_grace + SETTINGS.retry
    assert {kill.pod for kill in of(Kill, working)} == {"p.source-e1", "p.square-e1", "p.sink-e1"}


def test_what_dies_while_the_source_drains_is_started_again(working: World) -> None:
    working.desired.pipelines["p"].goal = Goal.STOP
    working.step()
    working.exit("square")
    (ended,) = of(Ended, working)
    assert ended.retry_at is not None
    working.now = ended.retry_at
    assert of(Start, working) == [Start("p", "square", "p.square-e2", 2, "cloud")]
    working.connect("square")
    working.step()
    working.ready("square")
    told = {tell.operator: tell.links for tell in of(TellPeers, working)}
    assert told["source"][0].address == "unix:/p.square-e2"
    working.exit("source", 0)
    assert {stop.operator for stop in of(AskStop, working)} == {"square", "sink"}


def test_an_error_while_draining_fails_the_pipeline(working: World) -> None:
    working.desired.pipelines["p"].goal = Goal.STOP
    working.step()
    working.fail("square", 4)
    actions = working.step().actions
    assert [action.outcome for action in actions if isinstance(action, Finish)] == [Outcome.FAILED]
    assert [action.operator for action in actions if isinstance(action, AskStop)] == ["sink"]


def test_a_pod_that_failed_may_end_by_itself(working: World) -> None:
    state = working.state("square")
    state.error, state.fatal, state.connection = {"type": "E", "message": "m"}, True, None
    working.step()
    working.store()
    actions = working.step().actions
    assert not [action for action in actions if isinstance(action, Kill)]
    working.now += SETTINGS.stop_grace + SETTINGS.retry
    assert "p.square-e1" in {kill.pod for kill in of(Kill, working)}


def test_a_pod_that_is_not_connected_is_ended_by_the_runtime(world: World) -> None:
    world.step()
    world.desired.pipelines["p"].goal = Goal.STOP
    assert [kill.pod for kill in of(Kill, world)] == ["p.source-e1"]


def test_a_pipeline_that_is_removed_is_ended_at_once_and_forgotten(working: World) -> None:
    working.desired.pipelines["p"].goal = Goal.REMOVE
    assert {(stop.operator, stop.drain) for stop in of(AskStop, working)} == {(name, False) for name in NAMES}
    for name in NAMES:
        working.exit(name, 0)
    assert of(Forget, working) == [Forget("p")]
    assert working.step().actions == ()
    del working.desired.pipelines["p"]
    working.step()
    assert working.requested == Requested()


def test_a_master_that_closes_stops_the_pods_and_no_pipeline(working: World) -> None:
    working.desired.closing = True
    assert [stop.operator for stop in of(AskStop, working)] == ["source"]
    for name in NAMES:
        working.exit(name, 0)
    actions = working.step().actions
    assert {type(action) for action in actions} == {Ended}
    assert working.requested.pipelines["p"].outcome is None
    working.now += 1000
    assert working.step().actions == ()


# After a restart of the master


def restarted(working: World) -> World:
    """What a new master knows of a pipeline at work: the pods that were asked for, and that they run."""
    world = World()
    world.now = 50_000.0
    adopted = {
        name: replace(op, adopted=True, asked_at=world.now, told=None, ready=False)
        for name, op in operators(working).items()
    }
    world.requested = Requested({"p": RequestedPipeline(adopted)})
    for name in NAMES:
        world.run(name)
    return world


def test_pods_of_an_earlier_master_are_given_time(working: World) -> None:
    world = restarted(working)
    decision = world.step()
    assert decision.actions == ()
    assert decision.wake_at == world.now + SETTINGS.adopt_grace
    for name in ("source", "square"):
        world.connect(name, assigned=True)
        world.ready(name)
    actions = world.step().actions
    assert Ready("p", "source", "p.source-e1", True) in actions
    assert not [action for action in actions if isinstance(action, (Assign, Start, Kill))]
    world.now += SETTINGS.adopt_grace
    assert [kill.pod for kill in of(Kill, world)] == ["p.sink-e1"]
    world.exit("sink", None)
    world.step()
    world.now += SETTINGS.backoff.first
    assert of(Start, world) == [Start("p", "sink", "p.sink-e2", 2, "cloud")]


def test_many_pods_are_given_more_time_once(working: World) -> None:
    """Those that a master finds when it starts; not those whose node comes back later."""
    world = restarted(working)
    have = world.requested.pipelines["p"]
    waited = {name: replace(op, grace=250.0) for name, op in have.operators.items()}
    world.requested = Requested({"p": replace(have, operators=waited)})
    assert world.decide().wake_at == world.now + 250.0
    lose(world)
    world.step()
    world.now += 250.0
    assert [kill.pod for kill in of(Kill, world)] == ["p.source-e1"]
    lose(world, back=True)
    assert not of(Kill, world)
    world.now += SETTINGS.adopt_grace
    assert {"p.square-e1", "p.sink-e1"} <= {kill.pod for kill in of(Kill, world)}


def test_an_adopted_pod_that_still_loads_its_model_is_given_the_time_of_any_other(working: World) -> None:
    world = restarted(working)
    world.step()
    for name in NAMES:
        world.connect(name, assigned=True)
    for name in ("source", "sink"):
        world.ready(name)
    world.step()
    world.now += SETTINGS.start_timeout - 1.0
    assert not of(Kill, world)
    world.now += 1.0
    assert [kill.pod for kill in of(Kill, world)] == ["p.square-e1"]


def test_a_working_link_is_not_cut_while_its_receiver_has_not_reported(working: World) -> None:
    world = restarted(working)
    world.connect("source", assigned=True)
    world.ready("source")
    (tell,) = of(TellPeers, world)
    assert tell.links == ()  # nothing is known of the receiver's address, so nothing is said of it
    world.connect("square", assigned=True)
    world.ready("square")
    told = {tell.operator: tell.links for tell in of(TellPeers, world)}
    assert told["source"][0].address == "unix:/p.square-e1"
    assert [link.link for link in told["square"]] == ["p:source>square"]


def test_a_pod_that_was_never_assigned_is_assigned_by_the_next_master(working: World) -> None:
    world = restarted(working)
    world.connect("square", assigned=False)
    assert [assign.pod for assign in of(Assign, world)] == ["p.square-e1"]


def test_pods_that_nobody_wants_are_ended(world: World) -> None:
    stray = ObservedPod("gone.source-e3", PodPhase.RUNNING, "edge", 3, pid=7)
    world.observed.pods[stray.id] = PodState(runtime=stray)
    assert [kill.pod for kill in of(Kill, world)] == ["gone.source-e3"]
    assert not of(Kill, world)
    world.now += SETTINGS.stop_grace + SETTINGS.retry
    assert [kill.pod for kill in of(Kill, world)] == ["gone.source-e3"]
    world.observed.pods[stray.id].runtime = replace(stray, phase=PodPhase.EXITED)
    world.step()
    assert world.requested.strays == {}


def test_pods_of_a_pipeline_that_couldnt_be_read_are_left_alone(world: World) -> None:
    kept = ObservedPod("unread.source-e3", PodPhase.RUNNING, "edge", 3, pid=7)
    world.observed.pods[kept.id] = PodState(runtime=kept)
    world.desired.unread = unread = {"unread", "p"}
    assert not of(Kill, world)
    assert world.requested.strays == {}
    older = replace(kept, id="p.source-e0")  # of one that is read
    world.observed.pods[older.id] = PodState(runtime=older)
    assert [kill.pod for kill in of(Kill, world)] == [older.id]
    unread.remove("unread")  # nobody wants it any more
    assert [kill.pod for kill in of(Kill, world)] == [kept.id]


# Whatever happens

EVENTS = st.tuples(
    st.sampled_from(
        ["run", "connect", "ready", "disconnect", "exit", "fail to start", "beat", "time", "finish", "fatal", "shape"]
    ),
    st.sampled_from(NAMES),
    st.floats(0.0, 200.0),
)
GOALS = st.sampled_from([Goal.RUN, Goal.STOP, Goal.REMOVE])


def happen(world: World, event: str, name: str, number: float) -> None:
    if event == "time":
        world.now += number
        return
    if event == "shape":
        world.desired.shapes["edge", "cloud"] = Shape(latency=number)
        return
    if operators(world)[name].pod is None:
        return
    state = world.state(name)
    if state.ended:
        return
    match event:
        case "run":
            world.run(name)
        case "connect":
            world.connect(name, assigned=state.assigned)
        case "ready" if state.connection is not None:
            world.ready(name)
        case "disconnect":
            state.connection = None
        case "exit":
            world.exit(name, -9)
        case "fail to start" if state.runtime is None and state.connection is None:
            state.start_error = "no"
        case "beat" if state.ready_at is not None:
            state.heartbeat_at = world.now
        case "finish" if name == "source" and state.ready_at is not None:
            state.finished = True
        case "fatal" if number > 190:
            state.error, state.fatal = {"type": "E", "message": "m"}, True


def check(world: World, epochs: dict[str, int]) -> None:
    """Steps, and what must hold of every step whatever was before it."""
    before = operators(world) if "p" in world.requested.pipelines else {}
    ended = {name for name, op in before.items() if op.pod and world.observed.pods.get(op.pod, PodState()).ended}
    decision = world.step()
    assert world.decide().actions == (), "a step that was taken over asks for nothing more"
    assert world.decide().requested == world.requested
    assert decision.wake_at is None or decision.wake_at > world.now
    if decision.listen_at is not None:
        listened = listen_at(world.requested, world.observed, overdue=OVERDUE)
        assert listened is not None
        assert listened <= decision.listen_at, "what a step listens to is listened to until the next one"
    for action in decision.actions:
        if isinstance(action, Start):
            assert before.get(action.operator) is None or before[action.operator].pod is None
            assert action.epoch > epochs.get(action.operator, 0)
            epochs[action.operator] = action.epoch
        if isinstance(action, Ended):
            assert action.operator in ended
            if action.retry_at is not None:
                assert 0 < action.retry_at - world.now <= SETTINGS.backoff.limit
        if isinstance(action, TellPeers):
            assert world.state(action.operator).ready_at is not None
    world.bury()


def cooperate(world: World) -> None:
    """A store and pods that do what they are asked to, for one moment."""
    if world.requested.pipelines["p"].outcome is not None:
        world.store()
    for name, op in operators(world).items():
        if op.pod is None:
            continue
        state = world.state(name)
        if op.kill_by is not None or op.stop_by is not None:
            world.exit(name, 0)
            continue
        world.run(name)
        if state.connection is None:
            world.connect(name, assigned=state.assigned)
        elif op.told is not None or state.assigned:
            world.ready(name)


@pytest.mark.no_cover
@settings(max_examples=150)
@given(st.lists(EVENTS, max_size=40), GOALS)
def test_any_history_is_stepped_soundly_and_converges(events: list[tuple[str, str, float]], goal: Goal) -> None:
    world = World()
    epochs: dict[str, int] = {}
    check(world, epochs)
    for event in events:
        happen(world, *event)
        check(world, epochs)
    world.desired.pipelines["p"].goal = goal
    for _ in range(12):
        check(world, epochs)
        cooperate(world)
        world.now += SETTINGS.backoff.limit
    check(world, epochs)
    have = world.requested.pipelines["p"]
    running = {name for name, op in have.operators.items() if op.pod is not None}
    if goal is Goal.RUN and have.outcome is None:
        assert running == set(NAMES)
        assert all(op.ready for op in have.operators.values())
        told = operators(world)["source"].told
        assert told is not None
        assert told.links[0].address == f"unix:/{world.pod('square')}"
    else:
        assert running == set()
        assert have.outcome is not None or goal is Goal.REMOVE
        assert have.forgetting == (goal is Goal.REMOVE)
