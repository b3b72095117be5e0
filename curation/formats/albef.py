"""ALBEF's and BLIP's JSON: a list of `{"image": path, "caption": str or [str]}`, with `image_id` for retrieval.

Entries that follow each other, name one image and differ in the caption alone (as their retrieval and COCO lists
have it) become one pair with several captions: the image is stored once. Written: `pairs.json`, its paths relative to
its own folder, which is their `image_root`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from curation.formats.listed import OURS, Images, ListWriter, find_lists, joined, json_list, opened, sample_of
from curation.formats.samples import Sample, Source
from curation.list_json import json_rows
from curation.maintenance_config import ImportConfig


def sources(paths: Sequence[str]) -> list[Source]:
    """JSON lists among `paths`. Raises PairmillError where there is none."""
    return find_lists(paths, (".json", ".jsonl"), "JSON list")


def read(sources: Sequence[Source], config: ImportConfig) -> Iterator[Sample]:
    """A pair an image, list after list. One entry is in memory at a time.

    Raises PairmillError: damaged JSON, an entry that is no object, a name that leaves its folder.
    """
    for source in sources:
        yield from joined(_entries(source, config))


def _entries(source: Source, config: ImportConfig) -> Iterator[tuple[Any, Sample]]:
    images = Images(source, config)
    for number, record in enumerate(json_rows(partial(opened, source), source.url)):
        name = record.get("image")
        values = {k: v for k, v in record.items() if k not in ("image", OURS)}
        yield name, sample_of(images, f"{source.name} entry {number}", name, record, values, config)


class Writer(ListWriter):
    """Writes `pairs.json` and `images/`."""

    index = "pairs.json"

    def text(self, lines: Callable[[], Iterator[dict[str, Any]]]) -> Iterator[str]:
        yield from json_list(_entry(number, line) for number, line in enumerate(lines()))
        yield "\n"


def _entry(number: int, line: dict[str, Any]) -> dict[str, Any]:
    captions, values = line["captions"], line["values"]
    caption = captions if len(captions) > 1 else captions[0] if captions else ""
    image_id = values.get("image_id")
    return {
        "image": line["image"],
        "caption": caption,
        "image_id": number if image_id is None else image_id,
        OURS: values,
    }
