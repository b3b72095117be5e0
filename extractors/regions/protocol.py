"""What every region detector offers, whichever library it comes from."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Proposals:
    """One image's candidate boxes, all fp32 on the detector's device, in the detector's order.

    boxes            [R, 4]    x1 y1 x2 y2, pixels of the stored image, exclusive maximum (but see `inclusive`)
    features         [R, D]    pooled over `boxes`
    class_probs      [R, C+1]  sums to 1, background first
    attribute_probs  [R, A+1]  "no attribute" first; None where the detector knows none
    regressed        [R, 4]    the box refined for the best foreground class, clipped to the image; None where
                               the boxes were given
    image_feature    [D]       pooled over the whole image
    """

    boxes: Tensor
    features: Tensor
    class_probs: Tensor
    image_feature: Tensor
    attribute_probs: Tensor | None = None
    regressed: Tensor | None = None


class Detector(Protocol):
    """Images in, boxes with features out. A row never depends on the other images of its batch.

    classes      foreground class names; class c is column c + 1 of class_probs
    attributes   attribute names, () where there are none
    feature_dim  D
    fingerprint  changes with anything that changes the rows: name, weights' sha256, input size
    inclusive    boxes include their last pixel: widths are x2 - x1 + 1 (Caffe), and suppression counts so
    """

    classes: tuple[str, ...]
    attributes: tuple[str, ...]
    feature_dim: int
    fingerprint: str
    inclusive: bool

    def prepare(self, rgb: np.ndarray) -> Tensor:
        """uint8 [H, W, 3] -> what the network is given of it, [3, h, w]; for a decoding thread."""
        ...

    def key(self, height: int, width: int) -> Hashable:
        """Images of equal keys are computed in one pass, height and width in px; others take one pass each."""
        ...

    def propose(self, images: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Proposals]:
        """Boxes of the detector's own. images: as `prepare` gives them; sizes: (height, width) of the stored ones."""
        ...

    def describe(
        self, images: Sequence[Tensor], boxes: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[Proposals]:
        """Features and probabilities of given boxes, [R, 4] fp32 px of the stored image, R may be 0."""
        ...

    def to(self, device: torch.device | str) -> Detector:
        """Move the weights; returns self."""
        ...


def find_regions(
    detector: Detector, images: Sequence[np.ndarray], boxes: Sequence[Tensor] | None = None
) -> list[Proposals]:
    """Proposals of images as they are decoded, uint8 [H, W, 3] RGB; with `boxes`, [R, 4] px each, those described."""
    prepared = [detector.prepare(rgb) for rgb in images]
    sizes = [(rgb.shape[0], rgb.shape[1]) for rgb in images]
    return detector.propose(prepared, sizes) if boxes is None else detector.describe(prepared, boxes, sizes)
