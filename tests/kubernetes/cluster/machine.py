"""What a Debian machine must have for the real cluster, installed when it isn't there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.kubernetes.cluster.processes import ClusterError

TREE = Path(__file__).resolve().parents[3]
PROGRAMS = {
    "containerd": "containerd",
    "runc": "runc",
    "iptables": "iptables",
    "conntrack": "conntrack",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "sysctl": "procps",
    "dockerd": "docker.io",
    "debootstrap": "debootstrap",
    "gcc": "gcc libc6-dev",
    "/usr/lib/cni/ptp": "containernetworking-plugins",
}
"""Programs and Debian's packages that have them."""
POLICY = Path("/usr/sbin/policy-rc.d")


def prepare() -> None:
    """Install what is missing. Raises `ClusterError` where a cluster can't be brought up, with the reason."""
    if reason := unfit():
        raise ClusterError(reason)
    missing = [package for program, package in PROGRAMS.items() if not _there(program)]
    if missing:
        install(" ".join(missing).split())


def unfit() -> str:
    """Why no cluster of containers can be brought up here; "" where it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "nodes with containers need Linux and root"
    if not Path("/dev/net/tun").exists():
        return "there is no /dev/net/tun"
    if not shutil.which("apt-get") and any(not _there(program) for program in PROGRAMS):
        return f"needs apt-get, or these programs: {', '.join(PROGRAMS)}"
    return ""


def install(packages: list[str]) -> None:
    """By apt, without starting any service."""
    print(f"installing {', '.join(packages)} ...", file=sys.stderr, flush=True)
    ours = not POLICY.exists()
    if ours:
        POLICY.write_text("#!/bin/sh\nexit 101\n")
        POLICY.chmod(0o755)
    try:
        for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *packages]):
            environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            done = subprocess.run(["apt-get", *command], env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise ClusterError(f"apt-get {command[0]}: {done.stderr.strip()[-2000:]}")
    finally:
        if ours:
            POLICY.unlink()


def _there(program: str) -> bool:
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin", "/usr/local/sbin"])
    return shutil.which(program, path=path) is not None
