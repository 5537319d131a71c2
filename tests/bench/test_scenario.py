"""Scenario files: what they may say, and what is said of one that is wrong."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from nomad.bench import runner, scenario
from nomad.bench.scenario import LinkEvent, MoveEvent, NodeEvent, RateEvent, WorkEvent
from nomad.errors import ScenarioError, TopologyError

SHIPPED = sorted((Path(__file__).parents[2] / "benchmarks" / "scenarios").glob("*.yaml"))

GOOD = """\
topology:
  nodes: {edge: {speed: 0.5}, cloud: {}}
  links: [{from: edge, to: cloud, latency: 10ms}]
pipeline:
  start: edge
  end: cloud
  rate: 100
  message_bytes: 2Ki
  operators:
    - {name: work, work: 2ms, output_bytes: 100}
duration: 1m
policies:
  - all-edge
  - {name: mine, pins: {work: cloud}}
events:
  - {at: 5s, link: edge->cloud, latency: 50ms, bandwidth: unlimited}
  - {at: 10s, node: cloud, speed: 0.5}
  - {at: 15s, node: cloud, lost: true}
  - {at: 20s, rate: 200}
  - {at: 25s, operator: work, work: 4ms}
  - {at: 30s, move: work, to: [cloud, edge], every: 2s, times: 4}
