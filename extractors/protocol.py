"""What an extractor is. `extractors/runner.py` does everything else."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    import torch

# One image after `prepare`: what goes to the device, and what stays beside it.
Item = dict[str, Any]
Row = Mapping[str, Any]


class Preparer(Protocol):
    """What runs in the decode threads. Without a device that is all: the item is the row."""

    def prepare(self, rgb: np.ndarray, row: Row) -> Item:
        """One image, uint8 [H, W, 3], and the pair's columns that the loader asked for, with `image_bytes` beside:
        how large the stored file is.

        Raises ImageError for an image that cannot be computed: its status becomes the row's state.
        """


class Extractor(Preparer, Protocol):
    """A loaded model: `__call__` runs on the device, `rows` in the writer's thread."""

    def key(self, item: Item) -> Hashable:
        """Items of equal keys may share a batch."""

    def collate(self, items: Sequence[Item]) -> dict[str, torch.Tensor]:
        """The batch, in host memory, pixels as uint8."""

    def __call__(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The batch on the device -> tensors on the device. Raises torch.OutOfMemoryError where it is too large."""

    def rows(self, items: Sequence[Item], outputs: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
        """One row of the output fields for each item, without `state`."""

    def example(self) -> Item:
        """An item of the largest usual size, to measure memory with."""


class Loader(Protocol):
    """What is known of an extractor before a model is built. Picklable and hashable; every worker loads it once.

    fields         columns of the features, without `state`
    score_fields   columns of the scores that are written with them; () for none
    state_column   the scores' column that tells each row's state
    columns        pair columns that `prepare` reads
    identity       what decides the rows beside the configuration (the weights' hash)
    about          class names, patch side, ...: goes into the features' schema metadata
    provenance     column -> what it is, for the sidecar
    bytes_per_row  estimate for the disk check
    cpu_batch      rows a batch on CPU; 0: `prepare` alone makes the row, there is no device

    A loader may have `at_least`, px: JPEGs of which at least so much of the shorter side is left may come reduced by
    2, 4 or 8, which is cheaper. Without it pixels are those of the stored image.
    """

    @property
    def fields(self) -> Sequence[pa.Field]: ...
    @property
    def score_fields(self) -> Sequence[pa.Field]: ...
    @property
    def state_column(self) -> str: ...
    @property
    def columns(self) -> Sequence[str]: ...
    @property
    def identity(self) -> dict[str, Any]: ...
    @property
    def about(self) -> dict[str, Any]: ...
    @property
    def provenance(self) -> dict[str, dict[str, Any]]: ...
    @property
    def versions(self) -> dict[str, str]: ...
    @property
    def bytes_per_row(self) -> int: ...
    @property
    def cpu_batch(self) -> int: ...

    def __hash__(self) -> int: ...
    def load(self, device: torch.device) -> Preparer: ...
