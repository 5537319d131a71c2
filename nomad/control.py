"""The words that a pod and the master say to each other, and the channel that carries them.

Messages are msgpack maps with a "type". The channel runs over any transport, after the same mutual
handshake as data links (`nomad.delivery.handshake`), keyed with the pod's own key. It carries
control only: data never passes through the master, except for the outputs that someone tails.

    pod -> master                                   master -> pod
    ready      address, pid                         assign   one Assignment
    heartbeat  stats (see `PodStats`), error        peers    links: [LinkPeer, ...], speed, role, called
    status     role, links: [LinkStatus, ...], called
    failed     error, fatal                         stop     drain: bool, grace: seconds
    finished   (a source ended, all of it settled)  request  id, method, args
    outputs    items: [bytes, ...], skipped
    reply      id, ok, value | error                via      address, key
    leaving    (somebody else than the master wants it to end; it goes on for a while)
                                                    pace     seconds: between two heart-beats
                                                    word     within: seconds

In the handshake a pod says whether it has its assignment ("assigned"). It then also sends `ready`, if it is, after
every connect, so that a master that was restarted knows it again. `peers` names the links that changed. A pod says its
`status` after every connect and whenever it has changed: what a move waits for. `called` is, for each lane, the last
position that a last operator was called for: a halted one says it, and its successor is told. A process that was
started before it was known for which operator says nothing but its name, and waits for its assignment. `via` names the
node's agent: from then on the pod comes that way, as long as it is there (`nomad.gateway`).

On each new connection a pod's pace is `HEARTBEAT` again. A master of many pods asks for fewer heart-beats by `pace`:
all of them whenever that changes, and each that connects unless it is `HEARTBEAT`.

A machine acknowledges what comes for a process that hangs. So the master says a `word` on each connection, again and
again: whoever has heard one, and then nothing at all for `within` seconds, breaks the connection and dials again
(`nomad.reach`). Agents are told as pods are, and pass the word on to the pods that come by way of them. A master that
says no word is never taken for hung, and who doesn't know the word leaves it aside.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

import msgpack

HEARTBEAT = 0.5
"""Seconds between two heart-beats of a pod that its master hasn't told another pace.

Each is a round of measuring: a change shows in the second or third one after it.
"""

QUICKEST, SLOWEST = 0.1, 60.0
"""Seconds between two heart-beats that a pod may be told."""

LEAST_BETWEEN = 1e-3
"""Seconds; two counts of a pod that are said to be closer aren't believed."""

WITHIN_LEAST, WITHIN_MOST = 0.1, 600.0
"""Seconds of silence that a word may allow."""


UNANSWERED_SECONDS = 6.0
"""A master whose machine hasn't acknowledged anything for so long is dialled again: perhaps there is another one by
then, which waits `settings.Reconcile.adopt_grace` for those that its predecessor had.
"""

MOST_SAID = 32 << 20
"""Bytes of one message to the master, of a pod's or an agent's: more breaks the connection.

What is large goes in parts of some MiB. What can't be split, an output that somebody looks on or a message that is set
aside, is told of if it has up to `MOST_SHOWN`.
"""

MOST_SHOWN = 24 << 20
"""Bytes of what is shown to users in one piece: with its surroundings it stays below `MOST_SAID`."""

MOST_TOLD = 72 << 20
"""Bytes of one message of the master's: an assignment carries an operator's code, and a bundle may have 64 MiB."""

VIA = "via:"
"""Before what a pod calls itself, towards an agent by way of which it wants to reach the master."""


@dataclass(slots=True)
class Shape:
    """How an emulated link treats what is sent over it in one direction; the defaults leave it alone."""

    latency: float = 0.0
    """Seconds, one way."""
    jitter: float = 0.0
    """Seconds; uniform around the latency, order is kept."""
    bandwidth: float | None = None
    """Bytes per second; None is unlimited."""
    loss: float = 0.0
    """Probability in [0, 1) that a frame is lost once and sent again one retransmission time-out later."""


class Way(StrEnum):
    """How the two ends of a link come together."""

    DIAL = "dial"
    """The sender dials the receiver."""
    BACK = "back"
    """The receiver, which can't be dialled, dials the sender."""
    RELAY = "relay"
    """Neither can be dialled: both dial a relay."""


