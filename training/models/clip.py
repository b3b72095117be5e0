"""CLIP whole: Radford et al. 2021, two towers and a temperature (openai/CLIP clip/model.py, open_clip 3.3).

Shape letters: B pairs, T text tokens, N patches, C channels, D width, E width of the joint space.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from schemas.config import build_config
from schemas.errors import PairmillError
from shards.files import atomic_file
from training.batch import Batch
from training.config_models import Activation, CLIPConfig
from training.key_maps import KeyMap, LoadReport, rules
from training.layers import Blocks, Normalise, PreNormBlock, attend, split_heads
from training.models.base import VisionLanguageModel
from training.outputs import Outputs
from training.weights import Checkpoint, read_checkpoint, read_json

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
MAX_LOGIT_SCALE = math.log(100)
# OpenAI's archives carry these numbers as tensors; no other CLIP checkpoint does.
OPENAI_MARKS = ("input_resolution", "context_length", "vocab_size")


def tower(width: int, layers: int, heads: int, act: str) -> Blocks:
    """The transformer of either tower."""
    return Blocks(PreNormBlock(width, heads, 4 * width, act) for _ in range(layers))


class VisionTransformer(nn.Module):
    """Patches, a class token, blocks; the class token is the image's feature."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        width, patch = config.vision_width, config.patch
        assert patch is not None
        assert isinstance(config.vision_layers, int)
        scale = width**-0.5
        self.patch_embed = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.cls_token = nn.Parameter(scale * torch.randn(width))
        self.pos_embed = nn.Parameter(scale * torch.randn((config.image_size // patch) ** 2 + 1, width))
        self.norm_pre = nn.LayerNorm(width)
        self.blocks = tower(width, config.vision_layers, config.vision_heads, config.activation)
        self.norm_post = nn.LayerNorm(width)
        self.projection = nn.Parameter(scale * torch.randn(width, config.embed))

    def forward(self, pixels: Tensor) -> Tensor:
        """`pixels` [B, 3, H, W] float -> [B, E]."""
        patches = self.patch_embed(pixels).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(patches), 1, -1).to(patches.dtype), patches], dim=1)
        tokens = self.blocks(self.norm_pre(tokens + self.pos_embed))
        return self.norm_post(tokens[:, 0]) @ self.projection


