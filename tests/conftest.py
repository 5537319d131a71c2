"""What every test gets: nothing may be left behind, and what is random can be repeated.

A test that leaves an asyncio task, a thread, a socket or a process behind fails, with the name of what it
left. Things that are ending get `GRACE` seconds to do so; whoever needs longer waits for it in the test.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import stat
import tempfile
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Any

import hypothesis
import psutil
import pytest
import pytest_asyncio

GRACE = 10.0
"""Seconds."""

SEED = int(os.environ.get("NOMAD_TEST_SEED") or random.SystemRandom().randrange(2**32))
os.environ["NOMAD_TEST_SEED"] = str(SEED)  # the processes that pytest-xdist starts have the same
RUN = f"NOMAD_TEST_RUN={uuid.uuid4().hex}"
"""In the environment of every process that a test starts, so that orphans are found too."""
KEPT = "NOMAD_TEST_CLUSTER"
"""In the environment of the processes of a test cluster, which outlives a test that stops and starts one of them."""

hypothesis.settings.register_profile("default", deadline=None, print_blob=True)
hypothesis.settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True, database=None)
PROFILE = "ci" if os.environ.get("CI") else "default"
hypothesis.settings.load_profile(PROFILE)


def pytest_configure(config: pytest.Config) -> None:
    name, value = RUN.split("=")
    os.environ[name] = value
    if not hasattr(config, "workerinput"):  # the processes that pytest-xdist starts have the same
        own_temporary_folder(config)
    measurer = getattr(config.pluginmanager.getplugin("_cov"), "cov_controller", None)
    if measurer is not None:  # --cov, and no --no-cov
        measure(config, measurer)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's job in the background; its children inherit that
        signal.signal(signal.SIGINT, signal.default_int_handler)


def own_temporary_folder(config: pytest.Config) -> None:
    """What a process that was killed has left in it goes with this run. pytest's own folders are where they always are.

    Its name is short: the paths of sockets may not be long.
    """
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    folder = tempfile.mkdtemp(prefix="nt-")
    tempfile.tempdir = os.environ["TMPDIR"] = os.environ["XDG_RUNTIME_DIR"] = folder
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def measure(config: pytest.Config, measurer: Any) -> None:
    """Every process is measured, by one only.

    In those that pytest-xdist starts, pytest-cov would measure twice: the first time, whose result it drops, goes on
    where `no_cover` has the second one pause. Pods and commands find what they need in their environment; with
    `patch = subprocess` in setup.cfg instead, pytest-xdist's would find it, too.
    """
    worker = hasattr(config, "workerinput")
    if worker:
        measurer.cov.stop()
    if worker or not config.getoption("numprocesses", None):
        os.environ["COVERAGE_PROCESS_START"] = str(config.inipath)
        os.environ["COVERAGE_FILE"] = str(config.rootpath / ".coverage")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Of a test that has the mark `no_cover`, what it starts isn't measured either."""
    with pytest.MonkeyPatch.context() as patch:
        if item.get_closest_marker("no_cover"):
            patch.delenv("COVERAGE_PROCESS_START", raising=False)
        return (yield)


def pytest_report_header() -> str:
    return f"random seed: {SEED} (NOMAD_TEST_SEED={SEED} repeats it), hypothesis profile: {PROFILE}"


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A run that ended before all tests had run isn't made good by running those again that had failed by then."""
    cache: pytest.Cache | None = getattr(session.config, "cache", None)  # there is none without its plugin
    if exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and cache is not None:
        cache.set("cache/lastfailed", {})


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """This run's seed, different for every test."""
    return random.Random(f"{SEED} {request.node.nodeid}").randrange(2**32)


@pytest.fixture
def rng(seed: int) -> random.Random:
    """A random generator of the test's own, the same again with the same `NOMAD_TEST_SEED`."""
    return random.Random(seed)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if pytest_asyncio.is_async_test(item) and isinstance(item, pytest.Function):
            item.fixturenames.insert(item.fixturenames.index("nothing_left") + 1, "no_task_left")


@pytest_asyncio.fixture
async def no_task_left() -> AsyncIterator[None]:
    """Torn down last of the asynchronous fixtures, while their loop still runs."""
    before = asyncio.all_tasks()
    yield

    def left() -> list[str]:
        tasks = asyncio.all_tasks() - before - {asyncio.current_task()}
        return sorted(repr(task) for task in tasks if not task.done())

    end = time.monotonic() + GRACE
    while left() and time.monotonic() < end:
        await asyncio.sleep(0.001)
    assert not left(), "asyncio tasks left behind:\n  " + "\n  ".join(left())


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Set up first, torn down last: what is open now and wasn't before was left by the test."""
    threads, sockets, pids = set(threading.enumerate()), open_sockets(), set(psutil.pids())
    yield
    await_none("threads", lambda: [repr(thread) for thread in set(threading.enumerate()) - threads if not kept(thread)])
    await_none("processes", lambda: [line for pid in psutil.pids() if pid not in pids and (line := ours(pid))])
    await_none("sockets", lambda: [f"descriptor {fd}" for fd, _ in open_sockets() - sockets])


def await_none(what: str, left: Callable[[], list[str]]) -> None:
    """Fail unless `left()` is empty within the grace period."""
    end = time.monotonic() + GRACE
    while (rest := left()) and time.monotonic() < end:
        time.sleep(0.005)
    assert not rest, f"{what} left behind:\n  " + "\n  ".join(rest)


def kept(thread: threading.Thread) -> bool:
    """Whether a library starts `thread` once and keeps it: pyzmq's, which releases what was sent without a copy."""
    return type(thread).__module__ == "zmq.utils.garbage"


def open_sockets() -> set[tuple[int, int]]:
    """Descriptor and inode of every open socket of this process."""
    found = set()
    for name in os.listdir("/dev/fd"):
        try:
            status = os.fstat(int(name))
        except OSError:  # the descriptor that listed the folder
            continue
        if stat.S_ISSOCK(status.st_mode):
            found.add((int(name), status.st_ino))
    return found


def ours(pid: int) -> str:
    """What process `pid` is, if a test of this run started it, directly or not; else ""."""
    try:
        process = psutil.Process(pid)
        child = process.ppid() == os.getpid()
        environment = process.environ()
        if KEPT not in environment and (child or RUN in (f"{name}={value}" for name, value in environment.items())):
            return f"{pid} ({process.status()}): {' '.join(process.cmdline()) or process.name()}"
    except psutil.Error:  # ended in the meantime, or someone else's
        pass
    return ""
