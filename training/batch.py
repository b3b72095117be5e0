"""What a model is fed: one frozen dataclass of tensors.

Shape letters: B pairs, T text tokens, F false texts, H W pixels, N patches, R regions, D width, C classes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# What describes the image of a pair, and so moves with it when a pair gets another one.
IMAGE_FIELDS = (
    "pixel_values",
    "image_sizes",
    "patches",
    "grid",
    "patch_mask",
    "patch_choice",
    "regions",
    "region_mask",
    "boxes",
    "sizes",
    "conf",
    "probs",
    "object_ids",
    "attribute_ids",
    "grid_features",
    "grid_mask",
)


@dataclass(frozen=True)
class Batch:
    """Tensors of B pairs, padded to the batch's own maximum; None is what the batch does not have.

    rows           [B, 2]        int64, (shard, row) each pair came from
    input_ids      [B, T]        int64
    text_mask      [B, T]        bool, False = padding
    labels         [B, T]        int64, the true token where it is to be predicted, else -100
    match_labels   [B]           int64, 1 = the text belongs to the image
    false_ids      [B, F, T]     int64, texts that do not belong to the image
    false_mask     [B, F, T]     bool
    pixel_values   [B, 3, H, W]  uint8, or float32 normalised as the model asks; padded bottom and right
    image_sizes    [B, 2]        int64, (height, width) of the image inside the padding, px
    patches        [B, N, P*P*3] uint8, each patch in the order (row, column, channel)
    grid           [B, 2]        int64, (rows, columns) of patches; the first rows*columns of N are valid
    patch_mask     [B, N]        bool
    patch_choice   [B, M]        int64, which valid patches to keep, raster index, -1 = none
    regions        [B, R, D]     float16 or float32
    region_mask    [B, R]        bool
    boxes          [B, R, 4]     float32, x1 y1 x2 y2, px of the stored image, exclusive maximum
    sizes          [B, 2]        int64, (width, height) of the stored image, px
    conf           [B, R]        float32
    probs          [B, R, C]     float16 or float32
    object_ids     [B, R]        int64
    attribute_ids  [B, R]        int64
    grid_features  [B, N, D]     float16 or float32
    grid_mask      [B, N]        bool
    start, total   ints          this is rows start..start+B of a global batch of `total` rows: random draws
                                 are made for the global batch, so that they do not depend on the number of
                                 processes. total None = the batch is whole
    """

    rows: Tensor | None = None
    input_ids: Tensor | None = None
    text_mask: Tensor | None = None
    labels: Tensor | None = None
    match_labels: Tensor | None = None
    false_ids: Tensor | None = None
    false_mask: Tensor | None = None
    pixel_values: Tensor | None = None
    image_sizes: Tensor | None = None
    patches: Tensor | None = None
    grid: Tensor | None = None
    patch_mask: Tensor | None = None
    patch_choice: Tensor | None = None
    regions: Tensor | None = None
    region_mask: Tensor | None = None
    boxes: Tensor | None = None
    sizes: Tensor | None = None
    conf: Tensor | None = None
    probs: Tensor | None = None
    object_ids: Tensor | None = None
    attribute_ids: Tensor | None = None
    grid_features: Tensor | None = None
    grid_mask: Tensor | None = None
    start: int = 0
    total: int | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The fields that are there, by name."""
        return {f.name: v for f in dataclasses.fields(self) if isinstance(v := getattr(self, f.name), Tensor)}

    def __len__(self) -> int:
        """B: how many pairs."""
        return len(next(iter(self.tensors.values()), ()))

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return next(iter(self.tensors.values())).device

    def replace(self, **fields: Any) -> Batch:
        """A copy with other values in the named fields."""
        return dataclasses.replace(self, **fields)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """A copy whose tensors are on `device`; to a GPU through pinned memory, so that it need not be waited for."""
        pin = non_blocking and torch.device(device).type == "cuda"
        return self.replace(
            **{
                name: (t.pin_memory() if pin and t.device.type == "cpu" else t).to(device, non_blocking=non_blocking)
                for name, t in self.tensors.items()
            }
        )

    def images(self, index: Tensor | None = None) -> Batch:
        """Only the image fields; of the pairs `index` [B'] int64 where it is given."""
        fields = {name: t for name, t in self.tensors.items() if name in IMAGE_FIELDS}
        return Batch(**fields if index is None else {name: t[index] for name, t in fields.items()})

    def choose_images(self, other: Batch, own: Tensor) -> Batch:
        """Keep a pair's image where `own` [B] bool is True, else take that of the same row of `other`."""
        theirs = other.images().tensors
        chosen = {
            name: torch.where(own.view(-1, *[1] * (t.dim() - 1)), t, theirs[name])
            for name, t in self.images().tensors.items()
        }
        return self.replace(**chosen)

    def draw_seeds(self, generator: torch.Generator) -> list[int]:
        """One seed per pair, drawn for the whole global batch: equal however many processes share it."""
        seeds = torch.randint(2**62, (self.total or len(self),), generator=generator)
        return seeds[self.start : self.start + len(self)].tolist()

    def draw_order(self, generator: torch.Generator) -> Tensor:
        """[B] int64: this batch's part of a random permutation of the global batch (CPU)."""
        return torch.randperm(self.total or len(self), generator=generator)[self.start : self.start + len(self)]
