"""open_clip's csv: a tab between `filepath` and `title`, its defaults; other delimiters and names are read too.

Written: `pairs.tsv`, a pair a line, for `--csv-separator`, `--csv-img-key` and `--csv-caption-key` as they are. A title
is the first caption, its line ends and tabs as spaces; the column `pairmill` holds the rest as JSON.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from curation.formats.listed import OURS, Images, ListWriter, find_lists, opened, own_values, sample_of
from curation.formats.samples import Sample, Source
from curation.list_text import delimited_rows, text_lines
from curation.maintenance_config import CsvImportConfig, ImportConfig
from schemas.errors import PairmillError, suggest

IMAGE_NAMES = ("filepath", "file_path", "image_path", "image", "file_name", "filename", "path")
_TITLE = "title"
_SPACES = str.maketrans("\t\r\n", "   ")


def sources(paths: Sequence[str]) -> list[Source]:
    """csv and tsv files among `paths`. Raises PairmillError where there is none."""
    return find_lists(paths, (".csv", ".tsv"), "csv or tsv file")


def read(sources: Sequence[Source], config: ImportConfig) -> Iterator[Sample]:
    """A pair a line, file after file. One line is in memory at a time.

    Raises PairmillError: no column of images, a line with too many fields, a name that leaves its folder.
    """
    for source in sources:
        with opened(source) as text:
            lines = text_lines(text, source.url)
            names, rows = delimited_rows(lines, "\t" if ".tsv" in source.name.lower() else None, source.url)
            column = _image_column(names, config, source)
            images = Images(source, config)
            for number, row in enumerate(rows, 2):
                yield _sample(images, f"{source.name} row {number}", column, dict(zip(names, row, strict=True)), config)


def _image_column(names: Sequence[str], config: ImportConfig, source: Source) -> str:
    given = config.image_key if isinstance(config, CsvImportConfig) else None
    found = given if given in names else None if given else next((n for n in IMAGE_NAMES if n in names), None)
    if found is None:
        raise PairmillError(
            f"{source.url} has no column `{given or IMAGE_NAMES[0]}` of image names.{suggest(given or '', names)} "
            f"It has: {', '.join(names)}. Pass --image-key NAME; a list of URLs is for `pairmill download`."
        )
    return found


def _sample(images: Images, where: str, column: str, row: dict[str, str | None], config: ImportConfig) -> Sample:
    record: dict[str, Any] = {k: v for k, v in row.items() if v not in (None, "")}
    if OURS in record:
        try:
            record[OURS] = json.loads(record[OURS])
        except (ValueError, RecursionError):
            raise PairmillError(f"{where}: its column `{OURS}` is no JSON. Mend it, or drop that column.") from None
    values = {k: v for k, v in record.items() if k not in (column, OURS)}
    if not config.caption_key and "caption" not in values and "captions" not in values:
        values["caption"] = values.pop(_TITLE, None)
    return sample_of(images, where, record.get(column), record, values, config)


class Writer(ListWriter):
    """Writes `pairs.tsv` and `images/`."""

    index = "pairs.tsv"

    def line(self, row: Mapping[str, Any]) -> dict[str, Any]:
        values, caption = own_values(row), row["caption"]
        if row["captions"]:
            values["captions"] = row["captions"]
        elif caption is not None and (not caption or _line(caption) != caption):
            values["caption"] = caption
        return {"title": _line(caption or ""), "values": values}

    def text(self, lines: Callable[[], Iterator[dict[str, Any]]]) -> Iterator[str]:
        out = io.StringIO()
        table = csv.writer(out, delimiter="\t", lineterminator="\n")
        table.writerow(["filepath", _TITLE, OURS])
        for line in lines():
            table.writerow([line["image"], line["title"], json.dumps(line["values"], ensure_ascii=False)])
            yield out.getvalue()
            out.seek(0)
            out.truncate()


def _line(text: str) -> str:
    """On one line, without tabs: a record is a line then, for every reader."""
    return text.translate(_SPACES)
