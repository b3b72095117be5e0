"""Configuration of the extractors. Imports only pydantic and schemas."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt, model_validator

from schemas.config import ShardStage, execution, identity

Precision = Literal["auto", "fp32", "bf16", "fp16"]
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class ExtractorConfig(ShardStage):
    """What every extractor lets the user choose about the run.

    `workers` is by default one for every eight cores: a worker's threads decode, and each worker holds its own model.
    """

    selection: str | None = execution(None, "compute only the rows that this selection keeps; the others stay skipped")


class DeviceConfig(ExtractorConfig):
    """An extractor with a model: where it runs and in what precision."""

    device: str = execution("auto", "auto, cpu, cuda or cuda:N", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    precision: Precision = identity("auto", "auto, fp32, bf16 or fp16; auto is fp32 on CPU, fp16 on CUDA")
    batch_size: PositiveInt | Literal["auto"] = execution("auto", "rows a batch; auto is picked once and recorded")
    num_gpus: int | None = execution(None, "worker processes, one on each GPU [default: every GPU]", ge=1)


class ClipScoreConfig(DeviceConfig):
    """`pairmill score clip`. What the weights are is identity by their hash; where they lie is not."""

    name: str = execution("clip", "name of the scores and of the embeddings", pattern=NAME)
    model: str = execution(
        "ViT-B-32", "open_clip model name, local-dir:PATH, or a run or checkpoint folder of pairmill"
    )
    pretrained: str | None = execution(None, "open_clip tag or a weights file, for a model given by name")
    embeddings: bool = execution(True, "also write both embeddings, to features/NAME")
    compile: bool = execution(False, "torch.compile both towers: slower start, faster batches; pays on CUDA")


class PatchesConfig(ExtractorConfig):
    """`pairmill extract patches`."""

    name: str = execution("patches", "name of the feature set", pattern=NAME)
    layout: Literal["vilt", "square"] = identity(
        "vilt", "vilt: shorter side to SIZE, aspect kept, sides floored to PATCH; square: resize and centre crop"
    )
    size: PositiveInt = identity(384, "shorter side, px; a multiple of PATCH")
    patch: PositiveInt = identity(32, "side of a patch, px")

    @model_validator(mode="after")
    def _whole_patches(self) -> PatchesConfig:
        if self.size % self.patch:
            raise ValueError(f"`size` must be a multiple of `patch`, got size {self.size} and patch {self.patch}")
        return self


class GridConfig(DeviceConfig):
    """`pairmill extract grid`. What the backbone is (architecture, weights by their hash, size, preprocessing) is
    identity as the extractor finds it; where the weights lie is not.
    """

    name: str = execution("grid", "name of the feature set", pattern=NAME)
    backbone: str = execution(
        ..., "clip:NAME (open_clip's), clip:local-dir:PATH, clip:RUN of pairmill, or timm:NAME (ViT, Swin, ResNet, ...)"
    )
    weights: str | None = execution(None, "weights file, for a backbone given by name")
    pretrained: str | None = execution(
        None, "tag of open_clip's or timm's published weights; beside --weights (timm) it says whose preprocessing"
    )
    size: PositiveInt | None = execution(
        None, "side of the square that the backbone sees, px; position embeddings are resampled [default: its own]"
    )
    pool_cells: PositiveInt | None = identity(
        None, "average the map to N x N cells: cell i of N is the mean of rows floor(i R / N) to ceil((i + 1) R / N)"
    )
