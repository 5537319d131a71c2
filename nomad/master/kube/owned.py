"""What goes with a Pipeline, in objects that it owns: the key of its links, and its past. A part of `store`.

The key of x lies in the Secret x-link. Past moves, counters, failures and last outputs lie in the ConfigMap x-history
(packed by `past`), and while this master leads in `Held` as well: what couldn't be written down at once is written
with what comes next. Either may be gone or damaged without the pipeline being lost.
"""

from __future__ import annotations

import base64
import logging
import secrets
from contextlib import suppress

from nomad.control import PodStats
from nomad.errors import ApiNotFound, StateError
from nomad.kubernetes import paths
from nomad.kubernetes.api import Api
from nomad.master.kube import resource
from nomad.master.kube.changes import ordered
from nomad.master.kube.objects import Held, Pipelines, belongs, body_of, foreign, owner
from nomad.master.kube.past import PastOperator, pack, unpack
from nomad.master.kube.resource import Json
from nomad.master.kube.writes import LOOP, Writes
from nomad.master.store import StoredOperator
from nomad.master.views import MoveView

log = logging.getLogger(__name__)

LINK_KEY = "key"


class Owned:
    """The Secrets and ConfigMaps of all Pipelines. Everything that asks the API may raise `StateError`."""

    def __init__(self, api: Api, namespace: str, writes: Writes, pipelines: Pipelines) -> None:
        self._api = api
        self._namespace = namespace
        self._writes = writes
        self._pipelines = pipelines

    async def make(self, held: Held, key: bytes, patience: float) -> None:
        """Those of a new pipeline: its key, and no past. Somebody else's are left alone, which raises."""
        await self._write_key(held, key, patience)
        if not await self._pipelines.clear(self._history_path(held), patience):
            raise foreign("ConfigMap", self._history_path(held))

    async def clear(self, held: Held) -> None:
        """Have none of them there any more; somebody else's stay."""
        for path in (self._history_path(held), self._link_path(held)):
            if not await self._pipelines.clear(path, LOOP):
                log.warning("%s isn't Nomad's, and stays", path)

    # The key

    async def read_key(self, held: Held) -> bytes:
        """With a new one in the place of one that is gone."""
        try:
            found = await self._writes.patiently(lambda: self._api.get(self._link_path(held)), LOOP)
            if belongs(found, held) and (text := (found.get("data") or {}).get(LINK_KEY)):
                return base64.b64decode(text)
        except ApiNotFound:
            pass
        log.error("the link key of %s is gone: its pods have to be restarted to speak to new ones", held.id)
        key = secrets.token_bytes(32)
        try:
            await self._write_key(held, key, LOOP)
        except StateError as exc:
            if not self._writes.is_about_one(exc):
                raise
            log.error("and the next master will have to make another one: %s", exc)
        return key

    async def _write_key(self, held: Held, key: bytes, patience: float) -> None:
        data = {LINK_KEY: base64.b64encode(key).decode()}
        body = body_of("Secret", f"{held.name}-link", owner(held)) | {"type": "Opaque", "data": data}
        await self._pipelines.replace(paths.secrets(self._namespace), body, patience)

    def _link_path(self, held: Held) -> str:
        return paths.secrets(self._namespace, f"{held.name}-link")

    # The past

    async def read_past(self, held: Held) -> None:
        """To what is known of the pipeline; without one that can't be read."""
        try:
            found = await self._writes.patiently(lambda: self._api.get(self._history_path(held)), LOOP)
            if belongs(found, held):
                held.written = dict(found.get("binaryData") or {})
                moves, held.past = unpack(held.written)
                held.past_moves = {view.id: view for view in moves}
        except ApiNotFound:
            pass
        except StateError as exc:
            if not self._writes.is_about_one(exc):
                raise
            log.error("pipeline %s goes on without its past: %s", held.id, exc)

    async def keep_operator(self, held: Held, operator: StoredOperator) -> None:
        """Counters and failure of what of it has ended."""
        past = PastOperator(operator.totals, operator.failure)
        if held.past.get(operator.name, PastOperator(PodStats())) != past:
            held.past, held.behind = held.past | {operator.name: past}, True
        await self._write_past(held, LOOP)

    async def keep_moves(self, held: Held, moves: dict[str, MoveView], patience: float) -> None:
        """These by their ids, and no others."""
        if moves != held.past_moves:
            held.past_moves, held.behind = moves, True
        await self._write_past(held, patience)

    async def _write_past(self, held: Held, patience: float) -> None:
        """Without effect where all of it is written down."""
        async with self._writes.turn(held.history_lock, patience) as left:
            if held.gone or not held.behind:
                return
            data, held.behind = pack(ordered(held.past_moves.values()), held.past), False
            try:
                await self._put_past(held, data, left)
            except BaseException as exc:
                # What is refused would be again, and the rest can be written down without it.
                held.behind = not (isinstance(exc, StateError) and self._writes.is_about_one(exc))
                raise

    async def _put_past(self, held: Held, data: dict[str, str], patience: float) -> None:
        if data == held.written:
            return
        if held.written is not None:
            patch: Json = {"binaryData": resource.merge_patch(held.written, data)}
            with suppress(ApiNotFound):
                await self._writes.patiently(lambda: self._api.patch(self._history_path(held), patch), patience)
                held.written = data
                return
        body = body_of("ConfigMap", f"{held.name}-history", owner(held)) | {"binaryData": data}
        await self._pipelines.replace(paths.configmaps(self._namespace), body, patience)
        held.written = data

    def _history_path(self, held: Held) -> str:
        return paths.configmaps(self._namespace, f"{held.name}-history")
