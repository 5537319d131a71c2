"""The process of an operator, as its master sees it. What runs in it are the functions of this file."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import random
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from nomad import pipeline
from nomad.actor.channel import Channel
from nomad.actor.host import Exit, Host
from nomad.delivery.codec import decode_one
from tests.actor.pods import Master, Pod, assignment, endless, master, peers, ready


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Master]:
    async with master(tmp_path) as made:
        yield made


# The whole way


async def test_three_pods(here: Master, rng: random.Random) -> None:
    """Source, operator and sink in processes of their own; the last two are killed again and again."""
    count = 4000
    path = str(here.folder / "output.txt")

    def source() -> Iterator[int]:
        for n in range(count):
            if n % 60 == 0:
                time.sleep(0.02)
            yield n

    def double(x: int) -> int:
        return 2 * x

    def sink(x: int) -> None:
        with open(path, "a") as file:
            file.write(f"{x}\n")

    built = pipeline.build([source, double, sink])
    names = ["source", "double", "sink"]
    epochs = [1, 1, 1]
    pods: list[Pod] = []
    addresses: list[str | None] = [None, None, None]

    async def start(number: int) -> Pod:
        pod = here.start(f"p.{names[number]}-e{epochs[number]}", epoch=epochs[number])
        await pod.until(lambda: pod.conn, "it dials in")
        pod.tell(assignment(built, number, epoch=epochs[number], workdir=here.folder / names[number]))
        addresses[number] = (await pod.says("ready"))["address"]
        return pod

    def introduce() -> None:
        for number, pod in enumerate(pods):
            if pod.conn is not None:
                before = epochs[number - 1] if number else 0
                after, address = (epochs[number + 1], addresses[number + 1]) if number < 2 else (0, None)
                pod.tell(peers(names, number, address, (before, after)))

    pods = list(await asyncio.gather(*(start(number) for number in range(3))))
    assert pods[0].hello["epoch"] == 1
    assert all(str(address).startswith("unix:") for address in addresses)
    introduce()
    kills = 0
    while kills < 3 and not pods[0].all("finished"):
        await asyncio.sleep(rng.random() * 0.3)
        chosen = rng.choice([[1], [2], [1, 2]])
        for number in chosen:
            pods[number].process.send_signal(signal.SIGKILL)
            pods[number].process.wait()
            epochs[number] += 1
        for number, pod in zip(chosen, await asyncio.gather(*(start(number) for number in chosen)), strict=True):
            pods[number] = pod
        kills += 2 in chosen
        introduce()
    await pods[0].says("finished")
    with open(path) as file:  # noqa: ASYNC230 - all is written
        lines = [int(line) for line in file]
    assert list(dict.fromkeys(lines)) == [2 * n for n in range(count)]
    assert len(lines) - count <= kills, "only the call that a kill of the sink interrupted may be made again"
    for pod in pods:
        pod.tell({"type": "stop", "drain": False, "grace": 1.0})
    assert [await pod.ended() for pod in pods] == [0, 0, 0]


async def test_a_pod_moves(here: Master) -> None:
    """What the master says in a move, and what it hears."""
    path = str(here.folder / "output.txt")
    stop = here.folder / "stop"

    def source() -> Iterator[int]:
        n = 0
        while not stop.exists():
            yield n
            n += 1
            time.sleep(0.001)

    def double(x: int) -> int:
        return 2 * x

    def sink(x: int) -> None:
        with open(path, "a") as file:
            file.write(f"{x}\n")

    built = pipeline.build([source, double, sink])
    names = ["source", "double", "sink"]
    before, old, behind = await asyncio.gather(*(ready(here, built, number) for number in range(3)))
    address, sink_address = (pod.all("ready")[0]["address"] for pod in (old, behind))
    before.tell(peers(names, 0, address, (0, 1)))
    old.tell(peers(names, 1, sink_address, (1, 1)))

    def says(pod: Pod, link: str) -> tuple[int, int]:
        last = pod.all("status")[-1]["links"] if pod.all("status") else []
        return next(((s["epoch"], s["standby"]) for s in last if s["link"] == link), (0, 0))

    await behind.until(lambda: says(behind, "p:double>sink") == (1, 0))
    new = here.start("p.double-e2", epoch=2)
    await new.until(lambda: new.conn)
    told = peers(names, 1, sink_address, (1, 1))["links"]
    new.tell(assignment(built, 1, epoch=2, workdir=here.folder / "work", role="standby", links=told))
    new_address = (await new.says("ready"))["address"]
    greet = peers(names, 0, address, (0, 1))
    greet["links"][0] |= {"standby_address": new_address, "standby_epoch": 2}
    before.tell(greet)
    await before.until(lambda: says(before, "p:source>double") == (1, 2))
    await new.until(lambda: says(new, "p:double>sink") == (1, 0) and says(new, "p:source>double") == (0, 1))
    assert new.all("status")[-1]["role"] == "standby"
    old.tell({"type": "peers", "links": [], "role": "retired"})
    await old.until(lambda: old.all("status")[-1]["role"] == "retired")
    assert "about to move" in (await old.asked("rerun", ids=None))["error"]["message"]
    new.tell({"type": "peers", "links": [], "role": "active"})
    await new.until(lambda: new.all("status")[-1]["role"] == "active")
    told_before = len(new.all("status"))
    assert new.conn is not None
    new.conn.abort()
    await new.says("status", times=told_before + 1)
    assert new.connections == 2
    assert new.all("status")[-1]["role"] == "active", "told again after every connect"

    switched = time.time()
    before.tell(peers(names, 0, new_address, (0, 2)))
    await before.until(lambda: says(before, "p:source>double") == (2, 0))
    await behind.until(lambda: says(behind, "p:double>sink") == (2, 0))
    settled = (await old.ask("numbers"))["links"][0]["settled"]
    first = (await new.ask("numbers"))["links"][0]["first"]
    assert 0 < first <= settled, "nothing is lost"
    old.process.kill()
    moved = await behind.ask("numbers")
    await behind.until(lambda: len(behind.all("heartbeat")) > 2)
    stop.touch()
    await before.says("finished")
    (link,) = (await behind.ask("numbers"))["links"]
    assert link["epoch"] == 2
    assert link["disorder"] == 0, "nothing is doubled"
    assert link["received"] == link["settled"] > moved["links"][0]["received"]
    (out,) = (await before.ask("numbers"))["links"]
    assert out == {"link": "p:source>double", "direction": "out", "numbered": out["settled"], "settled": out["settled"]}
    with open(path) as file:  # noqa: ASYNC230 - all is written
        assert [int(line) for line in file] == [2 * n for n in range(out["numbered"])]
    samples = await behind.ask("samples", after=switched)
    assert 0 < len(samples) <= 8192
    assert all(wall > switched and 0 <= latency < 20 for wall, latency in samples)
    assert samples == sorted(samples)
    assert await behind.ask("samples", after=time.time()) == []


# One operator


async def test_a_pod_reports_and_answers(here: Master) -> None:
    """Heart-beats go on while the function blocks; requests are answered; a lost master is found again."""
    go_on = here.folder / "go-on"

    @dataclasses.dataclass
    class Reading:
        number: int

        @property
        def nbytes(self) -> int:
            raise RuntimeError("what is looked at before it is shown is the user's, too")

    def source() -> Iterator[Reading]:
        n = 0
        while True:
            n += 1
            yield Reading(n)
            time.sleep(0.002)
            while n >= 5 and not go_on.exists():
                time.sleep(0.005)

    built = pipeline.build([source, str])
    pod = await ready(here, built, 0)
    assert pod.hello == {"epoch": 1, "pid": pod.process.pid, "assigned": False}
    sink = await ready(here, built, 1)
    address = sink.all("ready")[0]["address"]
    pod.tell(peers(["source", "str"], 0, address, (0, 1)))

    await pod.until(
        lambda: any(m["stats"]["emitted"] == 5 for m in pod.all("heartbeat")), "a heart-beat while it blocks"
    )
    beat = pod.all("heartbeat")[-1]
    assert beat["stats"]["rss"] > 1 << 20
    assert beat["stats"]["cpu"] > 0
    assert beat["stats"]["mode"] == "thread"
    assert beat["error"] is None
    types = {f"{__name__}:test_a_pod_reports_and_answers.<locals>.Reading": Reading}
    assert decode_one(beat["stats"]["last_output"], types) == Reading(5)
    (link,) = beat["stats"]["links"]
    assert (link["link"], link["direction"], link["state"], link["connected"]) == ("p:source>str", "out", "open", True)
    assert decode_one(await pod.ask("last_output"), types) == Reading(5)

    refused = await pod.asked("nonsense")
    assert "doesn't know the request 'nonsense'" in refused["error"]["message"]
    assert not (await pod.asked("tap"))["ok"], "an argument is missing"

    await sink.until(lambda: any(m["stats"]["received"] == 5 for m in sink.all("heartbeat")))
    assert pod.conn is not None
    pod.conn.abort()
    await pod.until(lambda: pod.connections == 2)
    assert pod.hello["assigned"]
    await pod.says("ready", times=2)

    assert await pod.ask("tap", on=True) == {}
    go_on.touch()
    first = await pod.says("outputs")
    assert decode_one(first["items"][0], types).number == 6
    assert await pod.ask("cut") is None
    await pod.until(lambda: any(m["stats"]["reconnects"] == 1 for m in pod.all("heartbeat")))
    assert await pod.ask("tap", on=False) == {}
    pod.tell({"type": "stop", "drain": True, "grace": 10.0})
    assert await pod.ended() == 0
    last = pod.all("heartbeat")[-1]["stats"]
    assert last["unacked_messages"] == 0, "drained"
    sink.process.send_signal(signal.SIGTERM)
    assert await sink.ended() == 0
    assert sink.all("heartbeat")[-1]["stats"]["received"] == last["emitted"]


async def test_messages_set_aside_are_shown_and_run_again(here: Master) -> None:
    good = here.folder / "good"

    def source() -> Iterator[int]:
        yield from range(10)

    def careful(x: int) -> str:
        if x % 5 == 3 and not good.exists():
            raise ValueError(f"{x} is no good")
        assert "NOMAD_POD" not in os.environ
        print("careful", x, flush=True)
        return str(x)

    built = pipeline.build([source, careful])
    pod = here.start("p.careful-e1")
    await pod.until(lambda: pod.conn)
    early = await pod.asked("set_aside")
    assert "not ready yet" in early["error"]["message"]
    pod.tell(assignment(built, 1, workdir=here.folder / "work"))
    address = (await pod.says("ready"))["address"]
    source_pod = await ready(here, built, 0)
    source_pod.tell(peers(["source", "careful"], 0, address, (0, 1)))
    await source_pod.says("finished")
    three, eight = await pod.ask("set_aside")
    assert [decode_one(r["value"]) for r in (three, eight)] == [3, 8]
    assert three["error"]["type"] == "ValueError"
    assert "in careful" in three["error"]["traceback"]
    assert await pod.ask("rerun", ids=[three["id"]]) == {"ran": 1, "failed": 1}
    good.touch()
    assert await pod.ask("rerun", ids=[three["id"]]) == {"ran": 1, "failed": 0}
    assert await pod.ask("drop", ids=None) == {"dropped": 1}
    assert await pod.ask("set_aside") == []
    assert "careful 3\n" in here.log("p.careful-e1")
    await pod.until(lambda: any(m["error"] and "no good" in m["error"]["message"] for m in pod.all("heartbeat")))


# Ends


async def test_a_failed_operator_says_why(here: Master) -> None:
    def source() -> Iterator[int]:
        yield 1

    @pipeline.operator(on_error="fail")
    def strict(x: int) -> None:
        raise LookupError(f"nothing at {x}")

    def broken() -> Iterator[int]:
        yield 1
        raise ConnectionError("the camera is gone" + chr(0xD83D))  # half of an emoji, which UTF-8 can't hold

    built = pipeline.build([source, strict])
    pod, source_pod = await asyncio.gather(ready(here, built, 1), ready(here, built, 0))
    source_pod.tell(peers(["source", "strict"], 0, pod.all("ready")[0]["address"], (0, 1)))
    failed = await pod.says("failed")
    assert failed["fatal"] is True
    assert failed["error"]["type"] == "LookupError"
    assert "nothing at 1" in failed["error"]["message"]
    assert "in strict" in failed["error"]["traceback"]
    assert await pod.ended() == 4
    assert "nothing at 1" in here.log("p.strict-e1"), "it is in its log, too"

    broken_built = pipeline.build([broken, print])
    sink, pod = await asyncio.gather(ready(here, broken_built, 1), ready(here, broken_built, 0))
    pod.tell(peers(["broken", "print"], 0, sink.all("ready")[0]["address"], (0, 1)))
    failed = await pod.says("failed")
    assert failed["fatal"] is False, "a source that raised is started again"
    assert failed["error"]["type"] == "ConnectionError"
    assert failed["error"]["message"] == r"the camera is gone\ud83d"
    assert await pod.ended() == 1


async def test_a_pod_that_cannot_say_why_ends_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it is started again, which one that hangs isn't."""

    async def breaks(self: Channel) -> None:
        raise RuntimeError("it broke")

    def unspeakable(exc: BaseException) -> dict[str, str]:
        raise RecursionError

    monkeypatch.setattr(Channel, "keep", breaks)
    monkeypatch.setattr("nomad.actor.host.describe", unspeakable)
    host = Host({"pod": "p.one-e1", "verify_key": "", "key": "", "master_timeout": 1.0, "control": "inproc:nobody"})
    try:
        async with asyncio.timeout(30):
            assert await host.run() is Exit.CRASHED
    finally:
        assert host.close()
        for number in (signal.SIGTERM, signal.SIGUSR1):
            asyncio.get_running_loop().remove_signal_handler(number)


