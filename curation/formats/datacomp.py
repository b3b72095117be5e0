"""DataComp's metadata: Parquet files of uid, url, text and scores, each with an npz of CLIP embeddings beside it.

It is a pool before its download, so it is read as one: rows without images (`no_image`) that keep uid, url, sizes and
hash; the scores are columns (`clip_l14_similarity_score`), the embeddings the feature sets `clip_b32` and `clip_l14`,
row by row. A filter then chooses before anything is downloaded, and the export writes what it kept: Parquet files for
`pairmill download`, and `subset.npy`, the sorted uids (dtype u8,u8) that DataComp's own resharder takes.
"""

from __future__ import annotations

import contextlib
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.formats.listed import captions_in
from curation.formats.samples import Sample, Source, describe, find_files
from curation.maintenance_config import ExportConfig, ImportConfig
from curation.reshard import Part, make_plan, pairs_schema_of
from schemas.config import StageConfig
from schemas.errors import PairmillError
from schemas.features import FEATURES, VERSION, clip_embedding_fields, features_schema
from schemas.pairs import carried_fields
from schemas.sidecars import make_sidecar
from schemas.status import NO_IMAGE, OK, SUCCESS
from shards.dataset import PAIRS, Dataset
from shards.files import Folder
from shards.reader import open_parquet, read_table
from shards.writer import write_features

# Feature set -> (keys of image and text in the npz, whose embedding it is).
EMBEDDINGS = {
    "clip_b32": ("b32_img", "b32_txt", "OpenAI CLIP ViT-B-32"),
    "clip_l14": ("l14_img", "l14_txt", "OpenAI CLIP ViT-L-14"),
}
_MAX_DIM = 1 << 14
_BLOCK_ROWS = 256
_NEEDED = frozenset({"url", "text"})
Pair = tuple[np.ndarray, np.ndarray] | None


def sources(paths: Sequence[str]) -> list[Source]:
    """Parquet files and npz files among `paths`. Raises PairmillError where there is no Parquet file."""
    found = find_files(paths, lambda name: name.lower().endswith((".parquet", ".npz")), "DataComp metadata (.parquet)")
    if not any(s.url.endswith(".parquet") for s in found):
        raise PairmillError(f"{', '.join(paths)}: no DataComp metadata (.parquet) there.")
    return found


def read(sources: Sequence[Source], config: ImportConfig) -> Iterator[Sample]:
    """A row a row, file after file; a thousand are in memory at a time.

    Raises PairmillError: a damaged file, or one without url and text.
    """
    for source in _parquets(sources):
        for number, row in enumerate(_rows(source)):
            sample = describe(Sample(f"{source.name} row {number}", None), row, config)
            sample.status = NO_IMAGE
            yield sample


def _parquets(sources: Sequence[Source]) -> list[Source]:
    return [s for s in sources if s.url.endswith(".parquet")]


def _rows(source: Source) -> Iterator[dict[str, Any]]:
    try:
        with source.open() as stream:
            file = pq.ParquetFile(stream, buffer_size=1 << 20, pre_buffer=False)
            missing = _NEEDED - set(file.schema_arrow.names)
            if missing:
                names = ", ".join(sorted(missing))
                raise PairmillError(f"{source.url} has no column {names}: it is no metadata of DataComp.")
            for batch in file.iter_batches(1000):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise PairmillError(f"{source.url} is damaged: {str(error).splitlines()[0]}. Fetch it again.") from None


def features(dataset: Dataset, sources: Sequence[Source]) -> None:
    """Writes `features/clip_b32` and `features/clip_l14` of the npz files there are, aligned with the pairs.

    A row whose file has no npz beside it is `missing_file`. Raises PairmillError: an npz that is damaged, or of
    another number of rows than its Parquet file.
    """
    npz = {s.url.removesuffix(".npz"): s for s in sources if s.url.endswith(".npz")}
    parts = [(s, npz.get(s.url.removesuffix(".parquet"))) for s in _parquets(sources)]
    for name, (image, text, model) in EMBEDDINGS.items():
        dims = next((dim for _, source in parts if source and (dim := _dim(source, image))), None)
        if dims is not None:
            _write_set(dataset, f"{FEATURES}/{name}", dims, model, _pairs(parts, image, text, dims))


def _write_set(dataset: Dataset, path: str, dim: int, model: str, pairs: Iterator[Pair]) -> None:
    stage = dataset.stage(path)
    about = {"model": model, "source": "DataComp metadata", "precision": "fp16"}
    columns = {"clip_image": about, "clip_text": about}
    made = make_sidecar("import datacomp", stage.name, (FEATURES, VERSION), StageConfig(), about, columns)
    stage.begin(made, "Choose another place with -o.")
    schema, standing = features_schema(clip_embedding_fields(dim), dict(about)), stage.standing()
    for shard, rows in enumerate(dataset.manifest.shards):
        if shard in standing:
            for _ in range(rows):
                next(pairs)
            continue
        with write_features(stage.folder, stage.file(shard), schema, dataset.stage(PAIRS).digest(shard)) as writer:
            for _ in range(rows):
                pair = next(pairs)
                row = {"state": "missing_file"} if pair is None else {"state": OK}
                writer.append(row if pair is None else {**row, "clip_image": pair[0], "clip_text": pair[1]})


