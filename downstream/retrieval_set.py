"""A retrieval task as it is read: the images and captions of one split."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from downstream.base import read_task
from schemas.errors import PairmillError
from schemas.events import Emit, Notice
from schemas.status import SUCCESS
from shards.dataset import PAIRS, Dataset
from shards.reader import read_table

Place = tuple[int, int]  # (shard, row)


@dataclass(frozen=True)
class RetrievalSet:
    """Images and captions, in the order of the task set's rows.

    images         (shard, row) of each image
    image_ids      its id in the list it came from, else SHARD:ROW
    image_hashes   sha256 of its bytes
    captions       text of each caption; caption_ids its id
    caption_image  [captions] int64, which image each belongs to
    left_out       images without pixels, and their captions
    """

    dataset: Dataset
    name: str
    split: str
    images: tuple[Place, ...]
    image_ids: tuple[str, ...]
    image_hashes: tuple[bytes, ...]
    captions: tuple[str, ...]
    caption_ids: tuple[str, ...]
    caption_image: np.ndarray
    left_out: tuple[int, int] = (0, 0)

    def image_fold(self, num_folds: int) -> np.ndarray:
        """[images] int64: which of `num_folds` equal runs of images each is in.

        Raises PairmillError where they cannot be equal.
        """
        size, rest = divmod(len(self.images), num_folds)
        if rest:
            raise PairmillError(f"{len(self.images):,} images cannot be cut into {num_folds} equal folds (--folds).")
        return np.arange(len(self.images)) // size

    def first(self, num_images: int) -> RetrievalSet:
        """Only the first images and their captions."""
        kept = np.flatnonzero(self.caption_image < num_images)
        return replace(
            self,
            images=self.images[:num_images],
            image_ids=self.image_ids[:num_images],
            image_hashes=self.image_hashes[:num_images],
            captions=tuple(self.captions[i] for i in kept),
            caption_ids=tuple(self.caption_ids[i] for i in kept),
            caption_image=self.caption_image[kept],
        )

    @property
    def fingerprint(self) -> str:
        """32 hex digits of all that decides a number: the images' bytes and the captions, in order."""
        digest = hashlib.blake2b(digest_size=16)
        for one in self.image_hashes:
            digest.update(one)
        for number, caption in zip(self.caption_image.tolist(), self.captions, strict=True):
            digest.update(f"\n{number} {len(caption)} {caption}".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


def read_retrieval(url: str, name: str, split: str, emit: Emit) -> RetrievalSet:
    """One split of a retrieval task set.

    Raises PairmillError: no dataset, task set or split; rows of another kind of task; no image at all.
    """
    dataset = Dataset.open(url)
    where = f"{dataset.url} tasks/{name}"
    table = read_task(dataset, name, split, ("id", "images", "text"))
    places = _one_image_each(table["images"].to_pylist(), where)
    if table["text"].null_count:
        raise PairmillError(f"{where}: a row of `{split}` has no text: it is no retrieval task.")
    order = {place: i for i, place in enumerate(dict.fromkeys(places))}
    about = _images(dataset, list(order))
    there = [place for place in order if about[place][0] == SUCCESS]
    if not there:
        raise PairmillError(f"{where}: no image of `{split}` has pixels. Import it again with its images.")
    number = {place: i for i, place in enumerate(there)}
    kept = [i for i, place in enumerate(places) if place in number]
    texts, ids = table["text"].to_pylist(), table["id"].to_pylist()
    left_out = len(order) - len(there), len(places) - len(kept)
    if left_out[0]:
        emit(
            Notice(
                f"{left_out[0]:,} of {len(order):,} images of `{split}` have no pixels; they and their "
                f"{left_out[1]:,} captions are left out. The numbers are not comparable with published ones.",
                warning=True,
            )
        )
    return RetrievalSet(
        dataset=dataset,
        name=name,
        split=split,
        images=tuple(there),
        image_ids=tuple(about[p][1] for p in there),
        image_hashes=tuple(about[p][2] for p in there),
        captions=tuple(texts[i] for i in kept),
        caption_ids=tuple(ids[i] for i in kept),
        caption_image=np.array([number[places[i]] for i in kept], dtype=np.int64),
        left_out=left_out,
    )


def _one_image_each(images: Sequence[Sequence[dict[str, int]]], where: str) -> list[Place]:
    wrong = next((len(refs) for refs in images if len(refs) != 1), None)
    if wrong is not None:
        raise PairmillError(f"{where}: a row refers to {wrong} images; a caption of retrieval has one.")
    return [(refs[0]["shard"], refs[0]["row"]) for refs in images]


def _images(dataset: Dataset, places: Sequence[Place]) -> dict[Place, tuple[str, str, bytes]]:
    """(status, id, sha256) of each image. Raises PairmillError for a row that is not there."""
    out: dict[Place, tuple[str, str, bytes]] = {}
    by_shard: dict[int, list[int]] = {}
    for shard, row in places:
        by_shard.setdefault(shard, []).append(row)
    for shard, rows in by_shard.items():
        if not 0 <= shard < dataset.num_shards or max(rows) >= dataset.manifest.shards[shard] or min(rows) < 0:
            raise PairmillError(f"{dataset.url}: a task refers to shard {shard} row {max(rows)}, which is not there.")
        table = read_table(dataset.folder, dataset.stage(PAIRS).file(shard), ["status", "input_uid", "stored_sha256"])
        for row, one in zip(rows, table.take(rows).to_pylist(), strict=True):
            name = one["input_uid"] or f"{shard}:{row}"
            out[shard, row] = (one["status"], name, one["stored_sha256"] or b"")
    return out
