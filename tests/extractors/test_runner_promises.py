"""What the runner promises of every extractor, each with the real ones: rows that depend on nothing but their pair,
sizes that no camera makes, memory, errors, GPUs.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.compare import peak_memory
from benchmarks.extract import random_rcnn
from cli.demo.scenes import generate_scene
from extractors.clip import score_clip
from extractors.config import ClipScoreConfig, PatchesConfig
from extractors.device import worker_device
from extractors.patches import extract_patches
from extractors.regions.config import RegionsConfig
from extractors.regions.extractor import extract_regions
from extractors.regions.torchvision import TorchvisionDetector
from schemas.config import ShardStage
from schemas.errors import PairmillError
from schemas.events import StageFinished, silent
from schemas.features import FEATURES, VERSION
from schemas.sidecars import make_sidecar
from shards.dataset import PAIRS, Dataset
from shards.hand import RowInHand
from shards.images import decode_rgb
from shards.parallel import run_stage
from shards.reader import MappedShard, read_table
from shards.transforms import normalise, patchify, resize_clip, resize_vilt
from tests.extractors.tiny_clip import save_clip
from tests.extractors.toy import run_toy
from tests.make import SIZES, make_dataset, picture
from training.augment import Augmentation
from training.data import Loader, View
from training.order import make_order
from training.sources import IMAGES, Source, SourceSpec
from training.text import train_wordpiece

SHARDS, ROWS = 2, 8
FAIL, CORRUPT = {(0, 1): "timeout"}, {(1, 3)}
Run = Callable[..., StageFinished]


def scene(number: int) -> np.ndarray:
    """Things to find, in pictures of five shapes; equal numbers are equal pictures."""
    width, height = SIZES[number % len(SIZES)]
    return generate_scene(number, (2 * height, 2 * width)).image


def pairs(path: Path, order: Callable[[int], int] = lambda number: number) -> Dataset:
    """Two shards of eight scenes; row n shows scene `order(n)`."""
    return make_dataset(
        path, SHARDS, ROWS, FAIL, CORRUPT, image=lambda s, r: scene(order(s * ROWS + r)), captions={}, kind="png"
    )


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"local-dir:{save_clip(tmp_path_factory.mktemp('clip') / 'tiny')}"


@pytest.fixture
def run(clip: str) -> Run:
    """Any extractor by its name."""

    def one(kind: str, dataset: Dataset, **values: Any) -> StageFinished:
        workers = {"workers": 0, **values}
        if kind == "patches":
            return extract_patches(dataset, PatchesConfig(size=64, patch=16, **{**workers, "name": "made"}))
        workers = {"device": "cpu", **workers, "name": "made"}
        if kind == "clip":
            return score_clip(dataset, ClipScoreConfig(model=clip, **workers))
        return extract_regions(dataset, RegionsConfig(**{"size": 32, "proposals": 12, **workers}))

    return one


def features(dataset: Dataset) -> list[dict[str, Any]]:
    """Every row of the feature set `made`."""
    stage = dataset.stage("features/made")
    shards = [MappedShard(dataset.folder, stage.file(s)) for s in range(dataset.num_shards)]
    return [shard.row(row) for shard in shards for row in range(len(shard))]


def digest(dataset: Dataset) -> str:
    """Of the bytes of every shard of the feature set `made`."""
    stage = dataset.stage("features/made")
    whole = b"".join(Path(dataset.url, stage.file(s)).read_bytes() for s in range(dataset.num_shards))
    return hashlib.sha256(whole).hexdigest()


def assert_equal(ours: dict[str, Any], other: dict[str, Any]) -> None:
    """The same row, up to float32's last digits (features are stored in float16)."""
    assert ours.keys() == other.keys()
    for name, value in ours.items():
        if isinstance(value, np.ndarray) and value.dtype != np.uint8:
            np.testing.assert_allclose(value, other[name], rtol=4e-3, atol=4e-3, err_msg=name)
        else:
            np.testing.assert_array_equal(value, other[name], err_msg=name)


KINDS = ("patches", "regions", "clip")
MODELS = ("regions", "clip")


