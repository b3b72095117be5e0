"""What is asked of the C library."""

from __future__ import annotations

import itertools
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from shards.files import atomic_file
from shards.system import begin_writing

FAULTS = """
import ctypes, resource, sys
from shards.system import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
for turn in range(5):
    if turn == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(64 << 20)
    ctypes.memset(block, 1, 64 << 20)
    libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is the GNU C library's")
def test_a_freed_block_serves_the_next_of_its_size():
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}

    def faults(how):
        child = [sys.executable, "-c", FAULTS, how]
        ended = subprocess.run(child, capture_output=True, check=True, cwd=Path(__file__).parents[2], env=plain)
        return int(ended.stdout)

    assert faults("leave") > 100
    assert faults("keep") < 20


def test_bytes_under_way_are_the_bytes_in_the_end(tmp_path, monkeypatch):
    """Large files are handed to the disk while they are written, each byte once; a refusal changes nothing."""
    asked = []
    monkeypatch.setattr("shards.files.begin_writing", lambda fd, start, length: asked.append((start, length)))
    data = os.urandom(5 << 20)
    with atomic_file(tmp_path / "large") as stream:
        for _ in range(5):
            stream.write(data)
    assert (tmp_path / "large").read_bytes() == 5 * data
    assert len(asked) >= 2
    assert all(start + length == after for (start, length), (after, _) in itertools.pairwise(asked))
    assert begin_writing(-1, 0, 10) is None
