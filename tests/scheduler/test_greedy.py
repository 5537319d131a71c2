"""Placements are valid, the same for the same content, and where there is none, the reason given is true."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nomad.scheduler import Infeasible, Link, Node, Operator, Plan, Policy, Snapshot, cost, place

LABELS = ("camera", "gpu", "arm")


def chain(nodes, operators, links=(), **options) -> Snapshot:
    names = [operator.id for operator in operators]
    return Snapshot(tuple(nodes), tuple(operators), tuple(itertools.pairwise(names)), tuple(links), **options)


@st.composite
def snapshots(draw) -> Snapshot:
    """Chains and DAGs on a few nodes, often with too little memory or missing labels."""
    labels = st.frozensets(st.sampled_from(LABELS), max_size=2)
    node_ids = [f"n{i}" for i in range(draw(st.integers(1, 4)))]
    nodes = [
        Node(
            node_id,
            speed=draw(st.sampled_from([0.25, 1.0, 4.0])),
            memory_mb=draw(st.integers(0, 6)) * 32.0,
            labels=draw(labels),
            used_memory_mb=draw(st.integers(0, 2)) * 32.0,
        )
        for node_id in node_ids
    ]
    pins = st.one_of(st.none(), st.none(), st.none(), st.sampled_from([*node_ids, *node_ids, "elsewhere"]))
    operators = [
        Operator(
            f"op{i}",
            memory_mb=draw(st.integers(0, 3)) * 32.0,
            requires=draw(st.one_of(st.just(frozenset()), labels)),
            work=draw(st.one_of(st.none(), st.floats(0, 1))),
            output_bytes=draw(st.one_of(st.none(), st.floats(0, 1e6))),
            pin=draw(pins),
        )
        for i in range(draw(st.integers(1, 5)))
    ]
    edges = set(itertools.pairwise(operator.id for operator in operators))
    for a, b in itertools.combinations(operators, 2):
        if draw(st.booleans()) and draw(st.booleans()):
            edges.add((a.id, b.id))
    links = [
        Link(a, b, draw(st.floats(0, 0.2)), draw(st.one_of(st.none(), st.floats(1e3, 1e9))))
        for a, b in itertools.permutations(node_ids, 2)
        if draw(st.booleans())
    ]
    return Snapshot(tuple(nodes), tuple(operators), tuple(sorted(edges)), tuple(links))


def breaks(snapshot: Snapshot, placement) -> str:
    """The first constraint that a placement breaks, or ""."""
    nodes = {node.id: node for node in snapshot.nodes}
    used = dict.fromkeys(nodes, 0.0)
    for operator in snapshot.operators:
        node = nodes.get(placement[operator.id])
        if node is None or (operator.pin is not None and node.id != operator.pin):
            return "pin"
        if operator.pin is None and not operator.requires <= node.labels:
            return "requires"
        used[node.id] += operator.memory_mb
        if used[node.id] > node.free_memory_mb:
            return "memory"
    return ""


def possible(snapshot: Snapshot) -> bool:
    """By trying everything."""
    names = [operator.id for operator in snapshot.operators]
    choices = itertools.product([node.id for node in snapshot.nodes], repeat=len(names))
    return any(not breaks(snapshot, dict(zip(names, chosen, strict=True))) for chosen in choices)


@given(snapshots())
def test_a_plan_breaks_nothing_and_is_found_whenever_there_is_one(snapshot):
    answer = place(snapshot)
    if isinstance(answer, Plan):
        assert answer.placement.keys() == {operator.id for operator in snapshot.operators}
        assert breaks(snapshot, answer.placement) == ""
    else:
        assert not possible(snapshot)


@given(snapshots())
def test_infeasible_names_a_constraint_that_is_broken_indeed(snapshot):
    answer = place(snapshot)
    if isinstance(answer, Plan):
        return
    operator = next(operator for operator in snapshot.operators if operator.id == answer.operator)
    assert repr(operator.id) in answer.text
    if answer.constraint == "pin":
        assert operator.pin == "elsewhere"
    elif answer.constraint == "requires":
        assert not any(operator.requires <= node.labels for node in snapshot.nodes)
        assert len(answer.nearest) == min(3, len(snapshot.nodes))
        assert all("label" in lack.lacks for lack in answer.nearest)
    else:
        assert answer.constraint == "memory"
        assert answer.nearest
        assert all("MiB of memory" in lack.lacks for lack in answer.nearest)
        upto = snapshot.operators[: snapshot.operators.index(operator) + 1]
        pinned = [op for op in snapshot.operators if op.pin in {node.id for node in snapshot.nodes} and op not in upto]
        part = chain(snapshot.nodes, [*upto, *pinned])
        assert not possible(part)


@given(snapshots(), st.randoms(use_true_random=False))
def test_the_order_of_nodes_links_and_edges_is_of_no_consequence(snapshot, rnd: random.Random):
    def shuffled(items):
        items = list(items)
        rnd.shuffle(items)
        return tuple(items)

    again = dataclasses.replace(
        snapshot, nodes=shuffled(snapshot.nodes), links=shuffled(snapshot.links), edges=shuffled(snapshot.edges)
    )
    assert place(snapshot) == place(snapshot) == place(again)


@given(snapshots())
def test_reasons_add_up_and_the_latency_can_be_recomputed(snapshot):
    answer = place(snapshot)
    if isinstance(answer, Infeasible):
        return
    nodes = {node.id: node for node in snapshot.nodes}
    links = {(link.source, link.target): link for link in snapshot.links}
    finish: dict[str, float] = {}
    for operator in snapshot.operators:
        reason = answer.reasons[operator.id]
        assert reason.node == answer.placement[operator.id]
        assert reason.total == pytest.approx(sum(reason.terms.values()))
        assert reason.text
        arrival = 0.0
        for source in snapshot.operators:
            if (source.id, operator.id) in snapshot.edges:
                link = links.get((answer.placement[source.id], reason.node))
                arrival = max(arrival, finish[source.id] + cost.transfer(cost.bytes_of(source, Policy()), link))
        work = cost.work_of(operator, Policy())
        assert reason.terms["arrival"] == pytest.approx(arrival)
        assert reason.terms["processing"] == pytest.approx(work / nodes[reason.node].speed)
        finish[operator.id] = arrival + work / nodes[reason.node].speed
        if reason.runner_up is not None:
            assert reason.runner_up.node != reason.node
            assert reason.runner_up.node in reason.text or operator.pin
    assert answer.latency == pytest.approx(max(finish.values()))


# -- examples

EDGE = Node("edge", speed=0.25, memory_mb=256, labels=frozenset({"camera"}))
FOG = Node("fog", speed=1, memory_mb=256)
CLOUD = Node("cloud", speed=4, memory_mb=256, labels=frozenset({"gpu"}))
THREE = (EDGE, FOG, CLOUD)
LINKS = (Link("edge", "fog", 0.005, 1e6), Link("fog", "cloud", 0.02, 1e6), Link("edge", "cloud", 0.05, 1e6))


def placed(*operators, nodes=THREE, links=LINKS, **options) -> Plan:
    answer = place(
        chain(nodes, [Operator("src", pin="edge"), *operators, Operator("sink", pin="cloud")], links, **options)
    )
    assert isinstance(answer, Plan)
    return answer


def refused(*operators, nodes=THREE) -> Infeasible:
    answer = place(chain(nodes, operators, LINKS))
    assert isinstance(answer, Infeasible)
    return answer


def test_work_goes_to_the_fast_node():
    plan = placed(Operator("heavy", work=1.0))
    assert plan.placement["heavy"] == "cloud"
    assert "fog would take" in plan.reasons["heavy"].text
    assert "more for processing" in plan.reasons["heavy"].text


def test_what_makes_data_small_stays_near_the_data():
    big = chain(THREE, [Operator("src", pin="edge", output_bytes=1e6), Operator("shrink", output_bytes=10)], LINKS)
    assert place(big).placement["shrink"] == "edge"


def test_a_fast_node_behind_a_slow_way_back_is_not_taken():
    nodes = (Node("here"), Node("fast", speed=2))
    links = (Link("here", "fast", 0.0), Link("fast", "here", 10.0))
    operators = [Operator("src", pin="here"), Operator("work", work=1.0), Operator("sink", pin="here")]
    plan = place(chain(nodes, operators, links))
    assert plan.placement["work"] == "here"
    assert "more for onward" in plan.reasons["work"].text


def test_pins_and_labels():
    plan = placed(Operator("see", requires=frozenset({"camera"}), work=1.0))
    assert plan.placement["see"] == "edge"
    assert plan.reasons["src"].text == "it is pinned to edge"
    assert "only node with camera" in plan.reasons["see"].text
    assert placed(Operator("a", pin="fog", requires=frozenset({"gpu"}))).placement["a"] == "fog"


def test_full_nodes_are_passed_over_and_the_reason_says_so():
    plan = placed(Operator("a", 200, work=1.0), Operator("b", 100, work=1.0))
    assert plan.placement == {"src": "edge", "a": "cloud", "b": "fog", "sink": "cloud"}
    assert "cloud would take" in plan.reasons["b"].text
    assert "lacks 44 MiB" in plan.reasons["b"].text


def test_the_search_steps_back_when_the_cheapest_choice_leaves_no_room():
    plan = placed(Operator("any", 200, work=1.0), Operator("needy", 200, frozenset({"gpu"}), work=1.0))
    assert (plan.placement["any"], plan.placement["needy"]) == ("fog", "cloud")
    assert "had to leave its memory to others" in plan.reasons["any"].text or "lacks" in plan.reasons["any"].text


def test_among_equals_an_operator_stays_where_it_is():
    nodes = (Node("a"), Node("b"), Node("c"))
    operators = [Operator("src", pin="a"), Operator("x"), Operator("sink", pin="a")]
    assert place(chain(nodes, operators)).placement["x"] == "a"
    assert place(chain(nodes, operators, placement={"x": "b"})).placement["x"] == "b"


def test_no_nodes():
    assert refused(Operator("a"), nodes=()).constraint == "nodes"


def test_unknown_pin():
    answer = refused(Operator("a", pin="clowd"))
    assert (answer.constraint, answer.operator) == ("pin", "a")
    assert "did you mean 'cloud'?" in answer.text
    assert "known nodes: cloud, edge, fog" in refused(Operator("a", pin="x")).text


def test_missing_labels():
    answer = refused(Operator("a", requires=frozenset({"gpu", "arm"})))
    assert answer.constraint == "requires"
    assert [(lack.node, lack.lacks) for lack in answer.nearest] == [
        ("cloud", "label arm"),
        ("edge", "label arm, gpu"),
        ("fog", "label arm, gpu"),
    ]


def test_too_little_memory():
    answer = refused(Operator("a"), Operator("b", 300, frozenset({"gpu"})))
    assert (answer.constraint, answer.operator) == ("memory", "b")
    assert [(lack.node, lack.lacks) for lack in answer.nearest] == [("cloud", "44 MiB of memory")]


def test_too_little_memory_together():
    answer = refused(Operator("a", 200, pin="edge"), Operator("b", 200, pin="edge"))
    assert (answer.constraint, answer.operator) == ("memory", "b")
    assert "beside the pipeline's other operators: edge lacks 144 MiB" in answer.text
    answer = refused(*(Operator(name, 200) for name in "abcd"))
    assert (answer.constraint, answer.operator) == ("memory", "d")


def test_a_search_that_was_given_up_says_so():
    nodes = tuple(Node(f"n{i}", memory_mb=100) for i in range(6))
    answer = place(chain(nodes, [Operator(f"op{i}", 60) for i in range(7)]), Policy(max_steps=50))
    assert isinstance(answer, Infeasible)
    assert answer.constraint == "search"
    assert "doesn't prove" in answer.text


@settings(max_examples=5)
@given(st.integers(0, 1000))
def test_a_hundred_operators_on_a_hundred_nodes(seed):
    rnd = random.Random(seed)
    nodes = [Node(f"n{i}", speed=rnd.uniform(0.1, 4), memory_mb=300) for i in range(100)]
    operators = [Operator(f"op{i}", 100, work=rnd.random()) for i in range(100)]
    snapshot = chain(nodes, operators)
    assert breaks(snapshot, place(snapshot).placement) == ""
