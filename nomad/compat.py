"""The synchronous calls of Nomad's first version, over `nomad.client`.

They work from a plain script and from a running event loop (where each call holds that loop up: use
`nomad.connect` there). The master's address is the last argument, as `connection_str` or
`master_conn_str`; without it, it is found as by `nomad.connect`. An operator's id is
`pipeline.name`. They raise what `nomad.client` raises.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from nomad import program
from nomad.errors import NomadError, NotFoundError, UsageError

if TYPE_CHECKING:
    from nomad.client import Cluster, PipelineHandle

T = TypeVar("T")


def submit_pipeline(
    fn_list: Sequence[Callable[..., Any]],
    start_node: str,
    end_node: str,
    pipeline_id: str,
    connection_str: str | None = None,
    profile: Sequence[Mapping[str, float]] | None = None,
    *,
    master_conn_str: str | None = None,
) -> list[str]:
    """Run a pipeline of functions; the first is placed on `start_node`, the last on `end_node`.

    `profile` says per function what is expected of it, in order: `{"cloud_execution_time": seconds on the reference
    machine, "output_msg_size": bytes}`. Returns the ids of the operators in order, once the master has accepted them.
    While `nomad submit FILE` loads the file that makes this call, it only notes the arguments and returns [].
    """
    if program.being_loaded():
        program.note(program.Submission(fn_list, start_node, end_node, pipeline_id, profile))
        return []

    async def call(cluster: Cluster) -> list[str]:
        made = await cluster.submit(fn_list, start=start_node, end=end_node, id=pipeline_id, profile=profile)
        return made.operator_ids

    return _run(call, connection_str, master_conn_str)


def get_nodes(connection_str: str | None = None, *, master_conn_str: str | None = None) -> list[str]:
    """The names of the cluster's nodes."""

    async def call(cluster: Cluster) -> list[str]:
        return [node.id for node in await cluster.nodes()]

    return _run(call, connection_str, master_conn_str)


def get_last_output(operator_id: str, connection_str: str | None = None, *, master_conn_str: str | None = None) -> Any:
    """The last value that an operator returned; None before the first, and when it is larger than 64 KiB."""
    if not isinstance(operator_id, str) or "." not in operator_id:
        raise UsageError(f"an operator's id looks like pipeline.name, not {operator_id!r}")
    pipeline, _, name = operator_id.partition(".")

    async def call(cluster: Cluster) -> Any:
        return await (await cluster.pipeline(pipeline)).last_output(name)

    return _run(call, connection_str, master_conn_str)


def get_node_profiling(
    connection_str: str | None = None, *, master_conn_str: str | None = None
) -> dict[str, dict[str, Any]]:
    """Per node its speed, `C` (1.0 is a core of the reference machine), and its `architecture`."""

    async def call(cluster: Cluster) -> dict[str, dict[str, Any]]:
        return {node.id: {"C": node.speed, "architecture": node.arch} for node in await cluster.nodes()}

    return _run(call, connection_str, master_conn_str)


def update_node_profiling(
    new_node_profile: Mapping[str, Mapping[str, Any]],
    connection_str: str | None = None,
    *,
    master_conn_str: str | None = None,
) -> None:
    """Set the speed `C` of each node that is named; what else stands there is what the node says of itself."""
    for node, entry in new_node_profile.items():
        if "C" not in entry:
            raise UsageError(f"the profile of node {node!r} lacks its speed, 'C'")

    async def call(cluster: Cluster) -> None:
        _all_known(new_node_profile, {node.id for node in await cluster.nodes()}, "node")
        for node, entry in new_node_profile.items():
            await cluster.set_node(node, speed=entry["C"])

    _run(call, connection_str, master_conn_str)


def get_network_profiling(
    connection_str: str | None = None, *, master_conn_str: str | None = None
) -> list[dict[str, Any]]:
    """The directed links: `from`, `to`, `latency` (seconds), `bandwidth` (bytes per second; None is unlimited)."""

    async def call(cluster: Cluster) -> list[dict[str, Any]]:
        return [
            {"from": link.source, "to": link.target, "latency": link.latency, "bandwidth": link.bandwidth}
            for link in await cluster.links()
        ]

    return _run(call, connection_str, master_conn_str)


