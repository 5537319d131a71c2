"""Users' own modules, as files beside a script, and what a pod would make of their bundle."""

from __future__ import annotations

import importlib
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from nomad import bundle
from nomad.pipeline import Pipeline

KEY = bytes(range(32))
PUBLIC = bundle.public_key(KEY)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ModuleType]]:
    """Write modules (`name=source`), and import the first of them as a user's script would."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def write(**sources: str) -> ModuleType:
        for name, text in sources.items():
            path = tmp_path.joinpath(*name.split("__"))
            path.parent.mkdir(parents=True, exist_ok=True)
            for folder in path.parents:
                if folder.is_relative_to(tmp_path) and folder != tmp_path:
                    folder.joinpath("__init__.py").touch()
            path.with_suffix(".py").write_text(textwrap.dedent(text))
        importlib.invalidate_caches()
        return importlib.import_module(next(iter(sources)).replace("__", "."))

    yield write
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]


@pytest.fixture
def pod(tmp_path: Path) -> Callable[[Pipeline, str, str], str]:
    """What `expression` prints in a new process, with `f` the loaded operator and `loaded` all of it."""

    def run(pipeline: Pipeline, name: str, expression: str) -> str:
        made = tmp_path / "made.bundle"
        made.write_bytes(bundle.make(pipeline, KEY))
        script = f"""if True:
            import asyncio, sys
            from nomad import bundle
            b = bundle.read(open({str(made)!r}, "rb").read(), {PUBLIC!r})
            args = (b.manifest_bytes, b.signature, {PUBLIC!r}, {name!r}, b.code[{name!r}], b.types)
            loaded = bundle.load_operator(*args)
            f = loaded.function
            print({expression})
        """
        result = subprocess.run(
            [sys.executable, "-P", "-c", script], cwd="/", capture_output=True, text=True, timeout=30, check=False
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    return run
