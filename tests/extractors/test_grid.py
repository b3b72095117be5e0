from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import timm.data
import torch
from huggingface_hub import HfApi
from open_clip.modified_resnet import ModifiedResNet
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import extractors.grid_models as grid_models
from cli.main import run as run_command
from extractors.config import GridConfig
from extractors.grid import GridLoader, extract_grid
from extractors.grid_models import ClipTower, TimmTower, find_backbone
from schemas.errors import PairmillError
from schemas.events import StageFinished
from schemas.features import about
from shards.dataset import PAIRS, Dataset
from shards.images import decode_rgb
from shards.reader import MappedShard, read_table
from shards.weights import read_checkpoint
from tests.extractors.conftest import CORRUPT, FAIL
from tests.extractors.tiny_clip import save_clip, save_run
from tests.extractors.tiny_timm import save_timm, shake
from tests.make import SIZES, make_dataset, picture
from tests.parity.golden import Case, golden

VIT = {"image_size": 64, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16}
CLIPS: dict[str, dict[str, Any]] = {
    "vit": VIT,
    "vit-pooled-first": VIT | {"final_ln_after_pool": True},
    "vit-attention-pool": VIT | {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2},
    "resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32},
    "timm": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"},
}
TIMMS = ("test_vit", "tiny_swin", "test_resnet")
# The side of a cell in px, channels, class token or not.
SHAPES = {
    "vit": (8, 32, True),
    "vit-pooled-first": (8, 32, True),
    "vit-attention-pool": (8, 32, True),
    "resnet": (32, 256, False),
    "timm": (16, 64, True),
    "test_vit": (16, 64, True),
    "tiny_swin": (8, 32, False),
    "test_resnet": (32, 96, False),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder that open_clip reads for each of CLIPS, a file for each of TIMMS."""
    folder = tmp_path_factory.mktemp("backbones")
    made = {}
    for name, vision in CLIPS.items():
        made[name] = save_clip(folder / name, vision_cfg=vision)
        model = open_clip.create_model(f"local-dir:{made[name]}", load_weights=True)
        save_file(shake(model).state_dict(), made[name] / "model.safetensors")
    return made | {name: save_timm(folder / f"{name}.safetensors", name) for name in TIMMS}


def given(weights: dict[str, Path], name: str) -> dict[str, Any]:
    if name in TIMMS:
        return {"backbone": f"timm:{name}", "weights": str(weights[name])}
    return {"backbone": f"clip:local-dir:{weights[name]}"}


def run(dataset: Dataset, **values: Any) -> StageFinished:
    return extract_grid(dataset, GridConfig(**{"workers": 0, "device": "cpu", **values}))


def mapped(dataset: Dataset, shard: int, name: str = "grid") -> MappedShard:
    return MappedShard(dataset.folder, dataset.stage(f"features/{name}").file(shard))


def grids(dataset: Dataset) -> list[np.ndarray]:
    """Of the rows that have one."""
    found = [mapped(dataset, s).row(r)["grid"] for s, rows in enumerate(dataset.manifest.shards) for r in range(rows)]
    return [grid for grid in found if grid is not None]


@dataclass
class Bare:
    """The library alone: its model, its transform, what a hook or `forward_features` gives, one image at a time."""

    transform: Callable[[Image.Image], Tensor]
    call: Callable[[Tensor], Any]
    hooked: nn.Module | None

    def __call__(self, rgb: np.ndarray) -> np.ndarray:
        """[rows, cols, C] or tokens [N, C]."""
        seen: list[Tensor] = []
        handle = self.hooked and self.hooked.register_forward_hook(lambda module, args, out: seen.append(out))
        with torch.no_grad():
            out = self.call(self.transform(Image.fromarray(rgb))[None])
        if handle:
            handle.remove()
        return (seen[0] if seen else out)[0].float().numpy()


def bare_clip(folder: Path, name: str, size: int | None) -> Bare:
    force = None if name == "resnet" else size  # its attention pool, which nobody needs here, takes one size only
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}", force_image_size=force)
    visual = model.eval().visual
    if name == "timm":
        return Bare(transform, visual.trunk.forward_features, None)
    if name == "resnet":
        blocks = nn.Sequential(visual.layer1, visual.layer2, visual.layer3, visual.layer4)
        transform = open_clip.image_transform(size or 64, is_train=False, interpolation="bicubic")
        return Bare(transform, lambda pixels: blocks(visual.stem(pixels)), None)
    return Bare(transform, visual, visual.ln_post if name == "vit" else visual.transformer)


def bare_timm(file: Path, name: str, size: int | None) -> Bare:
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(file)}).eval()
    if size is not None and hasattr(model, "set_input_size"):
        model.set_input_size(img_size=size)
    data = timm.data.resolve_data_config({"img_size": size} if size else {}, model=model)
    return Bare(timm.data.create_transform(**data), model.forward_features, None)


def assert_within_fp16(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.dtype == np.float16
    np.testing.assert_allclose(ours.astype(np.float32), theirs, rtol=1e-3, atol=1e-3 * np.abs(theirs).max())


@pytest.mark.parametrize(
    ("name", "size"), [*((n, s) for n in SHAPES for s in (None, 32)), ("vit", 96), ("test_vit", 192), ("tiny_swin", 96)]
)
def test_the_map_is_the_models_own(tmp_path: Path, weights: dict[str, Path], name: str, size: int | None):
    """At other sizes position embeddings, and Swin's tables, are those of the library's own resampling."""
    dataset = make_dataset(tmp_path / "ds", 1, 3)
    assert run(dataset, **given(weights, name), size=size).counts == {"ok": 3}
    bare = (bare_timm if name in TIMMS else bare_clip)(weights[name], name, size)
    cell, channels, has_class = SHAPES[name]
    side = (size or {"timm": 160, "test_vit": 160, "test_resnet": 160}.get(name, 64)) // cell
    for number, data in enumerate(read_table(dataset.folder, dataset.stage(PAIRS).file(0))["image"].to_pylist()):
        row, theirs = mapped(dataset, 0).row(number), bare(decode_rgb(data))
        assert (row["rows"], row["cols"], row["num_cells"]) == (side, side, side * side)
        assert row["grid"].shape == (side, side, channels)
        assert ("class_token" in row) is has_class
        if has_class:
            assert_within_fp16(row["class_token"], theirs[0])
            theirs = theirs[1:].reshape(side, side, channels)
        elif name.endswith("resnet"):
            theirs = theirs.transpose(1, 2, 0)
        assert_within_fp16(row["grid"], theirs)


@pytest.mark.parametrize("case", golden("clip_resnet"), ids=str)
def test_a_resnets_map_is_what_openais_code_computed(case: Case):
    config = case.config
    heads = config["v_width"] * 32 // 64
    visual = ModifiedResNet(config["v_layers"], config["embed"], heads, config["image_size"], config["v_width"])
    visual.load_state_dict(
        {name.removeprefix("visual."): w for name, w in case.weights.items() if name.startswith("visual.")}
    )
    tower = ClipTower(visual.eval())
    atol, rtol = case.tolerance
    for image, grid in (("image", "grid"), ("grid_image", "grid_nonsquare")):
        found, token = tower(case.inputs[image])
        assert token is None
        torch.testing.assert_close(found, case.outputs[grid], atol=atol, rtol=rtol)


def test_a_corrupt_image_nulls_its_row_only(dataset: Dataset, weights: dict[str, Path]):
    finished = run(dataset, **given(weights, "vit"))
    assert finished.counts == {"ok": 32, "timeout": 1, "too_small": 1, "decode_error": 2}
    for shard in range(3):
        for number in range(12):
            row = mapped(dataset, shard).row(number)
            bad = {**FAIL, **dict.fromkeys(CORRUPT, "decode_error")}.get((shard, number))
            assert row["state"] == (bad or "ok")
            assert (row["grid"] is None) is (row["class_token"] is None) is (row["rows"] is None) is bool(bad)


@pytest.mark.parametrize("name", ["vit", "resnet", "tiny_swin"])
def test_rows_depend_on_neither_batch_nor_order(tmp_path: Path, weights: dict[str, Path], name: str):
    def image(number: int) -> np.ndarray:
        return picture(*SIZES[number % len(SIZES)], number)

    there = make_dataset(tmp_path / "there", 1, 6, image=lambda s, r: image(r))
    back = make_dataset(tmp_path / "back", 1, 6, image=lambda s, r: image(5 - r))
    run(there, **given(weights, name), batch_size=1)
    run(back, **given(weights, name), batch_size=4)
    for one, other in zip(grids(there), reversed(grids(back)), strict=True):
        np.testing.assert_allclose(one.astype(float), other.astype(float), rtol=1e-3, atol=1e-3 * np.abs(other).max())


@pytest.mark.parametrize(("name", "cells"), [("vit", 3), ("resnet", 1), ("tiny_swin", 8)])
def test_pooled_cells_are_means_of_cells(tmp_path: Path, weights: dict[str, Path], name: str, cells: int):
    dataset = make_dataset(tmp_path / "ds", 1, 3)
    run(dataset, **given(weights, name))
    run(dataset, **given(weights, name), name="few", pool_cells=cells)
    for number in range(3):
        whole, row = mapped(dataset, 0).row(number), mapped(dataset, 0, "few").row(number)
        assert (row["rows"], row["cols"], row["num_cells"]) == (cells, cells, cells * cells)
        side = whole["rows"]
        part = [slice(i * side // cells, -(-(i + 1) * side // cells)) for i in range(cells)]
        means = [[whole["grid"][y, x].astype(np.float64).mean((0, 1)) for x in part] for y in part]
        assert_within_fp16(row["grid"], np.array(means))
        if "class_token" in row:
            np.testing.assert_array_equal(row["class_token"], whole["class_token"])


def test_a_rerun_does_nothing(dataset: Dataset, weights: dict[str, Path]):
    assert run(dataset, **given(weights, "vit")).done == 3
    before = [Path(dataset.folder.url, f"features/grid/{s:05d}.arrow").stat().st_mtime_ns for s in range(3)]
    assert run(dataset, **given(weights, "vit"), size=64).done == 0  # its own size, said aloud
    assert before == [Path(dataset.folder.url, f"features/grid/{s:05d}.arrow").stat().st_mtime_ns for s in range(3)]


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"size": 32}, "`preprocess`"),
        ({"pool_cells": 2}, "`pool_cells` was None, now 2"),
        ({"precision": "bf16"}, "`precision` was 'fp32', now 'bf16'"),
        ({"backbone": "resnet"}, "`architecture`"),
        ({"backbone": "test_vit"}, "`backbone` was 'clip', now 'timm:test_vit'"),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, weights: dict[str, Path], other: dict[str, Any], named: str):
    dataset = make_dataset(tmp_path / "ds", 1, 2)
    run(dataset, **given(weights, "vit"))
    changed = given(weights, other["backbone"]) if "backbone" in other else given(weights, "vit") | other
    with pytest.raises(PairmillError, match="made with other settings") as error:
        run(dataset, **changed)
    assert named in str(error.value)


def test_other_weights_are_refused_and_the_same_elsewhere_are_not(tmp_path: Path, weights: dict[str, Path]):
    dataset = make_dataset(tmp_path / "ds", 1, 2)
    run(dataset, **given(weights, "test_vit"))
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(weights["test_vit"].read_bytes())
    assert run(dataset, backbone="timm:test_vit", weights=str(moved)).done == 0
    with pytest.raises(PairmillError, match=r"`weights` was .*now"):
        run(dataset, backbone="timm:test_vit", weights=str(save_timm(tmp_path / "other.safetensors", "test_vit", 1)))


def test_the_file_says_what_it_holds(tmp_path: Path, weights: dict[str, Path]):
    dataset = make_dataset(tmp_path / "ds", 1, 2)
    run(dataset, **given(weights, "vit"), pool_cells=2)
    digest = find_backbone(GridConfig(**given(weights, "vit"))).sha256
    told = {"backbone": "clip:vit", "weights": digest, "size": 64, "pool_cells": 2}
    assert about(mapped(dataset, 0).schema) == told
    column = dataset.stage("features/grid").sidecar().columns["grid"]
    assert column["preprocess"]["size"] == 64
    assert column["precision"] == "fp32"
    assert str(tmp_path.parent) not in json.dumps(dataset.stage("features/grid").sidecar().model_dump())


def test_a_run_of_our_training_is_a_backbone(tmp_path: Path):
    folder = save_run(tmp_path / "small", best=1, last=2)
    backbone = find_backbone(GridConfig(backbone=f"clip:{folder}"))
    assert backbone.label == "clip:small step 00001"
    assert backbone.size == 32


def test_a_loader_goes_to_workers(weights: dict[str, Path]):
    for name in ("vit", "tiny_swin"):
        loader = GridLoader.of(GridConfig(**given(weights, name)))
        assert pickle.loads(pickle.dumps(loader)) == loader
        assert hash(pickle.loads(pickle.dumps(loader))) == hash(loader)


def test_bytes_a_row(weights: dict[str, Path]):
    assert GridLoader.of(GridConfig(**given(weights, "vit"))).bytes_per_row == (64 + 1) * 32 * 2
    assert GridLoader.of(GridConfig(**given(weights, "tiny_swin"), pool_cells=2)).bytes_per_row == 4 * 32 * 2


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"backbone": "ViT-B-16"}, r"no such kind of backbone\. Did you mean `clip:ViT-B-16`"),
        ({"backbone": "clip:RN-50"}, r"open_clip knows no such model.*Did you mean `clip:RN50`"),
        ({"backbone": "timm:swin_base_patch4_windw7_224"}, r"Did you mean `timm:swin_base_patch4_window7_224`"),
        ({"backbone": "clip:RN50"}, r"`--backbone clip:RN50` says which architecture.*Pass --pretrained"),
        ({"backbone": "clip:RN50", "pretrained": "openai"}, r"Pass --backbone clip:RN50-quickgelu\."),
        ({"backbone": "clip:RN50", "pretrained": "openai", "weights": "x.pt"}, r"both say which weights.*Drop one"),
        ({"backbone": "timm:vit_tiny_patch16_224"}, r"Pass --weights FILE, or --pretrained.*augreg_in21k_ft_in1k"),
        ({"backbone": "timm:vit_tiny_patch16_224", "pretrained": "augreg_in21"}, r"Did you mean `augreg_in21k`"),
        ({"backbone": "timm:test_vit", "weights": "/nowhere.pt"}, r"`--weights /nowhere\.pt`: no such file"),
        ({"backbone": "timm:vit_base_patch16_sapiens2"}, r"sees 768 x 1024 px\. Pass --size"),
    ],
)
def test_errors_say_what_to_do(values: dict[str, Any], match: str):
    with pytest.raises(PairmillError, match=match):
        find_backbone(GridConfig(**values))


@pytest.mark.parametrize(
    ("name", "values", "match"),
    [
        ("vit", {"size": 60}, r"multiple of `patch`, got size 60 and patch 8"),
        ("test_vit", {"size": 60}, r"multiple of `patch`, got size 60 and patch 16"),
        ("vit", {"pool_cells": 9}, r"`--pool-cells 9`: the map of clip:vit at 64 px has 8 x 8 cells only"),
    ],
)
def test_sizes_that_do_not_go(
    dataset: Dataset, weights: dict[str, Path], name: str, values: dict[str, Any], match: str
):
    with pytest.raises(PairmillError, match=match):
        run(dataset, **given(weights, name), **values)
    assert not dataset.stage("features/grid").sidecar()


def test_a_model_of_one_size_says_so(tmp_path: Path):
    file = tmp_path / "unread.safetensors"
    file.write_bytes(b"")
    with pytest.raises(PairmillError, match=r"`timm:mixer_s32_224` computes at 224 px only\. Drop --size 96"):
        GridLoader.of(GridConfig(backbone="timm:mixer_s32_224", weights=str(file), size=96))


def test_weights_of_another_architecture_name_what_does_not_fit(
    dataset: Dataset, weights: dict[str, Path], tmp_path: Path
):
    for name, other, missing, unexpected in (
        ("test_vit", "test_resnet", "cls_token, pos_embed", "bn1.bias"),
        ("tiny_swin", "test_vit", "patch_embed.norm.weight, patch_embed.norm.bias", "blocks.0.attn.proj.bias"),
    ):
        with pytest.raises(PairmillError, match=r"Pass the model that the file was made for") as error:
            run(dataset, backbone=f"timm:{name}", weights=str(weights[other]))
        assert f"missing: {missing}" in str(error.value)
        assert f"unexpected: {unexpected}" in str(error.value)
    folder = save_clip(tmp_path / "clip", vision_cfg=VIT)
    save_file(read_checkpoint(weights["resnet"]).tensors, folder / "model.safetensors")
    with pytest.raises(PairmillError, match=r"Pass the model that the file was made for") as error:
        run(dataset, backbone=f"clip:local-dir:{folder}")
    assert "missing: visual.class_embedding, visual.positional_embedding" in str(error.value)
    assert "unexpected: visual.attnpool.c_proj.bias" in str(error.value)
    assert not dataset.stage("features/grid").sidecar()


def test_weights_by_their_first_names_and_without_a_classifier(tmp_path: Path, weights: dict[str, Path]):
    """Files of original authors: Swin's downsampling at the end of a stage, buffers among the weights, no head."""
    original = {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16, dtype=torch.int64)}
    for name, tensor in read_checkpoint(weights["tiny_swin"]).tensors.items():
        if not name.startswith("head."):
            original[name.replace("layers.1.downsample", "layers.0.downsample")] = tensor
    torch.save({"model": original}, tmp_path / "swin.pth")
    ours, theirs = make_dataset(tmp_path / "a", 1, 3), make_dataset(tmp_path / "b", 1, 3)
    run(ours, backbone="timm:tiny_swin", weights=str(tmp_path / "swin.pth"))
    run(theirs, **given(weights, "tiny_swin"))
    np.testing.assert_array_equal(grids(ours), grids(theirs))


