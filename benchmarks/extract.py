"""The extractors over what none of them can do without: decoding, the bare forward pass, plain writing.

`extract patches` beside decode, resize and numpy's own writing of the same bytes. `extract regions` beside its detector
on tensors that lie ready, and, where detectron2 is installed, beside its `DefaultPredictor`, an image at a time, with
the same weights. Reading patch tensors into training beside decoding and resizing the JPEGs they came from. On the CPU,
and on a CUDA device where there is one. `score clip` has its own benchmark; `costs.py` tells what a row of each costs.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from benchmarks.compare import Check, Result, medians, timed
from benchmarks.make_pairs import make_pairs
from benchmarks.training_input import COUNT, WORKERS, Characters, Counting
from extractors.config import ExtractorConfig, PatchesConfig
from extractors.device import Device, resolve_precision
from extractors.flow import torch_threads
from extractors.patches import extract_patches
from extractors.pipeline import map_ahead
from extractors.regions.backends import load_detector
from extractors.regions.config import RegionsConfig
from extractors.regions.extractor import extract_regions
from extractors.regions.protocol import Proposals
from extractors.regions.selection import rows_from_proposals
from schemas.events import Event, ShardDone, StageFinished
from shards.dataset import PAIRS, Dataset
from shards.images import decode_rgb
from shards.parallel import threads_per_worker
from shards.reader import MappedShard, row_groups
from shards.transforms import patchify, resize_clip, resize_vilt
from training.augment import Augmentation
from training.batch import Batch
from training.data import View
from training.order import make_order
from training.sources import IMAGES, Source, SourceSpec

NAME = "measured"  # of the feature set that every run writes anew
PEER = "detectron2"
TIMES_PEER = {"cpu": 1.0, "cuda": 3.0}  # goals


@dataclass(frozen=True)
class Sizes:
    """How much is computed. `tiny` and `rcnn`: rows by device; `batch`: rows a batch.

    width             channels of the R50's stem
    tiny_px, rcnn_px  shorter side that the detectors see
    """

    patches: int
    tiny: dict[str, int]
    rcnn: dict[str, int]
    batch: dict[str, int]
    width: int
    tiny_px: int
    rcnn_px: int


FULL = Sizes(1024, {"cpu": 128, "cuda": 2048}, {"cpu": 8, "cuda": 256}, {"cpu": 4, "cuda": 16}, 64, 128, 600)
QUICK = Sizes(6, {"cpu": 4, "cuda": 4}, {"cpu": 2, "cuda": 2}, {"cpu": 2, "cuda": 2}, 8, 64, 64)


@dataclass
class Found:
    """Numbers by name, and what is asked of them."""

    rates: dict[str, float] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)


@dataclass
class Stage:
    """An extractor over a dataset, in this process. A run removes what the run before it wrote."""

    dataset: Dataset
    extract: Callable[..., StageFinished]
    config: ExtractorConfig

    def clear(self) -> None:
        """Removes what the run before wrote."""
        shutil.rmtree(Path(self.dataset.url, "features", NAME), ignore_errors=True)

    def run(self, listen: Callable[[Event], None] = lambda event: None) -> None:
        """The whole stage."""
        self.clear()
        self.extract(self.dataset, self.config, listen)

    def seconds(self) -> float:
        """Of the last shard: in the first a model is loaded."""
        found: dict[int, float] = {}

        def listen(event: Event) -> None:
            if isinstance(event, ShardDone):
                found[event.shard] = event.seconds

        self.run(listen)
        return found[self.dataset.num_shards - 1]

    def rows(self) -> MappedShard:
        """What the last run wrote of the last shard."""
        return MappedShard(
            self.dataset.folder, self.dataset.stage(f"features/{NAME}").file(self.dataset.num_shards - 1)
        )


def images(dataset: Dataset, shard: int) -> Iterator[bytes]:
    """The encoded images of a shard, a row group at a time."""
    for _, table in row_groups(dataset.folder, dataset.stage(PAIRS).file(shard), ["image"]):
        yield from (value.as_py() for value in table["image"])


def resized(config: PatchesConfig, data: bytes) -> np.ndarray:
    """uint8 [H, W, 3] that `extract patches` cuts."""
    rgb = decode_rgb(data)
    return resize_vilt(rgb, config.size, config.patch) if config.layout == "vilt" else resize_clip(rgb, config.size)


def write_plainly(dataset: Dataset, config: PatchesConfig, folder: Path, flush: bool) -> None:
    """Every image decoded and resized in as many threads as the stage has; its pixels one after the other in a file.

    flush  wait until each file is on the disk, as the stage does
    """
    threads = threads_per_worker(0)
    with ThreadPoolExecutor(threads) as pool, torch_threads(1):  # as the stage: a thread decodes, it does not fork
        for shard in range(dataset.num_shards):
            with (folder / f"{shard}.raw").open("wb") as out:
                for pixels in map_ahead(pool, partial(resized, config), images(dataset, shard), 2 * threads):
                    np.ascontiguousarray(pixels).tofile(out)
                if flush:
                    os.fsync(out.fileno())


def seconds_from_clean(stage: Stage, folder: Path, run: Callable[[], None]) -> float:
    """Of a run that begins on an idle disk and without files: neither side pays for the run before."""
    stage.clear()
    for file in folder.glob("*.raw"):
        file.unlink()
    os.sync()
    return timed(run)()


def check_patches(stage: Stage, config: PatchesConfig) -> None:
    """The stage's patches are the plain side's pixels."""
    rows = stage.rows()
    for number, data in enumerate(images(stage.dataset, stage.dataset.num_shards - 1)):
        assert np.array_equal(rows.row(number)["patches"], patchify(resized(config, data), config.patch))


def measure_patches(folder: Path, sizes: Sizes, rounds: int) -> Found:
    """Both layouts at 384 px, whole stages; every image is in the page cache, files are written through it."""
    found = Found()
    dataset = make_pairs(folder / "patches", [sizes.patches])
    for layout in ("vilt", "square"):
        config = PatchesConfig(name=NAME, layout=layout, workers=0)
        stage = Stage(dataset, extract_patches, config)
        stage.run()
        check_patches(stage, config)
        plainly = partial(write_plainly, dataset, config, folder)
        runs: dict[str, Callable[[], None]] = {
            "extract patches": stage.run,
            "decode, resize, numpy": partial(plainly, flush=False),
            "decode, resize, numpy, flushed": partial(plainly, flush=True),
        }
        begun_clean = partial(seconds_from_clean, stage, folder)
        middle = medians({name: partial(begun_clean, one) for name, one in runs.items()}, rounds)
        found.rates |= {f"{name}, {layout}, rows/s": sizes.patches / seconds for name, seconds in middle.items()}
        share = {name: seconds / middle["extract patches"] for name, seconds in middle.items()}
        told = f"extract patches, {layout}, share of decode, resize and numpy's writing"
        found.checks.append(Check(f"{told}, flushed", share["decode, resize, numpy, flushed"], 0.9))
        found.checks.append(Check(f"{told}, left in the page cache", share["decode, resize, numpy"]))
    return found


@dataclass
class Epoch:
    """Training batches of ViLT's at 384 px, from patch tensors or from JPEGs, in shuffled order."""

    dataset: Dataset
    input: str
    batch: int = 16

    def loader(self) -> Counting:
        """At the beginning of an epoch."""
        source = Source(0, SourceSpec(self.dataset.url, None, None), self.input)
        view = View("vilt", 384, 32, 40, Augmentation("none"), self.input)
        order = make_order([source.groups()], [None], 0)
        return Counting(order, [source], view, Characters(), batch_size=self.batch, seed=0, threads=WORKERS)

    def batches(self, loader: Counting) -> Iterator[Batch]:
        """An epoch of them, all full."""
        stream = loader.stream()
        try:
            for _ in range(len(self.dataset) // self.batch):
                yield next(stream).batch
        finally:
            stream.close()

    def seconds(self) -> float:
        """Of one pair. The stream has no end: what it had ahead when the epoch ended counts, too."""
        start = time.perf_counter()
        loader = self.loader()
        for _ in self.batches(loader):
            pass
        with COUNT:
            return (time.perf_counter() - start) / loader.pairs


def check_batches(stored: Epoch, live: Epoch) -> None:
    """The same pairs, the same pixels."""
    for one, other in zip(stored.batches(stored.loader()), live.batches(live.loader()), strict=True):
        assert one.patches is not None
        assert one.grid is not None
        assert other.pixel_values is not None
        assert torch.equal(one.rows, other.rows)
        for patches, (rows, cols), pixels in zip(one.patches, one.grid.tolist(), other.pixel_values, strict=True):
            image = pixels[:, : rows * 32, : cols * 32].permute(1, 2, 0).numpy()
            assert np.array_equal(patches[: rows * cols].numpy(), patchify(image, 32))


def bytes_of(dataset: Dataset, part: str) -> float:
    """Of a row on disk."""
    return sum(file.stat().st_size for file in Path(dataset.url, part).iterdir()) / len(dataset)


def measure_reading(folder: Path, sizes: Sizes, rounds: int) -> Found:
    """Patch tensors into training batches beside the JPEGs they came from, all in the page cache."""
    dataset = make_pairs(folder / "reading", [sizes.patches // 2] * 2)
    extract_patches(dataset, PatchesConfig(name=NAME, workers=0))
    batch = min(16, sizes.patches // 2)
    stored, live = Epoch(dataset, NAME, batch), Epoch(dataset, IMAGES, batch)
    check_batches(stored, live)
    middle = medians({"patch tensors": stored.seconds, "JPEGs": live.seconds}, rounds)
    bytes_a_row = {"patch tensors": bytes_of(dataset, f"features/{NAME}"), "JPEGs": bytes_of(dataset, PAIRS)}
    rates = {f"batches of {name}, rows/s": 1 / seconds for name, seconds in middle.items()}
    rates |= {f"{name}, bytes a row": count for name, count in bytes_a_row.items()}
    faster = middle["JPEGs"] / middle["patch tensors"]
    larger = bytes_a_row["patch tensors"] / bytes_a_row["JPEGs"]
    return Found(
        rates,
        [Check("patch tensors read, times the JPEGs", faster), Check("patch tensors on disk, times the JPEGs", larger)],
    )


class Bare:
    """The stage's detector in this process, and its input of the last shard, uint8 or fp32 [3, h, w] on the device."""

    def __init__(self, dataset: Dataset, config: RegionsConfig) -> None:
        self.config = config
        self.device = Device(config.device, resolve_precision(config.precision, config.device))
        self.detector = load_detector(config).to(self.device.device)
        rgb = [decode_rgb(data) for data in images(dataset, dataset.num_shards - 1)]
        self.sizes = [(one.shape[0], one.shape[1]) for one in rgb]
        self.images: list[Tensor] = [self.detector.prepare(one).to(self.device.device) for one in rgb]

    def forward(self) -> list[Proposals]:
        """Every image's proposals, in the stage's batches; nothing is copied back, nothing selected or written."""
        found = []
        batch = int(self.config.batch_size)
        with torch_threads(threads_per_worker(0)), torch.inference_mode(), self.device.autocast():
            for at in range(0, len(self.images), batch):
                found += self.detector.propose(self.images[at : at + batch], self.sizes[at : at + batch])
        if self.device.cuda:
            torch.cuda.synchronize()
        return found

    def select(self) -> list[dict[str, Any]]:
        """The same, copied back, and the selection rule: the rows that are stored."""
        return [rows_from_proposals(one, self.config, inclusive=self.detector.inclusive) for one in self.forward()]


def check_regions(stage: Stage, bare: Bare) -> None:
    """The rows are those of the bare detector."""
    stored = stage.rows()
    for number, want in enumerate(bare.select()):
        row = stored.row(number)
        assert row["num_boxes"] == want["num_boxes"]
        for name in ("boxes", "features", "image_feat"):
            np.testing.assert_allclose(row[name], want[name], rtol=2e-2, atol=2e-2)


def random_rcnn(path: Path, kind: str, width: int) -> Path:
    """A Faster R-CNN on ResNet-50 for 80 classes under detectron2's names, C4 or FPN, of seeded random weights.

    width  channels of the stem; 64 is the usual network, and all others are its multiples

    Variances as He et al. 2015 keep them; branches count a third beside their shortcut, so that activations stay small.
    """
    rng = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}

    def layer(name: str, shape: tuple[int, ...], std: float) -> None:
        state[f"{name}.weight"] = torch.randn(shape, generator=rng) * std
        state[f"{name}.bias"] = torch.zeros(shape[0])

    def normed(name: str, out: int, into: int, side: int, gain: float = 1.0) -> None:
        state[f"{name}.weight"] = torch.randn(out, into, side, side, generator=rng) * (2 / (into * side**2)) ** 0.5
        norm = {"weight": gain, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
        state.update({f"{name}.norm.{part}": torch.full((out,), value) for part, value in norm.items()})

    body = "backbone.bottom_up" if kind == "FPN" else "backbone"
    normed(f"{body}.stem.conv1", width, 3, 7, 1 / 64)
    into, pyramid = width, 4 * width
    for stage, blocks in ((2, 3), (3, 4), (4, 6), (5, 3)):
        inner, of = width * 2 ** (stage - 2), "roi_heads" if kind == "C4" and stage == 5 else body
        for name in (f"{of}.res{stage}.{block}" for block in range(blocks)):
            normed(f"{name}.conv1", inner, into, 1)
            normed(f"{name}.conv2", inner, inner, 3)
            normed(f"{name}.conv3", 4 * inner, inner, 1, 1 / 3)
            if name.endswith(".0"):
                normed(f"{name}.shortcut", 4 * inner, into, 1, 0.7)
            into = 4 * inner
        if kind == "FPN":
            layer(f"backbone.fpn_lateral{stage}", (pyramid, into, 1, 1), into**-0.5)
            layer(f"backbone.fpn_output{stage}", (pyramid, pyramid, 3, 3), (9 * pyramid) ** -0.5)
    seen, anchors, features = (pyramid, 3, 16 * width) if kind == "FPN" else (16 * width, 15, 32 * width)
    layer("proposal_generator.rpn_head.conv", (seen, seen, 3, 3), (9 * seen) ** -0.5)
    layer("proposal_generator.rpn_head.objectness_logits", (anchors, seen, 1, 1), 0.01)
    layer("proposal_generator.rpn_head.anchor_deltas", (4 * anchors, seen, 1, 1), 0.001)
    if kind == "FPN":
        layer("roi_heads.box_head.fc1", (features, 49 * pyramid), 0.01)
        layer("roi_heads.box_head.fc2", (features, features), 0.03)
    layer("roi_heads.box_predictor.cls_score", (81, features), 0.01)
    layer("roi_heads.box_predictor.bbox_pred", (320, features), 0.001)
    torch.save({"model": state}, path)
    return path


class Peer:
    """detectron2's own way: `DefaultPredictor`, an image at a time, at the size and with the proposals of ours."""

    def __init__(self, dataset: Dataset, config: RegionsConfig, width: int) -> None:
        from detectron2 import model_zoo
        from detectron2.engine import DefaultPredictor

        kind = config.detector.partition(":")[2]
        cfg = model_zoo.get_config(f"COCO-Detection/faster_rcnn_R_50_{kind}_1x.yaml")
        assert config.size is not None
        resnets = cfg.MODEL.RESNETS
        cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = config.weights, config.device
        cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = config.size, 5 * config.size // 3
        cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 300
        resnets.STEM_OUT_CHANNELS, resnets.WIDTH_PER_GROUP, resnets.RES2_OUT_CHANNELS = width, width, 4 * width
        cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 4 * width, 16 * width
        self.predictor = DefaultPredictor(cfg)
        self.data = list(images(dataset, dataset.num_shards - 1))

    def run(self) -> None:
        """Every image of the last shard, decoded by OpenCV; boxes and scores end in host memory."""
        with torch_threads(threads_per_worker(0)):
            for data in self.data:
                self.predictor(decode_bgr(data))["instances"].to("cpu")

    def proposals(self, number: int) -> np.ndarray:
        """Boxes of its region proposal network, fp32 [R, 4], px of the stored image."""
        bgr, model = decode_bgr(self.data[number]), self.predictor.model
        seen = self.predictor.aug.get_transform(bgr).apply_image(bgr)
        with torch.no_grad():
            batch = model.preprocess_image([{"image": torch.as_tensor(seen.astype(np.float32).transpose(2, 0, 1))}])
            found, _ = model.proposal_generator(batch, model.backbone(batch.tensor))
        scale = np.array([bgr.shape[1] / seen.shape[1], bgr.shape[0] / seen.shape[0]] * 2)
        return found[0].proposal_boxes.tensor.cpu().numpy() * scale


def decode_bgr(data: bytes) -> np.ndarray:
    """uint8 [H, W, 3], as `cv2.imread` gives it."""
    bgr = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert bgr is not None
    return bgr


def check_proposals(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Of 50 boxes that theirs finds first nearly all are among ours, within a pixel: ties may go either way."""
    apart = np.abs(theirs[:50, None] - ours[None]).max(-1).min(1)
    assert (apart < 1).mean() >= 0.9, apart


def measure_regions(folder: Path, sizes: Sizes, rounds: int, device: str) -> Found:
    """The tiny detector, and detectron2's R50-FPN of our own parts (on CUDA its R50-C4, too)."""
    found = Found()
    detectors = ["torchvision:tiny", "rcnn:FPN", *(["rcnn:C4"] if device == "cuda" else [])]
    for detector in detectors:
        tiny = detector == "torchvision:tiny"
        rows, batch = (sizes.tiny if tiny else sizes.rcnn)[device], sizes.batch[device]
        weights = None if tiny else str(random_rcnn(folder / "rcnn.pth", detector.partition(":")[2], sizes.width))
        config = RegionsConfig(
            name=NAME,
            detector=detector,
            weights=weights,
            device=device,
            workers=0,
            batch_size=batch,
            size=sizes.tiny_px if tiny else sizes.rcnn_px,
        )
        place = folder / f"{device}-{detector.replace(':', '-')}"
        stage = Stage(make_pairs(place, [batch, rows]), extract_regions, config)
        bare = Bare(stage.dataset, config)
        stage.seconds()
        check_regions(stage, bare)
        runs = {"extract regions": stage.seconds, "bare forward": timed(bare.forward)}
        if tiny:
            runs["bare forward and selection"] = timed(bare.select)
        elif importlib.util.find_spec(PEER):
            peer = Peer(stage.dataset, config, sizes.width)
            with torch.inference_mode():
                ours = bare.detector.propose(bare.images[:1], bare.sizes[:1])[0].boxes
            check_proposals(ours.cpu().numpy(), peer.proposals(0))
            runs["DefaultPredictor"] = timed(peer.run)
        middle = medians(runs, rounds)
        told = f"{detector}, {device}"
        found.rates |= {f"{name}, {told}, images/s": rows / seconds for name, seconds in middle.items()}
        times = {name: seconds / middle["extract regions"] for name, seconds in middle.items()}
        share, goal = times["bare forward"], None if tiny and device == "cpu" else 0.95
        found.checks.append(Check(f"extract regions, {told}, share of the bare forward's speed", share, goal))
        if tiny:
            share = times["bare forward and selection"]
            found.checks.append(Check(f"extract regions, {told}, share of forward and selection", share))
        if "DefaultPredictor" in times:
            times_peer = times["DefaultPredictor"]
            found.checks.append(
                Check(f"extract regions, {told}, times DefaultPredictor", times_peer, TIMES_PEER[device])
            )
    return found


def run(rounds: int, quick: bool) -> Result:
    """Everything in one process, images in the page cache."""
    sizes, rounds = (QUICK, 1) if quick else (FULL, rounds)
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        parts = [measure_patches(folder, sizes, rounds), measure_reading(folder, sizes, rounds)]
        parts += [measure_regions(folder, sizes, rounds, device) for device in devices]
    peer = importlib.util.find_spec(PEER) is not None
    notes = ["One process; JPEGs of 512x384, quality 90. The models' loading is left out on all sides."]
    if "cuda" in devices:
        notes.append(f"CUDA: {torch.cuda.get_device_name()}; extract regions and its bare forward in fp16.")
    if not peer:
        notes.append("Skipped: DefaultPredictor, since detectron2 is not installed here.")
    rows = {"patches": sizes.patches, **{f"{d}, tiny": sizes.tiny[d] for d in devices}}
    return Result(
        "extract",
        "extract patches and extract regions over what they cannot do without, and patch tensors over JPEGs",
        rounds,
        {**rows, **{f"{d}, rcnn": sizes.rcnn[d] for d in devices}, **{f"{d}, batch": sizes.batch[d] for d in devices}},
        {name: rate for part in parts for name, rate in part.rates.items()},
        [check for part in parts for check in part.checks],
        ["pairmill", "torch", "torchvision", "numpy", "pillow", "pyarrow", *([PEER] if peer else [])],
        notes,
    )
