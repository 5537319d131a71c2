"""How much of a costly test the quick suite runs: a few of its cases, the extreme ones; the slow tests are the rest."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def rest_slow(cases: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """All cases, for `parametrize`; those that aren't among `quick` are for the slow tests."""
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]
