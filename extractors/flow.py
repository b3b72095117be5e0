"""One shard on its way through an extractor.

Row groups are read and images decoded ahead of the device, batches are put together in page-locked memory, the device
computes, results are copied back beside the next batch, and a writer takes the rows in their order. A batch never
crosses a shard, and which rows share one depends on nothing but the pairs, the batch size and the selection: a run that
was killed gives the same bytes again.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, cast

import numpy as np
import torch

from extractors.device import Batch, Device, worker_device
from extractors.pipeline import ahead, behind, map_ahead
from extractors.protocol import Extractor, Item, Loader
from extractors.resume import COMPUTE, COPY, Outputs, Plan, Wanted, plan_shard
from extractors.writer import ShardWriter, open_outputs
from schemas.errors import PairmillError
from schemas.status import OK, SKIPPED
from shards.dataset import PAIRS
from shards.hand import RowInHand
from shards.images import ImageError, decode_rgb
from shards.reader import group_rows, row_groups

Row = dict[str, Any]
Rows = list[tuple[int, Row]]  # row numbers and columns
Ready = Callable[[], Rows]  # waits until they are there
AT_ONCE = 8  # rows that go from thread to thread together where there is no device: each wakes up so much less often
WINDOW = 16  # batches; a row of a rare shape waits for company no longer than this


@dataclass(frozen=True)
class Settings:
    """How a run computes: device, precision, rows a batch, threads of a worker, whose cluster it is."""

    device: str
    precision: str
    batch_size: int
    threads: int
    own_cluster: bool


@dataclass(frozen=True)
class ExtractWork:
    """Makes the files of one shard. Picklable; a process keeps the model from shard to shard."""

    outputs: Outputs
    loader: Loader
    settings: Settings
    want: Wanted

    def __call__(self, shard: int, hand: RowInHand) -> Mapping[str, int]:
        settings = self.settings
        name = worker_device(settings.device, settings.own_cluster)
        with torch_threads(settings.threads if name == "cpu" else 1):
            extractor, device = _loaded(self.loader, name, settings.precision)
            plan = plan_shard(self.outputs, shard, self.want, hand.crashed)
            shard_run = ShardRun(self, extractor, device, shard, plan, hand)
            with torch.inference_mode(), device.autocast():
                return shard_run.run()


@lru_cache(maxsize=1)
def _loaded(loader: Loader, device: str, precision: str) -> tuple[Extractor, Device]:
    on = Device(device, precision)
    # Without a device (cpu_batch 0) only `prepare` is there, and only that is called.
    return cast(Extractor, loader.load(on.device)), on


def forget_model() -> None:
    """Frees the model that this process keeps from shard to shard."""
    _loaded.cache_clear()


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Torch's threads within an operation, so that workers x threads stays within the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class ShardRun:
    """One shard on its way through the threads."""

    def __init__(
        self, work: ExtractWork, extractor: Extractor, device: Device, shard: int, plan: Plan, hand: RowInHand
    ) -> None:
        self.work, self.extractor, self.device = work, extractor, device
        self.shard, self.plan, self.hand = shard, plan, hand
        self.most = work.settings.batch_size  # rows a batch; halved when memory runs out

    def run(self) -> dict[str, int]:
        """Writes the shard's files; returns its rows by state."""
        with open_outputs(self.work.outputs, self.work.loader, self.shard, self.plan) as writer:
            order = InOrder(self.plan, writer, self.hand)
            with (
                ThreadPoolExecutor(self.work.settings.threads, "decode") as pool,
                behind(order.take, 4) as put,
            ):
                with closing(self._results(pool)) as results:
                    for ready in results:
                        put(ready)
            order.rest()
        return dict(writer.counts)

    def _results(self, pool: ThreadPoolExecutor) -> Generator[Ready, None, None]:
        """For each batch a function that waits for its rows: (number, columns)."""
        size, threads = self.work.settings.batch_size, self.work.settings.threads
        source = self._rows()
        if not size:
            parts = iter(lambda: list(islice(source, AT_ONCE)), [])
            for ready in map_ahead(pool, self._prepare_all, parts, 2 * threads):
                yield _given(ready)
            return
        items = map_ahead(pool, self._prepare, source, 2 * max(size, threads))
        for failed, rows, batch_items, batch in ahead(self._batches(items, size), 2):
            if failed:
                yield _given(failed)
            for part, part_items, outputs in self._compute(rows, batch_items, batch):
                yield self._finish(part, part_items, self.device.download(outputs))

    def _rows(self) -> Iterator[tuple[int, Row]]:
        """The pairs to compute, as they lie; row groups without one are not read."""
        dataset = self.work.outputs.dataset
        name = dataset.stage(PAIRS).file(self.shard)
        compute = self.plan.compute()
        ends = np.cumsum(group_rows(dataset.folder, name))
        groups = [g for g, part in enumerate(np.split(compute, ends[:-1])) if part.any()]
        for start, table in row_groups(dataset.folder, name, ["image", *self.work.loader.columns], groups):
            for at in np.flatnonzero(compute[start : start + len(table)]).tolist():
                yield start + at, {name: table[name][at].as_py() for name in table.column_names}

    def _prepare(self, numbered: tuple[int, Row]) -> tuple[int, Item]:
        """In a decode thread. An image that cannot be used becomes a row with its status."""
        number, row = numbered
        self.device.cores_free.wait()
        try:
            with self.hand.hold(number):
                data = row.pop("image")
                rgb = decode_rgb(data, at_least=getattr(self.work.loader, "at_least", None))
                row["image_bytes"] = len(data)
                return number, {"state": OK, **self.extractor.prepare(rgb, row)}
        except ImageError as error:
            return number, {"state": error.status}

    def _prepare_all(self, rows: list[tuple[int, Row]]) -> Rows:
        return [self._prepare(row) for row in rows]

    def _batches(
        self, items: Iterator[tuple[int, Item]], size: int
    ) -> Generator[tuple[Rows, list[int], list[Item], Batch], None, None]:
        """(rows that failed, row numbers, items, page-locked batch), in an order that no timing changes."""
        failed: Rows = []
        for rows, group in group_items(items, size, self.extractor.key, failed):
            batch = self.device.pin(self.extractor.collate(group)) if group else {}
            yield failed.copy(), rows, group, batch
            failed.clear()

    def _compute(
        self, rows: list[int], items: list[Item], batch: Batch
    ) -> Iterator[tuple[list[int], list[Item], Batch]]:
        """The batch's outputs on the device, in parts where it does not fit."""
        if not items:
            return
        if len(items) <= self.most:
            outputs = self._try(batch)
            if outputs is not None:
                yield rows, items, outputs
                return
            if len(items) == 1:
                where = f"{self.work.outputs.dataset.url} row {self.shard}:{rows[0]}"
                raise PairmillError(f"{where}: a single image does not fit into the memory of {self.device.device}.")
            self.most = len(items) // 2
        start = 0
        while start < len(items):
            part = slice(start, start + self.most)
            start += self.most
            batch = self.device.pin(self.extractor.collate(items[part]))
            yield from self._compute(rows[part], items[part], batch)

    def _try(self, batch: Batch) -> Batch | None:
        try:
            with self.device.computing():
                return self.extractor(self.device.upload(batch))
        except torch.OutOfMemoryError:
            pass  # outside this block, where the error no longer holds the tensors of the failed call
        self.device.forget()
        return None

    def _finish(self, rows: list[int], items: list[Item], wait: Callable[[], dict[str, np.ndarray]]) -> Ready:
        def finish() -> Rows:
            made = self.extractor.rows(items, wait())
            return [(number, {"state": OK, **row}) for number, row in zip(rows, made, strict=True)]

        return finish