class Bottleneck(nn.Module):
    """1x1, 3x3, average pool where it strides, 1x1; the shortcut is pooled in the same way (anti-aliasing)."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = nn.Sequential()
        if stride > 1 or channels != 4 * width:
            self.downsample = nn.Sequential(nn.Conv2d(channels, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.pool(F.relu(self.bn2(self.conv2(out))))
        shortcut = self.downsample(self.pool(x)) if len(self.downsample) else x
        return F.relu(self.bn3(self.conv3(out)) + shortcut)


class AttentionPool(nn.Module):
    """One attention whose query is the mean of the grid."""

    def __init__(self, side: int, width: int, heads: int, embed: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(side**2 + 1, width) / width**0.5)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.c_proj = nn.Linear(width, embed)

    def forward(self, grid: Tensor) -> Tensor:
        """`grid` [B, C, side, side] -> [B, E]."""
        cells = grid.flatten(2).transpose(1, 2)
        cells = torch.cat([cells.mean(1, keepdim=True), cells], dim=1) + self.positional_embedding
        q, k, v = self.q_proj(cells[:, :1]), self.k_proj(cells), self.v_proj(cells)
        pooled = attend(*(split_heads(part, self.heads) for part in (q, k, v)))
        return self.c_proj(pooled[:, 0])


class ModifiedResNet(nn.Module):
    """ResNet-D-like: a stem of three convolutions, anti-aliased strides, attention pool."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        assert isinstance(config.vision_layers, tuple)
        width = config.vision_width
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        channels = width
        for i, depth in enumerate(config.vision_layers):
            blocks = []
            for j in range(depth):
                blocks.append(Bottleneck(channels, width * 2**i, stride=2 if i and not j else 1))
                channels = 4 * width * 2**i
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.attnpool = AttentionPool(config.image_size // 32, channels, config.vision_heads, config.embed)

    def grid(self, pixels: Tensor) -> Tensor:
        """Features before the pool: `pixels` [B, 3, H, W] float, any multiple of 32 -> [B, C, H/32, W/32]."""
        x = pixels
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(norm(conv(x)))
        x = F.avg_pool2d(x, 2)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward(self, pixels: Tensor) -> Tensor:
        """`pixels` [B, 3, H, W] float -> [B, E]."""
        return self.attnpool(self.grid(pixels))


class TextTransformer(nn.Module):
    """Causal; the feature is that of the token with the highest id (the end of text)."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        width = config.text_width
        self.token_embedding = nn.Embedding(config.vocab, width)
        self.pos_embed = nn.Parameter(torch.empty(config.context, width))
        self.blocks = tower(width, config.text_layers, config.text_heads, config.activation)
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Parameter(torch.empty(width, config.embed))

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """`input_ids` [B, T] int64 -> tokens [B, T, D] after the last norm, features [B, E]."""
        x = self.token_embedding(input_ids) + self.pos_embed[: input_ids.shape[1]]
        tokens = self.norm(self.blocks(x, None, None, True))
        end = tokens[torch.arange(len(tokens), device=tokens.device), input_ids.argmax(-1)]
        return tokens, end @ self.projection


class CLIP(VisionLanguageModel):
    """Two towers whose unit vectors' similarities, times exp(logit_scale), are logits."""

    routes = ("contrastive",)
    config: CLIPConfig

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__(config)
        self.normalise = Normalise(MEAN, STD)
        self.visual = ModifiedResNet(config) if config.is_resnet else VisionTransformer(config)
        self.text = TextTransformer(config)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self._init_weights()

    @property
    def key_map(self) -> KeyMap:
        """OpenAI's and open_clip's names."""
        return key_map(self.config)

    def _init_weights(self) -> None:
        """openai/CLIP's: the text tower scaled by width and depth, the vision tower as torch makes it."""
        text, width = self.text, self.config.text_width
        nn.init.normal_(text.token_embedding.weight, std=0.02)
        nn.init.normal_(text.pos_embed, std=0.01)
        nn.init.normal_(text.projection, std=width**-0.5)
        towers = [text.blocks] if self.config.is_resnet else [text.blocks, self.visual.blocks]
        for block in (b for blocks in towers for b in blocks):
            nn.init.xavier_uniform_(block.attn.qkv.weight)
            nn.init.zeros_(block.attn.qkv.bias)
            nn.init.zeros_(block.attn.proj.bias)
        deep = width**-0.5 * (2 * len(text.blocks)) ** -0.5
        for block in text.blocks:
            nn.init.normal_(block.attn.qkv.weight, std=width**-0.5)
            nn.init.normal_(block.attn.proj.weight, std=deep)
            nn.init.normal_(block.mlp.fc1.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.fc2.weight, std=deep)
        if isinstance(self.visual, ModifiedResNet):
            pool = self.visual.attnpool
            for linear in (pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj):
                nn.init.normal_(linear.weight, std=pool.c_proj.in_features**-0.5)
            for module in self.visual.modules():
                if isinstance(module, Bottleneck):
                    nn.init.zeros_(module.bn3.weight)

    def encode_image(self, pixel_values: Tensor, normalise: bool = False) -> Tensor:
        """`pixel_values` [B, 3, H, W] uint8, or float normalised with MEAN and STD -> [B, E]."""
        features = self.visual(self.normalise(pixel_values))
        return F.normalize(features, dim=-1) if normalise else features

    def encode_text(self, input_ids: Tensor, normalise: bool = False) -> Tensor:
        """`input_ids` [B, T] int64, the end of text having the highest id -> [B, E]."""
        features = self.text(input_ids)[1]
        return F.normalize(features, dim=-1) if normalise else features

    def grid(self, pixel_values: Tensor) -> Tensor:
        """A ResNet's features before its pool: [B, 3, H, W] uint8 or float -> [B, C, H/32, W/32].

        Raises PairmillError: the vision tower is a transformer.
        """
        if not isinstance(self.visual, ModifiedResNet):
            raise PairmillError("grid features need a ResNet CLIP (RN50, RN101, RN50x4, RN50x16)")
        return self.visual.grid(self.normalise(pixel_values))

    def forward(self, batch: Batch, route: str = "contrastive") -> Outputs:
        """`pixel_values` and `input_ids` -> unit features, text tokens and the temperature."""
        assert batch.pixel_values is not None
        assert batch.input_ids is not None
        tokens, text_features = self.text(batch.input_ids)
        return Outputs(
            text=tokens,
            text_mask=batch.text_mask,
            image_features=self.encode_image(batch.pixel_values, normalise=True),
            text_features=F.normalize(text_features, dim=-1),
            logit_scale=self.logit_scale,
        )

    @torch.no_grad()
    def after_step(self) -> None:
        """Hold the temperature in [0, ln 100], as open_clip does."""
        self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    def load_published(self, tensors: Mapping[str, Tensor], where: str = "the checkpoint") -> LoadReport:
        """Copy OpenAI's or open_clip's weights in.

        Raises PairmillError: a shape that is not ours, or weights made with another activation.
        """
        self._refuse_other(published_activation(tensors), where)
        return super().load_published(tensors, where)

    def load_checkpoint(self, path: str | Path) -> LoadReport:
        """Copy the weights of a file or folder in; an open_clip_config.json beside them tells their activation.

        Raises PairmillError: a file that is no checkpoint, or `load_published`'s.
        """
        checkpoint = read_checkpoint(path)
        beside = _config_beside(checkpoint)
        self._refuse_other(beside.activation if beside else None, str(path))
        return self.load_published(checkpoint.tensors, str(path))

    def _refuse_other(self, made_with: Activation | None, where: str) -> None:
        if made_with is not None and made_with != self.config.activation:
            raise PairmillError(
                f"{where}: these weights were made with {made_with}, the configuration says "
                f"{self.config.activation}. Set `activation: {made_with}`."
            )

    @classmethod
    def from_checkpoint(cls, checkpoint: str | Path | Checkpoint, activation: Activation | None = None) -> CLIP:
        """The model of an OpenAI .pt, an open_clip checkpoint, or an open_clip folder with its configuration.

        Raises PairmillError: the file's weights are not a CLIP's; its activation is neither known nor given,
        or known and another one than given.
        """
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = read_checkpoint(checkpoint)
        model, where = cls(published_config(checkpoint, activation)), str(checkpoint.path)
        model.load_published(checkpoint.tensors, where).require_whole(where)
        return model

    def save_open_clip(self, folder: str | Path) -> None:
        """Write open_clip_config.json and model.safetensors; open_clip reads them as `local-dir:FOLDER`."""
        folder = Path(folder)
        super().save(folder)
        with atomic_file(folder / "open_clip_config.json") as stream:
            stream.write(json.dumps(open_clip_config(self.config), indent=2).encode())

    def save(self, folder: Path) -> None:
        """A CLIP's checkpoint is an open_clip folder."""
        self.save_open_clip(folder)


_BLOCK = (
    ("ln_1.**", "norm1.**"),
    ("ln_2.**", "norm2.**"),
    ("attn.in_proj_weight", "attn.qkv.weight"),
    ("attn.in_proj_bias", "attn.qkv.bias"),
    ("attn.out_proj.**", "attn.proj.**"),
    ("mlp.c_fc.**", "mlp.fc1.**"),
    ("mlp.c_proj.**", "mlp.fc2.**"),
)


def _block_rules(published: str, ours: str) -> list[tuple[str, str]]:
    return [(f"{published}.*.{theirs}", f"{ours}.*.{own}") for theirs, own in _BLOCK]


def key_map(config: CLIPConfig) -> KeyMap:
    """The names of openai/CLIP, which are open_clip's too."""
    vision = [("visual.**", "visual.**")]
    if not config.is_resnet:
        vision = [
            *_block_rules("visual.transformer.resblocks", "visual.blocks"),
            ("visual.conv1.weight", "visual.patch_embed.weight"),
            ("visual.class_embedding", "visual.cls_token"),
            ("visual.positional_embedding", "visual.pos_embed"),
            ("visual.ln_pre.**", "visual.norm_pre.**"),
            ("visual.ln_post.**", "visual.norm_post.**"),
            ("visual.proj", "visual.projection"),
        ]
    text = [
        *_block_rules("transformer.resblocks", "text.blocks"),
        ("token_embedding.weight", "text.token_embedding.weight"),
        ("positional_embedding", "text.pos_embed"),
        ("ln_final.**", "text.norm.**"),
        ("text_projection", "text.projection"),
        ("logit_scale", "logit_scale"),
    ]
    return KeyMap(rules(*vision, *text), ignored=OPENAI_MARKS)


def published_activation(tensors: Mapping[str, Tensor]) -> Activation | None:
    """'quick_gelu' for OpenAI's own archives, None where the tensors do not tell."""
    return "quick_gelu" if all(mark in tensors for mark in OPENAI_MARKS) else None


def config_from_shapes(
    tensors: Mapping[str, Tensor],
    activation: Activation,
    vision_heads: int | None = None,
    text_heads: int | None = None,
) -> CLIPConfig:
    """The configuration that a published state dict's shapes imply; heads are width/64 unless given.

    Raises PairmillError: a tensor every CLIP has is not there.
    """
    try:
        return CLIPConfig(
            **_vision_from_shapes(tensors, vision_heads),
            **_text_from_shapes(tensors, text_heads),
            activation=activation,
        )
    except KeyError as error:
        raise PairmillError(f"not a CLIP checkpoint: it has no {error}") from None


def _vision_from_shapes(tensors: Mapping[str, Tensor], heads: int | None) -> dict[str, Any]:
    if "visual.proj" in tensors:
        width, _, _, patch = tensors["visual.conv1.weight"].shape
        side = math.isqrt(len(tensors["visual.positional_embedding"]) - 1)
        return {
            "vision_width": width,
            "vision_layers": _count(tensors, "visual.transformer.resblocks."),
            "vision_heads": heads or max(1, width // 64),
            "patch": patch,
            "image_size": side * patch,
        }
    width = len(tensors["visual.layer1.0.conv1.weight"])
    side = math.isqrt(len(tensors["visual.attnpool.positional_embedding"]) - 1)
    return {
        "vision_width": width,
        "vision_layers": tuple(_count(tensors, f"visual.layer{i}.") for i in (1, 2, 3, 4)),
        "vision_heads": heads or max(1, width // 2),
        "patch": None,
        "image_size": side * 32,
    }


def _text_from_shapes(tensors: Mapping[str, Tensor], heads: int | None) -> dict[str, Any]:
    width, embed = tensors["text_projection"].shape
    return {
        "embed": embed,
        "text_width": width,
        "text_layers": _count(tensors, "transformer.resblocks."),
        "text_heads": heads or max(1, width // 64),
        "context": len(tensors["positional_embedding"]),
        "vocab": len(tensors["token_embedding.weight"]),
    }


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """How many different numbers follow `prefix` in the names."""
    return len({name[len(prefix) :].split(".")[0] for name in tensors if name.startswith(prefix)})


def _config_beside(checkpoint: Checkpoint) -> CLIPConfig | None:
    """What the open_clip_config.json in the checkpoint's folder says, if there is one."""
    path = checkpoint.path.parent / "open_clip_config.json"
    return config_from_open_clip(read_json(path), str(path)) if path.is_file() else None


def published_config(checkpoint: Checkpoint, activation: Activation | None = None) -> CLIPConfig:
    """The configuration of a published checkpoint: from open_clip_config.json beside it, else from its shapes.

    Raises PairmillError: see CLIP.from_checkpoint.
    """
    beside = _config_beside(checkpoint)
    known = beside.activation if beside else published_activation(checkpoint.tensors)
    if known is not None and activation not in (None, known):
        raise PairmillError(f"{checkpoint.path}: these weights were made with {known}, not {activation}")
    if beside is not None:
        return beside
    activation = known or activation
    if activation is None:
        raise PairmillError(
            f"{checkpoint.path}: whether these weights need GELU or QuickGELU is not written in them. "
            "Say so: open_clip's plain names are gelu, its -quickgelu names and OpenAI's are quick_gelu."
        )
    return config_from_shapes(checkpoint.tensors, activation)


def open_clip_config(config: CLIPConfig) -> dict[str, Any]:
    """open_clip_config.json of a model with this configuration."""
    return {
        "model_cfg": {
            "embed_dim": config.embed,
            "quick_gelu": config.activation == "quick_gelu",
            "vision_cfg": {
                "image_size": config.image_size,
                "layers": config.vision_layers,
                "width": config.vision_width,
                "head_width": config.vision_features // config.vision_heads,
                "patch_size": config.patch,
            },
            "text_cfg": {
                "context_length": config.context,
                "vocab_size": config.vocab,
                "width": config.text_width,
                "heads": config.text_heads,
                "layers": config.text_layers,
            },
        },
        "preprocess_cfg": {"mean": MEAN, "std": STD},
    }


def config_from_open_clip(saved: Mapping[str, Any], where: str = "open_clip_config.json") -> CLIPConfig:
    """The configuration that open_clip_config.json describes.

    Raises PairmillError: a tower of another kind (timm, Hugging Face), or a setting this CLIP does not have.
    """
    model = saved.get("model_cfg", saved)
    vision, text = dict(model.get("vision_cfg", {})), dict(model.get("text_cfg", {}))
    layers = vision.pop("layers", 12)
    width, head_width = vision.pop("width", 768), vision.pop("head_width", 64)
    resnet = isinstance(layers, list | tuple)
    fields = {
        "embed": model.get("embed_dim"),
        "activation": "quick_gelu" if model.get("quick_gelu") else "gelu",
        "image_size": vision.pop("image_size", 224),
        "patch": vision.pop("patch_size", 16),
        "vision_layers": tuple(layers) if resnet else layers,
        "vision_width": width,
        "vision_heads": width * (32 if resnet else 1) // head_width,
        "context": text.pop("context_length", 77),
        "vocab": text.pop("vocab_size", 49408),
        "text_width": text.pop("width", 512),
        "text_heads": text.pop("heads", 8),
        "text_layers": text.pop("layers", 12),
    }
    other = sorted(vision) + sorted(text)
    if other or model.get("custom_text"):
        raise PairmillError(f"{where}: a CLIP of another kind: {', '.join(other) or 'custom_text'} is set")
    return build_config(CLIPConfig, fields | ({"patch": None} if resnet else {}), where)
