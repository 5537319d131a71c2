"""Nomad: asyncio actors that run a pipeline over edge, fog and cloud.

The public names. They are looked up on first use, so that `import nomad` costs next to nothing and
a pod, which needs few of them, stays small.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nomad.client import Cluster, Outputs, PipelineHandle, connect, submit
    from nomad.compat import (
        get_last_output,
        get_network_profiling,
        get_node_profiling,
        get_nodes,
        get_pipeline_profiling,
        submit_pipeline,
        update_network_profiling,
        update_node_profiling,
        update_pipeline_profiling,
    )
    from nomad.delivery.codec import register
    from nomad.errors import MasterUnreachable, NomadError, RequestError, UsageError
    from nomad.pipeline import operator, source

__version__ = "0.1.0"

__all__ = [
    "Cluster",
    "MasterUnreachable",
    "NomadError",
    "Outputs",
    "PipelineHandle",
    "RequestError",
    "UsageError",
    "__version__",
    "connect",
    "get_last_output",
    "get_network_profiling",
    "get_node_profiling",
    "get_nodes",
    "get_pipeline_profiling",
    "operator",
    "register",
    "source",
    "submit",
    "submit_pipeline",
    "update_network_profiling",
    "update_node_profiling",
    "update_pipeline_profiling",
]

_HOME = {
    "nomad.client": ("Cluster", "Outputs", "PipelineHandle", "connect", "submit"),
    "nomad.compat": tuple(name for name in __all__ if name.startswith(("get_", "update_", "submit_"))),
    "nomad.delivery.codec": ("register",),
    "nomad.errors": ("MasterUnreachable", "NomadError", "RequestError", "UsageError"),
    "nomad.pipeline": ("operator", "source"),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'nomad' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