def _given(rows: Rows) -> Ready:
    return lambda: rows


def group_items(
    items: Iterator[tuple[int, Item]], size: int, key: Callable[[Item], Any], failed: Rows
) -> Iterator[tuple[list[int], list[Item]]]:
    """Batches of up to `size` items of one key; what is waiting goes out after `WINDOW` batches' worth of rows.

    Items that are not ok are put into `failed`. The last batch may be empty, to let those through.
    """
    waiting: dict[Any, tuple[list[int], list[Item]]] = {}
    seen = 0
    for number, item in items:
        state = item.pop("state")
        if state != OK:
            failed.append((number, {"state": state}))
            continue
        rows, group = waiting.setdefault(key(item), ([], []))
        rows.append(number)
        group.append(item)
        seen += 1
        if len(rows) == size:
            yield waiting.pop(key(item))
        if seen % (WINDOW * size) == 0:
            yield from waiting.values()
            waiting.clear()
    yield from waiting.values()
    if failed:
        yield [], []


class InOrder:
    """Hands the rows of a shard to its writer in order; runs in the writer's thread."""

    def __init__(self, plan: Plan, writer: ShardWriter, hand: RowInHand) -> None:
        self.plan, self.writer, self.hand = plan, writer, hand
        self.early: dict[int, Row] = {}
        self.next = 0
        self.failed = 0

    def take(self, ready: Ready) -> None:
        """Waits for a batch and writes every row up to the first that is not there yet."""
        self.early.update(ready())
        self._advance()

    def rest(self) -> None:
        """The rows after the last computed one."""
        self._advance()
        if self.next != len(self.plan.todo):
            raise RuntimeError(f"row {self.next} was never computed")

    def _advance(self) -> None:
        while self.next < len(self.plan.todo):
            todo = self.plan.todo[self.next]
            if todo == COMPUTE:
                row = self.early.pop(self.next, None)
                if row is None:
                    break
            elif todo == COPY and self.plan.old:
                row = self.plan.old.row(self.next)
            else:
                row = {"state": todo}
            self.writer.append(row)
            self.failed += row["state"] not in (OK, SKIPPED)
            self.next += 1
        self.hand.progress(self.next, self.failed)
