"""Stream of one document's events, for a thread or for an event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import suppress
from threading import Condition

from mmi_deploy.batching.job import JobStats
from mmi_deploy.runtime.events import Event

# A coroutine that waits for an event, and its loop.
Waiter = tuple[asyncio.AbstractEventLoop, "asyncio.Future[None]"]


class EventStream:
    """Events of one document, as they happen: iterate with `for` or `async for`, once.

    The last event is `Finished`. An error of the document is raised at its place. Leaving a `with`
    block cancels a document that has not ended.
    """

    def __init__(self) -> None:
        self._changed = Condition()
        self._items: deque[Event | Exception | None] = deque()
        self._waiters: list[Waiter] = []
        self._cancel: Callable[[], None] = lambda: None
        self._ended = False
        self.stats: JobStats | None = None  # once the document has ended

    def connect(self, cancel: Callable[[], None]) -> None:
        """Set the function that cancels the document."""
        self._cancel = cancel

    def emit(self, item: Event | Exception | None) -> None:
        """Add an event; None at the end, an exception at a failure. Whoever waits for it is woken
        by `wake`."""
        with self._changed:
            self._items.append(item)

    def wake(self) -> list[Waiter]:
        """Wake the threads that wait for an event; returns the coroutines that do."""
        with self._changed:
            self._changed.notify_all()
            waiters, self._waiters = self._waiters, []
        return waiters

    def cancel(self) -> None:
        """End the document within one run: it ends with `Finished("cancelled")`. Without effect on
        one that has ended. Thread-safe."""
        self._cancel()

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        with self._changed:
            while not self._items and not self._ended:
                self._changed.wait()
            item = self._take()
        if item is None:
            raise StopIteration
        return item

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        loop = asyncio.get_running_loop()
        while True:
            with self._changed:
                if self._items or self._ended:
                    item = self._take()
                    break
                future = loop.create_future()
                self._waiters.append((loop, future))
            await future
        if item is None:
            raise StopAsyncIteration
        return item

    def _take(self) -> Event | None:
        """Take the next event; None at the end. Raises the document's error."""
        item = self._items.popleft() if self._items else None
        self._ended = self._ended or item is None or isinstance(item, Exception)
        if isinstance(item, Exception):
            raise item
        return item

    def __enter__(self) -> EventStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    async def __aenter__(self) -> EventStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()


def wake_all(streams: Iterable[EventStream]) -> None:
    """Wake whoever waits for an event of `streams`: every event loop once, as that is a call to the
    system, after which threads contend for Python's lock."""
    waiting: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for stream in streams:
        for loop, future in stream.wake():
            waiting.setdefault(loop, []).append(future)
    for loop, futures in waiting.items():
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(_resolve, futures)


def _resolve(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
