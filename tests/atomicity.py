"""Ends a stage at each call that touches a file on its way to being whole, and proves that a rerun completes it.

`assert_atomic(make_stage_command, folder)` forks one child a call: the child counts the calls of
`shards.files._open/_write/_fsync/_rename` and leaves with `os._exit` at call k, for every k. A child takes milliseconds
where the stage does, since the parent has imported everything; the parent must not have started threads.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shards import files

CALLS = ("_open", "_write", "_fsync", "_rename")
ENDED = 77

Run = Callable[[Path], None]


def tree(root: Path) -> dict[str, str]:
    """Hash of every file that the promise of equal bytes covers: all but logs and temporary files."""
    out = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_file() and "logs" not in name.split("/") and not files.is_temporary(path.name):
            out[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return out


def _count_down(calls: list[int]) -> None:
    for name in CALLS:
        call = getattr(files, name)

        def counted(*arguments, call=call):
            calls[0] -= 1
            if calls[0] == 0:
                os._exit(ENDED)
            return call(*arguments)

        setattr(files, name, counted)


def _fork(run: Run, root: Path, at: int) -> int:
    """Exit status of `run(root)` in a child that ends itself at call `at`."""
    child = os.fork()
    if child == 0:
        try:
            _count_down([at])
            run(root)
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def assert_atomic(
    make_stage_command: Callable[[], tuple[Path | None, Run]],
    folder: Path,
    check: Run | None = None,
    most: int = 400,
    every: int = 1,
    seen: Callable[[Path], Any] = tree,
) -> int:
    """Asserts that a stage ended at any call leaves what a rerun completes to the bytes of an unkilled run.

    make_stage_command() -> (start, run): `start` is the folder before the stage (None: nothing), copied for every try;
    `run(root)` runs the whole stage in it. `check(root)` is called on what each killed run left behind (for a stage
    that works on a dataset: it must open). `folder` is a scratch place. `every` 3 tries calls 1, 4, 7, ...: a
    file takes five calls, so a number prime to 5 meets each kind. `seen(root)` is what must be equal in the end.
    Returns the last call tried.
    """
    start, run = make_stage_command()

    def fresh(name: str) -> Path:
        root = folder / name
        if start is not None:
            shutil.copytree(start, root)
        return root

    whole = fresh("whole")
    assert _fork(run, whole, -1) == 0
    want = seen(whole)
    assert _fork(run, whole, -1) == 0
    assert seen(whole) == want, "a rerun of a finished stage changes nothing"
    for k in range(1, most, every):
        root = fresh(f"killed-{k}")
        code = _fork(run, root, k)
        if code == 0:
            assert k > 1, "the stage writes nothing through shards.files"
            return k - every
        assert code == ENDED, f"call {k}: the stage failed with {code}"
        if check is not None:
            check(root)
        assert _fork(run, root, -1) == 0, f"call {k}: the rerun failed"
        assert seen(root) == want, f"call {k}: the rerun left other bytes"
        shutil.rmtree(root)
    raise AssertionError(f"more than {most} calls: make the stage smaller")
