"""Decides where operators live. Pure functions over an immutable snapshot: no clock, no I/O, no hidden random.

`plan` is the engine: a problem in its JSON form in, the answer in its JSON form out (docs/placement.md). `drift`
decides when an operator should move. NumPy is imported with the first plan, and SciPy with the first over `shortest`
routes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nomad.errors import PlacementError

__all__ = ["needs_libraries", "plan"]


def plan(problem: Any) -> dict[str, Any]:
    """Where each operator should be, why there and not elsewhere; or which constraint can't be met.

    The same problem gets the same answer, in whatever order its parts are given. Raises `PlacementError` that names
    what isn't valid, and where NumPy or SciPy is missing.
    """
    with needs_libraries():
        from nomad.scheduler import planner

        return planner.plan(problem)


@contextmanager
def needs_libraries() -> Iterator[None]:
    """Say plainly what to install where NumPy or SciPy is missing."""
    try:
        yield
    except ModuleNotFoundError as exc:
        match (exc.name or "").partition(".")[0]:
            case "numpy":
                raise PlacementError("placing operators needs numpy: pip install numpy") from exc
            case "scipy":
                raise PlacementError("'shortest' routes need scipy: pip install '.[scheduler]'") from exc
        raise
