"""Functions and objects that load something once, lazily, travel without what they have loaded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from nomad import bundle, program
from nomad.bundle.environment import Modules
from nomad.pipeline import build

PROGRAM = """
import functools, threading

@functools.cache
def model():
    return threading.Lock()  # like a model, it can't be pickled

@functools.lru_cache(maxsize=7)
def known(x):
    return (model() is model(), known.cache_parameters()["maxsize"])

class Lazy:
    @functools.cached_property
    def model(self):
        return threading.Lock()
    def __call__(self, x):
        return self.model is self.model

model()
operators = [int, known, Lazy()]
start_node = end_node = "here"
"""


def test_cached_functions_and_properties_travel_empty(tmp_path: Path) -> None:
    path = tmp_path / "lazy.py"
    path.write_text(PROGRAM)
    key = bundle.new_signing_key()
    data = bundle.make(build(program.load(str(path)).operators), key)
    sys.modules.pop(program.MODULE)  # as in the pod, where there is no such module
    packed = bundle.read(data, bundle.public_key(key))

    def load(name: str) -> Any:
        code = packed.code[name]
        manifest, signature = packed.manifest_bytes, packed.signature
        return bundle.load_operator(manifest, signature, bundle.public_key(key), name, code, packed.types).function

    known = load("known")
    assert known.cache_info().currsize == 0
    assert known(0) == (True, 7)
    assert load("Lazy")(0) is True


def test_a_package_that_lists_its_modules_wrongly_is_found_by_its_files() -> None:
    pytest.importorskip("dlib", reason="needs what `pip install .[examples]` installs")
    assert [name for name, _ in Modules().find("dlib").distributions] == ["dlib-bin"]
