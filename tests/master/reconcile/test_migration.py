"""The table of a move's states, and that whatever happens `reconcile` leads every move to an end it may have."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nomad.control import LinkStatus
from nomad.master.reconcile import migration
from nomad.master.reconcile.actions import Carry, Measure, Moving, Rehome, Relieve, Start, Switch, TellPeers
from nomad.master.reconcile.migration import TABLE, Facts, advance
from nomad.master.state import Goal, MoveOrder, PodState, RequestedOperator, Tally
from nomad.master.views import MoveState, PlacementView
from nomad.runtime.base import NodeInfo, ObservedPod, PodPhase
from nomad.settings import Moving as Deadlines
from tests.master.worlds import NAMES, SETTINGS, World, wanted

DEADLINES = Deadlines()
GOOD = Facts(wanted=True, at_work=True, there=False, target_ready=True, old_gone=False, new_ready=False, new_gone=False)
ORDER = [
    MoveState.PLANNED,
    MoveState.STARTING,
    MoveState.CONNECTING,
    MoveState.CARRYING,
    MoveState.HANDING_OVER,
    MoveState.SWITCHING,
    MoveState.STOPPING,
    MoveState.DONE,
]


def test_the_straight_way() -> None:
    facts, state, seen = GOOD, MoveState.PLANNED, []
    for change in (
        {},
        {"new_ready": True},
        {"connected": True, "apart": True},
        {"carried": True},
        {"handed": True, "active": True},
        {"stored": True, "turned": True, "followed": True},
        {"old_gone": True, "counted": True},
    ):
        facts = replace(facts, **change)
        state, error = advance(state, facts, late=False)
        assert error == ""
        seen.append(state)
    assert seen == ORDER[1:]


@pytest.mark.parametrize("state", ORDER[:-1])
def test_nothing_happens_without_a_reason_until_the_deadline(state: MoveState) -> None:
    facts = replace(GOOD, at_work=False, stored=True)
    assert migration.deadline(state, DEADLINES) is not None
    assert advance(state, facts, late=False) == (state, "")
    after, error = advance(state, facts, late=True)
    assert after is TABLE[state].late
    assert bool(error) == (after in (MoveState.FAILED, MoveState.ROLLED_BACK))


@given(
    st.sampled_from(ORDER),
    st.builds(
        Facts,
        **{name: st.booleans() for name in Facts.__dataclass_fields__ if "error" not in name},
        new_error=st.just("died"),
        store_error=st.sampled_from(["", "full"]),
        carry_error=st.sampled_from(["", "no folder"]),
    ),
    st.booleans(),
)
def test_there_is_no_way_back_after_the_switch_and_no_way_around_it(state: MoveState, facts: Facts, late: bool) -> None:
    after, error = advance(state, facts, late=late)
    if after in (MoveState.ROLLED_BACK, MoveState.FAILED):
        assert error
        assert state in ORDER[:6]
        assert state is not MoveState.SWITCHING or facts.store_error
        assert (after is MoveState.FAILED) == (state is MoveState.PLANNED)
    else:
        assert error == ""
        assert ORDER.index(after) in (
            ORDER.index(state),
            ORDER.index(state) + 1,
            *((4,) if state in (MoveState.STARTING, MoveState.CONNECTING) else ()),
        )
        if after is MoveState.STOPPING and state is MoveState.SWITCHING:
            assert facts.stored
    if state is MoveState.DONE:
        assert after is state


# Whatever happens


class Moved(World):
    """A world whose other half, the enactor and the pods, answers in any order."""

    def __init__(self, *, apart: bool = False) -> None:
        super().__init__()
        self.observed.folders_follow = not apart
        self.carries: list[Carry] = []
        self.observed.nodes = {name: NodeInfo(name) for name in ("edge", "fog", "cloud")}
        self.epochs: dict[str, int] = {}
        self.ended: list[Moving] = []
        self.switches: list[Switch] = []
        self.orders = 0

    @property
    def have(self) -> Any:
        return self.requested.pipelines["p"]

    def asked(self) -> list[tuple[str, RequestedOperator]]:
        """All pods that were asked for, with their operators."""
        found = [(name, op) for name, op in self.have.operators.items() if op.pod is not None]
        move = self.have.move
        return found + ([(move.order.operator, move.second)] if move is not None and move.second.pod else [])

    def look(self) -> None:
        """A step, what must hold of it, and what the loop does at once."""
        known = self.epochs.copy()
        decision = self.step()
        again = self.decide()
        assert again.actions == ()
        assert again.requested == self.requested
        assert decision.wake_at is None or decision.wake_at > self.now
        for action in decision.actions:
            match action:
                case Start(_, operator, _, epoch, node):
                    assert epoch > known.get(operator, 0)
                    known[operator] = self.epochs[operator] = epoch
                    assert self.observed.open(node)
                case Carry():
                    self.carries.append(action)
                case Relieve(_, operator, pod, node, cause):
                    assert pod == self.have.operators[operator].pod
                    if cause == "drain":
                        assert operator == "square"
                        node = next((id for id in self.observed.nodes if id != node and self.observed.open(id)), "")
                    if node:
                        self.order(operator, node, cause, relieves=pod)
                case Moving(state=state, order=order) if state.final:
                    assert order.id not in [ended.order.id for ended in self.ended]
                    self.ended.append(action)
                    wanted = self.desired.pipelines["p"]
                    wanted.orders = [other for other in wanted.orders if other.id != order.id]
                    self.observed.tallies.pop(order.id, None)
                case Switch():
                    self.switches.append(action)
                case Measure(move=move, switching=False):
                    self.observed.tallies[move] = Tally(counted=True)
                case Rehome(_, operator, node):
                    homes = [id for id in self.observed.nodes if id != node and self.observed.open(id)]
                    if homes:
                        self.desired.pipelines["p"].placement[operator] = PlacementView(homes[0], "it is free")
        for name in NAMES:
            pods = [op for operator, op in self.asked() if operator == name]
            assert len(pods) <= 2
            active = [op for op in pods if op.told is not None and op.told.role == "active" and not self.gone(op)]
            assert len(active) <= 1, "two instances that may both set messages aside"
        self.bury_all()

    def gone(self, op: RequestedOperator) -> bool:
        return self.seen(op).ended or not self.observed.usable(op.node)

    def seen(self, op: RequestedOperator) -> PodState:
        return self.observed.pods.get(op.pod or "", PodState())

    def bury_all(self) -> None:
        for pod in [p for p, state in self.observed.pods.items() if state.ended and p not in self.requested.pods]:
            del self.observed.pods[pod]

    def order(self, operator: str, node: str, cause: str, *, relieves: str = "") -> None:
        self.orders += 1
        order = MoveOrder(f"m{self.orders}", operator, node, cause, "because", relieves=relieves)
        self.desired.pipelines["p"].orders.append(order)

    def enact_carries(self, error: str = "") -> None:
        for action in self.carries:
            state = self.observed.pods.setdefault(action.new, PodState())
            state.carried, state.carry_error = not error, error
        self.carries.clear()

    def enact_switch(self, *, fails: bool = False) -> None:
        for action in self.switches:
            state = self.observed.pods.setdefault(action.pod, PodState())
            if fails:
                state.switch_error = "the disk is full"
            else:
                placement = self.desired.pipelines["p"].placement
                placement[action.operator] = PlacementView(action.order.node, "it was moved")
                state.switched = True
        self.switches.clear()

    def act(self, what: str, number: int) -> None:
        """One thing happens, to one of the pods that there are."""
        pods = self.asked()
        name, op = pods[number % len(pods)] if pods else ("", RequestedOperator())
        state = self.observed.pods.setdefault(op.pod, PodState()) if op.pod else PodState()
        node = ("edge", "fog", "cloud")[number % 3]
        wanted = self.desired.pipelines["p"]
        match what:
            case "order" if len(wanted.orders) < 2:
                self.order("square", node, "user")
            case "replace" if len(wanted.orders) < 3:
                name = NAMES[number % 3]
                present = self.have.operators.get(name, RequestedOperator())
                self.order(name, wanted.node_of(name), "user", relieves=present.pod or present.last_pod or "none")
            case "cordon":
                self.observed.nodes = {**self.observed.nodes, node: NodeInfo(node, schedulable=False)}
            case "carry":
                self.enact_carries()
            case "no carry":
                self.enact_carries("the folder is full")
            case "lose":
                self.observed.nodes = {**self.observed.nodes, node: NodeInfo(node, ready=False)}
                for _, victim in pods:
                    if victim.node == node:
                        self.exit_pod(victim)
            case "restore":
                self.observed.nodes = {**self.observed.nodes, node: NodeInfo(node)}
            case "time":
                self.now += number / 10
            case "store":
                self.enact_switch()
            case "full disk":
                self.enact_switch(fails=True)
            case "tally":
                for tally in self.observed.tallies.values():
                    tally.measured = True
            case _ if op.pod is None or state.ended:
                pass
            case "exit":
                self.exit_pod(op)
            case "leave":
                state.says_leaving = True
            case "outdated" if state.runtime is not None:
                state.runtime = replace(state.runtime, outdated=True)
            case "no start" if state.runtime is None and state.connection is None:
                state.start_error = "no memory"
            case "go on":
                self.go_on(name, op)

    def exit_pod(self, op: RequestedOperator) -> None:
        state = self.observed.pods.setdefault(op.pod or "", PodState())
        state.connection = None
        state.runtime = ObservedPod(op.pod or "", PodPhase.EXITED, op.node, op.epoch, exit_code=-9)

    def go_on(self, name: str, op: RequestedOperator) -> None:
        """A pod does the next thing that is asked of it."""
        state = self.observed.pods.setdefault(op.pod or "", PodState())
        if op.kill_by is not None or op.stop_by is not None:
            self.exit_pod(op)
        elif state.connection is None:
            self.connections += 1
            state.runtime = ObservedPod(op.pod or "", PodPhase.RUNNING, op.node, op.epoch, pid=1)
            state.connection = self.connections
        elif op.told is None:
            pass
        elif state.ready_at is None:
            state.assigned, state.ready_at = True, self.now
            state.heartbeat_at = self.now
            state.address = None if name == "source" else f"unix:/{op.pod}"
        else:
            state.heartbeat_at = self.now
            state.role = op.told.role
            if state.role == "halted" and name == "sink":
                state.called = ((0, op.epoch, b""),)
            for link in op.told.links:
                end = LinkStatus(link.link, link.direction)
                if link.direction == "out" and link.address:
                    end.epoch = link.peer_epoch
                    end.standby = link.standby_epoch if link.standby_address else 0
                elif link.direction == "in":
                    present = self.have.operators[link.peer_operator]
                    end.epoch = max(link.peer_epoch, present.epoch if present.epoch == link.standby_epoch else 0)
                state.ends[link.link, link.direction] = end

    def settle(self) -> None:
        """Everything that can go on goes on, for a while."""
        rounds = 0
        while rounds < 40 or (self.desired.pipelines["p"].orders and rounds < 200):
            rounds += 1
            self.look()
            self.enact_switch()
            self.enact_carries()
            for tally in self.observed.tallies.values():
                tally.measured = True
            for name, op in self.asked():
                if not self.seen(op).ended:
                    self.go_on(name, op)
            self.now += SETTINGS.backoff.limit / 4
        self.look()


HAPPENING = st.tuples(
    st.sampled_from(
        ["go on"] * 16
        + ["order", "order", "exit", "no start", "lose", "restore", "time", "store", "store", "full disk", "tally"]
        + ["replace", "replace", "leave", "outdated", "cordon", "carry", "carry", "no carry"]
    ),
    st.integers(0, 60),
)


any_history = given(
    st.lists(HAPPENING, max_size=100),
    st.sampled_from([Goal.RUN, Goal.RUN, Goal.STOP, Goal.REMOVE]),
    st.booleans(),
    st.booleans(),
)


@pytest.mark.no_cover
@settings(max_examples=40)
@any_history
def test_any_history_of_moves_ends_soundly(
    history: list[tuple[str, int]], goal: Goal, early: bool, apart: bool
) -> None:
    ends_soundly(history, goal, early, apart)


@pytest.mark.slow
@pytest.mark.timeout(300)
@settings(max_examples=400)
@any_history
def test_each_of_many_histories_of_moves_ends_soundly(
    history: list[tuple[str, int]], goal: Goal, early: bool, apart: bool
) -> None:
    ends_soundly(history, goal, early, apart)


def ends_soundly(history: list[tuple[str, int]], goal: Goal, early: bool, apart: bool) -> None:
    world = Moved(apart=apart)
    if early:
        world.settle()
        world.act("order", 1)
    for what, number in history:
        world.look()
        world.act(what, number)
    wanted = world.desired.pipelines["p"]
    wanted.goal = goal
    world.observed.nodes = {name: NodeInfo(name) for name in ("edge", "fog", "cloud")}
    world.settle()
    assert wanted.orders == []
    assert world.have.move is None
    assert len(world.ended) == world.orders
    if goal is Goal.RUN:
        assert sorted(name for name, _ in world.asked()) == sorted(NAMES)
        for name, op in world.have.operators.items():
            assert op.node == wanted.node_of(name)
            assert world.seen(op).ready_at is not None
            assert op.told is not None
            assert op.told.role == "active"
            for link in op.told.links:
                peer = world.have.operators[link.peer_operator]
                assert (link.peer_epoch, link.standby_epoch) == (peer.epoch, 0)
                if link.direction == "out":
                    assert link.address == f"unix:/{peer.pod}"
    else:
        assert world.asked() == []


def test_a_move_alone_ends_where_it_should() -> None:
    world = Moved()
    world.settle()
    world.act("order", 1)
    world.settle()
    assert [ended.state for ended in world.ended] == [MoveState.DONE]
    assert world.have.operators["square"].node == "fog"
    assert world.have.operators["square"].restarts == 0
    assert world.epochs == {"source": 1, "square": 2, "sink": 1}


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_each_operator_is_replaced_in_place(name: str, apart: bool) -> None:
    world = Moved(apart=apart)
    world.settle()
    before = {op: world.have.operators[op].pod for op in NAMES}
    world.order(name, world.desired.pipelines["p"].node_of(name), "user", relieves=before[name])
    told = roles_while_settling(world, name)
    assert [ended.state for ended in world.ended] == [MoveState.DONE]
    assert {op: world.have.operators[op].epoch for op in NAMES} == {op: 2 if op == name else 1 for op in NAMES}
    at_rest = "retired" if name == "square" else "halted"
    first = ["retired", at_rest] if apart and name == "sink" else [at_rest]
    assert told[1] == ["active", *first, *(["retired"] if name == "source" else [])]
    assert told[2] == ["standby", "active"]


def roles_while_settling(world: Moved, name: str) -> dict[int, list[str]]:
    """Epoch -> the roles that the operator's instances were told, one after the other."""
    told: dict[int, list[str]] = {}
    for _ in range(40):
        world.look()
        for operator, op in world.asked():
            if operator == name and op.told is not None and told.setdefault(op.epoch, [""])[-1] != op.told.role:
                told[op.epoch] = [role for role in told[op.epoch] if role] + [str(op.told.role)]
        world.enact_switch()
        world.enact_carries()
        for tally in world.observed.tallies.values():
            tally.measured = True
        for operator, op in world.asked():
            if not world.seen(op).ended:
                world.go_on(operator, op)
        world.now += 0.1
    return told


