"""Network namespaces for the nodes of one run, and their certain end.

A namespace is named after the process that made it: `nomad-<pid>-<birth>-<number>`. A keeper, a shell in a
session of its own, waits for the end of a pipe that this process alone holds open; then it ends what runs in
the namespaces and removes them. So they go on a normal close, on Ctrl-C and on `kill -9` in the same way. What is
left if the keeper is killed as well, the next run removes.

Called by the backends `netem` and `tun`. Calls `ip` of iproute2; must not touch a namespace that isn't Nomad's.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import IPv4Address
from pathlib import Path
from typing import Self

from nomad.errors import UsageError
from nomad.runtime import process
from nomad.settings import Seat

FOLDER = Path("/run/netns")
"""Where `ip netns` keeps names."""
PREFIX = "nomad-"
FIRST_ADDRESS = IPv4Address("10.77.0.1")
NETWORK_BITS = 16
"""Every set of namespaces uses the same addresses: none of them is connected to anything else."""
MTU = 9000
"""Bytes of a packet between namespaces. Larger ones fill a slow link's queue with a few of them, smaller ones cost the
switch of `tun` more for the same throughput (docs/bench-links.md)."""
KEEPER_SECONDS = 10.0
"""How long the keeper may take to remove everything."""

_numbers = itertools.count()

_KEEPER = """
trap '' HUP INT TERM
read -r _
for name; do
    for pid in $(ip netns pids "$name" 2>/dev/null); do kill -9 "$pid" 2>/dev/null; done
    ip netns delete "$name" 2>/dev/null
done
exit 0
"""


def check_host(*programs: str) -> None:
    """Raises `UsageError` unless namespaces can be made here and `programs` are there."""
    if not hasattr(os, "geteuid") or not Path("/proc/self/ns/net").exists():
        raise UsageError("network namespaces need Linux; the links 'shaping' work anywhere")
    if os.geteuid() != 0:
        raise UsageError("network namespaces need root: run it with sudo, or take the links 'shaping'")
    for program in ("ip", "nsenter", *programs):
        if shutil.which(program) is None:
            raise UsageError(
                f"the program {program!r} isn't installed (packages iproute2 and util-linux); "
                "the links 'shaping' work without"
            )


def run(command: Sequence[str], text: str = "") -> str:
    """What `command` prints. Raises `UsageError` with its own words when it fails."""
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = done.stderr.strip().rstrip(".") or f"exit code {done.returncode}"
        raise UsageError(f"`{' '.join(command)}` failed: {said}")
    return done.stdout


def ip(namespace: str, commands: Iterable[str]) -> None:
    """Several `ip` commands inside a namespace, in one go. Raises `UsageError`."""
    run(["ip", "-n", namespace, "-batch", "-"], "\n".join(commands))


class Namespaces:
    """One namespace per node, with loopback up and nothing else. Made by `make`; blocks for some milliseconds."""

    def __init__(self, names: dict[str, str], keeper: subprocess.Popen[bytes]) -> None:
        self._names = names
        self._keeper = keeper

    @classmethod
    def make(cls, nodes: Iterable[str]) -> Self:
        """Raises `UsageError` when this host can't; nothing is left then."""
        check_host()
        remove_stale()
        names = {node: f"{PREFIX}{os.getpid()}-{_birth(os.getpid())}-{next(_numbers)}" for node in nodes}
        keeper = subprocess.Popen(
            ["/bin/sh", "-c", _KEEPER, "sh", *names.values()],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        made = cls(names, keeper)
        try:
            for name in names.values():
                run(["ip", "netns", "add", name])
                ip(name, ["link set lo up"])
        except BaseException:
            made.close()
            raise
        return made

    def __getitem__(self, node: str) -> str:
        """The name of the namespace of a node."""
        return self._names[node]

    def __iter__(self) -> Iterator[str]:
        """The nodes, in their order."""
        return iter(self._names)

    def seats(self) -> dict[str, Seat]:
        """How to run a pod of each node, and where it listens."""
        return {
            node: Seat(("nsenter", f"--net={FOLDER / name}", "--"), str(address))
            for (node, name), address in zip(self._names.items(), self.addresses().values(), strict=True)
        }

    def addresses(self) -> dict[str, IPv4Address]:
        return {node: FIRST_ADDRESS + number for number, node in enumerate(self._names)}

    def close(self) -> None:
        """End what still runs inside and remove all. Idempotent."""
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()
        try:
            self._keeper.wait(KEEPER_SECONDS)
        except subprocess.TimeoutExpired:
            self._keeper.kill()
            self._keeper.wait()


def remove_stale() -> list[str]:
    """Remove the namespaces of processes that are gone, with what runs in them; returns their names."""
    stale = []
    for path in FOLDER.glob(f"{PREFIX}*-*-*"):
        pid, born, _ = path.name.removeprefix(PREFIX).split("-", 2)
        if pid.isdigit() and _birth(int(pid)) != born:
            stale.append(path.name)
    if stale:
        subprocess.run(["/bin/sh", "-c", _KEEPER, "sh", *stale], stdin=subprocess.DEVNULL, check=False)
    return stale


def _birth(pid: int) -> str:
    """A process's start in ticks since boot, which no name outlives; "" for one that is gone."""
    return (process.birth(pid) or "").rpartition(" ")[2]
