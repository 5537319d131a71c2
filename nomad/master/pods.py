"""The master's end of the control channels: pods dial in, prove themselves, and are heard, told and asked.

One channel per pod; a new connection of the same pod replaces the old one. What pods say of themselves
goes to the `Observer`; replies go to whoever asked, live outputs to whoever tails. Knows nothing of what
is wanted: the loop decides what is said, and is told by the observer when a connection comes or goes.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict
from typing import Any

from nomad import control
from nomad.control import Assignment, LinkPeer
from nomad.delivery.driver import shake_listener
from nomad.errors import ConflictError, DeliveryError, RequestError, TransportError
from nomad.fanout import Fanout, Subscription
from nomad.master.observe import Observer
from nomad.master.views import TailItem
from nomad.settings import Heartbeats, History
from nomad.transport import registry
from nomad.transport.base import Connection, Listener

log = logging.getLogger(__name__)

MAX_ERROR = 2_000
"""Characters of a pod's refusal that are passed on."""


class _Channel:
    """One connection of one pod."""

    def __init__(self, number: int, conn: Connection) -> None:
        self.number = number
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


class PodPort:
    """Where pods dial in. `listen` first, `close` last."""

    def __init__(
        self, observer: Observer, key_for: Callable[[str], bytes | None], settings: Heartbeats, tail: History
    ) -> None:
        """`key_for`: the key of a wanted pod, None for any other. `tail`: how much is kept per reader of outputs."""
        self._observer = observer
        self._key_for = key_for
        self._settings = settings
        self._tail = tail
        self._listener: Listener | None = None
        self._channels: dict[str, _Channel] = {}
        self._numbers = itertools.count(1)
        self._outputs: dict[str, Fanout[bytes]] = {}

    async def listen(self, address: str) -> str:
        """Bind; the address that pods should dial. Raises `TransportError`."""
        self._listener = await registry.listen(address, self._serve)
        return self._listener.reachable

    async def close(self) -> None:
        for outputs in self._outputs.values():
            outputs.close()
        if self._listener is not None:
            await self._listener.close()

    # What the loop says. Each returns whether it went on its way.

    def assign(self, pod: str, assignment: Assignment) -> bool:
        return self._tell(pod, {"type": "assign", **asdict(assignment)})

    def peers(self, pod: str, links: Sequence[LinkPeer], speed: float, role: str) -> bool:
        return self._tell(pod, {"type": "peers", "links": list(links), "speed": speed, "role": role})

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

    async def _serve(self, conn: Connection) -> None:
        try:
            pod, hello, frames = await shake_listener(
                conn, self._key_for, lambda identity, hello: {}, self._settings.handshake_timeout
            )
        except DeliveryError as exc:
            log.warning("a pod was turned away: %s", exc)
            return
        if self._key_for(pod) is None:
            return  # it was given up while it proved itself
        operator = pod.rpartition("-e")[0]
        channel = _Channel(next(self._numbers), conn)
        if before := self._channels.get(pod):
            before.end()
        self._channels[pod] = channel
        self._observer.connected(pod, channel.number, assigned=hello.get("assigned") is True)
        try:
            while True:
                for frame in frames:
                    self._receive(channel, pod, operator, control.unpack(bytes(frame[0])))
                frames = await conn.recv()
        except (ValueError, TypeError) as exc:
            log.warning("pod %s is cut off, it said something that isn't valid: %s", pod, exc)
        finally:
            channel.end()
            if self._channels.get(pod) is channel:
                del self._channels[pod]
            self._observer.disconnected(pod, channel.number)

    def _receive(self, channel: _Channel, pod: str, operator: str, message: dict[str, Any]) -> None:
        match message["type"]:
            case "outputs":
                self._publish(operator, message)
            case "reply":
                channel.replied(message)
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
