"""Batches straight from shards: read, decode, augment and tokenize in threads, ahead of the step.

Decoders and resizers release the interpreter lock, so threads of the training process do what worker processes would,
without a second copy of anything. Every draw depends on (seed, epoch, row) alone.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch

from schemas.errors import PairmillError
from shards.images import ImageError, decode_rgb
from shards.transforms import resize_clip, resize_square, resize_vilt
from training.augment import Augmentation
from training.batch import Batch
from training.order import Mixture, Order, Place
from training.sources import IMAGES, Source, choose_caption


class TextEncoder(Protocol):
    """What the loader needs of a tokenizer."""

    def encode(self, texts: Sequence[str], max_length: int) -> tuple[torch.Tensor, torch.Tensor]: ...


@dataclass(frozen=True)
class View:
    """How a model wants its pairs.

    transform  vilt (shorter side to `size`, whole patches), square, or clip (shorter side, centre crop)
    """

    transform: Literal["vilt", "square", "clip"]
    size: int
    patch: int
    max_text_len: int
    augmentation: Augmentation
    input: str = IMAGES


@dataclass(frozen=True)
class Sample:
    """One pair, ready to collate. Either `pixels` uint8 [H, W, 3], or `patches` uint8 [N, P*P*3] and their `grid`."""

    rows: tuple[int, int]
    caption: str
    pixels: np.ndarray | None = None
    patches: np.ndarray | None = None
    grid: tuple[int, int] | None = None


@dataclass(frozen=True)
class Loaded:
    """A rank's part of global batch `index`, and how long the step waited for it."""

    batch: Batch
    index: int
    epoch: int
    waited_s: float


class Loader:
    """The endless stream of a rank's batches from global batch `start` on."""

    def __init__(
        self,
        order: Order | Mixture,
        sources: Sequence[Source],
        view: View,
        tokenizer: TextEncoder,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
        threads: int = 2,
    ) -> None:
        if batch_size % world:
            raise PairmillError(
                f"batch_size {batch_size} does not divide by {world} processes. Give a multiple of {world}."
            )
        if view.input != IMAGES:
            view.augmentation.check_patches()
        self.order, self.sources, self.view, self.tokenizer = order, sources, view, tokenizer
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        self.start, self.threads = start, max(1, threads)

    def stream(self) -> Generator[Loaded, None, None]:
        """Batches without end; close the generator to let the threads go."""
        with ThreadPoolExecutor(self.threads, thread_name_prefix="batch") as pool:
            ahead: deque[Future[Batch]] = deque()
            index = self.start
            try:
                while True:
                    while len(ahead) <= self.threads:
                        ahead.append(pool.submit(self.build, self.places(index + len(ahead))))
                    begin = time.perf_counter()
                    batch = ahead.popleft().result()
                    epoch = index * self.batch_size // self.order.length
                    yield Loaded(batch, index, epoch, time.perf_counter() - begin)
                    index += 1
            finally:
                for future in ahead:
                    future.cancel()

    def places(self, index: int) -> list[Place]:
        """This rank's samples of global batch `index`."""
        local = self.batch_size // self.world
        first = index * self.batch_size + self.rank * local
        return [self.order.place(p) for p in range(first, first + local)]

    def build(self, places: Sequence[Place]) -> Batch:
        """The batch of these samples.

        Raises PairmillError for a stored image that no longer decodes.
        """
        samples = [self.sample(p) for p in places]
        batch = collate(samples, self.tokenizer, self.view.max_text_len)
        return batch.replace(start=self.rank * len(places), total=self.batch_size)

    def sample(self, place: Place) -> Sample:
        """One pair as this epoch sees it."""
        source = self.sources[place.source]
        uid, caption, captions = source.text(place.shard, place.row)
        text = choose_caption(caption, captions, self.seed, place.epoch, uid)
        rng = np.random.default_rng([self.seed, place.epoch, place.source, place.shard, place.row])
        at = (place.shard, place.row)
        if self.view.input == IMAGES:
            return Sample(at, text, pixels=live_pixels(source, *at, self.view, rng))
        stored = source.feature(*at, ("rows", "cols", "num_patches", "patches"))
        rows, cols = stored["rows"], stored["cols"]
        return Sample(
            at, text, patches=self.view.augmentation.patches(stored["patches"], rows, cols, rng), grid=(rows, cols)
        )


def live_pixels(source: Source, shard: int, row: int, view: View, rng: np.random.Generator) -> np.ndarray:
    """uint8 [H, W, 3] of a stored image: decoded, augmented, resized.

    Raises PairmillError where the stored bytes do not decode.
    """
    try:
        pixels = decode_rgb(source.image(shard, row))
    except ImageError as error:
        raise PairmillError(
            f"{source.dataset.url} shard {shard} row {row}: the stored image does not decode ({error}). "
            "`pairmill check` finds all such rows."
        ) from None
    return resized(view.augmentation(pixels, rng), view)


def resized(pixels: np.ndarray, view: View) -> np.ndarray:
    """uint8 [H, W, 3] -> the size the model wants."""
    if view.transform == "vilt":
        return resize_vilt(pixels, view.size, view.patch)
    return (resize_square if view.transform == "square" else resize_clip)(pixels, view.size)


def collate(samples: Sequence[Sample], tokenizer: TextEncoder, max_text_len: int) -> Batch:
    """Pads to the batch's own maximum; images stay uint8 and are normalised on the device."""
    input_ids, text_mask = tokenizer.encode([s.caption for s in samples], max_text_len)
    rows = torch.tensor([s.rows for s in samples], dtype=torch.int64)
    return Batch(rows=rows, input_ids=input_ids, text_mask=text_mask, **image_fields(samples))


def image_fields(samples: Sequence[Sample]) -> dict[str, Any]:
    """The image part of a batch: `pixel_values` and `image_sizes`, or `patches`, `grid` and `patch_mask`.

    Copied by numpy: torch would start threads of its own under each of the loader's.
    """
    pixels = [s.pixels for s in samples if s.pixels is not None]
    if pixels:
        height, width = (max(p.shape[i] for p in pixels) for i in (0, 1))
        values: np.ndarray = np.zeros((len(pixels), 3, height, width), np.uint8)
        for i, p in enumerate(pixels):
            values[i, :, : p.shape[0], : p.shape[1]] = p.transpose(2, 0, 1)
        sizes = torch.tensor([p.shape[:2] for p in pixels], dtype=torch.int64)
        return {"pixel_values": torch.from_numpy(values), "image_sizes": sizes}
    patches = [s.patches for s in samples if s.patches is not None]
    longest, side = max(len(p) for p in patches), patches[0].shape[1]
    stacked: np.ndarray = np.zeros((len(patches), longest, side), np.uint8)
    mask = torch.zeros(len(patches), longest, dtype=torch.bool)
    for i, p in enumerate(patches):
        stacked[i, : len(p)] = p
        mask[i, : len(p)] = True
    grid = torch.tensor([s.grid for s in samples], dtype=torch.int64)
    return {"patches": torch.from_numpy(stacked), "grid": grid, "patch_mask": mask}
