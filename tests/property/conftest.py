"""Windows of a few bytes show the arithmetic of credits: a batch weighs no more than its values, grants are large."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nomad.delivery import frames, receiver


@pytest.fixture(autouse=True, scope="module")
def no_overhead() -> Iterator[None]:
    overhead, frames.BATCH_OVERHEAD = frames.BATCH_OVERHEAD, 0
    share, receiver.GRANT_SHARE = receiver.GRANT_SHARE, 3
    yield
    frames.BATCH_OVERHEAD, receiver.GRANT_SHARE = overhead, share
