"""Loaded by schemathesis, in its own process: bodies that a schema can't describe."""

import schemathesis
from hypothesis import strategies as st

from nomad import bundle
from nomad.pipeline import build
from tests.master.facade import SIGNING_KEY


def numbers() -> int:
    return 4


def square(x: int) -> int:
    return x * x


BUNDLE = st.just(bundle.make(build([numbers, square]), SIGNING_KEY))
schemathesis.openapi.media_type(bundle.MEDIA_TYPE, BUNDLE)
schemathesis.openapi.media_type("application/octet-stream", BUNDLE)
