"""A folder with a file an image.

npy  Pythia and MMF: NAME.npy, features [n, D], a map [.., H, W, D], or a dict; NAME_info.npy beside it, a dict of bbox,
     num_boxes, objects, cls_prob, image_width, image_height
npz  MILVLG: x [n, D], bbox [n, 4], num_bbox, image_h, image_w, info; or UNITER's features, norm_bb, conf, soft_labels
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from extractors.imports.files import folder_hash
from extractors.imports.keys import Entries
from extractors.imports.pickles import load_npy, load_npz
from extractors.imports.record import Record, RowError, record_of
from extractors.imports.tsv import Read
from schemas.errors import PairmillError

_INFO = "_info.npy"


@dataclass(frozen=True)
class FolderSource:
    """Files of one kind, in the folder and below it; an entry's key is its path inside without the suffix."""

    path: Path
    kind: Literal["npy", "npz"]

    def scan(self, entries: Entries, warn: Callable[[str], None]) -> dict[str, Any]:
        """Every file by name. Raises PairmillError where there is none."""
        names = sorted(self._names())
        for name in names:
            entries.add(name.removesuffix(f".{self.kind}"))
        if not names:
            raise PairmillError(f"{self.path}: no .{self.kind} file in this folder or below it.")
        return folder_hash(self.path, names)

    def _names(self) -> Iterator[str]:
        for folder, _, files in os.walk(self.path):
            inside = Path(folder).relative_to(self.path)
            for name in files:
                if name.endswith(f".{self.kind}") and not name.endswith(_INFO):
                    yield (inside / name).as_posix()

    @contextlib.contextmanager
    def open(self) -> Iterator[Read]:
        """A function (key, place) -> Record, which raises RowError."""
        yield lambda key, _: self._read(key)

    def _read(self, key: str) -> Record:
        try:
            with (self.path / f"{key}.{self.kind}").open("rb") as stream:
                if self.kind == "npz":
                    return record_of(load_npz(stream))
                found = load_npy(stream)
            values = {"features": found} if isinstance(found, np.ndarray) else found
            return record_of({**_dict(values), **self._info(key)})
        except OSError as error:
            raise RowError(f"cannot be read: {error.strerror}", "missing_file") from None

    def _info(self, key: str) -> dict[str, Any]:
        path = self.path / f"{key}{_INFO}"
        if not path.exists():
            return {}
        with path.open("rb") as stream:
            return _dict(load_npy(stream))


def _dict(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RowError(f"a dict or an array is expected, found {type(value).__name__}")
    return value
