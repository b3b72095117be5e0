"""Visual Genome: region_descriptions.json, image_data.json where it is there, and the folders of images.

One pair an image, as ViLT's and UNITER's readers have it: its phrases are its captions, in the file's order. Boxes are
carried as JSON text: `regions`, a list of [x, y, width, height] in px of the original image, one for each caption, and
`region_ids`. A pair a region would store each image fifty times; whoever wants regions cuts them by these boxes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from curation.formats.joining import Meeting
from curation.formats.listed import Images, find_lists, opened, sample_of
from curation.formats.samples import Sample, Source
from curation.list_json import json_rows
from curation.maintenance_config import ImportConfig
from schemas.errors import PairmillError

_REGIONS = re.compile(r"(?:.*/)?[^/]*region[^/]*\Z", re.IGNORECASE)
_ABOUT = re.compile(r"(?:.*/)?image_data[^/]*\Z", re.IGNORECASE)
_FOLDERS = ("VG_100K", "VG_100K_2", "images")
_ID = re.compile(r"[0-9A-Za-z_-]{1,64}\Z")
_ABOUT_KEYS = ("url", "coco_id", "flickr_id")
_BOX = ("x", "y", "width", "height")


def sources(paths: Sequence[str]) -> list[Source]:
    """region_descriptions*.json and image_data*.json among `paths`; a single file may have any name.

    Raises PairmillError where there are no regions.
    """
    what = "Visual Genome regions (region_descriptions.json)"
    found = find_lists(paths, (".json",), what)
    kept = [s for s in found if _ABOUT.match(s.name) or _REGIONS.match(s.name)] if len(found) > 1 else found
    if all(_ABOUT.match(s.name) for s in kept):
        raise PairmillError(f"{', '.join(paths)}: no {what} there.")
    return kept


def read(sources: Sequence[Source], config: ImportConfig) -> Iterator[Sample]:
    """A pair an image, in the order of the regions' file. What image_data.json says lies in a temporary file meanwhile;
    memory holds one image's regions.

    Raises PairmillError: damaged JSON, an entry without `regions`.
    """
    with Meeting() as about:
        for source in sources:
            if _ABOUT.match(source.name):
                for entry in json_rows(partial(opened, source), source.url):
                    about.add_entry(entry.get("image_id", entry.get("id")), {k: entry.get(k) for k in _ABOUT_KEYS})
        about.meet()
        for source in sources:
            if not _ABOUT.match(source.name):
                images = Images(source, config, _FOLDERS)
                for number, entry in enumerate(json_rows(partial(opened, source), source.url)):
                    yield _sample(images, f"{source.name} entry {number}", entry, about, config)


def _sample(images: Images, where: str, entry: dict[str, Any], about: Meeting, config: ImportConfig) -> Sample:
    if not isinstance(entry.get("regions"), list):
        raise PairmillError(f"{where}: it has no `regions`. Take region_descriptions.json of Visual Genome.")
    regions = [r for r in entry["regions"] if isinstance(r, dict)]
    keys = config.caption_key or ("phrase",)
    told = [(r, r[key]) for r in regions for key in keys if isinstance(r.get(key), str) and r[key].strip()]
    image_id = next((r["image_id"] for r in regions if r.get("image_id") is not None), entry.get("id"))
    values: dict[str, Any] = {"image_id": image_id, "captions": [text for _, text in told]}
    if told:
        values["regions"] = [[r.get(side) for side in _BOX] for r, _ in told]
        values["region_ids"] = [r.get("region_id") for r, _ in told]
    values |= {k: v for k, v in about.entry(image_id).items() if v is not None}
    name = f"{image_id}.jpg" if _ID.match(str(image_id)) else ["no name"]
    return sample_of(images, where, name, {}, values, config.model_copy(update={"caption_key": ()}))
