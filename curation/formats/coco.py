"""COCO captions: one JSON object of `images` and `annotations`, beside folders of images.

One pair an image, its captions in the order of the annotations; an image without captions is a pair, captions whose
image is not listed are a row of status `missing_file`. Captions and images meet in a temporary SQLite file of about the
JSON's size (TMPDIR): memory holds one entry and the licences. Written: `captions.json`, which pycocotools reads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from curation.formats.joining import Meeting
from curation.formats.listed import OURS, Images, ListWriter, find_lists, json_list, opened, sample_of
from curation.formats.samples import Sample, Source
from curation.list_json import object_items
from curation.maintenance_config import ImportConfig
from schemas.errors import PairmillError

_SPLIT = re.compile(r"captions_([A-Za-z0-9]+)\.json")
# Other annotations of COCO, which lie in the same folder.
_OTHERS = re.compile(r"(?:.*/)?(?:instances|person_keypoints|panoptic|stuff|image_info)_[^/]*\Z")
_NOT_CARRIED = ("id", "file_name", "license", OURS)


def sources(paths: Sequence[str]) -> list[Source]:
    """JSON files among `paths`, COCO's instances and keypoints left out. Raises PairmillError where there is none."""
    what = "COCO captions (captions_*.json)"
    found = [s for s in find_lists(paths, (".json",), what) if not _OTHERS.match(s.name)]
    if not found:
        raise PairmillError(f"{', '.join(paths)}: no {what} there.")
    return found


def read(sources: Sequence[Source], config: ImportConfig) -> Iterator[Sample]:
    """A pair an image, file after file, in the order of `images`.

    Raises PairmillError: damaged JSON, no `images` or `annotations` with captions in it, a name that leaves its folder.
    """
    for source in sources:
        with Meeting() as meeting:
            licences = _collect(source, meeting, config.caption_key or ("caption",))
            yield from _samples(source, meeting, licences, config.model_copy(update={"caption_key": ()}))


def _collect(source: Source, meeting: Meeting, keys: Sequence[str]) -> dict[Any, dict[str, Any]]:
    """Fills the meeting with images and the captions under `keys`; the licences by their ids."""
    licences: dict[Any, dict[str, Any]] = {}
    seen, captions, others = set(), 0, 0
    for key, item in object_items(partial(opened, source), source.url):
        seen.add(key)
        if not isinstance(item, dict):
            continue
        if key == "images":
            meeting.add_entry(item.get("id"), item)
        elif key == "annotations":
            texts = [item[key] for key in keys if isinstance(item.get(key), str)]
            for text in texts:
                meeting.add_text(item.get("image_id"), text)
            captions, others = captions + len(texts), others + (not texts)
        elif key == "licenses" and isinstance(item.get("id"), (int, str)):
            licences[item["id"]] = item
    if not {"images", "annotations"} <= seen or (others and not captions):
        raise PairmillError(
            f"{source.url} holds no COCO captions: expected `images`, and `annotations` with a `caption` each, "
            f"found {', '.join(sorted(seen)) or 'nothing'}. Take captions_*.json."
        )
    meeting.meet()
    return licences


def _samples(
    source: Source, meeting: Meeting, licences: dict[Any, dict[str, Any]], config: ImportConfig
) -> Iterator[Sample]:
    split = _SPLIT.search(source.name)
    images = Images(source, config, ["images", *(f"{up}/{split[1]}" for up in ("..", "../images") if split)])
    for entry in meeting.entries():
        where = f"{source.name} image {entry.get('id')!r}"
        values = _values(entry, licences) | {"captions": meeting.texts(entry.get("id"))}
        name = entry.get("file_name")
        sample = sample_of(images, where, name, entry, values, config)
        if name is None:
            sample.status, sample.error = "missing_file", f"missing_file: {where}: it has no file_name"
        yield sample
    for key in meeting.orphans():
        where = f"{source.name} image {key!r}"
        sample = Sample(where, None, meeting.texts(key), status="missing_file")
        sample.error = f"missing_file: {where}: `images` does not list it"
        sample.carried = {"image_id": key}
        yield sample


def _values(entry: dict[str, Any], licences: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    values = {k: v for k, v in entry.items() if k not in _NOT_CARRIED}
    values["image_id"] = entry.get("id")
    if "url" not in values and "coco_url" in values:
        values["url"] = values.pop("coco_url")
    licence = entry.get("license")
    known = licences.get(licence) if isinstance(licence, (int, str)) else None
    values["license"] = licence if known is None else known.get("name")
    if known is not None and known.get("url"):
        values.setdefault("license_url", known["url"])
    return {k: v for k, v in values.items() if v is not None}


class Writer(ListWriter):
    """Writes `captions.json` and `images/`.

    An image's id is its row's `image_id` where every row has one of its own, else its number; memory holds 16 bytes
    a pair meanwhile, and every licence once.
    """

    index = "captions.json"

    def text(self, lines: Callable[[], Iterator[dict[str, Any]]]) -> Iterator[str]:
        ids, licences = _ids_and_licences(lines())
        info = {"description": "Image-text pairs written by pairmill export coco"}
        names = [{"id": number, "name": name, "url": ""} for name, number in licences.items()]
        yield '{"info": ' + json.dumps(info) + ',\n"licenses": '
        yield from json_list(names)
        yield ',\n"images": '
        yield from json_list(
            _image(number, line, licences) for number, line in zip(map(int, ids), lines(), strict=True)
        )
        yield ',\n"annotations": '
        yield from json_list(_annotations(ids, lines()))
        yield "}\n"


def _ids_and_licences(lines: Iterable[dict[str, Any]]) -> tuple[np.ndarray, dict[str, int]]:
    """int64 [pairs], and a number for each licence."""
    licences: dict[str, int] = {}

    def given() -> Iterator[int]:
        for line in lines:
            number, licence = line["values"].get("image_id"), line["values"].get("license")
            if isinstance(licence, str):
                licences.setdefault(licence, len(licences) + 1)
            yield number if type(number) is int and 0 <= number < 2**63 else -1

    ids = np.fromiter(given(), np.int64)
    ordered = np.sort(ids)
    if ordered[0] < 0 or (ordered[1:] == ordered[:-1]).any():
        ids = np.arange(len(ids))
    return ids, licences


def _image(number: int, line: dict[str, Any], licences: dict[str, int]) -> dict[str, Any]:
    values = line["values"]
    width, height = line["size"]
    out: dict[str, Any] = {"id": number, "file_name": line["image"], "width": width, "height": height}
    if isinstance(values.get("license"), str):
        out["license"] = licences[values["license"]]
    if values.get("url"):
        out["coco_url"] = values["url"]
    return {**out, OURS: values}


def _annotations(ids: np.ndarray, lines: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    number = 0
    for image, line in zip(map(int, ids), lines, strict=True):
        for caption in line["captions"]:
            number += 1
            yield {"id": number, "image_id": image, "caption": caption}
