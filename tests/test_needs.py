"""Packages, variables, secrets and devices: what is valid, in which form it is kept, and what is said of the rest."""

from __future__ import annotations

import pytest

from nomad import needs
from nomad.errors import PipelineError
from nomad.pipeline import build, operator


def test_requirements_are_kept_in_one_form():
    given = ["NumPy == 2.1", "numpy==2.1", "a_b[y,x]>=1,<2 ; python_version > '3.8'"]
    assert needs.requirements(given) == ('a-b[x,y]<2,>=1; python_version > "3.8"', "numpy==2.1")
    assert needs.requirements("numpy") == ("numpy",)
    assert needs.requirements(["x.tar.gz", "a==1!2.0+c.1", "b~=1.0,!=1.2.*"]) == (
        "a==1!2.0+c.1",
        "b!=1.2.*,~=1.0",
        "x-tar-gz",
    )


def test_devices_by_name_are_one_each():
    assert needs.devices({"camera", "a"}) == {"a": 1, "camera": 1}
    assert needs.devices("camera") == {"camera": 1}
    assert needs.devices({"nvidia.com/gpu": 2}) == {"nvidia.com/gpu": 2}


@pytest.mark.parametrize(
    ("check", "value", "says"),
    [
        (needs.requirements, ["numpy=2"], "numpy==2.1"),
        (needs.requirements, ["-r x.txt"], "requirement '-r x.txt' is not valid"),
        (needs.requirements, ["a @ https://example.org/a.whl"], "has an address"),
        (needs.requirements, ["a===/../../tmp/a"], "'a===/../../tmp/a' looks like a file"),
        (needs.requirements, ["a===1@file:///a"], "looks like a file"),
        (needs.requirements, ["a==1.0+b.zip ; python_version > '3'"], "looks like a file"),
        (needs.requirements, [3], "give names"),
        (needs.requirements, 3, "give names"),
        (needs.environment, {"A": 1}, "the value of A is 1"),
        (needs.environment, {"A": "x\0"}, "must be text"),
        (needs.environment, {"1A": "x"}, "'1A' can't be the name of a variable"),
        (needs.environment, {3: "x"}, "can't be the name"),
        (needs.environment, ["A"], "give a map"),
        (needs.environment, {"NOMAD_POD": "x"}, "NOMAD_POD can't be set: names that begin with NOMAD_ or PYTHON"),
        (needs.secrets, {"PYTHONPATH": "a/b"}, "PYTHONPATH can't be set"),
        (needs.secrets, {"A": "db"}, '"db/password"'),
        (needs.secrets, {"A": "DB/password"}, "lower-case"),
        (needs.secrets, {"A": "../password"}, "but must refer"),
        (needs.secrets, {"A": "db/.."}, "but must refer"),
        (needs.secrets, {"A": "db/a/b"}, "but must refer"),
        (needs.secrets, {"A": 3}, "but must refer"),
        (needs.devices, {"camera": 0}, "1 or more"),
        (needs.devices, {"camera": True}, "1 or more"),
        (needs.devices, {"a b"}, "device 'a b' is not valid"),
        (needs.devices, {"a/b/c": 1}, "is not valid"),
        (needs.devices, 3, "give names"),
    ],
)
def test_what_is_not_valid(check, value, says):
    with pytest.raises(PipelineError) as caught:
        check(value)
    assert says in str(caught.value)


def test_options_reach_the_specification():
    def fn(x):
        return x

    asked = operator(
        requirements=["numpy==2.1"], environment={"A": "b"}, secrets={"P": "db/password"}, devices={"camera"}
    )(fn)
    spec = build([dict, asked]).operators[1].spec
    assert spec.requirements == ("numpy==2.1",)
    assert (spec.environment, spec.secrets, spec.devices) == ({"A": "b"}, {"P": "db/password"}, {"camera": 1})
    with pytest.raises(PipelineError, match="operator 'fn' .position 2 of 2.: A stands in environment and in secrets"):
        build([dict, operator(asked, secrets={"A": "db/password"})])


def test_what_a_node_offers():
    wanted = {"camera": 1, "nvidia.com/gpu": 2}
    assert needs.device_labels(wanted) == {"device camera", "2 devices nvidia.com/gpu"}
    assert needs.offered(wanted, {"camera": 1, "nvidia.com/gpu": 1}) == {"device camera"}
