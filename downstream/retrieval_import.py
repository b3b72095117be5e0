"""`pairmill task import retrieval`: a Karpathy split file and its images become a dataset with a task set.

`pairs/` gets one row per image in the file's order, `captions` whole and in order; `tasks/NAME/` one row per caption.
Stored are the image files' own bytes: the benchmark stays what it was.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from downstream.config import RetrievalImportConfig
from downstream.karpathy import KarpathyImage, read_karpathy
from schemas.errors import PairmillError
from schemas.events import Emit, Notice
from schemas.pairs import VERSION as PAIRS_VERSION
from schemas.pairs import given_uid, pairs_schema
from schemas.sidecars import ListSource, make_sidecar
from schemas.status import SUCCESS
from schemas.tasks import TASKS, tasks_schema
from schemas.tasks import VERSION as TASKS_VERSION
from shards.dataset import MANIFEST, PAIRS, Dataset, new_manifest, read_manifest, write_manifest
from shards.files import Folder, hash_file, open_folder
from shards.hand import RowInHand
from shards.images import ImageError, decode
from shards.parallel import run_stage
from shards.writer import write_pairs, write_table

T = TypeVar("T")

STAGE = "task import retrieval"
MAX_BYTES = 256 << 20
SHOWN = 10
MEND = "Give another -o for another task, or delete this folder to import it anew."
CARRIED = (
    pa.field("image_id", pa.int64()),
    pa.field("coco_id", pa.int64()),
    pa.field("split", pa.string()),
    pa.field("source_split", pa.string()),
)


@dataclass(frozen=True)
class ImportResult:
    """What was imported. `captions` by split; `statuses` of the images; how many images are not there."""

    url: str
    images: int
    captions: Mapping[str, int]
    statuses: Mapping[str, int]

    @property
    def missing(self) -> int:
        """Images without pixels: no file, or a file that is no image."""
        return self.images - self.statuses.get(SUCCESS, 0)


def import_retrieval(url: str | Path, config: RetrievalImportConfig, emit: Emit) -> ImportResult:
    """Makes the dataset at `url`, or goes on with it: a killed import is completed to the same bytes.

    Raises PairmillError: a file that is none of Karpathy's, no image of the chosen splits, missing images, a folder
    that holds something else.
    """
    images = list(read_karpathy(config.karpathy, config.split or None))
    if not images:
        raise PairmillError(f"{config.karpathy} has no image of the split {', '.join(config.split)}.")
    files = _find(images, config, emit)
    folder = open_folder(url)
    dataset = Dataset(folder, _manifest(folder, images, config))
    pairs, tasks = dataset.stage(PAIRS), dataset.stage(f"{TASKS}/{config.name}")
    source = {"karpathy": hash_file(config.karpathy)}
    for stage, schema in ((pairs, (PAIRS, PAIRS_VERSION)), (tasks, (TASKS, TASKS_VERSION))):
        sidecar = make_sidecar(STAGE, stage.name, schema, config, source, recorded={"file": config.karpathy.name})
        stage.begin(sidecar, MEND)
    shards = _cut(list(zip(images, files, strict=True)), config.shard_rows)
    work = PairsWork(dataset, shards, config.threads or os.cpu_count() or 1)
    size = sum(f.stat().st_size for f in files if f is not None) // len(images)
    # Reading files is all there is to do: threads of this process, no workers.
    run_stage(pairs, work, pending=pairs.pending(), workers=0, emit=emit, bytes_per_row=size)
    run_stage(tasks, TasksWork(dataset, tasks.path, shards), pending=tasks.pending(), workers=0, emit=emit)
    if not folder.exists(MANIFEST):
        write_manifest(folder, dataset.manifest)
    return _result(dataset, images, emit)


def _manifest(folder: Folder, images: Sequence[KarpathyImage], config: RetrievalImportConfig) -> Any:
    if folder.exists(MANIFEST):
        return read_manifest(folder)
    whole, rest = divmod(len(images), config.shard_rows)
    sizes = [config.shard_rows] * whole + ([rest] if rest else [])
    with config.karpathy.open("rb") as stream:
        digest = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    name, size = config.karpathy.name, config.karpathy.stat().st_size
    source = ListSource(name=name, bytes=size, hash=digest, shards=len(sizes))
    return new_manifest(config.shard_rows, sizes, [source])


def _cut(items: Sequence[T], size: int) -> list[Sequence[T]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _find(images: Sequence[KarpathyImage], config: RetrievalImportConfig, emit: Emit) -> list[Path | None]:
    """Each image's file: under its official path, or by its bare name; None where it is not there."""
    if not config.images.is_dir():
        raise PairmillError(f"There is no folder {config.images}. Pass --images with the folder of the images.")
    files = [_file(config.images, image) for image in images]
    missing = [image.path for image, file in zip(images, files, strict=True) if file is None]
    if missing:
        shown = ", ".join(missing[:SHOWN]) + (", ..." if len(missing) > SHOWN else "")
        text = f"{len(missing):,} of {len(images):,} images are not in {config.images}: {shown}."
        if not config.allow_missing:
            raise PairmillError(f"{text} Nothing written. Fetch them, or pass --allow-missing to go on without.")
        emit(Notice(text, warning=True))
    return files