def test_a_hub_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch):
    def gone(*args: Any, **kwargs: Any) -> Any:
        raise FileNotFoundError("no connection")

    monkeypatch.setattr(grid_models, "hf_hub_download", gone)
    monkeypatch.setattr(HfApi, "model_info", gone)
    with pytest.raises(PairmillError, match=r"\(no connection\)\. Fetch https://\S+in1k elsewhere.*--weights FILE"):
        find_backbone(GridConfig(backbone="timm:vit_tiny_patch16_224", pretrained="augreg_in21k_ft_in1k"))


def test_published_weights_come_from_the_cache(monkeypatch: pytest.MonkeyPatch, weights: dict[str, Path]):
    def hub(repo: str, name: str, local_files_only: bool) -> str:
        assert local_files_only
        if name != "model.safetensors":
            raise FileNotFoundError(name)
        assert repo == "timm/test_vit.r160_in1k"
        return str(weights["test_vit"])

    monkeypatch.setattr(grid_models, "hf_hub_download", hub)
    backbone = find_backbone(GridConfig(backbone="timm:test_vit", pretrained="r160_in1k"))
    assert backbone.label == "timm:test_vit.r160_in1k"
    assert backbone.sha256 == find_backbone(GridConfig(**given(weights, "test_vit"))).sha256