async def test_an_object_is_set_up_before_its_pod_says_that_it_is_ready(here: Master) -> None:
    path = str(here.folder / "said.txt")

    class Model:
        def __init__(self, go_on: Path | None = None):
            self.go_on = go_on

        def setup(self) -> None:
            self.say("setup")
            while self.go_on is not None and not self.go_on.exists():
                time.sleep(0.01)

        def say(self, what: str) -> None:
            with open(path, "a") as file:
                file.write(f"{what} {threading.current_thread().name}\n")

    class Plain(Model):
        def __call__(self, x: int) -> None:
            self.say(str(x))

    class Asynchronous(Model):
        async def __call__(self, x: int) -> None:
            self.say(str(x))

    def source() -> Iterator[int]:
        yield from range(2)

    for name, kind in (("Plain", Plain), ("Asynchronous", Asynchronous)):
        go_on = here.folder / name
        built = pipeline.build([source, kind(go_on)])
        pod = here.start(f"p.{name}-e1")
        await pod.until(lambda pod=pod: pod.conn)
        pod.tell(assignment(built, 1))
        await pod.until(lambda: os.path.exists(path), "its setup runs")
        assert not pod.all("ready")
        assert not (await pod.asked("last_output"))["ok"], "it answers meanwhile"
        go_on.touch()
        address = (await pod.says("ready"))["address"]
        source_pod = await ready(here, built, 0)
        source_pod.tell(peers(["source", name], 0, address, (0, 1)))
        await source_pod.says("finished")
        with open(path) as file:  # noqa: ASYNC230 - all is written
            said = [line.split(" ", 1) for line in file]
        assert [what for what, _ in said] == ["setup", "0", "1"]
        assert said[0][1] == f"{name} function\n", "in the thread of the function"
        os.remove(path)
        for one in (source_pod, pod):
            one.tell({"type": "stop", "drain": False, "grace": 1.0})
            assert await one.ended() == 0


