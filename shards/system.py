"""What is asked of the C library beside Python: nothing happens where it is another than GNU's on Linux."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

# malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_LARGEST = 2**31 - 1
_SYNC_FILE_RANGE_WRITE = 2  # fcntl.h


@cache
def _function(name: str) -> Callable[..., int] | None:
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None


@cache
def keep_freed_memory() -> None:
    """Freed memory stays with the process and serves the next allocation.

    As it comes, malloc gives the pages of a large block back to the system when the block is freed (and Dask tells its
    workers to do so early), and the next block of that size, a picture or a layer later, has every page brought in and
    zeroed again: a third of a download's processor time, 5 to 8 % of a forward pass on CPU. All threads share one
    arena, so that a block freed in one serves them all. What is freed is kept until the process ends: peaks are
    somewhat higher, by 23 MB in a worker that downloads.
    """
    mallopt = _function("mallopt")
    if mallopt is not None:
        for setting, value in ((_MMAP_THRESHOLD, _LARGEST), (_TRIM_THRESHOLD, _LARGEST), (_ARENA_MAX, 1)):
            mallopt(setting, value)


def begin_writing(fd: int, start: int, length: int) -> None:
    """Sets the disk to work on bytes of an open file that are written already, without waiting for it.

    The fsync at the file's end then has little left to wait for.
    """
    sync_file_range = _function("sync_file_range")
    if sync_file_range is not None:
        sync_file_range(fd, ctypes.c_int64(start), ctypes.c_int64(length), _SYNC_FILE_RANGE_WRITE)
