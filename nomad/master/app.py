"""`Master`: what the REST handlers and the embedding program call.

`async with Master(settings, topology) as master` opens the state folder, finds the pipelines of an
earlier master again, adopts their pods and keeps things as they should be until the block ends.
Reads answer from memory and are synchronous; calls that write return once what they wrote is stored
(pods follow by themselves). Every error is one of `nomad.errors`, and after it nothing is half-started.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any, Self

from nomad.master.views import (
    EventView,
    LinkView,
    LogLine,
    NodeView,
    PipelineView,
    SetAsideView,
    TailItem,
)
from nomad.settings import Settings
from nomad.topology import Topology


class Master:
    """The whole master; one per state folder."""

    def __init__(self, settings: Settings, topology: Topology) -> None: ...

    async def __aenter__(self) -> Self:
        """Raises `StateError` (folder in use, not writable, newer version) and `TopologyError`."""
        raise NotImplementedError

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None: ...

    @property
    def ready(self) -> bool:
        """Whether the state is loaded, the control listener is bound and the loop runs."""
        raise NotImplementedError

    @property
    def token(self) -> str:
        """What REST callers must present; kept in the state folder with mode 0600."""
        raise NotImplementedError

    @property
    def signing_key(self) -> bytes:
        """The Ed25519 seed that bundles for this master are signed with."""
        raise NotImplementedError

    def metrics(self) -> bytes:
        """Prometheus text."""
        raise NotImplementedError

    # nodes and links
    def nodes(self) -> list[NodeView]:
        raise NotImplementedError

    def node(self, node: str) -> NodeView:
        raise NotImplementedError

    def links(self) -> list[LinkView]:
        raise NotImplementedError

    async def set_link(
        self,
        source: str,
        target: str,
        *,
        latency: float | None = None,
        jitter: float | None = None,
        bandwidth: float | None = None,
        loss: float | None = None,
        unlimited: bool = False,
    ) -> LinkView:
        """None leaves a field as it is; `unlimited` takes the bandwidth limit away. Seconds, bytes per second."""
        raise NotImplementedError

    async def update_node(self, node: str, *, speed: float) -> NodeView:
        raise NotImplementedError

    # pipelines
    async def submit(
        self, data: bytes, *, id: str | None = None, start: str, end: str, profile: Sequence[dict[str, float]] = ()
    ) -> PipelineView:
        raise NotImplementedError

    def pipelines(self) -> list[PipelineView]:
        raise NotImplementedError

    def pipeline(self, id: str) -> PipelineView:
        raise NotImplementedError

    async def stop(self, id: str) -> PipelineView:
        raise NotImplementedError

    async def remove(self, id: str) -> None:
        raise NotImplementedError

    async def update_profile(self, id: str, profile: Sequence[dict[str, float]]) -> PipelineView:
        raise NotImplementedError

    # what happened
    def events(self, pipeline: str | None = None, after: int = 0, limit: int = 1000) -> list[EventView]:
        """Oldest first, ids above `after`; the newest `limit` of them."""
        raise NotImplementedError

    def subscribe_events(self) -> AsyncIterator[EventView]:
        """Events from now on, until the master closes."""
        raise NotImplementedError

    async def logs(self, id: str, operator: str | None = None, tail: int | None = None) -> list[LogLine]:
        raise NotImplementedError

    def follow_logs(self, id: str, operator: str | None = None) -> AsyncIterator[LogLine]:
        """Lines from now on, across restarts, until the pipeline is over."""
        raise NotImplementedError

    # operators
    async def set_aside(self, id: str, operator: str) -> list[SetAsideView]:
        raise NotImplementedError

    async def rerun(self, id: str, operator: str, ids: Sequence[str] | None = None) -> dict[str, Any]:
        """{"ran": n, "failed": n}; None runs all of them."""
        raise NotImplementedError

    async def drop(self, id: str, operator: str, ids: Sequence[str] | None = None) -> dict[str, Any]:
        """{"dropped": n}."""
        raise NotImplementedError

    def last_output(self, id: str, operator: str) -> bytes | None:
        """Encoded by the codec; the last that a heart-beat brought, or that a pod left behind."""
        raise NotImplementedError

    def tail(self, id: str, operator: str) -> AsyncIterator[TailItem]:
        """Live outputs from now on, until the pipeline is over. Drops the oldest when the reader is slow."""
        raise NotImplementedError
