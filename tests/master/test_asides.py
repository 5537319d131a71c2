"""Messages set aside, as the master gets them: part by part, from a pod that may say anything, or from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nomad import setaside
from nomad.delivery.frames import Position
from nomad.errors import InvalidRequestError, RequestError
from nomad.master.asides import Asides

ERROR = {"type": "ValueError", "message": "no", "traceback": "T"}


def record(id: int, value: bytes = b"v") -> dict[str, Any]:
    return {"id": id, "time": 2.0, "error": ERROR, "attempts": 1, "value": value}


class Pod:
    """Answers as `pages` say, by the id after which they begin."""

    def __init__(self, pages: Any) -> None:
        self.pages = pages
        self.asked: list[tuple[str, dict[str, Any]]] = []

    async def __call__(self, method: str, **args: Any) -> Any:
        self.asked.append((method, args))
        return self.pages(int(args["after"])) if method == "set_aside" else {"dropped": 1}


async def test_they_come_part_by_part() -> None:
    pod = Pod(lambda after: [record(id) for id in range(after + 1, min(after + 3, 6))])
    assert [view.id for view in await Asides(pod, None).records()] == ["1", "2", "3", "4", "5"]
    assert [args["after"] for _, args in pod.asked] == ["0", "2", "4", "5"]


async def test_a_pod_of_an_earlier_version_tells_all_at_once() -> None:
    pod = Pod(lambda after: [record(1), record(2)])
    assert [view.id for view in await Asides(pod, None).records()] == ["1", "2"]


@pytest.mark.parametrize(("most", "size"), [("MOST_MESSAGES", 0), ("MOST_BYTES", 10)])
async def test_a_pod_that_never_comes_to_an_end_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, most: str, size: int
) -> None:
    monkeypatch.setattr(setaside, most, 50)
    pod = Pod(lambda after: [record(after + 1, bytes(size))])
    assert len(await Asides(pod, None).records()) <= 51


@pytest.mark.parametrize("answer", [None, [1], [{"id": []}], {"records": []}])
async def test_what_isnt_an_answer_is_said_to_be_none(answer: Any) -> None:
    with pytest.raises(RequestError, match="isn't valid"):
        await Asides(Pod(lambda after: answer), None).records()


async def test_one_that_has_ended_left_them_in_a_file(tmp_path: Path) -> None:
    store = setaside.SetAside(str(tmp_path / setaside.FILE))
    for number in range(3):
        store.add(0, Position(number), b"v%d" % number, ERROR, 1)
    store.close()
    pod = Pod(lambda after: [])
    asides = Asides(pod, tmp_path)
    first, *others = await asides.records()
    assert (first.id, first.value, len(others)) == ("1", b"v0", 2)
    assert await asides.drop(["1"]) == {"dropped": 1}
    assert await asides.drop(None) == {"dropped": 2}
    assert await asides.records() == []
    assert not pod.asked


async def test_ids_that_are_none() -> None:
    asides = Asides(Pod(lambda after: []), None)
    for ids in (["1", "x"], ["-1"], ["1" * 20]):
        with pytest.raises(InvalidRequestError, match="is no id"):
            await asides.drop(ids)
    assert await asides.drop(["1"]) == {"dropped": 1}
