"""Decides whether a pipeline's operators should move while it runs. Pure: no clock and no I/O, time is passed in.

`nomad.master.replan` asks: `Watch.cause` whether to look at a pipeline now, `decide` what to do. The answer is
at most one move of one operator, with its reason; what a decision *not* to move rests on is said as well. It must not
know how anything was measured. docs/placement.md has the rules with their numbers.

A move is decided when all of this holds:

1. The best placement that single moves lead to gains more than the errors of the estimates could make up.
2. Beyond that it gains at least `absolute` seconds and `relative` of the present latency (hysteresis).
3. Over the `horizon` it gains more than its moves cost (pause, work done twice, starting a process).
4. The last move is at least `dwell` seconds ago, unless it was the first of several to the same end, or a queue
   would run out of credits before.
5. The pipeline has a move left of its `budget` per hour.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from nomad.scheduler import needs_libraries
from nomad.units import milliseconds

if TYPE_CHECKING:
    from nomad.scheduler.moves import Step, Worth

HOUR = 3600.0

BEATS = 4
"""Heart-beats after a move, of which the first counts for nothing, until estimates have settled in the new place."""

Signal = tuple[str, tuple[str, ...]]
"""A kind of quantity and what it is of, as in `nomad.measure.book.Sample`."""


@dataclass(frozen=True, slots=True)
class Settings:
    """When a move pays, and how often one may be made. Durations in seconds."""

    horizon: float = 120.0
    """A gain is taken to last this long: conditions that changed a moment ago may change back."""
    relative: float = 0.04
    """Least gain as a share of the present latency: what stays unmoved is within 1.1 times the best."""
    absolute: float = 0.002
    """Least gain: below it, what no model knows (scheduling, batches) decides."""
    caution: float = 2.0
    """How many times the error of the estimates a gain must exceed."""
    dwell: float = 10.0
    """Between two moves: that long estimates take to settle in the new place."""
    budget: int = 12
    """Moves per hour: whatever the rules above don't foresee, a pipeline isn't kept moving."""
    pause: float = 0.05
    """Of what is sent during a move's switch, each message is late by this."""
    startup: float = 0.5
    """Message-seconds: a process is started on the target, and what is there waits for it."""
    step: float = 2.0
    """How long a move takes; a placement on the way to a better one lasts so long."""
    busy: float = 0.9
    """Share of the time that an operator's function runs from which on it may be the reason of its queue."""
    wait: float = 0.5
    """An operator that is busy, and behind by so many seconds, and doesn't catch up, is overloaded."""
    headroom: float = 1.1
    """What holds its source back is taken to be wanted this much more often than it manages."""
    watch: float = 10.0
    """After a change a pipeline is looked at in each round for so long: a ramp goes on, a step has settled by then."""
    again: float = 2.0
    """Between looks at a pipeline that is overloaded, and for which nothing better was found."""
    interval: float = 30.0
    """Between looks when nothing changed: finds what crept up below all thresholds."""

    def at_pace(self, seconds: float) -> Settings:
        """The same where samples are so many seconds apart: there are `BEATS` of them in what is to have some."""
        least = BEATS * seconds
        return replace(self, dwell=max(self.dwell, least), watch=max(self.watch, least))


DEFAULT = Settings()


@dataclass(frozen=True, slots=True)
class Order:
    """Move this operator."""

    operator: str
    node: str
    reason: str
    before: float | None
    """Predicted latency now, seconds per message, with what it waits in queues that grow; None: not possible as is."""
    after: float
    """Predicted latency when this move, and those that are to follow it, are done."""
    target: Mapping[str, str]
    """The placement that it leads to; more than one operator may differ."""


@dataclass(frozen=True, slots=True)
class Decision:
    """A move or none, and why."""

    order: Order | None
    text: str
    latency: float | None
    """Predicted latency of the present placement, without queues that grow; None: not possible as it is."""
    queueing: float = 0.0


@dataclass(slots=True)
class History:
    """The moves of one pipeline that were decided here."""

    moved_at: deque[float] = field(default_factory=deque)
    target: Mapping[str, str] = field(default_factory=dict)
    """Where the last move was to lead to."""

    def ordered(self, order: Order, now: float) -> None:
        """A move was ordered."""
        self.moved_at.append(now)
        self.target = order.target

    def finished(self, now: float) -> None:
        """The last move has ended: the dwell counts from there."""
        if self.moved_at:
            self.moved_at[-1] = max(now, self.moved_at[-1])

    def left(self, now: float, settings: Settings) -> int:
        """Moves left of the budget."""
        while self.moved_at and self.moved_at[0] <= now - HOUR:
            self.moved_at.popleft()
        return settings.budget - len(self.moved_at)