@pytest.mark.parametrize("kind", MODELS)
def test_rows_do_not_depend_on_the_batch_size(run: Run, kind: str, tmp_path: Path):
    datasets = [pairs(tmp_path / str(batch)) for batch in (1, 3, 7)]
    for dataset, batch in zip(datasets, (1, 3, 7), strict=True):
        assert run(kind, dataset, batch_size=batch).counts == {"ok": 14, "timeout": 1, "decode_error": 1}
    one, *others = (features(dataset) for dataset in datasets)
    for other in others:
        for ours, theirs in zip(one, other, strict=True):
            assert_equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_depend_on_order_or_neighbours(run: Run, kind: str, tmp_path: Path):
    """The same scenes the other way round; captions stay where they are, and CLIP's of the image only is compared."""
    last = SHARDS * ROWS - 1
    there, back = pairs(tmp_path / "there"), pairs(tmp_path / "back", lambda number: last - number)
    for dataset in (there, back):
        run(kind, dataset)
    compared = 0
    for ours, theirs in zip(features(there), reversed(features(back)), strict=True):
        if ours["state"] == theirs["state"] == "ok":
            assert_equal(*({k: v for k, v in row.items() if k != "clip_text"} for row in (ours, theirs)))
            compared += 1
    assert compared == 12


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_depend_on_the_workers(run: Run, kind: str, tmp_path: Path):
    datasets = [pairs(tmp_path / str(workers)) for workers in (0, 1, 2)]
    for dataset, workers in zip(datasets, (0, 1, 2), strict=True):
        run(kind, dataset, workers=workers)
    one, *others = datasets
    for other in others:
        if kind == "patches":
            assert digest(one) == digest(other)
        for ours, theirs in zip(features(one), features(other), strict=True):
            assert_equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_run_gives_the_same_bytes_and_no_others(run: Run, kind: str, tmp_path: Path):
    first, second = pairs(tmp_path / "first"), pairs(tmp_path / "second")
    other = pairs(tmp_path / "other", lambda number: number + 1)
    for dataset in (first, second, other):
        run(kind, dataset)
    assert digest(first) == digest(second) != digest(other)


@pytest.mark.parametrize("kind", KINDS)
def test_a_corrupt_image_costs_its_own_row_only(run: Run, kind: str, tmp_path: Path):
    whole = make_dataset(tmp_path / "whole", SHARDS, ROWS, image=lambda s, r: scene(s * ROWS + r), kind="png")
    dataset = pairs(tmp_path / "ds")
    for one in (whole, dataset):
        run(kind, one)
    for number, (ours, want) in enumerate(zip(features(dataset), features(whole), strict=True)):
        at = divmod(number, ROWS)
        if at in FAIL or at in CORRUPT:
            assert ours["state"] == FAIL.get(at, "decode_error")
            assert all(value is None or np.isnan(value).all() for name, value in ours.items() if name != "state")
        else:
            assert_equal(ours, want)


