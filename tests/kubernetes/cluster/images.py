"""Images for the real cluster, made on this machine: none can be pulled.

`pause` and `toolbox` are one static program each. `base` is what the repository's Dockerfiles build on, from
debootstrap, under the name that their FROM says. `build` runs images/build.sh with a dockerd of its own, which runs no
longer than that and leaves the machine's network alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.kubernetes.cluster.binaries import build as build_program
from tests.kubernetes.cluster.binaries import cache
from tests.kubernetes.cluster.machine import TREE
from tests.kubernetes.cluster.node import PAUSE, remove, unmount_below
from tests.kubernetes.cluster.processes import ClusterError, Processes

SOURCES = Path(__file__).resolve().parent
TOOLBOX = "nomad.dev/toolbox:1"
"""For tests of the cluster itself: serves and gets."""
BASE = "python:3.11-slim-bookworm"
RELEASE = "bookworm"
PACKAGES = ("ca-certificates", "netbase", "tzdata", "python3", "python3-pip", "python3-venv")
UNUSED = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "var/cache/apt", "var/lib/apt/lists")
CERTIFICATES = "etc/ssl/certs/ca-certificates.crt"
BASE_CHANGES = (
    "ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin",
    "ENV LANG=C.UTF-8",
    f"ENV SSL_CERT_FILE=/{CERTIFICATES}",
    'CMD ["python3"]',
)


def pause() -> Path:
    """An archive with the image `PAUSE`."""
    source = SOURCES / "pause.c"
    program = cache() / "pause" / hashlib.sha256(source.read_bytes()).hexdigest()[:12]
    if not program.exists():
        program.parent.mkdir(parents=True, exist_ok=True)
        run(["gcc", "-static", "-Os", "-s", "-o", str(program.with_suffix(".partial")), str(source)])
        program.with_suffix(".partial").replace(program)
    return archive(program.with_suffix(".tar"), PAUSE, {"pause": program}, ["/pause"])


def toolbox() -> Path:
    """An archive with the image `TOOLBOX`."""
    program = build_program("toolbox")
    return archive(program.with_suffix(".tar"), TOOLBOX, {"toolbox": program}, ["/toolbox"])


def archive(path: Path, name: str, files: Mapping[str, Path], command: Sequence[str]) -> Path:
    """An OCI archive with one image of one layer, at `path`."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        for target, source in files.items():
            entry = tarfile.TarInfo(target)
            entry.mode, entry.size = 0o755, source.stat().st_size
            with source.open("rb") as program:
                tar.addfile(entry, program)
    blobs: dict[str, bytes] = {}

    def blob(kind: str, content: bytes) -> dict[str, object]:
        digest = hashlib.sha256(content).hexdigest()
        blobs[f"blobs/sha256/{digest}"] = content
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": f"sha256:{digest}", "size": len(content)}

    stored = blob("layer.v1.tar", layer.getvalue())
    config = {
        "architecture": {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine],
        "os": "linux",
        "config": {"Entrypoint": list(command)},
        "rootfs": {"type": "layers", "diff_ids": [stored["digest"]]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": blob("config.v1+json", json.dumps(config).encode()),
        "layers": [stored],
    }
    reference = {
        **blob("manifest.v1+json", json.dumps(manifest).encode()),
        "annotations": {"io.containerd.image.name": name},
    }
    blobs["index.json"] = json.dumps({"schemaVersion": 2, "manifests": [reference]}).encode()
    blobs["oci-layout"] = b'{"imageLayoutVersion": "1.0.0"}'
    with tarfile.open(path.with_suffix(".partial"), "w") as tar:
        for target, content in blobs.items():
            entry = tarfile.TarInfo(target)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    path.with_suffix(".partial").replace(path)
    return path


def base() -> Path:
    """The root of `BASE` as a tar archive, for `docker import`; a minute the first time."""
    path = cache() / "base" / f"{RELEASE}.tar"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        root = Path(folder) / "root"
        run(["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", RELEASE, str(root), mirror()])
        settle(root)
        run(["tar", "--numeric-owner", "-C", str(root), "-cf", str(path.with_suffix(".partial")), "."])
    path.with_suffix(".partial").replace(path)
    return path


def mirror() -> str:
    """Where this machine gets Debian's packages from."""
    listed = run(["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]).split()
    return next((address for address in listed if "security" not in address), "http://deb.debian.org/debian")


def settle(root: Path) -> None:
    """Make of a Debian what the official image of Python is, as far as Dockerfiles see it; with this machine's CAs."""
    for name in UNUSED:
        shutil.rmtree(root / name, ignore_errors=True)
        (root / name).mkdir(parents=True)
    (root / "var/cache/apt/archives/partial").mkdir(parents=True)
    (root / "var/lib/apt/lists/partial").mkdir(parents=True)
    for marker in root.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
        marker.unlink()
    for name, target in (("python", "/usr/bin/python3"), ("python3", "/usr/bin/python3"), ("pip", "/usr/bin/pip3")):
        (root / "usr/local/bin" / name).symlink_to(target)
    shutil.copyfile(f"/{CERTIFICATES}", root / CERTIFICATES)
    for configuration in ("etc/pip.conf", "etc/apt/sources.list"):
        if Path(f"/{configuration}").exists():
            shutil.copyfile(f"/{configuration}", root / configuration)


@contextmanager
def docker() -> Iterator[dict[str, str]]:
    """A dockerd that has `BASE`; what is given is the environment in which `docker` talks to it."""
    folder = cache() / "docker"
    folder.mkdir(parents=True, exist_ok=True)
    run_folder = Path(f"/run/nmk-docker-{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}")
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        processes = Processes(folder / "processes.json", folder)
        processes.stop_all()
        clear(run_folder)
        address = f"unix://{run_folder}/docker.sock"
        environment = {**os.environ, "DOCKER_HOST": address, "DOCKER_BUILDKIT": "0"}
        limits = ("--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false")
        places = [f"--data-root={folder / 'data'}", f"--exec-root={run_folder}/exec", f"--pidfile={run_folder}/pid"]
        processes.start("dockerd", ["dockerd", f"--host={address}", *places, *limits])
        try:
            processes.wait("dockerd", lambda: answers(environment), "until it answers")
            if not run(["docker", "images", "--quiet", BASE], environment).strip():
                changes = [word for change in BASE_CHANGES for word in ("--change", change)]
                run(["docker", "import", *changes, str(base()), BASE], environment)
            yield environment
        finally:
            processes.stop_all()
            clear(run_folder)


def clear(folder: Path) -> None:
    """Remove a folder of dockerd's, with the network namespace that it keeps there."""
    unmount_below(folder)
    remove(folder)


NOMAD = ("--extras", "examples")
"""The arguments of images/build.sh for the images that the tests use."""


def build(*arguments: str, tag: str = "dev") -> Path:
    """The repository's images, built by its own script with these arguments, as a `docker save` archive."""
    path = cache() / "images" / f"nomad-{tag}.tar"
    path.parent.mkdir(parents=True, exist_ok=True)
    with docker() as environment:
        make(environment, "--tag", tag, *arguments)
        names = run(["docker", "images", "--format", "{{.Repository}}:{{.Tag}}"], environment).split()
        built = [name for name in names if name.startswith(("nomad-master:", "nomad-operator:")) and tag in name]
        run(["docker", "save", "-o", str(path.with_suffix(".partial")), *built], environment)
    path.with_suffix(".partial").replace(path)
    return path


def warm_up() -> None:
    """Build what the tests use, so that a test that needs it finds all steps in docker's cache."""
    with docker() as environment:
        make(environment, *NOMAD)


def make(environment: Mapping[str, str], *arguments: str) -> None:
    command = [str(TREE / "images" / "build.sh"), "--network", "host", *arguments]
    print(f"building images: {' '.join(command)}", file=sys.stderr, flush=True)
    run(command, environment)
    run(["docker", "image", "prune", "--force", "--filter", "until=24h"], environment)


def answers(environment: Mapping[str, str]) -> bool:
    return subprocess.run(["docker", "version"], env=environment, capture_output=True, check=False).returncode == 0


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """What a command prints. Raises `ClusterError` with the end of what it said."""
    done = subprocess.run(list(command), env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stdout + done.stderr).strip()[-3000:]
        raise ClusterError(f"`{' '.join(command)}` failed:\n{said}")
    return done.stdout
