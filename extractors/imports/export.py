"""`export-features`: a region set as the files that LXMERT and UNITER read."""

from __future__ import annotations

import base64
import io
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from extractors.imports.config import EXPORTS, ExportFeaturesConfig
from extractors.imports.databases import need
from extractors.imports.keys import Hashes, name_of, row_keys
from extractors.imports.tsv import BUTD, LXMERT
from schemas.errors import PairmillError, suggest
from schemas.events import Emit, Notice, Progress, StageFinished, StageStarted, silent
from schemas.status import OK
from shards.dataset import PAIRS, Dataset
from shards.files import atomic_file, is_left_over, place_folder, temporary_name
from shards.reader import MappedShard, read_table

_STAGE = "export-features"
MARK = "PAIRMILL"
# UNITER's numbers: boxes above this confidence, between these limits; its file names hold them.
_CONF, _MIN, _MAX = 0.2, 10, 100
_DATABASE = f"feat_th{_CONF}_max{_MAX}_min{_MIN}"
_MAP_BYTES = 1 << 42  # address space, not disk
_MOST_KEY_BYTES = 511  # of LMDB
_COMMIT_EVERY = 1000
_TAKEN = ("state", "num_boxes", "boxes", "features", "det_conf", "obj_id", "obj_conf", "attr_id", "attr_conf",
          "cls_probs")  # fmt: skip
_SIZES = ("width", "height", "original_width", "original_height")


@dataclass(frozen=True)
class Image:
    """A row to be written: the image's name, its size in px that boxes count in, and its columns of regions-v1."""

    name: str
    size: tuple[int, int]
    row: dict[str, Any]

    def column(self, name: str, dtype: str) -> np.ndarray:
        """A list column as numbers [n]; zeros where the set has none."""
        value = self.row.get(name)
        return np.zeros(self.row["num_boxes"], dtype) if value is None else np.asarray(value, dtype)


def export_features(
    format: str, dataset: str | Path, output: str | Path, config: ExportFeaturesConfig, emit: Emit = silent
) -> StageFinished:
    """Writes the rows that are ok to `output`, whole or not at all; a killed export starts again. `OUTPUT.PAIRMILL`
    beside it tells what it was made from.

    Of rows that show one image (one name) the first is written. Raises PairmillError: an unknown format, no such set,
    no boxes in it, a row without a name or with another image's, `output` is something else, no lmdb package.
    """
    start = time.monotonic()
    if format not in EXPORTS:
        raise PairmillError(
            f"There is no format `{format}`.{suggest(format, EXPORTS)} There are: {', '.join(EXPORTS)}."
        )
    if format != "tsv" and config.fields != "lxmert":
        raise PairmillError(f"`--fields` is for tsv; {format} has columns of its own.")
    if format == "tsv" and not config.compress:
        raise PairmillError("`--no-compress` is for uniter-lmdb; a tsv is never compressed.")
    source, target = Dataset.open(dataset), Path(output).absolute()
    mark_file = target.with_name(f"{target.name}.{MARK}")
    stage = source.require(f"features/{config.name}")
    mark = _mark(source, format, config)
    if target.exists():
        if not mark_file.exists() or mark_file.read_bytes() != mark:
            raise PairmillError(f"{target} is something else already. Nothing written. Choose another place with -o.")
        emit(Notice(f"{target} stands already."))
        return StageFinished(_STAGE, 0, (), 0.0, {})
    if missing := stage.pending():
        raise PairmillError(
            f"{source.url} {stage.path}: {len(missing)} shards are not up to date. Run the command that makes them."
        )
    chosen = _chosen(source, config)
    target.parent.mkdir(parents=True, exist_ok=True)
    _clear(target)
    _clear(mark_file)
    with atomic_file(mark_file) as stream:
        stream.write(mark)
    emit(StageStarted(_STAGE, 0, 0, len(source)))
    images = _images(source, config, chosen, emit)
    written = _write_tsv(target, images, config) if format == "tsv" else _write_lmdb(target, images, config)
    if not written:
        emit(Notice(f"{source.url} {stage.path} has no row that is ok: {target} is empty.", True))
    finished = StageFinished(_STAGE, source.num_shards, (), time.monotonic() - start, {OK: written})
    emit(finished)
    return finished


