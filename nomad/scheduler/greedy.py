"""The first placement: each operator in turn on its cheapest node, stepping back where memory runs out.

The cost of a node for an operator, in seconds per message:

    arrival      when the last of its inputs is there: finish of the predecessor + transfer
    processing   work / speed
    onward       transfer of the output to the next pinned operator downstream, so that a fast node
                 behind a slow link isn't taken for the link's beginning only

Pinned operators (start and end) get their memory first. Ties go to the node where the operator is now,
then by name, so the answer depends on nothing but the snapshot's content.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping

from nomad.scheduler import cost
from nomad.scheduler.model import Infeasible, Lack, Node, Operator, Plan, Policy, Reason, RunnerUp, Snapshot

_DEFAULT = Policy()


def place(snapshot: Snapshot, policy: Policy = _DEFAULT) -> Plan | Infeasible:
    """A placement of the snapshot's operators, with reasons; or why there is none."""
    problem = _Problem(snapshot, policy)
    broken = problem.check_each() or problem.check_pins_together()
    if broken is not None:
        return broken
    found = _search(problem)
    return found if isinstance(found, Infeasible) else _plan(problem, found)


class _Problem:
    """The snapshot, indexed, and the constraints and costs that need no more than it."""

    def __init__(self, snapshot: Snapshot, policy: Policy):
        self.snapshot = snapshot
        self.policy = policy
        self.operators = snapshot.operators
        self.nodes = {node.id: node for node in sorted(snapshot.nodes, key=lambda node: node.id)}
        self.links = {(link.source, link.target): link for link in snapshot.links}
        by_id = {operator.id: operator for operator in snapshot.operators}
        self.inputs: dict[str, list[Operator]] = {operator.id: [] for operator in snapshot.operators}
        self.next_pin: dict[str, str | None] = dict.fromkeys(self.inputs)
        for edge in sorted(snapshot.edges):
            self.inputs[edge[1]].append(by_id[edge[0]])
        for operator in reversed(snapshot.operators):
            for source in self.inputs[operator.id]:
                self.next_pin[source.id] = self.next_pin[source.id] or operator.pin or self.next_pin[operator.id]
        self.seats = {operator.id: self._seats(operator) for operator in snapshot.operators}
        """Operator -> the nodes that it could be on if it had the cluster for itself."""

    def _seats(self, operator: Operator) -> list[Node]:
        fitting = [node for node in self.nodes.values() if operator.memory_mb <= node.free_memory_mb]
        if operator.pin is not None:
            return [node for node in fitting if node.id == operator.pin]
        return [node for node in fitting if operator.requires <= node.labels]

    def terms(
        self, operator: Operator, node: Node, placement: Mapping[str, str], finish: Mapping[str, float]
    ) -> dict[str, float]:
        """What a message takes to get through `operator` on `node`, the predecessors being placed."""
        arrival = 0.0
        for source in self.inputs[operator.id]:
            link = self.links.get((placement[source.id], node.id))
            arrival = max(arrival, finish[source.id] + cost.transfer(cost.bytes_of(source, self.policy), link))
        onward = self.links.get((node.id, self.next_pin[operator.id] or node.id))
        return {
            "arrival": arrival,
            "processing": cost.processing(cost.work_of(operator, self.policy), node),
            "onward": cost.transfer(cost.bytes_of(operator, self.policy), onward),
        }

    def check_each(self) -> Infeasible | None:
        """The first constraint that an operator breaks on every node, whatever the others do."""
        for operator in self.operators:
            if self.seats[operator.id]:
                continue
            nodes = list(self.nodes.values())
            if not nodes:
                return Infeasible("nodes", operator.id, (), "the cluster has no nodes: start some")
            if operator.pin is not None:
                if operator.pin in self.nodes:
                    return _too_little_memory(operator, [self.nodes[operator.pin]], {})
                near = difflib.get_close_matches(operator.pin, self.nodes, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known nodes: {', '.join(self.nodes)}"
                text = f"operator {operator.id!r} must be on node {operator.pin!r}, which is not in the cluster; {hint}"
                return Infeasible("pin", operator.id, (), text)
            able = [node for node in nodes if operator.requires <= node.labels]
            return _too_little_memory(operator, able, {}) if able else _no_labels(operator, nodes)
        return None

    def check_pins_together(self) -> Infeasible | None:
        """The first operator that doesn't fit on its node any more, after the others that are pinned there."""
        free = {node.id: node.free_memory_mb for node in self.nodes.values()}
        for operator in self.operators:
            if operator.pin is not None:
                if operator.memory_mb > free[operator.pin]:
                    return _too_little_memory(operator, [self.nodes[operator.pin]], free)
                free[operator.pin] -= operator.memory_mb
        return None


def _search(problem: _Problem) -> dict[str, str] | Infeasible:
    """Depth first, cheapest node first: without want of memory, the first leaf, which is the greedy answer."""
    operators = problem.operators
    free = {node.id: node.free_memory_mb for node in problem.nodes.values()}
    for operator in operators:
        if operator.pin is not None:
            free[operator.pin] -= operator.memory_mb
    placement: dict[str, str] = {}
    finish: dict[str, float] = {}
    choices: list[Iterator[Node]] = []
    before: list[float] = []  # per operator placed: the free memory of its node before it came
    stuck, stuck_free = -1, free
    for _ in range(problem.policy.max_steps):
        depth = len(placement)
        if depth == len(operators):
            return placement
        operator = operators[depth]
        if len(choices) == depth:
            choices.append(_ranked(problem, operator, placement, finish, dict(free)))
        node = next(choices[depth], None)
        if node is not None:
            placement[operator.id] = node.id
            terms = problem.terms(operator, node, placement, finish)
            finish[operator.id] = terms["arrival"] + terms["processing"]
            before.append(free[node.id])
            free[node.id] -= 0.0 if operator.pin is not None else operator.memory_mb
            continue
        if depth > stuck:
            stuck, stuck_free = depth, dict(free)
        if depth == 0:
            able = [node for node in problem.nodes.values() if operators[stuck].requires <= node.labels]
            return _too_little_memory(operators[stuck], able, stuck_free)
        choices.pop()
        free[placement.pop(operators[depth - 1].id)] = before.pop()
    return Infeasible(
        "search",
        operators[max(stuck, 0)].id,
        (),
        f"no placement was found in {problem.policy.max_steps} steps, which doesn't prove that there is none: "
        "memory is tight; free some, or ask for less",
    )


def _ranked(
    problem: _Problem,
    operator: Operator,
    placement: Mapping[str, str],
    finish: Mapping[str, float],
    free: Mapping[str, float],
) -> Iterator[Node]:
    """The nodes that have room for `operator` now, the cheapest first."""
    room = [node for node in problem.seats[operator.id] if operator.pin or operator.memory_mb <= free[node.id]]
    now = problem.snapshot.placement.get(operator.id)
    totals = {node.id: sum(problem.terms(operator, node, placement, finish).values()) for node in room}
    return iter(sorted(room, key=lambda node: (totals[node.id], node.id != now, node.id)))


def _plan(problem: _Problem, placement: Mapping[str, str]) -> Plan:
    finish: dict[str, float] = {}
    reasons: dict[str, Reason] = {}
    free = {node.id: node.free_memory_mb for node in problem.nodes.values()}
    for operator in problem.operators:
        free[placement[operator.id]] -= operator.memory_mb
    for operator in problem.operators:
        node = problem.nodes[placement[operator.id]]
        terms = problem.terms(operator, node, placement, finish)
        total = sum(terms.values())
        others = []
        for other in problem.seats[operator.id]:
            if other is not node:
                alternative = problem.terms(operator, other, placement, finish)
                others.append(RunnerUp(other.id, alternative, sum(alternative.values())))
        best = min(others, key=lambda runner_up: (runner_up.total, runner_up.node), default=None)
        lacks = operator.memory_mb - free[best.node] if best is not None else 0.0
        reasons[operator.id] = Reason(node.id, terms, total, best, _why(operator, node, terms, total, best, lacks))
        finish[operator.id] = terms["arrival"] + terms["processing"]
    return Plan(dict(placement), reasons, max(finish.values(), default=0.0))


def _why(
    operator: Operator, node: Node, terms: Mapping[str, float], total: float, best: RunnerUp | None, lacks: float
) -> str:
    if operator.pin is not None:
        return f"it is pinned to {node.id}"
    if best is None:
        labels = f" with {', '.join(sorted(operator.requires))}" if operator.requires else ""
        return f"{node.id} is the only node{labels} that has {operator.memory_mb:g} MiB free"
    here = f"{_ms(total)} per message on {node.id}"
    if best.total < total:
        room = f"lacks {lacks:g} MiB of memory" if lacks > 0 else "had to leave its memory to others"
        return f"{here}; {best.node} would take {_ms(best.total)}, but {room}"
    if best.total == total:
        return f"{here}, as on {best.node}; ties go to where an operator is, then by name"
    term = max(terms, key=lambda name: best.terms[name] - terms[name])
    return f"{here}; {best.node} would take {_ms(best.total)}, {_ms(best.terms[term] - terms[term])} more for {term}"


def _no_labels(operator: Operator, nodes: list[Node]) -> Infeasible:
    nearest = sorted(nodes, key=lambda node: (len(operator.requires - node.labels), node.id))[:3]
    lacks = tuple(Lack(node.id, f"label {', '.join(sorted(operator.requires - node.labels))}") for node in nearest)
    return Infeasible(
        "requires",
        operator.id,
        lacks,
        f"no node has all that operator {operator.id!r} requires ({', '.join(sorted(operator.requires))}): "
        f"{_nearest(lacks)}. Give a node the labels, or require less",
    )


def _too_little_memory(operator: Operator, nodes: list[Node], free: Mapping[str, float]) -> Infeasible:
    """`free`: what others of this pipeline have left of the nodes; a node that isn't in it is as it was."""
    room = {node.id: free.get(node.id, node.free_memory_mb) for node in nodes}
    nearest = sorted(nodes, key=lambda node: (-room[node.id], node.id))[:3]
    lacks = tuple(Lack(n.id, f"{max(operator.memory_mb - room[n.id], 0.0):g} MiB of memory") for n in nearest)
    beside = " beside the pipeline's other operators" if free else ""
    where = f"node {operator.pin!r}" if operator.pin is not None else "no node that it may be on"
    has = "doesn't have" if operator.pin is not None else "has"
    return Infeasible(
        "memory",
        operator.id,
        lacks,
        f"operator {operator.id!r} needs {operator.memory_mb:g} MiB of memory, but {where} {has} that much free"
        f"{beside}: {_nearest(lacks)}. Stop another pipeline, ask for less with @operator(memory=...), or add a node",
    )


def _nearest(lacks: tuple[Lack, ...]) -> str:
    return ", ".join(f"{lack.node} lacks {lack.lacks}" for lack in lacks)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
