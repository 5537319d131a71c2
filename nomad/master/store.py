"""What a master remembers over restarts: the records, and what every store of them offers.

Called by the facade (what users want) and the loop (what was asked for). `sqlite.SqliteStore` keeps them in a folder of
this machine, `kube.store.KubernetesStore` in the cluster itself. Writes to one pipeline take effect in the order of the
calls, and are kept for good once the call has returned. Every failure is a `StateError`. No store decides anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Protocol

from nomad.control import PodStats
from nomad.master.state import DesiredPipeline, Goal, Outcome
from nomad.master.views import EventView, FailureView, MoveView, PlacementView
from nomad.pipeline import PipelineSpec


@dataclass(slots=True)
class StoredOperator:
    """What is kept of an operator."""

    name: str
    epoch: int
    pod: str | None
    last_pod: str
    restarts: int
    totals: PodStats = field(default_factory=PodStats)
    failure: FailureView | None = None
    highest: int = 0
    """The highest epoch that was given to one of its pods."""


@dataclass(slots=True)
class StoredPipeline:
    """What is kept of a pipeline."""

    wanted: DesiredPipeline
    outcome: Outcome | None
    reason: str
    operators: list[StoredOperator]
    moves: list[MoveView] = field(default_factory=list)
    """Oldest first."""


class Store(Protocol):
    """Where one master keeps what it must not forget; no two masters use the same at a time."""

    async def close(self) -> None:
        """Finish what was asked for and let it go."""
        ...

    async def secret(self, name: str, make: Callable[[], str]) -> str:
        """A secret of the master's, as text; made when it isn't there yet."""
        ...

    def where(self, name: str) -> str:
        """In words, where that secret is kept."""
        ...

    async def meta(self) -> dict[str, bytes]:
        """The small facts by name; nothing secret."""
        ...

    async def set_meta(self, key: str, value: bytes) -> None: ...

    async def bundle(self, digest: str) -> bytes:
        """The bundle's bytes. Raises `StateError` when it isn't there."""
        ...

    async def pipelines(self) -> list[StoredPipeline]:
        """All of them that can be read, oldest first."""
        ...

    @property
    def unread(self) -> AbstractSet[str]:
        """Ids of those that couldn't be read, once all have been, as long as they are there. It follows by itself."""
        ...

    async def add_pipeline(self, wanted: DesiredPipeline, bundle: bytes) -> None:
        """A new pipeline and its bundle, both or neither."""
        ...

    async def set_goal(self, pipeline: str, goal: Goal) -> None: ...

    async def set_spec(self, spec: PipelineSpec) -> None: ...

    async def set_placing(self, pipeline: str, *, moves: bool, pins: dict[str, str]) -> None:
        """What Nomad may do with the pipeline's operators by itself."""
        ...

    async def set_placement(self, pipeline: str, placement: dict[str, PlacementView]) -> None:
        """Where the next pods go."""
        ...

    async def set_outcome(self, pipeline: str, outcome: Outcome, reason: str) -> None: ...

    async def save_operator(self, pipeline: str, operator: StoredOperator) -> None:
        """Write or replace; without effect when the pipeline has been removed."""
        ...

    async def save_switch(
        self, pipeline: str, operator: StoredOperator, placement: dict[str, PlacementView], move: MoveView
    ) -> None:
        """A move's point of no return, all or nothing: another pod, on another node, is the present one."""
        ...

    async def save_moves(self, moves: Sequence[MoveView], keep: int) -> None:
        """Write or replace; of each pipeline all but the last `keep` are dropped."""
        ...

    async def order_move(self, move: MoveView, keep: int) -> None:
        """As `save_moves`, for a new one that a user waits for; when it fails, nothing of it is left over."""
        ...

    async def remove_pipeline(self, pipeline: str, epoch_floor: int) -> None:
        """Delete a pipeline, and its bundle once no other has it; remember which epochs were used."""
        ...

    async def events(self, limit: int) -> list[EventView]:
        """The last `limit`, oldest first; fewer where fewer are kept."""
        ...

    @property
    def event_gap(self) -> int:
        """How many more events may have been numbered, and told, than were kept when the last master ended."""
        ...

    async def add_events(self, events: Sequence[EventView], keep: int) -> None:
        """Append, and drop all but the last `keep`."""
        ...