async def test_a_setup_that_raises_is_permanent_and_one_that_hangs_holds_nothing_up(here: Master) -> None:
    started = here.folder / "hangs"

    class Broken:
        def setup(self) -> None:
            raise FileNotFoundError("no weights")

        def __call__(self, x: int) -> None: ...

    class Hanging:
        def setup(self) -> None:
            started.touch()
            time.sleep(1000)

        def __call__(self, x: int) -> None: ...

    pod = here.start("p.Broken-e1")
    await pod.until(lambda: pod.conn)
    pod.tell(assignment(pipeline.build([endless, Broken()]), 1))
    failed = await pod.says("failed")
    assert failed["fatal"] is True
    assert (failed["error"]["type"], failed["error"]["message"]) == ("FileNotFoundError", "setup: no weights")
    assert "in setup" in failed["error"]["traceback"]
    assert await pod.ended() == 3

    pod = here.start("p.Hanging-e1")
    await pod.until(lambda: pod.conn)
    pod.tell(assignment(pipeline.build([endless, Hanging()]), 1))
    await pod.until(started.exists)
    pod.tell({"type": "stop", "drain": False, "grace": 1.0})
    assert await pod.ended() == 0


@pytest.mark.parametrize("part", ["code", "types", "manifest", "signature", "operator"])
async def test_tampered_code_is_refused_before_it_is_unpickled(here: Master, part: str) -> None:
    built = pipeline.build([endless, print])
    pod = here.start("p.endless-e1")
    await pod.until(lambda: pod.conn)
    trap = here.folder / "unpickled"
    message = assignment(built, 0)
    if part in ("code", "types"):  # a pickle that would leave a trace
        message[part] = b"cos\nmkdir\n(V" + os.fsencode(trap) + b"\ntR."
    elif part == "operator":
        message[part] = "other"
    else:
        message[part] = message[part][:-1] + bytes([message[part][-1] ^ 1])
    pod.tell(message)
    failed = await pod.says("failed")
    assert failed["fatal"] is True
    assert failed["error"]["type"] == "BundleTampered"
    assert await pod.ended() == 3
    assert not trap.exists()


@pytest.mark.parametrize("where", ["thread", "inline"])
async def test_a_function_that_hangs_does_not_hold_up_the_end(here: Master, where: str) -> None:
    started = here.folder / "hangs"

    def hang(x: int) -> None:
        if where == "thread" or x > 5000:
            started.touch()
            time.sleep(1000)

    built = pipeline.build([endless, hang])
    pod, source = await asyncio.gather(ready(here, built, 1), ready(here, built, 0))
    source.tell(peers(["endless", "hang"], 0, pod.all("ready")[0]["address"], (0, 1)))
    await pod.until(started.exists)
    pod.tell({"type": "stop", "drain": False, "grace": 1.0})
    assert await pod.ended() == 0
