"""A batch weighs no more than its values here, so that windows of a few bytes show the arithmetic of credits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nomad.delivery import frames


@pytest.fixture(autouse=True, scope="module")
def no_overhead() -> Iterator[None]:
    real, frames.BATCH_OVERHEAD = frames.BATCH_OVERHEAD, 0
    yield
    frames.BATCH_OVERHEAD = real