def _mark(dataset: Dataset, format: str, config: ExportFeaturesConfig) -> bytes:
    """What an export was made from: beside it, since a TSV has no place for it."""
    sidecar = dataset.stage(f"features/{config.name}").sidecar()
    assert sidecar is not None, "`require` raises where there is none"
    source = {"features": sidecar.fingerprint, "pairs": dataset.whole_digest()}
    return (json.dumps({"format": format, **config.identity_fields(), "source": source}, indent=1) + "\n").encode()


def _clear(target: Path) -> None:
    """Removes what killed exports left beside `target`."""
    for found in target.parent.iterdir():
        if is_left_over(found.name) and found.name.endswith(f"-{target.name}"):
            shutil.rmtree(found) if found.is_dir() else found.unlink()


def _chosen(dataset: Dataset, config: ExportFeaturesConfig) -> np.ndarray:
    """bool [rows]: of the rows that are ok and have a name, the first of each.

    Raises PairmillError where one name is that of several images: all but one would be lost.
    """
    stage, pairs = dataset.stage(f"features/{config.name}"), dataset.stage(PAIRS)
    hashes = Hashes()
    for shard in range(dataset.num_shards):
        states = MappedShard(dataset.folder, stage.file(shard)).states()
        images = read_table(dataset.folder, pairs.file(shard), ["sha256"])["sha256"].to_pylist()
        for key, state, sha256 in zip(row_keys(dataset, shard, config.key), states, images, strict=True):
            hashes.add(key if state == OK else None, sha256)
    shared = np.flatnonzero(hashes.shared())
    if len(shared):
        shard, row = dataset.locate(str(shared[0]))
        raise PairmillError(
            f"{dataset.url}: {len(shared):,} rows have the name of another image, too; the first is row {shard}:{row}, "
            f"{row_keys(dataset, shard, config.key)[row]}. Nothing written. Give --key COLUMN that tells the images "
            "apart, such as uid."
        )
    names = hashes.by("name")
    chosen: np.ndarray = np.zeros(len(names), bool)
    chosen[np.unique(names, return_index=True)[1]] = True
    return chosen & (names != 0)


def _images(dataset: Dataset, config: ExportFeaturesConfig, chosen: np.ndarray, emit: Emit) -> Iterator[Image]:
    """Rows that are ok, in order, each name once."""
    stage, pairs = dataset.stage(f"features/{config.name}"), dataset.stage(PAIRS)
    repeated = done = 0
    for shard in range(dataset.num_shards):
        mapped = MappedShard(dataset.folder, stage.file(shard))
        if not {"boxes", "features"} <= set(mapped.schema.names):
            raise PairmillError(f"{dataset.url} {stage.path} holds no regions. Give --name of a set that has boxes.")
        columns = [name for name in _TAKEN if name in mapped.schema.names]
        sizes = read_table(dataset.folder, pairs.file(shard), list(_SIZES)).to_pylist()
        for row, (key, size) in enumerate(zip(row_keys(dataset, shard, config.key), sizes, strict=True)):
            done += 1
            found = mapped.row(row, columns)
            if found["state"] != OK:
                continue
            name = name_of(key or "")
            if not name or "\t" in name or "\n" in name or "\r" in name:
                raise PairmillError(
                    f"{dataset.url} row {shard}:{row}: {name!r} cannot name an image. Give --key COLUMN."
                )
            if found["boxes"] is None:
                raise PairmillError(f"{dataset.url} {stage.path} row {shard}:{row} has no boxes, which {_STAGE} needs.")
            if not chosen[done - 1]:
                repeated += 1
                continue
            yield Image(name, _size(size), found)
        emit(Progress(_STAGE, done, 0))
    if repeated:
        emit(Notice(f"{repeated:,} rows show an image that an earlier row has; each image was written once."))


def _size(row: dict[str, Any]) -> tuple[int, int]:
    """What boxes count in: the stored image, or else the original; where no size is known, shares of the sides."""
    return (row["width"] or row["original_width"] or 1, row["height"] or row["original_height"] or 1)


def _write_tsv(target: Path, images: Iterator[Image], config: ExportFeaturesConfig) -> int:
    fields = LXMERT if config.fields == "lxmert" else BUTD
    written = 0
    with atomic_file(target) as stream:
        for image in images:
            cells = _cells(image)
            stream.write(b"\t".join(cells[name] for name in fields) + b"\n")
            written += 1
    return written