def _file(folder: Path, image: KarpathyImage) -> Path | None:
    return next((p for p in (folder / image.path, folder / image.filename) if p.is_file()), None)


@dataclass(frozen=True)
class PairsWork:
    """Writes one shard of `pairs/`: the images' bytes, each decoded once (small) to prove that it can be."""

    dataset: Dataset
    shards: Sequence[Sequence[tuple[KarpathyImage, Path | None]]]
    threads: int

    def __call__(self, shard: int, hand: RowInHand) -> Mapping[str, int]:
        folder, name = self.dataset.folder, self.dataset.stage(PAIRS).file(shard)
        failed = 0
        with write_pairs(folder, name, pairs_schema(CARRIED)) as writer:
            for row, fields in enumerate(self._rows(shard, hand)):
                writer.append(fields)
                failed += fields["status"] != SUCCESS
                hand.progress(row + 1, failed)
        return writer.counts

    def _rows(self, shard: int, hand: RowInHand) -> Iterator[dict[str, Any]]:
        def one(item: tuple[int, tuple[KarpathyImage, Path | None]]) -> dict[str, Any]:
            row, (image, file) = item
            with hand.hold(row):
                return pair_row(image, file)

        with ThreadPoolExecutor(self.threads) as pool:
            for part in _cut(list(enumerate(self.shards[shard])), 8 * self.threads):
                yield from pool.map(one, part)


def pair_row(image: KarpathyImage, file: Path | None) -> dict[str, Any]:
    """The row of `pairs/` for an image and its file (None: it is not there)."""
    uid, input_uid = given_uid(image.path)
    about = {
        "uid": uid,
        "input_uid": input_uid,
        "caption": image.captions[0],
        "captions": list(image.captions),
        "attempts": 1,
        "image_id": image.image_id,
        "coco_id": image.coco_id,
        "split": image.split,
        "source_split": image.source_split,
    }
    if file is None:
        return about | {"status": "missing_file", "error": "missing_file: not in the images' folder"}
    try:
        return about | _stored(file)
    except ImageError as error:
        return about | {"status": error.status, "error": str(error)[:300]}
    except OSError as error:
        return about | {"status": "missing_file", "error": f"missing_file: {error.strerror}"}


def _stored(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        data = stream.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ImageError("too_large", f"more than {MAX_BYTES} bytes")
    seen = decode(data, shrink_to=(1, 1))
    digest = hashlib.sha256(data).digest()
    size = {"width": seen.width, "height": seen.height, "original_width": seen.width, "original_height": seen.height}
    return {"status": SUCCESS, "image": data, "format": seen.kind, "sha256": digest, "stored_sha256": digest, **size}


@dataclass(frozen=True)
class TasksWork:
    """Writes one shard of `tasks/NAME/`: a row for each caption of the images of the pairs shard of that number."""

    dataset: Dataset
    path: str
    shards: Sequence[Sequence[tuple[KarpathyImage, Path | None]]]

    def __call__(self, shard: int, hand: RowInHand) -> Mapping[str, int]:
        rows = [
            {"id": str(number), "split": image.split, "images": [{"shard": shard, "row": row}], "text": caption}
            for row, (image, _) in enumerate(self.shards[shard])
            for number, caption in zip(image.sentence_ids, image.captions, strict=True)
        ]
        counts = Counter(str(r["split"]) for r in rows)
        table = pa.Table.from_pylist(rows, schema=tasks_schema())
        write_table(self.dataset.folder, self.dataset.stage(self.path).file(shard), table, counts)
        return counts


def _result(dataset: Dataset, images: Sequence[KarpathyImage], emit: Emit) -> ImportResult:
    captions: Counter[str] = Counter()
    for image in images:
        captions[image.split] += len(image.captions)
    statuses: Counter[str] = Counter()
    for shard in range(dataset.num_shards):
        statuses.update(dataset.stage(PAIRS).counts(shard))
    result = ImportResult(dataset.url, len(images), dict(sorted(captions.items())), dict(sorted(statuses.items())))
    broken = result.missing - statuses["missing_file"]
    if broken:
        emit(Notice(f"{broken:,} files are no images: see `status` and `error` of these rows.", warning=True))
    return result
