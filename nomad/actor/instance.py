"""One instance of an operator: its links, its actor and its thread, put together from an assignment.

Lives in one event loop: the data loop of `nomad.actor.host`, or a test's own. Knows nothing of the master.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from nomad.actor.execute import ASYNC_KINDS, Worker
from nomad.actor.journal import Journal
from nomad.actor.meter import Meter
from nomad.actor.operator import Operator
from nomad.actor.outbox import Outbox
from nomad.actor.source import Source
from nomad.bundle import LoadedOperator
from nomad.callables import setup_of
from nomad.clock import Clock
from nomad.control import MOST_SHOWN, Assignment, LinkPeer, LinkStatus, PodStats, Role, Way
from nomad.delivery.codec import Codec
from nomad.delivery.frames import Position
from nomad.delivery.inlink import InLink, InPort
from nomad.delivery.meeting import Arriving, Call, Place, Relayed
from nomad.delivery.outlink import OutLink
from nomad.delivery.receiver import Receiver
from nomad.delivery.sender import Sender
from nomad.errors import NomadError
from nomad.pipeline import Kind
from nomad.setaside import FILE, Record, SetAside

PART = 4 << 20
"""Bytes of what is set aside that are handed over at a time."""

CLOSE_SECONDS = 0.5
"""How long a call of the user's function may take to return when the instance closes."""