@dataclass(frozen=True, slots=True)
class Situation:
    """What there is to decide about."""

    problem: Mapping[str, Any]
    """As `nomad.scheduler.plan` takes it, with the one pipeline."""
    placement: Mapping[str, str]
    """Operator -> node, now."""
    errors: Mapping[Signal, float] = field(default_factory=dict)
    """By how much what stands in the problem may be off, where it was measured."""
    overloaded: Mapping[str, float] = field(default_factory=dict)
    """Operators that fall behind -> seconds until the credits of their queues run out."""
    queued: Mapping[str, float] = field(default_factory=dict)
    """Operator -> messages that it has received and not worked off."""
    changes: Sequence[str] = ()
    """What changed lately, in words."""


@dataclass(slots=True)
class Watch:
    """When to look at one pipeline."""

    looked_at: float = -math.inf
    settled: bool = False
    nodes: frozenset[str] | None = None

    def cause(
        self, now: float, settings: Settings, *, changed: bool, overloaded: bool, settled: bool, nodes: frozenset[str]
    ) -> str | None:
        """Why to look now: "node-new", "settled", "overload", "change" or "interval"; None: there is no need.

        `changed`: something did within the last `settings.watch` seconds. `settled`: all estimates have.
        """
        if not self.settled and not settled and not overloaded:
            return None  # too little is known yet
        if self.nodes is not None and nodes - self.nodes:
            return "node-new"
        if settled and not self.settled:
            return "settled"
        if changed:
            return "change"
        if overloaded and now >= self.looked_at + settings.again:
            return "overload"
        return "interval" if now >= self.looked_at + settings.interval else None

    def looked(self, now: float, *, settled: bool, nodes: frozenset[str]) -> None:
        """A look was taken."""
        self.looked_at, self.settled, self.nodes = now, self.settled or settled, nodes


def time_to_full(queue: float, growth: float, window: float) -> float:
    """Seconds until a queue that grows by `growth` per second holds `window`."""
    return max(0.0, window - queue) / growth if growth > 0 else math.inf


def falls_behind(busy: float, arrival: float, departure: float, queue: float, settings: Settings = DEFAULT) -> bool:
    """Whether an operator is overloaded: busy, behind, and not catching up."""
    waiting = queue / departure if departure > 0 else math.inf if queue > 0 else 0.0
    return busy >= settings.busy and waiting >= settings.wait and arrival >= 0.95 * departure


def decide(situation: Situation, history: History, now: float, settings: Settings = DEFAULT) -> Decision:
    """The next move, or none. Raises `PlacementError` if the problem isn't valid."""
    with needs_libraries():
        from nomad.scheduler.moves import Outlook

    placement = dict(situation.placement)
    outlook = Outlook(situation.problem, placement, horizon=settings.horizon, excused=not situation.overloaded)
    present = outlook.now
    singles = outlook.singles()
    ways = [singles[:1], *outlook.ways()] if singles else outlook.ways()
    judged = [_Way(way, situation, present, settings) for way in ways]
    best = min((way.after for way in judged), default=math.inf)
    near = [way for way in judged if way.after <= best * (1 + settings.relative / 2)]
    chosen = max(near, key=lambda way: (-len(way.steps), way.value), default=None)
    latency = present.latency if math.isfinite(present.latency) else None

    def stay(text: str) -> Decision:
        return Decision(None, text, latency, present.queueing)

    if chosen is None:
        return stay("there is no other node for any operator")
    if not chosen.gain > 0:
        return stay(f"no move leads to less than the {milliseconds(present.total)} of now")
    offer = chosen.words
    if not math.isinf(present.total):
        least = max(settings.absolute, settings.relative * present.total)
        if chosen.gain - chosen.margin < least:
            unsure = f" and may be off by {milliseconds(chosen.margin)}" if chosen.margin > 0 else ""
            return stay(f"{offer} would gain {milliseconds(chosen.gain)}{unsure}; it must gain {milliseconds(least)}")
        if chosen.value <= 0:
            return stay(
                f"{offer} would gain {milliseconds(chosen.gain)}, less over {settings.horizon:g} s than it costs"
            )
    if (waits := _wait(situation, history, now, settings, chosen)) > 0:
        return stay(
            f"{offer} would gain {milliseconds(chosen.gain)}; the last move was just now, next in {waits:.0f} s"
        )
    if history.left(now, settings) <= 0:
        return stay(
            f"{offer} would gain {milliseconds(chosen.gain)}; {settings.budget} moves per hour were made already"
        )
    before = None if math.isinf(present.total) else present.total
    order = Order(chosen.first.operator, chosen.first.node, _reason(situation, present, chosen), before, chosen.after,
                  chosen.target)  # fmt: skip
    return Decision(order, f"{offer}: {order.reason}", latency, present.queueing)


