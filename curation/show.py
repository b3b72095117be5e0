"""Rows of a dataset for the terminal, and as a contact sheet."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from curation.maintenance_config import ShowConfig
from schemas.errors import PairmillError, suggest
from schemas.status import STATUSES
from schemas.tensors import tensor_spec
from shards.dataset import PAIRS, Dataset, Stage
from shards.files import atomic_file
from shards.images import ImageError, decode_rgb
from shards.reader import MappedShard, group_rows, read_table, row_groups
from shards.select import read_selection

At = tuple[int, int]  # (shard, row)
_PAPER, _INK, _GREY, _RED = (250, 250, 248), (28, 28, 30), (125, 125, 130), (176, 42, 48)
_SHEET_COLUMNS = 6


@dataclass(frozen=True)
class ShownRow:
    """One pair. `values` are its columns but the image, scores as `NAME.column`; `image` the stored bytes or None."""

    shard: int
    row: int
    values: dict[str, Any]
    image: bytes | None = field(repr=False)


def show(dataset: Dataset | str | Path, config: ShowConfig) -> list[ShownRow]:
    """The rows asked for, in the order asked for; a sample is in the dataset's order. Writes `config.output`.

    Raises PairmillError: no such row, selection, status or column.
    """
    dataset = dataset if isinstance(dataset, Dataset) else Dataset.open(dataset)
    places, reasons = _choose(dataset, config)
    rows = _read(dataset, places, reasons)
    if config.columns:
        rows = [_narrow(row, config.columns) for row in rows]
    if config.output is not None:
        write_sheet(rows, config.output, config.thumbnail)
    return rows


def _choose(dataset: Dataset, config: ShowConfig) -> tuple[list[At], dict[At, str | None]]:
    if config.rows:
        return [dataset.locate(text) for text in config.rows], {}
    mask: np.ndarray = np.ones(len(dataset), bool)
    reasons = None
    if config.selection is not None:
        keep = read_selection(dataset, config.selection).keep
        mask = ~keep if config.dropped else keep
        reasons = read_table(dataset.folder, f"selections/{config.selection}.parquet", ["reason"])["reason"]
    elif config.dropped:
        raise PairmillError("--dropped shows what a selection dropped: give --selection, too.")
    if config.status is not None:
        mask &= _has_status(dataset, config.status)
    found = np.flatnonzero(mask)
    chosen = np.sort(np.random.default_rng(config.seed).permutation(found)[: config.count])
    places = [_place(dataset, int(n)) for n in chosen]
    if reasons is None:
        return places, {}
    return places, {at: reasons[int(n)].as_py() for at, n in zip(places, chosen, strict=True)}


def _has_status(dataset: Dataset, status: str) -> np.ndarray:
    if status not in STATUSES:
        raise PairmillError(f"`{status}` is no status.{suggest(status, STATUSES)} There are: {', '.join(STATUSES)}.")
    pairs = dataset.stage(PAIRS)
    columns = [read_table(dataset.folder, pairs.file(s), ["status"])["status"] for s in range(dataset.num_shards)]
    return np.array([one == status for column in columns for one in column.to_pylist()], bool)


def _place(dataset: Dataset, number: int) -> At:
    return dataset.locate(str(number))


def _read(dataset: Dataset, places: Sequence[At], reasons: dict[At, str | None]) -> list[ShownRow]:
    """Reads each row group and each score shard once."""
    stages = [s for s in dataset.stages() if s.kind in ("scores", "features")]
    found: dict[At, ShownRow] = {}
    for shard in sorted({s for s, _ in places}):
        rows = sorted({r for s, r in places if s == shard})
        extra = [_beside(stage, shard, rows) for stage in stages if shard in stage.standing()]
        for row, pair in _pairs(dataset, shard, rows).items():
            image = pair.pop("image")
            values = {k: v.hex() if k in ("uid", "sha256", "stored_sha256") and v else v for k, v in pair.items()}
            for one in extra:
                values |= one[row]
            if (shard, row) in reasons:
                values["reason"] = reasons[shard, row]
            found[shard, row] = ShownRow(shard, row, values, image)
    return [found[at] for at in places]


def _pairs(dataset: Dataset, shard: int, rows: list[int]) -> dict[int, dict[str, Any]]:
    out, name = {}, dataset.stage(PAIRS).file(shard)
    ends = np.cumsum(group_rows(dataset.folder, name))
    groups = np.unique(np.searchsorted(ends, rows, side="right")).tolist()
    for start, table in row_groups(dataset.folder, name, groups=groups):
        inside = [r for r in rows if start <= r < start + len(table)]
        for row, pair in zip(inside, table.take([r - start for r in inside]).to_pylist(), strict=True):
            out[row] = pair
    return out


def _beside(stage: Stage, shard: int, rows: list[int]) -> dict[int, dict[str, Any]]:
    """The stage's values of these rows; of features the state and plain numbers, not the tensors."""
    if stage.kind == "scores":
        values = read_table(stage.folder, stage.file(shard)).take(rows).to_pylist()
    else:
        mapped = MappedShard(stage.folder, stage.file(shard))
        plain = [f.name for f in mapped.schema if tensor_spec(f) is None and not _is_long(f.type)]
        values = [mapped.row(r, plain) for r in rows]
    return {r: {f"{stage.name}.{k}": v for k, v in one.items()} for r, one in zip(rows, values, strict=True)}


