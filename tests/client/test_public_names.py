"""The names of `nomad`: each is there when it is asked for, and tools see the same ones."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import nomad


@pytest.mark.parametrize("name", nomad.__all__)
def test_every_name_is_there(name: str) -> None:
    value = getattr(nomad, name)
    assert name in dir(nomad)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert value.__doc__


def test_other_names_arent() -> None:
    with pytest.raises(AttributeError, match="module 'nomad' has no attribute 'nonsense'"):
        _ = nomad.nonsense


def test_type_checkers_see_what_is_looked_up() -> None:
    tree = ast.parse(Path(nomad.__file__).read_text())
    imported = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == nomad._MODULE