@dataclass(slots=True)
class LinkPeer:
    """One data link as one of its ends sees it."""

    link: str
    """`pipeline:from>to`, unique in the cluster."""
    direction: str
    """"in" or "out", seen from the pod that gets this."""
    peer_operator: str
    address: str | None = None
    """Where to dial, the peer or a relay; None while the peer isn't ready, and where it is the peer that dials."""
    peer_epoch: int = 0
    """The least epoch of the peer that may be heard."""
    shape: Shape = field(default_factory=Shape)
    """For what this pod sends on the link: data on "out", acknowledgements on "in"."""
    way: str = Way.DIAL
    """One of `Way`."""
    relay_key: bytes = b""
    """What this link's ends prove to a relay."""
    standby_address: str | None = None
    """`address` for the peer's next instance: to shake hands with it before it is needed."""
    standby_epoch: int = 0
    """Epoch of the peer's next instance; 0 when there is none."""
    standby_shape: Shape = field(default_factory=Shape)
    """`shape` towards that instance."""
    standby_way: str = Way.DIAL
    """`way` to that instance."""


class Role(StrEnum):
    """What an instance may do while its operator moves."""

    ACTIVE = "active"
    """The one: its alone are the messages set aside."""
    STANDBY = "standby"
    """The next one: loaded, listening and connected; sends nothing by itself."""
    RETIRED = "retired"
    """The one before: goes on with what it has received until it isn't heard any more, and sets nothing aside. A
    source has ended what made its messages."""
    HALTED = "halted"
    """The one before, where nobody behind it recognises doubles. A last operator calls its function no more; a source
    makes nothing more, and all that it made is settled. It goes on if it becomes active again."""


@dataclass(slots=True)
class LinkStatus:
    """Whom one end of a data link is connected to."""

    link: str
    direction: str
    """"in" or "out"."""
    epoch: int = 0
    """Of the peer that it has shaken hands with, and hears or would send to; 0: none."""
    standby: int = 0
    """Of the peer's next instance, if hands were shaken with that beforehand; 0: none."""


@dataclass(slots=True)
class Assignment:
    """All that a pod needs to become an operator."""

    pipeline: str
    operator: str
    epoch: int
    node: str
    manifest: bytes
    """The bundle's manifest, as signed."""
    signature: bytes
    code: bytes
    """The operator's pickle; its hash stands in the manifest."""
    types: bytes
    """The pickle of the classes that messages may carry; its hash stands in the manifest."""
    link_key: bytes
    """32 bytes; proves membership of the pipeline on data links."""
    listen: str
    """Where to accept data links, e.g. `unix:` or `tcp://127.0.0.1:0`."""
    links: list[LinkPeer]
    speed: float = 1.0
    """Emulated speed of the node; below 1 service times are stretched."""
    role: str = Role.ACTIVE
    """`Role.STANDBY` for an instance that another one still stands in for."""
    window_messages: int = 65_536
    window_bytes: int = 16 << 20
    workdir: str = ""
    """A folder of this operator's own that survives its processes (journal, set-aside messages)."""
    packages: str = ""
    """The folder in which processes of its node install what operators require; "" where they share none."""
    packages_bytes: int = 0
    """How large that may grow."""
    agent: str = ""
    """The address of its node's agent, which installs and hands out packages where there is no such folder."""
    agent_key: bytes = b""
    """Proves to the agent which pod asks (`nomad.handout`)."""


