"""Whether a bearer token is that of somebody whom the cluster knows and who may use Nomad: Kubernetes' TokenReview.

For clusters whose users sign in with Kubernetes' own tokens instead of the master's. Answers are kept for a minute, so
that long does a token count that was withdrawn. Who may are users and groups by name, as Kubernetes calls them.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Collection

from nomad.clock import Clock
from nomad.errors import ApiError
from nomad.kubernetes import paths
from nomad.kubernetes.api import Api

log = logging.getLogger(__name__)

KEPT_SECONDS = 60.0
KEPT = 1024
"""Answers; tokens themselves aren't kept."""
AT_ONCE = 4
"""Reviews under way: who sends one token after the other must not keep the API busy."""
MOST_TOKEN = 8192
"""Characters; no token of Kubernetes' is longer."""


class TokenReviews:
    """Asked with a token."""

    def __init__(self, api: Api, users: Collection[str], groups: Collection[str], clock: Clock) -> None:
        """`users` and `groups` that may, e.g. `system:serviceaccount:ci:robot` and `developers`."""
        self._api = api
        self._users = frozenset(users)
        self._groups = frozenset(groups)
        self._clock = clock
        self._known: OrderedDict[bytes, tuple[float, bool]] = OrderedDict()
        self._free = asyncio.Semaphore(AT_ONCE)

    async def __call__(self, token: str) -> bool:
        """Whether its holder may use Nomad; not when the API doesn't answer."""
        if len(token) > MOST_TOKEN:
            return False
        digest = hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
        if (known := self._told(digest)) is not None:
            return known  # however many others wait
        async with self._free:
            if (known := self._told(digest)) is not None:
                return known
            try:
                may = await self._review(token)
            except ApiError as exc:
                log.warning("a token couldn't be reviewed: %s", exc)
                return False
        self._known[digest] = (self._clock.now() + KEPT_SECONDS, may)
        self._known.move_to_end(digest)
        while len(self._known) > KEPT:
            self._known.popitem(last=False)
        return may

    def _told(self, digest: bytes) -> bool | None:
        """What was answered lately; None: nothing."""
        until, may = self._known.get(digest, (0.0, False))
        return may if self._clock.now() < until else None

    async def _review(self, token: str) -> bool:
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": token}}
        status = (await self._api.create(paths.tokenreviews(), body)).get("status") or {}
        if status.get("authenticated") is not True:
            return False
        user = status.get("user") or {}
        return user.get("username") in self._users or not self._groups.isdisjoint(user.get("groups") or ())
