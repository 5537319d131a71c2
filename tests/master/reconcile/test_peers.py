"""How the two ends of a link come together, by the nodes they are on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest

from nomad.control import LinkPeer, Way
from nomad.delivery.relay import key_of
from nomad.master.reconcile import peers
from nomad.master.state import MoveOrder, Relay, RequestedMove, RequestedOperator
from nomad.master.views import MoveState
from nomad.runtime.base import NodeInfo
from tests.master.worlds import NAMES, World

NODES = {name: NodeInfo(name, reachable=name not in ("edge", "home")) for name in ("edge", "home", "fog", "cloud")}


@pytest.mark.parametrize(
    ("sender", "receiver", "way"),
    [
        ("cloud", "fog", Way.DIAL),
        ("edge", "cloud", Way.DIAL),
        ("cloud", "edge", Way.BACK),
        ("edge", "home", Way.RELAY),
        ("edge", "edge", Way.DIAL),
        ("gone", "cloud", Way.DIAL),
        ("cloud", "gone", Way.DIAL),
    ],
)
def test_ways(sender: str, receiver: str, way: Way) -> None:
    assert peers.way(sender, receiver, NODES) is way


def worlds() -> Iterator[tuple[World, dict[str, RequestedOperator], RequestedMove | None]]:
    """The pipeline's pods on all nodes, without and with a move of the one in the middle."""
    for nodes in product(NODES, repeat=3):
        for target in (None, *NODES):
            for switched in (False, True):
                world = World()
                world.observed.nodes = NODES
                world.observed.relay = Relay("unix:/relay", b"r" * 32)
                world.all_ready()
                have = world.requested.pipelines["p"].operators
                operators = {name: replace(have[name], node=node) for name, node in zip(NAMES, nodes, strict=True)}
                for name in NAMES:
                    world.observed.pods[operators[name].pod or ""].address = f"unix:/{name}"
                if target is None:
                    yield world, operators, None
                    break
                second = RequestedOperator(epoch=7, node=target, pod="p.square-e7")
                world.observed.pods["p.square-e7"] = replace(world.state("square"), address="unix:/second")
                order = MoveOrder("m", "square", target, "user", "because")
                state = MoveState.SWITCHING if switched else MoveState.CONNECTING
                if switched:
                    operators["square"], second = second, operators["square"]
                yield world, operators, RequestedMove(order, nodes[1], state, 0.0, second, switched=switched)


def links(
    world: World, name: str, op: RequestedOperator, operators: dict[str, RequestedOperator], move: RequestedMove | None
) -> tuple[LinkPeer, ...]:
    wanted = world.desired.pipelines["p"]
    return peers.links(wanted, name, op.node, operators, move, world.desired, world.observed)[0]


def test_exactly_one_end_dials_or_both_the_relay() -> None:
    """Whatever moves where: two instances that are to meet agree how, and nobody dials who can't be dialled."""
    count = 0
    for world, operators, move in worlds():
        instances = {(name, op.epoch): op for name, op in operators.items()}
        if move is not None:
            instances["square", move.second.epoch] = move.second
        ends: dict[tuple[str, int, int], dict[str, tuple[str, str | None, bytes]]] = {}
        for (name, epoch), op in instances.items():
            for link in links(world, name, op, operators, move):
                known = [(link.peer_epoch, link.way, link.address)]
                if link.standby_epoch:
                    known.append((link.standby_epoch, link.standby_way, link.standby_address))
                for other, way, address in known:
                    epochs = (epoch, other) if link.direction == "out" else (other, epoch)
                    ends.setdefault((link.link, *epochs), {})[link.direction] = way, address, link.relay_key
        for (link_id, sender, receiver), end in ends.items():
            if len(end) < 2:
                continue  # the one waits for an instance that doesn't know of it, or doesn't any more
            (way, out, key), (other_way, back, other_key) = end["out"], end["in"]
            assert way == other_way
            source, target = link_id.removeprefix("p:").split(">")
            nodes = instances[source, sender].node, instances[target, receiver].node
            assert way == peers.way(*nodes, NODES)
            match way:
                case Way.DIAL:
                    assert (out, back) == (address_of(target, receiver), None)
                case Way.BACK:
                    assert (out, back) == (None, address_of(source, sender))
                case _:
                    assert out == back == "unix:/relay"
                    assert key == other_key == key_of(b"r" * 32, link_id)
            count += 1
    assert count > 1000


def address_of(name: str, epoch: int) -> str:
    return "unix:/second" if epoch == 7 else f"unix:/{name}"


def test_without_a_relay_there_is_no_way_between_nodes_that_only_dial_out() -> None:
    world = World()
    world.observed.nodes = {name: NodeInfo(name, reachable=False) for name in ("edge", "cloud")}
    world.all_ready()
    have = dict(world.requested.pipelines["p"].operators)
    (link,) = links(world, "source", have["source"], have, None)
    assert (link.way, link.address, link.relay_key) == (Way.RELAY, None, b"")


def test_who_is_told_nothing_of_a_sender_that_has_not_reported_yet() -> None:
    """Its address isn't known to a master that was restarted; the connection with it stands."""
    world = World()
    world.observed.nodes = {"cloud": NodeInfo("cloud"), "edge": NodeInfo("edge", reachable=False)}
    world.all_ready()
    have = dict(world.requested.pipelines["p"].operators)
    have["source"] = replace(have["source"], node="cloud", adopted=True)
    have["square"] = replace(have["square"], node="edge")
    world.state("source").ready_at = None
    wanted = world.desired.pipelines["p"]
    _, unknown = peers.links(wanted, "square", "edge", have, None, world.desired, world.observed)
    assert unknown == {"p:source>square"}


def test_the_user_is_told_of_links_for_which_there_is_no_relay() -> None:
    world = World()
    wanted = world.desired.pipelines["p"]
    assert peers.apart(wanted, world.observed) == []
    world.observed.nodes = {name: NodeInfo(name, reachable=False) for name in ("edge", "cloud")}
    (said,) = peers.apart(wanted, world.observed)
    assert said.startswith("'source' on 'edge' and 'square' on 'cloud' can't reach each other")
    world.observed.relay = Relay("unix:/relay", b"r" * 32)
    assert peers.apart(wanted, world.observed) == []
