"""The first version's synchronous calls, as scripts make them and from a running loop."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterator
from typing import Any

import pytest

import nomad
from nomad import compat, credentials
from nomad.errors import MasterUnreachable, NotFoundError, UsageError
from tests.master.facade import SIGNING_KEY, TOKEN, FakeMaster, serve_in_thread


def numbers() -> int:
    return 4


def square(x: int) -> int:
    return x * x


OPERATORS = [numbers, square]


@pytest.fixture
def conn(master: FakeMaster) -> Iterator[str]:
    """The address of a master that is served by another thread, as scripts have none of their own."""
    with serve_in_thread(master) as url:
        credentials.save(url, TOKEN, SIGNING_KEY)
        yield url


def test_the_program_of_the_readme(conn: str) -> None:
    ids = nomad.submit_pipeline(OPERATORS, "edge", "cloud", "test", connection_str=conn)
    assert ids == ["test.numbers", "test.square"]


def test_the_older_forms_of_submit(conn: str) -> None:
    profile = [{"cloud_execution_time": 0.1, "output_msg_size": 8}, {"cloud_execution_time": 0.2, "output_msg_size": 9}]
    assert nomad.submit_pipeline(OPERATORS, "edge", "cloud", "a", conn) == ["a.numbers", "a.square"]
    assert nomad.submit_pipeline(OPERATORS, "edge", "cloud", "b", master_conn_str=conn, profile=profile)
    assert nomad.submit_pipeline(OPERATORS, "edge", "cloud", "c", conn, profile)
    assert nomad.get_pipeline_profiling("a", conn) == {"a.numbers": {}, "a.square": {}}
    assert nomad.get_pipeline_profiling("b", conn) == {"b.numbers": profile[0], "b.square": profile[1]}
    assert nomad.get_pipeline_profiling("c", conn) == {"c.numbers": profile[0], "c.square": profile[1]}


def test_the_address_is_found(conn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOMAD_MASTER", conn)
    assert nomad.get_nodes() == ["edge", "fog", "cloud"]


def test_two_addresses_are_one_too_many() -> None:
    with pytest.raises(UsageError, match="two names for one thing"):
        nomad.get_nodes("http://a:1", master_conn_str="http://b:1")


def test_nodes(conn: str) -> None:
    assert nomad.get_nodes(conn) == ["edge", "fog", "cloud"]
    profile = nomad.get_node_profiling(conn)
    assert profile["edge"] == {"C": 1.0, "architecture": "x86_64"}
    profile["edge"]["C"] = 0.1
    nomad.update_node_profiling(profile, conn)
    assert nomad.get_node_profiling(master_conn_str=conn)["edge"]["C"] == 0.1


def test_links(conn: str) -> None:
    before = nomad.get_network_profiling(conn)
    assert {"from": "edge", "to": "cloud", "latency": 0.0, "bandwidth": None} in before
    link = {"from": "edge", "to": "cloud", "bandwidth": 20000.0, "latency": 0.4}
    nomad.update_network_profiling([link], conn)
    assert link in nomad.get_network_profiling(conn)
    nomad.update_network_profiling([{"from": "edge", "to": "cloud", "latency": 0.1}], conn)
    assert {**link, "latency": 0.1} in nomad.get_network_profiling(conn)
    nomad.update_network_profiling(before, conn)
    assert nomad.get_network_profiling(conn) == before


def test_profile_of_a_pipeline(conn: str) -> None:
    nomad.submit_pipeline(OPERATORS, "edge", "cloud", "123", conn)
    nomad.update_pipeline_profiling("123", {"123.square": {"cloud_execution_time": 2}}, conn)
    nomad.update_pipeline_profiling("123", {"123.square": {"output_msg_size": 3}}, conn)
    assert nomad.get_pipeline_profiling("123", conn) == {
        "123.numbers": {},
        "123.square": {"cloud_execution_time": 2.0, "output_msg_size": 3.0},
    }


def test_last_output(conn: str, master: FakeMaster) -> None:
    first, last = nomad.submit_pipeline(OPERATORS, "edge", "cloud", "test", conn)
    assert nomad.get_last_output(last, conn) is None
    master.emit("test", "square", 16)
    assert nomad.get_last_output(last, conn) == 16
    assert nomad.get_last_output(first, conn) is None


def test_nothing_is_changed_by_halves(conn: str) -> None:
    nomad.submit_pipeline(OPERATORS, "edge", "cloud", "test", conn)
    nodes, links = nomad.get_node_profiling(conn), nomad.get_network_profiling(conn)
    with pytest.raises(NotFoundError, match="there is no node 'moon'; known are 'cloud', 'edge', 'fog'"):
        nomad.update_node_profiling({"edge": {"C": 2}, "moon": {"C": 1}}, conn)
    with pytest.raises(UsageError, match="lacks its speed, 'C'"):
        nomad.update_node_profiling({"edge": {"C": 2}, "fog": {}}, conn)
    with pytest.raises(NotFoundError, match="there is no link"):
        nomad.update_network_profiling([{"from": "edge", "to": "fog", "latency": 1}, {"from": "edge", "to": "x"}], conn)
    with pytest.raises(UsageError, match="lacks one"):
        nomad.update_network_profiling([{"from": "edge"}], conn)
    with pytest.raises(NotFoundError, match="there is no operator 'test.cube'"):
        nomad.update_pipeline_profiling("test", {"test.cube": {}}, conn)
    assert (nomad.get_node_profiling(conn), nomad.get_network_profiling(conn)) == (nodes, links)


@pytest.mark.parametrize("id", ["square", 5, None])
def test_an_id_that_is_none(conn: str, id: Any) -> None:
    with pytest.raises(UsageError, match=f"looks like pipeline.name, not {id!r}"):
        nomad.get_last_output(id, conn)


def test_no_master() -> None:
    with pytest.raises(MasterUnreachable, match="nomad up") as caught:
        nomad.submit_pipeline(OPERATORS, "edge", "cloud", "test", connection_str="http://127.0.0.1:9")
    shown = "".join(traceback.format_exception(caught.value))
    assert "asyncio" not in shown, "the message is what a script shows, not our libraries' frames"
    assert "aiohttp" not in shown


async def test_from_a_running_loop(conn: str) -> None:
    assert nomad.get_nodes(conn) == ["edge", "fog", "cloud"]
    with pytest.raises(MasterUnreachable):
        nomad.get_nodes("http://127.0.0.1:9")


def test_every_call_is_public_and_described() -> None:
    calls = {
        name for name, value in vars(compat).items() if inspect.isfunction(value) and value.__module__ == "nomad.compat"
    }
    public = {name for name in calls if not name.startswith("_")}
    assert public <= set(nomad.__all__)
    assert len(public) == 9
    for name in public:
        assert getattr(nomad, name).__doc__
