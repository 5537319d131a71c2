"""Messages that an operator has set aside: one that runs is asked for them, one that has ended has left them in a file.

Made by `app.Master` for a call of a user's. What pods answer may be anything, as users' code runs in them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from nomad import setaside
from nomad.errors import InvalidRequestError, RequestError
from nomad.master.views import SetAsideView

T = TypeVar("T")

_RECORDS = TypeAdapter(list[SetAsideView], config=ConfigDict(coerce_numbers_to_str=True))
_COUNTS = TypeAdapter(dict[str, int])


class Ask(Protocol):
    """Asks the operator's pod. Raises `ConflictError` and `RequestError`."""

    async def __call__(self, method: str, **args: Any) -> Any: ...


class Asides:
    """Of one operator. Ids that are none raise `InvalidRequestError`."""

    def __init__(self, ask: Ask, folder: Path | None) -> None:
        """`folder`: what an operator that has ended left behind; None while it runs, or where nothing survives."""
        self._ask = ask
        self._left = folder / setaside.FILE if folder is not None else None

    async def records(self) -> list[SetAsideView]:
        """All of them, oldest first."""
        if self._left is not None:
            return understood(_RECORDS, await asyncio.to_thread(_read, self._left))
        found: dict[str, SetAsideView] = {}
        room, after = setaside.MOST_BYTES, "0"
        while room > 0 and len(found) <= setaside.MOST_MESSAGES:
            page = understood(_RECORDS, await self._ask("set_aside", after=after))
            if not page or page[0].id in found:  # all at once, by a pod of an earlier version
                break
            found |= {view.id: view for view in page}
            room, after = room - sum(map(_size, page)), page[-1].id
        return list(found.values())

    async def rerun(self, ids: Sequence[str] | None) -> dict[str, int]:
        """{"ran": n, "failed": n}; None runs all of them."""
        return understood(_COUNTS, await self._ask("rerun", ids=_numbers(ids)))

    async def drop(self, ids: Sequence[str] | None) -> dict[str, int]:
        """{"dropped": n}; None drops all of them."""
        numbers = _numbers(ids)
        if self._left is not None:
            return await asyncio.to_thread(_drop, self._left, numbers)
        return understood(_COUNTS, await self._ask("drop", ids=numbers))


def understood(adapter: TypeAdapter[T], reply: Any) -> T:
    """A pod's reply; users' code runs there, so that it may be anything."""
    try:
        return adapter.validate_python(reply)
    except ValidationError as exc:
        raise RequestError("the operator's process gave an answer that isn't valid", status=503) from exc


def _size(view: SetAsideView) -> int:
    return len(view.value) + sum(map(len, view.error.values()))


def _numbers(ids: Sequence[str] | None) -> list[int] | None:
    if ids is None:
        return None
    wrong = [id for id in ids if not (id.isascii() and id.isdigit() and len(id) < 20)]
    if wrong:
        raise InvalidRequestError(f"{wrong[0]!r} is no id of a message that was set aside", status=422)
    return [int(id) for id in ids]


def _read(path: Path) -> list[dict[str, Any]]:
    store = setaside.SetAside(str(path))
    try:
        return [record.as_data() for record in store.records()]
    finally:
        store.close()


def _drop(path: Path, ids: list[int] | None) -> dict[str, int]:
    store = setaside.SetAside(str(path))
    try:
        return {"dropped": store.remove(ids, {})}
    finally:
        store.close()
