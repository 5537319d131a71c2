"""`nomad export`: what it prints is what was submitted."""

from __future__ import annotations

import base64
import hashlib

import pytest
import yaml

from nomad import bundle, credentials
from nomad.errors import BundleTampered
from nomad.master.kube import resource
from tests.cli.conftest import Nomad
from tests.master.facade import SIGNING_KEY

PROGRAM = """
def numbers():
    return 1

def square(x):
    return x * x

operators = [numbers, square, print]
"""


@pytest.fixture
def submitted(nomad: Nomad) -> Nomad:
    path = nomad.folder / "program.py"
    path.write_text(PROGRAM)
    nomad("submit", path, "--start", "edge", "--end", "cloud", "--id", "Test_1", "--pin", "square=edge")
    return nomad


def _bundle(objects: list[resource.Json]) -> bytes:
    return b"".join(base64.b64decode(item["data"]["bundle"]) for item in objects[:-1])


def test_what_is_printed_can_be_applied(submitted: Nomad) -> None:
    *secrets, pipeline = objects = list(yaml.safe_load_all(submitted.out("export", "Test_1", "-n", "elsewhere")))
    assert {item["metadata"]["namespace"] for item in objects} == {"elsewhere"}
    assert [item["kind"] for item in secrets] == ["Secret"]
    found = bundle.read(_bundle(objects), bundle.public_key(SIGNING_KEY))
    assert pipeline["spec"]["bundle"] == found.digest
    assert resource.spec(pipeline) == found.spec("Test_1", "edge", "cloud")
    assert pipeline["spec"]["pins"] == {"square": "edge"}
    assert "finalizers" not in pipeline["metadata"]
    assert secrets[0]["metadata"]["annotations"]["nomad.dev/sha256"] == hashlib.sha256(_bundle(objects)).hexdigest()


def test_as_one_list(submitted: Nomad) -> None:
    found = submitted.json("export", "Test_1")
    assert (found["kind"], [item["kind"] for item in found["items"]]) == ("List", ["Secret", "Pipeline"])


def test_for_another_cluster_it_is_signed_again(submitted: Nomad) -> None:
    assert "no signing key is known for http://other:30000" in submitted.error(
        "export", "Test_1", "--for", "http://other:30000", code=2
    )
    other = bundle.new_signing_key()
    credentials.save("http://other:30000", "token", other)
    objects = submitted.json("export", "Test_1", "--for", "http://other:30000")["items"]
    own = submitted.json("export", "Test_1")["items"]
    assert bundle.read(_bundle(objects), bundle.public_key(other)).digest == objects[-1]["spec"]["bundle"]
    assert objects[-1] == own[-1]
    with pytest.raises(BundleTampered):
        bundle.read(_bundle(objects), bundle.public_key(SIGNING_KEY))


def test_a_pipeline_that_is_not_there(nomad: Nomad) -> None:
    assert "nowhere" in nomad.error("export", "nowhere", code=5)