@dataclass(slots=True)
class PodStats:
    """What a heartbeat carries. Counters are of this process; None is unknown."""

    received: int = 0
    """Messages taken in."""
    processed: int = 0
    """Messages the function was done with, failed ones included."""
    emitted: int = 0
    """Messages sent on, or for the last operator values returned."""
    failed: int = 0
    """Calls that raised."""
    set_aside: int = 0
    """Messages now set aside."""
    retried: int = 0
    queue_messages: int = 0
    queue_bytes: int = 0
    """Received and not yet processed."""
    unacked_messages: int = 0
    unacked_bytes: int = 0
    """Sent and not yet acknowledged: the replay buffer."""
    duplicates: int = 0
    """Messages recognised as already seen, and dropped."""
    fenced: int = 0
    """Connections refused for an old epoch."""
    reconnects: int = 0
    service_time: float | None = None
    """Smoothed seconds of the function per message, stretched when the node is emulated."""
    output_bytes: float | None = None
    """Smoothed encoded bytes per output message."""
    busy: float | None = None
    """Share of the last interval that the function was running, 0 to 1."""
    busy_seconds: float = 0.0
    """How long the function has run in all, stretched when the node is emulated."""
    sent_bytes: int = 0
    """Encoded bytes of all messages that were sent, counted once however many links they went over."""
    latency_p50: float | None = None
    latency_p99: float | None = None
    """Seconds from the source's emission to the end of this operator's function, recent messages."""
    mode: str = "thread"
    """Where the function runs now: "inline" or "thread"."""
    paused: bool = False
    """No credit downstream: back-pressure."""
    rss: int = 0
    """Bytes."""
    cpu: float = 0.0
    """Seconds of CPU since the start."""
    last_output: bytes | None = None
    """The last output, encoded alone by the codec; None before the first or when it is over 64 KiB."""
    links: list[dict[str, Any]] = field(default_factory=list)
    """Per link what `master.views.DataLinkView` has, as a map."""
    at: float | None = None
    """When this was counted, in seconds of a clock of the process's machine that never goes back."""

    def seconds_since(self, before: PodStats) -> float | None:
        """Between two counts of a process, wherever they were held up on their way; None where it doesn't say, or says
        what can't be: by next to nothing a rate would be without bounds.
        """
        if self.at is None or before.at is None:
            return None
        seconds = self.at - before.at
        return seconds if LEAST_BETWEEN <= seconds < math.inf else None


def pack(message: dict[str, Any]) -> bytes:
    """A control message as bytes."""
    return msgpack.packb(message, use_bin_type=True, default=_plain)  # type: ignore[no-any-return]


def unpack(data: bytes | memoryview) -> dict[str, Any]:
    """Bytes as a control message; raises `ValueError` when they are none."""
    message = msgpack.unpackb(data, raw=False, strict_map_key=False)
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise ValueError("not a control message")
    return message


def heartbeat(stats: PodStats, error: dict[str, str] | None) -> dict[str, Any]:
    """A heart-beat: what a pod says of itself, but for what is as with one that has just begun: about half of it is."""
    told = {name: value for name, plain in _PLAIN.items() if (value := getattr(stats, name)) != plain}
    links = [{name: value for name, value in link.items() if value or isinstance(value, float)} for link in stats.links]
    return {"type": "heartbeat", "stats": told | {"links": links}, "error": error}


HEARTBEAT_HEAD = b"\x83\xa4type\xa9heartbeat"
"""How those begin that `heartbeat` makes, packed."""

_PLAIN = {name: value for name, value in asdict(PodStats()).items() if name != "links"}


def _plain(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return asdict(value)
    raise TypeError(f"a control message can't carry {type(value).__name__}")


def assignment_from(message: dict[str, Any]) -> Assignment:
    """The `Assignment` in an "assign" message."""
    fields = _known(Assignment, message)
    fields["links"] = [peer_from(p) for p in fields["links"]]
    return Assignment(**fields)


def peer_from(data: dict[str, Any]) -> LinkPeer:
    """The `LinkPeer` in a map."""
    shapes = {name: Shape(**_known(Shape, data[name])) for name in ("shape", "standby_shape")}
    return LinkPeer(**{**_known(LinkPeer, data), **shapes})


def pace_from(message: dict[str, Any]) -> float:
    """The seconds in a "pace" message; raises `ValueError` when they can't be meant."""
    seconds = float(message["seconds"])
    if not QUICKEST <= seconds <= SLOWEST:
        raise ValueError(f"a heart-beat each {seconds:g} s")
    return seconds


def within_from(message: dict[str, Any]) -> float:
    """The seconds in a "word" message; raises `ValueError` when they can't be meant."""
    seconds = float(message["within"])
    if not WITHIN_LEAST <= seconds <= WITHIN_MOST:
        raise ValueError(f"silence for {seconds:g} s")
    return seconds


def _known(kind: type[Any], data: dict[str, Any]) -> dict[str, Any]:
    """What this version knows of a map: while a cluster is being upgraded, the two ends have different versions."""
    return {name: data[name] for name in kind.__dataclass_fields__ if name in data}
