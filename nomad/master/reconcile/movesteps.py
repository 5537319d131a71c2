"""What to do about a pipeline's move: which is led, how far it goes now, and what that asks for. A part of `reconcile`.

`migration` has the table of its states; here the table gets its facts, and what it says is done. No await, no clock,
no I/O.
"""

from __future__ import annotations

from dataclasses import replace

from nomad.control import Role
from nomad.master.reconcile import migration, peers
from nomad.master.reconcile.actions import Carry, Ended, Measure, Moving, Start, Switch
from nomad.master.reconcile.migration import Facts
from nomad.master.reconcile.podsteps import PodSteps
from nomad.master.state import RequestedMove, RequestedOperator
from nomad.master.views import MoveState


class MoveSteps(PodSteps):
    """The move of one pipeline, at one look."""

    def _lead_moves(self, run: bool) -> None:
        """Take up the next order, and lead the move under way as far as it goes now."""
        if self.move is not None and self.move.state.final and self.move.second.pod is None:
            self.move = None
        if self.move is None and not self.desired.closing:  # the next master finds what has only been ordered
            order = next((order for order in self.wanted.orders if order.id not in self.ended_moves), None)
            if order is not None:
                source = self.wanted.node_of(order.operator)
                self.move = RequestedMove(order, source, MoveState.PLANNED, self.now)
                self._note_move(self.move, None, 0.0)
        while self.move is not None and self._lead(self.move, run):
            pass
        if self.move is None and self._orders_left:
            self._lead_moves(run)

    @property
    def _orders_left(self) -> bool:
        return not self.desired.closing and any(o.id not in self.ended_moves for o in self.wanted.orders)

    def _lead(self, move: RequestedMove, run: bool) -> bool:
        """One state further, if the facts lead there."""
        if move.state is MoveState.PLANNED and self.desired.closing:
            return False  # the next master finds it
        facts = self._facts(move, run)
        present = self.operators[move.order.operator]
        if facts.handed and move.state is MoveState.HANDING_OVER and not move.handed:
            self.move = move = replace(move, handed=True, called=self._state(present).called)
        if move.state is MoveState.CARRYING and not move.carrying and self._is(present, Role.RETIRED):
            self.move = move = replace(move, carrying=True)
            self.act(Carry(self.id, move.order.operator, present.last_pod, move.second.last_pod))
        if facts.stored and not move.switched:
            self.move = move = self._swap(move)
            facts = self._facts(move, run)
        limit = migration.deadline(move.state, self.settings.moving)
        late = limit is not None and self.now >= move.since + limit
        state, error = migration.advance(move.state, facts, late=late)
        if state is move.state:
            if limit is not None and not late:
                self.wake(move.since + limit)
            return False
        self.move = self._enter(move, state, error)
        return self.move is not None

    def _enter(self, move: RequestedMove, state: MoveState, error: str) -> RequestedMove | None:
        """What is to be done once, when a move comes to a state."""
        name, before = move.order.operator, move
        move = replace(move, state=state, since=self.now)
        present = self.operators[name]
        if state is MoveState.STARTING:
            second = self._next(name, present, move.order.node, again=False)
            move = replace(move, source=present.node, second=second)
            self.operators[name] = replace(present, highest=second.epoch)
        self._note_move(move, before.state, self.now - before.since, error)
        if state is MoveState.STARTING:
            self.act(Start(self.id, name, move.second.last_pod, move.second.epoch, move.order.node))
        elif state is MoveState.HANDING_OVER:
            move = replace(move, switch_at=self.now)
            self._measure(move, present, move.second, switching=True)
        elif state is MoveState.SWITCHING:
            assert move.second.pod is not None
            self.act(Switch(self.id, name, move.second.pod, move.order))
        elif state is MoveState.STOPPING:
            self._measure(move, move.second, present, switching=False)
        if state.final:
            self.ended_moves |= {move.order.id}
        return None if state.final and move.second.pod is None else move

    def _swap(self, move: RequestedMove) -> RequestedMove:
        """The switch is stored: the new instance is the present one."""
        name = move.order.operator
        old, new = self.operators[name], move.second
        self.operators[name] = replace(new, restarts=old.restarts, highest=max(old.highest, new.epoch))
        return replace(move, second=old, switched=True)

    def _facts(self, move: RequestedMove, run: bool) -> Facts:
        name = move.order.operator
        present, second = self.operators[name], move.second
        old, new = (second, present) if move.switched else (present, second)
        seen = self._state(new)
        before, behind = self._before(name), self._behind(name)
        epoch = new.epoch if new.pod is not None else -1
        out = {link: seen.ends.get((link, "out")) for _, link in behind}
        hears = {link: end.epoch for (link, direction), end in seen.ends.items() if direction == "in"}
        greeted = {link: end.epoch if end is not None else 0 for link, end in out.items()}
        old_gone = old.pod is None or self._gone(old)
        source, goal = name in self.wanted.sources, peers.at_rest(self.wanted, name)
        relieves = move.order.relieves
        tally = self.observed.tallies.get(move.order.id)
        return Facts(
            wanted=run,
            at_work=run and all(self._ready(op) for op in self.operators.values()),
            there=not move.switched and not relieves and self.wanted.node_of(name) == move.order.node,
            target_ready=self.observed.usable(move.order.node),
            away=bool(relieves) and not move.switched and (present.pod != relieves or old_gone),
            target_closed=not self.observed.open(move.order.node),
            apart=not self.observed.folders_follow and not source,
            carried=seen.carried,
            carry_error=seen.carry_error,
            old_gone=old_gone,
            new_ready=self._ready(new) and not self._gone(new),
            new_gone=new.pod is not None and self._gone(new),
            new_error=self._how(new),
            connected=all(self._end_of(peer, link, "out")[1] == epoch for peer, link in before)
            and all(greeted[link] == self.operators[peer].epoch for peer, link in behind),
            handed=move.handed or old_gone or self._is(old, goal),
            active=source or seen.role == Role.ACTIVE,  # the next source begins after the switch
            overheard=any(self._end_of(peer, link, "in")[0] == epoch for peer, link in behind),
            stored=move.switched or (move.state is MoveState.SWITCHING and seen.switched),
            store_error=seen.switch_error,
            turned=all(self._end_of(peer, link, "out")[0] == epoch for peer, link in before),
            followed=all(self._end_of(peer, link, "in")[0] == epoch for peer, link in behind)
            and (bool(behind) or all(hears.get(link) == self.operators[peer].epoch for peer, link in before)),
            counted=tally is not None and tally.measured,
        )

    def _second_ended(self) -> bool:
        """Whether the other pod of a move has ended, and that isn't the move's own to settle."""
        move = self.move
        if move is None or move.second.pod is None or move.holds or not self._gone(move.second):
            return False
        second = move.second
        expected = not move.switched or second.stop_by is not None
        self.act(Ended(self.id, move.order.operator, second.pod or "", None, expected))
        self.move = replace(move, second=replace(second, pod=None, told=None))
        return True

    def _keep_second(self) -> None:
        """See to the other pod of a move: to be ready beside the present one, or to end."""
        move = self.move
        if move is None or move.second.pod is None:
            return
        name, second = move.order.operator, move.second
        if move.state.final or (move.state is MoveState.STOPPING and self._counted(move)):
            second = self._stop(name, second, drain=False)
        elif not self._gone(second):
            second = self._tell(name, second, second=True)
        self.move = replace(move, second=second)

    def _counted(self, move: RequestedMove) -> bool:
        """The old instance has said its numbers, or has had the time for it."""
        tally = self.observed.tallies.get(move.order.id)
        if tally is not None and tally.counted:
            return True
        self.wake(move.since + self.settings.moving.count)
        return self.now >= move.since + self.settings.moving.count

    def _measure(self, move: RequestedMove, old: RequestedOperator, new: RequestedOperator, *, switching: bool) -> None:
        sink = self.operators[self.wanted.spec.operators[-1].name]
        link = next((link for _, link in self._before(move.order.operator)), "")
        old_pod, new_pod, sink_pod = (op.pod or "" for op in (old, new, sink))
        since = move.switch_at
        self.act(Measure(self.id, move.order.id, link, old_pod, new_pod, sink_pod, switching, since))

    def _note_move(self, move: RequestedMove, left: MoveState | None, seconds: float, error: str = "") -> None:
        epoch = self.operators[move.order.operator].epoch if move.switched else move.second.epoch
        self.act(Moving(self.id, move.order, move.source, left, seconds, move.state, epoch, error))