def _is_long(kind: Any) -> bool:
    return hasattr(kind, "value_type") or hasattr(kind, "shape")


def _narrow(row: ShownRow, columns: Sequence[str]) -> ShownRow:
    for name in columns:
        if name not in row.values:
            have = ", ".join(row.values)
            raise PairmillError(f"There is no column `{name}`.{suggest(name, row.values)} There are: {have}.")
    return ShownRow(row.shard, row.row, {name: row.values[name] for name in columns}, row.image)


def write_sheet(rows: Sequence[ShownRow], output: Path, side: int) -> None:
    """A contact sheet: a card a row with its picture, place, caption and scores. `side` of a picture in px."""
    margin, text = 12, 92
    wide = min(_SHEET_COLUMNS, max(1, len(rows)))
    tall = max(1, -(-len(rows) // wide))
    size = (margin + wide * (side + margin), margin + tall * (side + text + margin))
    sheet = Image.new("RGB", size, _PAPER)
    for i, row in enumerate(rows):
        place = (margin + i % wide * (side + margin), margin + i // wide * (side + text + margin))
        _draw_card(sheet, place, row, side, text)
    with atomic_file(output.absolute()) as stream:
        sheet.save(stream, "PNG")


def _draw_card(sheet: Image.Image, place: At, row: ShownRow, side: int, text: int) -> None:
    draw = ImageDraw.Draw(sheet)
    left, top = place
    draw.rectangle((left, top, left + side - 1, top + side - 1), (236, 236, 232))
    picture = _thumbnail(row.image, side)
    if picture is None:
        status = str(row.values.get("status") or "no image")
        draw.text((left + side / 2, top + side / 2), status, _RED, _font(13), anchor="mm")
    else:
        sheet.paste(picture, (left + (side - picture.width) // 2, top + (side - picture.height) // 2))
    lines = _lines(row, side)
    for i, (line, colour) in enumerate(lines[: text // 15]):
        draw.text((left, top + side + 4 + 15 * i), line, colour, _font(12))


def _thumbnail(image: bytes | None, side: int) -> Image.Image | None:
    if image is None:
        return None
    try:
        picture = Image.fromarray(decode_rgb(image))
    except ImageError:
        return None
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return picture


def _lines(row: ShownRow, side: int) -> list[tuple[str, tuple[int, int, int]]]:
    """Place; the caption on at most three lines; the reason or the scores."""
    letters = max(8, side // 6)
    caption = " ".join(str(row.values.get("caption") or "").split())
    wrapped = textwrap.wrap(caption, letters, max_lines=3, placeholder=" …") or ["(no caption)"]
    scores = [
        f"{k.split('.')[-1]} {v if isinstance(v, int) else f'{v:.3g}'}"
        for k, v in row.values.items()
        if "." in k and isinstance(v, (int, float)) and not isinstance(v, bool)
    ]
    out = [(f"{row.shard}:{row.row}", _GREY), *((line, _INK) for line in wrapped)]
    if row.values.get("reason"):
        out.append((str(row.values["reason"])[:letters], _RED))
    if scores:
        out.append((textwrap.shorten("  ".join(scores), letters, placeholder=" …"), _GREY))
    return out


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)
