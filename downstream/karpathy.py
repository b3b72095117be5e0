"""Karpathy's split files, dataset_coco.json and dataset_flickr30k.json.

    {"dataset": "coco", "images": [{"filename", "filepath" (COCO), "cocoid" (COCO), "imgid", "sentids",
      "split": train | restval | val | test, "sentences": [{"raw", "tokens", "imgid", "sentid"}]}]}

Only this reading is here: whether an image is there is asked by the importer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from schemas.errors import PairmillError, suggest

# COCO's training split is `train` and `restval` together: 82,783 + 30,504 images.
SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}
MAX_BYTES = 2 << 30


@dataclass(frozen=True)
class KarpathyImage:
    """One image with all its captions in the file's order."""

    filename: str
    filepath: str  # folder such as val2014; "" where the file gives none (Flickr30k)
    split: str  # train, val or test
    source_split: str  # as the file says, so restval is still told apart
    image_id: int  # `imgid`
    coco_id: int | None
    captions: tuple[str, ...]
    sentence_ids: tuple[int, ...]

    @property
    def path(self) -> str:
        """Where the image lies under the images' folder, by the official naming."""
        return str(PurePosixPath(self.filepath) / self.filename)


def read_karpathy(path: str | Path, splits: tuple[str, ...] | None = None) -> Iterator[KarpathyImage]:
    """The images of `splits` (train, val, test; None for all), in the file's order, no caption dropped.

    Raises PairmillError: no such file, not a Karpathy file, an image or a sentence without what it needs
    (with its number), a name that leads out of the images' folder, an unknown split.
    """
    for name in splits or ():
        if name not in SPLITS.values():
            raise PairmillError(f"`split` must be train, val or test, got `{name}`.{suggest(name, SPLITS.values())}")
    for number, record in enumerate(_records(Path(path))):
        image = _image(record, f"{path}: image {number}")
        if splits is None or image.split in splits:
            yield image


def _records(path: Path) -> list[Any]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise PairmillError(f"{path} is larger than {MAX_BYTES:,} bytes: no Karpathy split file is.")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PairmillError(f"Cannot read {path}: {error.strerror}. Pass --karpathy FILE.") from None
    except (ValueError, RecursionError) as error:
        raise PairmillError(f"{path} is not JSON: {error}. Download it again.") from None
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list) or not images:
        raise PairmillError(
            f"{path} has no list `images`: it is not a Karpathy split file. "
            "Pass dataset_coco.json or dataset_flickr30k.json."
        )
    return images


def _image(record: Any, where: str) -> KarpathyImage:
    split = _field(record, "split", str, where)
    if split not in SPLITS:
        raise PairmillError(f"{where}: `split` must be one of {', '.join(SPLITS)}, got `{split}`.")
    filename = _field(record, "filename", str, where)
    if not PurePosixPath(filename).name:
        raise PairmillError(f"{where}: `filename` is empty.")
    sentences = _field(record, "sentences", list, where)
    if not sentences:
        raise PairmillError(f"{where}: `sentences` is empty; an image without a caption cannot be retrieved.")
    places = [f"{where}, sentence {i}" for i in range(len(sentences))]
    return KarpathyImage(
        filename=_safe_name(filename, where),
        filepath=_safe_name(_field(record, "filepath", str, where, default=""), where),
        split=SPLITS[split],
        source_split=split,
        image_id=_field(record, "imgid", int, where),
        coco_id=_field(record, "cocoid", int, where, default=None),
        captions=tuple(_field(s, "raw", str, at) for s, at in zip(sentences, places, strict=True)),
        sentence_ids=tuple(_field(s, "sentid", int, at) for s, at in zip(sentences, places, strict=True)),
    )


_REQUIRED = object()


def _field(record: Any, name: str, kind: type, where: str, default: Any = _REQUIRED) -> Any:
    if not isinstance(record, dict):
        raise PairmillError(f"{where}: want an object, got {json.dumps(record)[:80]}.")
    if name not in record:
        if default is not _REQUIRED:
            return default
        raise PairmillError(f"{where}: `{name}` is missing.{suggest(name, record)}")
    value = record[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise PairmillError(f"{where}: `{name}` must be {kind.__name__}, got {json.dumps(value)[:80]}.")
    return value


def _safe_name(name: str, where: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise PairmillError(f"{where}: the name `{name[:200]}` leads out of the images' folder.")
    return name
