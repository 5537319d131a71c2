"""Bundles that are malformed, too large, tampered with or from another Nomad; and nothing unpickled on the way."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nomad import bundle, errors
from nomad.bundle import signing
from nomad.pipeline import build, source
from tests.bundle.conftest import KEY, PUBLIC


@source(interval=0.5)
def numbers():
    return 1


def double(x):
    return 2 * x


MADE = bundle.make(build([numbers, double, print], profile=[{}, {"output_msg_size": 8}, {}]), KEY)
ENVELOPE = msgpack.unpackb(MADE)
MANIFEST = json.loads(ENVELOPE["manifest"])


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def enveloped(**changes) -> bytes:
    return msgpack.packb({**ENVELOPE, **changes})


def signed(manifest, key=KEY, **changes) -> bytes:
    data = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    return enveloped(manifest=data, signature=signing.sign(data, key), **changes)


def refused(data: bytes, error=errors.BundleError) -> str:
    with pytest.raises(error) as caught:
        bundle.read(data, PUBLIC)
    assert type(caught.value) is error
    return str(caught.value)


def test_what_is_read_is_what_was_made():
    read = bundle.read(MADE, PUBLIC)
    assert [op.name for op in read.operators] == ["numbers", "double", "print"]
    assert read.operators[0].interval == 0.5
    assert read.code == ENVELOPE["code"]
    assert read.digest == signing.digest(read.manifest_bytes)
    assert "b'" not in repr(read)


def test_loaded_operators_are_what_was_given():
    for name in ("numbers", "double", "print"):
        loaded = load(name)
        assert loaded.spec.name == name
    assert load("double").function(4) == 8
    assert load("print").function is print


def load(name, **changes) -> bundle.LoadedOperator:
    parts = {
        "manifest": ENVELOPE["manifest"],
        "signature": ENVELOPE["signature"],
        "verify_key": PUBLIC,
        "name": name,
        "code": ENVELOPE["code"].get(name, b""),
        "types": ENVELOPE["types"],
    }
    return bundle.load_operator(**{**parts, **changes})


# -- malformed


@pytest.mark.parametrize(
    "data", [b"", b"\x00", b"hello", b"\x81", msgpack.packb([]), msgpack.packb({}), MADE[:-1], MADE + b"x"]
)
def test_no_bundle(data):
    assert "bundle" in refused(data)


@given(st.binary(max_size=200))
def test_noise_is_refused(data):
    with pytest.raises(errors.BundleError):
        bundle.read(data, PUBLIC)


@given(st.integers(0, len(MADE) - 1), st.integers(1, 255))
def test_any_changed_byte_is_noticed(position, flip):
    data = bytearray(MADE)
    data[position] ^= flip
    with pytest.raises(errors.BundleError):
        bundle.read(bytes(data), PUBLIC)


def test_malformed_envelopes():
    assert "newer Nomad" in refused(enveloped(nomad=2))
    assert "nothing else" in refused(enveloped(nomad=0))
    assert "nothing else" in refused(enveloped(extra=1))
    assert "'types' is of type str, not bytes" in refused(enveloped(types="x"))
    assert "map names to bytes" in refused(enveloped(code={"a": "b"}))
    assert "64 MiB is the limit" in refused(bytes((64 << 20) + 1))
    assert "manifest is over 1 MiB" in refused(enveloped(manifest=bytes((1 << 20) + 1)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 2, "nomad": "9.0"}, "newer Nomad (9.0)"),
        ({"format": "1"}, "format"),
        ({"later": 1}, "unknown field 'later'"),
        ({"python": "three"}, "python"),
        ({"codec": "json"}, "'json' is unknown"),
        ({"edges": []}, "from each operator to the next"),
        ({"operators": MANIFEST["operators"][:1]}, "operators"),
        ({"operators": [MANIFEST["operators"][0]] * 2}, "same name"),
        ({"operators": MANIFEST["operators"][::-1]}, "first operator must be a source"),
        ({"profile": [{}]}, "one entry for each"),
        ({"profile": [{"x": 1.0}, {}, {}]}, "fields cloud_execution_time"),
        ({"packages": {"a": 1}}, "packages.a"),
    ],
)
def test_manifests_that_are_signed_but_not_valid(change, says):
    assert says in refused(signed({**MANIFEST, **change}))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": "a b"}, "operators.0.name"),
        ({"kind": "magic"}, "operators.0.kind"),
        ({"interval": None}, "interval"),
        ({"interval": 0.0}, "operators.0.interval"),
        ({"memory_mb": -1.0}, "operators.0.memory_mb"),
        ({"memory_mb": "1"}, "operators.0.memory_mb"),
        ({"later": 1}, "unknown field 'operators.0.later'"),
        ({"sha256": "x"}, "operators.0.sha256"),
    ],
)
def test_operators_that_are_signed_but_not_valid(change, says):
    first, *rest = MANIFEST["operators"]
    assert says in refused(signed({**MANIFEST, "operators": [{**first, **change}, *rest]}))


def test_manifests_that_are_no_json():
    for data in (b"", b"{", b"[" * 100_000, b"\xff", b"[]", b"1"):
        assert "manifest" in refused(signed(data))


# -- tampered


def test_another_key():
    message = refused(signed(MANIFEST, key=bundle.new_signing_key()), errors.BundleTampered)
    assert "credentials file" in message


def test_nothing_unsigned_is_looked_at():
    refused(enveloped(manifest=b"no JSON at all"), errors.BundleTampered)
    refused(enveloped(signature=b""), errors.BundleTampered)


def test_code_that_was_not_signed(tmp_path: Path):
    bomb = pickle.dumps((Bomb(tmp_path / "gone off"), {}))
    code = ENVELOPE["code"]
    assert "'double'" in refused(enveloped(code={**code, "double": bomb}), errors.BundleTampered)
    assert "differs in other" in refused(enveloped(code={**code, "other": bomb}), errors.BundleTampered)
    assert "differs in double" in refused(
        enveloped(code={k: v for k, v in code.items() if k != "double"}), errors.BundleTampered
    )
    assert "types" in refused(enveloped(types=bomb), errors.BundleTampered)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", ["code", "types", "manifest", "signature", "verify_key"])
def test_pods_unpickle_nothing_that_was_not_signed(part, tmp_path: Path):
    bomb = pickle.dumps((Bomb(tmp_path / "gone off"), {}))
    other = {
        "code": bomb,
        "types": bomb,
        "manifest": ENVELOPE["manifest"].replace(b"double", b"dooble"),
        "signature": bytes(64),
        "verify_key": bundle.public_key(bundle.new_signing_key()),
    }
    with pytest.raises(errors.BundleTampered):
        load("double", **{part: other[part]})
    assert not list(tmp_path.iterdir())


def test_code_of_another_operator_is_not_loaded():
    with pytest.raises(errors.BundleTampered, match="'double'"):
        load("double", code=ENVELOPE["code"]["print"])
    with pytest.raises(errors.BundleTampered, match="'unknown' isn't in"):
        load("unknown", code=ENVELOPE["code"]["print"])


def test_reading_signed_code_does_not_unpickle_it(tmp_path: Path):
    bomb = pickle.dumps((Bomb(tmp_path / "gone off"), {}))
    operators = [{**entry, "sha256": signing.digest(bomb)} for entry in MANIFEST["operators"]]
    data = signed({**MANIFEST, "operators": operators}, code=dict.fromkeys(ENVELOPE["code"], bomb))
    bundle.read(data, PUBLIC)
    assert not list(tmp_path.iterdir())


def test_code_that_fails_to_load():
    code = pickle.dumps((Bomb("/no/such/folder"), {}))
    manifest = {**MANIFEST, "operators": [{**entry, "sha256": signing.digest(code)} for entry in MANIFEST["operators"]]}
    data = json.dumps(manifest).encode()
    with pytest.raises(errors.BundleError, match="operator 'double' can't be loaded.*FileNotFoundError") as caught:
        load("double", manifest=data, signature=signing.sign(data, KEY), code=code)
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_code_whose_imports_are_missing_says_what_to_do():
    code = b"cnowhere_to_be_found\nf\n."
    manifest = {**MANIFEST, "operators": [{**entry, "sha256": signing.digest(code)} for entry in MANIFEST["operators"]]}
    data = json.dumps(manifest).encode()
    with pytest.raises(errors.BundleError, match=r"'nowhere_to_be_found'\. Name its package at the operator, requ"):
        load("double", manifest=data, signature=signing.sign(data, KEY), code=code)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("requirements", ["NumPy"], "normal form"),
        ("requirements", ["-r /etc/passwd"], "not valid"),
        ("environment", {"PYTHONPATH": "/tmp"}, "PYTHONPATH can't be set"),
        ("secrets", {"A": "nothing"}, "must refer to a secret"),
        ("devices", {"camera": 0}, "1 or more"),
        ("devices", {"camera": "1"}, "valid integer"),
    ],
)
def test_what_an_operator_needs_is_checked_again(field, value, says):
    entry = {**MANIFEST["operators"][1], field: value}
    operators = [MANIFEST["operators"][0], entry, MANIFEST["operators"][2]]
    assert says in refused(signed({**MANIFEST, "operators": operators}))