def update_network_profiling(
    new_network_profile: Sequence[Mapping[str, Any]],
    connection_str: str | None = None,
    *,
    master_conn_str: str | None = None,
) -> None:
    """Set latency and bandwidth of the links that are named, in the form of `get_network_profiling`."""
    for entry in new_network_profile:
        if not {"from", "to"} <= entry.keys():
            raise UsageError(f"a link is named by 'from' and 'to'; {dict(entry)!r} lacks one")

    async def call(cluster: Cluster) -> None:
        named = [(entry["from"], entry["to"]) for entry in new_network_profile]
        _all_known(named, {(link.source, link.target) for link in await cluster.links()}, "link")
        for entry in new_network_profile:
            bandwidth = entry.get("bandwidth", _LEFT) or "unlimited"
            await cluster.set_link(
                entry["from"],
                entry["to"],
                latency=entry.get("latency"),
                bandwidth=None if bandwidth is _LEFT else bandwidth,
            )

    _run(call, connection_str, master_conn_str)


def get_pipeline_profiling(
    pipeline_id: str, connection_str: str | None = None, *, master_conn_str: str | None = None
) -> dict[str, dict[str, float]]:
    """Per operator id what is expected of it: `cloud_execution_time` (seconds), `output_msg_size` (bytes)."""

    async def call(cluster: Cluster) -> dict[str, dict[str, float]]:
        return await _profile(await cluster.pipeline(pipeline_id))

    return _run(call, connection_str, master_conn_str)


def update_pipeline_profiling(
    pipeline_id: str,
    pipeline_profiling: Mapping[str, Mapping[str, float]],
    connection_str: str | None = None,
    *,
    master_conn_str: str | None = None,
) -> None:
    """Say what is expected of operators, in the form of `get_pipeline_profiling`; those not named stay as they are."""

    async def call(cluster: Cluster) -> None:
        handle = await cluster.pipeline(pipeline_id)
        known = await _profile(handle)
        _all_known(pipeline_profiling, known.keys(), "operator")
        merged = {name: {**entry, **pipeline_profiling.get(name, {})} for name, entry in known.items()}
        await handle.set_profile(list(merged.values()))

    _run(call, connection_str, master_conn_str)


_LEFT = object()
"""Not given, as distinct from None."""


async def _profile(handle: PipelineHandle) -> dict[str, dict[str, float]]:
    entries = await handle.profile() or [{} for _ in handle.operators]
    return dict(zip(handle.operator_ids, entries, strict=True))


def _all_known(given: Any, known: Any, what: str) -> None:
    """Refuse all of a change when a part of it is for something that isn't there: nothing is done by halves."""
    if unknown := [item for item in given if item not in known]:
        raise NotFoundError(
            f"there is no {what} {unknown[0]!r}; known are {', '.join(map(repr, sorted(known)))}", status=404
        )


def _run(
    call: Callable[[Cluster], Coroutine[Any, Any, T]], connection_str: str | None, master_conn_str: str | None
) -> T:
    """`call` with a connection, run to its end; in a thread with a loop of its own where one runs here already."""
    if connection_str is not None and master_conn_str is not None and connection_str != master_conn_str:
        raise UsageError("connection_str and master_conn_str are two names for one thing: give one of them")
    from nomad.client import connect  # aiohttp takes a quarter of a second to import

    async def connected() -> T:
        async with connect(connection_str if connection_str is not None else master_conn_str) as cluster:
            return await call(cluster)

    try:
        if not _loop_runs():
            return asyncio.run(connected())
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="nomad-call") as thread:
            return thread.submit(asyncio.run, connected()).result()
    except NomadError as exc:
        # Scripts end with it: its message says all, and a page of frames of asyncio and aiohttp would bury it.
        raise exc.with_traceback(None) from None


def _loop_runs() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
