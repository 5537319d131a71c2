"""What can be changed by hand of a cluster that is emulated: its links, how fast its nodes are, and which are lost.

Made by `assembly` where there is a topology, used by `app.Master`. A change takes effect at once, and is in the store
once it was made: an edited topology undoes all of them. What follows from it is noticed and measured as on any cluster.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from nomad.control import Shape
from nomad.errors import InvalidRequestError
from nomad.master.state import Desired
from nomad.master.store import Store
from nomad.runtime.base import Emulated, Runtime
from nomad.topology import Topology

OVERRIDES = "overrides"
"""In the store: what was changed."""


class Emulation:
    """Every change raises `StateError` when it can't be kept; then it wasn't made."""

    def __init__(
        self, topology: Topology, desired: Desired, runtime: Runtime, store: Store, changed: Callable[[], None]
    ) -> None:
        """`changed` is called after a change."""
        self._topology = topology
        self._desired = desired
        self._runtime = runtime
        self._store = store
        self._changed = changed

    def restore(self, kept: bytes | None, *, shaped: bool) -> None:
        """Declared links, nodes that are lost, and the changes that were made to them; a topology that was edited since
        counts as it is. Unless `shaped`, the links are as the network makes them.
        """
        desired = self._desired
        content = json.loads(kept) if kept is not None else {}
        if content.get("topology") != _digest(self._topology):
            content = {}
        if shaped:
            desired.shapes = {(link.source, link.target): link.shape for link in self._topology.links}
            desired.shapes |= {(source, target): Shape(**shape) for source, target, shape in content.get("shapes", ())}
        desired.speeds = dict(content.get("speeds", {}))
        desired.lost = set(content.get("lost", ()))

    async def set_link(
        self,
        source: str,
        target: str,
        *,
        latency: float | None,
        jitter: float | None,
        bandwidth: float | None,
        loss: float | None,
        unlimited: bool,
    ) -> None:
        """Of two nodes that are known. None leaves a field as it is. Raises `InvalidRequestError`."""
        if source == target:
            raise InvalidRequestError("a link leads from one node to another; inside a node there is none", status=422)
        shapes = self._desired.shapes
        given = {"latency": latency, "jitter": jitter, "bandwidth": bandwidth, "loss": loss}
        shape = replace(self._desired.shape(source, target), **{k: v for k, v in given.items() if v is not None})
        if unlimited:
            shape.bandwidth = None
        _check_shape(shape)
        before = shapes.get((source, target))
        shapes[source, target] = shape
        await self._keep(lambda: _put_back(shapes, (source, target), before))

    async def set_speed(self, node: str, speed: float) -> None:
        """Of a node that is known. Raises `InvalidRequestError`."""
        if not 0 < speed < float("inf"):
            raise InvalidRequestError(f"speed must be a number above 0, not {speed:g}", status=422)
        speeds = self._desired.speeds
        before = speeds.get(node)
        speeds[node] = speed
        await self._keep(lambda: _put_back(speeds, node, before))

    async def set_lost(self, node: str, *, lost: bool) -> None:
        """Have a node that is known fail, or come back."""
        desired, runtime = self._desired, self._runtime
        assert isinstance(runtime, Emulated)
        before, desired.lost = desired.lost, desired.lost | {node} if lost else desired.lost - {node}
        await self._keep(lambda: setattr(desired, "lost", before))
        (runtime.lose_node if lost else runtime.restore_node)(node)

    @property
    def loses_nodes(self) -> bool:
        """Whether `set_lost` can be called."""
        return isinstance(self._runtime, Emulated)

    async def _keep(self, undo: Callable[[], None]) -> None:
        try:
            await self._store.set_meta(OVERRIDES, self._overrides())
        except BaseException:
            undo()
            raise
        self._changed()

    def _overrides(self) -> bytes:
        """What was changed of the topology while it ran."""
        desired = self._desired
        declared = {(link.source, link.target): link.shape for link in self._topology.links}
        content = {
            "topology": _digest(self._topology),
            "shapes": [[*pair, asdict(shape)] for pair, shape in desired.shapes.items() if declared.get(pair) != shape],
            "speeds": desired.speeds,
            "lost": sorted(desired.lost),
        }
        return json.dumps(content).encode()


def _digest(topology: Topology) -> str:
    text = repr(([(node.id, node.speed) for node in topology.nodes], topology.links))
    return hashlib.sha256(text.encode()).hexdigest()


def _check_shape(shape: Shape) -> None:
    """Raises `InvalidRequestError` that says what isn't possible."""
    if not 0 <= shape.latency < float("inf"):
        problem = f"latency can't be {shape.latency:g} s"
    elif not 0 <= shape.jitter <= shape.latency:
        problem = f"jitter ({shape.jitter:g} s) must be between 0 and the latency ({shape.latency:g} s); set both"
    elif shape.bandwidth is not None and not 0 < shape.bandwidth < float("inf"):
        problem = f"bandwidth can't be {shape.bandwidth:g} bytes per second"
    elif not 0 <= shape.loss < 1:
        problem = f"loss must be from 0 to below 1, not {shape.loss:g}"
    else:
        return
    raise InvalidRequestError(problem, status=422)


def _put_back(values: dict[Any, Any], key: Any, before: Any) -> None:
    if before is None:
        values.pop(key, None)
    else:
        values[key] = before