def test_numbers_beyond_fp16_are_an_error(tmp_path: Path, weights: dict[str, Path]):
    dataset = make_dataset(tmp_path / "ds", 1, 2)
    state = read_checkpoint(weights["tiny_swin"]).tensors
    state["norm.weight"][0] = 1e6
    save_file(state, tmp_path / "large.safetensors")
    with pytest.raises(PairmillError, match="--precision bf16"):
        run(dataset, backbone="timm:tiny_swin", weights=str(tmp_path / "large.safetensors"))
    assert not dataset.stage("features/grid").standing()


def test_a_model_without_a_map_is_an_error():
    class Vector(nn.Module):
        def forward_features(self, pixels: Tensor) -> Tensor:
            return pixels.mean((2, 3))

    with pytest.raises(PairmillError, match="`timm:vector` gives no feature map"):
        TimmTower(Vector(), "timm:vector")(torch.zeros(1, 3, 8, 8))


def test_the_command_and_what_lists_a_grid_set(
    tmp_path: Path, weights: dict[str, Path], capsys: pytest.CaptureFixture[str]
):
    dataset, where = make_dataset(tmp_path / "ds", 1, 2), str(tmp_path / "ds")
    words = ["extract", "grid", where, "--backbone", "timm:tiny_swin", "--workers", "0", "-q"]
    assert run_command([*words, "--weights", str(weights["tiny_swin"]), "--pool-cells", "2"]) == 0
    assert mapped(dataset, 0).row(1)["grid"].shape == (2, 2, 32)
    for listing, told in (("history", "features/grid  extract grid"), ("show", "grid.num_cells: 4"), ("check", "")):
        assert run_command([listing, where]) == 0
        assert told in capsys.readouterr().out
    assert run_command(["extract", "grid", where, "--backbone", "timm:tiny_swim"]) == 2
    assert "Did you mean `timm:tiny_swin`?" in capsys.readouterr().err
