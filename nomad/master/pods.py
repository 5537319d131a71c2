"""The master's end of the control channels: pods dial in, prove themselves, and are heard, told and asked.

One channel per process; a new connection of the same process replaces the old one. Which pod a process is says the
runtime: one that was started before anybody knew for which operator keeps its channel here, and is `seat`ed once the
runtime has given it to a pod. What pods say of themselves goes to the `Observer`; replies go to whoever asked, live
outputs to whoever tails. Processes that are no pods (agents, relays) dial in here too, and are handed to `Guests`;
over an agent's connection its node's pods may come as well (`gathered`).
Knows nothing of what is wanted: the loop decides what is said, and is told by the observer when a connection comes or
goes.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from nomad import control
from nomad.control import Assignment, LinkPeer
from nomad.delivery.driver import shake_listener
from nomad.errors import ConflictError, DeliveryError, RequestError, TransportError
from nomad.fanout import Fanout, Subscription
from nomad.master.gathered import Gathered, Way
from nomad.master.observe import Observer
from nomad.master.pace import Pace
from nomad.master.state import Called
from nomad.master.views import TailItem
from nomad.settings import Heartbeats, History
from nomad.transport import registry
from nomad.transport.base import Connection, Frame, Listener
from nomad.transport.trunk import carries

log = logging.getLogger(__name__)

GATHER = 0.1
"""Seconds that heart-beats wait for one another where pods are asked for few: worked off together, all but the first
find the caches warm. Whatever else is said is heard at once, and after the heart-beats that came before it.
"""

GATHERED_BYTES = 1 << 20
"""More of them don't wait."""

MAX_ERROR = 2_000
"""Characters of a pod's refusal that are passed on."""


class Channel:
    """One connection of one process."""

    def __init__(self, number: int, name: str, conn: Connection, *, direct: bool = True) -> None:
        self.number = number
        self.direct = direct
        """Not by way of an agent."""
        self.name = name
        """What the process calls itself."""
        self.pod = ""
        """The pod that it is; "" for one that waits to be given to one, and for guests."""
        self.conn = conn
        self._requests: dict[int, asyncio.Future[Any]] = {}
        self._ids = itertools.count(1)

    def tell(self, message: dict[str, Any]) -> bool:
        """Whether the message went on its way; if not, the connection is about to be seen lost."""
        try:
            self.conn.write([(control.pack(message),)])
        except TransportError:
            return False
        return True

    def remark(self, frame: Frame) -> None:
        """What needn't be heard, packed: not said to who doesn't listen."""
        try:
            if self.conn.writable:
                self.conn.write([frame])
        except TransportError:
            return  # `PodPort` sees the same

    async def ask(self, method: str, args: dict[str, Any], timeout: float) -> Any:
        number = next(self._ids)
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._requests[number] = reply
        try:
            if not self.tell({"type": "request", "id": number, "method": method, "args": args}):
                raise RequestError("the operator's process has just gone away; try again", status=503)
            async with asyncio.timeout(timeout):
                return await reply
        except TimeoutError:
            raise RequestError(f"the operator's process hasn't answered for {timeout:g} s", status=503) from None
        finally:
            del self._requests[number]

    def replied(self, message: dict[str, Any]) -> None:
        """A reply that nobody waits for any more is dropped."""
        reply = self._requests.get(message.get("id", 0))
        if reply is None or reply.done():
            return
        if message.get("ok") is True:
            reply.set_result(message.get("value"))
        else:
            error = message.get("error")
            said = str(error.get("message", ""))[:MAX_ERROR] if isinstance(error, dict) else ""
            reply.set_exception(ConflictError(said or "the operator refused", status=409))

    def end(self) -> None:
        self.conn.abort()
        for reply in self._requests.values():
            if not reply.done():
                reply.set_exception(RequestError("the operator's process has gone away; try again", status=503))


class Guests(Protocol):
    """Who looks after processes of one kind that are no pods: those that call themselves `<kind>:<name>`, and have the
    key of `<kind>`.

    A process that connects again has a new channel; the old one is taken away first. Over a channel it is told and
    asked; its replies don't come by here.
    """

    def connected(self, name: str, hello: dict[str, Any], channel: Channel) -> None:
        """A process is there; `name` is without its kind, `hello` what it said in the handshake."""
        ...

    def said(self, name: str, message: dict[str, Any]) -> None:
        """What it says by itself. `ValueError` cuts it off."""
        ...

    def disconnected(self, name: str, channel: Channel) -> None:
        """It is gone."""
        ...


