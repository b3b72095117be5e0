"""Threads with bounded queues between them: what comes before the device runs ahead, what comes after runs behind."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Empty, Full, Queue
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")

_WAIT_S = 0.1  # how long a thread sleeps at most before it sees that it is to stop


class _Channel:
    """A bounded queue that either end can close."""

    def __init__(self, size: int) -> None:
        self.queue: Queue[object] = Queue(size)
        self.closed = threading.Event()

    def put(self, item: object) -> bool:
        """Whether the item was taken; False once the channel is closed."""
        while not self.closed.is_set():
            with contextlib.suppress(Full):
                self.queue.put(item, timeout=_WAIT_S)
                return True
        return False


class _Error:
    def __init__(self, error: BaseException) -> None:
        self.error = error


_END = object()


def ahead(source: Generator[A, None, None], size: int) -> Iterator[A]:
    """The items of `source`, made in a thread, at most `size` ahead.

    An exception of `source` is raised here, in its place. Closing this iterator closes `source`.
    """
    channel = _Channel(size)

    def fill() -> None:
        try:
            for item in source:
                if not channel.put(item):
                    return
            channel.put(_END)
        except BaseException as error:
            channel.put(_Error(error))
        finally:
            source.close()

    thread = threading.Thread(target=fill, daemon=True)
    thread.start()
    try:
        while (item := channel.queue.get()) is not _END:
            if isinstance(item, _Error):
                raise item.error
            yield item  # type: ignore[misc]
    finally:
        channel.closed.set()
        thread.join()


def map_ahead(
    pool: ThreadPoolExecutor, function: Callable[[A], B], items: Iterable[A], size: int
) -> Generator[B, None, None]:
    """`function` of each item, in order, computed in the pool, at most `size` items ahead."""
    waiting: deque[Future[B]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= size:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


@contextlib.contextmanager
def behind(take: Callable[[A], None], size: int) -> Iterator[Callable[[A], None]]:
    """A function that hands an item to `take` in a thread, in order, at most `size` items behind.

    The block ends when all are taken. An exception of `take` is raised at the next item or at the end.
    """
    channel = _Channel(size)
    failed: list[BaseException] = []

    def drain() -> None:
        try:
            while not channel.closed.is_set():
                with contextlib.suppress(Empty):
                    item = channel.queue.get(timeout=_WAIT_S)
                    if item is _END:
                        return
                    take(item)  # type: ignore[arg-type]
        except BaseException as error:
            failed.append(error)
            channel.closed.set()

    def put(item: A) -> None:
        if not channel.put(item):
            raise failed[0]

    thread = threading.Thread(target=drain, daemon=True)
    thread.start()
    try:
        yield put
        channel.put(_END)
        thread.join()
        if failed:
            raise failed[0]
    finally:
        channel.closed.set()
        thread.join()