def test_the_next_sink_learns_how_far_the_one_before_has_come() -> None:
    world = Moved()
    world.settle()
    world.order("sink", "cloud", "user", relieves=world.have.operators["sink"].pod)
    found = []
    for _ in range(20):
        decision = world.decide()
        found += [a for a in decision.actions if isinstance(a, TellPeers) and a.called]
        world.look()
        world.enact_switch()
        for operator, op in world.asked():
            if not world.seen(op).ended:
                world.go_on(operator, op)
    assert [(a.pod, a.role, a.called) for a in found] == [("p.sink-e2", "active", ((0, 1, b""),))]


def test_pipelines_are_brought_up_to_date_a_few_at_a_time() -> None:
    world = Moved()
    world.settle()
    for name in NAMES:
        state = world.state(name)
        assert state.runtime is not None
        state.runtime = replace(state.runtime, outdated=True)
    for other in ("q", "r"):
        world.desired.pipelines[other] = wanted(other)
    world.desired.pipelines["q"].orders.append(MoveOrder("a", "square", "cloud", "upgrade", ""))
    world.desired.pipelines["r"].orders.append(MoveOrder("b", "square", "cloud", "upgrade", ""))
    assert not [a for a in world.step().actions if isinstance(a, Relieve)]
    world.desired.pipelines["r"].orders.clear()
    decision = world.step()
    assert [(a.operator, a.cause, a.node) for a in decision.actions if isinstance(a, Relieve)] == [
        ("source", "upgrade", "edge")
    ]
    world.desired.pipelines["q"].orders.clear()
    world.now += 0.1
    assert world.step().wake_at == world.now + SETTINGS.retry, "nothing may have come of it, which nobody says"
    world.now += SETTINGS.upgrade_backoff.first
    assert [a.operator for a in world.step().actions if isinstance(a, Relieve)] == ["source"]
