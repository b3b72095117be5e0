from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from extractors.pipeline import ahead, behind, map_ahead


def counted(made: list[int], stop: int, closed: list[bool]) -> Iterator[int]:
    try:
        for i in range(stop):
            made.append(i)
            yield i
    finally:
        closed.append(True)


def test_ahead_keeps_order_and_stays_within_its_bound():
    made: list[int] = []
    closed: list[bool] = []
    items = ahead(counted(made, 50, closed), 2)
    assert next(items) == 0
    time.sleep(0.1)
    assert len(made) <= 4  # one taken, two queued, one in hand
    assert list(items) == list(range(1, 50))
    assert closed == [True]


def test_ahead_closes_its_source_when_the_reader_leaves():
    closed: list[bool] = []
    items = ahead(counted([], 50, closed), 2)
    next(items)
    items.close()
    assert closed == [True]
    assert not [t for t in threading.enumerate() if t.daemon and t.name.startswith("Thread")]


def test_ahead_raises_in_place():
    def source() -> Iterator[int]:
        yield 1
        raise ValueError("no more")

    items = ahead(source(), 4)
    assert next(items) == 1
    with pytest.raises(ValueError, match="no more"):
        next(items)


def test_map_ahead_keeps_order_whatever_finishes_first():
    def slow(i: int) -> int:
        time.sleep(0.01 * (i % 3))
        return i * i

    with ThreadPoolExecutor(4) as pool:
        assert list(map_ahead(pool, slow, range(20), 6)) == [i * i for i in range(20)]


def test_behind_takes_all_in_order_and_in_another_thread():
    taken: list[tuple[int, int]] = []
    with behind(lambda i: taken.append((i, threading.get_ident())), 2) as put:
        for i in range(20):
            put(i)
    assert [i for i, _ in taken] == list(range(20))
    assert {thread for _, thread in taken} != {threading.get_ident()}


def test_behind_raises_what_the_taker_raised():
    def take(item: int) -> None:
        if item == 3:
            raise ValueError("three")

    def hand_over() -> None:
        with behind(take, 1) as put:
            for i in range(100):
                put(i)

    with pytest.raises(ValueError, match="three"):
        hand_over()
    with pytest.raises(ValueError, match="three"), behind(take, 1) as put:
        put(3)  # the last item: raised at the end of the block


def test_behind_ends_its_thread_when_the_block_fails():
    with pytest.raises(KeyError), behind(lambda item: None, 1):
        raise KeyError
    assert not [t for t in threading.enumerate() if t.daemon and t.name.startswith("Thread")]
