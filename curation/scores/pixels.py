"""The frame of scorers that look at the decoded image: a function of the pixels, run by `extractors/runner.py`.

Images are decoded and scored in the same threads; there is no device. The frame of scorers that read columns and no
image is `curation/scores/columns.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import torch

from extractors.config import ExtractorConfig
from extractors.protocol import Item, Row
from extractors.resume import Outputs
from extractors.runner import run_extractor
from schemas.events import Emit, StageFinished
from schemas.features import SCORES
from shards.dataset import Dataset


class PixelScorer(ABC):
    """One scorer, loader and preparer at once. Picklable; two of a class are equal.

    score_fields  the score columns, the state column last
    columns       pair columns that `prepare` reads beside the image
    """

    score_fields: tuple[pa.Field, ...]
    state_column: str
    provenance: dict[str, dict[str, Any]]
    identity: dict[str, Any]
    columns: tuple[str, ...] = ()
    fields: tuple[pa.Field, ...] = ()
    bytes_per_row: int = 64
    cpu_batch: int = 0

    @abstractmethod
    def prepare(self, rgb: np.ndarray, row: Row) -> Item:
        """uint8 [H, W, 3] and the pair's columns -> the score columns. Called in several threads.

        Raises ImageError for an image that has no scores: its status becomes the row's state.
        """

    def load(self, device: torch.device) -> PixelScorer:
        return self

    @property
    def about(self) -> dict[str, Any]:
        return {}

    @property
    def versions(self) -> dict[str, str]:
        return {"opencv": cv2.__version__, "numpy": np.__version__}

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))


def score_pixels(
    dataset: Dataset | str | Path, name: str, config: ExtractorConfig, scorer: PixelScorer, command: str, emit: Emit
) -> StageFinished:
    """Writes `scores/NAME`: a row for every pair, null where there is no image, its state beside.

    Raises PairmillError as `run_extractor` does.
    """

    def outputs(opened: Dataset) -> Outputs:
        return Outputs(opened, None, f"{SCORES}/{name}", scorer.state_column)

    return run_extractor(dataset, config, scorer, outputs, command, emit)
