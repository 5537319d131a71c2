"""What each pod of a pipeline is to know of its neighbours and of itself: a pure function of what was asked for.

Called by `podsteps` and `movesteps`, which tell pods what they don't know yet. During a move the operator that moves
has two pods: the present one, and a second that is to take over or has been taken over from (`state.RequestedMove`).
"""

from __future__ import annotations

from collections.abc import Mapping

from nomad.control import LinkPeer, Role, Way
from nomad.delivery.relay import key_of
from nomad.master.state import (
    Desired,
    DesiredPipeline,
    Observed,
    PodState,
    RequestedMove,
    RequestedOperator,
    link_id,
)
from nomad.master.views import MoveState
from nomad.runtime.base import NodeInfo

NOTHING = PodState()
"""Of a pod that nothing has been seen of."""

CONNECTED = (MoveState.CONNECTING, MoveState.CARRYING, MoveState.HANDING_OVER, MoveState.SWITCHING)
"""States in which neighbours know of two instances."""


def state_of(observed: Observed, op: RequestedOperator) -> PodState:
    """What is seen of the pod that was asked for."""
    return observed.pods.get(op.pod or "", NOTHING)


def at_rest(wanted: DesiredPipeline, name: str) -> Role:
    """What the old instance of an operator comes to be before the next one takes over."""
    return Role.HALTED if name in wanted.ends else Role.RETIRED


def role(wanted: DesiredPipeline, name: str, move: RequestedMove | None, observed: Observed, *, second: bool) -> Role:
    """What a pod of the operator may do: the present one, or the `second` of a move."""
    if move is None or move.order.operator != name:
        return Role.ACTIVE
    source = name in wanted.sources
    if second:
        if move.switched:
            return Role.RETIRED if source else at_rest(wanted, name)
        return Role.ACTIVE if move.handed and not source else Role.STANDBY
    if move.switched:
        # The next source begins when what made messages in the one before has ended, or doesn't end for long.
        waits = source and move.state is MoveState.SWITCHING and move.second.pod is not None
        ended = state_of(observed, move.second).ended or state_of(observed, move.second).role == Role.RETIRED
        return Role.STANDBY if waits and not ended else Role.ACTIVE
    if move.state is MoveState.CARRYING:
        return Role.RETIRED
    if move.holds:
        return at_rest(wanted, name)
    # Rolled back: the old one takes up its work again when nobody else can be at it.
    taken_over = move.second.pod is not None and move.second.told is not None and move.second.told.role == Role.ACTIVE
    return at_rest(wanted, name) if taken_over else Role.ACTIVE


def way(sender: str, receiver: str, nodes: Mapping[str, NodeInfo]) -> Way:
    """How two operators on these nodes come together. On one node they always reach each other."""

    def reachable(node: str) -> bool:
        return node not in nodes or nodes[node].reachable

    if sender == receiver or reachable(receiver):
        return Way.DIAL
    return Way.BACK if reachable(sender) else Way.RELAY


def apart(wanted: DesiredPipeline, observed: Observed) -> list[str]:
    """What to tell the user of links whose ends don't come together, for want of a relay."""
    if observed.relay is not None:
        return []
    return [
        f"{source!r} on {wanted.node_of(source)!r} and {target!r} on {wanted.node_of(target)!r} can't reach each other"
        ": both nodes can only dial out, and there is no relay. Nothing flows until one of them is moved"
        for source, target in wanted.spec.edges
        if way(wanted.node_of(source), wanted.node_of(target), observed.nodes) is Way.RELAY
    ]


def links(
    wanted: DesiredPipeline,
    name: str,
    node: str,
    operators: Mapping[str, RequestedOperator],
    move: RequestedMove | None,
    desired: Desired,
    observed: Observed,
) -> tuple[tuple[LinkPeer, ...], set[str]]:
    """The links of an operator's pod on `node` as it should know them, and those whose address can't be told yet.

    A peer that an earlier master started and that hasn't reported yet most likely
    works on: nothing is said of its address, so that its link isn't cut.
    """
    found: list[LinkPeer] = []
    unknown: set[str] = set()
    for source, target in wanted.spec.edges:
        if name not in (source, target):
            continue
        out = name == source
        peer = target if out else source
        now, standby = operators[peer], None
        if move is not None and move.order.operator == peer and move.state in CONNECTED:
            if not move.switched:
                standby = move.second
            elif not out and move.second.pod is not None:
                # Who hears the old instance goes on doing so until the first word of the new one.
                now, standby = move.second, operators[peer]
        link = link_id(wanted.spec.id, source, target)
        there = now.node or wanted.node_of(peer)
        how = way(node, there, observed.nodes) if out else way(there, node, observed.nodes)
        if now.adopted and state_of(observed, now).ready_at is None and _dials(out, how):
            unknown.add(link)
        entry = LinkPeer(
            link=link,
            direction="out" if out else "in",
            peer_operator=peer,
            address=_address(out, how, now, observed),
            peer_epoch=now.epoch,
            shape=desired.shape(node, there),
            way=how,
        )
        if standby is not None and standby.pod is not None:
            ends = (node, standby.node) if out else (standby.node, node)
            entry.standby_way = way(*ends, observed.nodes)
            entry.standby_address = _address(out, entry.standby_way, standby, observed)
            entry.standby_epoch = standby.epoch
            entry.standby_shape = desired.shape(node, standby.node)
        if observed.relay is not None and Way.RELAY in (entry.way, entry.standby_way):
            entry.relay_key = key_of(observed.relay.key, link)
        found.append(entry)
    return tuple(found), unknown


def _dials(out: bool, how: Way) -> bool:
    """Whether this end of a link dials the other one."""
    return how is (Way.DIAL if out else Way.BACK)


def _address(out: bool, how: Way, other: RequestedOperator, observed: Observed) -> str | None:
    """Where this end of a link has to dial to come together with the other."""
    if how is Way.RELAY:
        return observed.relay.address if observed.relay is not None else None
    return state_of(observed, other).address if _dials(out, how) else None
