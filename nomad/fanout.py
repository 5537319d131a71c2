"""One writer, many readers, none of whom can hold up the writer or fill the memory.

Used by runtimes (changes of pods) and the master (events, live outputs). A slow reader of a bounded
subscription loses the oldest items, and is told how many.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Generic, TypeVar
from weakref import WeakSet

T = TypeVar("T")


class Subscription(AsyncIterator[T]):
    """What one reader hasn't read yet. Iterate in one task; it ends when either side closes it."""

    def __init__(self, limit: int | None, size: Callable[[T], int], most: int | None) -> None:
        self.skipped = 0
        """How many items were lost just before the one that was last read."""
        self._items: deque[tuple[T, int]] = deque()  # each with how many were lost just before it
        self._limit = limit
        self._size = size
        self._most = most
        self._waiting = 0  # sizes of the items together
        self._gap = 0  # lost since the newest
        self._closed = False
        self._arrived = asyncio.Event()

    def close(self) -> None:
        """No more items; what has arrived can still be read. Idempotent."""
        self._closed = True
        self._arrived.set()

    def skip(self, count: int) -> None:
        """Called by the `Fanout`: items were lost on their way here, after those that came."""
        self._gap += count

    def put(self, item: T) -> None:
        """Called by the `Fanout`."""
        if self._closed:
            return
        self._items.append((item, self._gap))
        self._waiting += self._size(item)
        self._gap = 0
        while len(self._items) > 1 and self._full():
            gone, lost = self._items.popleft()
            self._waiting -= self._size(gone)
            oldest, gap = self._items[0]
            self._items[0] = oldest, lost + 1 + gap
        self._arrived.set()

    def __aiter__(self) -> Subscription[T]:
        return self

    async def __anext__(self) -> T:
        while not self._items:
            if self._closed:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        item, self.skipped = self._items.popleft()
        self._waiting -= self._size(item)
        return item

    def _full(self) -> bool:
        too_many = self._limit is not None and len(self._items) > self._limit
        return too_many or (self._most is not None and self._waiting > self._most)


class Fanout(Generic[T]):
    """Gives every item to all current subscriptions."""

    def __init__(self) -> None:
        self._subscriptions: WeakSet[Subscription[T]] = WeakSet()  # a forgotten reader costs nothing
        self._closed = False

    def __len__(self) -> int:
        return len(self._subscriptions)

    def subscribe(
        self, limit: int | None = None, *, size: Callable[[T], int] = lambda item: 1, most: int | None = None
    ) -> Subscription[T]:
        """Items from now on; at most `limit` unread ones are kept, whose `size`s together don't exceed `most`.

        The newest is kept whatever its size.
        """
        subscription: Subscription[T] = Subscription(limit, size, most)
        if self._closed:
            subscription.close()
        else:
            self._subscriptions.add(subscription)
        return subscription

    def unsubscribe(self, subscription: Subscription[T]) -> None:
        """Take a reader out, at once."""
        subscription.close()
        self._subscriptions.discard(subscription)

    def publish(self, item: T) -> None:
        for subscription in list(self._subscriptions):
            subscription.put(item)

    def skip(self, count: int) -> None:
        """Tell all readers that `count` items were lost on their way here."""
        for subscription in list(self._subscriptions):
            subscription.skip(count)

    def close(self) -> None:
        """End all subscriptions, and later ones at once."""
        self._closed = True
        for subscription in list(self._subscriptions):
            subscription.close()
        self._subscriptions.clear()
