"""How alike rows are: cosines of a row's or a text's embedding with every image embedding, and equal pictures."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from curation.groups import rich
from curation.hamming import groups
from curation.table import Table
from schemas.errors import PairmillError, suggest
from schemas.sidecars import Sidecar
from shards.dataset import Dataset, Stage
from shards.reader import MappedShard
from shards.scan import starts

IMAGE = "clip_image"
FINE = 1024  # the most alike rows are computed again in fp32: fp16 has steps of 2e-4 near 0.3
NEAR_BITS = 4
FLAT_BITS = 8  # as `dedup near` has it by default
_THREADS = 2


def embedding_sets(dataset: Dataset) -> list[Stage]:
    """Feature sets with an image embedding in every shard."""
    return [s for s in dataset.stages() if s.kind == "features" and _has_embeddings(s, dataset)]


def _has_embeddings(stage: Stage, dataset: Dataset) -> bool:
    sidecar = stage.sidecar()
    return sidecar is not None and IMAGE in sidecar.columns and stage.standing() >= set(range(dataset.num_shards))


@dataclass(frozen=True)
class _Block:
    """Rows that lie together in a mapped file: `vectors` torch fp16 [n, D], `nulls` which of them are null."""

    first: int
    vectors: Any
    nulls: np.ndarray | None


class Embeddings:
    """The image embeddings of one feature set, mapped from their files: they take no memory of their own."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self._lock = threading.Lock()
        self._blocks: list[_Block] | None = None
        self._absent: np.ndarray = np.empty(0, np.int64)  # rows without an embedding

    def blocks(self) -> list[_Block]:
        """Every batch of every shard, in order."""
        with self._lock:
            if self._blocks is None:
                begin = starts(self.stage.dataset)
                found = []
                for shard in range(self.stage.dataset.num_shards):
                    file = MappedShard(self.stage.folder, self.stage.file(shard))
                    found += list(_blocks(file, int(begin[shard])))
                absent: list[np.ndarray] = [b.first + np.flatnonzero(b.nulls) for b in found if b.nulls is not None]
                self._absent = np.concatenate([np.empty(0, np.int64), *absent])
                self._blocks = found
            return self._blocks

    def vector(self, row: int) -> np.ndarray:
        """fp32 [D] of one row. Raises PairmillError where it has none."""
        for block in self.blocks():
            at = row - block.first
            if 0 <= at < len(block.vectors):
                if block.nulls is not None and block.nulls[at]:
                    break
                return block.vectors[at].float().numpy()
        raise PairmillError(f"Row {row} has no embedding in {self.stage.path}: it has no image that could be read.")

    def likeness(self, vector: np.ndarray) -> np.ndarray:
        """fp32 [rows]: the cosine of every row's image with `vector` fp32 [D]; NaN where a row has no embedding.

        In fp16, but for the 1024 most alike rows, which are computed in fp32. Raises PairmillError where the dimensions
        differ.
        """
        import torch

        blocks = self.blocks()
        dim = blocks[0].vectors.shape[1] if blocks else len(vector)
        if len(vector) != dim:
            raise PairmillError(f"{self.stage.path} has embeddings of {dim} numbers, this one has {len(vector)}.")
        query = torch.from_numpy(np.ascontiguousarray(vector, np.float32))
        half = query.half()
        products = torch.empty(int(starts(self.stage.dataset)[-1]), dtype=torch.float16)

        def coarse(part: list[_Block]) -> None:
            with torch.inference_mode():
                for block in part:
                    torch.mv(block.vectors, half, out=products[block.first : block.first + len(block.vectors)])

        # A block is too small to be shared among torch's threads: they would only wait for each other.
        before = torch.get_num_threads()
        try:
            with ThreadPoolExecutor(_THREADS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                list(pool.map(coarse, _parts(blocks)))
        finally:
            torch.set_num_threads(before)
        out: np.ndarray = products.float().numpy()
        out[self._absent] = np.nan
        self._refine(out, query)
        return out

    def _refine(self, scores: np.ndarray, query: Any) -> None:
        import torch

        key = np.where(np.isnan(scores), np.inf, -scores)
        best = np.argpartition(key, FINE)[:FINE] if len(key) > FINE else np.arange(len(key))
        best = np.sort(best[np.isfinite(key[best])])
        blocks = self.blocks()
        firsts = np.array([b.first for b in blocks])
        owner = np.asarray(np.searchsorted(firsts, best, side="right")) - 1
        places = zip(owner.tolist(), (best - firsts[owner]).tolist(), strict=True)
        vectors = [blocks[number].vectors[at] for number, at in places]
        if vectors:
            scores[best] = torch.mv(torch.stack(vectors).float(), query).numpy()


def _blocks(file: MappedShard, first: int) -> Iterator[_Block]:
    import torch

    for batch in file.batches:
        column: Any = batch.column(IMAGE)
        storage = column.storage
        dim = column.type.shape[0]
        start = storage.offset * dim
        view = storage.values.to_numpy(zero_copy_only=True)[start : start + len(storage) * dim].reshape(-1, dim)
        with warnings.catch_warnings():  # the file is mapped for reading, and nothing here writes
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            vectors = torch.from_numpy(view)
        nulls = np.asarray(storage.is_null()) if storage.null_count else None
        yield _Block(first, vectors, nulls)
        first += len(storage)


def _parts(blocks: list[_Block]) -> list[list[_Block]]:
    each = -(-len(blocks) // _THREADS) or 1
    return [blocks[i : i + each] for i in range(0, len(blocks), each)]


class TextTower:
    """Turns words into the embedding that a set's images are compared with."""

    def __init__(self, source: Any) -> None:
        import torch

        from extractors.clip import ClipTokenizer

        self.label = source.label
        self._model = source.build(torch.device("cpu"))
        self._tokenize = ClipTokenizer(source.tokenizer())
        self._one = threading.Lock()

    def __call__(self, words: str) -> np.ndarray:
        """fp32 [D], L2-normalised."""
        import torch

        tokens, _ = self._tokenize([words])
        with self._one, torch.inference_mode():
            found = self._model.encode_text(torch.from_numpy(tokens).long())
            return torch.nn.functional.normalize(found.float(), dim=-1)[0].numpy()


def text_tower(stages: list[Stage], model: str | None, pretrained: str | None) -> tuple[str, TextTower] | None:
    """(feature set, the text tower of the CLIP that made it), or None where no model is at hand.

    model       a run, a folder or a name, as `score clip` takes it; None: the weights that a sidecar names, where
                they lie in open_clip's cache. Nothing is downloaded for None.

    Raises PairmillError where `model` is given and made none of the sets.
    """
    from extractors.clip_source import cached_clip, find_clip

    if model is None:
        for stage in stages:
            source = cached_clip(_recorded(stage, "model"), _recorded(stage, "weights"))
            if source is not None:
                return stage.name, TextTower(source)
        return None
    source = find_clip(str(Path(model)) if Path(model).exists() else model, pretrained)
    for stage in stages:
        if _recorded(stage, "weights") == source.sha256:
            return stage.name, TextTower(source)
    made = ", ".join(f"{s.path} ({_recorded(s, 'model')})" for s in stages) or "no embeddings at all"
    raise PairmillError(
        f"`--model {model}`: its weights made none of the embeddings here; there are {made}. Run `pairmill score clip` "
        "with it, or name the one that was used."
    )


def _recorded(stage: Stage, what: str) -> str:
    sidecar = stage.sidecar()
    columns: dict[str, Any] = sidecar.columns if isinstance(sidecar, Sidecar) else {}
    return str(columns.get(IMAGE, {}).get(what, ""))


def find_set(dataset: Dataset, stages: list[Stage], name: str | None) -> Stage:
    """The set of that name, or the first. Raises PairmillError that lists what there is."""
    names = [s.name for s in stages]
    if not names:
        raise PairmillError(
            f"{dataset.url} has no image embeddings. Make them: `pairmill score clip {dataset.url} --model ...`"
        )
    if name is not None and name not in names:
        raise PairmillError(f"There are no embeddings `{name}`.{suggest(name, names)} There are: {', '.join(names)}.")
    return stages[0 if name is None else names.index(name)]


class Twins:
    """Rows that show the same picture: equal hash of decoded pixels, or pHash within 4 bits."""

    def __init__(self, table: Table, group: str) -> None:
        self.group = group
        names = {c.rpartition(".")[2]: c for c in table.columns if table.set_of(c) == group}
        self.phash_name, self.pixels_name = names["phash"], names.get("pixel_sha256")
        wanted = [n for n in (self.phash_name, self.pixels_name) if n]
        frame = table.frame(wanted).collect(engine="streaming")
        phash = frame[self.phash_name]
        self.valid = phash.is_not_null().to_numpy()
        self.phash = _as_uint64(phash)
        # 64 bits of SHA-256 tell a million pictures apart but for one chance in 10**7.
        self.pixels = _as_uint64(frame[self.pixels_name].bin.slice(0, 8)) if self.pixels_name else None

    @property
    def nbytes(self) -> int:
        return self.phash.nbytes + self.valid.nbytes + (0 if self.pixels is None else self.pixels.nbytes)

    def of(self, row: int) -> np.ndarray:
        """bool [rows]: `row` itself and its twins; none where it has no hash.

        A flat picture (see `curation.groups.rich`) has hardly a pHash: it is twin to equal pixels only.
        """
        out: np.ndarray = np.zeros(len(self.valid), bool)
        if not self.valid[row]:
            return out
        out[row] = True
        if self.pixels is not None:
            out |= self.valid & (self.pixels == self.pixels[row])
        if rich(self.phash[row : row + 1], FLAT_BITS)[0]:
            out |= self.valid & (np.bitwise_count(self.phash ^ self.phash[row]) <= NEAR_BITS)
        return out

    def groups(self) -> np.ndarray:
        """int64 [rows]: rows of one group have one number, -1 without a hash: twins, and twins of twins."""
        out: np.ndarray = np.full(len(self.valid), -1, np.int64)
        some = self.valid & rich(self.phash, FLAT_BITS)
        node, place = np.unique(self.phash[some], return_inverse=True)
        out[some] = groups(node, NEAR_BITS)[place]
        flat = self.valid & ~some
        if self.pixels is not None:
            equal = np.unique(self.pixels[flat], return_inverse=True)[1]
        else:
            equal = np.arange(int(flat.sum()))
        out[flat] = len(node) + equal
        return out

    def copies(self, number: np.ndarray) -> pl.Series:
        """How many rows each row's group (of `groups`) has; null without a hash."""
        there = number[self.valid]
        sizes = np.bincount(there, minlength=1)[np.maximum(number, 0)].astype(np.int32)
        return pl.select(pl.when(pl.Series(self.valid)).then(pl.Series(sizes))).to_series()


def _as_uint64(values: pl.Series) -> np.ndarray:
    """A hash of 64 bits as a number; 0 for null."""
    if values.dtype == pl.Binary:
        values = values.bin.reinterpret(dtype=pl.UInt64, endianness="big")
    return values.fill_null(0).cast(pl.UInt64).to_numpy()


def twin_set(table: Table, sets: list[str]) -> str | None:
    """The score set that holds hashes of pictures, or None."""
    return next((g for g in sets if f"{g}.phash" in table.columns), None)
