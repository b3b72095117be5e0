"""`--probe N`: a sample downloaded to nowhere tells what the whole list would take."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from curation.config import DownloadConfig
from curation.download import fetching, num_workers, run
from curation.download_shard import RECEIVED, DownloadShard
from curation.sources import sampled_input
from schemas.errors import PairmillError
from schemas.events import Emit, silent
from schemas.pairs import PAIRS
from shards.dataset import INPUT, Dataset, new_manifest, write_manifest
from shards.files import open_folder
from shards.reader import read_table
from shards.writer import write_table

_TAIL = 0.1  # the last rows wait for slow hosts, which a long run does meanwhile


@dataclass(frozen=True)
class Probe:
    """What a sample says about its list.

    rows, list_rows        rows tried, rows of the list (after --limit and --sample)
    counts                 rows tried by status
    success_share          of the rows tried
    received_bytes         mean body in bytes of a row that succeeded
    stored_bytes           mean image in bytes as stored
    rows_per_s             of the sample, with the run's workers and connections
    hours, transfer_bytes, disk_bytes   estimates for the whole list
    """

    rows: int
    list_rows: int
    counts: dict[str, int]
    success_share: float
    received_bytes: float
    stored_bytes: float
    rows_per_s: float
    hours: float
    transfer_bytes: int
    disk_bytes: int


def probe(lists: Sequence[str], config: DownloadConfig, emit: Emit = silent) -> Probe:
    """Downloads `config.probe` rows, chosen by uid, into a temporary folder that is gone afterwards.

    Raises PairmillError as `download` does.
    """
    if config.probe is None:
        raise PairmillError("`probe` says how many rows to try: pass --probe 500.")
    sample, list_rows = sampled_input(lists, config, config.probe, emit)
    with tempfile.TemporaryDirectory(prefix="pairmill-probe-") as folder:
        workers = num_workers(config, len(sample))
        dataset = _dataset(Path(folder), sample, workers)
        work = DownloadShard(dataset, fetching(config, workers), received=True)
        run(dataset.stage(PAIRS), work, range(dataset.num_shards), config.model_copy(update={"keep_going": True}), emit)
        columns = ["status", "image", "fetched_at", RECEIVED.name]
        files = [f"{PAIRS}/{name}" for name in dataset.folder.names(PAIRS)]
        return _estimate(pa.concat_tables(read_table(dataset.folder, f, columns) for f in files), list_rows)


def _dataset(folder: Path, sample: pa.Table, shards: int) -> Dataset:
    """The sample as a dataset of equal shards, one a worker."""
    target = open_folder(folder)
    (folder / PAIRS).mkdir()
    size = -(-len(sample) // shards)
    parts = [sample.slice(start, size) for start in range(0, len(sample), size)]
    manifest = new_manifest(size, (len(p) for p in parts))
    write_manifest(target, manifest)
    dataset = Dataset(target, manifest)
    for shard, part in enumerate(parts):
        write_table(target, dataset.stage(INPUT).file(shard), part.combine_chunks(), {"rows": len(part)})
    return dataset


def _estimate(table: pa.Table, list_rows: int) -> Probe:
    rows = len(table)
    counts = Counter(table["status"].to_pylist())
    good = table.filter(pa.compute.equal(table["status"], "success"))
    stored = sum(len(image) for image in good["image"].to_pylist())
    received = sum(table[RECEIVED.name].to_pylist())
    done = sorted(moment.timestamp() for moment in table["fetched_at"].to_pylist())
    counted = max(1, int(rows * (1 - _TAIL)))
    rate = counted / max(done[counted - 1] - done[0], 1e-3)
    scale = list_rows / rows
    return Probe(
        rows=rows,
        list_rows=list_rows,
        counts=dict(counts),
        success_share=counts["success"] / rows,
        received_bytes=received / max(1, sum(n > 0 for n in table[RECEIVED.name].to_pylist())),
        stored_bytes=stored / max(1, len(good)),
        rows_per_s=rate,
        hours=list_rows / rate / 3600,
        transfer_bytes=round(received * scale),
        disk_bytes=round(stored * scale),
    )
