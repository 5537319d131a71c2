"""Operator code on its way: packed and signed where the user is, verified where it runs.

A bundle is one msgpack map:

    {"nomad": 1,                      the version of this envelope
     "manifest": <JSON bytes>,        what is in it and what it needs; the hash of every pickle
     "signature": <64 bytes>,         Ed25519 over the manifest's bytes
     "code": {operator: <pickle>},    (function, {name: module}), see `make`
     "types": <pickle>}               {name: class or codec} that messages may carry

`make` is called by clients, `read` and `check_environment` by the master, `verified_spec` and `load_operator` by pods.
Only `load_operator` ever unpickles, and only what it has verified. Bundles aren't encrypted.
"""

from nomad.bundle.environment import check_environment
from nomad.bundle.load import LoadedOperator, load_operator, verified_spec
from nomad.bundle.make import make, sign_again
from nomad.bundle.read import MAX_BUNDLE, MEDIA_TYPE, Bundle, read
from nomad.bundle.signing import new_signing_key, public_key

__all__ = [
    "MAX_BUNDLE",
    "MEDIA_TYPE",
    "Bundle",
    "LoadedOperator",
    "check_environment",
    "load_operator",
    "make",
    "new_signing_key",
    "public_key",
    "read",
    "sign_again",
    "verified_spec",
]
