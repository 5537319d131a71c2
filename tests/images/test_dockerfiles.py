"""What images are built from: pinned, small, for an unprivileged user. And the scripts say what is wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "images"
ROLES = ("master", "operator")
SERVED = ("nomad.actor.host", "nomad.delivery.relay", "nomad.measure.node")
"""What the operator image is for."""
SCRIPTS = sorted(str(path.relative_to(ROOT)) for path in IMAGES.rglob("*.sh") if path.name != "common.sh")


def listed(path: Path) -> list[str]:
    """The lines of a file of requirements."""
    return [line for line in path.read_text().splitlines() if line and not line.startswith("#")]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("role", ROLES)
def test_an_image_runs_as_an_unprivileged_user_from_a_pinned_base_with_pinned_packages(role: str) -> None:
    lines = re.sub(r"\\\n", " ", (IMAGES / f"Dockerfile.{role}").read_text()).splitlines()
    assert "ARG BASE=python:${PYTHON}-slim-bookworm" in lines
    assert [line.split()[1] for line in lines if line.startswith("FROM ")] == ["${BASE}", "${BASE}"]
    final = lines[max(index for index, line in enumerate(lines) if line.startswith("FROM ")) :]
    assert "USER 10001:10001" in final
    assert not [line for line in final if "PIP_" in line], "what pip is told is in the image"
    assert all(line.startswith("CMD [") for line in final if line.startswith(("CMD", "ENTRYPOINT"))), "not exec form"
    for line in lines:
        if " pip install " in line:
            assert "--constraint" in line or "--no-deps" in line
        assert not re.search(r"amd64|arm64|x86_64|aarch64", line)


def test_every_package_has_one_exact_version() -> None:
    constraints = listed(IMAGES / "constraints.txt")
    assert all(re.match(r"[a-z0-9.-]+==[^ ]+( ; |$)", line) for line in constraints)
    pinned = {line.split("==")[0] for line in constraints}
    setup = run(sys.executable, "images/extras.py", "bench,examples,scheduler")
    assert setup.returncode == 0
    asked = [re.split(r"[<>=!~;\[ ]", line)[0] for line in setup.stdout.splitlines() + listed(IMAGES / "operator.txt")]
    assert {normal(name) for name in asked} <= pinned, "images/lock.sh is to be run"


def test_an_unknown_extra_is_named() -> None:
    done = run(sys.executable, "images/extras.py", "example")
    assert done.returncode == 1
    assert "no extra 'example'; there are bench, dev, examples" in done.stderr


def test_the_operator_image_has_what_its_processes_import() -> None:
    """And nothing else; the modules are those that it says it serves."""
    program = f"import sys, {', '.join(SERVED)}; print(*{{name.split('.')[0] for name in sys.modules}})"
    imported = run(sys.executable, "-c", program).stdout.split()
    installed = packages_distributions()
    foreign = {normal(name) for module in imported for name in installed.get(module, ())} - {"nomad"}
    asked = {normal(name) for name in listed(IMAGES / "operator.txt")}
    brought = {"cffi", "pycparser", "setuptools", "coverage", "pytest-cov"}  # by those, or by the tests themselves
    assert foreign - brought <= asked
    later = {"numpy", "packaging", "uvloop"}  # for arrays; when an agent is asked for packages; where it is there
    assert asked <= foreign | later


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_says_what_it_does_and_what_it_does_not_know(script: str) -> None:
    told = run("sh", script, "--help")
    assert (told.returncode, told.stderr) == (0, "")
    assert len(told.stdout.splitlines()) > 2
    assert "set -eu" not in told.stdout
    refused = run("sh", script, "--nonsense")
    assert refused.returncode == 2
    assert "unknown argument --nonsense (try --help)" in refused.stderr
    assert os.access(ROOT / script, os.X_OK)


def test_building_without_docker_is_an_error_that_says_so(tmp_path: Path) -> None:
    done = run("sh", "images/build.sh", DOCKER="docker-that-is-not-there")
    assert (done.returncode, done.stderr) == (1, "build.sh: docker-that-is-not-there isn't installed\n")


def test_what_is_built_and_pushed(tmp_path: Path) -> None:
    """By what docker is asked to do: no image is built here."""
    docker = tmp_path / "docker"
    docker.write_text('#!/bin/sh\n[ "$1" = buildx ] && exit 1\necho "$@" >> "$(dirname "$0")/asked"\n')
    docker.chmod(0o755)
    arguments = ["--python", "3.11,3.13", "--extras", "examples", "--tag", "1", "--repository", "example.com/me/"]
    done = run("sh", "images/build.sh", *arguments, "--push", DOCKER=str(docker), PIP_INDEX_URL="https://example.com/i")
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "asked").read_text().splitlines()[1:]
    index = "--build-arg PIP_INDEX_URL"
    assert [line for line in asked if line.startswith("push")] == [
        "push example.com/me/nomad-master:1",
        "push example.com/me/nomad-operator:1-py3.11",
        "push example.com/me/nomad-operator:1-py3.13",
    ]
    builds = [line for line in asked if line.startswith("build ")]
    assert builds[0] == (
        f"build --file images/Dockerfile.master --build-arg PYTHON=3.11 --tag example.com/me/nomad-master:1 {index} ."
    )
    assert builds[2] == (
        "build --file images/Dockerfile.operator --build-arg PYTHON=3.13 --tag example.com/me/nomad-operator:1-py3.13 "
        f"--build-arg EXTRAS=examples {index} ."
    )
    assert not [line for line in asked if "example.com/i" in line.replace("example.com/me", "")]
