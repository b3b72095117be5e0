"""Configurations of the models, and the published sizes by name. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt, model_validator

from schemas.config import StageConfig, identity

Activation = Literal["gelu", "quick_gelu"]
ViLTHead = Literal["masked_language", "matching", "vqa", "nlvr2", "ranking"]


class CLIPConfig(StageConfig):
    """CLIP (Radford et al. 2021): two towers and a temperature. Four `vision_layers` make a ResNet."""

    family: Literal["clip"] = identity("clip", "model family")
    embed: PositiveInt = identity(512, "width of the joint space")
    image_size: PositiveInt = identity(224, "side of the square image, px")
    patch: PositiveInt | None = identity(32, "side of a patch, px; none for a ResNet")
    vision_width: PositiveInt = identity(768, "width of the vision tower (ResNet: of its stem)")
    vision_layers: PositiveInt | tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = identity(
        12, "transformer blocks, or the ResNet's blocks in each of its four stages"
    )
    vision_heads: PositiveInt = identity(12, "attention heads of the vision tower (ResNet: of its pool)")
    context: PositiveInt = identity(77, "most text tokens")
    vocab: PositiveInt = identity(49408, "size of the vocabulary")
    text_width: PositiveInt = identity(512, "width of the text tower")
    text_layers: PositiveInt = identity(12, "blocks of the text tower")
    text_heads: PositiveInt = identity(8, "attention heads of the text tower")
    activation: Activation = identity("gelu", "OpenAI's weights need quick_gelu")

    @property
    def is_resnet(self) -> bool:
        """Whether the vision tower is a ResNet."""
        return isinstance(self.vision_layers, tuple)

    @property
    def vision_features(self) -> int:
        """Width of the vision tower's last features, before the projection."""
        return self.vision_width * 32 if self.is_resnet else self.vision_width

    @model_validator(mode="after")
    def _fits(self) -> CLIPConfig:
        side = 32 if self.is_resnet else self.patch
        if side is None:
            raise ValueError("a vision transformer needs `patch`")
        if self.is_resnet and self.patch is not None:
            raise ValueError("a ResNet has no patches: set `patch` to none")
        if self.image_size % side:
            raise ValueError(f"image_size {self.image_size} is not a multiple of {side}")
        for width, heads, name in (
            (self.vision_features, self.vision_heads, "vision_heads"),
            (self.text_width, self.text_heads, "text_heads"),
        ):
            if width % heads:
                raise ValueError(f"{name} {heads} does not divide the width {width}")
        return self


class ViLTConfig(StageConfig):
    """ViLT (Kim et al. 2021): one transformer over text tokens and linear patches."""

    family: Literal["vilt"] = identity("vilt", "model family")
    width: PositiveInt = identity(768, "width of the transformer")
    layers: PositiveInt = identity(12, "blocks")
    heads: PositiveInt = identity(12, "attention heads")
    mlp_ratio: PositiveInt = identity(4, "hidden width of the feed-forward part, in widths")
    vocab: PositiveInt = identity(30522, "size of the vocabulary")
    max_text_len: PositiveInt = identity(40, "most text tokens")
    image_size: PositiveInt = identity(384, "side of the square the position table was made for, px")
    patch: PositiveInt = identity(32, "side of a patch, px")
    image_types: PositiveInt = identity(1, "token types for images: 1, or 2 for NLVR2")
    max_image_len: int = identity(200, "most patches in training, a random subset of more; -1 = all", ge=-1)
    dropout: float = identity(0.1, "dropout of embeddings, projections and feed-forward parts", ge=0, lt=1)
    init_std: float = identity(
        0.02, "standard deviation of new weights; a narrow model wants more, about half of 1 / sqrt(width)", gt=0
    )
    model_heads: tuple[ViLTHead, ...] = identity(("masked_language", "matching"), "task heads")
    answers: PositiveInt = identity(3129, "answers of the vqa head")
    quirks: bool = identity(
        False,
        "reproduce the original's faults: training permutes the patches of images at the limit, and the "
        "classifiers' LayerNorm decays",
    )

    @property
    def grid(self) -> int:
        """Side of the position table, in patches."""
        return self.image_size // self.patch

    @model_validator(mode="after")
    def _fits(self) -> ViLTConfig:
        if self.image_size % self.patch:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch {self.patch}")
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} does not divide the width {self.width}")
        if self.max_image_len == 0:
            raise ValueError("max_image_len must be -1 (all) or at least 1")
        if "nlvr2" in self.model_heads and self.image_types < 2:
            raise ValueError("the nlvr2 head needs image_types 2")
        return self


def _clip_resnet(embed: int, image_size: int, layers: tuple[int, int, int, int], width: int) -> CLIPConfig:
    return CLIPConfig(
        embed=embed,
        image_size=image_size,
        patch=None,
        vision_layers=layers,
        vision_width=width,
        vision_heads=width // 2,
        text_width=max(512, width * 8),
        text_heads=max(512, width * 8) // 64,
    )


def _clip_large(image_size: int) -> CLIPConfig:
    return CLIPConfig(
        embed=768,
        image_size=image_size,
        patch=14,
        vision_layers=24,
        vision_width=1024,
        vision_heads=16,
        text_width=768,
        text_heads=12,
    )


# OpenAI's own weights of these sizes use QuickGELU: `.model_copy(update={"activation": "quick_gelu"})`.
CLIP_SIZES: dict[str, CLIPConfig] = {
    "RN50": _clip_resnet(1024, 224, (3, 4, 6, 3), 64),
    "RN101": CLIPConfig(embed=512, patch=None, vision_layers=(3, 4, 23, 3), vision_width=64, vision_heads=32),
    "RN50x4": _clip_resnet(640, 288, (4, 6, 10, 6), 80),
    "RN50x16": _clip_resnet(768, 384, (6, 8, 18, 8), 96),
    "ViT-B-32": CLIPConfig(),
    "ViT-B-16": CLIPConfig(patch=16),
    "ViT-L-14": _clip_large(224),
    "ViT-L-14-336": _clip_large(336),
    "tiny": CLIPConfig(
        embed=64,
        image_size=64,
        patch=16,
        vision_width=128,
        vision_layers=3,
        vision_heads=4,
        context=32,
        text_width=128,
        text_layers=2,
        text_heads=4,
    ),
}

VILT_SIZES: dict[str, ViLTConfig] = {
    "ViLT-B-32": ViLTConfig(),
    "tiny": ViLTConfig(
        width=128,
        layers=4,
        heads=4,
        vocab=4096,
        max_text_len=32,
        image_size=96,
        patch=16,
        max_image_len=60,
        dropout=0.0,
    ),
}