class PodPort:
    """Where pods dial in. `listen` first, `close` last."""

    def __init__(
        self,
        observer: Observer,
        key_of: Callable[[str], bytes],
        pod_of: Callable[[str], str | None],
        settings: Heartbeats,
        tail: History,
        pace: Pace,
        *,
        heard: Callable[[str], None] = lambda name: None,
    ) -> None:
        """`key_of`: the key of a process, by what it calls itself. `pod_of`: the pod that it is, if that is wanted; ""
        for one that waits, None for any other. `tail`: how much is kept per reader of outputs. `pace` is told how
        many pods are connected, and says how often they are to send heart-beats. `heard` is called with the name of
        each process that has said anything.
        """
        self._observer = observer
        self._key_of = key_of
        self._pod_of = pod_of
        self._settings = settings
        self._tail = tail
        self._pace = pace
        self._heard = heard
        self._listener: Listener | None = None
        self._channels: dict[str, Channel] = {}
        """By pod."""
        self._waiting: dict[str, Channel] = {}
        """By the name of the process, of those that are no pod yet."""
        self._guests: dict[str, Guests] = {}
        self._carriers: set[str] = set()
        """Kinds of guests over whose connections pods may come."""
        self._gathered = Gathered(functools.partial(self._serve, direct=False), "by way of an agent")
        self._visiting: dict[str, Channel] = {}
        """By the name of the process, kind included."""
        self._numbers = itertools.count(1)
        self._outputs: dict[str, Fanout[bytes]] = {}
        self._beats: list[tuple[Channel, bytes]] = []
        """Heart-beats that wait."""
        self._beats_bytes = 0
        self._beats_due: asyncio.TimerHandle | None = None

    async def listen(self, address: str) -> str:
        """Bind; the address that pods should dial. Raises `TransportError`."""
        self._listener = await registry.listen(address, self._serve)
        return self._listener.reachable

    def receive(self, kind: str, guests: Guests, *, carry: bool = False) -> None:
        """From now on processes that call themselves `<kind>:<name>` are let in, and handed on.

        With `carry`, pods may come over their connections.
        """
        self._guests[kind] = guests
        if carry:
            self._carriers.add(kind)

    def steer(self, way: Callable[[str, str], Way | None], now: float) -> None:
        """Have pods come by way of agents, once there are so many of them; see `Gathered.steer`."""
        if len(self._channels) >= self._settings.gather_from:
            self._gathered.steer(self._channels.values(), way, now)

    async def close(self) -> None:
        for outputs in self._outputs.values():
            outputs.close()
        await self._gathered.close()
        if self._listener is not None:
            await self._listener.close()
        self._take_beats()

    @property
    def waiting(self) -> Collection[str]:
        """Names of the processes that are connected and no pod yet."""
        return self._waiting.keys()

    @property
    def connections(self) -> Mapping[str, int]:
        """How many pods are connected "direct", and how many by way of an "agent"."""
        direct = sum(channel.direct for channel in self._channels.values())
        return {"direct": direct, "agent": len(self._channels) - direct}

    def direct(self) -> Sequence[Channel]:
        """Channels that don't come by way of agents: of pods, of processes that wait to be one, and of agents."""
        carriers = (c for name, c in self._visiting.items() if name.partition(":")[0] in self._carriers)
        return [c for c in (*self._channels.values(), *self._waiting.values(), *carriers) if c.direct]

    def seat(self, pod: str) -> None:
        """The runtime has given a pod to some process: if that is connected already, it is the pod's from now on."""
        for name, channel in self._waiting.items():
            if self._pod_of(name) == pod:
                del self._waiting[name]
                self._seated(channel, pod, assigned=False)
                return

    def name_of(self, pod: str) -> str:
        """What the process calls itself that is a pod; "" while it isn't connected."""
        channel = self._channels.get(pod)
        return channel.name if channel is not None else ""

    # What the loop says. Each returns whether it went on its way.

    def assign(self, pod: str, assignment: Assignment) -> bool:
        return self._tell(pod, {"type": "assign", **asdict(assignment)})

    def peers(self, pod: str, links: Sequence[LinkPeer], speed: float, role: str, called: Called = ()) -> bool:
        message = {"type": "peers", "links": list(links), "speed": speed, "role": role}
        return self._tell(pod, message | ({"called": called} if called else {}))

    def stop(self, pod: str, *, drain: bool, grace: float) -> bool:
        return self._tell(pod, {"type": "stop", "drain": drain, "grace": grace})

    def drop(self, pod: str) -> None:
        """End the connection of a pod whose process is gone."""
        if channel := self._channels.get(pod):
            channel.end()

    # What users ask

    async def ask(self, pod: str, method: str, *, timeout: float | None = None, **args: Any) -> Any:
        """Send a request and wait for its reply. Raises `ConflictError`, or `RequestError` with status 503."""
        channel = self._channels.get(pod)
        if channel is None:
            raise RequestError("the operator's process isn't connected right now; try again", status=503)
        return await channel.ask(method, args, timeout or self._settings.request_timeout)

    def tail(self, operator: str) -> AsyncIterator[TailItem]:
        """Outputs of an operator (`pipeline.name`) from now on, over restarts of its pods, until `end_tails`."""
        outputs = self._outputs.setdefault(operator, Fanout())
        subscription = outputs.subscribe(self._tail.tail_queue, size=len, most=self._tail.tail_bytes)
        if len(outputs) == 1:
            self._tap(operator, on=True)
        return self._read(operator, outputs, subscription)

    def end_tails(self, operator: str) -> None:
        """No more outputs will come."""
        outputs = self._outputs.pop(operator, None)
        if outputs is not None:
            outputs.close()

    # Inside

    async def _read(
        self, operator: str, outputs: Fanout[bytes], subscription: Subscription[bytes]
    ) -> AsyncIterator[TailItem]:
        try:
            async for data in subscription:
                yield TailItem(data, subscription.skipped)
        finally:
            outputs.unsubscribe(subscription)
            self._untap_if_unread(operator)

    async def _serve(self, conn: Connection, *, direct: bool = True) -> None:
        try:
            name, hello, frames = await shake_listener(
                conn, self._key_for, lambda identity, hello: {}, self._settings.handshake_timeout
            )
        except DeliveryError as exc:
            log.warning("a process was turned away: %s", exc)
            return
        channel = Channel(next(self._numbers), name, conn, direct=direct)
        if not self._admit(channel, hello):
            return  # it was given up while it proved itself
        try:
            while True:
                self._heard(name)
                for frame in frames:
                    if carries(frame):
                        self._carried(channel, frame)
                    else:
                        self._hear(channel, bytes(frame[0]))
                frames = await conn.recv()
        except (ValueError, TypeError) as exc:
            _cut_off(channel, exc)
        finally:
            self._take_beats()
            channel.end()
            self._gathered.ended(conn)
            self._dismiss(channel)

    def _carried(self, channel: Channel, frame: Frame) -> None:
        kind = channel.name.partition(":")[0]
        if not channel.direct or channel.name not in self._visiting or kind not in self._carriers:
            raise ValueError("it isn't one that pods come by")
        self._gathered.received(channel.conn, frame)

    def _key_for(self, name: str) -> bytes | None:
        if self._guests_of(name) is not None:
            return self._key_of(name.partition(":")[0])
        return None if self._pod_of(name) is None else self._key_of(name)

    def _guests_of(self, name: str) -> Guests | None:
        kind, colon, _ = name.partition(":")
        return self._guests.get(kind) if colon else None

    def _admit(self, channel: Channel, hello: dict[str, Any]) -> bool:
        """Let a process in that has proved who it is; False when nobody wants it any more."""
        self._take_beats()
        name, assigned = channel.name, hello.get("assigned") is True
        if (guests := self._guests_of(name)) is not None:
            if before := self._visiting.get(name):
                before.end()
                self._dismiss(before)
            self._visiting[name] = channel
            guests.connected(name.partition(":")[2], hello, channel)
            return True
        pod = self._pod_of(name)
        if pod:
            self._seated(channel, pod, assigned=assigned)
        elif pod is not None and not assigned:
            if before := self._waiting.get(name):
                before.end()
            self._waiting[name] = channel
        else:
            return False
        return True

    def _seated(self, channel: Channel, pod: str, *, assigned: bool) -> None:
        channel.pod = pod
        if before := self._channels.get(pod):
            before.end()
        self._channels[pod] = channel
        self._keep_pace(channel)
        self._observer.connected(pod, channel.number, assigned=assigned)

    def _dismiss(self, channel: Channel) -> None:
        """A connection is over."""
        for channels, key in (
            (self._channels, channel.pod),
            (self._waiting, channel.name),
            (self._visiting, channel.name),
        ):
            if channels.get(key) is channel:
                del channels[key]
                if channels is self._visiting and (guests := self._guests_of(channel.name)) is not None:
                    guests.disconnected(channel.name.partition(":")[2], channel)
        self._keep_pace()
        if channel.pod:
            self._observer.disconnected(channel.pod, channel.number)

    def _keep_pace(self, new: Channel | None = None) -> None:
        """The number of pods may have changed, by a `new` one perhaps: those that beat at another pace are told."""
        told: Iterable[Channel] = (new,) if new is not None and self._pace.seconds != control.HEARTBEAT else ()
        if self._pace.count(len(self._channels)):
            told = self._channels.values()
        for channel in told:
            channel.tell({"type": "pace", "seconds": self._pace.seconds})

    def _hear(self, channel: Channel, data: bytes) -> None:
        """Raises `ValueError` and `TypeError` when it isn't valid."""
        if self._pace.seconds == control.HEARTBEAT or not data.startswith(control.HEARTBEAT_HEAD):
            self._take_beats()
            self._receive(channel, control.unpack(data))
            return
        self._beats.append((channel, data))
        self._beats_bytes += len(data)
        if self._beats_bytes > GATHERED_BYTES:
            self._take_beats()
        elif self._beats_due is None:
            self._beats_due = asyncio.get_running_loop().call_later(GATHER, self._take_beats)

    def _take_beats(self) -> None:
        """Hear the heart-beats that wait."""
        if self._beats_due is not None:
            self._beats_due.cancel()
            self._beats_due = None
        beats, self._beats, self._beats_bytes = self._beats, [], 0
        for channel, data in beats:
            try:
                self._receive(channel, control.unpack(data))
            except (ValueError, TypeError) as exc:
                _cut_off(channel, exc)
                channel.end()
            except Exception:  # a mistake of ours with one pod must not silence the others
                log.exception("what %s said can't be taken in", channel.pod)
                channel.end()

    def _receive(self, channel: Channel, message: dict[str, Any]) -> None:
        pod, operator = channel.pod, channel.pod.rpartition("-e")[0]
        match message["type"]:
            case "reply":
                channel.replied(message)
            case _ if channel.name in self._visiting:
                self._guests[channel.name.partition(":")[0]].said(channel.name.partition(":")[2], message)
            case "leaving" if not pod:
                pass  # there is nothing that it would leave behind
            case _ if not pod:
                raise ValueError("it says what only a pod says, and isn't one")
            case "outputs":
                self._publish(operator, message)
            case "ready":
                self._observer.said(pod, operator, message)
                if len(self._outputs.get(operator, ())):
                    self._tap(operator, on=True)
            case _:
                self._observer.said(pod, operator, message)

    def _publish(self, operator: str, message: dict[str, Any]) -> None:
        items, skipped = message.get("items"), message.get("skipped")
        if not isinstance(items, list) or not all(isinstance(item, bytes) for item in items):
            raise ValueError("outputs without items")
        if not isinstance(skipped, int):
            raise ValueError("outputs without the number of skipped ones")
        outputs = self._outputs.get(operator)
        if outputs is not None:
            for item in items:
                outputs.publish(item)
            outputs.skip(skipped)
        self._untap_if_unread(operator)

    def _untap_if_unread(self, operator: str) -> None:
        if not len(self._outputs.get(operator, ())):
            self._outputs.pop(operator, None)
            self._tap(operator, on=False)

    def _tap(self, operator: str, *, on: bool) -> None:
        """Ask the operator's pods for their outputs, or not to. The reply says nothing, so nobody waits for it."""
        for pod, channel in self._channels.items():
            if pod.rpartition("-e")[0] == operator:
                channel.tell({"type": "request", "id": 0, "method": "tap", "args": {"on": on}})

    def _tell(self, pod: str, message: dict[str, Any]) -> bool:
        channel = self._channels.get(pod)
        return channel is not None and channel.tell(message)


def _cut_off(channel: Channel, exc: Exception) -> None:
    log.warning("%s is cut off, it said something that isn't valid: %s", channel.pod or channel.name, exc)