def test_a_detector_that_runs_out_of_memory_goes_on_with_half(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole, dataset = pairs(tmp_path / "whole"), pairs(tmp_path / "ds")
    run("regions", whole, batch_size=6)
    tried: list[int] = []
    propose = TorchvisionDetector.propose

    def small(self: TorchvisionDetector, images: Any, sizes: Any) -> Any:
        tried.append(len(images))
        if len(images) > 1:
            raise torch.OutOfMemoryError("full")
        return propose(self, images, sizes)

    monkeypatch.setattr(TorchvisionDetector, "propose", small)
    assert run("regions", dataset, batch_size=6).counts["ok"] == 14
    assert max(tried) > 1
    for ours, want in zip(features(dataset), features(whole), strict=True):
        assert_equal(ours, want)


def test_another_detector_in_the_same_feature_set_is_refused_by_its_name(run: Run, tmp_path: Path):
    dataset = pairs(tmp_path / "ds")
    run("regions", dataset)
    before = digest(dataset)
    weights = str(random_rcnn(tmp_path / "fpn.pth", "FPN", 8))
    with pytest.raises(PairmillError, match=r"`detector` was 'torchvision:tiny', now 'rcnn:FPN'.*--name"):
        run("regions", dataset, detector="rcnn:FPN", weights=weights, size=64)
    with pytest.raises(PairmillError, match=r"`cls_probs` was 'full', now 'none'"):
        run("regions", dataset, cls_probs="none")
    assert digest(dataset) == before


def test_other_weights_of_the_same_detector_are_refused(run: Run, tmp_path: Path):
    dataset = pairs(tmp_path / "ds")
    own = Path(sys.modules[TorchvisionDetector.__module__].__file__).with_name("tiny.safetensors")
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(own.read_bytes())
    run("regions", dataset)
    assert run("regions", dataset, weights=str(own)).done == 0
    from safetensors.torch import load_file, save_file

    state = load_file(copy)
    name = next(iter(state))
    save_file({**state, name: state[name] + 1}, copy)
    with pytest.raises(PairmillError, match=r"`fingerprint` was 'torchvision:tiny:\w+.*', now 'torchvision:tiny:\w+"):
        run("regions", dataset, weights=str(copy))


STRANGE = ((1, 1), (20000, 10), (10, 20000), (3, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_any_size_are_extracted_or_told(run: Run, kind: str, tmp_path: Path):
    def image(shard: int, row: int) -> np.ndarray:
        width, height = STRANGE[row] if row < len(STRANGE) else (96, 80)
        return np.random.default_rng(row).integers(0, 256, (height, width, 3)).astype(np.uint8)

    dataset = make_dataset(tmp_path / "ds", 1, 6, image=image, kind="png")
    assert not run(kind, dataset).left
    rows = features(dataset)
    states = [row["state"] for row in rows]
    stripes = {"bad_aspect"} if kind == "patches" else {"ok", "bad_aspect"}
    assert set(states[1:3]) <= stripes
    assert states[0] == states[3] == states[4] == states[5] == "ok"
    for row in rows:
        tensors = [v for v in row.values() if isinstance(v, np.ndarray) and v.dtype != np.uint8]
        if row["state"] == "ok":
            assert all(np.isfinite(tensor).all() for tensor in tensors)
        if row["state"] == "ok" and kind == "patches":
            assert row["patches"].shape == (row["num_patches"], 16 * 16 * 3)


@pytest.mark.parametrize("layout", ["vilt", "square"])
@pytest.mark.parametrize(("size", "patch"), [(32, 32), (48, 8), (60, 20), (64, 1), (96, 48), (224, 16)])
def test_patches_of_any_size_are_the_live_transform_cut(layout: str, size: int, patch: int, tmp_path: Path):
    dataset = make_dataset(tmp_path / "ds", 1, len(SIZES))
    extract_patches(dataset, PatchesConfig(layout=layout, size=size, patch=patch, workers=0, name="made"))
    data = read_table(dataset.folder, dataset.stage(PAIRS).file(0))["image"].to_pylist()
    for row, image in zip(features(dataset), data, strict=True):
        rgb = decode_rgb(image)
        live = resize_vilt(rgb, size, patch) if layout == "vilt" else resize_clip(rgb, size)
        assert (row["rows"] * patch, row["cols"] * patch) == live.shape[:2]
        np.testing.assert_array_equal(row["patches"], patchify(live, patch))


@pytest.mark.parametrize(("layout", "transform"), [("vilt", "vilt"), ("square", "clip")])
@pytest.mark.parametrize(("size", "patch"), [(64, 16), (96, 32)])
def test_a_training_batch_of_extracted_patches_is_the_live_one_bit_for_bit(
    layout: str, transform: Any, size: int, patch: int, tmp_path: Path
):
    dataset = make_dataset(tmp_path / "ds", 2, 9, FAIL, image=lambda s, r: picture(*SIZES[r % 5], 9 * s + r))
    extract_patches(dataset, PatchesConfig(layout=layout, size=size, patch=patch, workers=0, name="made"))
    tokenizer = train_wordpiece(["a red green blue yellow block, number 1 2 3 4 5 6 7 8 9"], 256)

    def batches(source_of: str) -> list[Any]:
        source = Source(0, SourceSpec(dataset.url, None, None), source_of)
        view = View(transform, size, patch, 16, Augmentation("none"), source_of)
        order = make_order([source.groups()], [None], 0)
        stream = Loader(order, [source], view, tokenizer, batch_size=4, seed=0).stream()
        try:
            return [next(stream).batch for _ in range(4)]
        finally:
            stream.close()

    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    for live, stored in zip(batches(IMAGES), batches("made"), strict=True):
        assert torch.equal(live.rows, stored.rows)
        assert torch.equal(live.input_ids, stored.input_ids)
        patches = normalise(stored.patches, mean, std)
        for i, (rows, cols) in enumerate(stored.grid.tolist()):
            assert live.image_sizes[i].tolist() == [rows * patch, cols * patch]
            pixels = normalise(live.pixel_values[i : i + 1, :, : rows * patch, : cols * patch], mean, std)
            assert torch.equal(patches[i, : rows * cols], patchify(pixels[0].permute(1, 2, 0), patch))


@dataclass(frozen=True)
class WhereWork:
    """Writes no rows; tells which worker had the shard, and whether another shard was there at the same time."""

    folder: Path

    def __call__(self, shard: int, hand: RowInHand) -> dict[str, int]:
        import time

        from distributed import get_worker

        worker = get_worker()
        mark = self.folder / f"busy-{worker.name}"
        mark.touch(exist_ok=False)
        time.sleep(0.3)
        mark.unlink()
        (self.folder / f"{shard}.{worker.name}.{worker.state.total_resources.get('GPU', 0):g}").touch()
        return {"ok": 1}


@contextmanager
def mixed_cluster():
    """One scheduler, two workers that offer a GPU, one with two threads that offers none."""
    from distributed import Nanny, Scheduler, SpecCluster

    def spec(threads: int, resources: dict[str, int]) -> dict[str, Any]:
        return {"cls": Nanny, "options": {"nthreads": threads, "resources": resources, "host": "127.0.0.1"}}

    workers = {0: spec(1, {"GPU": 1}), 1: spec(1, {"GPU": 1}), 2: spec(2, {})}
    scheduler = {"cls": Scheduler, "options": {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}}
    with SpecCluster(workers=workers, scheduler=scheduler, silence_logs=50) as cluster:
        yield cluster.scheduler_address


def where(dataset: Dataset, folder: Path, **options: Any) -> list[tuple[str, str, str]]:
    """(shard, worker, its GPUs) of a stage over all shards with `gpus` asked for."""
    folder.mkdir()
    stage = dataset.stage("features/where")
    stage.begin(make_sidecar("extract where", "where", (FEATURES, VERSION), ShardStage()), "")
    pending = list(range(dataset.num_shards))
    done = run_stage(stage, WhereWork(folder), pending=pending, emit=silent, **options)
    assert done.left == ()
    return sorted(tuple(path.name.split(".")) for path in folder.iterdir())


@pytest.mark.slow
def test_shards_go_to_all_workers_with_a_gpu_one_at_a_time(tmp_path: Path):
    dataset = make_dataset(tmp_path / "ds", shards=6, rows=1)
    own = where(dataset, tmp_path / "own", workers=2, gpus=2)
    assert [shard for shard, _, _ in own] == [str(s) for s in range(6)]
    assert {(worker, gpus) for _, worker, gpus in own} == {("0", "1"), ("1", "1")}
    with mixed_cluster() as address:
        theirs = where(dataset, tmp_path / "theirs", gpus=1, scheduler=address)
    assert [shard for shard, _, _ in theirs] == [str(s) for s in range(6)]
    assert {(worker, gpus) for _, worker, gpus in theirs} == {("0", "1"), ("1", "1")}


def test_num_gpus_is_the_number_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    dataset = make_dataset(tmp_path / "ds", shards=3, rows=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    asked: list[tuple[int, int, str]] = []

    def stage(main: Any, work: Any, *, workers: int, gpus: int, **rest: Any) -> StageFinished:
        asked.append((workers, gpus, work.settings.device))
        return StageFinished("features/toy", 0, (), 0.0, {})

    monkeypatch.setattr("extractors.runner.run_stage", stage)
    for values in ({}, {"num_gpus": 2}, {"device": "cuda:1"}):
        run_toy(dataset, **{"device": "cuda", "batch_size": 4, "workers": None, **values})
    assert asked == [(4, 4, "cuda"), (2, 2, "cuda"), (1, 1, "cuda:1")]
    with pytest.raises(PairmillError, match="`--num-gpus 5`: this machine shows 4"):
        run_toy(dataset, device="cuda", batch_size=4, workers=None, num_gpus=5)


@pytest.mark.parametrize(("name", "own", "want"), [(0, True, "cuda:0"), (3, True, "cuda:1"), (3, False, "cuda:0")])
def test_a_worker_of_ours_takes_the_gpu_of_its_number(name: int, own: bool, want: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("distributed.get_worker", lambda: type("Worker", (), {"name": name}))
    assert worker_device("cuda", own) == want
    assert worker_device("cuda:1", own) == "cuda:1"


FEW, MANY = 2, 14
PIXELS = 640 * 480 * 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_memory_does_not_grow_with_the_shards(kind: str, clip: str, tmp_path: Path):
    """A shard's decoded images that stayed would take 22 MB, its patches 14 MB: twelve shards lie between the runs."""
    words = {
        "patches": "from extractors.patches import extract_patches as go\n"
        "from extractors.config import PatchesConfig as Config\nmore = {}",
        "regions": "from extractors.regions.extractor import extract_regions as go\n"
        "from extractors.regions.config import RegionsConfig as Config\nmore = {'device': 'cpu'}",
        "clip": "from extractors.clip import score_clip as go\n"
        f"from extractors.config import ClipScoreConfig as Config\nmore = {{'device': 'cpu', 'model': {clip!r}}}",
    }
    peaks = []
    for shards in (FEW, MANY):
        place = tmp_path / f"{shards}"
        make_dataset(place, shards, 24, image=lambda s, r: picture(640, 480, r))
        code = f"{words[kind]}\nassert not go({str(place)!r}, Config(workers=0, **more)).left"
        peaks.append(peak_memory([sys.executable, "-c", code])["anonymous"])
    assert peaks[1] - peaks[0] < 12 * 24 * PIXELS / 5