class _Way:
    """Some single moves in a row, and what they would be worth."""

    def __init__(self, steps: Sequence[Step], situation: Situation, present: Worth, settings: Settings) -> None:
        self.steps = steps
        self.first = steps[0]
        self.target = {**situation.placement, **{step.operator: step.node for step in steps}}
        self.after = steps[-1].worth.total
        self.gain = present.total - self.after
        self.margin = settings.caution * _error(situation, self.target)
        rate = float(situation.problem["pipeline"].get("rate", 1.0))
        meanwhile = sum(max(0.0, step.worth.total - present.total) for step in steps[:-1]) * settings.step
        costs = sum(_cost(situation, step, rate, settings) for step in steps)
        sure = self.gain - self.margin
        self.value = rate * (sure * settings.horizon - meanwhile) - costs if math.isfinite(sure) else math.inf
        """Message-seconds gained over the horizon."""

    @property
    def words(self) -> str:
        first = f"moving {self.first.operator} to {self.first.node}"
        others = ", ".join(f"{step.operator} to {step.node}" for step in self.steps[1:])
        return f"{first}, then {others}," if others else first


def _cost(situation: Situation, step: Step, rate: float, settings: Settings) -> float:
    """Message-seconds: late messages, messages worked on twice, a process started."""
    operator = next(o for o in situation.problem["pipeline"]["operators"] if o["id"] == step.operator)
    speed = next(float(n.get("speed", 1.0)) for n in situation.problem["nodes"] if n["id"] == step.node)
    twice = situation.queued.get(step.operator, 0.0) + rate * settings.pause
    return rate * settings.pause**2 + twice * float(operator.get("work", 0.0)) / speed + settings.startup


def _error(situation: Situation, target: Mapping[str, str]) -> float:
    """By how much a gain may be off, seconds: the errors of what differs between the present placement and `target`."""
    errors, problem, now = situation.errors, situation.problem, situation.placement
    if not errors:
        return 0.0
    links = {(link["from"], link["to"]): link for link in problem["links"]}
    speeds = {node["id"]: float(node.get("speed", 1.0)) for node in problem["nodes"]}
    operators = {operator["id"]: operator for operator in problem["pipeline"]["operators"]}
    id = problem["pipeline"].get("id", "pipeline")
    share: dict[Signal, float] = defaultdict(float)
    """How much the gain changes with each quantity."""
    for source, after in problem["pipeline"]["edges"]:
        size = float(operators[source].get("output_bytes", 0.0))
        for place, sign in ((now, 1.0), (target, -1.0)):
            a, b = place[source], place[after]
            if a != b:
                share["latency", (min(a, b), max(a, b))] += sign
                if bandwidth := links.get((a, b), {}).get("bandwidth"):
                    share["bandwidth", (a, b)] -= sign * size / bandwidth**2
    for name, operator in operators.items():
        work = float(operator.get("work", 0.0))
        for place, sign in ((now, 1.0), (target, -1.0)):
            node = place[name]
            if node in speeds:
                share["work", (id, name)] += sign / speeds[node]
                share["speed", (node,)] -= sign * work / speeds[node] ** 2
    return math.sqrt(sum((errors.get(signal, 0.0) * part) ** 2 for signal, part in share.items()))


def _wait(situation: Situation, history: History, now: float, settings: Settings, way: _Way) -> float:
    """Seconds that a move must still wait for."""
    if not history.moved_at:
        return 0.0
    ends = history.moved_at[-1] + settings.dwell
    if any(full < ends - now for full in situation.overloaded.values()):
        return 0.0
    if dict(way.target) == dict(history.target):  # what was begun is finished
        return 0.0
    return max(0.0, ends - now)


def _reason(situation: Situation, present: Worth, way: _Way) -> str:
    if math.isinf(present.total):
        text = f"as it is there is no way, then it takes {milliseconds(way.after)}"
    else:
        text = f"{milliseconds(present.total)} per message become {milliseconds(way.after)}"
    if len(way.steps) > 1:
        text += " once " + ", ".join(f"{step.operator} is on {step.node}" for step in way.steps[1:])
    behind = [f"{name} can't keep up" + _credits(full) for name, full in sorted(situation.overloaded.items())]
    why = [*behind, *situation.changes]
    return f"{text}; {'; '.join(why)}" if why else text


def _credits(full: float) -> str:
    return f" (its queue is full in {full:.0f} s)" if math.isfinite(full) else ""
