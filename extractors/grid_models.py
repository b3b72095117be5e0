"""The backbones of `extract grid`: image models of open_clip and timm, up to their feature map."""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import open_clip
import timm
import timm.data
import torch
from huggingface_hub import HfApi, hf_hub_download
from open_clip.convert import convert_state_dict
from open_clip.model import resize_pos_embed
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from PIL import Image
from torch import Tensor, nn

from extractors.clip import Resize, image_resize
from extractors.clip_source import LOCAL, ClipSource, find_clip, quiet
from extractors.config import GridConfig
from extractors.regions.weights import fill
from schemas.errors import PairmillError, suggest
from shards.files import hash_file
from shards.transforms import check_patch_size
from shards.weights import FOLDER_FILES, read_checkpoint

# Normalised pixels [B, 3, S, S] -> the map [B, C, rows, cols], and the class token [B, C] or None.
Tower = Callable[[Tensor], tuple[Tensor, Tensor | None]]

_ONLINE_TIMEOUT_S = 5.0


class Backbone(Protocol):
    """A model, found but not built; picklable and hashable.

    label       what people call it, without a path
    sha256      of the weights file
    size        side of the square it sees, px
    preprocess  its own preprocessing at that size, with `mean` and `std` of RGB
    identity    what its maps depend on, besides precision
    """

    @property
    def label(self) -> str: ...
    @property
    def sha256(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def preprocess(self) -> dict[str, Any]: ...
    @property
    def identity(self) -> dict[str, Any]: ...

    def __hash__(self) -> int: ...

    def resize(self) -> Resize:
        """uint8 [H, W, 3] -> uint8 [S, S, 3], the pixels of the model's own transform."""

    def build(self, device: torch.device) -> Tower:
        """The model with its weights, fp32, in eval mode. Raises PairmillError where they do not fit."""


class ClipTower(nn.Module):
    """open_clip's own ResNet or ViT. A ResNet's map is what its attention pool gets, stride 32 (CLIP-ViL). A ViT's is
    its tokens after the last block, and after `ln_post` where the model normalises tokens before it pools them.
    """

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual
        pooled_first = getattr(visual, "attn_pool", None) is not None or getattr(visual, "final_ln_after_pool", False)
        self.normal = not pooled_first

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """[B, 3, S, S] -> map [B, C, rows, cols], class token [B, C] or None."""
        found = self.visual.forward_intermediates(
            pixels,
            indices=1,
            normalize_intermediates=self.normal,
            intermediates_only=True,
            output_extra_tokens=True,
        )
        prefix = found.get("image_intermediates_prefix")
        return found["image_intermediates"][-1], None if prefix is None else prefix[-1][:, 0]


class TimmTower(nn.Module):
    """A timm model's `forward_features`. Register and distillation tokens are left out."""

    def __init__(self, trunk: nn.Module, label: str) -> None:
        super().__init__()
        self.trunk, self.label = trunk, label
        self.prefix = int(getattr(trunk, "num_prefix_tokens", 0))
        self.has_class = self.prefix > 0 and getattr(trunk, "cls_token", None) is not None
        self.last = getattr(trunk, "output_fmt", "NCHW") == "NHWC"

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """[B, 3, S, S] -> map [B, C, rows, cols], class token [B, C] or None.

        Raises PairmillError for a model that gives no map.
        """
        found = self.trunk.forward_features(pixels)
        if isinstance(found, Tensor) and found.ndim == 4:
            return found.permute(0, 3, 1, 2) if self.last else found, None
        if isinstance(found, Tensor) and found.ndim == 3:
            tokens = found[:, self.prefix :]
            side = math.isqrt(tokens.shape[1])
            if side * side == tokens.shape[1]:
                grid = tokens.transpose(1, 2).unflatten(2, (side, side))
                return grid, found[:, 0] if self.has_class else None
        raise PairmillError(f"`{self.label}` gives no feature map of rows and columns. Pass another backbone.")


@dataclass(frozen=True)
class ClipBackbone:
    """`clip:...`. At another size the ViT's position embedding is resampled by open_clip's `resize_pos_embed`
    (bicubic, antialiased); a timm tower's by timm's `set_input_size`; a ResNet needs none.
    """

    source: ClipSource
    size: int

    @property
    def label(self) -> str:
        return f"clip:{self.source.label}"

    @property
    def sha256(self) -> str:
        return self.source.sha256

    @property
    def preprocess(self) -> dict[str, Any]:
        return json.loads(self.source.preprocess) | {"size": self.size}

    @property
    def identity(self) -> dict[str, Any]:
        return self.source.identity() | {"backbone": "clip", "preprocess": self.preprocess}

    def resize(self) -> Resize:
        return image_resize(self.preprocess)

    def build(self, device: torch.device) -> Tower:
        model = _built(self.source)
        visual = model.visual
        own = json.loads(self.source.preprocess)["size"]
        if isinstance(visual, TimmModel):
            if self.size != own:
                _set_size(visual.trunk, self.size, self.label)
            return TimmTower(visual.trunk, self.label).to(device).eval()
        if self.size != own and isinstance(visual, VisionTransformer):
            check_patch_size(self.size, visual.patch_size[0])
            state = {"visual.positional_embedding": visual.positional_embedding.detach()}
            visual.grid_size = (self.size // visual.patch_size[0], self.size // visual.patch_size[1])
            resize_pos_embed(state, model)
            visual.positional_embedding = nn.Parameter(state["visual.positional_embedding"])
        return ClipTower(visual).to(device).eval()


@dataclass(frozen=True)
class TimmBackbone:
    """`timm:NAME`. At another size than its own the model is set to it by timm's `set_input_size` before the weights
    are read, and timm's `checkpoint_filter_fn` resamples them: position embeddings bicubic and antialiased
    (`resample_abs_pos_embed`), Swin's tables of relative positions (`resize_rel_pos_bias_table`), whose windows keep
    their share of the map, as METER's do.

    name       NAME, or NAME.TAG
    data       timm's data config at `size`, as JSON
    """

    name: str
    weights: str
    sha256: str
    size: int
    data: str

    @property
    def label(self) -> str:
        return f"timm:{self.name}"

    @property
    def preprocess(self) -> dict[str, Any]:
        return json.loads(self.data)

    @property
    def identity(self) -> dict[str, Any]:
        name = self.name.partition(".")[0]
        return {"backbone": f"timm:{name}", "weights": self.sha256, "preprocess": self.preprocess}

    def resize(self) -> Resize:
        transform = timm.data.create_transform(**self.preprocess, is_training=False, normalize=False)
        return lambda rgb: transform(Image.fromarray(rgb)).permute(1, 2, 0).numpy()

    def build(self, device: torch.device) -> Tower:
        with quiet():
            model = timm.create_model(self.name, pretrained=False, num_classes=0)
        if self.size != model.pretrained_cfg["input_size"][-1]:
            _set_size(model, self.size, self.label)
        state = _adapted(read_checkpoint(self.weights).tensors, model)
        classifier = model.pretrained_cfg.get("classifier") or ()
        for name in (classifier,) if isinstance(classifier, str) else classifier:
            state.pop(f"{name}.weight", None)
            state.pop(f"{name}.bias", None)
        fill(model, state, self.label, Path(self.weights))
        return TimmTower(model, self.label).to(device).eval()


def find_backbone(config: GridConfig) -> Backbone:
    """What `--backbone`, `--weights`, `--pretrained` and `--size` mean.

    Raises PairmillError: an unknown name or tag, no weights, weights that cannot be fetched.
    """
    kind, _, name = config.backbone.partition(":")
    if kind == "clip":
        return _find_clip(name, config)
    if kind == "timm":
        return _find_timm(name, config)
    raise PairmillError(
        f"`--backbone {config.backbone}`: no such kind of backbone.{_suggest(config.backbone)} "
        "Pass clip:NAME or timm:NAME."
    )


def _suggest(backbone: str) -> str:
    every = [*(f"clip:{n}" for n in open_clip.list_models()), *(f"timm:{n}" for n in timm.list_models())]
    return suggest(backbone, every)


def _find_clip(name: str, config: GridConfig) -> ClipBackbone:
    if config.weights and config.pretrained:
        raise PairmillError("`--weights` and `--pretrained` both say which weights `clip:` has. Drop one.")
    if not (name.startswith(LOCAL) or Path(name).is_dir() or name in open_clip.list_models()):
        raise PairmillError(
            f"`--backbone clip:{name}`: open_clip knows no such model and there is no such folder."
            f"{_suggest(config.backbone)}"
        )
    try:
        source = find_clip(name, config.weights or config.pretrained)
    except PairmillError as error:  # which speaks of `score clip`'s option
        raise PairmillError(str(error).replace("--model ", "--backbone clip:")) from None
    return ClipBackbone(source, config.size or json.loads(source.preprocess)["size"])


def _find_timm(name: str, config: GridConfig) -> TimmBackbone:
    if name not in timm.list_models():
        raise PairmillError(
            f"`--backbone timm:{name}`: timm knows no such model.{_suggest(config.backbone)} "
            "A tag is passed by --pretrained."
        )
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")]
    if config.pretrained and config.pretrained not in tags:
        raise PairmillError(
            f"`--pretrained {config.pretrained}`: no tag of timm's {name}.{suggest(config.pretrained, tags)} "
            f"Its tags: {', '.join(tags) or 'none'}. A file is passed by --weights."
        )
    full = f"{name}.{config.pretrained}" if config.pretrained else name
    cfg = timm.models.get_pretrained_cfg(full).to_dict()
    data = timm.data.resolve_data_config({}, pretrained_cfg=cfg)
    _, height, width = data["input_size"]
    if config.size is None and height != width:
        raise PairmillError(f"`--backbone timm:{name}` sees {width} x {height} px. Pass --size for a square.")
    size = config.size or height
    if config.weights:
        weights = Path(config.weights).absolute()
        if not weights.is_file():
            raise PairmillError(f"`--weights {config.weights}`: no such file.")
    elif config.pretrained:
        weights = _fetch(full, cfg)
    else:
        raise PairmillError(
            f"`--backbone timm:{name}` says which architecture, not which weights. Pass --weights FILE, or "
            f"--pretrained with one of its tags: {', '.join(tags) or 'it has none'}."
        )
    data["input_size"] = (3, size, size)
    return TimmBackbone(full, str(weights), hash_file(weights), size, json.dumps(data, sort_keys=True))


def _fetch(full: str, cfg: Mapping[str, Any]) -> Path:
    """The weights of NAME.TAG: from the cache of timm's hub, else from the hub."""
    repo = cfg.get("hf_hub_id")
    names = [cfg["hf_hub_filename"]] if cfg.get("hf_hub_filename") else FOLDER_FILES
    try:
        if not repo:
            raise FileNotFoundError("timm's hub does not have them")
        for name in names:
            try:
                return Path(hf_hub_download(repo, name, local_files_only=True))
            except FileNotFoundError:
                continue
        # Asked first: the hub's download tries for most of a minute where nobody answers.
        there = [file.rfilename for file in HfApi().model_info(repo, timeout=_ONLINE_TIMEOUT_S).siblings or ()]
        return Path(hf_hub_download(repo, next(name for name in names if name in there)))
    except Exception as error:  # whatever the hub raises
        name, _, tag = full.partition(".")
        where = f"https://huggingface.co/{repo}" if repo else cfg.get("url")
        raise PairmillError(
            f"`--backbone timm:{name} --pretrained {tag}`: the weights are not on this machine and cannot be fetched "
            f"({' '.join(str(error).split())[:160]}). Fetch {where} elsewhere and pass the file, too: --weights FILE."
        ) from None


def _built(source: ClipSource) -> nn.Module:
    try:
        return source.build(torch.device("cpu"))
    except PairmillError:
        with quiet():
            bare = open_clip.create_model(source.spec, load_weights=False, pretrained_text=False)
        state = convert_state_dict(bare, dict(read_checkpoint(source.weights).tensors))
        fill(bare, state, source.label, Path(source.weights))
        raise


def _adapted(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors under timm's names and in the model's size, by the function that timm's own loading uses."""
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if adapt is None:
        return dict(tensors)
    try:
        with _silent():
            return dict(adapt(dict(tensors), model))
    except Exception:  # names of another architecture: what does not fit is told when they are loaded
        return dict(tensors)


def _set_size(model: nn.Module, size: int, label: str) -> None:
    """Raises PairmillError: a model of one size only, or a size that is no whole number of patches."""
    own = model.pretrained_cfg["input_size"][-1]
    if not hasattr(model, "set_input_size"):
        if model.pretrained_cfg.get("fixed_input_size"):
            raise PairmillError(f"`{label}` computes at {own} px only. Drop --size {size}.")
        return
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if patch is not None:
        check_patch_size(size, patch[0])
    with _silent():
        model.set_input_size(img_size=(size, size))


@contextmanager
def _silent() -> Iterator[None]:
    """timm's resampling of Swin's tables warns of its own speed and indexing."""
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
