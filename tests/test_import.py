"""`import nomad` is quick, and libraries are imported only where they are used."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {"aiohttp", "aiozmq", "asyncio", "cloudpickle", "cryptography", "kubernetes_asyncio", "msgpack", "numpy"}
HEAVY |= {"openapi_pydantic", "prometheus_client", "pydantic", "rich", "uvloop", "yaml", "zmq"}
MOST_SECONDS = 0.150


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_the_version_is_there() -> None:
    from importlib.metadata import version

    assert python("import nomad; print(nomad.__version__)").strip() == version("nomad")


def test_importing_nomad_loads_no_library() -> None:
    loaded = python("import sys, nomad; print(*{name.partition('.')[0] for name in sys.modules})").split()
    assert HEAVY & set(loaded) == set()


def test_python_may_leave_out_docstrings() -> None:
    code = "import nomad.actor.host, nomad.cli.main, nomad.master.rest.api"
    subprocess.run([sys.executable, "-OO", "-c", code], check=True)


def test_importing_nomad_is_quick() -> None:
    code = "import time; start = time.perf_counter(); import nomad; print(time.perf_counter() - start)"
    assert min(float(python(code)) for _ in range(5)) <= MOST_SECONDS


@pytest.mark.parametrize("module", ["nomad.cli", "nomad.client", "nomad.actor.host", "nomad.master.app"])
def test_nobody_loads_kubernetes_or_zeromq_unasked(module: str) -> None:
    loaded = python(f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})").split()
    assert {"kubernetes_asyncio", "aiozmq", "zmq"} & set(loaded) == set()