"""


def wrong(text: str) -> str:
    """What is said of it."""
    with pytest.raises(ScenarioError) as caught:
        scenario.parse(text, source="s.yaml")
    return str(caught.value)


def test_a_scenario_in_full() -> None:
    found = scenario.parse(GOOD, source="folder/s.yaml")
    form = found.form
    assert (found.name, form.duration, form.pipeline.message_bytes) == ("s", 60.0, 2048)
    assert found.operators == ("source", "work", "sink")
    assert [(policy.name, policy.pins, policy.moves) for policy in form.policies] == [
        ("all-edge", {}, False),
        ("mine", {"work": "cloud"}, False),
    ]
    link, speed, lost, rate, work, move = form.events
    assert isinstance(link, LinkEvent)
    assert (link.ends, link.latency, link.bandwidth, link.loss) == (("edge", "cloud"), 0.05, math.inf, None)
    assert isinstance(speed, NodeEvent)
    assert isinstance(lost, NodeEvent)
    assert (speed.speed, lost.lost) == (0.5, True)
    assert isinstance(rate, RateEvent)
    assert isinstance(work, WorkEvent)
    assert (rate.rate, work.work) == (200, 0.004)
    assert isinstance(move, MoveEvent)
    assert (move.to, move.every, move.times) == (("cloud", "edge"), 2.0, 4)


def test_nomad_alone_is_run_when_no_policy_is_named() -> None:
    text = GOOD.replace("policies:\n  - all-edge\n  - {name: mine, pins: {work: cloud}}\n", "")
    (policy,) = scenario.parse(text).form.policies
    assert (policy.name, policy.moves) == ("nomad", True)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("duration: 1m", "durations: 1m", "line 11, durations: unknown key 'durations'; did you mean 'duration'?"),
        ("duration: 1m", "duration: long", "line 11, duration: 'long' must be a number of seconds, or like 20ms"),
        ("duration: 1m\n", "", "line 1, duration: 'duration' is missing"),
        ("start: edge", "start: egde", "line 5, pipeline.start: 'egde' is no node of the topology; did you mean"),
        ("  rate: 100\n", "", "line 4, pipeline: say where it starts and ends, and how fast its source is: 'rate'"),
        ("work: 2ms,", "wrk: 2ms,", "line 10, pipeline.operators.0.wrk: unknown key 'wrk'; did you mean 'work'?"),
        ("name: work,", "name: sink,", "every operator needs a name of its own, and 'source' and 'sink' are taken"),
        ("output_bytes: 100", "output_bytes: 3", "line 10, pipeline.operators.0.output_bytes: input should be gr"),
        ("- all-edge", "- all-egde", "line 13, policies.0: 'all-egde' is no policy; did you mean 'all-edge'?"),
        ("pins: {work: cloud}", "pins: {wrk: cloud}", "s: the policy mine pins 'wrk', which is no operator of the"),
        ("pins: {work: cloud}", "pins: {work: sky}", "line 14, policies.1.pins.work: 'sky' is no node of the topo"),
        ("- {name: mine, pins: {work: cloud}}", "- all-edge", "line 12, policies: 'all-edge' stands there twice"),
        ("link: edge->cloud", "link: edge", "line 16, events.0.link: 'edge' is no link; write it as edge->cloud"),
        ("link: edge->cloud", "link: edge->clod", "line 16, events.0.link: 'clod' is no node of the topology"),
        ("latency: 50ms, bandwidth", "latncy: 50ms, bandwidth", "line 16, events.0.latncy: unknown key 'latncy'"),
        ("latency: 50ms, bandwidth: unlimited", "both: true", "line 16, events.0: say what changes: latency"),
        ("at: 5s, link", "at: 61s, link", "line 16, events.0: 61 s is not before the end, 60 s"),
        ("node: cloud, speed: 0.5", "node: cloud", "line 17, events.1: say what happens to the node: `speed: 0."),
        ("at: 20s, rate: 200", "at: 20s", "line 19, events.3: says nothing that happens; name one of link, node"),
        ("operator: work, work", "operator: sink, work", "s: 'sink' has no work that could change"),
        ("move: work", "move: wokr", "s: an event moves 'wokr', which is no operator of the pipeline; did you mean"),
        ("to: [cloud, edge]", "to: []", "line 21, events.5.to: must not be empty"),
        ("events:\n", "duration: 5\nevents:\n", "line 15: 'duration' stands there twice (first in line 11)"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_place(old: str, new: str, said: str) -> None:
    assert GOOD.count(old) == 1
    assert said in wrong(GOOD.replace(old, new))


def test_a_program_has_a_source_of_its_own() -> None:
    head = GOOD[: GOOD.index("pipeline:")]
    assert "give either `program: FILE` or `operators: [...]`" in wrong(f"{head}pipeline: {{}}\nduration: 1\n")
    program = f"{head}pipeline: {{program: p.py}}\nduration: 9\n"
    assert scenario.parse(program, folder=Path("/there")).program == "/there/p.py"
    assert "'message_bytes' is for synthetic pipelines" in wrong(program.replace("p.py", "p.py, message_bytes: 99"))
    assert "a program's load and work are its own" in wrong(f"{program}events: [{{at: 1, rate: 3}}]\n")


def test_a_topology_inside_a_scenario_is_checked_like_a_file_of_its_own(tmp_path: Path) -> None:
    text = GOOD.replace("speed: 0.5}, cloud: {}", "sped: 0.5}, cloud: {}")
    with pytest.raises(
        TopologyError, match=r"s.yaml, line 2, nodes.edge.sped: unknown key 'sped'; did you mean 'speed'\?"
    ):
        scenario.parse(text, source="s.yaml")
    begin, end = GOOD.index("topology:"), GOOD.index("pipeline:")
    (tmp_path / "t.yaml").write_text("nodes: {edge: {}, cloud: {}}\n")
    found = scenario.parse(GOOD[:begin] + "topology: t.yaml\n" + GOOD[end:], folder=tmp_path)
    assert [node.id for node in found.topology.nodes] == ["edge", "cloud"]
    with pytest.raises(TopologyError, match="can't read the topology file"):
        scenario.parse(GOOD[:begin] + "topology: u.yaml\n" + GOOD[end:], folder=tmp_path)
    assert "must be a map with nodes and links, or the name of a topology file" in wrong(
        GOOD[:begin] + "topology: [1]\n" + GOOD[end:]
    )


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match="can't read the scenario file"):
        scenario.load(tmp_path / "missing.yaml")
    assert "isn't valid YAML" in wrong("a: [")
    assert wrong("- 1") == "s.yaml must be a map with topology, pipeline and duration"


def test_operators_of_a_program_are_checked_once_it_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "p.py").write_text(
        "import os\noperators = [lambda: 1, abs, print]\nstart_node = 'edge'\nend_node = 'cloud'\n"
        "profile = [{'cloud_execution_time': float(os.environ['BENCH_WORK']), 'output_msg_size': 5}] * 3\n"
    )
    text = GOOD[: GOOD.index("pipeline:")]
    text += "pipeline: {program: p.py, environment: {BENCH_WORK: '0.1'}}\nduration: 9\n"
    subject = runner.Subject.of(scenario.parse(text, folder=tmp_path))
    assert [(op.name, op.work, op.output_bytes) for op in subject.shaped.operators][1:] == [
        ("abs", 0.1, 5),
        ("print", 0.1, 5),
    ]
    assert (subject.shaped.start, subject.shaped.end) == ("edge", "cloud")
    assert "BENCH_WORK" not in os.environ
    moving = scenario.parse(f"{text}events: [{{at: 1, move: bas, to: [edge]}}]\n", folder=tmp_path)
    with pytest.raises(
        ScenarioError, match="an event moves 'bas', which is no operator of the pipeline; did you mean 'abs'"
    ):
        runner.Subject.of(moving)


@pytest.mark.parametrize("path", SHIPPED, ids=[path.stem for path in SHIPPED])
def test_shipped_scenarios_are_valid(path: Path) -> None:
    found = scenario.load(path)
    assert found.form.about
    assert not found.form.pipeline.program or Path(found.program).is_file()


def test_there_are_shipped_scenarios() -> None:
    assert len(SHIPPED) >= 8


def test_the_scenario_in_the_docs_is_valid() -> None:
    text = (Path(__file__).parents[2] / "docs" / "bench.md").read_text()
    begin = text.index("```yaml\n") + len("```yaml\n")
    found = scenario.parse(text[begin : text.index("```", begin)])
    assert [policy.name for policy in found.form.policies] == ["static-best", "static-best-after", "nomad"]
