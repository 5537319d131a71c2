from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from nomad import topology
from nomad.control import Shape
from nomad.errors import TopologyError

GOOD = """
nodes:
  edge: {speed: 0.25, cores: 2, memory: 2Gi, labels: [camera], arch: arm64, devices: {camera: 1}}
  fog: {memory: 512}
  cloud:
links:
  - {from: edge, to: fog, latency: 5ms, both: false}
  - {from: fog, to: edge, latency: 0.01, both: false}
  - {from: edge, to: cloud, latency: 20ms, jitter: 2ms, bandwidth: 100Mbit, loss: 0.01}
"""


def test_a_file_becomes_nodes_and_directed_links(tmp_path: Path) -> None:
    path = tmp_path / "topology.yaml"
    path.write_text(GOOD)
    found = topology.load(path)
    edge, fog, cloud = found.nodes
    assert (edge.id, edge.speed, edge.cores, edge.memory_mb, edge.labels, edge.arch) == (
        "edge",
        0.25,
        2,
        2048,
        frozenset({"camera"}),
        "arm64",
    )
    assert edge.devices == {"camera": 1}
    assert (fog.speed, fog.memory_mb) == (1.0, 512)
    assert cloud.cores == os.cpu_count()
    assert cloud.memory_mb > 0
    assert {(link.source, link.target): link.shape for link in found.links} == {
        ("edge", "fog"): Shape(latency=0.005),
        ("fog", "edge"): Shape(latency=0.01),
        ("edge", "cloud"): Shape(0.02, 0.002, 12.5e6, 0.01),
        ("cloud", "edge"): Shape(0.02, 0.002, 12.5e6, 0.01),
    }


def test_the_two_directions_of_a_link_do_not_share_a_shape() -> None:
    there, back = topology.parse("nodes: {a: , b: }\nlinks: [{from: a, to: b}]").links
    assert there.shape is not back.shape


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must be a map"),
        ("[]", "must be a map"),
        ("nodes: [a", "isn't valid YAML"),
        ("nodes: {}", "line 1, nodes: declare at least one node"),
        ("links: []", "'nodes' is missing"),
        ("nodes: {a: }\nlinkz: []", "line 2, linkz: unknown key 'linkz'; did you mean 'links'"),
        ("nodes:\n  a: {sped: 3}", "line 2, nodes.a.sped: unknown key 'sped'; did you mean 'speed'"),
        ("nodes:\n  a: {qqq: 3}", "known: speed, cores, memory, labels, arch, devices"),
        ("nodes: {a: {speed: 0}}", "nodes.a.speed: input should be greater than 0"),
        ("nodes: {a: {speed: .inf}}", "finite"),
        ("nodes: {a: {memory: lots}}", "or like 256Mi"),
        ("nodes: {a: {devices: {camera: 0}}}", "nodes.a.devices: devices: camera is 0"),
        ("nodes: {a: {labels: gpu}}", "nodes.a.labels: must be a list"),
        ("nodes: {a: 3}", "nodes.a: must be a map"),
        ("nodes: {1: }", "put it in quotes"),
        ('nodes: {"a b": }', "'a b' is no name for a node"),
        ('nodes: {"": }', "is no name for a node"),
        ("nodes:\n  a:\n  a:", "line 3: 'a' stands there twice (first in line 2)"),
        ("nodes: &n {a: *n}", "unknown key 'a'"),
        ("? [a]\n: 3", "a key must be text"),
        ("nodes: {a: , b: }\nlinks: [{from: a, to: b, latency: -5ms}]", "line 2, links.0.latency: .*or equal to 0"),
        ("nodes: {a: , b: }\nlinks: [{from: a, to: b, latency: 5 parsecs}]", "unknown unit 'parsecs'"),
        ("nodes: {a: , b: }\nlinks: [{from: a, to: b, loss: 1}]", "links.0.loss: input should be less than 1"),
        ("nodes: {a: , b: }\nlinks: [{from: a, to: b, bandwidth: 0}]", "links.0.bandwidth: .*greater than 0"),
        ("nodes: {a: , b: }\nlinks: [{from: a, to: b, jitter: 2ms}]", "can't be more than latency"),
        ("nodes: {a: , b: }\nlinks: [{from: a}]", "'to' is missing"),
        ("nodes: {a: , b: }\nlinks: [{from: a, to: bb}]", "leads to 'bb', which is no node.*did you mean 'b'"),
        ("nodes: {a: , b: }\nlinks: [{from: a, to: xyz}]", "known nodes: a, b"),
        ("nodes: {a: }\nlinks: [{from: a, to: a}]", "to itself"),
        ("nodes: {a: , b: }\nlinks: [{from: a, to: b}, {from: b, to: a}]", "declares b to a again"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(text: str, said: str) -> None:

    with pytest.raises(TopologyError) as caught:
        topology.parse(text, source="my.yaml")
    assert str(caught.value).startswith("my.yaml")
    assert re.search(said.replace("(", r"\(").replace(")", r"\)"), str(caught.value))


@pytest.mark.no_cover
@pytest.mark.parametrize("deep", ["[" * 1000 + "]" * 1000, "{a: " * 1000 + "}" * 1000, "- " * 1000])
def test_what_is_nested_too_deeply(deep: str) -> None:
    with pytest.raises(TopologyError, match=r"^deep\.yaml nests lists or maps too deeply to be read$"):
        topology.parse(deep, source="deep.yaml")


def test_all_problems_are_listed_at_once() -> None:
    with pytest.raises(TopologyError) as caught:
        topology.parse("nodes: {a: {speed: -1, cores: 0}}")
    assert len(str(caught.value).splitlines()) == 2


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(TopologyError, match=r"can't read the topology file .*nowhere\.yaml: No such file"):
        topology.load(tmp_path / "nowhere.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TopologyError, match="isn't UTF-8"):
        topology.load(tmp_path / "binary.yaml")


def test_nodes_by_name() -> None:
    found = topology.from_names(["edge", "cloud"])
    assert [node.id for node in found.nodes] == ["edge", "cloud"]
    assert found.links == ()


@pytest.mark.parametrize(("names", "said"), [([], "at least one"), (["a", "a"], "named twice"), (["-a"], "no name")])
def test_bad_names(names: list[str], said: str) -> None:
    with pytest.raises(TopologyError, match=said):
        topology.from_names(names)