class Instance:
    """`setup`, `start`, then `run`; `close` in any case."""

    def __init__(
        self,
        assignment: Assignment,
        loaded: LoadedOperator,
        clock: Clock,
        told: Callable[[], None] | None = None,
        advertise: str | None = None,
    ):
        """`told` is called, in the loop, when what `status` says may have changed. `advertise`: the host under which
        peers reach what listens here, where that isn't the one it is bound to.
        """
        self.spec = loaded.spec
        self.meter = Meter(assignment.speed)
        self.codec = Codec(loaded.types, loaded.codec)
        """For the thread of the loop."""
        self.shown = Codec(loaded.types, loaded.codec)
        """For another thread, which shows outputs to somebody."""
        self._assignment = assignment
        self._clock = clock
        self._ins: dict[str, InLink] = {}
        self._outs: dict[str, OutLink] = {}
        final = bool(assignment.links) and all(peer.direction == "in" for peer in assignment.links)
        path = self._file("journal") if final else None
        self._journal = Journal(path) if path else None
        self._port = InPort(self._ins, advertise, clock)
        for peer in assignment.links:
            self._add(peer)
        self.outbox = Outbox(list(self._outs.values()), self.codec, clock, copy=loaded.spec.copy_outputs)
        self._worker = Worker(f"{loaded.spec.name} function", runs_loop=loaded.spec.kind in ASYNC_KINDS)
        self._setup = setup_of(loaded.function)
        self._set_aside = SetAside(self._file(FILE))
        self.meter.set_aside(self._set_aside.count)
        self._tasks: list[asyncio.Task[None]] = []
        self.actor: Operator | Source = self._actor(loaded)
        self._told = told
        for link in self._links():
            link.changed, link.met = self.actor.wake, self._met
        for out in self._outs.values():
            out.threaded = loaded.spec.kind is Kind.SOURCE_GENERATOR
        self.actor.halted = self._met
        if isinstance(self.actor, Operator):
            self.actor.reruns.noted = self._met
            for inlink in self._ins.values():
                inlink.one = self.actor.one

    async def setup(self) -> None:
        """Let the user's object load what it needs, in the function's thread. Raises `SetupFailed`."""
        if self._setup is not None:
            await self._worker.once(self._setup)

    async def start(self) -> str | None:
        """Listen and dial; the address that peers should dial, None if there is none. Raises `TransportError`."""
        address = await self._port.listen(self._assignment.listen) if self._assignment.listen else None
        for link in self._outs.values():
            self._tasks.append(asyncio.create_task(link.run(), name=f"link {link.sender.link}"))
        self.set_peers(self._assignment.links)
        return address

    async def run(self) -> None:
        """Work until cancelled, or until a source has ended and all it sent is settled. Raises `OperatorFailed`."""
        await self.actor.run()

    def set_peers(self, peers: list[LinkPeer]) -> None:
        """Where the peers are now, and how emulated links behave."""
        for peer in peers:
            if peer.direction == "out":
                out = self._outs[peer.link]
                place = self._place(peer, peer.way, peer.address, peer.peer_epoch)
                out.set_peer(place, peer.peer_epoch, peer.shape)
                place = self._place(peer, peer.standby_way, peer.standby_address, peer.standby_epoch)
                out.set_standby(place, peer.standby_epoch, peer.standby_shape)
            else:
                inlink = self._ins[peer.link]
                inlink.set_peer(peer.peer_epoch, peer.shape)
                inlink.set_standby(peer.standby_epoch, peer.standby_shape)
                calls = (
                    self._call(peer, peer.way, peer.address, peer.peer_epoch),
                    self._call(peer, peer.standby_way, peer.standby_address, peer.standby_epoch),
                )
                self._port.call(peer.link, [call for call in calls if call is not None])

    def _place(self, peer: LinkPeer, way: str, address: str | None, epoch: int) -> Place | None:
        """Where the receiver of this epoch is found."""
        if not epoch:
            return address
        if way == Way.BACK:
            return Arriving(self._port.arrivals, peer.link, epoch)
        if way == Way.RELAY and address is not None:
            return Relayed(address, peer.relay_key, peer.link, self._assignment.epoch, epoch)
        return address

    def _call(self, peer: LinkPeer, way: str, address: str | None, epoch: int) -> Call | Relayed | None:
        """Where this operator has to go to the sender of this epoch; None where that comes by itself."""
        if not epoch or address is None or way == Way.DIAL:
            return None
        if way == Way.RELAY:
            return Relayed(address, peer.relay_key, peer.link, epoch, self._assignment.epoch)
        return Call(address, self._assignment.link_key, peer.link, self._assignment.epoch)

    def set_role(self, role: Role, called: Sequence[tuple[int, int, bytes]] = ()) -> None:
        """What this instance may do while its operator moves. `called`: what the one before said in its `status`."""
        if isinstance(self.actor, Operator):
            self.actor.set_role(role, {lane: Position(origin, path) for lane, origin, path in called})
        else:
            self.actor.set_role(role)
        self._met()

    def status(self) -> dict[str, Any]:
        """What the master waits for while an operator moves; may be called from another thread."""
        links = [
            LinkStatus(name, direction, *link.peers)
            for direction, side in (("in", self._ins), ("out", self._outs))
            for name, link in side.items()
        ]
        called = self.actor.called if isinstance(self.actor, Operator) else {}
        return {
            "role": str(self.actor.role),
            "links": [asdict(link) for link in links],
            "called": [(lane, *position) for lane, position in called.items()],
        }

    def numbers(self) -> dict[str, Any]:
        """How far each link is, in the numbers of its sender; for counting what a move lost or doubled.

        In: `epoch` of the sender that is heard; `first`, the number that it began with towards this instance (None:
        nobody has yet); the ends of what was `received` and of what is `settled`; `disorder`, how often the function
        was called for a message that it had been called for or for an older one. Out: how many were `numbered`, and
        how many of them are `settled`.
        """
        links: list[dict[str, Any]] = []
        for name, inlink in self._ins.items():
            received, settled = inlink.receiver.progress
            links.append(
                {
                    "link": name,
                    "direction": "in",
                    "epoch": inlink.peers[0],
                    "first": inlink.receiver.first,
                    "received": received,
                    "settled": settled,
                    "disorder": self.meter.disorder,
                }
            )
        for name, out in self._outs.items():
            links.append(
                {"link": name, "direction": "out", "numbered": out.sender.numbered, "settled": out.sender.settled}
            )
        return {"links": links}

    async def rerun(self, ids: list[int] | None) -> dict[str, int]:
        """Run messages that were set aside once more."""
        if isinstance(self.actor, Source):
            return {"ran": 0, "failed": 0}
        return await self.actor.rerun(ids)

    def set_aside(self, after: int = 0) -> list[dict[str, Any]]:
        """Messages set aside with ids above `after`, oldest first: so many as are told of at once, none after the last.

        In place of one that is too large to be told of there is a sentence.
        """
        return [self._shown(record) for record in self._set_aside.page(after, PART)]

    def drop(self, ids: list[int] | None) -> dict[str, int]:
        """Forget messages that were set aside."""
        return {"dropped": 0 if isinstance(self.actor, Source) else self.actor.reruns.drop(ids)}

    def _shown(self, record: Record) -> dict[str, Any]:
        size = len(record.value)
        if size <= MOST_SHOWN:
            return record.as_data()
        instead = self.shown.encode_one(f"(a message of {size} bytes, too large to be shown)")
        return record.as_data() | {"value": instead}

    def hand_out(self, offset: int) -> dict[str, Any]:
        """What is set aside, as it is in its file: some bytes from `offset` on, and whether there are more.

        Raises `NomadError` unless this instance has retired: the file changes.
        """
        if self.actor.role not in (Role.RETIRED, Role.HALTED):
            raise NomadError("only an instance that has retired gives away what it has set aside")
        data, more = self._set_aside.part(offset, PART)
        return {"data": data, "more": more}

    def take_in(self, offset: int, data: bytes, *, last: bool) -> None:
        """What another instance gave away, part by part; it counts once the last one is here.

        Raises `NomadError` unless this instance stands by, or when it can't be kept.
        """
        if self.actor.role is not Role.STANDBY:
            raise NomadError("only an instance that stands by takes what another one has set aside")
        self._set_aside.take(offset, data, last=last)

    def cut(self) -> None:
        """Break all connections, as a fault would; they come back by themselves."""
        for link in self._links():
            link.cut()

    async def close(self) -> bool:
        """Close everything; False when the user's function hangs in its thread: only the end of the process ends it."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._port.close()
        ended = await asyncio.to_thread(self._worker.close, CLOSE_SECONDS)
        self._set_aside.close()
        if ended and self._journal is not None:
            self._journal.close()
        return ended

    def stats(self) -> PodStats:
        """Counters and samples now; may be called from another thread."""
        stats, meter = self.meter.stats, self.meter
        ins = [link.receiver for link in self._ins.values()]
        outs = [link.sender for link in self._outs.values()]
        stats.queue_messages, stats.queue_bytes = self.actor.queued
        stats.unacked_messages = sum(s.unsettled[0] for s in outs)
        stats.unacked_bytes = sum(s.unsettled[1] for s in outs)
        stats.received = sum(r.accepted for r in ins)
        stats.duplicates = sum(r.duplicates for r in ins)
        stats.fenced = sum(link.fenced for link in self._links())
        stats.reconnects = sum(link.reconnects for link in self._links())
        if isinstance(self.actor, Operator):
            stats.mode = "inline" if self.actor.mode.inline else "thread"
            service = self.actor.mode.service_time
        else:
            stats.processed = stats.emitted
            service = self.actor.service_time
        stats.service_time = None if service is None else service * meter.slowdown
        stats.output_bytes = self.outbox.output_bytes
        stats.sent_bytes = self.outbox.sent_bytes
        stats.busy, stats.busy_seconds = meter.busy_share(), meter.busy
        stats.latency_p50, stats.latency_p99 = meter.latencies()
        stats.paused = meter.paused
        stats.at = now = self._clock.now()
        stats.links = [*map(_in, self._ins.values()), *(_out(link, now) for link in self._outs.values())]
        return stats

    def _links(self) -> list[InLink | OutLink]:
        return [*self._ins.values(), *self._outs.values()]

    def _add(self, peer: LinkPeer) -> None:
        mine = self._assignment
        if peer.direction == "out":
            sender = Sender(peer.link, mine.epoch, quiet=mine.role == Role.STANDBY)
            self._outs[peer.link] = OutLink(sender, mine.link_key, self._clock)
            self._port.sends(peer.link, mine.link_key)
            return
        receiver = Receiver(
            peer.link,
            mine.epoch,
            window_messages=mine.window_messages,
            window_bytes=mine.window_bytes,
            received=self._journal.positions() if self._journal else None,
        )
        self._ins[peer.link] = InLink(receiver, mine.link_key, self._clock)

    def _actor(self, loaded: LoadedOperator) -> Operator | Source:
        spec, clock = loaded.spec, self._clock
        if not self._ins:
            mine = self._assignment
            return Source(
                spec, loaded.function, self.outbox, self._worker, self.meter, clock, mine.epoch, Role(mine.role)
            )
        (inbox,) = self._ins.values()
        return Operator(
            spec,
            loaded.function,
            inbox,
            self.outbox,
            self.codec,
            self._worker,
            self.meter,
            self._set_aside,
            self._journal,
            clock,
            lane=loaded.number,
            epoch=self._assignment.epoch,
            role=Role(self._assignment.role),
        )

    def _met(self) -> None:
        if self._told is not None:
            self._told()

    def _file(self, name: str) -> str | None:
        return os.path.join(self._assignment.workdir, name) if self._assignment.workdir else None


def _in(link: InLink) -> dict[str, Any]:
    shown = _link(link.receiver, "in", connected=link.connected or link.waiting)
    return shown | {"state": "waiting"} if link.waiting else shown


def _out(link: OutLink, now: float) -> dict[str, Any]:
    report = link.sender.samples.report(now)
    return _link(link.sender, "out", connected=link.connected) | {
        "peer_epoch": report.peer_epoch,
        "rtt": link.sender.samples.newest,
        "rtt_least": report.round_trip,
        "bandwidth": report.bandwidth,
        "reached": report.reached,
    }


def _link(end: Sender | Receiver, direction: str, *, connected: bool) -> dict[str, Any]:
    messages, nbytes = end.unsettled
    return {
        "link": end.link,
        "direction": direction,
        "state": str(end.machine.state),
        "connected": connected,
        "peer_epoch": end.peer_epoch,
        "unsettled_messages": messages,
        "unsettled_bytes": nbytes,
    }