def _cells(image: Image) -> dict[str, bytes]:
    """Every field of LXMERT and BUTD. What the set lacks is zero: an id 0 of confidence 0."""
    row, (width, height) = image.row, image.size
    boxes = np.asarray(row["boxes"], np.float32).reshape(-1, 4)
    arrays = {
        "objects_id": image.column("obj_id", "<i8"),
        "objects_conf": image.column("det_conf" if row.get("obj_conf") is None else "obj_conf", "<f4"),
        "attrs_id": image.column("attr_id", "<i8"),
        "attrs_conf": image.column("attr_conf", "<f4"),
        "boxes": boxes.astype("<f4"),
        "features": row["features"].astype("<f4"),
    }
    texts = {"num_boxes": row["num_boxes"], "img_w": width, "img_h": height, "image_w": width, "image_h": height}
    names = {"img_id": image.name.encode(), "image_id": image.name.encode()}
    plain = {name: str(value).encode() for name, value in texts.items()}
    return names | plain | {name: base64.b64encode(array.tobytes()) for name, array in arrays.items()}


def _write_lmdb(target: Path, images: Iterator[Image], config: ExportFeaturesConfig) -> int:
    """UNITER's image folder: the database, and the number of boxes of each image as its loader counts them."""
    lmdb = need("lmdb")
    temporary = target.with_name(temporary_name(target.name))
    inner = temporary / (_DATABASE + ("_compressed" if config.compress else ""))
    inner.mkdir(parents=True)
    counts: dict[str, int] = {}
    try:
        env = lmdb.open(str(inner), map_size=_MAP_BYTES)
        transaction = env.begin(write=True)
        for image in images:
            key = f"{image.name}.npz".encode()
            if len(key) > _MOST_KEY_BYTES:
                raise PairmillError(f"{image.name[:60]}...: a key of LMDB has at most 511 bytes. Give --key COLUMN.")
            dump = _dump(image)
            transaction.put(key, _npz(dump) if config.compress else _msgpack(dump))
            counts[key.decode()] = _boxes_used(image)
            if len(counts) % _COMMIT_EVERY == 0:
                transaction.commit()
                transaction = env.begin(write=True)
        transaction.put(b"__keys__", json.dumps(list(counts)).encode())
        transaction.commit()
        env.close()
        (inner / "lock.mdb").unlink()
        (temporary / f"nbb_th{_CONF}_max{_MAX}_min{_MIN}.json").write_text(json.dumps(counts))
        place_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return len(counts)


def _boxes_used(image: Image) -> int:
    """clamp(boxes above confidence 0.2, 10, 100), and no more than there are; all where there is no confidence."""
    n = image.row["num_boxes"]
    if image.row.get("det_conf") is None:
        return min(n, _MAX)
    return min(n, max(_MIN, min(_MAX, int((image.column("det_conf", "<f2") > _CONF).sum()))))


def _dump(image: Image) -> dict[str, np.ndarray]:
    """float16 features [n, D], norm_bb [n, 6], conf [n], soft_labels [n, C + 1] where the set has them."""
    width, height = image.size
    boxes = np.asarray(image.row["boxes"], np.float32).reshape(-1, 4) / np.array([width, height] * 2, np.float32)
    sides = boxes[:, 2:] - boxes[:, :2]
    out = {"features": image.row["features"], "norm_bb": np.concatenate([boxes, sides], axis=1).astype("<f2")}
    confidence = next((c for c in ("det_conf", "obj_conf") if image.row.get(c) is not None), None)
    if confidence is not None:
        out["conf"] = image.column(confidence, "<f2")
    if image.row.get("cls_probs") is not None:
        out["soft_labels"] = image.row["cls_probs"]
    return out


def _npz(dump: dict[str, np.ndarray]) -> bytes:
    out = io.BytesIO()
    np.savez_compressed(out, **dump)  # type: ignore[arg-type]
    return out.getvalue()


def _msgpack(dump: dict[str, np.ndarray]) -> bytes:
    """As msgpack_numpy writes arrays."""
    maps = {
        name: {b"nd": True, b"type": a.dtype.str, b"kind": b"", b"shape": list(a.shape), b"data": a.tobytes()}
        for name, a in dump.items()
    }
    return need("msgpack").packb(maps, use_bin_type=True)
