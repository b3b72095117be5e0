"""Which file names and columns ViLT's, METER's and VLMo's readers know, and which rows go where.

Names: `vilt/datasets/*.py` and `vlmo/datasets/*.py` (ViLT 762fd39, METER f4f0934, unilm 768a3c8), columns: their
`write_*.py`.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from curation.reshard import Part
from schemas.errors import PairmillError, suggest
from schemas.pairs import carried_fields
from schemas.status import NO_IMAGE, SUCCESS
from shards.dataset import PAIRS
from shards.reader import read_table

# Their retrieval takes `int(image_id.split(".")[0].split("_")[-1])` for the image's number.
_NUMBER = re.compile(r"(?:[^.]*_)?([0-9]{1,18})(?:\..*)?\Z", re.DOTALL)
_TEXTS = pa.list_(pa.string())
_NUMBERS = pa.list_(pa.int64())
_COLUMNS = [("image", pa.binary()), ("caption", _TEXTS), ("image_id", pa.string()), ("split", pa.string())]
_REGIONS = [("width", _NUMBERS), ("height", _NUMBERS), ("x", _NUMBERS), ("y", _NUMBERS)]
_LINES = [("image", pa.string()), ("caption", _TEXTS), ("source", pa.string()), ("split", pa.string())]


@dataclass(frozen=True)
class Layout:
    """`names`: the files of each split, in the order of their rows; `statuses`: of the rows that fit."""

    names: dict[str, tuple[str, ...]]
    schema: pa.Schema = pa.schema(_COLUMNS)  # noqa: RUF009  a schema never changes
    statuses: tuple[str, ...] = (SUCCESS,)


def _karpathy(name: str, *splits: str) -> dict[str, tuple[str, ...]]:
    return {split: (f"{name}_caption_karpathy_{split}",) for split in splits}


def _numbered(name: str, count: int) -> tuple[str, ...]:
    return tuple(f"{name}_{i}" for i in range(count))


LAYOUTS = {
    "conceptual": Layout({"train": _numbered("conceptual_caption_train", 30), "val": ("conceptual_caption_val_0",)}),
    "coco": Layout(_karpathy("coco", "train", "restval", "val", "test")),
    "f30k": Layout(_karpathy("f30k", "train", "val", "test")),
    "sbu": Layout({"train": _numbered("sbu", 9)}),
    "vg": Layout({"train": ("vg",)}, pa.schema([*_COLUMNS[:2], *_REGIONS, _COLUMNS[2]])),
    "wikibk": Layout(
        {"train": _numbered("wikibk_train", 50), "val": ("wikibk_val_0",)}, pa.schema(_LINES), (SUCCESS, NO_IMAGE)
    ),
}


@dataclass(frozen=True)
class Split(Part):
    """The rows of a part that go into the files of one split. `column` None: all of them do."""

    statuses: tuple[str, ...] = (SUCCESS,)
    column: str | None = None
    split: str = "train"

    def kept(self, shard: int) -> np.ndarray:
        rows = super().kept(shard)
        good = np.isin(self.column_of(shard, "status", rows), self.statuses)
        if self.column is not None:
            good &= self.column_of(shard, self.column, rows) == self.split
        return rows[good]

    def column_of(self, shard: int, name: str, rows: np.ndarray) -> np.ndarray:
        """Texts of the rows, object [rows]; the null of a split is `train`."""
        table = read_table(self.dataset.folder, self.dataset.stage(PAIRS).file(shard), [name])
        texts = table[name].take(pa.array(rows)).to_pylist()
        return np.array(["train" if t is None and name == self.column else t for t in texts], object)


def split_rows(part: Part, layout: Layout, split: str | None, schema: pa.Schema) -> dict[str, Split]:
    """Split -> its rows, for every split of the layout.

    Raises PairmillError where a row, or `split`, is of a split that the layout has no file for.
    """
    known = ", ".join(layout.names)
    if split is not None and split not in layout.names:
        raise PairmillError(
            f"--split {split}: there is no such split.{suggest(split, layout.names)} There are: {known}."
        )
    column = next((f.name for f in carried_fields(schema) if f.name == "split" and pa.types.is_string(f.type)), None)
    column = None if split is not None else column
    every = Split(part.dataset, part.selection, layout.statuses)
    if column is None:
        only = split or "train"
        return {name: every if name == only else _none(part) for name in layout.names}
    counts: Counter[str] = Counter()
    look = Split(part.dataset, part.selection, layout.statuses, column)
    for shard in range(part.dataset.num_shards):
        counts.update(look.column_of(shard, column, every.kept(shard)).tolist())
    strange = {name: n for name, n in counts.items() if name not in layout.names}
    if strange:
        shown = ", ".join(f"{n} of {name!r}" for name, n in sorted(strange.items())[:10])
        raise PairmillError(
            f"The column `split` has rows that go into no file: {shown}. There are the splits {known}. "
            "Nothing written. Keep other rows with --selection, or name one split for all with --split."
        )
    return {name: Split(part.dataset, part.selection, layout.statuses, column, name) for name in layout.names}


def _none(part: Part) -> Split:
    return Split(part.dataset, part.selection, ())


def files_of(layout: Layout, split: str, rows: int, shard_rows: int) -> int:
    """Rows a file. Raises PairmillError where the split's names are too few for them."""
    names = layout.names[split]
    if len(names) == 1:
        return max(rows, 1)
    if rows > shard_rows * len(names):
        raise PairmillError(
            f"{rows} rows of the split `{split}` do not fit into {names[0]} to {names[-1]} of {shard_rows} rows each; "
            f"the readers know no other names. Nothing written. Give --shard-rows {-(-rows // len(names))} or more."
        )
    return shard_rows


def keeps_ids(rows: Split, schema: pa.Schema) -> tuple[bool, tuple[str, ...]]:
    """Whether the rows carry an `image_id` that the readers can use, and what to tell where it is not so.

    Takes 8 bytes a row: the numbers must differ, or retrieval would take two images for one.
    """
    field = next((f for f in carried_fields(schema) if f.name == "image_id"), None)
    if field is None or not (pa.types.is_string(field.type) or pa.types.is_integer(field.type)):
        return False, ()
    seen = []
    for shard in range(rows.dataset.num_shards):
        numbers = [number_of(v) for v in rows.column_of(shard, "image_id", rows.kept(shard))]
        if None in numbers:
            return False, ("image_id: rows have none that ends in digits. All were given new ones.",)
        seen.append(np.array(numbers, np.int64))
    every = np.concatenate(seen) if seen else np.zeros(0, np.int64)
    if len(np.unique(every)) < len(every):
        return False, (f"image_id: images of the split {rows.split} share a number. All were given new ones.",)
    return True, ()


def number_of(image_id: object) -> int | None:
    """The number that their retrieval reads from an `image_id`; None where it would fail."""
    found = _NUMBER.match(str(image_id))
    return int(found[1]) if found else None