def _pairs(parts: Iterable[tuple[Source, Source | None]], image: str, text: str, dim: int) -> Iterator[Pair]:
    """Embeddings float16 [dim] of image and text, a pair a row of the Parquet files; None where there are none."""
    for parquet, npz in parts:
        with parquet.open() as stream:
            rows = pq.ParquetFile(stream).metadata.num_rows
        if npz is None:
            yield from (None for _ in range(rows))
            continue
        with _opened(npz) as first, _opened(npz) as second:
            vectors = (_vectors(npz, file, key, (rows, dim)) for file, key in ((first, image), (second, text)))
            yield from zip(*vectors, strict=True)


@contextlib.contextmanager
def _opened(source: Source) -> Iterator[zipfile.ZipFile]:
    try:
        with source.open() as stream, zipfile.ZipFile(stream) as file:
            yield file
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, OSError) as error:
        raise PairmillError(f"{source.url} is damaged: {error}. Fetch it again.") from None


def _dim(source: Source, key: str) -> int | None:
    with _opened(source) as file:
        if f"{key}.npy" not in file.namelist():
            return None
        with file.open(f"{key}.npy") as stream:
            return _header(stream, source, key)[0][1]


def _header(stream: Any, source: Source, key: str) -> tuple[tuple[int, int], np.dtype[Any]]:
    """(shape, dtype) of a .npy file of floats [rows, D]; nothing of it is unpickled."""
    version = np.lib.format.read_magic(stream)
    if version > (2, 0):
        raise ValueError(f"{key} has npy version {version}")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if len(shape) != 2 or dtype.kind != "f" or not 0 < shape[1] <= _MAX_DIM or (fortran and min(shape) > 1):
        raise PairmillError(f"{source.url}: {key} is {dtype} {shape}; expected floats [rows, D] in C order.")
    return shape, dtype


def _vectors(source: Source, file: zipfile.ZipFile, key: str, want: tuple[int, int]) -> Iterator[np.ndarray]:
    """The rows of one array, float16 [D], read a block at a time."""
    with file.open(f"{key}.npy") as stream:
        shape, dtype = _header(stream, source, key)
        if shape != want:
            raise PairmillError(
                f"{source.url}: {key} is {list(shape)}; expected {list(want)}, "
                "as many rows as the Parquet file beside it. Fetch both again."
            )
        rows, width = want
        for start in range(0, rows, _BLOCK_ROWS):
            count = min(_BLOCK_ROWS, rows - start)
            data = stream.read(count * width * dtype.itemsize)
            yield from np.frombuffer(data, dtype).reshape(count, width).astype(np.float16)


@dataclass(frozen=True)
class Usable(Part):
    """The rows of a part that are a success, or a text without an image by design."""

    def kept(self, shard: int) -> np.ndarray:
        pairs = self.dataset.stage(PAIRS)
        status = read_table(self.dataset.folder, pairs.file(shard), ["status"])["status"].to_pylist()
        return np.array([r for r in super().kept(shard).tolist() if status[r] in (SUCCESS, NO_IMAGE)], np.int64)


def jobs(part: Part, config: ExportConfig) -> list[Any]:
    """One job, over rows without images too: what the export asks a format for."""
    from curation.exporting import Job

    dataset = part.dataset
    files = [dataset.stage(PAIRS).file(shard) for shard in range(dataset.num_shards)]
    several = any(
        read_table(dataset.folder, file, ["captions"])["captions"].null_count < n
        for file, n in zip(files, dataset.manifest.shards, strict=True)
    )
    writer = Writer(carried_fields(pairs_schema_of(dataset)), several)
    return [Job(writer, make_plan([Usable(dataset, part.selection)], config.shard_rows))]


class Writer:
    """Writes `NNNNN.parquet` and, in the end, `subset.npy`; memory holds 16 bytes a row for it."""

    def __init__(self, carried: Sequence[pa.Field], several: bool) -> None:
        """`several`: a row has several captions, which takes a column of lists."""
        ours = [pa.field(name, pa.string()) for name in ("uid", "input_uid", "url", "text", "sha256")]
        ours += [pa.field(name, pa.int32()) for name in ("original_width", "original_height")]
        ours += [pa.field("captions", pa.list_(pa.string()))] if several else []
        names = {field.name for field in ours}
        self.carried = {f.name: f"input_{f.name}" if f.name in names else f.name for f in carried}
        self.schema = pa.schema([*ours, *(f.with_name(self.carried[f.name]) for f in carried)])

    def stands(self, folder: Folder, number: int) -> bool:
        return folder.exists(f"{number:05d}.parquet")

    def write(self, folder: Folder, number: int, rows: Iterable[Mapping[str, Any]]) -> None:
        with folder.write(f"{number:05d}.parquet") as stream, pq.ParquetWriter(stream, self.schema) as writer:
            rest = iter(rows)
            while block := [self._row(row) for row in islice(rest, 10_000)]:
                writer.write_table(pa.Table.from_pylist(block, schema=self.schema))

    def _row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        out = {name: row[name] for name in ("input_uid", "url", "original_width", "original_height")}
        out |= {"uid": row["uid"].hex(), "text": row["caption"], "captions": captions_in(row) or None}
        out["sha256"] = row["sha256"].hex() if row["sha256"] else None
        return out | {theirs: row[ours] for ours, theirs in self.carried.items()}

    def finish(self, folder: Folder, sizes: Sequence[int]) -> None:
        uids: np.ndarray = np.empty(sum(sizes), "u8,u8")
        at = 0
        for number in range(len(sizes)):
            with open_parquet(folder, f"{number:05d}.parquet") as file:
                for uid in file.read(columns=["uid"])["uid"].to_pylist():
                    uids[at] = (int(uid[:16], 16), int(uid[16:], 16))
                    at += 1
        uids.sort()
        with folder.write("subset.npy") as stream:
            np.lib.format.write_array(stream, uids, allow_pickle=False)
