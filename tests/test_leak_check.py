"""The check in conftest.py is itself checked: each kind of thing left behind fails the test that left it."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

LEAVERS = """
import asyncio, socket, subprocess, threading
kept = []
async def test_tidy():
    await asyncio.to_thread(int)
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    server.close()
    await server.wait_closed()
async def test_task():
    kept.append(asyncio.create_task(asyncio.Event().wait()))
def test_thread():
    threading.Thread(target=threading.Event().wait, daemon=True).start()
def test_socket():
    kept.append(socket.socket())
def test_child():
    kept.append(subprocess.Popen(["sleep", "1"]))
def test_orphan():
    subprocess.run("sleep 1 & exit", shell=True)
"""


def test_what_a_test_leaves_behind_fails_it(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    conftest = (Path(__file__).parent / "conftest.py").read_text()
    assert "GRACE = 10.0" in conftest
    pytester.makeconftest(conftest.replace("GRACE = 10.0", "GRACE = 0.05"))
    pytester.makepyfile(LEAVERS)
    result = pytester.runpytest_subprocess(
        *("-p", "no:cacheprovider", "-p", "pytest_asyncio.plugin"),
        *("-o", "asyncio_mode=auto", "-o", "asyncio_default_fixture_loop_scope=function"),
    )
    result.assert_outcomes(passed=6, errors=5)
    result.stdout.fnmatch_lines_random(
        [
            "ERROR *::test_task - AssertionError: asyncio tasks*",
            "ERROR *::test_thread - AssertionError: threads*",
            "ERROR *::test_socket - AssertionError: sockets*",
            "ERROR *::test_child - AssertionError: processes*",
            "ERROR *::test_orphan - AssertionError: processes*",
        ]
    )
